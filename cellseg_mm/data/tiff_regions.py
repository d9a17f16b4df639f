"""Regions of TIFFs: only the tiles or strips that a region needs are decoded.

In: what :mod:`contents` selected of an open TIFF. Out: an image reader. Invariant: memory follows
the region and a bounded cache of decoded tiles, never the image; a tile that a slide leaves out is
background, one that is cut off is an error.
"""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from cellseg_mm.core.errors import ImageError
from cellseg_mm.data import intensity, tiff
from cellseg_mm.data.colours import apply_palette, associated_alpha, divide_by_alpha
from cellseg_mm.data.contents import Page, Plane, Selection, level_hw
from cellseg_mm.data.intensity import ValueRange
from cellseg_mm.data.regions import Picture, Region, StoredRegions, Values

CACHE_BYTES = 256 << 20
MAX_SEGMENT_BYTES = 1 << 30


class TiffRegions(StoredRegions):
    """Decodes only the tiles or strips that a region needs, and remembers the last ones."""

    def __init__(
        self, path: Path, selection: Selection, level: int, value_range: ValueRange | None
    ) -> None:
        level_hws = [level_hw(series) for series in selection.levels]
        super().__init__(path, level_hws, level, says=selection.says)
        self._key = selection.levels[level].keyframe
        self._planes = selection.planes
        self._pages: list[Page] = list({id(p.page): p.page for p in self._planes}.values())
        self._header = tiff.header_of(self._key)
        self._empty = [frozenset[int]() for _ in self._pages]
        self._dtype: np.dtype[Any] = np.dtype(self._key.dtype or np.void)
        self._check()
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int], Values] = OrderedDict()
        self._cache_bytes = 0
        if self._header.photometric == 3:  # a palette's numbers are no brightness
            self.take_range(np.dtype(np.uint8), 8, None)
        else:
            self.take_range(self._dtype, self._header.bits, value_range)
        rows, columns = self._segment_hw()
        is_tiled = self._key.is_tiled
        self.block_hw = max(rows, 64), max(columns, 1024) if is_tiled else self.image_hw[1]

    def _check(self) -> None:
        key, path = self._key, self.path
        if self._dtype.kind not in 'buif' or key.imagedepth != 1:
            raise ImageError(
                f'{path}: values of type {key.dtype}, {key.imagedepth} planes in depth; expected '
                'flat RGB or grey; convert the image.'
            )
        if min(self.image_hw) < 1 or (self._header.photometric == 3 and key.colormap is None):
            raise ImageError(
                f'{path}: the image is {tiff.size_text(self.image_hw)}, or lacks its palette; '
                f'expected at least one px, and its colours; {tiff.FIX}.'
            )
        for k, page in enumerate(self._pages):
            self._check_alike(_key_of(page))
            self._empty[k] = self._empty_of(page)
        self._say_empty()
        rows, columns = self._segment_hw()
        n_bytes = rows * columns * self._samples_per_segment() * self._dtype.itemsize
        if n_bytes > MAX_SEGMENT_BYTES and not self._is_plain():
            raise ImageError(
                f'{path}: its tiles or strips are {rows} x {columns} px, {n_bytes >> 20} MiB each; '
                f'at most {MAX_SEGMENT_BYTES >> 20} MiB are decoded at once; save it as a tiled '
                'TIFF, with tiles of 512 px.'
            )
        if self._by_libtiff() and key.bitspersample not in (8, 16, 32, 64):
            raise ImageError(
                f'{path}: {key.bitspersample} bits per value with LZW or deflate cannot be read by '
                'region; expected 8, 16 or 32; convert the image.'
            )
        if any(plane.skip for plane in self._planes) and not self._is_plain():
            raise ImageError(
                f'{path}: is a stack that lists one page and is not stored plainly; expected a '
                'page for each plane; save the right plane alone.'
            )

    def _check_alike(self, key: tifffile.TiffPage) -> None:
        """Refuse channels of different form; each comes with its own header."""
        names = (
            *(
                'imagelength',
                'imagewidth',
                'samplesperpixel',
                'dtype',
                'photometric',
                'planarconfig',
            ),
            *('is_tiled', 'tilelength', 'tilewidth', 'rowsperstrip', 'compression', 'predictor'),
        )
        if any(getattr(key, name) != getattr(self._key, name) for name in names):
            raise ImageError(
                f'{self.path}: its channels are stored in different ways; expected the same size, '
                'type and compression; save the channels to use as RGB.'
            )

    def _empty_of(self, page: Page) -> frozenset[int]:
        """Return the numbers of the tiles that are left out; check that all others are there."""
        offsets = np.asarray(page.dataoffsets, dtype=np.uint64).astype(np.int64)
        counts = np.asarray(page.databytecounts, dtype=np.uint64).astype(np.int64)
        n_expected = int(np.prod(self._key.chunked))
        is_complete = len(offsets) == len(counts) >= n_expected
        is_empty = counts == 0 if self._key.is_tiled else np.zeros(len(counts), dtype=bool)
        is_there = (offsets > 0) & (counts > 0) if is_complete else is_empty
        n_found = int((is_there | is_empty)[:n_expected].sum()) if is_there.any() else 0
        if n_found < n_expected:
            raise ImageError(
                f'{self.path}: {n_found} of {n_expected} strips or tiles have data; expected all; '
                f'{tiff.FIX}.'
            )
        end = int((offsets + counts)[is_there].max())
        end += max(plane.skip for plane in self._planes if plane.page is page)
        size = page.parent.filehandle.size
        if end > size:
            raise ImageError(
                f'{self.path}: the file is truncated: it has {size} bytes, its header promises '
                f'{end}; expected the whole file; copy it again.'
            )
        if is_empty[0] and _key_of(page).compression in tiff.JPEG_CODECS:
            # tifffile looks into the first tile for what the colours are
            first = int(np.flatnonzero(is_there)[0])
            head = self._bytes(page, int(offsets[first]), min(int(counts[first]), 10))
            _key_of(page).__dict__['is_jfif'] = head[6:10] == b'JFIF'
        return frozenset(np.flatnonzero(is_empty).tolist())

    def _say_empty(self) -> None:
        n_empty = sum(len(numbers) for numbers in self._empty)
        if n_empty:
            n_all = sum(len(page.dataoffsets) for page in self._pages)
            colour = 'white' if self._header.photometric in (0, 2, 6) else 'the value 0'
            says = f'{n_empty} of {n_all} tiles are empty and were taken for {colour}'
            self.says = f'{self.says}; {says}' if self.says else says

    # -------------------------------------------------------------------------- geometry

    def _segment_hw(self) -> tuple[int, int]:
        if self._key.is_tiled:
            return self._key.tilelength, self._key.tilewidth
        rows = min(self._key.rowsperstrip, self.image_hw[0])
        return rows, self.image_hw[1]

    def _samples_per_segment(self) -> int:
        return 1 if self._key.planarconfig == 2 else self._key.samplesperpixel

    # -------------------------------------------------------------------------- decoding

    def _by_libtiff(self) -> bool:
        return self._key.compression in tiff.BY_LIBTIFF

    def _is_plain(self) -> bool:
        """Tell whether rows can be read without decoding the strip that they are in."""
        key = self._key
        is_whole_bytes = key.bitspersample == 8 * self._dtype.itemsize
        is_plain = key.compression == 1 and key.predictor == 1 and key.fillorder == 1
        return is_plain and is_whole_bytes and not key.is_tiled

    @staticmethod
    def _bytes(page: Page, offset: int, n_bytes: int) -> bytes:
        """Read from the page's own file: channels may lie in several."""
        file = page.parent.filehandle
        if file.closed:  # tifffile closes the others of a set, and all at its end
            file.open()
        file.seek(offset)
        data: bytes = file.read(n_bytes)
        return data

    def _decode(self, page_index: int, index: int) -> Values:
        """Return one tile or strip, (h, w, samples), cut to the image."""
        with self._lock:
            found = self._cache.get((page_index, index))
            if found is not None:
                self._cache.move_to_end((page_index, index))
                return found
            page = self._pages[page_index]
            data = self._bytes(page, page.dataoffsets[index], page.databytecounts[index])
        try:
            pixels = self._decode_segment(page, data, index)
        except Exception as problem:  # codecs raise whatever they trip over
            raise ImageError(
                f'{self.path}: strip or tile {index} is damaged ({str(problem)[:120]}); expected '
                f'readable pixels; {tiff.FIX}.'
            ) from problem
        with self._lock:
            # another thread may have decoded the same meanwhile
            before = self._cache.pop((page_index, index), None)
            self._cache[page_index, index] = pixels
            self._cache_bytes += pixels.nbytes - (before.nbytes if before is not None else 0)
            while self._cache_bytes > CACHE_BYTES and len(self._cache) > 1:
                self._cache_bytes -= self._cache.popitem(last=False)[1].nbytes
        return pixels

    def _decode_segment(self, page: Page, data: bytes, index: int) -> Values:
        rows, columns = self._segment_hw()
        key = _key_of(page)
        if not self._by_libtiff():
            options = {}
            if key.compression in tiff.JPEG_CODECS:
                options = {'jpegtables': page.jpegtables, 'jpegheader': key.jpegheader}
            decoded, _, _ = key.decode(data, index, **options)
            if decoded is None:
                raise ValueError('no data')
            pixels: Values = decoded[0]
            return tiff.rgb_of_aperio(pixels, data, key)
        row = index % self._n_segments_per_plane() // self._n_columns()
        if not key.is_tiled:
            rows = min(rows, self.image_hw[0] - row * rows)
        import imagecodecs  # large, and only these files need it

        content = _single_strip_file(key, data, (rows, columns), self._samples_per_segment())
        unpacked: Values = imagecodecs.tiff_decode(content, index=0)
        return unpacked.reshape(rows, columns, -1)

    def _n_columns(self) -> int:
        return -(-self.image_hw[1] // self._segment_hw()[1])

    def _n_segments_per_plane(self) -> int:
        return -(-self.image_hw[0] // self._segment_hw()[0]) * self._n_columns()

    # --------------------------------------------------------------------------- regions

    def _segments(self, plane: Plane, region: Region) -> list[tuple[int, int, int, Region]]:
        """Return number, top, left and the inner region of each tile or strip in a region."""
        y0, x0, y1, x1 = region
        rows, columns = self._segment_hw()
        base = plane.sample * self._n_segments_per_plane() if self._header.is_planar else 0
        found = []
        for row in range(y0 // rows, -(-y1 // rows)):
            for column in range(x0 // columns, -(-x1 // columns)):
                top, left = row * rows, column * columns
                inner = (max(y0, top), max(x0, left), min(y1, top + rows), min(x1, left + columns))
                found.append((base + row * self._n_columns() + column, top, left, inner))
        return found

    def _values(self, plane: Plane, region: Region) -> Values:
        """Return (h, w, samples) of what lies together with a plane, in the stored type."""
        y0, x0, y1, x1 = region
        out = np.zeros((y1 - y0, x1 - x0, self._samples_per_segment()), dtype=self._dtype)
        number = self._number_of(plane)
        for index, top, left, (a, b, c, d) in self._segments(plane, region):
            if index in self._empty[number]:
                continue
            if self._is_plain():
                part = self._read_rows(plane, index, (a - top, b, c - top, d))
            else:
                part = self._decode(number, index)[a - top : c - top, b - left : d - left]
            out[a - y0 : c - y0, b - x0 : d - x0] = part
        return out

    def _number_of(self, plane: Plane) -> int:
        return next(k for k, page in enumerate(self._pages) if page is plane.page)

    def _read_rows(self, plane: Plane, index: int, region: Region) -> Values:
        """Read rows of an uncompressed strip from the file; nothing else is touched."""
        y0, x0, y1, x1 = region
        n_samples = self._samples_per_segment()
        stored = np.dtype(self._dtype).newbyteorder(plane.page.parent.byteorder)
        row_bytes = self.image_hw[1] * n_samples * stored.itemsize
        start = plane.page.dataoffsets[index] + plane.skip + y0 * row_bytes
        with self._lock:
            data = self._bytes(plane.page, start, (y1 - y0) * row_bytes)
        if len(data) < (y1 - y0) * row_bytes:
            raise ImageError(f'{self.path}: strip {index} is too short; {tiff.FIX}.')
        rows = np.frombuffer(data, dtype=stored).reshape(y1 - y0, self.image_hw[1], n_samples)
        return rows[:, x0:x1]

    def _stored(self, region: Region) -> Values:
        """Return the chosen channels of a region in the stored type, (h, w, 1 or 3)."""
        values = self._as_stored(self._planes, region)
        alpha, first = associated_alpha(self._header), self._planes[0]
        if alpha is None or self._header.photometric == 3:
            return values
        at_alpha = self._as_stored((Plane(first.page, first.skip, alpha),), region)
        return divide_by_alpha(values, at_alpha, self._header.bits)

    def _as_stored(self, planes: tuple[Plane, ...], region: Region) -> Values:
        first, samples = planes[0], [plane.sample for plane in planes]
        is_one = all((p.page, p.skip) == (first.page, first.skip) for p in planes)
        if is_one and not self._header.is_planar:
            together = self._values(first, region)
            is_in_order = samples == list(range(len(samples)))
            return together[..., : len(samples)] if is_in_order else together[..., samples]
        at = [0 if self._header.is_planar else sample for sample in samples]
        parts = [
            self._values(plane, region)[..., k : k + 1] for plane, k in zip(planes, at, strict=True)
        ]
        return np.concatenate(parts, axis=2)

    def _whiten(self, picture: Picture, region: Region) -> None:
        """Make what a slide leaves out white, as OpenSlide shows it; grey stays as 0 is."""
        for channel, plane in enumerate(self._planes):
            empty = self._empty[self._number_of(plane)]
            for index, _, _, (a, b, c, d) in self._segments(plane, region) if empty else ():
                if index in empty:
                    y0, x0 = region[:2]
                    picture[a - y0 : c - y0, b - x0 : d - x0, channel] = 255

    def _read(self, y0: int, x0: int, y1: int, x1: int) -> Picture:
        region = (y0, x0, y1, x1)
        values = self._stored(region)
        if self._header.photometric == 3:
            palette = np.asarray(self._key.colormap, dtype=np.uint16)
            return apply_palette(self.path, values[..., 0], palette)
        self._know_range()
        picture = intensity.to_uint8(self.path, values, self._header.bits, self.value_range)
        if self._header.photometric in (2, 6) and any(self._empty):
            picture = np.array(picture)
            self._whiten(picture, region)
        if self._header.photometric == 0:
            picture = 255 - picture
        if picture.shape[2] == 1:
            return np.repeat(picture, 3, axis=2)
        return np.ascontiguousarray(picture)


def _key_of(page: Page) -> tifffile.TiffPage:
    """Return the page that has all the tags that pages of its kind share."""
    if page.keyframe is None:
        raise AssertionError('tifffile gives every page of a series its keyframe')
    return page.keyframe


def _single_strip_file(
    page: tifffile.TiffPage, data: bytes, hw: tuple[int, int], n_samples: int
) -> bytes:
    """Return a TIFF whose only strip is ``data``, so that libtiff decodes it; see ``tiff``."""
    order = page.parent.byteorder
    long_, short = 4, 3
    sample_format = {'u': 1, 'b': 1, 'i': 2, 'f': 3}[np.dtype(page.dtype).kind]
    entries: list[tuple[int, int, list[int]]] = [
        (256, long_, [hw[1]]),
        (257, long_, [hw[0]]),
        (258, short, [page.bitspersample] * n_samples),
        (259, short, [int(page.compression)]),
        (262, short, [2 if n_samples >= 3 else 1]),
        (266, short, [int(page.fillorder)]),
        (273, long_, [0]),  # filled in below
        (277, short, [n_samples]),
        (278, long_, [hw[0]]),
        (279, long_, [len(data)]),
        (284, short, [1]),
        (317, short, [int(page.predictor)]),
        (339, short, [sample_format] * n_samples),
    ]
    n_extra = n_samples - (3 if n_samples >= 3 else 1)
    if n_extra:
        entries.insert(-1, (338, short, [0] * n_extra))
    table_at, extra = 8, b''
    extra_at = table_at + 2 + 12 * len(entries) + 4
    n_extra_bytes = sum(2 * len(v) + len(v) % 2 * 2 for _, _, v in entries if len(v) > 2)
    table = struct.pack(order + 'H', len(entries))
    for tag, kind, values in entries:
        code = 'I' if kind == long_ else 'H'
        if tag == 273:
            values = [extra_at + n_extra_bytes]
        packed = struct.pack(f'{order}{len(values)}{code}', *values)
        if len(packed) > 4:
            field = struct.pack(order + 'I', extra_at + len(extra))
            extra += packed + b'\0' * (-len(packed) % 4)
        else:
            field = packed.ljust(4, b'\0')
        table += struct.pack(order + 'HHI', tag, kind, len(values)) + field
    magic = (b'II' if order == '<' else b'MM') + struct.pack(order + 'HI', 42, table_at)
    return magic + table + b'\0' * 4 + extra + data

"""Regions of images that may be far larger than memory.

In: a path: TIFF, BigTIFF, OME-TIFF or pyramid by region, anything else whole. Out: an
:class:`ImageReader` whose ``read`` gives (h, w, 3) uint8 in the channel order of the file.
Invariant: for every region the pixels are those of ``labels.read_image``; memory follows the
region and a bounded cache of decoded tiles, never the image.
"""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from cellseg_mm.core.errors import ConfigError, ImageError
from cellseg_mm.data import labels, tiff

Picture = NDArray[np.uint8]

SUFFIXES = (
    '.tif',
    '.tiff',
    '.btf',
    '.tf8',
    '.svs',
    '.ndpi',
    '.scn',
    '.png',
    '.jpg',
    '.jpeg',
    '.bmp',
)
WHOLE_PX = 4096 * 4096  # a TIFF of one page up to this size is read and checked whole, 48 MB
CACHE_BYTES = 256 << 20
MAX_SEGMENT_BYTES = 1 << 30
_TIFF_MAGIC = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')


class ImageReader:
    """Reads regions of one image.

    Attributes:
        path: The file.
        image_hw: Height and width of the level in px.
        level_hws: Sizes of all levels of a pyramid, largest first.
        level: The level that is read.
    """

    def __init__(self, path: Path, level_hws: list[tuple[int, int]], level: int) -> None:
        self.path, self.level_hws, self.level = path, level_hws, level
        self.image_hw = level_hws[level]

    @property
    def downsample(self) -> float:
        """Pixels of the largest level per pixel of this one, along the height."""
        return self.level_hws[0][0] / self.image_hw[0]

    def read(self, y0: int, x0: int, y1: int, x1: int) -> Picture:
        """Return rows y0 to y1 and columns x0 to x1, half-open; own memory.

        Raises:
            ValueError: The region is empty or leaves the image.
            ImageError: The file is damaged there.
        """
        if not (0 <= y0 < y1 <= self.image_hw[0] and 0 <= x0 < x1 <= self.image_hw[1]):
            raise ValueError(f'{self.path}: no region {y0, x0, y1, x1} in {self.image_hw} px')
        return self._read(y0, x0, y1, x1)

    def _read(self, y0: int, x0: int, y1: int, x1: int) -> Picture:
        raise NotImplementedError


class _WholeImage(ImageReader):
    def __init__(self, path: Path, pixels: Picture) -> None:
        super().__init__(path, [pixels.shape[:2]], 0)
        self._pixels = pixels

    def _read(self, y0: int, x0: int, y1: int, x1: int) -> Picture:
        return self._pixels[y0:y1, x0:x1].copy()


@contextmanager
def open_image(
    path: Path | str, *, level: int = 0, whole_px: int = WHOLE_PX
) -> Iterator[ImageReader]:
    """Open an image for reading by region.

    Args:
        path: A TIFF of any kind, or a PNG, JPEG or BMP, which are read whole.
        level: Level of a pyramid, 0 the largest.
        whole_px: Plain TIFFs of at most so many pixels are read whole.

    Raises:
        ImageError: The file cannot be read, is damaged, or its pixels are no RGB or grey image;
            see ``labels.read_image``.
        ConfigError: There is no such level.
    """
    path = Path(path)
    if not _is_tiff(path):
        _refuse_level(path, level, [()])
        yield _WholeImage(path, _read_other(path))
        return
    with _open_tiff(path) as file:
        levels = _levels(path, file)
        _refuse_level(path, level, [_level_hw(series) for series in levels])
        height, width = _level_hw(levels[0])
        if len(levels) == 1 and len(file.pages) == 1 and height * width <= whole_px:
            reader: ImageReader = _WholeImage(path, labels.read_image(path, max_pixels=whole_px))
        else:
            reader = _TiffRegions(path, levels, level)
        yield reader


def _is_tiff(path: Path) -> bool:
    try:
        with path.open('rb') as stream:
            return stream.read(4) in _TIFF_MAGIC
    except OSError as problem:
        raise ImageError(
            f'{path}: cannot be opened ({problem.strerror}); expected an image file; check the '
            'path, the link and the permissions.'
        ) from problem


def _refuse_level(path: Path, level: int, level_hws: list) -> None:
    if not 0 <= level < len(level_hws):
        sizes = ', '.join(tiff.size_text(hw) for hw in level_hws if hw) or 'no pyramid'
        raise ConfigError(
            f'{path}: has no level {level}; it has {len(level_hws)} ({sizes}); choose --level from '
            f'0 to {len(level_hws) - 1}'
        )


def _read_other(path: Path) -> Picture:
    """Read a PNG, JPEG or BMP whole, at its own depth and as stored (no turning by EXIF)."""
    content = np.fromfile(path, dtype=np.uint8)
    values = None
    if len(content):
        flags = cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION
        try:
            values = cv2.imdecode(content, flags)
        except cv2.error:
            values = None  # more than 2^30 px, or damaged: the message is the same
    if values is None:
        raise ImageError(
            f'{path}: cannot be read as an image; expected TIFF, PNG, JPEG or BMP, whole and of '
            'less than 2^30 px; export it again, or convert it to a tiled TIFF.'
        )
    if values.shape[0] * values.shape[1] > tiff.DEFAULT_MAX_PIXELS:
        raise ImageError(
            f'{path}: {tiff.size_text(values.shape[:2])}; at most {tiff.DEFAULT_MAX_PIXELS} px are '
            'read whole; convert it to a tiled TIFF, which is read by region.'
        )
    if values.ndim == 2 or values.shape[2] == 2:
        values = values.reshape(*values.shape[:2], -1)[..., :1]
        return np.repeat(labels.to_uint8(path, values, 8 * values.dtype.itemsize), 3, axis=2)
    values = labels.to_uint8(path, values[..., :3], 8 * values.dtype.itemsize)
    return np.ascontiguousarray(values[..., ::-1])  # OpenCV gives blue first


@contextmanager
def _open_tiff(path: Path) -> Iterator[tifffile.TiffFile]:
    tiff.check_file(path, ImageError)
    try:
        with tifffile.TiffFile(path) as file:
            yield file
    except (ImageError, ConfigError):
        raise
    except (tifffile.TiffFileError, struct.error, KeyError, IndexError, TypeError) as problem:
        raise ImageError(
            f'{path}: the file is damaged or of an unknown kind ({str(problem)[:120]}); expected a '
            'readable TIFF; export it again.'
        ) from problem


def _levels(path: Path, file: tifffile.TiffFile) -> list[tifffile.TiffPageSeries]:
    """Return the levels of the first image of the file."""
    if not len(file.pages) or not file.series:
        raise ImageError(f'{path}: the TIFF has no image in it; expected one; {tiff.FIX}.')
    levels = list(file.series[0].levels)
    axes, shape = levels[0].axes, levels[0].shape
    is_channels = axes == 'CYX' and shape[0] in (1, 3, 4)
    if axes not in ('YX', 'YXS', 'SYX') and not is_channels:
        raise ImageError(
            f'{path}: the image has the axes {axes} and the shape {shape}; expected one plane of '
            'RGB or grey (YX, YXS, SYX or CYX with 1, 3 or 4 channels); save the right plane alone.'
        )
    return levels


def _level_hw(series: tifffile.TiffPageSeries) -> tuple[int, int]:
    return int(series.keyframe.imagelength), int(series.keyframe.imagewidth)


class _TiffRegions(ImageReader):
    """Decodes only the tiles or strips that a region needs, and remembers the last ones."""

    def __init__(self, path: Path, levels: list[tifffile.TiffPageSeries], level: int) -> None:
        super().__init__(path, [_level_hw(series) for series in levels], level)
        series = levels[level]
        self._key = series.keyframe
        self._pages = [page for page in series.pages if page is not None]
        self._header = tiff.header_of(self._key)
        self._check(series)
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int], NDArray] = OrderedDict()
        self._cache_bytes = 0
        self._extremes: list | None = None
        self._extremes_lock = threading.Lock()

    def _check(self, series: tifffile.TiffPageSeries) -> None:
        key, path = self._key, self.path
        n_channels = series.shape[0] if series.axes == 'CYX' else 1
        if len(self._pages) != n_channels:
            raise ImageError(
                f'{path}: {len(self._pages)} of {n_channels} channels are there; {tiff.FIX}.'
            )
        labels.check_colours(path, self._header)
        if self._header.photometric == 3 or key.dtype is None or key.dtype.kind not in 'buif':
            raise ImageError(
                f'{path}: colours by palette or of type {key.dtype} cannot be read by region; '
                'expected RGB or grey; convert the image.'
            )
        size = path.stat().st_size
        for page in self._pages:
            self._check_complete(page, size)
        rows, columns = self._segment_hw()
        n_bytes = rows * columns * self._samples_per_segment() * key.dtype.itemsize
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

    def _check_complete(self, page: tifffile.TiffPage, size: int) -> None:
        offsets = np.asarray(page.dataoffsets, dtype=np.uint64).astype(np.int64)
        counts = np.asarray(page.databytecounts, dtype=np.uint64).astype(np.int64)
        n_expected = int(np.prod(self._key.chunked))
        n_found = int(((offsets > 0) & (counts > 0)).sum()) if len(offsets) == len(counts) else 0
        if n_found < n_expected:
            raise ImageError(
                f'{self.path}: {n_found} of {n_expected} strips or tiles have data; expected all; '
                f'{tiff.FIX}.'
            )
        if int((offsets + counts).max()) > size:
            raise ImageError(
                f'{self.path}: the file is truncated: it has {size} bytes, its header promises '
                f'{int((offsets + counts).max())}; expected the whole file; copy it again.'
            )

    # -------------------------------------------------------------------------- geometry

    def _segment_hw(self) -> tuple[int, int]:
        if self._key.is_tiled:
            return self._key.tilelength, self._key.tilewidth
        rows = min(self._key.rowsperstrip, self.image_hw[0])
        return rows, self.image_hw[1]

    def _samples_per_segment(self) -> int:
        return 1 if self._key.planarconfig == 2 else self._key.samplesperpixel

    def _n_used(self) -> int:
        """Channels that a picture has: three or one; alpha is dropped."""
        n = len(self._pages) if len(self._pages) > 1 else self._header.n_samples
        return 3 if n >= 3 else 1

    # -------------------------------------------------------------------------- decoding

    def _by_libtiff(self) -> bool:
        return self._key.compression in tiff.BY_LIBTIFF

    def _is_plain(self) -> bool:
        """Tell whether rows can be read without decoding the strip that they are in."""
        key = self._key
        is_whole_bytes = key.bitspersample == 8 * key.dtype.itemsize
        is_plain = key.compression == 1 and key.predictor == 1 and key.fillorder == 1
        return is_plain and is_whole_bytes and not key.is_tiled

    def _decode(self, page_index: int, index: int) -> NDArray:
        """Return one tile or strip, (h, w, samples), cut to the image."""
        with self._lock:
            found = self._cache.get((page_index, index))
            if found is not None:
                self._cache.move_to_end((page_index, index))
                return found
            page = self._pages[page_index]
            file = self._key.parent.filehandle
            file.seek(page.dataoffsets[index])
            data = file.read(page.databytecounts[index])
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

    def _decode_segment(self, page: tifffile.TiffPage, data: bytes, index: int) -> NDArray:
        rows, columns = self._segment_hw()
        if not self._by_libtiff():
            options = {}
            if self._key.compression in (6, 7, 33007, 34892):
                options = {'jpegtables': page.jpegtables, 'jpegheader': self._key.jpegheader}
            pixels, _, _ = self._key.decode(data, index, **options)
            if pixels is None:
                raise ValueError('no data')
            return pixels[0]
        row = index % self._n_segments_per_plane() // self._n_columns()
        if not self._key.is_tiled:
            rows = min(rows, self.image_hw[0] - row * rows)
        content = _single_strip_file(self._key, data, (rows, columns), self._samples_per_segment())
        pixels = imagecodecs.tiff_decode(content, index=0)
        return pixels.reshape(rows, columns, -1)

    def _n_columns(self) -> int:
        return -(-self.image_hw[1] // self._segment_hw()[1])

    def _n_segments_per_plane(self) -> int:
        return -(-self.image_hw[0] // self._segment_hw()[0]) * self._n_columns()

    # --------------------------------------------------------------------------- regions

    def _plane(self, page_index: int, plane: int, region: tuple[int, int, int, int]) -> NDArray:
        """Return (h, w, samples) of one page, or of one plane of it, in the stored type."""
        y0, x0, y1, x1 = region
        n_samples = self._samples_per_segment()
        out = np.zeros((y1 - y0, x1 - x0, n_samples), dtype=self._key.dtype)
        rows, columns = self._segment_hw()
        base = plane * self._n_segments_per_plane()
        for row in range(y0 // rows, -(-y1 // rows)):
            for column in range(x0 // columns, -(-x1 // columns)):
                top, left = row * rows, column * columns
                index = base + row * self._n_columns() + column
                inner = (max(y0, top), max(x0, left), min(y1, top + rows), min(x1, left + columns))
                a, b, c, d = inner
                if self._is_plain():
                    part = self._read_rows(page_index, index, (a - top, b, c - top, d))
                else:
                    segment = self._decode(page_index, index)
                    part = segment[a - top : c - top, b - left : d - left]
                out[a - y0 : c - y0, b - x0 : d - x0] = part
        return out

    def _read_rows(self, page_index: int, index: int, region: tuple[int, int, int, int]) -> NDArray:
        """Read rows of an uncompressed strip from the file; nothing else is touched."""
        y0, x0, y1, x1 = region
        n_samples = self._samples_per_segment()
        stored = np.dtype(self._key.dtype).newbyteorder(self._key.parent.byteorder)
        row_items = self.image_hw[1] * n_samples
        start = self._pages[page_index].dataoffsets[index] + y0 * row_items * stored.itemsize
        with self._lock:
            file = self._key.parent.filehandle
            file.seek(start)
            data = file.read((y1 - y0) * row_items * stored.itemsize)
        if len(data) < (y1 - y0) * row_items * stored.itemsize:
            raise ImageError(f'{self.path}: strip {index} is too short; {tiff.FIX}.')
        rows = np.frombuffer(data, dtype=stored).reshape(y1 - y0, self.image_hw[1], n_samples)
        return rows[:, x0:x1]

    def _stored(self, region: tuple[int, int, int, int]) -> NDArray:
        """Return the used channels of a region in the stored type, (h, w, 1 or 3)."""
        n_used = self._n_used()
        if len(self._pages) > 1:
            planes = [self._plane(page, 0, region) for page in range(n_used)]
        elif self._key.planarconfig == 2:
            planes = [self._plane(0, plane, region) for plane in range(n_used)]
        else:
            planes = [self._plane(0, 0, region)[..., :n_used]]
        return np.concatenate(planes, axis=2)

    def _scale_by(self) -> list:
        """Return the values that decide about the scale, found at the first read."""
        with self._extremes_lock:
            if self._extremes is None:
                self._extremes = self._find_extremes() if self._key.dtype.itemsize > 1 else []
            return self._extremes

    def _find_extremes(self) -> list:
        """Return the least and greatest value of the level."""
        height, width = self.image_hw
        step = max(self._segment_hw()[0], 64)
        across = width if not self._key.is_tiled else max(self._segment_hw()[1], 1024)
        low, high = [], []
        for y0 in range(0, height, step):
            for x0 in range(0, width, across):
                region = (y0, x0, min(y0 + step, height), min(x0 + across, width))
                values = self._stored(region)
                low.append(values.min())
                high.append(values.max())
        return [min(low), max(high)]

    def _read(self, y0: int, x0: int, y1: int, x1: int) -> Picture:
        values = self._stored((y0, x0, y1, x1))
        # The rule looks at the extremes of all values, so those of the whole level come along.
        flat = np.append(values.reshape(-1), np.array(self._scale_by(), dtype=values.dtype))
        grey8 = labels.to_uint8(self.path, flat, self._header.bits)[: values.size]
        grey8 = grey8.reshape(values.shape)
        if self._header.photometric == 0:
            grey8 = 255 - grey8
        if grey8.shape[2] == 1:
            return np.repeat(grey8, 3, axis=2)
        return np.ascontiguousarray(grey8)


def _single_strip_file(
    page: tifffile.TiffPage, data: bytes, hw: tuple[int, int], n_samples: int
) -> bytes:
    """Return a TIFF whose only strip is ``data``, so that libtiff decodes it; see ``tiff``."""
    order = page.parent.byteorder
    long_, short = 4, 3
    sample_format = {'u': 1, 'b': 1, 'i': 2, 'f': 3}[page.dtype.kind]
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

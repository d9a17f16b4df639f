"""Reading one TIFF page strictly: either all of its pixels, or one sentence about what is wrong.

In: a path. Out: a :class:`Raster` with the values as stored.
Invariant: size, layout and completeness are judged on the header before anything is decoded, so a
damaged or hostile file costs neither memory nor silently invented pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from cellseg_mm.core.errors import CellSegError
from cellseg_mm.data.file_kind import found_text, is_tiff, read_head

DEFAULT_MAX_PIXELS = 100_000_000  # 10000 x 10000; three bytes each make 300 MB
MAX_SAMPLES = 8
FIX = 'export it again'

# LZW and deflate go through libtiff. imagecodecs' own LZW decoder (2026.3.6) takes any code after a
# clear code, reads outside its table and can end the process; libtiff checks it, is fuzzed by its
# authors, and is twice as fast on the real images.
BY_LIBTIFF = (5, 8, 32946)
JPEG_CODECS = (7, 33007, 34892)
APERIO_YCBCR = 33003  # JPEG 2000 of YCbCr without a component transform, whatever the tag says


@dataclass(frozen=True, slots=True)
class Header:
    """What a page says about itself.

    Attributes:
        hw: Height and width in px.
        n_samples: Values per pixel.
        bits: Bits per value.
        photometric: TIFF's number for the meaning of the values (0 white is zero, 1 black is zero,
            2 RGB, 3 palette, 5 CMYK, 6 YCbCr).
        compression: TIFF's number for the compression (1 none, 5 LZW, 7 JPEG, 8 deflate).
        orientation: TIFF's number for how the picture lies (1 as stored).
        extra_samples: TIFF's numbers for what further values per pixel are (1 and 2 alpha, 0
            anything); empty without the tag.
        is_planar: The values of a pixel do not lie together.
    """

    hw: tuple[int, int]
    n_samples: int
    bits: int
    photometric: int
    compression: int
    orientation: int
    extra_samples: tuple[int, ...] = ()
    is_planar: bool = False


@dataclass(frozen=True, slots=True)
class Raster:
    """One decoded page.

    Attributes:
        values: (H, W, S) of the stored dtype.
        header: See :class:`Header`.
        palette: (3, 2 ** bits) uint16 for palette images, else (3, 0).
    """

    values: NDArray[Any]
    header: Header
    palette: NDArray[np.uint16]


def read_header(
    path: Path, *, max_pixels: int = DEFAULT_MAX_PIXELS, error: type[CellSegError] = CellSegError
) -> Header:
    """Read and check a TIFF's header only.

    Args:
        path: The file.
        max_pixels: Most pixels (height times width) that are accepted.
        error: The class to raise.

    Raises:
        CellSegError: As ``error``; see :func:`read_raster`, apart from damaged pixel data.
    """
    with _page(path, max_pixels, error) as (_, header):
        return header


def read_raster(
    path: Path, *, max_pixels: int = DEFAULT_MAX_PIXELS, error: type[CellSegError] = CellSegError
) -> Raster:
    """Read the only page of a TIFF: any compression, striped or tiled, either planar layout.

    Args:
        path: The file.
        max_pixels: Most pixels (height times width) that are accepted.
        error: The class to raise.

    Raises:
        CellSegError: As ``error``: the file is missing, unreadable, empty, no TIFF, truncated, has
            several pages or planes, is larger than ``max_pixels``, or cannot be decoded.
    """
    with _page(path, max_pixels, error) as (page, header):
        if page.dtype is None:
            raise error(f'{path}: the pixels have no known type; expected a TIFF image; {FIX}.')
        stored = _decode(path, page)
        values = stored[0, 0] if stored.shape[0] == 1 else np.moveaxis(stored[:, 0, :, :, 0], 0, -1)
        palette: NDArray[np.uint16] = np.zeros((3, 0), dtype=np.uint16)
        if header.photometric == 3 and page.colormap is not None:
            palette = np.asarray(page.colormap, dtype=np.uint16)
        return Raster(values, header, palette)


def _decode(path: Path, page: tifffile.TiffPage) -> NDArray[Any]:
    """Return a page's values, (planes, 1, H, W, S)."""
    if page.compression in BY_LIBTIFF:
        import imagecodecs  # large, and only these files need it

        # Given an array, imagecodecs refuses a file of which libtiff reads another size or type.
        stored = np.empty(page.shape, dtype=page.dtype)
        imagecodecs.tiff_decode(path.read_bytes(), index=0, out=stored)
        return stored.reshape(page.shaped)
    # One thread: readers already run in one process per core.
    values = page.asarray(squeeze=False, maxworkers=1)
    if page.compression != APERIO_YCBCR:
        return values
    page.parent.filehandle.seek(page.dataoffsets[0])
    return rgb_of_aperio(values, page.parent.filehandle.read(page.databytecounts[0]), page)


def rgb_of_aperio(values: NDArray[Any], data: bytes, page: tifffile.TiffPage) -> NDArray[Any]:
    """Return RGB where a tile is Aperio's YCbCr in JPEG 2000; anything else as it is.

    The decoder itself makes RGB of codestreams whose chroma is subsampled, and of no others.

    Args:
        values: (..., 3) as decoded.
        data: The tile's bytes.
        page: The page it is of.
    """
    if page.compression != APERIO_YCBCR:
        return values
    at = data.find(b'\xff\x4f\xff\x51')  # start of codestream, then the SIZ segment
    n_components = int.from_bytes(data[at + 40 : at + 42], 'big')
    steps = data[at + 42 : at + 42 + 3 * n_components]
    chroma = {tuple(steps[k + 1 : k + 3]) for k in (3, 6)}
    if at >= 0 and steps[1:3] == b'\1\1' and chroma in ({(2, 1)}, {(2, 2)}):
        return values
    if at < 0 or chroma != {(1, 1)}:
        raise ValueError(f'YCbCr in JPEG 2000, sampled by {sorted(chroma)}')
    return ycbcr_to_rgb(values)


def ycbcr_to_rgb(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Return RGB of YCbCr of the full range, (..., 3) uint8.

    Source: JFIF 1.02 (ITU-R BT.601), as OpenSlide does for Aperio's compression 33003.
    """
    y, cb, cr = (values[..., k].astype(np.float32) - (128 if k else 0) for k in range(3))
    rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1)
    rgb8: NDArray[np.uint8] = np.clip(np.rint(rgb), 0, 255).astype(np.uint8)
    return rgb8


@contextmanager
def _page(
    path: Path, max_pixels: int, error: type[CellSegError]
) -> Iterator[tuple[tifffile.TiffPage, Header]]:
    size = check_file(path, error)
    try:
        with tifffile.TiffFile(path) as tif:
            if not len(tif.pages):
                raise error(f'{path}: the TIFF has no image in it; expected one; {FIX}.')
            page = tif.pages.first
            _check_page(path, page, max_pixels, error)
            if len(tif.pages) > 1:
                raise error(
                    f'{path}: the TIFF has {len(tif.pages)} pages; expected one image per file; '
                    'save the right page alone.'
                )
            _check_stack(path, tif, error)
            _check_complete(path, page, size, error)
            yield page, header_of(page)
    except CellSegError:
        raise
    except Exception as problem:
        # tifffile and the codecs meet damaged bytes with whatever they trip over: ValueError,
        # struct.error, KeyError, TypeError, ZeroDivisionError, MemoryError, codec errors.
        reason = ' '.join(str(problem).split())[:120] or type(problem).__name__
        raise error(
            f'{path}: the file is damaged or of an unknown kind ({reason}); '
            f'expected a readable TIFF; {FIX}.'
        ) from problem


def check_file(path: Path, error: type[CellSegError]) -> int:
    """Return the size in bytes of what must be a readable TIFF.

    Raises:
        CellSegError: As ``error``; see :func:`file_kind.read_head`, or it is no TIFF.
    """
    head = read_head(path, error)
    if not is_tiff(head):
        raise error(
            f'{path}: {found_text(head)}, not a TIFF; expected a TIFF image; convert it to TIFF.'
        )
    return path.stat().st_size


def _check_page(
    path: Path, page: tifffile.TiffPage, max_pixels: int, error: type[CellSegError]
) -> None:
    height, width = int(page.imagelength), int(page.imagewidth)
    if height < 1 or width < 1:
        raise error(f'{path}: the image is {height} x {width} px; expected at least one px; {FIX}.')
    if height * width > max_pixels:
        raise error(
            f'{path}: the header promises {height} x {width} px; at most {max_pixels} px are '
            'accepted; cut the image, or raise max_pixels if it is honest.'
        )
    if page.imagedepth != 1:
        raise error(
            f'{path}: the image has {page.imagedepth} planes in depth; expected a flat image; '
            'save one plane.'
        )
    if not 1 <= page.samplesperpixel <= MAX_SAMPLES:
        raise error(
            f'{path}: there are {page.samplesperpixel} values per pixel; expected 1 to 4; {FIX}.'
        )
    # A tile or strip is decoded whole, however little of it lies in the image.
    if page.is_tiled and page.tilelength * page.tilewidth > max(max_pixels, 1 << 24):
        raise error(
            f'{path}: its tiles are {page.tilelength} x {page.tilewidth} px; at most {max_pixels} '
            f'px are accepted; {FIX}.'
        )


def _check_stack(path: Path, tif: tifffile.TiffFile, error: type[CellSegError]) -> None:
    """Refuse a stack that lists one page, as ImageJ and MetaMorph write them."""
    if not (tif.is_imagej or tif.is_shaped or tif.is_stk):
        return
    series = tif.series[0]
    n_planes = math.prod(series.shape) // math.prod(tif.pages[0].shape)
    if n_planes > 1:
        raise error(
            f'{path}: is a stack of {n_planes} planes (axes {series.axes}, {series.shape}); '
            'expected one image per file; save the right plane alone.'
        )


def _check_complete(
    path: Path, page: tifffile.TiffPage, size: int, error: type[CellSegError]
) -> None:
    """Refuse files whose pixel data is not all there; tifffile would fill in zeros."""
    pieces = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    n_expected = math.prod(page.chunked)
    n_found = sum(offset > 0 and count > 0 for offset, count in pieces[:n_expected])
    if n_found < n_expected:
        raise error(
            f'{path}: {n_found} of {n_expected} strips or tiles have data; expected all; {FIX}.'
        )
    end = max(offset + count for offset, count in pieces)
    if end > size:
        raise error(
            f'{path}: the file is truncated: it has {size} bytes, its header promises {end}; '
            f'expected the whole file; copy it again.'
        )


def header_of(page: tifffile.TiffPage) -> Header:
    """Return what a page says about itself."""
    orientation = page.tags.get(274)
    return Header(
        hw=(int(page.imagelength), int(page.imagewidth)),
        n_samples=int(page.samplesperpixel),
        bits=int(page.bitspersample),
        photometric=int(page.photometric),
        compression=int(page.compression),
        orientation=int(orientation.value) if orientation is not None else 1,
        extra_samples=tuple(int(kind) for kind in page.extrasamples or ()),
        is_planar=page.planarconfig == 2,
    )


def size_text(hw: tuple[int, int]) -> str:
    """Return a size for a message."""
    return f'{hw[0]} x {hw[1]} px'


def swapped_text(first_hw: tuple[int, int], second_hw: tuple[int, int]) -> str:
    """Return a hint for a message where one size is the other's transposed; else nothing."""
    is_swapped = tuple(first_hw) == tuple(second_hw)[::-1]
    return ' (height and width are swapped)' if is_swapped else ''

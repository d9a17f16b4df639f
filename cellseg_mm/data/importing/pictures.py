"""Reads the pictures of sources: images, and grids of ids or masks.

In: TIFF, SVS, PNG, JPEG, BMP. Out: images of 8 or 16 bits, or one whole number per pixel.
Invariant: sizes are judged on the header; a picture is read right by a rule or refused with a
sentence that names the way out: what is turned, in several pages, or (for ids) lossy is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from cellseg_mm.core.errors import CellSegError, ImageError, LabelMapError
from cellseg_mm.data import tiff
from cellseg_mm.data.colours import check_colours
from cellseg_mm.data.file_kind import found_text, read_head
from cellseg_mm.data.image_reader import open_image
from cellseg_mm.data.importing.sources import Picture, Tally
from cellseg_mm.data.labels import read_image

TIFF_SUFFIXES = ('.tif', '.tiff')
# JPEG, JPEG 2000 (Aperio's too), WebP, JPEG XR and XL: what most writers store with loss
LOSSY = (6, 7, 33003, 33004, 33005, 33007, 34712, 34892, 34927, 34933, 34934, 50001, 50002)
IDS = 'export ids as grey values of 8 or 16 bits (PNG or TIFF)'
MAX_ID = 2**63 - 1


# ---- images ----


def read_picture(path: Path, tally: Tally, *, max_pixels: int) -> Picture:
    """Read an image of any of the formats that sources use; alpha is dropped.

    Args:
        path: TIFF, SVS (its full-resolution level), PNG, JPEG or BMP.
        tally: Gets a remark where values of more than 8 bits become 8.
        max_pixels: Most pixels that are accepted, judged on the header.

    Returns:
        (H, W, 3) in the file's channel order; 16-bit images keep their 16 bits.

    Raises:
        ImageError: The file cannot be read, is too large, has several pages, or is marked as
            turned.
    """
    read_head(path, ImageError)
    suffix = path.suffix.lower()
    if suffix in TIFF_SUFFIXES:
        return _read_tiff(path, tally, max_pixels)
    if suffix == '.svs':
        return _read_slide(path, max_pixels)
    values, mode = _read_with_pillow(path, max_pixels, ImageError)
    if mode == 'P':
        raise AssertionError('palettes are applied')
    if mode not in ('1', 'L', 'LA', 'RGB', 'RGBA', 'I;16'):
        raise ImageError(f'{path}: the colours are {mode}; expected RGB or grey; convert it')
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * np.uint8(255)
    return _three(values if values.ndim == 3 else values[..., None])


def _three(values: NDArray[np.uint8] | NDArray[np.uint16]) -> Picture:
    """Return (H, W, 3) of (H, W, S): grey is repeated, alpha dropped."""
    n_colours = 3 if values.shape[2] >= 3 else 1
    return cast(Picture, np.repeat(values[..., :n_colours], 3 // n_colours, axis=2))


def _read_tiff(path: Path, tally: Tally, max_pixels: int) -> Picture:
    try:
        header = tiff.read_header(path, max_pixels=max_pixels, error=ImageError)
        check_colours(path, header)
        _refuse_stack(path, ImageError)
        if header.bits == 16 and header.photometric in (1, 2):
            values = tiff.read_raster(path, max_pixels=max_pixels, error=ImageError).values
            if values.dtype == np.uint16:
                return _three(values)
        if header.bits > 8:
            tally.remarks.append(
                f'values of {header.bits} bits that are no plain 16-bit integers became 8 bits'
            )
        return read_image(path, max_pixels=max_pixels)
    except ImageError as problem:
        raise ImageError(_in_own_words(problem)) from problem


def _in_own_words(problem: CellSegError) -> str:
    """Name this tool's options where the TIFF reader names those of training."""
    sentence = str(problem).replace(', or list its case in exclude.txt', '')
    return sentence.replace('raise max_pixels if it is honest', 'raise --max-pixels')


def _refuse_stack(path: Path, error: type[CellSegError]) -> None:
    """Refuse a TIFF that says it is a stack although it lists one page, as ImageJ writes them."""
    with tifffile.TiffFile(path) as file:
        shape = file.series[0].shape
        n_planes = math.prod(shape) // math.prod(file.pages[0].shape)
        axes = file.series[0].axes
    if n_planes > 1:
        raise error(
            f'{path}: is a stack of {n_planes} planes (axes {axes}, {shape}); expected one picture '
            f'per file; save the right plane alone'
        )


def _read_slide(path: Path, max_pixels: int) -> NDArray[np.uint8]:
    """Read the full-resolution level of a slide, which is the one that vertices refer to."""
    with open_image(path, level=0) as reader:
        height, width = reader.image_hw
        if height * width > max_pixels:
            raise ImageError(
                f'{path}: level 0 has {height} x {width} px; at most {max_pixels} px are accepted; '
                f'cut the slide into regions first, or raise --max-pixels'
            )
        return reader.read(0, 0, height, width)


def _read_with_pillow(
    path: Path, max_pixels: int, error: type[CellSegError]
) -> tuple[NDArray[np.uint8], str]:
    """Return values and mode; palettes become RGB for images and stay indices for grids."""
    try:
        with Image.open(path, formats=('PNG', 'JPEG', 'BMP')) as picture:
            _check_header(path, picture, max_pixels, error)
            if picture.format == 'PNG' and _png_depth(path) == 16:
                # Pillow would cut 16-bit colours to 8 without a word
                values = imagecodecs.png_decode(path.read_bytes())
                return values, 'I;16' if values.ndim == 2 else picture.mode
            if picture.mode == 'P' and error is ImageError:
                mode = 'RGBA' if 'transparency' in picture.info else 'RGB'
                return np.asarray(picture.convert(mode)), mode
            values = np.asarray(picture)
            _refuse_turned(path, picture, error)  # a PNG may say so after its pixels
            return values, picture.mode
    except CellSegError:
        raise
    except Exception as problem:  # damaged files raise anything, codec errors too
        raise error(
            f'{path}: {found_text(read_head(path, error))} and cannot be read '
            f'({str(problem)[:120]}); expected a PNG, JPEG or BMP picture; name it as what it is, '
            'or export it again'
        ) from problem


def _check_header(
    path: Path, picture: Image.Image, max_pixels: int, error: type[CellSegError]
) -> None:
    width, height = picture.size
    if width * height > max_pixels:
        raise error(
            f'{path}: has {height} x {width} px; at most {max_pixels} px are accepted; cut it into '
            f'tiles, or raise --max-pixels'
        )
    n_frames = getattr(picture, 'n_frames', 1)
    if n_frames > 1:
        raise error(
            f'{path}: holds {n_frames} pictures; expected one per file; save the right one alone'
        )
    _refuse_turned(path, picture, error)


def _refuse_turned(path: Path, picture: Image.Image, error: type[CellSegError]) -> None:
    if picture.getexif().get(0x0112, 1) != 1:
        raise error(
            f'{path}: is marked as turned (EXIF), so annotations may not fit; expected a picture '
            f'as it is stored; save it turned as it should be'
        )


def _png_depth(path: Path) -> int:
    """Return the bits per value of a PNG: IHDR is always its first chunk."""
    with path.open('rb') as stream:
        return stream.read(25)[24]


# ---- grids ----


def read_grid(path: Path, image_hw: Sequence[int]) -> NDArray[np.int64]:
    """Read one whole number per pixel: ids, or a mask.

    One channel, or colours and alpha that say nothing more (grey saved as RGB, alpha the same
    everywhere). Floats must be whole. A palette counts by its indices if index 0 may be background.

    Args:
        path: TIFF, PNG or BMP.
        image_hw: Height and width that it must have, in px.

    Returns:
        (H, W) int64, none negative.

    Raises:
        LabelMapError: The file is none of these, is compressed with loss, or has another size.
    """
    read_head(path, LabelMapError)
    limit = max(math.prod(image_hw), tiff.DEFAULT_MAX_PIXELS)
    if path.suffix.lower() in TIFF_SUFFIXES:
        try:
            values = _tiff_grid(path, limit)
        except LabelMapError as problem:
            raise LabelMapError(_in_own_words(problem)) from problem
    else:
        values = _pillow_grid(path, limit)
    _require_size(path, values.shape, image_hw)
    return _whole_numbers(path, _one_channel(path, values))


def read_colours(path: Path, image_hw: Sequence[int]) -> NDArray[np.int64]:
    """Read a mask of colours.

    Returns:
        (H, W) 0xRRGGBB; alpha is ignored.

    Raises:
        CellSegError: The file cannot be read, has another size, or its kind changes colours.
    """
    limit = max(math.prod(image_hw), tiff.DEFAULT_MAX_PIXELS)
    tally = Tally()
    values = read_picture(path, tally, max_pixels=limit)
    lossy = ''
    if path.suffix.lower() in TIFF_SUFFIXES:
        header = tiff.read_header(path, max_pixels=limit, error=LabelMapError)
        if header.compression in LOSSY:
            lossy = f'compressed as a picture (TIFF compression {header.compression})'
    elif read_head(path, LabelMapError).startswith(b'\xff\xd8\xff'):
        lossy = 'a JPEG'
    if lossy or values.dtype != np.uint8 or tally.remarks:
        raise LabelMapError(
            f'{path}: is {lossy or "of more than 8 bits"}; expected 8-bit colours without loss; '
            f'export it as PNG'
        )
    _require_size(path, values.shape, image_hw)
    red, green, blue = np.moveaxis(values.astype(np.int64), 2, 0)
    colours: NDArray[np.int64] = (red << 16) | (green << 8) | blue
    return colours


def _require_size(path: Path, shape: Sequence[int], image_hw: Sequence[int]) -> None:
    if tuple(shape[:2]) != tuple(image_hw):
        raise LabelMapError(
            f'{path}: is {shape[0]} x {shape[1]} px, the image is {image_hw[0]} x '
            f'{image_hw[1]} px; they must match; export it in the size of the image'
        )


def _tiff_grid(path: Path, limit: int) -> NDArray[np.generic]:
    header = tiff.read_header(path, max_pixels=limit, error=LabelMapError)
    if header.compression in LOSSY:
        raise _lossy(path, f'compressed as a picture (TIFF compression {header.compression})')
    if header.orientation != 1:
        raise LabelMapError(
            f'{path}: the orientation tag is {header.orientation}, so viewers turn it; expected 1, '
            f'as it is stored; save it turned as it should be'
        )
    _refuse_stack(path, LabelMapError)
    raster = tiff.read_raster(path, max_pixels=limit, error=LabelMapError)
    if header.photometric == 3 and raster.palette.size:
        _check_palette(path, raster.values, raster.palette.T)
    elif header.photometric == 0 and len(np.unique(raster.values)) <= 2:
        raise LabelMapError(
            f'{path}: is a mask stored with white as zero, so it is not clear which pixels are '
            f'cells; expected black as zero; save it again'
        )
    return raster.values


def _pillow_grid(path: Path, limit: int) -> NDArray[np.generic]:
    with path.open('rb') as stream:
        is_jpeg = stream.read(3) == b'\xff\xd8\xff'  # whatever the file is called
    if is_jpeg:
        raise _lossy(path, 'a JPEG')
    values, mode = _read_with_pillow(path, limit, LabelMapError)
    if mode == 'P':
        with Image.open(path) as picture:
            colours = np.array(picture.getpalette('RGB') or [], dtype=np.uint8).reshape(-1, 3)
        _check_palette(path, values, colours)
    return values if values.ndim == 3 else values[..., None]


def _lossy(path: Path, what: str) -> LabelMapError:
    return LabelMapError(
        f'{path}: is {what}, which changes values at every edge; expected ids without loss; {IDS}'
    )


def _check_palette(path: Path, indices: NDArray[np.generic], colours: NDArray[np.generic]) -> None:
    """Refuse a palette in which black, the usual background, is used and is not index 0."""
    used = np.unique(indices.astype(np.int64))
    black = [i for i in used if i < len(colours) and not colours[i].any()]
    if black and 0 not in black:
        raise LabelMapError(
            f'{path}: its colours come from a palette in which black is number {black[0]}; '
            f'expected number 0 as background; {IDS}'
        )


def _one_channel(path: Path, values: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return (H, W) of (H, W, S) where the other channels say nothing more."""
    n_samples = values.shape[2]
    n_colours = n_samples if n_samples in (1, 3) else n_samples - 1
    alpha = values[..., n_colours:]
    if n_samples > 4 or (alpha.size and (alpha != alpha[0, 0]).any()):
        raise LabelMapError(
            f'{path}: has {n_samples} channels that differ, or is partly transparent; expected one '
            f'channel with an id per pixel; {IDS}'
        )
    if (values[..., 1:n_colours] != values[..., :1]).any():
        raise LabelMapError(
            f'{path}: has colours (red, green and blue differ); expected one channel with an id '
            f'per pixel; {IDS}'
        )
    return values[..., 0]


def _whole_numbers(path: Path, values: NDArray[np.generic]) -> NDArray[np.int64]:
    kind = values.dtype.kind
    if kind not in 'buif':
        raise LabelMapError(f'{path}: has values of type {values.dtype}; expected ids; {IDS}')
    fault = ''
    if kind == 'f':
        # beyond it neighbouring whole numbers are one float, so cells may have been joined
        float_type = cast('np.dtype[np.floating[Any]]', values.dtype)
        limit = 2.0 ** (np.finfo(float_type).nmant + 1)
        if not np.isfinite(values).all():
            fault = 'NaN or infinite values'
        elif (values != np.floor(values)).any():
            fault = 'fractions, as probabilities and resized pictures have'
        elif values.max(initial=0) > min(limit, MAX_ID):
            fault = f'ids above {limit:.0f}, which {values.dtype} cannot tell apart'
    elif kind == 'u' and values.max(initial=0) > MAX_ID:
        fault = f'ids above {MAX_ID}'
    if not fault and kind in 'if' and values.min(initial=0) < 0:
        fault = f'values down to {values.min()}'
    if fault:
        raise LabelMapError(f'{path}: has {fault}; expected whole ids, 0 for background; {IDS}')
    return values.astype(np.int64)

"""Reads PNG, JPEG and BMP files, turned as their EXIF says.

In: a path. Out: values (H, W, 1 or 3) of 8 or 16 bits. Invariant: size and kind are judged on the
header before anything is decoded, and a file that is cut off is an error.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin
from PIL.Image import Image

from cellseg_mm.core.errors import ImageError
from cellseg_mm.data.file_kind import found_text
from cellseg_mm.data.pixel_size import PixelSize, of_dpi
from cellseg_mm.data.tiff import size_text

_ORIENTATION = 0x0112
_MODES = ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I', 'I;16', 'I;16B')


def read_bitmap(
    path: Path, head: bytes, *, max_pixels: int
) -> tuple[NDArray[np.generic], PixelSize, list[str]]:
    """Read the picture of a PNG, JPEG or BMP; alpha is dropped, palettes are applied.

    Args:
        path: The file.
        head: Its first bytes.
        max_pixels: Most pixels that are accepted, judged on the header.

    Returns:
        (H, W, 1 or 3) bool, uint8 or uint16; how large a pixel is, as shown; and what a person
        should know.

    Raises:
        ImageError: The file is of another kind, too large, cut off or damaged, holds several
            pictures, or its colours are neither RGB nor grey.
    """
    try:
        with path.open('rb') as stream, _open(path, head, stream) as picture:
            says = _check(path, picture, max_pixels)
            values = _values(path, head, picture)
            orientation = picture.getexif().get(_ORIENTATION, 1)
            dpi = picture.info.get('dpi')
    except ImageError:
        raise
    except Exception as problem:  # damaged files raise anything, codec errors too
        reason = ' '.join(str(problem).split())[:120] or type(problem).__name__
        raise ImageError(
            f'{path}: {found_text(head)} and cannot be read as an image ({reason}); expected TIFF, '
            'PNG, JPEG or BMP, whole; export it again, or as a tiled TIFF.'
        ) from problem
    values = values.reshape(*values.shape[:2], -1)
    values = values[..., : 3 if values.shape[2] >= 3 else 1]
    if orientation in range(2, 9):
        says.append(f'turned as its EXIF says (orientation {orientation})')
        values = turn(values, orientation)
        dpi = dpi[::-1] if isinstance(dpi, tuple) and orientation >= 5 else dpi
    return np.ascontiguousarray(values), of_dpi(dpi), says


def _open(path: Path, head: bytes, stream: io.BufferedReader) -> Image:
    """Read the header by the class itself: Image.open refuses or warns by a limit of its own."""
    if head.startswith(b'\x89PNG'):
        return PngImagePlugin.PngImageFile(stream)
    if head.startswith(b'\xff\xd8\xff'):
        return JpegImagePlugin.jpeg_factory(stream)
    if head.startswith(b'BM'):
        return BmpImagePlugin.BmpImageFile(stream)
    raise ImageError(
        f'{path}: {found_text(head)} and cannot be read as an image; expected TIFF, PNG, JPEG or '
        'BMP; export it as one of these.'
    )


def _check(path: Path, picture: Image, max_pixels: int) -> list[str]:
    """Refuse by the header; return what to say."""
    width, height = picture.size
    if width * height > max_pixels:
        raise ImageError(
            f'{path}: {size_text((height, width))}; at most {max_pixels} px are read whole; '
            'convert it to a tiled TIFF, which is read by region.'
        )
    if picture.mode not in _MODES:
        raise ImageError(
            f'{path}: the colours are {picture.mode}; expected RGB or grey; convert it to RGB.'
        )
    n_frames = getattr(picture, 'n_frames', 1)
    if n_frames > 1 and picture.format != 'MPO':
        raise ImageError(
            f'{path}: holds {n_frames} pictures, as animations do; expected one; save the right '
            'one alone.'
        )
    # cameras put a depth map, a brightness map or a small copy behind the photo
    return [f'read: the main one of its {n_frames} pictures'] if n_frames > 1 else []


def _values(path: Path, head: bytes, picture: Image) -> NDArray[Any]:
    if head.startswith(b'\x89PNG') and head[24] == 16:  # Pillow cuts 16-bit colours to 8
        import imagecodecs  # large, and only these files need it

        decoded: NDArray[Any] = imagecodecs.png_decode(path.read_bytes())
        return decoded
    if picture.mode == 'P':
        picture.load()
        picture.info.pop('transparency', None)  # colours are wanted; Pillow would warn of it
        return np.asarray(picture.convert('RGB'))
    return np.asarray(picture)


def turn(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Return a picture, (H, W, ...), as viewers show it.

    Args:
        values: As stored.
        orientation: 2 to 8, as EXIF counts.
    """
    if orientation >= 5:
        values = values.swapaxes(0, 1)
    is_upside_down, is_mirrored = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return values[:: -1 if is_upside_down else 1, :: -1 if is_mirrored else 1]

"""Which values of a TIFF are its colours, and what they mean.

In: headers, indices into palettes. Out: numbers of channels, 8-bit colours, or one sentence.
Invariant: a channel counts as alpha only where the file says so; none is dropped by luck.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import ImageError
from cellseg_mm.data.tiff import APERIO_YCBCR, JPEG_CODECS, Header

_NAMES = {
    4: 'a transparency mask',
    5: 'CMYK',
    6: 'YCbCr',
    8: 'CIELAB',
    9: 'ICCLAB',
    10: 'ITULAB',
    32803: 'CFA',
    34892: 'raw values of a camera',
}
_OLD_JPEG = 6
_APERIO_RGB = 33005
_ASSOCIATED = 1
_ALPHA = (_ASSOCIATED, 2)  # ExtraSamples: associated and unassociated alpha; 0 is anything


def check_colours(path: Path, header: Header) -> None:
    """Refuse an image whose header promises neither RGB nor grey, or that viewers would turn.

    Raises:
        ImageError: See the message.
    """
    check_space(path, header)
    colour_channels(path, header)


def check_space(path: Path, header: Header) -> None:
    """Refuse colours that are neither RGB, grey nor a palette once they are decoded.

    Raises:
        ImageError: See the message.
    """
    name = _NAMES.get(header.photometric, f'colour space {header.photometric}')
    if header.photometric not in (0, 1, 2, 3, 6):
        raise ImageError(
            f'{path}: the colours are {name}; expected RGB or grey; convert the image to RGB.'
        )
    if header.compression == _OLD_JPEG:
        raise ImageError(
            f'{path}: it is compressed with old-style JPEG (6), which every program reads in its '
            'own way; expected JPEG (7) or another compression; convert the image.'
        )
    if not _are_codes_plain(header):
        raise ImageError(
            f'{path}: the colours are {name} of {header.n_samples} values per pixel in compression '
            f'{header.compression}; expected RGB or grey; convert the image to RGB.'
        )
    if header.orientation != 1:
        raise ImageError(
            f'{path}: the orientation tag is {header.orientation}, so viewers turn the picture; '
            'expected 1, as stored, so that label maps fit; save it turned as it should be.'
        )


def _are_codes_plain(header: Header) -> bool:
    """Tell whether the codec gives RGB or grey for the colours that the header names."""
    is_three = header.n_samples == 3 and not header.is_planar
    if header.compression == APERIO_YCBCR:
        return is_three and header.bits == 8 and header.photometric in (2, 6)
    if header.compression in JPEG_CODECS and not header.is_planar:
        return is_three if header.photometric in (2, 6) else header.n_samples == 1
    if header.photometric == 6:  # Aperio's RGB is RGB, whatever the tag says
        return is_three and header.compression == _APERIO_RGB
    return header.photometric != 2 or header.n_samples >= 3


def colour_channels(path: Path, header: Header, *, n_pages: int = 1) -> tuple[int, ...]:
    """Return the channels that are the picture: one for grey, three for red, green and blue.

    Channels are counted over the pages of a picture, and over the values of each page's pixels.

    Args:
        path: For messages.
        header: Of one of the pages.
        n_pages: Pages that hold the picture's channels.

    Raises:
        ImageError: The file does not say which channels these are.
    """
    is_rgb, n_channels = header.photometric in (2, 6), header.n_samples * n_pages
    n_alpha = sum(kind in _ALPHA for kind in header.extra_samples) if n_pages == 1 else 0
    # RGBA without the tag, as the HW3 collection has it and OpenCV writes it
    is_untold = is_rgb and header.n_samples == 4 and not header.extra_samples
    if is_untold and header.bits == 8 and n_pages == 1:
        n_alpha = 1
    if n_channels - n_alpha not in (1, 3) or (header.photometric == 3 and n_channels - n_alpha > 1):
        raise ImageError(
            f'{path}: {n_channels} values per pixel, {n_alpha} of them alpha; expected RGB, grey, '
            'or these with alpha; save the channels to use as RGB, or choose them (predict.py has '
            f'--channels, of 0 to {n_channels - 1}: one for grey, or three).'
        )
    return (0, 1, 2) if n_channels - n_alpha == 3 else (0,)


def associated_alpha(header: Header) -> int | None:
    """Return which value of a pixel is the alpha that its colours were multiplied by."""
    if _ASSOCIATED not in header.extra_samples:
        return None
    n_colours = header.n_samples - len(header.extra_samples)
    return n_colours + header.extra_samples.index(_ASSOCIATED)


def divide_by_alpha(values: NDArray[Any], alpha: NDArray[Any], bits: int) -> NDArray[Any]:
    """Return the colours of pixels whose values were multiplied by their alpha.

    Args:
        values: (H, W, S) as stored.
        alpha: (H, W, 1) of the same type.
        bits: Bits per value.
    """
    full = 1.0 if values.dtype.kind == 'f' else float(2**bits - 1)
    if (alpha == full).all():
        return values
    factor = np.divide(full, alpha, where=alpha > 0, out=np.zeros(alpha.shape))
    divided = np.minimum(values * factor, full)
    divided = divided if values.dtype.kind == 'f' else np.rint(divided)
    result: NDArray[Any] = divided.astype(values.dtype)
    return result


def apply_palette(
    path: Path, index: NDArray[Any], palette: NDArray[np.uint16]
) -> NDArray[np.uint8]:
    """Return the colours, (..., 3), of a palette's numbers.

    Colour maps hold 16 bits: the upper 8 count, so v * 256 (ImageJ) and v * 257 are the same v. A
    map without a value above 255 holds 8 bits.

    Args:
        path: For messages.
        index: Numbers of any shape.
        palette: (3, P) uint16.

    Raises:
        ImageError: A number is beyond the palette.

    Source: libtiff 4.7, tif_getimage.c, checkcmap and cvtcmap.
    """
    at = index.astype(np.intp)  # 1 bit comes as bool, which numpy would take for a mask
    highest = int(at.max(initial=0))
    if palette.shape[1] <= highest:
        raise ImageError(
            f'{path}: palette colour {highest} is used, the palette has {palette.shape[1]}; '
            'convert the image to RGB.'
        )
    map8 = palette if palette.max(initial=0) < 256 else palette >> 8
    colours: NDArray[np.uint8] = map8.astype(np.uint8).T[at]
    return colours

"""From TIFFs to pixels and ground truth.

In: the files of a :class:`Case`. Out: images (H, W, 3) uint8, and :class:`LabelLayers`: every
instance of every class in as few integer maps as their overlaps allow.
Invariant: a file is read whole and checked, or its name and fault are raised; nothing is guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import ImageError, LabelMapError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data import tiff
from cellseg_mm.data.cases import Case, IdEntry, find_cases, read_id_map
from cellseg_mm.data.tiff import DEFAULT_MAX_PIXELS, size_text, swapped_text

__all__ = [
    'Case',
    'IdEntry',
    'LabelLayers',
    'find_cases',
    'read_gt',
    'read_id_map',
    'read_image',
    'read_label_layers',
    'read_label_map',
]

MAX_ID = 2**31 - 1  # layers and label maps are int32

Flat = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LabelLayers:
    """All instances of one image as integer maps; N instances in L layers.

    Attributes:
        layers: (L, H, W) int32, L >= 1; 0 = background, instance i has the value i + 1 in layer
            ``layer_of[i]``. Instances of one layer do not overlap.
        layer_of: (N,) int64.
        class_ids: (N,) int64, 0-based, never falling.
        original_ids: (N,) int64, the ids in the class's file, rising within a class.
    """

    layers: NDArray[np.int32]
    layer_of: Flat
    class_ids: Flat
    original_ids: Flat

    def __len__(self) -> int:
        return len(self.class_ids)


def read_image(path: Path | str, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> NDArray[np.uint8]:
    """Read an image in the channel order stored in the file.

    Grey is repeated three times, alpha is dropped, palettes are applied, white-is-zero is inverted.
    Values become 8 bit by a rule that looks at this file only: integers of up to 8 bits are scaled
    by their full range; wider integers stay as they are when none exceeds 255, and are scaled by
    the full range of their type otherwise (65535 -> 255, rounded); floats are taken as 0..1 when
    none exceeds 1, else as 0..255.

    Args:
        path: A TIFF with one page.
        max_pixels: Most pixels (height times width) that are accepted, judged on the header.

    Returns:
        (H, W, 3) uint8, C-contiguous, own memory.

    Raises:
        ImageError: The file cannot be read, is larger than ``max_pixels``, is CMYK or another
            colour space, has more than 4 values per pixel, NaN, infinite or negative values, or
            floats above 255.
    """
    path = Path(path)
    raster = tiff.read_raster(path, max_pixels=max_pixels, error=ImageError)
    check_colours(path, raster.header)
    n_used = 3 if raster.header.n_samples >= 3 else 1
    values = raster.values[..., :n_used]
    if raster.header.photometric == 3:
        values = _apply_palette(path, raster)
    grey8 = to_uint8(path, values, raster.header.bits)
    if raster.header.photometric == 0:
        grey8 = 255 - grey8
    if grey8.shape[2] == 1:
        return np.repeat(grey8, 3, axis=2)
    return np.ascontiguousarray(grey8)


def check_colours(path: Path, header: tiff.Header) -> None:
    """Refuse an image whose header promises neither RGB nor grey, or that viewers would turn.

    Raises:
        ImageError: See the message.
    """
    names = {5: 'CMYK', 6: 'YCbCr', 8: 'CIELAB', 9: 'ICCLAB', 10: 'ITULAB', 32803: 'CFA'}
    decoded = {6, 7, 33003, 33004, 33005, 34712}  # JPEG and JPEG 2000 codecs return RGB
    is_rgb_now = header.photometric == 6 and header.compression in decoded
    if header.photometric not in (0, 1, 2, 3) and not is_rgb_now:
        name = names.get(header.photometric, f'colour space {header.photometric}')
        raise ImageError(
            f'{path}: the colours are {name}; expected RGB or grey; convert the image to RGB.'
        )
    limit = {0: 2, 1: 3, 3: 2}.get(header.photometric, 4)
    if header.n_samples > limit or (header.photometric in (2, 6) and header.n_samples < 3):
        raise ImageError(
            f'{path}: {header.n_samples} values per pixel; expected RGB, grey, or these with '
            'alpha; save the channels to use as RGB.'
        )
    if header.orientation != 1:
        raise ImageError(
            f'{path}: the orientation tag is {header.orientation}, so viewers turn the picture; '
            'expected 1, as stored, so that label maps fit; save it turned as it should be.'
        )


def _apply_palette(path: Path, raster: tiff.Raster) -> NDArray[np.uint16]:
    index = raster.values[..., 0]
    if raster.palette.shape[1] <= int(index.max(initial=0)):
        raise ImageError(
            f'{path}: palette colour {index.max()} is used, the palette has '
            f'{raster.palette.shape[1]}; convert the image to RGB.'
        )
    colours: NDArray[np.uint16] = raster.palette.T[index]  # (H, W, 3)
    return colours


def to_uint8(path: Path, values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Bring values of any type to 8 bits by the rule of :func:`read_image`.

    Args:
        path: For messages.
        values: Numbers of any shape; the rule looks at the least and the greatest of them.
        bits: Bits per value in the file, which may be fewer than those of the dtype.

    Raises:
        ImageError: Values that the rule refuses.
    """
    if values.dtype == np.uint8 and bits == 8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in 'uif':
        raise ImageError(f'{path}: values of type {values.dtype}; expected integers or floats.')
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):  # NaN wins in both
        n_bad = int(values.size - np.isfinite(values).sum())
        raise ImageError(
            f'{path}: {n_bad} values are NaN or infinite; expected finite numbers; {tiff.FIX}.'
        )
    if low < 0:
        raise ImageError(f'{path}: values down to {low}; expected none below 0; {tiff.FIX}.')
    if values.dtype.kind == 'f':
        if high > 255:
            raise ImageError(
                f'{path}: float values up to {high}; expected 0..1 or 0..255; rescale the image.'
            )
        scale = 255.0 if high <= 1 else 1.0
    elif values.dtype.itemsize == 1 and values.dtype.kind == 'u':
        scale = 255 / (2**bits - 1)  # tifffile unpacks 2 and 4 bits to uint8
    elif high <= 255:
        scale = 1.0
    else:
        is_packed = values.dtype.kind == 'u' and bits < 8 * values.dtype.itemsize
        scale = 255 / (2**bits - 1 if is_packed else np.iinfo(values.dtype).max)
    return np.rint(values.astype(np.float64) * scale).astype(np.uint8)


def read_label_map(path: Path | str, image_hw: tuple[int, int] | None = None) -> NDArray[np.int32]:
    """Read one class's label map: 0 = background, k = the instance with id k.

    Args:
        path: A TIFF with one page and one channel, of any integer or float dtype.
        image_hw: Height and width that the map must have, in px.

    Returns:
        (H, W) int32.

    Raises:
        LabelMapError: The file cannot be read, has several channels or another size than
            ``image_hw``, or an id is NaN, infinite, negative, fractional or above 2**31 - 1.
    """
    path = Path(path)
    stored = _read_stored_map(path, image_hw)
    at, ids = _foreground(path, stored)
    label_map = np.zeros(stored.shape, dtype=np.int32)
    label_map.reshape(-1)[at] = ids
    return label_map


def _read_stored_map(path: Path, image_hw: tuple[int, int] | None) -> NDArray[Any]:
    n_pixels = image_hw[0] * image_hw[1] if image_hw is not None else 0
    limit = max(DEFAULT_MAX_PIXELS, n_pixels)  # an image that was let in may have its label maps
    raster = tiff.read_raster(path, max_pixels=limit, error=LabelMapError)
    header = raster.header
    if header.n_samples != 1:
        raise LabelMapError(
            f'{path}: the label map has {header.n_samples} channels; expected one with an id per '
            'pixel; export ids, not colours.'
        )
    if image_hw is not None and header.hw != tuple(image_hw):
        raise LabelMapError(
            f'{path}: the label map is {size_text(header.hw)}, '
            f'the image is {size_text(image_hw)}'
            f'{swapped_text(header.hw, image_hw)}; they must match; {tiff.FIX}.'
        )
    return raster.values[..., 0]


def _foreground(path: Path, stored: NDArray[Any]) -> tuple[NDArray[np.intp], Flat]:
    """Return the flat positions of all pixels that are not background, and their ids."""
    if stored.dtype.kind not in 'buif':
        raise LabelMapError(f'{path}: values of type {stored.dtype}; expected ids as numbers.')
    flat = np.ascontiguousarray(stored).reshape(-1)
    # Usually a third of the pixels or less; all later work is on these. Comparing first is 3 times
    # faster than the search for non-zero floats.
    at = np.flatnonzero(flat != 0)
    values = flat[at]
    if not len(values):
        return at, np.zeros(0, dtype=np.int64)
    # Python numbers compare exactly; float32 would round the limit up to an id that is too large.
    low, high = values.min().item(), values.max().item()
    if not (low >= 1 and high <= MAX_ID):  # NaN fails this too
        raise LabelMapError(_bad_ids(path, values))
    ids = values.astype(np.int64)
    if values.dtype.kind == 'f' and not np.array_equal(ids, values):
        raise LabelMapError(_bad_ids(path, values))
    return at, ids


def _bad_ids(path: Path, values: NDArray[Any]) -> str:
    """Say what is wrong with ids of which at least one is."""
    wide = values.astype(np.float64)
    finite = np.isfinite(wide)
    faults = {
        'NaN or infinite': ~finite,
        'negative': finite & (wide < 0),
        'fractional': finite & (np.floor(wide) != wide),
        f'above {MAX_ID}': finite & (wide > MAX_ID),
    }
    name, is_bad = next((name, is_bad) for name, is_bad in faults.items() if is_bad.any())
    return (
        f'{path}: {int(is_bad.sum())} pixels have an id that is {name} (such as '
        f'{values[is_bad][0]}); expected whole ids from 0 to {MAX_ID}; {tiff.FIX}.'
    )


def read_label_layers(case: Case) -> LabelLayers:
    """Read all label maps of a case as layers.

    Instances are ordered by class id, then by their id in the file. One layer holds everything
    where no two classes overlap. Otherwise each instance goes into the first layer in which it
    covers nothing, class after class: never more layers than classes with cells. An id that two
    classes use makes two instances.

    Args:
        case: A training case; a case without label maps has no instances.

    Raises:
        LabelMapError: See :func:`read_label_map`.
    """
    n_pixels = case.image_hw[0] * case.image_hw[1]
    layers: list[NDArray[np.int32]] = [np.zeros(n_pixels, dtype=np.int32)]
    layer_of, class_ids, original_ids = [], [], []
    n_before = 0
    for class_id in sorted(case.label_paths):
        path = case.label_paths[class_id]
        at, ids = _foreground(path, _read_stored_map(path, case.image_hw))
        unique_ids, index = _renumber(ids)
        layer_of.append(_place(layers, at, index, n_before, len(unique_ids)))
        class_ids.append(np.full(len(unique_ids), class_id, dtype=np.int64))
        original_ids.append(unique_ids)
        n_before += len(unique_ids)
    empty = [np.zeros(0, dtype=np.int64)]
    return LabelLayers(
        np.stack(layers).reshape(-1, *case.image_hw)
        if len(layers) > 1
        else layers[0].reshape(1, *case.image_hw),
        np.concatenate(layer_of or empty),
        np.concatenate(class_ids or empty),
        np.concatenate(original_ids or empty),
    )


def _renumber(ids: Flat) -> tuple[Flat, NDArray[np.int32]]:
    """Return the sorted different ids, and for each element its place among them from 0."""
    if not len(ids):
        return ids, np.zeros(0, dtype=np.int32)
    high = int(ids.max())
    if high > 4 * len(ids) + 65536:  # a table would be larger than the data: sort instead
        unique_ids, index = np.unique(ids, return_inverse=True)
        return unique_ids, index.reshape(-1).astype(np.int32)
    is_used = np.zeros(high + 1, dtype=bool)
    is_used[ids] = True
    table = np.cumsum(is_used, dtype=np.int32) - 1
    return np.flatnonzero(is_used).astype(np.int64), table[ids]


def _place(
    layers: list[NDArray[np.int32]],
    at: NDArray[np.intp],
    index: NDArray[np.int32],
    n_before: int,
    n_new: int,
) -> Flat:
    """Write one class's instances into the first layers where they cover nothing.

    Args:
        layers: Flat layers; changed, and grown where needed.
        at: Flat positions of the class's pixels.
        index: For each position the instance, 0..n_new - 1.
        n_before: Instances of earlier classes.
        n_new: Instances of this class.

    Returns:
        (n_new,) int64, the layer of each.
    """
    layer_of = np.zeros(n_new, dtype=np.int64)
    level = 0
    while len(at):
        if level == len(layers):
            layers.append(np.zeros_like(layers[0]))
        is_taken = layers[level][at] != 0
        if not is_taken.any():
            layers[level][at] = index + (n_before + 1)
            layer_of[index] = level
            break
        must_wait = np.zeros(n_new, dtype=bool)
        must_wait[index[is_taken]] = True
        waits = must_wait[index]
        layers[level][at[~waits]] = index[~waits] + (n_before + 1)
        layer_of[index[~waits]] = level
        at, index = at[waits], index[waits]
        level += 1
    return layer_of


def read_gt(case: Case) -> InstanceSet:
    """Read the ground truth of a case; empty for test images.

    Raises:
        LabelMapError: See :func:`read_label_map`.
    """
    found = read_label_layers(case)
    return InstanceSet.from_label_layers(
        case.name, case.image_id, found.layers, found.layer_of, found.class_ids
    )

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
from cellseg_mm.data.colours import (
    apply_palette,
    associated_alpha,
    check_space,
    colour_channels,
    divide_by_alpha,
)
from cellseg_mm.data.intensity import ValueRange, range_for, to_uint8
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


def read_image(
    path: Path | str,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    value_range: ValueRange | None = None,
) -> NDArray[np.uint8]:
    """Read an image in the channel order stored in the file.

    Grey is repeated three times, alpha is dropped, palettes are applied, white-is-zero is inverted.
    Values of up to 8 bits are scaled by their full range; wider ones become 8 bit by one range, see
    ``intensity``.

    Args:
        path: A TIFF with one page.
        max_pixels: Most pixels (height times width) that are accepted, judged on the header.
        value_range: Of values of more than 8 bits, as the collection has it; None decides by this
            file alone.

    Returns:
        (H, W, 3) uint8, C-contiguous, own memory.

    Raises:
        ImageError: The file cannot be read, is larger than ``max_pixels``, is CMYK or another
            colour space, has more than 4 values per pixel, or NaN, infinite or negative values.
    """
    return read_scaled(path, max_pixels=max_pixels, value_range=value_range)[0]


def read_scaled(
    path: Path | str, *, max_pixels: int, value_range: ValueRange | None
) -> tuple[NDArray[np.uint8], ValueRange | None]:
    """Read an image like :func:`read_image`, and return the range that its values were mapped by.

    Returns:
        The picture; and None for values of up to 8 bits.

    Raises:
        ImageError: See :func:`read_image`.
    """
    path = Path(path)
    raster = tiff.read_raster(path, max_pixels=max_pixels, error=ImageError)
    check_space(path, raster.header)
    channels = colour_channels(path, raster.header)
    values = raster.values[..., : len(channels)]
    if (alpha := associated_alpha(raster.header)) is not None and raster.header.photometric != 3:
        at_alpha = raster.values[..., alpha : alpha + 1]
        values = divide_by_alpha(values, at_alpha, raster.header.bits)
    if raster.header.photometric == 3:
        return apply_palette(path, values[..., 0], raster.palette), None
    value_range = range_for(path, values, raster.header.bits, value_range)
    grey8 = to_uint8(path, values, raster.header.bits, value_range)
    if raster.header.photometric == 0:
        grey8 = 255 - grey8
    if grey8.shape[2] == 1:
        grey8 = np.repeat(grey8, 3, axis=2)
    return np.ascontiguousarray(grey8), value_range


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
    if header.orientation != 1:
        raise LabelMapError(
            f'{path}: the orientation tag is {header.orientation}, so viewers turn the label map; '
            f'expected 1, as stored, so that it fits its image; {tiff.FIX}.'
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

"""COCO run-length encoding of many small masks at once, without full-size masks.

In: tight Boolean crops and where they lie. Out: the compressed ``counts`` strings that pycocotools
reads and writes, byte for byte. Invariant: cost follows the crops' pixels and the number of runs,
never the size of the image.

Format: column-major runs, zeros first; every count after the third is stored as the difference to
the count two before; each number in 5-bit groups, least significant first, bit 5 = more follow,
bit 4 of the last group = sign, plus 48 to be printable.
Source: pycocotools ``common/maskApi.c`` (``rleEncode``, ``rleToString``, ``rleFrString``), BSD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from cellseg_mm.core.arrays import Int, ranges_of
from cellseg_mm.core.errors import PredictionError


@dataclass(frozen=True, slots=True)
class Runs:
    """Foreground runs of N masks over the column-major pixels of images of one size.

    Attributes:
        starts: (R,) int64, first pixel of each run; rising within a mask.
        ends: (R,) int64, one past the last pixel.
        owner: (R,) int64, index of the mask, never falling.
        n_masks: N; a mask without a run is empty.
        image_hw: Height and width in px.
    """

    starts: Int
    ends: Int
    owner: Int
    n_masks: int
    image_hw: tuple[int, int]


def runs_from_crops(
    crops: Sequence[NDArray[np.bool_]], offsets_yx: Int, image_hw: tuple[int, int]
) -> Runs:
    """Find the runs of masks given as crops.

    Args:
        crops: N arrays (h_i, w_i) bool or 0/1 integers; may be empty or all background.
        offsets_yx: (N, 2) int64, row and column of each crop's first pixel in the image.
        image_hw: Height and width of the image in px.

    Raises:
        ValueError: A crop with pixels leaves the image.
    """
    height, width = image_hw
    offsets_yx = np.asarray(offsets_yx, dtype=np.int64).reshape(-1, 2)
    shapes = np.array([crop.shape for crop in crops], dtype=np.int64).reshape(-1, 2)
    if len(shapes) != len(offsets_yx):
        raise ValueError(f'{len(shapes)} crops but {len(offsets_yx)} offsets')
    filled = shapes.prod(axis=1) > 0
    low, high = offsets_yx, offsets_yx + shapes
    if ((low[filled] < 0) | (high[filled] > (height, width))).any():
        raise ValueError(f'a crop leaves the image of {height} x {width} px')
    # Each column is followed by one zero, so that no run crosses columns or masks.
    padded = [_padded_columns(crop) for crop in crops]
    sizes = np.array([column.size for column in padded], dtype=np.int64)
    bases = np.concatenate([[0], np.cumsum(sizes)])
    flat = np.concatenate([np.zeros(1, np.int8), *padded]) if padded else np.zeros(1, np.int8)
    edges = np.flatnonzero(np.diff(flat))
    first, last = edges[0::2], edges[1::2]
    owner = np.searchsorted(bases, first, side='right') - 1
    column, row = np.divmod(first - bases[owner], shapes[owner, 0] + 1)
    starts = (offsets_yx[owner, 1] + column) * height + offsets_yx[owner, 0] + row
    return _joined(Runs(starts, starts + (last - first), owner, len(shapes), image_hw))


def _padded_columns(crop: NDArray[np.bool_]) -> NDArray[np.int8]:
    h, w = crop.shape
    columns = np.zeros((w, h + 1), dtype=np.int8)
    columns[:, :h] = crop.T
    return columns.reshape(-1)


def _joined(runs: Runs) -> Runs:
    """Join runs that touch: one reaches the image's last row, the next begins in the first row."""
    touch = (runs.ends[:-1] == runs.starts[1:]) & (runs.owner[:-1] == runs.owner[1:])
    if not touch.any():
        return runs
    keep_start = np.concatenate([[True], ~touch])
    keep_end = np.concatenate([~touch, [True]])
    return Runs(
        runs.starts[keep_start],
        runs.ends[keep_end],
        runs.owner[keep_start],
        runs.n_masks,
        runs.image_hw,
    )


def runs_from_pieces(
    starts: Int, ends: Int, owner: Int, n_masks: int, image_hw: tuple[int, int]
) -> Runs:
    """Put runs in order and join those that touch.

    Args:
        starts: (P,) int64, first pixel of each run in column-major order of the image; any order.
        ends: (P,) int64, one past the last pixel. Runs of one mask must not overlap.
        owner: (P,) int64 in 0..n_masks - 1.
        n_masks: Number of masks.
        image_hw: Height and width in px.
    """
    order = np.argsort(owner * (image_hw[0] * image_hw[1] + 1) + starts, kind='stable')
    return _joined(Runs(starts[order], ends[order], owner[order], n_masks, image_hw))


def encode_runs(runs: Runs) -> list[bytes]:
    """Write runs as COCO ``counts``, equal to ``pycocotools.mask.encode`` byte for byte."""
    n_pixels = runs.image_hw[0] * runs.image_hw[1]
    n_runs = np.bincount(runs.owner, minlength=runs.n_masks)
    last_end = np.zeros(runs.n_masks, dtype=np.int64)
    has_run = n_runs > 0
    final = np.cumsum(n_runs) - 1
    last_end[has_run] = runs.ends[final[has_run]]
    has_tail = last_end < n_pixels
    n_counts = 2 * n_runs + has_tail
    begin = np.concatenate([[0], np.cumsum(n_counts)])
    rank = ranges_of(n_runs)
    previous_end = np.where(rank > 0, np.concatenate([[0], runs.ends[:-1]])[: len(rank)], 0)
    counts = np.empty(begin[-1], dtype=np.int64)
    position = begin[runs.owner] + 2 * rank
    counts[position] = runs.starts - previous_end
    counts[position + 1] = runs.ends - runs.starts
    counts[begin[1:][has_tail] - 1] = n_pixels - last_end[has_tail]
    return _compress(counts, n_counts)


def _compress(counts: Int, n_counts: Int) -> list[bytes]:
    begin = np.concatenate([[0], np.cumsum(n_counts)])
    within = ranges_of(n_counts)
    value = counts.copy()
    late = np.flatnonzero(within > 2)
    value[late] -= counts[late - 2]
    # Most differences fit into one group: each round keeps only the numbers that go on.
    n_groups = np.ones(len(value), dtype=np.int64)
    rounds: list[tuple[Int, Int, NDArray[np.bool_]]] = []
    index: Int = np.arange(len(value))
    while len(index):
        more = (value > 15) | (value < -16)
        rounds.append((index, value & 0x1F, more))
        index, value = index[more], value[more] >> 5
        n_groups[index] += 1
    text_end = np.concatenate([[0], np.cumsum(n_groups)])
    characters = np.empty(text_end[-1], dtype=np.uint8)
    for k, (index, low, more) in enumerate(rounds):
        characters[text_end[index] + k] = low + 48 + 0x20 * more
    text, ends = characters.tobytes(), text_end[begin]
    return [text[a:b] for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]


def encode_crops(
    crops: Sequence[NDArray[np.bool_]], offsets_yx: Int, image_hw: tuple[int, int]
) -> list[bytes]:
    """Encode masks given as crops; see :func:`runs_from_crops` for the arguments."""
    return encode_runs(runs_from_crops(crops, offsets_yx, image_hw))


def decode_runs(rles: Sequence[bytes], image_hw: tuple[int, int]) -> Runs:
    """Read COCO ``counts`` strings of images of one size.

    Raises:
        PredictionError: A string is broken, or its runs do not fill the image.
    """
    lengths = np.array([len(rle) for rle in rles], dtype=np.int64)
    text = np.frombuffer(b''.join(rles), dtype=np.uint8).astype(np.int64) - 48
    text_end = np.cumsum(lengths)
    if ((text < 0) | (text > 63)).any() or (text[text_end[lengths > 0] - 1] & 0x20).any():
        raise PredictionError('RLE: not a COCO counts string (a character is out of range or cut)')
    is_last = (text & 0x20) == 0
    number = np.cumsum(is_last) - is_last  # index of the number that each character belongs to
    first = np.concatenate([[0], np.flatnonzero(is_last) + 1])[:-1]
    shift = 5 * (np.arange(len(text)) - first[number]) if len(text) else text
    if len(shift) and shift.max() > 60:
        raise PredictionError('RLE: a number has more than 64 bits')
    value = np.zeros(len(first), dtype=np.int64)
    np.add.at(value, number, (text & 0x1F) << shift)
    negative = np.flatnonzero(is_last & ((text & 0x10) != 0))
    value[number[negative]] -= np.int64(1) << np.minimum(shift[negative] + 5, 62)
    mask_of = np.repeat(np.arange(len(rles)), lengths)[is_last]
    counts, n_counts = _undo_differences(value, np.bincount(mask_of, minlength=len(rles)))
    return _runs_from_counts(counts, n_counts, image_hw)


def _undo_differences(value: Int, n_counts: Int) -> tuple[Int, Int]:
    """Add the count two before, for every count after the third of its mask."""
    within = ranges_of(n_counts)
    counts = value.copy()
    # Two interleaved prefix sums per mask. Count 0 is outside the even chain (2 is stored whole).
    for parity, start in ((1, 1), (0, 2)):
        chosen = np.flatnonzero((within % 2 == parity) & (within >= start))
        sums = np.cumsum(value[chosen])
        is_head = within[chosen] == start
        heads = np.flatnonzero(is_head)
        base = (sums - value[chosen])[heads]
        counts[chosen] = sums - base[np.cumsum(is_head) - 1] if len(chosen) else sums
    return counts, n_counts


def _runs_from_counts(counts: Int, n_counts: Int, image_hw: tuple[int, int]) -> Runs:
    n_pixels = image_hw[0] * image_hw[1]
    begin = np.concatenate([[0], np.cumsum(n_counts)])
    sums = np.concatenate([[0], np.cumsum(counts)])
    totals = sums[begin[1:]] - sums[begin[:-1]]
    # Counts beyond the image are looked for too: sums of crafted ones can wrap around to n_pixels.
    out_of_range = (counts < 0) | (counts > n_pixels)
    if out_of_range.any() or (totals != n_pixels).any():
        raise PredictionError(
            f'RLE: the runs do not add up to the image of {image_hw[0]} x {image_hw[1]} px'
        )
    owner = np.repeat(np.arange(len(n_counts)), n_counts)
    within = ranges_of(n_counts)
    local = sums[:-1] - sums[begin[owner]]
    ones = (within % 2 == 1) & (counts > 0)
    runs = Runs(local[ones], (local + counts)[ones], owner[ones], len(n_counts), image_hw)
    return _joined(runs)


def areas_of(runs: Runs) -> Int:
    """Return the number of pixels of each mask, (N,) int64."""
    return np.bincount(runs.owner, weights=runs.ends - runs.starts, minlength=runs.n_masks).astype(
        np.int64
    )


def column_pieces(runs: Runs) -> tuple[Int, Int, Int, Int]:
    """Cut runs at column ends.

    Returns:
        Owner, column, first row and one past the last row of each piece, four (P,) int64 arrays.
    """
    height = runs.image_hw[0]
    first_column = runs.starts // height
    n_pieces = (runs.ends - 1) // height - first_column + 1
    source = np.repeat(np.arange(len(runs.starts)), n_pieces)
    column = first_column[source] + ranges_of(n_pieces)
    top = np.maximum(runs.starts[source], column * height) - column * height
    bottom = np.minimum(runs.ends[source], (column + 1) * height) - column * height
    return runs.owner[source], column, top, bottom


def boxes_of(runs: Runs) -> NDArray[np.float32]:
    """Return tight boxes, (N, 4) float32 xyxy px, half-open; zeros for empty masks."""
    owner, column, top, bottom = column_pieces(runs)
    low = np.full((runs.n_masks, 2), np.iinfo(np.int64).max)
    high = np.zeros((runs.n_masks, 2), dtype=np.int64)
    np.minimum.at(low, owner, np.stack([column, top], axis=1))
    np.maximum.at(high, owner, np.stack([column + 1, bottom], axis=1))
    empty = high[:, 0] == 0
    low[empty] = 0
    boxes: NDArray[np.float32] = np.concatenate([low, high], axis=1).astype(np.float32)
    return boxes


def decode_crops(
    rles: Sequence[bytes], image_hw: tuple[int, int]
) -> tuple[list[NDArray[np.bool_]], Int]:
    """Return each mask's tight crop and the (N, 2) int64 row and column where it lies.

    An empty mask gives a (0, 0) crop at (0, 0).

    Raises:
        PredictionError: See :func:`decode_runs`.
    """
    runs = decode_runs(rles, image_hw)
    boxes = boxes_of(runs).astype(np.int64)
    owner, column, top, bottom = column_pieces(runs)
    hw = boxes[:, [3, 2]] - boxes[:, [1, 0]]
    # Paint all pieces into one buffer of padded columns by a difference array.
    sizes = hw[:, 1] * (hw[:, 0] + 1)
    base = np.cumsum(sizes) - sizes
    at = base[owner] + (column - boxes[owner, 0]) * (hw[owner, 0] + 1) - boxes[owner, 1]
    steps = np.zeros(int(sizes.sum()) + 1, dtype=np.int8)
    steps[at + top] = 1
    steps[at + bottom] = -1
    painted = np.cumsum(steps, dtype=np.int8).astype(bool)
    crops = [
        painted[b : b + w * (h + 1)].reshape(w, h + 1)[:, :h].T
        for b, (h, w) in zip(base.tolist(), hw.tolist(), strict=True)
    ]
    return crops, boxes[:, [1, 0]]


def coco_dicts(rles: Sequence[bytes], image_hw: tuple[int, int]) -> list[dict[str, Any]]:
    """Return the objects that pycocotools functions take."""
    size = [int(image_hw[0]), int(image_hw[1])]
    return [{'size': size, 'counts': rle} for rle in rles]


def iou_matrix(
    first: Sequence[bytes],
    second: Sequence[bytes],
    image_hw: tuple[int, int],
    *,
    over_first: bool = False,
) -> NDArray[np.float64]:
    """Return mask IoU, (len(first), len(second)) float64; 0 where both masks are empty.

    Args:
        first: RLEs of one image.
        second: RLEs of the same image.
        image_hw: Height and width in px.
        over_first: Divide the intersection by the first mask's area instead of the union.
    """
    if not len(first) or not len(second):
        return np.zeros((len(first), len(second)))
    table = coco_mask.iou(
        coco_dicts(first, image_hw), coco_dicts(second, image_hw), [int(over_first)] * len(second)
    )
    return np.nan_to_num(np.asarray(table, dtype=np.float64).reshape(len(first), len(second)))

"""Parts of an image and other sizes of it: crops of instance sets, boxes and areas.

In: an InstanceSet and a window, or a size. Out: what lies there. Invariant: no full-size mask
is made.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core import rle
from cellseg_mm.core.arrays import Int, ranges_of
from cellseg_mm.core.instances import InstanceSet, concatenate

MAX_PIECES = 1 << 22  # column pieces counted at once


def crop_to(instances: InstanceSet, window_yxyx: tuple[int, int, int, int]) -> InstanceSet:
    """Return what is left of each mask inside a window, in the window's coordinates.

    Instances without a pixel there are dropped. Boxes become the tight boxes of what is left;
    ``extra`` keeps all but ``mask_probs`` and ``mask_boxes``.
    """
    y0, x0, y1, x1 = window_yxyx
    runs = rle.decode_runs(instances.rles, instances.image_hw)
    boxes = rle.boxes_of(runs)
    meets = (boxes[:, 0] < x1) & (boxes[:, 2] > x0) & (boxes[:, 1] < y1) & (boxes[:, 3] > y0)
    near = np.flatnonzero(meets)
    picked = instances[near].without_probs()
    pieces = rle.column_pieces(rle.decode_runs(picked.rles, instances.image_hw))
    owner, column, top, bottom = pieces
    top, bottom = np.maximum(top, y0) - y0, np.minimum(bottom, y1) - y0
    column = column - x0
    inside = (column >= 0) & (column < x1 - x0) & (top < bottom)
    cut = runs_of_pieces(
        owner[inside], column[inside], top[inside], bottom[inside], len(picked), (y1 - y0, x1 - x0)
    )
    found = replace(
        picked,
        image_hw=(y1 - y0, x1 - x0),
        boxes_xyxy=rle.boxes_of(cut),
        rles=tuple(rle.encode_runs(cut)),
    )
    return found[rle.areas_of(cut) > 0]


def runs_of_pieces(
    owner: Int, column: Int, top: Int, bottom: Int, n: int, image_hw: tuple[int, int]
) -> rle.Runs:
    """Join pieces of columns to the runs of ``n`` masks of an image of this size."""
    base = column * image_hw[0]
    return rle.runs_from_pieces(base + top, base + bottom, owner, n, image_hw)


CHUNK = 4096  # cells whose runs are decoded at once: about 40 MB


def boxes_and_areas(instances: InstanceSet) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return tight boxes (N, 4) int64 xyxy px and areas (N,) int64 px, in bounded memory."""
    boxes = np.zeros((len(instances), 4), dtype=np.int64)
    areas = np.zeros(len(instances), dtype=np.int64)
    for start in range(0, len(instances), CHUNK):
        rows = slice(start, start + CHUNK)
        runs = rle.decode_runs(instances.rles[rows], instances.image_hw)
        boxes[rows], areas[rows] = rle.boxes_of(runs), rle.areas_of(runs)
    return boxes, areas


def resize(instances: InstanceSet, hw: tuple[int, int]) -> InstanceSet:
    """Return instances as they lie in the same image of another size.

    A pixel takes the value of the pixel in which its centre falls, so masks that share no pixel
    share none afterwards. Memory follows the result.
    """
    if instances.image_hw == hw:
        return instances
    (old_h, old_w), (height, width) = instances.image_hw, hw
    # Pixel k of the old side becomes pixels edges[k] to edges[k + 1] of the new one.
    rows, columns = _edges(old_h, height), _edges(old_w, width)
    scale = np.array([width / old_w, height / old_h] * 2, dtype=np.float32)
    parts = [] if len(instances) else [replace(instances, image_hw=hw)]
    for start in range(0, len(instances), CHUNK):
        part = instances[np.arange(start, min(start + CHUNK, len(instances)))]
        owner, column, top, bottom = rle.column_pieces(rle.decode_runs(part.rles, (old_h, old_w)))
        n_new = columns[column + 1] - columns[column]
        source = np.repeat(np.arange(len(owner)), n_new)
        new_column = columns[column][source] + ranges_of(n_new)
        new_top, new_bottom = rows[top[source]], rows[bottom[source]]
        filled = new_bottom > new_top
        runs = runs_of_pieces(
            owner[source][filled],
            new_column[filled],
            new_top[filled],
            new_bottom[filled],
            len(part),
            hw,
        )
        rles = tuple(rle.encode_runs(runs))
        boxes = part.boxes_xyxy * scale
        parts.append(replace(part, image_hw=hw, rles=rles, boxes_xyxy=boxes))
    return concatenate(parts)


def _edges(old: int, new: int) -> Int:
    """Return the first new pixel whose centre falls into each old pixel, and ``new``."""
    # (p + 1/2) * old / new >= k  <=>  p >= k * new / old - 1/2, in whole numbers
    k = np.arange(old + 1, dtype=np.int64)
    return -((old - 2 * k * new) // (2 * old))

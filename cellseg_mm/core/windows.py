"""Parts of an image: crops of instance sets, boxes and areas of run lengths.

In: an InstanceSet and a window. Out: what lies in it. Invariant: no full-size mask is made.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core import rle
from cellseg_mm.core.arrays import Int
from cellseg_mm.core.instances import InstanceSet

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

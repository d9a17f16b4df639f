"""Give each contested pixel to one cell.

In: an InstanceSet, the best cells first. Out: the cells that stay, none of whose pixels another
has. Invariant: memory follows the number of cells, never the pixels of the image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core import rle
from cellseg_mm.core.arrays import Int
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.windows import boxes_and_areas

BLOCK = 512  # boxes that are compared with their neighbours at once


@dataclass(frozen=True, slots=True)
class Disjoint:
    """Cells that share no pixel.

    Attributes:
        instances: Those that stay, in their order; boxes and ``extra`` stay as they were.
        uncut_areas: (N,) int64 px of each before overlaps were resolved.
        n_lost: Cells that went because they lost too much to earlier ones.
        n_small: Cells that went because too few pixels are left.
    """

    instances: InstanceSet
    uncut_areas: Int
    n_lost: int
    n_small: int


def make_disjoint(
    instances: InstanceSet, *, max_lost_share: float = 0.5, min_area_px: int = 0
) -> Disjoint:
    """Let each cell keep the pixels that no earlier cell has.

    Args:
        instances: In order of precedence.
        max_lost_share: A cell that loses a greater share of its mask goes, and always one that
            loses all of it. One that goes takes no pixel from another.
        min_area_px: A cell that has fewer pixels left goes.
    """
    boxes, areas = boxes_and_areas(instances)
    before = _earlier_neighbours(boxes)
    busy = np.array(sorted({*before, *(j for js in before.values() for j in js)}), dtype=np.int64)
    crops, offsets = instances[busy].crops()
    place = {i: k for k, i in enumerate(busy.tolist())}
    left, is_lost = areas.copy(), np.zeros(len(areas), dtype=bool)
    cut: dict[int, NDArray[np.bool_]] = {}
    for i in sorted(before):
        free = crops[place[i]].copy()
        for j in before[i]:
            if not is_lost[j] and left[j] >= min_area_px:
                _subtract(free, offsets[place[i]], crops[place[j]], offsets[place[j]])
        left[i] = np.count_nonzero(free)
        n_gone = areas[i] - left[i]
        is_lost[i] = n_gone > 0 and (left[i] == 0 or n_gone > max_lost_share * areas[i])
        if n_gone:
            cut[i] = free
    stays = ~is_lost & (left >= min_area_px)
    rles = list(instances.rles)
    chosen = [i for i in cut if stays[i]]
    new_offsets = offsets[[place[i] for i in chosen]].reshape(-1, 2)
    painted = rle.encode_crops([cut[i] for i in chosen], new_offsets, instances.image_hw)
    for i, text in zip(chosen, painted, strict=True):
        rles[i] = text
    kept = np.flatnonzero(stays)
    return Disjoint(
        replace(instances, rles=tuple(rles))[kept],
        areas[kept],
        int(is_lost.sum()),
        int((~is_lost & ~stays).sum()),
    )


def _subtract(free: NDArray[np.bool_], at: Int, other: NDArray[np.bool_], other_at: Int) -> None:
    """Take the pixels of ``other`` away from ``free``; each lies at its row and column."""
    first = np.maximum(at, other_at)
    end = np.minimum(at + free.shape, other_at + other.shape)
    if (end <= first).any():
        return
    (y0, x0), (y1, x1) = (first - at).tolist(), (end - at).tolist()
    (v0, u0), (v1, u1) = (first - other_at).tolist(), (end - other_at).tolist()
    free[y0:y1, x0:x1] &= ~other[v0:v1, u0:u1]


def _earlier_neighbours(boxes: Int) -> dict[int, list[int]]:
    """Return for each box the earlier ones that it shares a pixel with; boxes without are left out.

    Boxes are sorted by their left edges, so that each block meets a stretch of its followers only.
    """
    order = np.argsort(boxes[:, 0], kind='stable')
    lefts = boxes[order, 0]
    before: dict[int, list[int]] = {}
    for start in range(0, len(order), BLOCK):
        rows = order[start : start + BLOCK]
        end = int(np.searchsorted(lefts, boxes[rows, 2].max()))
        columns = order[start:end]
        a, b = boxes[rows][:, None], boxes[columns][None]
        meets = (a[..., 0] < b[..., 2]) & (b[..., 0] < a[..., 2])
        meets &= (a[..., 1] < b[..., 3]) & (b[..., 1] < a[..., 3])
        row, column = np.nonzero(meets)
        is_pair = column > row  # both count from ``start``; each pair once
        for i, j in zip(
            rows[row[is_pair]].tolist(), columns[column[is_pair]].tolist(), strict=True
        ):
            before.setdefault(max(i, j), []).append(min(i, j))
    return before

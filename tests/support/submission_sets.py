"""Three images of a submission: cells, one cell, none."""

from __future__ import annotations

import numpy as np

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data.labels import IdEntry

ID_MAP = [
    IdEntry('b.tif', 2, (17, 11)),
    IdEntry('a.tif', 1, (9, 14)),
    IdEntry('none.tif', 30, (5, 6)),
]


def squares(
    name: str, image_id: int, hw: tuple[int, int], cells: list[tuple[int, int, int, int, float]]
) -> InstanceSet:
    """Cells as (y, x, side, class_id, score)."""
    return InstanceSet.from_crops(
        name,
        image_id,
        hw,
        crops=[np.ones((side, side), bool) for _, _, side, _, _ in cells],
        offsets_yx=np.array([cell[:2] for cell in cells]),
        class_ids=np.array([cell[3] for cell in cells]),
        scores=np.array([cell[4] for cell in cells], dtype=np.float32),
    )


def make_sets() -> list[InstanceSet]:
    """In another order than the map, ids that are not the map's, scores unsorted."""
    return [
        squares('a', 77, (9, 14), [(0, 0, 4, 0, 0.25), (5, 9, 3, 3, 0.75), (2, 7, 2, 1, 0.5)]),
        squares('b', 78, (17, 11), [(8, 6, 5, 2, 0.125)]),
        InstanceSet.empty('none', 79, (5, 6)),
    ]

"""Masks that provoke those who write outlines and tables, and how outlines are read."""

from __future__ import annotations

import numpy as np
import pytest
import shapely

from cellseg_mm.core.instances import InstanceSet

NAMES = ('epithelial', 'lymphocyte/T', 'neutrophil', 'macrophage')


COLOURS = [(0, 114, 178), (213, 94, 0), (240, 228, 66), (0, 158, 115)]


# Each provokes: a plain cell; one pixel; a hole; two parts; parts that touch in a corner; a hole
# that touches the outside in a corner; two holes that touch; a part inside a hole; no pixel.
SHAPES = {
    'F': ['111', '100', '110', '100'],
    'one pixel': ['1'],
    'hole': ['1111', '1001', '1111'],
    'two parts': ['1001', '1101'],
    'corner': ['110', '110', '001'],
    'open hole': ['0111', '1011', '1111'],
    'closed diamond': ['0110', '1001', '0110'],
    'two holes': ['11111', '10111', '11011', '11111'],
    'island': ['11111', '10001', '10101', '10001', '11111'],
    'crossing': ['10101', '01010', '10101'],
    'nothing': [],
}


def crop_of(rows: list[str]) -> np.ndarray:
    if not rows:
        return np.zeros((0, 0), dtype=bool)
    return np.array([[c == '1' for c in row] for row in rows])


def make_set(crops, offsets, image_hw=(60, 71), scores=None, name='a b') -> InstanceSet:
    rng = np.random.default_rng(len(crops))
    scores = rng.permutation(np.linspace(0.1, 0.9, len(crops))) if scores is None else scores
    class_ids = rng.integers(0, 4, len(crops))
    return InstanceSet.from_crops(
        name,
        7,
        image_hw,
        crops=crops,
        offsets_yx=np.array(offsets).reshape(-1, 2),
        class_ids=class_ids,
        scores=scores,
    )


def shapes_set() -> InstanceSet:
    crops = [crop_of(rows) for rows in SHAPES.values()]
    return make_set(crops, [(3 + 5 * i, 60 - 5 * i) for i in range(len(crops))])


def random_set(seed: int, n: int = 12) -> InstanceSet:
    """Overlapping noise masks: every kind of corner contact occurs, also at the image's edge."""
    rng = np.random.default_rng(seed)
    crops = [rng.random(rng.integers(1, 14, 2)) < rng.uniform(0.2, 0.95) for _ in range(n)]
    offsets = [rng.integers(0, np.array((60, 71)) - c.shape + 1) for c in crops]
    offsets[0] = (60 - crops[0].shape[0], 71 - crops[0].shape[1])
    offsets[1] = (0, 0)
    return make_set(crops, offsets)


SETS = [
    pytest.param(shapes_set(), id='shapes'),
    *(pytest.param(random_set(seed), id=f'seed {seed}') for seed in range(20)),
]


EMPTY = InstanceSet.empty('none', 1, (60, 71))


def pixels_inside(geometry, image_hw) -> np.ndarray:
    rows, columns = np.mgrid[: image_hw[0], : image_hw[1]]
    return shapely.contains_xy(geometry, columns + 0.5, rows + 0.5)


def as_shapely(parts) -> shapely.MultiPolygon:
    return shapely.MultiPolygon([(p.exterior, list(p.holes)) for p in parts])

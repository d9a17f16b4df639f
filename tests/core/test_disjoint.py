"""One owner for each pixel: against plain painting on full-size masks."""

from __future__ import annotations

import numpy as np
import pytest

from cellseg_mm.core import disjoint
from cellseg_mm.core.disjoint import make_disjoint
from cellseg_mm.core.instances import InstanceSet


def random_cells(seed: int, n: int, image_hw: tuple[int, int], largest: int) -> InstanceSet:
    rng = np.random.default_rng(seed)
    crops, offsets = [], []
    for _ in range(n):
        h, w = rng.integers(1, largest + 1, 2)
        crops.append(rng.random((h, w)) < rng.choice([0.0, 0.4, 0.9, 1.0]))
        offsets.append([rng.integers(0, image_hw[0] - h + 1), rng.integers(0, image_hw[1] - w + 1)])
    return InstanceSet.from_crops(
        'a',
        1,
        image_hw,
        crops=crops,
        offsets_yx=np.array(offsets, dtype=np.int64).reshape(-1, 2),
        class_ids=rng.integers(0, 4, n),
        scores=np.linspace(1, 0.1, n),
    )


def painted(instances: InstanceSet, max_lost_share: float, min_area_px: int) -> tuple:
    """The definition, with full-size masks."""
    taken = np.zeros(instances.image_hw, dtype=bool)
    kept, masks, n_lost, n_small = [], [], 0, 0
    for i, mask in enumerate(instances.masks()):
        free = mask & ~taken
        n_gone = int(mask.sum()) - int(free.sum())
        if n_gone and (not free.any() or n_gone > max_lost_share * mask.sum()):
            n_lost += 1
        elif free.sum() < min_area_px:
            n_small += 1
        else:
            taken |= free
            kept.append(i)
            masks.append(free)
    return kept, masks, n_lost, n_small


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize(('share', 'least'), [(0.5, 0), (0.0, 0), (1.0, 6), (0.3, 20)])
@pytest.mark.parametrize('block', [1, 3, 512])
def test_equals_painting(
    seed: int, share: float, least: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disjoint, 'BLOCK', block)
    cells = random_cells(seed, 40, (40, 50), 15)
    found = make_disjoint(cells, max_lost_share=share, min_area_px=least)
    kept, masks, n_lost, n_small = painted(cells, share, least)
    assert (found.n_lost, found.n_small) == (n_lost, n_small)
    assert found.instances.scores.tolist() == cells.scores[kept].tolist()
    assert np.array_equal(found.instances.masks(), np.array(masks).reshape(-1, 40, 50))
    assert found.uncut_areas.tolist() == cells.areas[kept].tolist()
    assert found.instances.masks().sum(axis=0).max() <= 1


def test_whoever_goes_takes_no_pixel() -> None:
    """The second loses most of its mask to the first and goes; the third keeps all of its own."""
    cells = InstanceSet.from_crops(
        'a',
        1,
        (4, 12),
        crops=[np.ones((4, 6), bool), np.ones((4, 6), bool), np.ones((4, 5), bool)],
        offsets_yx=np.array([[0, 0], [0, 2], [0, 7]]),
        class_ids=np.array([0, 0, 1]),
        scores=np.array([0.9, 0.8, 0.7]),
    )
    found = make_disjoint(cells)
    assert found.instances.class_ids.tolist() == [0, 1]
    assert found.instances.areas.tolist() == [24, 20]
    assert (found.n_lost, found.n_small) == (1, 0)
    assert found.instances.rles == (cells.rles[0], cells.rles[2])  # not even written anew


@pytest.mark.parametrize('n', [0, 1])
def test_few_cells(n: int) -> None:
    cells = random_cells(1, n, (9, 9), 4)
    assert len(make_disjoint(cells).instances) == n

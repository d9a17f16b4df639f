"""core.windows: what lies in a window, equal to slicing full masks; boxes and areas in parts."""

from __future__ import annotations

import numpy as np
import pytest

from cellseg_mm.core import windows
from cellseg_mm.core.instances import InstanceSet

HW = (23, 17)


def random_cells(seed: int, n: int = 30) -> InstanceSet:
    """Cells in several parts, on every border, of one pixel and of none."""
    rng = np.random.default_rng(seed)
    crops, offsets = [], []
    for _ in range(n):
        size = rng.integers(1, 9, 2)
        crops.append(rng.random(size) < rng.choice([0.0, 0.2, 0.7, 1.0]))
        offsets.append(rng.integers(0, np.array(HW) - size + 1))
    corners = np.zeros(HW, bool)  # its box meets every window, its pixels only corners
    corners[0, 0] = corners[-1, -1] = True
    crops, offsets = [*crops[1:], corners], [*offsets[1:], (0, 0)]
    return InstanceSet.from_crops(
        'case',
        3,
        HW,
        crops=crops,
        offsets_yx=np.array(offsets),
        class_ids=rng.integers(0, 3, n),
        scores=rng.random(n),
    )


@pytest.mark.parametrize(
    'window',
    [
        pytest.param((0, 0, *HW), id='everything'),
        pytest.param((4, 3, 15, 12), id='inside'),
        pytest.param((0, 10, 6, 17), id='a corner'),
        pytest.param((22, 16, 23, 17), id='one pixel'),
    ],
)
@pytest.mark.parametrize('seed', range(5))
def test_crop_equals_slices_of_full_masks(seed: int, window: tuple[int, int, int, int]) -> None:
    cells = random_cells(seed)
    probs = {'mask_probs': np.zeros((len(cells), 2, 2)), 'n_votes': np.arange(len(cells))}
    cells = InstanceSet(
        *(cells.name, cells.image_id, cells.image_hw, cells.class_ids, cells.scores),
        *(cells.boxes_xyxy, cells.rles, probs),
    )
    y0, x0, y1, x1 = window
    sliced = cells.masks()[:, y0:y1, x0:x1]
    left = np.flatnonzero(sliced.any(axis=(1, 2)))
    got = windows.crop_to(cells, window)
    assert got.image_hw == (y1 - y0, x1 - x0)
    np.testing.assert_array_equal(got.masks(), sliced[left])
    assert set(got.extra) == {'n_votes'}  # probabilities lie in another frame
    assert got.extra['n_votes'].tolist() == left.tolist()
    assert got.scores.tolist() == cells.scores[left].tolist()
    for mask, box in zip(sliced[left], got.boxes_xyxy.tolist(), strict=True):
        ys, xs = np.nonzero(mask)
        assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_boxes_and_areas_in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = random_cells(7)
    monkeypatch.setattr(windows, 'CHUNK', 4)  # 30 cells: seven whole parts and one of two
    boxes, areas = windows.boxes_and_areas(cells)
    for mask, box, area in zip(cells.masks(), boxes.tolist(), areas.tolist(), strict=True):
        assert area == mask.sum()
        if area:
            ys, xs = np.nonzero(mask)
            assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert (areas == 0).any()
    none = windows.boxes_and_areas(InstanceSet.empty('none', 1, HW))
    assert [part.shape for part in none] == [(0, 4), (0,)]


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('new_hw', [(46, 34), HW, (40, 5), (9, 30), (60, 45)])
def test_resizing_takes_the_nearest_pixel_of_each_mask(
    seed: int, new_hw: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, 'CHUNK', 7)
    cells = random_cells(seed)
    resized = windows.resize(cells, new_hw)
    y, x = ((np.arange(n) + 0.5) * old // n for n, old in zip(new_hw, HW, strict=True))
    expected = cells.masks()[:, y.astype(int)[:, None], x.astype(int)[None]]
    assert np.array_equal(resized.masks(), expected)
    scale = np.array([new_hw[1] / HW[1], new_hw[0] / HW[0]] * 2)
    assert np.allclose(resized.boxes_xyxy, cells.boxes_xyxy * scale, rtol=1e-6)  # float32


def test_no_cells_are_resized_too() -> None:
    assert windows.resize(InstanceSet.empty('a', 1, (3, 4)), (6, 8)).image_hw == (6, 8)

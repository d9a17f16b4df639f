"""Outlines of every format are filled by one rule; what cannot be used costs no other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cellseg_mm.core.errors import LabelMapError
from cellseg_mm.data.importing.classes import Classes
from cellseg_mm.data.importing.shapes import Part, Shape, cells_of_shapes, ellipse
from cellseg_mm.data.importing.sources import Cell, Tally
from cellseg_mm.results.polygons import trace_polygons

HW = (17, 23)
CLASSES = Classes(('cell',), {'cell': 1, 'debris': 0})


def fill(*parts: Part, tally: Tally | None = None, centre: float = 0.5) -> list[Cell]:
    tally = Tally() if tally is None else tally
    shape = Shape('cell', parts, 'cell 1')
    return cells_of_shapes([shape], CLASSES, Path('a'), HW, tally, first_centre=centre)


def ring(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, dtype=np.float64)


def square(x: float, y: float, side: float) -> np.ndarray:
    return ring((x, y), (x + side, y), (x + side, y + side), (x, y + side))


def whole(cell: Cell) -> np.ndarray:
    mask = np.zeros(HW, bool)
    height, width = cell.mask.shape
    mask[cell.top : cell.top + height, cell.left : cell.left + width] = cell.mask
    return mask


@pytest.mark.parametrize('seed', range(20))
def test_traced_masks_come_back_pixel_by_pixel(seed: int) -> None:
    """With holes, islands in holes, several parts and pixels that touch in corners."""
    rng = np.random.default_rng(seed)
    mask = rng.random(HW) < rng.uniform(0.2, 0.9)
    (polygons,) = trace_polygons([mask], np.zeros((1, 2), dtype=np.int64))
    parts = [Part(p.exterior * 1.0, tuple(h * 1.0 for h in p.holes)) for p in polygons]
    tally = Tally()
    (cell,) = fill(*parts, tally=tally)
    assert whole(cell).tolist() == mask.tolist()
    assert not tally.remarks


def test_corners_of_pixels_and_pixels_are_two_conventions() -> None:
    assert fill(Part(square(2, 3, 4)))[0].mask.shape == (4, 4)
    assert fill(Part(square(2, 3, 4)), centre=0)[0].mask.shape == (5, 5)


def test_the_outline_of_a_hole_belongs_to_the_cell() -> None:
    (cell,) = fill(Part(square(2, 2, 8), (square(4, 4, 3),)), centre=0)
    assert cell.mask.sum() == 81 - 4


def test_a_hole_beyond_its_cell_adds_nothing() -> None:
    (cell,) = fill(Part(square(2, 2, 4), (square(4, 4, 9),)))
    assert cell.mask.sum() == 16 - 4


@pytest.mark.parametrize(
    ('points', 'n_pixels'),
    [
        pytest.param([(2, 2), (10, 10), (10, 2), (2, 10)], 40, id='bow tie'),
        pytest.param([*square(2, 2, 8), *square(2, 2, 4)], 48, id='around twice'),
    ],
)
def test_a_ring_that_crosses_itself_is_filled_by_even_odd_and_said(
    points: list[tuple[float, float]], n_pixels: int
) -> None:
    tally = Tally()
    (cell,) = fill(Part(ring(*points)), tally=tally)
    assert cell.mask.sum() == n_pixels  # the diagonals go through centres
    assert 'cross themselves (such as cell 1)' in tally.remarks[0]


def test_a_bridge_forth_and_back_makes_a_hole_and_is_no_crossing() -> None:
    tally = Tally()
    keyhole = [*square(2, 2, 8), (2, 2), *square(4, 4, 3)[::-1], (4, 7), (2, 2)]
    (cell,) = fill(Part(ring(*keyhole)), tally=tally)
    assert cell.mask.sum() == 64 - 9
    assert not tally.remarks


@pytest.mark.parametrize(
    ('parts', 'reason'),
    [
        pytest.param([], 'fewer than 3 points', id='none'),
        pytest.param([Part(ring((1, 1), (2, 2)))], 'fewer than 3 points', id='line'),
        pytest.param([Part(ring((1, 1), (2, 2), (np.nan, 3)))], 'no number of pixels', id='nan'),
        pytest.param([Part(ring((1, 1), (2, 2), (1e30, 3)))], 'no number of pixels', id='huge'),
        pytest.param([Part(square(50, 50, 5))], 'without a pixel', id='outside'),
        pytest.param([Part(square(-9, -9, 5))], 'without a pixel', id='outside, above'),
        pytest.param([Part(square(3.6, 3.6, 0.2))], 'without a pixel', id='between centres'),
    ],
)
def test_an_outline_that_cannot_be_used_is_counted(parts: list[Part], reason: str) -> None:
    tally = Tally()
    assert not fill(*parts, tally=tally)
    assert reason in next(iter(tally.unusable))
    assert tally.unusable.popitem()[1] == ['cell 1']


def test_a_cell_beyond_the_image_is_cut_and_said() -> None:
    tally = Tally()
    (cell,) = fill(Part(square(15, 10, 1e6)), tally=tally)
    assert whole(cell)[10:, 15:].all()
    assert cell.mask.sum() == 7 * 8
    assert '1 cells reach beyond the image' in tally.remarks[0]


def test_classes_are_skipped_or_unknown() -> None:
    tally = Tally()
    shapes = [Shape('debris', (Part(square(1, 1, 4)),), 'cell 1')]
    assert not cells_of_shapes(shapes, CLASSES, Path('a'), HW, tally)
    assert tally.skipped == {'outlines of class debris': 1}
    with pytest.raises(LabelMapError, match="class 'dust'"):
        cells_of_shapes([Shape('dust', (), '')], CLASSES, Path('a'), HW, tally)


def test_an_ellipse_has_the_area_of_one() -> None:
    (cell,) = fill(Part(ellipse((11, 8), (9, 4), 90)))
    assert cell.mask.shape == (17, 8)
    assert abs(int(cell.mask.sum()) - np.pi * 36) < 12

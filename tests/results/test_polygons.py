"""results.polygons: outlines hold exactly the mask's pixels."""

from __future__ import annotations

import numpy as np
import pytest
import shapely

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.results import polygons
from tests.support.odd_masks import (
    SETS,
    SHAPES,
    as_shapely,
    crop_of,
    pixels_inside,
    random_set,
)


@pytest.mark.parametrize('instances', SETS)
def test_polygons_hold_exactly_the_masks_pixels(instances: InstanceSet) -> None:
    parts = polygons.trace_polygons(*instances.crops())
    for mask, area, polygon in zip(instances.masks(), instances.areas, parts, strict=True):
        shape = as_shapely(polygon)
        assert shape.is_valid, shapely.is_valid_reason(shape)
        assert shape.area == area
        assert np.array_equal(pixels_inside(shape, instances.image_hw), mask)


@pytest.mark.parametrize(
    ('rows', 'n_holes'),
    [
        pytest.param(SHAPES['F'], [0], id='plain'),
        pytest.param(SHAPES['hole'], [1], id='hole'),
        pytest.param(SHAPES['corner'], [0, 0], id='corner contact separates'),
        pytest.param(SHAPES['open hole'], [1], id='hole touching the outside stays a hole'),
        pytest.param(SHAPES['closed diamond'], [0, 0, 0, 0], id='no connected ring'),
        pytest.param(SHAPES['two holes'], [2], id='touching holes'),
        pytest.param(SHAPES['island'], [1, 0], id='island in a hole'),
        pytest.param(SHAPES['nothing'], [], id='nothing'),
    ],
)
def test_parts_and_holes(rows: list[str], n_holes: list[int]) -> None:
    (parts,) = polygons.trace_polygons([crop_of(rows)], [(5, 3)])
    assert [len(p.holes) for p in parts] == n_holes


def test_ring_of_a_known_shape() -> None:
    # F: 3 wide, 4 high, at x 10, y 20; corners in walking order, clockwise on a screen
    (parts,) = polygons.trace_polygons([crop_of(SHAPES['F'])], [(20, 10)])
    expected = [(0, 0), (3, 0), (3, 1), (1, 1), (1, 2), (2, 2), (2, 3), (1, 3), (1, 4), (0, 4)]
    assert (parts[0].exterior - (10, 20)).tolist() == [list(corner) for corner in expected]


def test_exteriors_turn_against_holes() -> None:
    (parts,) = polygons.trace_polygons([crop_of(SHAPES['hole'])], [(0, 0)])
    rings = [shapely.LinearRing(ring) for ring in parts[0].rings]
    assert [ring.is_ccw for ring in rings] == [True, False]  # by numbers, as RFC 7946


@pytest.mark.parametrize('max_pixels', [1, 50, 400])
def test_canvas_size_changes_nothing(max_pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    instances = random_set(3, n=40)
    whole = polygons.trace_polygons(*instances.crops())
    stack = polygons.stack_crops
    monkeypatch.setattr(polygons, 'stack_crops', lambda c: stack(c, max_pixels=max_pixels))
    pieces = polygons.trace_polygons(*instances.crops())
    as_lists = [[[r.tolist() for r in p.rings] for p in parts] for parts in whole]
    assert as_lists == [[[r.tolist() for r in p.rings] for p in parts] for parts in pieces]

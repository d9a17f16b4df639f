"""Outlines become cells: the one rule by which polygons of every format are filled.

In: rings with their class names. Out: cells. Invariant: a pixel belongs to a ring by the even-odd
rule at the pixel's centre; an outline that cannot be used is counted and costs no other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.data.importing.classes import UNNAMED, Classes
from cellseg_mm.data.importing.sources import Cell, Mask, Tally

Ring: TypeAlias = NDArray[np.float64]  # (V, 2) x, y px

MAX_XY = 1e9  # beyond it floats hold no fractions of a pixel worth having
N_ELLIPSE = 128


@dataclass(frozen=True, slots=True)
class Part:
    """One connected part of a cell.

    Attributes:
        exterior: Its outline, (V, 2) float64 x, y px, closed implicitly.
        holes: Rings inside it, of the same form.
    """

    exterior: Ring
    holes: tuple[Ring, ...] = ()


@dataclass(frozen=True, slots=True)
class Shape:
    """One outlined cell of a source.

    Attributes:
        class_name: As the source has it, '' for none.
        parts: Joined.
        which: Names it in reports.
        crops: Row, column and mask of parts that the source has as pixels; joined to the others.
    """

    class_name: str
    parts: tuple[Part, ...]
    which: str
    crops: tuple[tuple[int, int, Mask], ...] = ()


class _Filled(NamedTuple):
    """Row and column of a crop, its mask, and whether one of its rings crosses itself."""

    top: int
    left: int
    mask: Mask
    does_cross: bool


def cells_of_shapes(
    shapes: Iterable[Shape],
    classes: Classes,
    source: Path,
    image_hw: Sequence[int],
    tally: Tally,
    *,
    first_centre: float = 0.5,
) -> list[Cell]:
    """Fill outlines, and count those that are to be left out or cannot be used.

    Args:
        shapes: In the source's order.
        classes: Tells class names.
        source: A file for messages.
        image_hw: Height and width in px; what lies outside is cut off.
        tally: Gets what was left out, and a remark on outlines that cross themselves or are cut.
        first_centre: The coordinate of the first pixel's centre: 0.5 where whole numbers are the
            corners of pixels (QuPath, ImageJ, Labelme, CVAT), 0 where they are pixels (OpenCV).

    Raises:
        LabelMapError: A class name is neither known nor skipped.
    """
    cells: list[Cell] = []
    crossing: list[str] = []
    n_cut = 0
    for shape in shapes:
        if shape.class_name == UNNAMED and UNNAMED not in classes.number_of:
            tally.leave_out('outlines without a class (--class names one for them)', shape.which)
            continue
        number = classes.number(shape.class_name, source)
        fault = _fault(shape)
        if not number:
            tally.skipped[f'outlines of class {shape.class_name or "without name"}'] += 1
        elif fault:
            tally.leave_out(fault, shape.which)
        else:
            moved = [_moved(part, first_centre) for part in shape.parts]
            top, left, mask, does_cross = _fill_shape(moved, shape.crops, image_hw)
            if mask.any():
                cells.append(Cell(number, top, left, mask))
                crossing += [shape.which] * does_cross
                n_cut += _is_cut(moved, image_hw)
            else:
                tally.leave_out('outlines without a pixel in the image', shape.which)
    if crossing:
        tally.remarks.append(
            f'{len(crossing)} outlines cross themselves (such as {crossing[0]}): what they go '
            f'around twice is not filled'
        )
    if n_cut:
        tally.remarks.append(f'{n_cut} cells reach beyond the image and were cut off there')
    return cells


def _fault(shape: Shape) -> str:
    """Say why an outline cannot be used; '' if it can."""
    rings = [ring for part in shape.parts for ring in (part.exterior, *part.holes)]
    if not (rings or shape.crops) or any(len(ring) < 3 for ring in rings):
        return 'outlines with fewer than 3 points'
    if not all((np.abs(ring) <= MAX_XY).all() for ring in rings):  # NaN compares false
        return 'outlines with a point that is no number of pixels'
    return ''


def _moved(part: Part, by: float) -> Part:
    return Part(part.exterior - by, tuple(hole - by for hole in part.holes))


def _is_cut(parts: Sequence[Part], image_hw: Sequence[int]) -> bool:
    if not parts:
        return False
    low = np.min([part.exterior.min(axis=0) for part in parts], axis=0)
    high = np.max([part.exterior.max(axis=0) for part in parts], axis=0)
    return bool((low < -1).any() or (high > np.array(image_hw[::-1])).any())


def _fill_shape(
    parts: Sequence[Part], crops: Sequence[tuple[int, int, Mask]], image_hw: Sequence[int]
) -> _Filled:
    filled = [_fill_part(part, image_hw) for part in parts]
    for top, left, crop in crops:
        inside = crop[max(-top, 0) : image_hw[0] - top, max(-left, 0) : image_hw[1] - left]
        filled.append(_Filled(max(top, 0), max(left, 0), inside, False))
    does_cross = any(one.does_cross for one in filled)
    filled = [one for one in filled if one.mask.any()] or filled[:1]
    top, left = min(one.top for one in filled), min(one.left for one in filled)
    end_y = max(one.top + one.mask.shape[0] for one in filled)
    end_x = max(one.left + one.mask.shape[1] for one in filled)
    mask = np.zeros((end_y - top, end_x - left), dtype=bool)
    for y, x, crop, _ in filled:
        mask[y - top : y - top + crop.shape[0], x - left : x - left + crop.shape[1]] |= crop
    return _Filled(top, left, mask, does_cross)


def _fill_part(part: Part, image_hw: Sequence[int]) -> _Filled:
    low, high = _bounds(part.exterior, image_hw)
    right, left = _windings(part.exterior, low, high)
    mask = _closed(part.exterior, right, left, low)
    does_cross = _crosses(right)
    for hole in part.holes:
        right, left = _windings(hole, low, high)
        # the outline of a hole belongs to the cell, as every outline does
        mask &= ~((right & left & 1).astype(bool) & ~_corners(hole, low, mask.shape))
        does_cross |= _crosses(right)
    return _Filled(int(low[1]), int(low[0]), mask, does_cross)


def fill_polygon(vertices_xy: Ring, image_hw: Sequence[int]) -> tuple[int, int, Mask]:
    """Rasterise one polygon.

    A pixel belongs to the polygon if the point (column, row) is inside by the even-odd rule, on its
    outline, or a vertex; a line that is drawn forth and back encloses nothing. This is the rule of
    MoNuSAC's own scripts, which call ``skimage.draw.polygon``; compared on random polygons.

    Args:
        vertices_xy: (V, 2) float64, px; closed implicitly.
        image_hw: Height and width; what is outside is cut off.

    Returns:
        Row and column of the crop, and its (h, w) bool mask; (0, 0) if no pixel is inside.
    """
    top, left, mask, _ = _fill_part(Part(vertices_xy), image_hw)
    return (top, left, mask) if mask.size else (0, 0, np.zeros((0, 0), dtype=bool))


def ring_of(points: object) -> Ring:
    """Return a ring of what a file has: a list of x, y (and more); closed implicitly.

    What is no such list becomes points that are no numbers, which are refused when it is filled.
    """
    try:
        ring = np.array(points, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        return np.full((3, 2), np.nan)
    if ring.size == 0:
        return np.zeros((0, 2))
    if ring.ndim != 2 or ring.shape[1] < 2:
        return np.full((3, 2), np.nan)
    ring = ring[:, :2]
    return ring[:-1] if len(ring) > 1 and (ring[0] == ring[-1]).all() else ring


def grouped(shapes: Iterable[tuple[object, Shape]]) -> list[Shape]:
    """Join shapes of one group and class to one cell; groups None, 0 and '' are none."""
    found: dict[object, Shape] = {}
    for number, (group, shape) in enumerate(shapes):
        is_group = isinstance(group, int | str) and group not in (0, '', '0')
        key = (group, shape.class_name) if is_group else number
        first = found.get(key)
        if first is not None:
            parts, crops = first.parts + shape.parts, first.crops + shape.crops
            shape = replace(first, parts=parts, crops=crops)
        found[key] = shape
    return list(found.values())


def bridged(rings: Sequence[Ring]) -> Ring:
    """Join rings to one by lines forth and back: filled by even-odd, it encloses the same."""
    start = rings[0][:1]
    joined = [rings[0], start]
    for ring in rings[1:]:
        joined += [ring, ring[:1], start]
    return rings[0] if len(rings) == 1 else np.concatenate(joined)


def points_inside(ring: Ring, points_xy: Ring) -> NDArray[np.bool_]:
    """Tell which points, (P, 2) px, a ring goes around, by the even-odd rule."""
    x, y = points_xy.T
    inside = np.zeros(len(points_xy), dtype=bool)
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


def ellipse(centre_xy: Sequence[float], radii_xy: Sequence[float], turn: float = 0) -> Ring:
    """Return an ellipse as a ring; ``turn`` in degrees is clockwise on a screen."""
    angles = np.arange(N_ELLIPSE) * (2 * math.pi / N_ELLIPSE)
    x, y = radii_xy[0] * np.cos(angles), radii_xy[1] * np.sin(angles)
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    return np.stack([centre_xy[0] + cos * x - sin * y, centre_xy[1] + sin * x + cos * y], axis=1)


# ---- one ring ----


def _bounds(ring: Ring, image_hw: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first and last column and row that a ring can reach; none if last < first."""
    low = np.maximum(np.ceil(ring.min(axis=0)), 0).astype(np.int64)
    high = np.minimum(np.floor(ring.max(axis=0)), np.array(image_hw[::-1]) - 1).astype(np.int64)
    return (low, high) if (high >= low).all() else (low * 0, low * 0 - 1)


def _windings(
    ring: Ring, low: NDArray[np.int64], high: NDArray[np.int64]
) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Return how often a ring goes around each point, counted to its right and to its left.

    The two have different parity for points on the outline only: an edge through the point counts
    for neither side.
    """
    xs = np.arange(low[0], high[0] + 1, dtype=np.float64)
    right = np.zeros((max(high[1] - low[1] + 1, 0), len(xs)), dtype=np.int16)
    left = np.zeros_like(right)
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        first, last = max(math.ceil(min(y0, y1)), low[1]), min(math.floor(max(y0, y1)), high[1])
        if first <= last and y0 != y1:
            ys = np.arange(first, last + 1, dtype=np.float64)[:, None]
            rows = slice(first - low[1], last - low[1] + 1)
            way = np.int16(1 if y1 > y0 else -1)
            side = ((xs - x0) * (y1 - y0) - (ys - y0) * (x1 - x0)) * way
            right[rows] += way * (((y0 > ys) != (y1 > ys)) & (side < 0))
            left[rows] += way * (((y0 < ys) != (y1 < ys)) & (side > 0))
    return right, left


def _crosses(right: NDArray[np.int16]) -> bool:
    """Tell whether a ring goes around points in both directions, or more than once."""
    return int(right.max(initial=0)) - int(right.min(initial=0)) > 1


def _closed(
    ring: Ring, right: NDArray[np.int16], left: NDArray[np.int16], low: NDArray[np.int64]
) -> Mask:
    return ((right | left) & 1).astype(bool) | _corners(ring, low, right.shape)


def _corners(ring: Ring, low: NDArray[np.int64], shape: Sequence[int]) -> Mask:
    """Return the points that are vertices."""
    found = np.zeros(tuple(shape), dtype=bool)
    corners = ring[(ring % 1 == 0).all(axis=1)].astype(np.int64) - low
    inside = ((corners >= 0) & (corners < np.array(shape[::-1]))).all(axis=1)
    found[corners[inside, 1], corners[inside, 0]] = True
    return found

"""Masks as polygons whose corners are pixel corners: nothing is rounded, smoothed or lost.

In: tight Boolean crops. Out: for each mask its 4-connected parts, each an exterior ring and holes.
Invariant: a pixel belongs to the mask exactly when its centre lies inside the polygons, and every
polygon is valid in the sense of OGC: rings are simple, and touch each other in single points only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.arrays import Int

MAX_CANVAS_PX = 1 << 20  # about 60 bytes per pixel live at once
EAST, SOUTH, WEST, NORTH = range(4)


@dataclass(frozen=True, slots=True)
class Polygon:
    """One 4-connected part of a mask.

    Attributes:
        exterior: (V, 2) int64 x, y px; corners only, not closed. x, y (0, 0) is the upper left
            corner of the upper left pixel. Clockwise on a screen, where y points down; read as
            plain numbers that is anticlockwise, as RFC 7946 wants exteriors.
        holes: Rings of the same form, in the opposite direction.
    """

    exterior: Int
    holes: tuple[Int, ...]

    @property
    def rings(self) -> tuple[Int, ...]:
        """The exterior and the holes."""
        return (self.exterior, *self.holes)


@dataclass(frozen=True, slots=True)
class Canvas:
    """Crops below each other, so that one call works on many small masks.

    Attributes:
        pixels: (H, W) uint8 0/1; every crop has background on all sides.
        index: (C,) int64, which crops these are.
        tops: (C,) int64, rising: the row of each crop's first row. Its first column is 1.
    """

    pixels: NDArray[np.uint8]
    index: Int
    tops: Int

    def crop_of_rows(self, rows: Int) -> Int:
        """Return the place in ``index`` of the crop that rows (from ``tops - 1``) belong to."""
        return np.searchsorted(self.tops - 1, rows, side='right') - 1


def stack_crops(
    crops: Sequence[NDArray[np.bool_]], *, max_pixels: int = MAX_CANVAS_PX
) -> Iterator[Canvas]:
    """Yield canvases with all crops that have pixels; crops of similar width share one."""
    shapes = np.array([crop.shape for crop in crops], dtype=np.int64).reshape(-1, 2)
    filled = np.flatnonzero(shapes.prod(axis=1) > 0)
    order = filled[np.argsort(shapes[filled, 1], kind='stable')].tolist()
    start = 0
    while start < len(order):
        stop, height = start, 1
        while stop < len(order):
            taller = height + int(shapes[order[stop], 0]) + 1
            if stop > start and taller * (int(shapes[order[stop], 1]) + 2) > max_pixels:
                break
            height, stop = taller, stop + 1
        chosen = order[start:stop]
        pixels = np.zeros((height, int(shapes[chosen, 1].max()) + 2), dtype=np.uint8)
        tops = np.cumsum(shapes[chosen, 0] + 1) - shapes[chosen, 0]
        for i, top in zip(chosen, tops.tolist(), strict=True):
            pixels[top : top + shapes[i, 0], 1 : 1 + shapes[i, 1]] = crops[i]
        yield Canvas(pixels, np.array(chosen, dtype=np.int64), tops)
        start = stop


def trace_polygons(
    crops: Sequence[NDArray[np.bool_]], offsets_yx: Int
) -> list[tuple[Polygon, ...]]:
    """Trace masks along their pixels' edges.

    Args:
        crops: N arrays (h_i, w_i) bool; may be empty or all background.
        offsets_yx: (N, 2) int64, row and column of each crop's first pixel in the image.

    Returns:
        For each mask its parts, from the topmost (then leftmost) on; () for a mask without pixels.
    """
    parts: list[tuple[Polygon, ...]] = [()] * len(crops)
    offsets_yx = np.asarray(offsets_yx, dtype=np.int64).reshape(-1, 2)
    for canvas in stack_crops(crops):
        found: dict[int, list[Polygon]] = {}
        for place, rings in _rings_by_part(canvas):
            i = int(canvas.index[place])
            shift = offsets_yx[i, ::-1] - (1, canvas.tops[place])
            exterior, *holes = (ring + shift for ring in rings)
            found.setdefault(i, []).append(Polygon(exterior, tuple(holes)))
        for i, polygons in found.items():
            parts[i] = tuple(polygons)
    return parts


def _rings_by_part(canvas: Canvas) -> Iterator[tuple[int, list[Int]]]:
    """Yield each part's crop (place in the canvas) and its rings, the exterior first."""
    _, labels = cv2.connectedComponents(canvas.pixels, connectivity=4, ltype=cv2.CV_32S)
    corners, starts, part_of = _trace(labels.astype(np.int32, copy=False))
    if not len(starts):
        return
    ends = np.append(starts[1:], len(corners))
    first_row = corners[starts, 1]
    crop_of = canvas.crop_of_rows(first_row)
    is_hole = _twice_areas(corners, starts) < 0
    # Rings come in the order of their topmost, leftmost corner: a part's exterior before its
    # holes, and parts from the top down.
    rings_of: dict[int, list[Int]] = {}
    place_of: dict[int, int] = {}
    for k in np.lexsort((np.arange(len(starts)), is_hole)).tolist():
        part = int(part_of[k])
        rings_of.setdefault(part, []).append(corners[starts[k] : ends[k]])
        place_of.setdefault(part, int(crop_of[k]))
    for part, rings in rings_of.items():
        yield place_of[part], rings


def _twice_areas(corners: Int, starts: Int) -> Int:
    """Return twice the signed areas of rings laid end to end; positive for exteriors."""
    following = np.arange(1, len(corners) + 1)
    following[np.append(starts[1:], len(corners)) - 1] = starts
    x, y = corners.T
    return np.add.reduceat(x * y[following] - x[following] * y, starts)


def _trace(labels: NDArray[np.int32]) -> tuple[Int, Int, Int]:
    """Walk around all parts with the part on the right-hand side.

    Args:
        labels: (H, W) int32, 4-connected parts; the outermost rows and columns are background.

    Returns:
        Corners (V, 2) int64 x, y of all rings; where each ring starts in them; each ring's part.
    """
    keys, part, following = _edges(labels)
    direction = keys % 4
    is_corner = np.zeros(len(keys), dtype=bool)
    is_corner[following] = direction[following] != direction
    # From every edge to the next edge that begins in a corner, by doubling the steps.
    while not is_corner[following].all():
        following = np.where(is_corner[following], following, following[following])
    order, starts = _walk(np.flatnonzero(is_corner), following)
    y, x = np.divmod(keys[order] // 4, labels.shape[1])
    return np.stack([x, y], axis=1), starts, part[order[starts]].astype(np.int64)


def _edges(labels: NDArray[np.int32]) -> tuple[Int, NDArray[np.int32], Int]:
    """Find all pixel edges between a part and the background.

    Returns:
        Keys 4 * (start vertex) + direction, rising; the part on the right; and the index of the
        edge that follows. Vertex y * W + x is the upper left corner of pixel (y, x).
    """
    height, width = labels.shape
    flat = labels.reshape(-1)
    exists = np.zeros((height, width, 4), dtype=bool)
    upper_left, upper_right = labels[:-1, :-1], labels[:-1, 1:]
    lower_left, lower_right = labels[1:, :-1], labels[1:, 1:]
    inner = exists[1:, 1:]
    inner[..., EAST] = (lower_right != 0) & (upper_right == 0)
    inner[..., SOUTH] = (lower_left != 0) & (lower_right == 0)
    inner[..., WEST] = (upper_left != 0) & (lower_left == 0)
    inner[..., NORTH] = (upper_right != 0) & (upper_left == 0)
    known = exists.reshape(-1)
    keys = np.flatnonzero(known)
    vertex, direction = np.divmod(keys, 4)
    # The pixel to the right of an edge that leaves the vertex, and the one to the right ahead.
    part = flat[vertex - np.array([0, 1, width + 1, width])[direction]]
    end = vertex + np.array([1, width, -1, -width])[direction]
    right, left = 4 * end + (direction + 1) % 4, 4 * end + (direction + 3) % 4
    straight = 4 * end + direction
    # Where two pixels of one part touch in a corner only, turning left keeps them in one ring and
    # cuts the background; two parts are kept apart by turning right.
    across = flat[end - np.array([width, 0, 1, width + 1])[direction]]
    is_same = across == part
    chosen = np.where(known[right] & ~(known[left] & is_same), right, left)
    chosen = np.where(known[straight], straight, chosen)
    return keys, part, np.searchsorted(keys, chosen)


def _walk(corners: Int, following: Int) -> tuple[Int, Int]:
    """Follow the edges that begin in corners; return them ring by ring, and where rings start."""
    step = following.tolist()
    seen = bytearray(len(step))
    order: list[int] = []
    starts: list[int] = []
    for first in corners.tolist():
        if seen[first]:
            continue
        starts.append(len(order))
        edge = first
        while not seen[edge]:
            seen[edge] = 1
            order.append(edge)
            edge = step[edge]
    return np.array(order, dtype=np.int64), np.array(starts, dtype=np.int64)

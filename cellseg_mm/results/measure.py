"""What each cell measures: area, place, shape, colour.

In: an InstanceSet and its image, or a function that reads regions of it. Out: one
:class:`CellFeatures`. Invariant: the numbers are those of scikit-image's ``regionprops``, computed
from runs and crops, so that 1000 cells cost milliseconds and no full-size mask exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core import rle
from cellseg_mm.core.arrays import Float
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.windows import CHUNK, boxes_and_areas
from cellseg_mm.data.pixel_size import Um
from cellseg_mm.results.polygons import stack_crops

# Rows y0..y1 and columns x0..x1 (half-open) -> (y1 - y0, x1 - x0, C).
RegionReader = Callable[[int, int, int, int], NDArray[Any]]

BLOCK_PX = 2048  # a block of an image with 3 channels is 12 MB


@dataclass(frozen=True, slots=True)
class CellFeatures:
    """Measures of N masks; of one without pixels all but ``areas`` and ``boxes_xyxy`` are NaN.

    Attributes:
        areas: (N,) int64, px.
        centroids_yx: (N, 2) float64, px; the first pixel's centre is at 0, as in scikit-image.
        boxes_xyxy: (N, 4) int64, tight and half-open, px; zeros without pixels.
        perimeters: (N,) float64, px.
        eccentricities: (N,) float64 in 0..1: 0 for a disc, towards 1 for a line.
        mean_intensities: (N, C) float64, mean of each channel over the mask; C = 0 without image.
    """

    areas: NDArray[np.int64]
    centroids_yx: Float
    boxes_xyxy: NDArray[np.int64]
    perimeters: Float
    eccentricities: Float
    mean_intensities: Float


def measure(
    instances: InstanceSet, image: NDArray[Any] | RegionReader | None = None
) -> CellFeatures:
    """Measure all masks.

    Args:
        instances: The cells.
        image: (H, W, C) or (H, W), or a function that reads regions of it, or None.

    Raises:
        ValueError: The image has another size than the instances'.
    """
    boxes, areas = boxes_and_areas(instances)
    read = None if image is None else _as_reader(image, instances.image_hw)
    n, n_channels = len(instances), 0 if read is None else read(0, 0, 1, 1).shape[-1]
    centroids, means = np.zeros((n, 2)), np.full((n, n_channels), np.nan)
    perimeters, eccentricities = np.zeros(n), np.zeros(n)
    # Neighbours together: a chunk reads its own part of the image only.
    block = (boxes[:, :2] + boxes[:, 2:]) // (2 * BLOCK_PX)
    order = np.lexsort((block[:, 0], block[:, 1]))
    for start in range(0, n, CHUNK):
        index = order[start : start + CHUNK]
        rles = [instances.rles[i] for i in index.tolist()]
        runs = rle.decode_runs(rles, instances.image_hw)
        crops, _ = rle.decode_crops(rles, instances.image_hw)
        _, centroids[index], eccentricities[index] = _moments(runs)
        perimeters[index] = _perimeters(crops)
        if read is not None:
            means[index] = _mean_intensities(crops, boxes[index], read, n_channels)
    perimeters[areas == 0] = np.nan
    return CellFeatures(areas, centroids, boxes, perimeters, eccentricities, means)


def in_um(features: CellFeatures, um_per_px: Um) -> Float:
    """Return area, x and y of the centroid, and perimeter in micrometres, (N, 4) float64.

    Centroids count from the image's corner. Where pixels are not square, the perimeter takes the
    mean of their sides.
    """
    height, width = um_per_px
    x = (features.centroids_yx[:, 1] + 0.5) * width
    y = (features.centroids_yx[:, 0] + 0.5) * height
    areas = np.where(features.areas > 0, features.areas * (height * width), np.nan)
    return np.stack([areas, x, y, features.perimeters * (height + width) / 2], axis=1)


def _as_reader(image: NDArray[Any] | RegionReader, image_hw: tuple[int, int]) -> RegionReader:
    if callable(image):
        return image
    if image.shape[:2] != image_hw:
        raise ValueError(f'image has shape {image.shape}, the instances are of {image_hw} px')
    pixels = image.reshape(*image_hw, -1)
    return lambda y0, x0, y1, x1: pixels[y0:y1, x0:x1]


def _moments(runs: rle.Runs) -> tuple[NDArray[np.int64], Float, Float]:
    """Return areas, centroids and eccentricities from sums over the pieces of columns.

    Eccentricity is that of the ellipse with the same second moments.
    """
    owner, column, top, bottom = rle.column_pieces(runs)
    n, areas = runs.n_masks, rle.areas_of(runs)
    # Sums are taken from the mask's own corner: far from the origin, squares would lose digits.
    corner = rle.boxes_of(runs)[:, :2].astype(np.int64)
    x = (column - corner[owner, 0]).astype(np.float64)
    a, b = top - corner[owner, 1], bottom - corner[owner, 1]
    rows = (b - a).astype(np.float64)
    sum_y = (a + b - 1) * rows / 2
    sum_yy = (b - 1) * b * (2 * b - 1) / 6 - (a - 1) * a * (2 * a - 1) / 6

    def total(values: Float) -> Float:
        return np.bincount(owner, weights=values, minlength=n).astype(np.float64)

    with np.errstate(invalid='ignore', divide='ignore'):
        cy, cx = total(sum_y) / areas, total(x * rows) / areas
        var_y = total(sum_yy) / areas - cy**2
        var_x = total(x * x * rows) / areas - cx**2
        cov = total(x * sum_y) / areas - cx * cy
        root = np.sqrt(((var_y - var_x) / 2) ** 2 + cov**2)
        middle = (var_y + var_x) / 2
        large, small = middle + root, np.maximum(middle - root, 0)
        eccentricities = np.where(large == 0, 0.0, np.sqrt(1 - small / large))
    eccentricities[areas == 0] = np.nan
    return areas, np.stack([cy + corner[:, 1], cx + corner[:, 0]], axis=1), eccentricities


def _perimeters(crops: list[NDArray[np.bool_]]) -> Float:
    """Return lengths of the line through the centres of border pixels.

    Source: K. Benkrid, D. Crookes, Design and FPGA implementation of a perimeter estimator, 2000,
    as in ``skimage.measure.perimeter`` with 4 neighbours.
    """
    lengths = np.zeros(50)
    lengths[[5, 7, 15, 17, 25, 27]] = 1
    lengths[[21, 33]] = np.sqrt(2)
    lengths[[13, 23]] = (1 + np.sqrt(2)) / 2
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    # 1 for the pixel, 2 for each neighbour beside it, 10 for each across a corner
    weights = np.array([[10, 2, 10], [2, 1, 2], [10, 2, 10]], dtype=np.float32)
    perimeters = np.zeros(len(crops))
    for canvas in stack_crops(crops):
        border = cv2.subtract(canvas.pixels, cv2.erode(canvas.pixels, cross))
        codes = cv2.filter2D(border, -1, weights, borderType=cv2.BORDER_CONSTANT)
        per_row = lengths[codes].sum(axis=1)
        perimeters[canvas.index] = np.add.reduceat(per_row, canvas.tops - 1)
    return perimeters


def _mean_intensities(
    crops: list[NDArray[np.bool_]],
    boxes_xyxy: NDArray[np.int64],
    read: RegionReader,
    n_channels: int,
) -> Float:
    """Average the image over each mask; regions are read block by block."""
    filled = np.array([crop.size > 0 for crop in crops], dtype=bool)
    means = np.full((len(crops), n_channels), np.nan)
    block = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) // (2 * BLOCK_PX)
    index = np.flatnonzero(filled)
    order = index[np.lexsort((block[index, 0], block[index, 1]))]
    changes = np.flatnonzero((np.diff(block[order], axis=0) != 0).any(axis=1)) + 1
    for group in np.split(order, changes):
        if not len(group):
            continue
        x0, y0 = boxes_xyxy[group, :2].min(axis=0).tolist()
        x1, y1 = boxes_xyxy[group, 2:].max(axis=0).tolist()
        region = read(y0, x0, y1, x1)
        for i in group.tolist():
            x, y, right, bottom = boxes_xyxy[i].tolist()
            values = region[y - y0 : bottom - y0, x - x0 : right - x0][crops[i]]
            means[i] = values.mean(axis=0, dtype=np.float64)
    return means

"""How well anchors fit boxes, exactly and without building a single anchor.

In: boxes at network scale and the anchors of each level. Out: each box's best IoU with any anchor.
Invariant: the numbers are those of comparing every box with every anchor of the whole grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.arrays import Float
from cellseg_mm.core.text_table import text_table

SIZE_EDGES_PX = (0, 8, 16, 32, 64, 128)  # sqrt of the box's area, at network scale


@dataclass(frozen=True, slots=True)
class AnchorLevel:
    """Anchors of one level of the feature pyramid.

    Attributes:
        boxes_xyxy: (A, 4) float64, the anchors at the first place of the grid, px.
        stride_xy: Step of the grid in px.
    """

    boxes_xyxy: Float
    stride_xy: tuple[float, float]


def best_ious(boxes_xyxy: Float, image_hw: tuple[int, int], levels: Sequence[AnchorLevel]) -> Float:
    """Return the largest IoU of each box with any anchor of any level.

    Along x and along y the overlap of two intervals never grows with the distance of their
    centres, and all anchors of one shape have one area. So the best place for a shape is the grid
    place nearest to the box in x and in y, and only that one is compared.

    Args:
        boxes_xyxy: (N, 4), px at network scale.
        image_hw: Padded height and width of the network's input; the grid ends there.
        levels: Anchors.

    Returns:
        (N,) float64 in 0..1.
    """
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    best = np.zeros(len(boxes))
    for level in levels:
        n_xy = [
            max(1, int(np.ceil(side / step)))
            for side, step in zip(image_hw[::-1], level.stride_xy, strict=True)
        ]
        for anchor in level.boxes_xyxy:
            overlap = np.ones(len(boxes))
            for axis in (0, 1):
                low, high = anchor[axis], anchor[axis + 2]
                step = level.stride_xy[axis]
                middle = (boxes[:, axis] + boxes[:, axis + 2]) / 2
                place = np.clip(np.rint((middle - (low + high) / 2) / step), 0, n_xy[axis] - 1)
                shift = place * step
                ends = np.minimum(boxes[:, axis + 2], high + shift)
                overlap *= np.maximum(0, ends - np.maximum(boxes[:, axis], low + shift))
            area = (anchor[2] - anchor[0]) * (anchor[3] - anchor[1])
            best = np.maximum(best, overlap / (areas + area - overlap))
    return best


@dataclass(frozen=True, slots=True)
class AnchorFit:
    """Best IoUs of many cells.

    Attributes:
        ious: (N,) best IoU with any anchor.
        class_ids: (N,) 0-based.
        sides_px: (N,) sqrt of the box's area at network scale.
    """

    ious: Float
    class_ids: NDArray[np.int64]
    sides_px: Float

    def share_below(self, iou: float) -> float:
        """Return the share of cells whose best IoU is below ``iou``; 0 without cells."""
        return float((self.ious < iou).mean()) if len(self.ious) else 0.0

    def table(self, class_names: Sequence[str], thresholds: Sequence[float]) -> str:
        """Return shares below each threshold as text: all, per class, per size."""
        rows = [('all', np.ones(len(self.ious), dtype=bool))]
        rows += [(name, self.class_ids == k) for k, name in enumerate(class_names)]
        edges = (*SIZE_EDGES_PX, np.inf)
        for low, high in itertools.pairwise(edges):
            name = f'{low:.0f} to {high:.0f} px' if np.isfinite(high) else f'from {low:.0f} px'
            rows.append((name, (self.sides_px >= low) & (self.sides_px < high)))
        cells = []
        for name, chosen in rows:
            ious = self.ious[chosen]
            if len(ious):
                shares = [f'{100 * (ious < thr).mean():.2f}%' for thr in thresholds]
                cells.append([name, str(len(ious)), f'{np.median(ious):.3f}', *shares])
        head = ['cells', 'number', 'median IoU', *(f'IoU < {thr:g}' for thr in thresholds)]
        return text_table(head, cells)

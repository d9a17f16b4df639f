"""What a mask head is trained on: the share of each cell of a box's grid that a mask covers.

In: a view of label layers and R boxes with the instance of each. Out: (R, h, w) shares in 0..1.
Invariant: only the pixels of the boxes are read, whatever the number of instances in the image.
"""

from __future__ import annotations

import numpy as np
import torch

from cellseg_mm.pipeline.layer_view import LayerView

# A window of 2048 x 2048 px at once, or 1024 of 64 x 64: bounds the memory.
MAX_WINDOW_PIXELS = 1 << 22


def roi_shares(
    view: LayerView,
    ids: torch.Tensor,
    layer_of: torch.Tensor,
    boxes_xyxy: torch.Tensor,
    out_hw: tuple[int, int],
) -> torch.Tensor:
    """Average each box's mask over an ``out_hw`` grid of cells, as RoIAlign does.

    RoIAlign's mean over bilinear samples is separable: row weights x mask x column weights. Boxes
    of similar size go through it together.

    Args:
        view: Label layers.
        ids: (R,) pixel value of the mask of each box.
        layer_of: (R,) int64, its layer.
        boxes_xyxy: (R, 4) floating px of the view.
        out_hw: Cells per box.

    Returns:
        (R, *out_hw) of the dtype of ``boxes_xyxy``, in 0..1. All on the device of the layers.
    """
    shares = boxes_xyxy.new_zeros((len(boxes_xyxy), *out_hw))
    sides = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).amax(dim=1).clamp(min=32)
    size_class = sides.log2().ceil().cpu().numpy()  # windows of up to 32, 64, 128, ... px
    sampler = _Sampler(view, boxes_xyxy.device)
    for k in np.unique(size_class).tolist():
        members = np.flatnonzero(size_class == k)
        per_chunk = max(1, MAX_WINDOW_PIXELS >> min(int(2 * k), 62))
        for first in range(0, len(members), per_chunk):
            chunk = torch.from_numpy(members[first : first + per_chunk]).to(boxes_xyxy.device)
            shares[chunk] = sampler.shares(ids[chunk], layer_of[chunk], boxes_xyxy[chunk], out_hw)
    return shares


class _Sampler:
    """A view's layers and axes as tensors of one device."""

    def __init__(self, view: LayerView, device: torch.device) -> None:
        array = view.source.array
        if isinstance(array, np.ndarray):
            # torch refuses negative strides and warns about read-only memory.
            array = torch.from_numpy(np.require(array, requirements=['C', 'W']))
        self.layers = array.contiguous()
        # Reversed by a flip: torch refuses negative strides.
        self.rows = torch.from_numpy(np.ascontiguousarray(view.rows)).to(device)
        self.columns = torch.from_numpy(np.ascontiguousarray(view.columns)).to(device)

    def shares(
        self,
        ids: torch.Tensor,
        layer_of: torch.Tensor,
        boxes_xyxy: torch.Tensor,
        out_hw: tuple[int, int],
    ) -> torch.Tensor:
        """Return (R, *out_hw) for boxes whose windows are of similar size."""
        _, height, width = self.layers.shape
        x1, y1, x2, y2 = boxes_xyxy.unbind(dim=1)
        y, y_weights, y_count = _axis_weights(y1, y2, out_hw[0], len(self.rows))  # (R, h, Y)
        x, x_weights, x_count = _axis_weights(x1, x2, out_hw[1], len(self.columns))  # (R, w, X)
        row, column = self.rows[y], self.columns[x]  # (R, Y), (R, X); -1 = background
        y_weights = y_weights * (row >= 0)[:, None]
        x_weights = x_weights * (column >= 0)[:, None]
        line = layer_of[:, None] * height + row.clamp(min=0)
        pixel = line[:, :, None] * width + column.clamp(min=0)[:, None, :]  # (R, Y, X)
        masks = (torch.take(self.layers, pixel) == ids[:, None, None]).to(y_weights.dtype)
        sums = y_weights @ masks @ x_weights.transpose(1, 2)  # (R, h, w)
        return sums / (y_count * x_count).clamp(min=1)[:, None, None]


def _axis_weights(
    low: torch.Tensor, high: torch.Tensor, n_cells: int, extent: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what each pixel of a window adds to each cell of one axis.

    Args:
        low: (R,) first edge of each box in px.
        high: (R,) last edge.
        n_cells: Cells along the axis.
        extent: Pixels of the image along the axis.

    Returns:
        at: (R, window) int64, the window's pixels, clipped to the image.
        weights: (R, n_cells, window) sums of bilinear weights, not divided by ``count``.
        count: (R,) samples per cell.

    Source: RoIAlign with ``aligned=True, sampling_ratio=0`` as in mmcv
    ``csrc/pytorch/cpu/roi_align.cpp``, Apache-2.0; positions are computed in its order so that
    ties fall the same way.
    """
    start, length = low - 0.5, (high - low).clamp(min=0)
    step = length / n_cells
    count = step.ceil()
    cell = torch.arange(n_cells, device=low.device, dtype=low.dtype)
    sample = torch.arange(max(int(count.max()), 1), device=low.device, dtype=low.dtype)
    corner = start[:, None] + cell * step[:, None]  # (R, n_cells)
    inner = (sample + 0.5) * step[:, None] / count.clamp(min=1)[:, None]  # (R, samples)
    at = corner[:, :, None] + inner[:, None, :]  # (R, n_cells, samples)
    valid = (at >= -1) & (at <= extent) & (sample < count[:, None])[:, None, :]

    at = at.clamp(0, extent - 1)
    lower = at.floor()
    fraction = at - lower
    first = start.floor().clamp(0, extent - 1).long()
    window = int((high.ceil().clamp(0, extent).long() - first).max().clamp(min=0)) + 2
    lower = (lower.long() - first[:, None, None]).clamp(0, window - 2)
    weights = low.new_zeros((len(low), n_cells, window))
    weights.scatter_add_(2, lower, (1 - fraction) * valid)
    weights.scatter_add_(2, lower + 1, fraction * valid)
    pixels = first[:, None] + torch.arange(window, device=low.device)
    return pixels.clamp(max=extent - 1), weights, count

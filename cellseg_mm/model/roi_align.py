"""NMS and RoIAlign in plain torch, with the signatures of mmcv's compiled ops.

In: the tensors that ``mmcv.ops`` hands to its extension module. Out: the same results on any
device, without a compiler. Invariant: every formula follows mmcv's C++ in its order of operations,
so sample positions and kept boxes are those of the compiled ops.

RoIAlign is linear in the features: an output bin is a weighted sum of pixels. Forward and backward
are therefore one sparse matrix and its transpose, and ``embedding_bag`` multiplies them by
features laid out as (pixel, channel). The weights are separable in y and x, which is what makes
them cheap to build.

Source: mmcv/ops/csrc/pytorch/cpu/{nms,roi_align}.cpp of onedl-mmcv 2.3.6, Apache-2.0 (semantics).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# Entries of the sparse RoIAlign matrix built at once: 4 Mi of int64 + float32 are 48 MiB.
ROI_ENTRIES = 1 << 22
# What mmcv returns for a bin without samples in max mode.
MAX_POOL_EMPTY = -10000.0
# Where its "largest sample" is: outside of every map. mmcv writes -1, which a sample may have, too
# (it counts as row 0), and then forgets the gradient of that sample.
NOWHERE = -2.0


@dataclass(frozen=True, slots=True)
class _Axis:
    """One axis of n RoIs that share a sampling grid.

    Attributes:
        start: (n,) first edge in feature pixels.
        size: (n,) length in feature pixels.
        bins: Output bins along this axis.
        grid: Samples per bin along this axis, at least 1.
        extent: Feature pixels along this axis.
    """

    start: Tensor
    size: Tensor
    bins: int
    grid: int
    extent: int

    def samples(self) -> Tensor:
        """Return the sample positions, (n, bins, grid), in mmcv's order of operations."""
        bin_size = (self.size / self.bins)[:, None, None]
        number = torch.arange(self.bins, device=bin_size.device, dtype=bin_size.dtype)
        within = torch.arange(self.grid, device=bin_size.device, dtype=bin_size.dtype) + 0.5
        first = self.start[:, None, None] + number[:, None] * bin_size
        return first + within * bin_size / self.grid

    def neighbours(self) -> tuple[Tensor, Tensor]:
        """Return both pixels of every sample, (n, bins, grid, 2) int64, and their weights."""
        position = self.samples()
        inside = (position >= -1) & (position <= self.extent)
        position = torch.where(inside, position, 0).clamp_(0, self.extent - 1)
        low = position.long()
        share = position - low
        pixels = torch.stack((low, (low + 1).clamp_(max=self.extent - 1)), dim=-1)
        return pixels, torch.stack((1 - share, share), dim=-1) * inside[..., None]

    def merged(self) -> tuple[Tensor, Tensor]:
        """Return (n, bins, K) pixels and weights of the mean over a bin's samples.

        Neighbouring samples share pixels: an adaptive grid of g samples touches g + 1 pixels, not
        2 g, so adding up their weights first quarters the work of dense grids in two dimensions.
        """
        pixels, weights = self.neighbours()
        pixels, weights = pixels.flatten(2), weights.flatten(2) / self.grid
        first = pixels.amin(dim=2, keepdim=True)
        shift = pixels - first
        n_pixels = int(shift.max()) + 1
        if n_pixels >= pixels.shape[2]:
            return pixels, weights
        summed = weights.new_zeros((*weights.shape[:2], n_pixels)).scatter_add_(2, shift, weights)
        span = torch.arange(n_pixels, device=pixels.device)
        return (first + span).clamp_(max=self.extent - 1), summed


@dataclass(frozen=True, slots=True)
class _Rois:
    """RoIs on one feature map, in feature pixels.

    Attributes:
        image: (N,) int64, index of the image in the batch.
        start_yx: (N, 2) first edges.
        size_yx: (N, 2) lengths.
        grid_yx: (N, 2) int64, samples per bin; not positive means a bin without samples.
        bins_hw: Output size.
        shape: (B, C, H, W) of the features.
    """

    image: Tensor
    start_yx: Tensor
    size_yx: Tensor
    grid_yx: Tensor
    bins_hw: tuple[int, int]
    shape: tuple[int, int, int, int]

    def groups(self) -> Iterator[tuple[Tensor, _Axis, _Axis]]:
        """Yield (index, y axis, x axis) of RoIs that share a grid, in pieces that fit in memory."""
        filled = (self.grid_yx > 0).all(dim=1).nonzero().flatten()
        pairs, which = torch.unique(self.grid_yx[filled], dim=0, return_inverse=True)
        for number, (grid_y, grid_x) in enumerate(pairs.tolist()):
            members = filled[which == number]
            per_roi = self.bins_hw[0] * self.bins_hw[1] * 4 * grid_y * grid_x
            for index in members.split(max(1, ROI_ENTRIES // per_roi)):
                yield index, self._axis(index, 0, grid_y), self._axis(index, 1, grid_x)

    def _axis(self, index: Tensor, axis: int, grid: int) -> _Axis:
        start, size = self.start_yx[index, axis], self.size_yx[index, axis]
        return _Axis(start, size, self.bins_hw[axis], grid, self.shape[2 + axis])

    def matrix(self, index: Tensor, y: _Axis, x: _Axis) -> tuple[Tensor, Tensor]:
        """Return (n * bins, K) pixel numbers in the batch, int64, and their weights."""
        rows, row_weights = y.merged()  # (n, P, Ky)
        columns, column_weights = x.merged()  # (n, Q, Kx)
        height, width = self.shape[2:]
        rows = (rows + (self.image[index] * height)[:, None, None]) * width
        pixels = rows[:, :, None, :, None] + columns[:, None, :, None, :]  # (n, P, Q, Ky, Kx)
        weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
        n_bags = len(index) * y.bins * x.bins
        return pixels.reshape(n_bags, -1), weights.reshape(n_bags, -1)


@dataclass(frozen=True, slots=True)
class RoiAlignOptions:
    """The numbers and flags that ``mmcv.ops`` passes, under its names.

    Attributes:
        aligned_height: Output bins along y.
        aligned_width: Output bins along x.
        spatial_scale: Feature pixels per image pixel.
        sampling_ratio: Samples per bin and axis; 0 = as many as the bin has feature pixels.
        pool_mode: 0 maximum, 1 mean of a bin's samples.
        aligned: Pixel centres are at +0.5; also, sizes below one feature pixel stay as they are.
    """

    aligned_height: int
    aligned_width: int
    spatial_scale: float
    sampling_ratio: int
    pool_mode: int
    aligned: bool

    def read(self, rois: Tensor, shape: torch.Size, dtype: torch.dtype) -> _Rois:
        """Turn (N, 5) image-pixel RoIs into feature pixels, as mmcv's C++ does."""
        # mmcv passes the scale as a C float, also when the features are double.
        scale = float(torch.tensor(self.spatial_scale, dtype=torch.float32))
        edges = rois[:, 1:].to(dtype) * scale - (0.5 if self.aligned else 0.0)
        start_yx, end_yx = edges[:, [1, 0]], edges[:, [3, 2]]
        size_yx = end_yx - start_yx
        if not self.aligned:
            size_yx = size_yx.clamp(min=1)
        bins_hw = (self.aligned_height, self.aligned_width)
        if self.sampling_ratio > 0:
            grid = torch.full_like(size_yx, self.sampling_ratio)
        else:
            bins = torch.tensor(bins_hw, device=rois.device, dtype=dtype)
            grid = (size_yx / bins).float().ceil()  # ceilf of a float also for doubles
        grid = torch.where(torch.isfinite(edges).all(dim=1, keepdim=True), grid, 0).long()
        return _Rois(rois[:, 0].long(), start_yx, size_yx, grid, bins_hw, tuple(shape))


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the precision to compute in: half types would round positions to whole pixels."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@torch.no_grad()
def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    **options: float,
) -> None:
    """Fill ``output`` with the RoIs' features, resampled to a fixed size.

    Args:
        input: (B, C, H, W) features, floating point.
        rois: (N, 5) image index and xyxy in image px.
        output: (N, C, P, Q), zeros; filled.
        argmax_y: (N, C, P, Q), filled in max mode with the y of the largest sample.
        argmax_x: The same for x.
        options: The fields of :class:`RoiAlignOptions`.
    """
    setting = RoiAlignOptions(**options)
    dtype = _working_dtype(input.dtype)
    read = setting.read(rois, input.shape, dtype)
    features = input.permute(0, 2, 3, 1).reshape(-1, input.shape[1]).to(dtype)  # (B H W, C)
    if setting.pool_mode == 0:
        for target, empty in ((output, MAX_POOL_EMPTY), (argmax_y, NOWHERE), (argmax_x, NOWHERE)):
            target.fill_(empty)
        for index, y, x in read.groups():
            found = _largest_samples(features, read, index, y, x)
            for target, values in zip((output, argmax_y, argmax_x), found, strict=True):
                target[index] = values.to(target.dtype)
        return
    for index, y, x in read.groups():
        pixels, weights = read.matrix(index, y, x)
        pooled = _weighted_sums(features, pixels, weights)
        pooled = pooled.view(len(index), y.bins, x.bins, -1).permute(0, 3, 1, 2)
        output[index] = pooled.to(output.dtype)


def _weighted_sums(features: Tensor, pixels: Tensor, weights: Tensor) -> Tensor:
    """Multiply a sparse matrix, (R, K) pixels and weights, by (S, C) features to (R, C)."""
    return functional.embedding_bag(pixels, features, per_sample_weights=weights, mode='sum')


def _largest_samples(
    features: Tensor, rois: _Rois, index: Tensor, y: _Axis, x: _Axis
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest sample of every bin and channel and its y and x, (n, C, P, Q) each."""
    height, width = rois.shape[2:]
    rows, row_weights = y.neighbours()  # (n, P, g, 2)
    columns, column_weights = x.neighbours()
    rows = (rows + (rois.image[index] * height)[:, None, None, None]) * width
    # (n, P, Q, gy, gx, 2, 2)
    pixels = rows[:, :, None, :, None, :, None] + columns[:, None, :, None, :, None, :]
    weights = (
        row_weights[:, :, None, :, None, :, None] * column_weights[:, None, :, None, :, None, :]
    )
    values = _weighted_sums(features, pixels.reshape(-1, 4), weights.reshape(-1, 4))
    values = values.view(len(index), y.bins, x.bins, y.grid * x.grid, -1)
    # The first of equal samples, as in mmcv: argmax alone does not promise which.
    best = values.amax(dim=3, keepdim=True)
    which = (values == best).to(torch.uint8).argmax(dim=3)  # (n, P, Q, C)
    every = torch.arange(len(index), device=which.device)[:, None, None, None]
    bin_y = torch.arange(y.bins, device=which.device)[:, None, None]
    bin_x = torch.arange(x.bins, device=which.device)[:, None]
    at_y = y.samples()[every, bin_y, which // x.grid]
    at_x = x.samples()[every, bin_x, which % x.grid]
    return tuple(part.permute(0, 3, 1, 2) for part in (best.squeeze(3), at_y, at_x))


@torch.no_grad()
def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    **options: float,
) -> None:
    """Add the gradient of :func:`roi_align_forward` to ``grad_input``, (B, C, H, W).

    ``grad_output`` is (N, C, P, Q); the others are as in the forward pass.
    """
    setting = RoiAlignOptions(**options)
    dtype = _working_dtype(grad_output.dtype)
    if setting.pool_mode == 0:
        _scatter_largest(grad_output.to(dtype), rois, argmax_y, argmax_x, grad_input)
        return
    read = setting.read(rois, grad_input.shape, dtype)
    n_channels, (height, width) = grad_input.shape[1], grad_input.shape[2:]
    grads = grad_output.permute(0, 2, 3, 1).reshape(-1, n_channels).to(dtype)  # (N P Q, C)
    for index, pixels, weights in _joined(read):
        summed = _transposed_sums(grads, index, pixels, weights, len(grad_input) * height * width)
        summed = summed.view(len(grad_input), height, width, n_channels).permute(0, 3, 1, 2)
        grad_input.add_(summed)


def _joined(rois: _Rois) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (bag, pixel, weight) of the sparse matrix, (E,) each, in few large pieces.

    Every piece costs one pass over the whole feature map, so small groups are put together.
    """
    n_bins = rois.bins_hw[0] * rois.bins_hw[1]
    within = torch.arange(n_bins, device=rois.image.device)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    n_entries = 0
    for index, y, x in rois.groups():
        pixels, weights = rois.matrix(index, y, x)
        bags = (index[:, None] * n_bins + within).flatten()[:, None].expand_as(pixels)
        if n_entries and n_entries + pixels.numel() > ROI_ENTRIES:
            yield tuple(torch.cat(part) for part in zip(*parts, strict=True))
            parts, n_entries = [], 0
        parts.append((bags.flatten(), pixels.flatten(), weights.flatten()))
        n_entries += pixels.numel()
    if parts:
        yield tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _transposed_sums(
    grads: Tensor, bags: Tensor, pixels: Tensor, weights: Tensor, n_pixels: int
) -> Tensor:
    """Multiply the transposed sparse matrix by (R, C) gradients to (n_pixels, C).

    Sorting by pixel makes every pixel a bag, so that no two threads add to one place and the sums
    have a fixed order.
    """
    order = torch.argsort(pixels, stable=True)
    counts = torch.bincount(pixels, minlength=n_pixels)
    return functional.embedding_bag(
        bags[order],
        grads,
        offsets=counts.cumsum(0) - counts,
        per_sample_weights=weights[order],
        mode='sum',
    )


def _scatter_largest(
    grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor
) -> None:
    """Send each bin's gradient to the four pixels around its largest sample."""
    n_channels, height, width = grad_input.shape[1:]
    y, x = argmax_y.to(grad_output.dtype), argmax_x.to(grad_output.dtype)
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    planes = rois[:, 0].long()[:, None] * n_channels + torch.arange(n_channels, device=rois.device)
    total = grad_output.new_zeros(grad_input.numel())
    for row, row_weight in _two_pixels(y, height, inside):
        for column, column_weight in _two_pixels(x, width, inside):
            place = (planes[:, :, None, None] * height + row) * width + column
            total.index_add_(
                0, place.flatten(), (grad_output * row_weight * column_weight).flatten()
            )
    grad_input.add_(total.view(grad_input.shape))


def _two_pixels(position: Tensor, extent: int, inside: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return both neighbours of a position on one axis and their weights, zero outside."""
    position = torch.where(inside, position, 0).clamp(0, extent - 1)
    low = position.long()
    share = position - low
    return [(low, (1 - share) * inside), ((low + 1).clamp(max=extent - 1), share * inside)]


def torchvision_roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    **options: float,
) -> None:
    """Do what :func:`roi_align_forward` does with torchvision's op, which only averages."""
    setting = RoiAlignOptions(**options)
    if setting.pool_mode == 0:
        roi_align_forward(input, rois, output, argmax_y, argmax_x, **options)
        return
    size = (setting.spatial_scale, setting.aligned_height, setting.aligned_width)
    how = (setting.sampling_ratio, setting.aligned)
    # torchvision computes positions in the features' type: in half, a bin may be pixels off
    features = input.to(torch.promote_types(input.dtype, torch.float32))
    output.copy_(torch.ops.torchvision.roi_align(features, rois.to(features.dtype), *size, *how))


def torchvision_roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    **options: float,
) -> None:
    """Do what :func:`roi_align_backward` does with torchvision's compiled op."""
    setting = RoiAlignOptions(**options)
    if setting.pool_mode == 0:
        roi_align_backward(grad_output, rois, argmax_y, argmax_x, grad_input, **options)
        return
    size = (setting.spatial_scale, setting.aligned_height, setting.aligned_width)
    how = (setting.sampling_ratio, setting.aligned)
    grad = grad_output.to(torch.promote_types(grad_output.dtype, torch.float32))
    grad_input.add_(
        torch.ops.torchvision._roi_align_backward(
            grad, rois.to(grad.dtype), *size, *grad_input.shape, *how
        )
    )

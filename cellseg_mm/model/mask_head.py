"""Mask head whose test path ends in RLE instead of N full-size masks.

In: boxes and S x S mask logits of one image. Out: COCO RLE of the pasted, thresholded masks, the
same pixels as ``FCNMaskHead``. Invariant: memory follows the number of runs plus one batch of at
most ``MAX_PIXELS`` pixels, never the image's size times the number of instances.

Pixels equal MMDetection's because the float32 formula of every pixel is the same: its centre in
the box's frame, through ``grid_sample``. What differs is only which pixels are looked at, and all
others are background in both. The one case that is not equal is a box that has a NaN or an
infinity: it gets an empty mask here, where MMDetection fails or fills a strip of the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.task_modules.samplers import SamplingResult
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from numpy.typing import NDArray
from torch import Tensor

from cellseg_mm.core import rle
from cellseg_mm.core.arrays import Int, ranges_of
from cellseg_mm.core.errors import ConfigError

# About 13 bytes per pixel live at once. 2^18 keeps a batch in a CPU's cache; a GPU wants more work.
MAX_PIXELS = {'cpu': 1 << 18}
MAX_PIXELS_ELSEWHERE = 1 << 24
# A coordinate that grid_sample pads with zero, for pixels that a batch has but a crop has not.
OUTSIDE = -9.0


@MODELS.register_module()
class CellMaskHead(FCNMaskHead):
    """``FCNMaskHead`` that predicts COCO RLE, and the mask probabilities on request.

    The instances of an image get ``masks``: a list of N dicts ``size`` [height, width] and
    ``counts`` (bytes), which ``CocoMetric`` takes as they are. Weights and training are those of
    ``FCNMaskHead``. Both switches may also stand in ``test_cfg.rcnn``, which then wins.

    Args:
        rle_masks: False gives MMDetection's (N, H, W) Boolean tensor, for its visualiser and for
            ``DumpDetResults``, which cannot read RLE; see also ``detections.to_stock_masks``.
        keep_mask_probs: Add ``mask_probs`` (N, S, S) float16, the probabilities of the predicted
            class inside ``mask_boxes`` (N, 4) float32 xyxy px, the box before anything moves it.

    Attributes:
        frame: The masks' grid covers the box made larger by this, about its centre; set by
            ``CellRoIHead``, which pools the features there.
    """

    frame: float = 1.0

    def __init__(
        self, *args: object, rle_masks: bool = True, keep_mask_probs: bool = False, **kwargs: object
    ) -> None:
        super().__init__(*args, **kwargs)
        self.rle_masks = rle_masks
        self.keep_mask_probs = keep_mask_probs

    def get_targets(
        self,
        sampling_results: list[SamplingResult],
        batch_gt_instances: list[InstanceData],
        rcnn_train_cfg: ConfigDict,
    ) -> Tensor:
        """Return the mask of each positive sample in its frame, (R, S, S) float32."""
        if self.frame == 1:
            return super().get_targets(sampling_results, batch_gt_instances, rcnn_train_cfg)
        size = rcnn_train_cfg.mask_size
        targets = []
        for sampled, cells in zip(sampling_results, batch_gt_instances, strict=True):
            boxes = enlarged(sampled.pos_priors.detach(), self.frame)
            found = cells.masks.crop_and_resize(
                boxes.cpu().numpy(),
                (size, size) if isinstance(size, int) else tuple(size),
                sampled.pos_assigned_gt_inds.cpu().numpy(),
                device=boxes.device,
                binarize=not rcnn_train_cfg.get('soft_mask_target', False),
            )
            targets.append(torch.from_numpy(found.to_ndarray()).float().to(boxes.device))
        return torch.cat(targets)

    def predict_by_feat(
        self,
        mask_preds: Sequence[Tensor],
        results_list: list[InstanceData],
        batch_img_metas: list[dict],
        rcnn_test_cfg: ConfigDict,
        rescale: bool = False,
        activate_map: bool = False,
    ) -> list[InstanceData]:
        """Add masks to the detections of a batch; see ``FCNMaskHead.predict_by_feat``.

        Raises:
            ConfigError: ``mask_thr_binary`` is not above 0, which has no meaning for RLE; or masks
                have a frame of their own and are wanted as MMDetection's tensor.
        """
        keep_probs = rcnn_test_cfg.get('keep_mask_probs', self.keep_mask_probs)
        as_rle = rcnn_test_cfg.get('rle_masks', self.rle_masks)
        for preds, results, img_meta in zip(mask_preds, results_list, batch_img_metas, strict=True):
            probs = self._probs_of_label(preds, results, activate_map)
            if as_rle:
                # MMDetection divides the boxes in place here too: the box head left it to us.
                image_hw = _image_hw(results.bboxes, img_meta, rescale)
                results.masks = encode_masks(
                    probs, self._frames(results), image_hw, threshold=rcnn_test_cfg.mask_thr_binary
                )
            elif self.frame != 1:
                raise ConfigError(
                    "rle_masks=False: MMDetection's masks end at the box, these reach "
                    f'{self.frame} times as far; expected model.roi_head.mask_frame=1; leave out '
                    'rle_masks=False'
                )
            else:
                super().predict_by_feat(
                    [preds], [results], [img_meta], rcnn_test_cfg, rescale, activate_map
                )
            if keep_probs:
                results.mask_probs = probs.to(torch.float16)
                results.mask_boxes = self._frames(results).clone()
        return results_list

    def _frames(self, results: InstanceData) -> Tensor:
        return results.bboxes if self.frame == 1 else enlarged(results.bboxes, self.frame)

    def _probs_of_label(
        self, mask_preds: Tensor, results: InstanceData, activate_map: bool
    ) -> Tensor:
        """Return the probabilities of each instance's class, (N, S, S)."""
        if activate_map:
            mask_preds = torch.as_tensor(mask_preds).to(results.bboxes)
        else:
            # Before choosing the class, as MMDetection: the vectorised sigmoid's last bit may
            # depend on where a number lies in its tensor.
            mask_preds = mask_preds.sigmoid()
        if self.class_agnostic:
            return mask_preds[:, 0]
        return mask_preds[torch.arange(len(mask_preds), device=mask_preds.device), results.labels]


def enlarged(boxes_xyxy: Tensor, factor: float) -> Tensor:
    """Return (N, 4) boxes ``factor`` times as wide and high about the same centres."""
    low, high = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    margin = (high - low) * ((factor - 1) / 2)
    return torch.cat([low - margin, high + margin], dim=1)


def _image_hw(boxes_xyxy: Tensor, img_meta: dict, rescale: bool) -> tuple[int, int]:
    """Return the size of the image to paste into, and bring the boxes there, in place."""
    height, width = img_meta['ori_shape'][:2]
    scale_wh = boxes_xyxy.new_tensor(img_meta['scale_factor'])
    if rescale:
        boxes_xyxy /= scale_wh.repeat((1, 2))
        return int(height), int(width)
    w_scale, h_scale = scale_wh.tolist()
    return int(np.round(height * h_scale)), int(np.round(width * w_scale))


def encode_masks(
    mask_probs: Tensor, boxes_xyxy: Tensor, image_hw: tuple[int, int], *, threshold: float
) -> list[dict]:
    """Paste mask probabilities into their boxes and encode them; see :func:`paste_runs`.

    Returns:
        N dicts, ``size`` [height, width] and ``counts`` (bytes).
    """
    runs = paste_runs(mask_probs, boxes_xyxy, image_hw, threshold=threshold)
    return rle.coco_dicts(rle.encode_runs(runs), image_hw)


@torch.no_grad()
def paste_runs(
    mask_probs: Tensor,
    boxes_xyxy: Tensor,
    image_hw: tuple[int, int],
    *,
    threshold: float = 0.5,
    whole_grid: bool | None = None,
    max_pixels: int | None = None,
) -> rle.Runs:
    """Paste mask probabilities into their boxes, keep pixels of at least ``threshold``, find runs.

    Args:
        mask_probs: (N, S, S) floats in 0..1.
        boxes_xyxy: (N, 4) floats, px of the image. May leave it, be empty or inverted.
        image_hw: Height and width in px.
        threshold: Above 0.
        whole_grid: MMDetection looks at the whole image for each instance on a GPU, and on a CPU
            only at the box and 1 to 2 px around it. The two differ for thresholds below 0.5 on
            boxes beyond about 2 S px, and for boxes without width or height. None does as
            MMDetection does on the device of ``boxes_xyxy``.
        max_pixels: Pixels per batch; None takes the device's default.

    Raises:
        ConfigError: ``threshold`` is not above 0.

    Source: the formula is ``_do_paste_mask`` of MMDetection 3.x (Apache-2.0), after detectron2.
    """
    if not threshold > 0:
        raise ConfigError(
            f'test_cfg.rcnn.mask_thr_binary: is {threshold}; masks as RLE need a number above 0; '
            "set it (0.5 is usual), or set rle_masks=False for MMDetection's heat maps."
        )
    device = boxes_xyxy.device
    if whole_grid is None:
        whole_grid = device.type != 'cpu'
    if max_pixels is None:
        max_pixels = MAX_PIXELS.get(device.type, MAX_PIXELS_ELSEWHERE)
    boxes = boxes_xyxy.detach().to(torch.float32)  # numpy has no bfloat16
    margin = 2 * mask_probs.shape[-1] if whole_grid else None
    found = [np.empty((0, 3), dtype=np.int64)]
    for batch in _batches(_pieces(boxes.cpu().numpy(), image_hw, margin, max_pixels), max_pixels):
        filled = _sample(mask_probs, boxes, batch) >= threshold
        found.append(_runs_of_batch(filled, batch, image_hw[0]))
    starts, ends, owner = np.concatenate(found).T
    return rle.runs_from_pieces(starts, ends, owner, len(boxes), image_hw)


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Rectangles of the image to look at: whole crops, or vertical bands of large ones.

    Attributes:
        owner: (P,) int64, index of the instance.
        low_yx: (P, 2) int64, first row and column.
        size_hw: (P, 2) int64, at least 1.
    """

    owner: Int
    low_yx: Int
    size_hw: Int

    def __getitem__(self, index: Int) -> _Pieces:
        return _Pieces(self.owner[index], self.low_yx[index], self.size_hw[index])


def _pieces(
    boxes: NDArray[np.float32], image_hw: tuple[int, int], margin: int | None, max_pixels: int
) -> _Pieces:
    low, high = _extent(boxes, image_hw, margin)
    size = high - low
    owner = np.flatnonzero((size > 0).all(axis=1) & np.isfinite(boxes).all(axis=1))
    low, size = low[owner], size[owner]
    band_w = np.maximum(max_pixels // (size[:, 0] + 1), 1)
    n_bands = -(-size[:, 1] // band_w)
    source = np.repeat(np.arange(len(owner)), n_bands)
    skipped = ranges_of(n_bands) * band_w[source]
    low_yx = low[source] + np.stack([np.zeros_like(skipped), skipped], axis=1)
    width = np.minimum(band_w[source], size[source, 1] - skipped)
    return _Pieces(owner[source], low_yx, np.stack([size[source, 0], width], axis=1))


def _extent(
    boxes: NDArray[np.float32], image_hw: tuple[int, int], margin: int | None
) -> tuple[Int, Int]:
    """Return the first and one past the last pixel to look at, two (N, 2) int64 arrays of y, x.

    Without ``margin`` what MMDetection looks at on a CPU. With it, every pixel of the image that
    may be foreground: a mask fades to zero 1 / ``margin`` of the box's side beyond the box, and a
    box without width repeats its middle column over the whole image (the division gives infinity).
    """
    start, end = boxes[:, [1, 0]], boxes[:, [3, 2]]
    if margin is None:
        low, high = np.floor(start) - 1, np.ceil(end) + 1
    else:
        start, end = start.astype(np.float64), end.astype(np.float64)
        side = np.abs(end - start)
        low = np.floor(np.minimum(start, end) - side / margin) - 2
        high = np.ceil(np.maximum(start, end) + side / margin) + 2
        is_line = side < 1e-30  # float32 overflows when it divides by less
        low, high = np.where(is_line, 0, low), np.where(is_line, image_hw, high)
    with np.errstate(invalid='ignore'):  # boxes that are not finite get no pieces
        low = np.clip(np.nan_to_num(low), 0, image_hw).astype(np.int64)
        high = np.clip(np.nan_to_num(high), 0, image_hw).astype(np.int64)
    return low, high


def _batches(pieces: _Pieces, max_pixels: int) -> Iterator[_Pieces]:
    """Yield pieces of similar size together, ``max_pixels`` at most unless one alone has more."""
    padded = _round_up(pieces.size_hw)
    order = np.lexsort((padded[:, 1], padded[:, 0]))
    changes = np.flatnonzero((np.diff(padded[order], axis=0) != 0).any(axis=1)) + 1
    for group in np.split(order, changes):
        if len(group):
            height, width = padded[group[0]].tolist()
            n = max(max_pixels // ((height + 1) * width), 1)
            for i in range(0, len(group), n):
                yield pieces[group[i : i + n]]


def _round_up(size: Int) -> Int:
    """Round up to 16 px or an eighth of the next power of two: sizes that meet share a batch.

    16 px: below, the fixed cost of a batch (0.3 ms) exceeds that of the padding, measured on
    cells of 10 to 50 px.
    """
    octave = np.ceil(np.log2(size)).astype(np.int64)
    step = np.left_shift(1, np.maximum(octave - 3, 4))
    return -(-size // step) * step


def _sample(mask_probs: Tensor, boxes: Tensor, batch: _Pieces) -> Tensor:
    """Return interpolated probabilities, (B, W, 1 + H) float32: columns of rows, row 0 empty.

    The empty row keeps runs from crossing columns, and so do pixels of the padding.
    """
    device = boxes.device
    owner = torch.from_numpy(batch.owner).to(device)
    x0, y0, x1, y1 = boxes[owner].unbind(dim=1)
    low = torch.from_numpy(batch.low_yx).to(device)
    size = torch.from_numpy(batch.size_hw).to(device)
    height, width = batch.size_hw.max(axis=0).tolist()
    rows = torch.arange(-1, height, device=device)  # (1 + H,)
    columns = torch.arange(width, device=device)  # (W,)
    grid_y = _box_frame(rows, low[:, :1], size[:, :1], y0[:, None], y1[:, None])
    grid_x = _box_frame(columns, low[:, 1:], size[:, 1:], x0[:, None], x1[:, None])
    shape = (len(owner), width, height + 1)
    grid = torch.empty((*shape, 2), device=device)
    grid[..., 0] = grid_x[:, :, None]
    grid[..., 1] = grid_y[:, None, :]
    masks = mask_probs[owner][:, None].to(torch.float32)
    return F.grid_sample(masks, grid, align_corners=False)[:, 0]


def _box_frame(index: Tensor, low: Tensor, size: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Return pixel centres in the box's frame of -1..1, (B, L) float32; OUTSIDE off the crop."""
    centre = (low + index).to(torch.float32) + 0.5
    at = (centre - start) / (end - start) * 2 - 1
    at = torch.where(torch.isinf(at), 0.0, at)
    return torch.where((index >= 0) & (index < size), at, OUTSIDE)


def _runs_of_batch(filled: Tensor, batch: _Pieces, image_height: int) -> Int:
    """Return (R, 3) int64: first pixel, one past the last, instance, of all runs of a batch."""
    _, width, rows = filled.shape
    flat = filled.reshape(-1)
    edges = torch.nonzero(flat[1:] != flat[:-1]).reshape(-1).cpu().numpy() + 1
    if len(edges) % 2:  # the last pixel of all is foreground
        edges = np.append(edges, flat.numel())
    first, last = edges[0::2], edges[1::2]
    piece, within = np.divmod(first, width * rows)
    column, row = np.divmod(within, rows)
    low = batch.low_yx[piece]
    starts = (low[:, 1] + column) * image_height + low[:, 0] + row - 1
    return np.stack([starts, starts + (last - first), batch.owner[piece]], axis=1)

"""Matching of anchors to cells without a loop over the cells of an image.

In: IoUs of cells and anchors. Out: exactly what MMDetection's ``MaxIoUAssigner`` gives. Invariant:
no device is waited for once per cell, which was the longest part of a GPU's RPN.

``Fp32RPNHead`` takes it where a recipe names ``MaxIoUAssigner``, so that recipes, and what was
trained by them, stay as they are.
"""

from __future__ import annotations

import copy

import torch
from mmdet.models.task_modules.assigners import AssignResult, MaxIoUAssigner
from torch import Tensor


class CellMaxIoUAssigner(MaxIoUAssigner):
    """``MaxIoUAssigner`` whose low-quality matches are found for all objects at once."""

    def assign_wrt_overlaps(self, overlaps: Tensor, gt_labels: Tensor) -> AssignResult:
        """Assign each anchor to an object, to the background (0) or to nothing (-1).

        Args:
            overlaps: (objects, anchors) IoU.
            gt_labels: (objects,) int64.

        Returns:
            MMDetection's result. An anchor that is the best of several objects belongs to the last.
        """
        # a CPU waits for nothing, and its loop is a quarter faster
        if overlaps.device.type == 'cpu':
            return super().assign_wrt_overlaps(overlaps, gt_labels)
        return self.assign_at_once(overlaps, gt_labels)

    def assign_at_once(self, overlaps: Tensor, gt_labels: Tensor) -> AssignResult:
        """Do what ``assign_wrt_overlaps`` does, on any device, without a loop."""
        if not (self.match_low_quality and self.gt_max_assign_all) or not overlaps.numel():
            return super().assign_wrt_overlaps(overlaps, gt_labels)
        plain = copy.copy(self)
        plain.match_low_quality = False
        result = MaxIoUAssigner.assign_wrt_overlaps(plain, overlaps, gt_labels)
        best = overlaps.amax(dim=1, keepdim=True)
        is_best = (overlaps == best) & (best >= self.min_pos_iou)
        objects, anchors = is_best.nonzero(as_tuple=True)
        last = torch.zeros_like(result.gt_inds).scatter_reduce_(0, anchors, objects + 1, 'amax')
        is_matched = last > 0
        result.gt_inds = torch.where(is_matched, last, result.gt_inds)
        labels = gt_labels[(last - 1).clamp(min=0)]
        result.labels = torch.where(is_matched, labels, result.labels)
        return result

"""The parts of a two-stage detector that keep boxes in float32 under mixed precision.

In: features or predictions of any floating type. Out: what MMDetection's parts give, from boxes
that were never rounded. Invariant: in float32 both are exactly MMDetection's; neither has weights,
so checkpoints fit either.

MMDetection (3.x) rounds boxes twice to the type of the features: anchors when the RPN's predictions
become proposals (``dtype=cls_scores[0].dtype`` in ``BaseDenseHead.predict_by_feat``), and the boxes
whose features are pooled (``rois.type_as(feats[0])`` in ``SingleRoIExtractor.forward``). bfloat16
has 8 significant bits: from 512 px on it knows every fourth pixel, and cells are 10 to 30 px.
These classes can go when both lines have.

The RPN head also matches anchors without a loop over the cells, which waits for a GPU once a cell.
"""

from __future__ import annotations

import copy

import torch
from mmdet.models.dense_heads import RPNHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.task_modules.assigners import AssignResult, MaxIoUAssigner
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from torch import Tensor

HALF_TYPES = (torch.float16, torch.bfloat16)


@MODELS.register_module()
class Fp32RoIExtractor(SingleRoIExtractor):
    """``SingleRoIExtractor`` that pools half-precision features in float32.

    The features are converted, not only the boxes: compiled RoIAlign wants one type for both, and
    sums over a bin lose less. torchvision's own op does the same under autocast.
    """

    def forward(
        self, feats: tuple[Tensor, ...], rois: Tensor, roi_scale_factor: float | None = None
    ) -> Tensor:
        """Return the features of RoIs; see ``SingleRoIExtractor.forward``.

        Args:
            feats: One (B, C, H, W) per level.
            rois: (N, 5), index in the batch and xyxy in px.
            roi_scale_factor: Makes boxes larger about their centres.

        Returns:
            (N, C, P, P) in the features' type, as the layers that follow expect.
        """
        dtype = feats[0].dtype
        if dtype not in HALF_TYPES:
            return super().forward(feats, rois, roi_scale_factor)
        with torch.autocast(feats[0].device.type, enabled=False):
            pooled = super().forward(
                tuple(level.float() for level in feats), rois.float(), roi_scale_factor
            )
        return pooled.to(dtype)


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


@MODELS.register_module()
class Fp32RPNHead(RPNHead):
    """``RPNHead`` whose predictions leave its convolutions as float32.

    Anchors take the type of the scores, and proposals that of the anchors. Scores profit too: near
    1 a bfloat16 probability has steps of 0.004, so that hundreds of anchors tie. Anchors are
    matched by :class:`CellMaxIoUAssigner` where a recipe names ``MaxIoUAssigner``: the same, faster
    on a GPU; another name would make every earlier training one with other settings.
    """

    def __init__(
        self, *args: object, train_cfg: ConfigDict | None = None, **kwargs: object
    ) -> None:
        if train_cfg is not None and train_cfg['assigner']['type'] == 'MaxIoUAssigner':
            train_cfg = copy.deepcopy(train_cfg)
            train_cfg['assigner']['type'] = CellMaxIoUAssigner
        super().__init__(*args, train_cfg=train_cfg, **kwargs)

    def forward(self, x: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits (B, A, H, W) and box deltas (B, 4 A, H, W) of each level."""
        scores, deltas = super().forward(x)
        return [level.float() for level in scores], [level.float() for level in deltas]

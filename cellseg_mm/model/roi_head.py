"""RoI head of Mask R-CNN that refines boxes more than once, and lets masks reach beyond them.

In: a pyramid of features and region proposals. Out: boxes, classes, scores and masks as
``StandardRoIHead`` gives them. Invariant: without settings of its own it is ``StandardRoIHead``.
"""

from __future__ import annotations

import torch
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox2roi
from mmdet.utils import InstanceList
from mmengine.config import ConfigDict
from torch import Tensor

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.model.mask_head import CellMaskHead, enlarged


@MODELS.register_module()
class CellRoIHead(StandardRoIHead):
    """``StandardRoIHead`` with two settings more; weights and their names are the same.

    ``test_cfg.rcnn.box_passes`` (1 without it) is how often boxes are refined at test time: a box
    that was moved onto its cell is looked at again, and its score is the mean of all looks
    (iterative bounding-box regression, Gidaris and Komodakis 2016). Measured in docs/recipes.md.

    With ``mask_frame`` masks may reach beyond their box: one that is a little too small no longer
    cuts its cell straight.

    Args:
        mask_frame: Features, targets and pasted masks belong to the box made larger by this about
            its centre; 1 is ``StandardRoIHead``.

    Raises:
        ConfigError: ``mask_frame`` is below 1, or the mask head is not ``CellMaskHead``.
    """

    def __init__(self, *args: object, mask_frame: float = 1.0, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        if mask_frame < 1:
            raise ConfigError(
                f'model.roi_head.mask_frame: found {mask_frame}; expected 1 or more (1.25 leaves a '
                'margin of an eighth of the box on each side); correct it'
            )
        if mask_frame != 1 and not isinstance(self.mask_head, CellMaskHead):
            raise ConfigError(
                f'model.roi_head.mask_frame: found {mask_frame} with a '
                f'{type(self.mask_head).__name__}; expected a CellMaskHead; set '
                "model.roi_head.mask_head.type='CellMaskHead'"
            )
        self.mask_frame = mask_frame
        if mask_frame != 1:
            self.mask_head.frame = mask_frame

    def predict_bbox(
        self,
        x: tuple[Tensor, ...],
        batch_img_metas: list[dict],
        rpn_results_list: InstanceList,
        rcnn_test_cfg: ConfigDict,
        rescale: bool = False,
    ) -> InstanceList:
        """Return the boxes of each image; see ``StandardRoIHead``."""
        passes = rcnn_test_cfg.get('box_passes', 1)
        self._check(passes)
        proposals = [found.bboxes for found in rpn_results_list]
        sizes = [len(boxes) for boxes in proposals]
        if passes == 1 or not sum(sizes):
            return super().predict_bbox(
                x, batch_img_metas, rpn_results_list, rcnn_test_cfg, rescale=rescale
            )
        rois = bbox2roi(proposals)
        found = self._bbox_forward(x, rois)
        probs = [found['cls_score'].softmax(dim=-1)]
        for _ in range(passes - 1):
            deltas = deltas_of_best(found['cls_score'], found['bbox_pred'])
            parts = zip(rois.split(sizes), deltas.split(sizes), batch_img_metas, strict=True)
            rois = bbox2roi([self._moved(boxes, moves, meta) for boxes, moves, meta in parts])
            found = self._bbox_forward(x, rois)
            probs.append(found['cls_score'].softmax(dim=-1))
        mean = torch.stack(probs).mean(dim=0).clamp(min=1e-12).log()  # its softmax is the mean
        return self.bbox_head.predict_by_feat(
            rois=rois.split(sizes),
            cls_scores=mean.split(sizes),
            bbox_preds=found['bbox_pred'].split(sizes),
            batch_img_metas=batch_img_metas,
            rcnn_test_cfg=rcnn_test_cfg,
            rescale=rescale,
        )

    def _check(self, passes: object) -> None:
        if not isinstance(passes, int) or passes < 1:
            raise ConfigError(
                f'model.test_cfg.rcnn.box_passes: found {passes!r}; expected a whole number from 1 '
                'on; correct it'
            )
        if passes > 1 and self.bbox_head.custom_cls_channels:
            raise ConfigError(
                f'model.test_cfg.rcnn.box_passes: found {passes} with a bbox_head whose loss_cls '
                'has an activation of its own; expected softmax; take box_passes=1'
            )

    def _moved(self, rois: Tensor, deltas: Tensor, meta: dict) -> Tensor:
        shape = meta['img_shape']
        return self.bbox_head.bbox_coder.decode(rois[:, 1:], deltas, max_shape=shape)

    def _mask_forward(
        self,
        x: tuple[Tensor, ...],
        rois: Tensor | None = None,
        pos_inds: Tensor | None = None,
        bbox_feats: Tensor | None = None,
    ) -> dict:
        if rois is not None and self.mask_frame != 1:
            rois = torch.cat([rois[:, :1], enlarged(rois[:, 1:], self.mask_frame)], dim=1)
        return super()._mask_forward(x, rois, pos_inds, bbox_feats)


def deltas_of_best(logits: Tensor, deltas: Tensor) -> Tensor:
    """Return how each box moves for its most likely cell class, (P, 4).

    Args:
        logits: (P, K + 1), background last.
        deltas: (P, 4 K), or (P, 4) where all classes move alike.
    """
    by_class = deltas.reshape(len(deltas), -1, 4)
    best = logits[:, :-1].argmax(dim=1) % by_class.shape[1]
    return by_class[torch.arange(len(deltas), device=deltas.device), best]

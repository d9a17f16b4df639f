"""A Mask R-CNN as one plain tensor function: a picture in, cells out.

In: a model of MMDetection's parts, in evaluation mode. Out: a module whose forward pass has no
data samples, no Python loops over data and no batches, so that a tracer can write it down.
Invariant: run in torch it gives what MMDetection gives for the same picture.

MMDetection's own forward passes of backbone, neck and heads are used; what is rewritten is what
lies between them: normalising and padding, anchors, choosing the best, decoding boxes, levels of
RoIs, non-maximum suppression, and the mask of the predicted class.
Source: ``AnchorHead``, ``RPNHead``, ``BBoxHead``, ``multiclass_nms``, ``SingleRoIExtractor`` of
MMDetection 3.x and ``batched_nms`` of mmcv 2.x (Apache-2.0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmcv.ops import nms, roi_align
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from torch import Tensor, nn

from cellseg_mm.model.mask_head import enlarged
from cellseg_mm.model.roi_head import deltas_of_best

WH_RATIO_CLIP = 16 / 1000  # DeltaXYWHBBoxCoder.decode


class _Nms(torch.autograd.Function):
    """mmcv's NMS in torch, ``NonMaxSuppression`` in a graph; both give indices by falling score."""

    @staticmethod
    def forward(ctx: object, boxes: Tensor, scores: Tensor, iou_thr: float, n_max: int) -> Tensor:
        return nms(boxes, scores, iou_thr)[1][:n_max]

    @staticmethod
    def symbolic(
        g: torch.Graph, boxes: torch.Value, scores: torch.Value, iou_thr: float, n_max: int
    ) -> torch.Value:
        def constant(value: object, dtype: torch.dtype) -> torch.Value:
            return g.op('Constant', value_t=torch.tensor([value], dtype=dtype))

        zero, one = constant(0, torch.int64), constant(1, torch.int64)
        found = g.op(
            'NonMaxSuppression',
            g.op('Unsqueeze', boxes, zero),
            g.op('Unsqueeze', g.op('Unsqueeze', scores, zero), zero),
            constant(n_max, torch.int64),
            constant(iou_thr, torch.float32),
        )  # (M, 3): batch, class, box
        third = g.op('Constant', value_t=torch.tensor([2], dtype=torch.int64))
        return g.op('Squeeze', g.op('Gather', found, third, axis_i=1), one)


class _RoiAlign(torch.autograd.Function):
    """mmcv's RoIAlign in torch, ``RoiAlign`` in a graph."""

    @staticmethod
    def forward(ctx: object, level: Tensor, boxes: Tensor, size: int, scale: float) -> Tensor:
        rois = torch.cat([boxes.new_zeros((len(boxes), 1)), boxes], dim=1)
        return roi_align(level, rois, (size, size), scale, 0, 'avg', True)

    @staticmethod
    def symbolic(
        g: torch.Graph, level: torch.Value, boxes: torch.Value, size: int, scale: float
    ) -> torch.Value:
        first = g.op('Constant', value_t=torch.tensor([0], dtype=torch.int64))
        n_boxes = g.op('Gather', g.op('Shape', boxes), first, axis_i=0)
        nothing = torch.zeros(1, dtype=torch.int64)
        return g.op(
            'RoiAlign',
            level,
            boxes,
            g.op('ConstantOfShape', n_boxes, value_t=nothing),
            coordinate_transformation_mode_s='half_pixel',
            mode_s='avg',
            output_height_i=size,
            output_width_i=size,
            sampling_ratio_i=0,
            spatial_scale_f=scale,
        )


class PlainMaskRCNN(nn.Module):
    """The whole detector of one picture as tensor code; see the module's text.

    Args:
        model: A model that ``carried.check_model`` lets pass.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.frame = float(getattr(model.roi_head, 'mask_frame', 1.0))
        # torch.onnx.export puts the old mode of what it traces back: without this the model inside
        # would be left in training mode.
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Find the cells of a picture.

        Args:
            image: (H, W, 3) uint8, red first.

        Returns:
            Boxes (N, 4) float32 xyxy px of the picture; classes (N,) int64; scores (N,) float32,
            falling; mask probabilities (N, S, S) float32 of the predicted class, whose grid covers
            the box made larger by ``mask_frame``; and the lowest score of the region proposals that
            were passed on, () float32, 0 where none was cut.
        """
        high = torch.stack([self._size(image, 1), self._size(image, 0)]).to(torch.float32)  # W, H
        features = self.model.neck(self.model.backbone(self._input(image)))
        proposals, cut = self._proposals(features, high)
        boxes, classes, scores = self._boxes(features, proposals, high)
        return boxes, classes, scores, self._masks(features, boxes, classes), cut

    @staticmethod
    def _size(tensor: Tensor, axis: int) -> Tensor:
        """Return a size as a tensor that a tracer follows."""
        return torch._shape_as_tensor(tensor)[axis]

    def _input(self, image: Tensor) -> Tensor:
        """Normalise and pad: (1, 3, H', W') float32 in the order that the weights know."""
        prepare = self.model.data_preprocessor
        x = image.permute(2, 0, 1)
        # The pipeline's pictures are blue first, and ``bgr_to_rgb`` turns them; ours are red first.
        if not prepare._channel_conversion:
            x = x[[2, 1, 0]]
        x = x.float()
        if prepare._enable_normalize:
            x = (x - prepare.mean) / prepare.std
        divisor = prepare.pad_size_divisor
        height, width = x.shape[1], x.shape[2]
        padding = (
            0,
            (divisor - width % divisor) % divisor,
            0,
            (divisor - height % divisor) % divisor,
        )
        return F.pad(x[None], padding, 'constant', float(prepare.pad_value))

    def _proposals(self, features: Sequence[Tensor], high: Tensor) -> tuple[Tensor, Tensor]:
        """Return region proposals (P, 4) by falling score, and where they were cut."""
        head = self.model.rpn_head
        cfg = head.test_cfg
        boxes, scores, levels = [], [], []
        for level, (logits, deltas) in enumerate(zip(*head(features), strict=True)):
            anchors = self._anchors(level, logits)
            score = logits.permute(0, 2, 3, 1).reshape(-1).sigmoid()  # (H * W * A,)
            deltas = deltas.permute(0, 2, 3, 1).reshape(-1, 4)
            if cfg.nms_pre > 0:
                score, best = score.topk(_at_most(score, cfg.nms_pre))
                deltas, anchors = deltas[best], anchors[best]
            boxes.append(_decode(anchors, deltas, head.bbox_coder, high))
            scores.append(score)
            levels.append(torch.full_like(score, float(level)))
        found = torch.cat(boxes), torch.cat(scores), torch.cat(levels)
        if cfg.get('min_bbox_size', -1) >= 0:
            sides = found[0][:, 2:] - found[0][:, :2]
            kept = (sides > cfg.min_bbox_size).all(dim=1).nonzero().squeeze(1)
            found = found[0][kept], found[1][kept], found[2][kept]
        best = _suppress(*found, cfg.nms.iou_threshold, cfg.max_per_img)
        scores_kept = found[1][best]
        lowest = torch.cat([scores_kept, scores_kept.new_ones(1)]).min()
        is_cut = self._size(scores_kept, 0) >= _limit(cfg.max_per_img)
        return found[0][best], lowest * is_cut.to(torch.float32)

    def _anchors(self, level: int, logits: Tensor) -> Tensor:
        """Return the anchors of a level, (H * W * A, 4)."""
        generator = self.model.rpn_head.prior_generator
        base = generator.base_anchors[level].to(logits)
        stride_w, stride_h = generator.strides[level]
        x = torch.arange(logits.shape[3], device=logits.device).to(logits.dtype) * stride_w
        y = torch.arange(logits.shape[2], device=logits.device).to(logits.dtype) * stride_h
        shift_x = (x[None, :] + torch.zeros_like(y)[:, None]).reshape(-1)
        shift_y = (y[:, None] + torch.zeros_like(x)[None, :]).reshape(-1)
        shifts = torch.stack([shift_x, shift_y, shift_x, shift_y], dim=1)  # (H * W, 4)
        return (base[None] + shifts[:, None]).reshape(-1, 4)

    def _boxes(
        self, features: Sequence[Tensor], proposals: Tensor, high: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes, classes and scores of the cells."""
        roi_head = self.model.roi_head
        head, cfg = roi_head.bbox_head, roi_head.test_cfg
        logits, deltas = head(_pool(roi_head.bbox_roi_extractor, features, proposals))
        n_classes, probs = head.num_classes, [logits.softmax(dim=-1)]
        for _ in range(int(cfg.get('box_passes', 1)) - 1):
            proposals = _decode(proposals, deltas_of_best(logits, deltas), head.bbox_coder, high)
            logits, deltas = head(_pool(roi_head.bbox_roi_extractor, features, proposals))
            probs.append(logits.softmax(dim=-1))
        scores = torch.stack(probs).mean(dim=0)[:, :-1].reshape(-1)  # (P * K,)
        every = proposals[:, None].expand(-1, n_classes, 4).reshape(-1, 4)
        if head.reg_class_agnostic:
            deltas = deltas[:, None].expand(-1, n_classes, 4)
        boxes = _decode(every, deltas.reshape(-1, 4), head.bbox_coder, high)
        classes = torch.arange(n_classes, device=scores.device)
        classes = classes[None].expand_as(logits[:, :-1]).reshape(-1)
        kept = (scores > cfg.score_thr).nonzero().squeeze(1)
        boxes, scores, classes = boxes[kept], scores[kept], classes[kept]
        best = _suppress(boxes, scores, classes.to(boxes), cfg.nms.iou_threshold, cfg.max_per_img)
        return boxes[best], classes[best], scores[best]

    def _masks(self, features: Sequence[Tensor], boxes: Tensor, classes: Tensor) -> Tensor:
        """Return the mask probabilities of each cell's class, (N, S, S)."""
        roi_head = self.model.roi_head
        head = roi_head.mask_head
        frames = boxes if self.frame == 1 else enlarged(boxes, self.frame)
        logits = head(_pool(roi_head.mask_roi_extractor, features, frames))
        if head.class_agnostic:
            return logits[:, 0].sigmoid()
        first = torch.arange(self.model.roi_head.bbox_head.num_classes, device=boxes.device)
        chosen = classes[:, None] == first[None]  # (N, K), one True in a row
        index = chosen.reshape(-1).nonzero().squeeze(1)
        return logits.flatten(0, 1)[index].sigmoid()


def _limit(cap: int) -> int:
    return cap if cap > 0 else torch.iinfo(torch.int32).max


def _at_most(values: Tensor, n: int) -> Tensor | int:
    """Return the number of values, at most ``n``; as a tensor while it is traced."""
    if not torch.jit.is_tracing():
        return min(n, len(values))
    length = torch._shape_as_tensor(values)[:1]
    return torch.cat([length, torch.tensor([n])]).min()


def _decode(anchors: Tensor, deltas: Tensor, coder: DeltaXYWHBBoxCoder, high: Tensor) -> Tensor:
    """Move and scale boxes by predicted deltas and clip them to the picture, (N, 4)."""
    moved = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    most = abs(math.log(WH_RATIO_CLIP))
    centre = (anchors[:, :2] + anchors[:, 2:]) * 0.5
    sides = anchors[:, 2:] - anchors[:, :2]
    centre = centre + sides * moved[:, :2]
    half = sides * moved[:, 2:].clamp(-most, most).exp() * 0.5
    low, top = centre - half, centre + half
    if coder.clip_border:
        low = torch.minimum(low.clamp(min=0), high)
        top = torch.minimum(top.clamp(min=0), high)
    return torch.cat([low, top], dim=1)


def _suppress(boxes: Tensor, scores: Tensor, groups: Tensor, iou_thr: float, cap: int) -> Tensor:
    """Return what non-maximum suppression within each group keeps, by falling score."""
    # mmcv's trick: each group lies where no other does. The zero is for a picture without boxes.
    beyond = torch.cat([boxes.reshape(-1), boxes.new_zeros(1)]).max() + 1
    return _Nms.apply(boxes + (groups * beyond)[:, None], scores, float(iou_thr), _limit(cap))


def _pool(extractor: SingleRoIExtractor, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """Return the features of boxes, each from the level that suits its size, (N, C, P, P)."""
    layers = extractor.roi_layers
    size = int(layers[0].output_size[0])
    if len(layers) == 1:
        return _RoiAlign.apply(features[0], boxes, size, layers[0].spatial_scale)
    rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)
    levels = extractor.map_roi_levels(rois, len(layers))
    pooled, where = [], []
    for i, layer in enumerate(layers):
        index = (levels == i).nonzero().squeeze(1)
        pooled.append(_RoiAlign.apply(features[i], boxes[index], size, layer.spatial_scale))
        where.append(index)
    return torch.cat(pooled)[torch.cat(where).argsort()]

"""The fusion rule ``proposal_share``: members average what they compute, stage by stage.

In: two-stage detectors of one family and a batch. Out: one prediction per image. First the RPN's
logits and deltas are averaged into proposals that all members see, then the class probabilities and
box deltas of those proposals, then the mask logits of the boxes that are left. Invariant: one
member, or copies of it, give exactly what the plain model predicts.

Source: the design of TheoViel/kaggle_sartorius (src/model_zoo/ensemble.py, merging.py), for stock
MMDetection 3 heads; the code is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import RPNHead
from mmdet.models.layers import multiclass_nms
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.utils import empty_instances
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox2roi
from mmengine.structures import InstanceData
from torch import Tensor, nn

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.detectors.member_models import MemberModels
from cellseg_mm.model.box_precision import Fp32RPNHead

REMEDY = 'choose another rule, for example --fusion soft_mask'
Features = tuple[Tensor, ...]


def check_family(models: Sequence[nn.Module], names: Sequence[str]) -> None:
    """Refuse models that cannot share proposals.

    Raises:
        ConfigError: A model is no plain two-stage detector with masks, or differs from the first
            in anchors, box coding, classes or ``test_cfg``.
    """
    first = None
    for model, name in zip(models, names, strict=True):
        roi_head = getattr(model, 'roi_head', None)
        is_plain = type(getattr(model, 'rpn_head', None)) in (RPNHead, Fp32RPNHead)
        if not is_plain or type(roi_head) is not StandardRoIHead or not roi_head.with_mask:
            raise ConfigError(
                f'{name}: proposal_share needs RPNHead and StandardRoIHead with a mask head, found '
                f'{type(model).__name__} with {type(roi_head).__name__}; {REMEDY}'
            )
        traits = _traits(model)
        first = traits if first is None else first
        differing = [key for key, value in traits.items() if value != first[key]]
        if differing:
            raise ConfigError(
                f'{name}: differs from {names[0]} in {", ".join(differing)}; members that share '
                f'proposals must agree; {REMEDY}'
            )


def _traits(model: nn.Module) -> dict[str, object]:
    rpn, box, mask = model.rpn_head, model.roi_head.bbox_head, model.roi_head.mask_head
    anchors = rpn.prior_generator
    return {
        'anchors': ([a.tolist() for a in anchors.base_anchors], [*map(tuple, anchors.strides)]),
        'box coding': [vars(head.bbox_coder) for head in (rpn, box)],
        'classes': (box.num_classes, box.reg_class_agnostic, mask.class_agnostic),
        'RPN test_cfg': dict(rpn.test_cfg),
        'RoI test_cfg': dict(model.roi_head.test_cfg),
    }


@torch.no_grad()
def predict_shared(models: MemberModels, chosen: Sequence[int], data: dict) -> list[DetDataSample]:
    """Predict a batch with shared proposals.

    The feature pyramids of all members are kept from stage to stage (in main memory when members
    take turns); everything else exists once.

    Args:
        models: Members of one family.
        chosen: Which of them take part.
        data: A batch as the data loader gives it.

    Raises:
        ConfigError: The members' feature maps or masks differ in size.
    """
    keep_on = torch.device('cpu') if models.takes_turns else models.device
    pyramids: list[Features] = []
    samples: list[list[DetDataSample]] = []

    def features(index: int, model: nn.Module) -> list[Tensor]:
        batch = model.data_preprocessor(data, False)
        x = model.extract_feat(batch['inputs'])
        samples.append(batch['data_samples'])
        pyramids.append(tuple(level.to(keep_on) for level in x))
        scores, deltas = model.rpn_head(x)
        return [*scores, *deltas]

    def with_features(stage: Callable[[nn.Module, Features], list[Tensor]]) -> list[Tensor]:
        def run(position: int, model: nn.Module) -> list[Tensor]:
            return stage(model, tuple(level.to(models.device) for level in pyramids[position]))

        return _mean(models, chosen, run)

    rpn = _mean(models, chosen, features)
    metas = [sample.metainfo for sample in samples[0]]
    lead = models.models[chosen[0]]  # for what needs no weights: decoding, NMS, painting
    n_levels = len(rpn) // 2
    proposals = lead.rpn_head.predict_by_feat(
        rpn[:n_levels], rpn[n_levels:], batch_img_metas=metas, rescale=False
    )
    results = _boxes(lead, proposals, metas, with_features)
    results = _masks(lead, results, metas, with_features)
    return lead.add_pred_to_datasample(samples[0], results)


def _mean(
    models: MemberModels, chosen: Sequence[int], run: Callable[[int, nn.Module], list[Tensor]]
) -> list[Tensor]:
    """Return the mean over the members of each tensor, one member after the other."""
    return running_mean(_outputs(models, chosen, run))


def _outputs(
    models: MemberModels, chosen: Sequence[int], run: Callable[[int, nn.Module], list[Tensor]]
) -> Iterable[list[Tensor]]:
    for position, index in enumerate(chosen):
        with models.use(index) as model:
            yield run(position, model)


def running_mean(outputs: Iterable[list[Tensor]]) -> list[Tensor]:
    """Average lists of tensors; equal lists give their value to the last bit.

    A sum divided by its length would not: five times a float is rounded on the way.

    Raises:
        ConfigError: Shapes differ.
    """
    means: list[Tensor] = []
    for count, tensors in enumerate(outputs, start=1):
        if count == 1:
            means = list(tensors)
            continue
        shapes = [(m.shape, t.shape) for m, t in zip(means, tensors, strict=True)]
        differing = [pair for pair in shapes if pair[0] != pair[1]]
        if differing:
            raise ConfigError(
                f'proposal_share: member {count} computes {tuple(differing[0][1])} where member 1 '
                f'has {tuple(differing[0][0])}; members that share proposals must agree in sizes; '
                f'{REMEDY}'
            )
        means = [m + (t - m) / count for m, t in zip(means, tensors, strict=True)]
    return means


def _boxes(
    lead: nn.Module,
    proposals: list[InstanceData],
    metas: list[dict],
    mean_of: Callable[[Callable[[nn.Module, Features], list[Tensor]]], list[Tensor]],
) -> list[InstanceData]:
    """Return boxes, scores and labels in px of the network's input; as ``predict_bbox``."""
    head, cfg = lead.roi_head.bbox_head, lead.roi_head.test_cfg
    boxes = [p.bboxes for p in proposals]
    rois = bbox2roi(boxes)
    if not len(rois):
        return empty_instances(
            metas,
            rois.device,
            task_type='bbox',
            box_type=head.predict_box_type,
            num_classes=head.num_classes,
        )

    def stage(model: nn.Module, x: Features) -> list[Tensor]:
        out = model.roi_head._bbox_forward(x, rois)
        return [class_probs(model.roi_head.bbox_head, out['cls_score']), out['bbox_pred']]

    probs, deltas = mean_of(stage)
    sizes = [len(b) for b in boxes]
    parts = zip(rois.split(sizes), probs.split(sizes), deltas.split(sizes), metas, strict=True)
    results = []
    for roi, prob, delta, meta in parts:
        # Without a test_cfg the head decodes and does nothing else.
        decoded = head.predict_by_feat((roi,), (prob,), (delta,), [meta], None, False)[0].bboxes
        found, labels = multiclass_nms(decoded, prob, cfg.score_thr, cfg.nms, cfg.max_per_img)
        results.append(InstanceData(bboxes=found[:, :-1], scores=found[:, -1], labels=labels))
    return results


def class_probs(head: nn.Module, cls_score: Tensor) -> Tensor:
    """Return the probabilities that a box head makes of its scores, as in ``predict_by_feat``."""
    if head.custom_cls_channels:
        return head.loss_cls.get_activation(cls_score)
    return F.softmax(cls_score, dim=-1)


def _masks(
    lead: nn.Module,
    results: list[InstanceData],
    metas: list[dict],
    mean_of: Callable[[Callable[[nn.Module, Features], list[Tensor]]], list[Tensor]],
) -> list[InstanceData]:
    """Add masks and bring everything to px of the original image; as ``predict_mask``."""
    rois = bbox2roi([r.bboxes for r in results])
    cfg = lead.roi_head.test_cfg
    if not len(rois):
        return empty_instances(
            metas,
            rois.device,
            task_type='mask',
            instance_results=results,
            mask_thr_binary=cfg.mask_thr_binary,
        )
    (logits,) = mean_of(lambda model, x: [model.roi_head._mask_forward(x, rois)['mask_preds']])
    return lead.roi_head.mask_head.predict_by_feat(
        mask_preds=logits.split([len(r) for r in results]),
        results_list=results,
        batch_img_metas=metas,
        rcnn_test_cfg=cfg,
        rescale=True,
    )

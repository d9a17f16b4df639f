"""Run torchvision's maskrcnn_resnet50_fpn_v2 and our model on the same random weights and inputs.

Prints the largest difference of each part: backbone, FPN, RPN head, box head (with the order of
the classes), mask head. What surrounds the parts differs on purpose; docs/weights.md lists it.
Needs torchvision beside mmdet; exits with 2 without it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import cellseg_mm  # noqa: F401 (makes mmdet importable)
from cellseg_mm.weights.conversion import build_model_config
from cellseg_mm.weights.names import COCO_IDS
from cellseg_mm.weights.published import convert_file

RESNET50 = (3, 4, 6, 3)


def main() -> int:
    """Build both, compare every part, print."""
    try:
        from torchvision.models.detection import maskrcnn_resnet50_fpn_v2
    except (ImportError, RuntimeError) as error:
        print(f'torchvision does not import ({error}), so nothing was compared: install one that '
              'fits your torch.')  # fmt: skip
        return 2
    torch.manual_seed(0)
    theirs = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).eval()
    randomise_norms(theirs)
    ours = build_ours(theirs)
    with torch.no_grad():
        for part, a, b in outputs(theirs, ours):
            print(f'{part:<12} {float((a - b).abs().max()):.3g} of {float(a.abs().max()):.3g}')
    return 0


def randomise_norms(model: nn.Module) -> None:
    """Give every batch norm its own statistics, or a swap of two would not show."""
    for name, value in model.state_dict().items():
        if name.endswith('running_mean'):
            value.normal_(0, 0.1)
        elif name.endswith('running_var'):
            value.uniform_(0.5, 1.5)


def build_ours(theirs: nn.Module) -> nn.Module:
    """Convert, build the pytorch-style model, load strictly."""
    import mmdet.models  # noqa: F401
    from mmdet.registry import MODELS
    from mmengine.registry import DefaultScope

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'random.pth'
        torch.save(theirs.state_dict(), path)
        print(convert_file(path, Path(folder) / 'ours.pth', keep_all_classes=True).summary())
        state = torch.load(Path(folder) / 'ours.pth', weights_only=True)['state_dict']
    config = build_model_config(RESNET50, 80)
    config['backbone']['style'] = 'pytorch'
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(config).eval()
    model.load_state_dict(state, strict=True)
    return model


def outputs(theirs: nn.Module, ours: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    """Return part, torchvision's output, ours; each part gets the same input in both."""
    image = torch.randn(1, 3, 128, 192)
    rows = []
    body = theirs.backbone.body(image)
    our_body = ours.backbone(image)
    rows += [('backbone', a, b) for a, b in zip(body.values(), our_body, strict=True)][-1:]
    features = list(theirs.backbone(image).values())
    our_features = ours.neck(our_body)
    rows += [('FPN', a, b) for a, b in zip(features, our_features, strict=True)]
    logits, deltas = theirs.rpn.head(features)
    our_logits, our_deltas = ours.rpn_head(our_features)
    rows += [('RPN logits', logits[0], our_logits[0]), ('RPN deltas', deltas[0], our_deltas[0])]
    pooled = torch.randn(5, 256, 7, 7)
    scores, boxes = theirs.roi_heads.box_predictor(theirs.roi_heads.box_head(pooled))
    our_scores, our_boxes = ours.roi_head.bbox_head(pooled)
    order = [*COCO_IDS, 0]  # torchvision: background first, COCO's numbers with their gaps
    rows.append(('scores', scores[:, order], our_scores))
    boxes = boxes.reshape(5, 91, 4)[:, list(COCO_IDS)].flatten(1)
    rows.append(('boxes', boxes, our_boxes))
    pooled = torch.randn(3, 256, 14, 14)
    masks = theirs.roi_heads.mask_predictor(theirs.roi_heads.mask_head(pooled))
    rows.append(('masks', masks[:, list(COCO_IDS)], ours.roi_head.mask_head(pooled)))
    return rows


if __name__ == '__main__':
    sys.exit(main())

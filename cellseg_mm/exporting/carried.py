"""What an exported file can carry, and what it cannot.

In: a model and its config. Out: nothing, or one sentence that names the part. Invariant: what is
let through is rewritten in ``graph`` exactly; nothing is exported in the hope that it is alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmcv.ops import RoIAlign
from torch import nn

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.light.picture import check_step

CODERS, EXTRACTORS = ('DeltaXYWHBBoxCoder',), ('SingleRoIExtractor', 'Fp32RoIExtractor')
# Exact classes, of MMDetection or ours: one that inherits may compute something else.
PARTS: dict[str, tuple[str, ...]] = {
    'model': ('MaskRCNN', 'CellMaskRCNN'),
    'model.data_preprocessor': ('DetDataPreprocessor',),
    'model.rpn_head': ('RPNHead', 'Fp32RPNHead'),
    'model.rpn_head.prior_generator': ('AnchorGenerator',),
    'model.rpn_head.bbox_coder': CODERS,
    'model.roi_head': ('StandardRoIHead', 'CellRoIHead'),
    'model.roi_head.bbox_head': ('ConvFCBBoxHead', 'Shared2FCBBoxHead', 'Shared4Conv1FCBBoxHead'),
    'model.roi_head.bbox_head.bbox_coder': CODERS,
    'model.roi_head.mask_head': ('FCNMaskHead', 'CellMaskHead'),
    'model.roi_head.bbox_roi_extractor': EXTRACTORS,
    'model.roi_head.mask_roi_extractor': EXTRACTORS,
}
LOADING = ('LoadCellImage', 'LoadImageFromFile')
PACKING = ('PackDetInputs', 'PackCellInputs')


def check_model(model: nn.Module, where: str) -> None:
    """Refuse a model with a part that the exported graph would compute differently.

    Raises:
        ConfigError: Names the first such part.
    """
    for path, known in PARTS.items():
        part: Any = model
        for name in path.split('.')[1:]:
            part = getattr(part, name, None)
        kind = type(part)
        is_known = kind.__module__.split('.')[0] in ('mmdet', 'cellseg_mm')
        if not is_known or kind.__name__ not in known:
            raise ConfigError(
                f'{where}: {path} is a {kind.__name__}; an exported file can carry '
                f'{" or ".join(known)}; use the model in torch'
            )
    for found in _odd_settings(model):
        raise ConfigError(
            f'{where}: {found}; an exported file cannot carry that; use the model in torch'
        )


def _odd_settings(model: Any) -> Iterator[str]:  # noqa: ANN401 - a model of any parts
    """Yield what the rewritten code leaves out."""
    rpn, roi = model.rpn_head, model.roi_head
    for name, cfg in (('rpn', rpn.test_cfg), ('rcnn', roi.test_cfg)):
        nms = cfg.get('nms') or {}
        if nms.get('type', 'nms') != 'nms' or set(nms) - {'type', 'iou_threshold'}:
            yield f'model.test_cfg.{name}.nms is {dict(nms)}'
    if not rpn.use_sigmoid_cls:
        yield 'model.rpn_head.loss_cls uses no sigmoid'
    if roi.bbox_head.custom_cls_channels or not roi.bbox_head.with_reg:
        yield 'model.roi_head.bbox_head has an activation of its own, or no regression'
    if any(coder.add_ctr_clamp for coder in (rpn.bbox_coder, roi.bbox_head.bbox_coder)):
        yield 'bbox_coder.add_ctr_clamp is set'
    if getattr(roi, 'shared_head', None) is not None:
        yield 'model.roi_head has a shared_head'
    for extractor in (roi.bbox_roi_extractor, roi.mask_roi_extractor):
        yield from (f'roi_layer is {layer}' for layer in extractor.roi_layers if not _plain(layer))


def _plain(layer: nn.Module) -> bool:
    if not isinstance(layer, RoIAlign):
        return False
    height, width = layer.output_size
    is_adaptive = layer.sampling_ratio == 0 and layer.pool_mode == 'avg' and layer.aligned
    return is_adaptive and height == width


def resize_step(pipeline: Sequence[Mapping[str, Any]], where: str) -> dict[str, Any] | None:
    """Return the resizing step of a test pipeline, or None.

    Raises:
        ConfigError: The pipeline does something else with a picture, or resizes twice.
    """
    steps = [dict(step) for step in pipeline]
    middle = [step for step in steps if step.get('type') not in (*LOADING, *PACKING)]
    for step in middle:
        check_step(step, where)
    if len(middle) > 1:
        raise ConfigError(
            f'{where}: the test pipeline resizes {len(middle)} times; an exported file can carry '
            'one resizing step; join them'
        )
    return middle[0] if middle else None

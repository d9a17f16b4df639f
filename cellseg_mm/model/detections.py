"""Between MMDetection's data samples and our instances, and what its caps cost.

In: a ``DetDataSample`` after ``predict``, or the dict that metrics get. Out: an InstanceSet, or the
way back. Invariant: RLE masks pass through as they are; only MMDetection's Boolean tensors
cost pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import TypeVar

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from numpy.typing import NDArray

from cellseg_mm.core import rle
from cellseg_mm.core.errors import PredictionError
from cellseg_mm.core.instances import InstanceSet

Sample = TypeVar('Sample', DetDataSample, dict)

# What CellMaskHead adds on request, and what fusion adds.
EXTRA_KEYS = ('mask_probs', 'mask_boxes', 'n_votes', 'agreement', 'mask_uncertainty', 'uncut_area')


def to_instance_set(data_sample: DetDataSample | Mapping) -> InstanceSet:
    """Read the predictions of one image out of a data sample.

    Args:
        data_sample: With ``img_id``, ``ori_shape``, ``name`` (or ``img_path``, see
            :func:`case_name`) and ``pred_instances``: ``bboxes``, ``scores``, ``labels``, ``masks``
            (COCO dicts or an (N, H, W) Boolean tensor) and perhaps ``mask_probs``, ``mask_boxes``.

    Returns:
        The instances in the detector's order, px of the original image.

    Raises:
        PredictionError: There are no masks, or they are of another size than the image.
    """
    name, image_hw = case_name(data_sample), _image_hw(data_sample)
    pred = data_sample['pred_instances'] if _is_dict(data_sample) else data_sample.pred_instances
    if 'masks' not in pred:
        raise PredictionError(
            f'{name}: the detector predicted boxes only; instances need masks; '
            'use a model with a mask head.'
        )
    boxes = _array(pred['bboxes']).reshape(-1, 4)
    # A batch without any detection skips the mask head and so has no extras.
    extra = {key: _array(pred[key]) for key in EXTRA_KEYS if key in pred and len(boxes)}
    return InstanceSet(
        name,
        _meta(data_sample, 'img_id'),
        image_hw,
        class_ids=_array(pred['labels']),
        scores=_array(pred['scores']),
        boxes_xyxy=boxes,
        rles=tuple(_rles(name, pred['masks'], image_hw)),
        extra=extra,
    )


def to_pred_instances(instances: InstanceSet) -> InstanceData:
    """Return ``pred_instances`` as CellMaskHead makes them: ``masks`` is a list of COCO dicts."""

    def tensor(values: NDArray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values))

    return InstanceData(
        bboxes=tensor(instances.boxes_xyxy),
        scores=tensor(instances.scores),
        labels=tensor(instances.class_ids),
        masks=rle.coco_dicts(instances.rles, instances.image_hw),
        **{key: tensor(values) for key, values in instances.extra.items()},
    )


def to_stock_masks(data_sample: Sample) -> Sample:
    """Return a copy whose masks are MMDetection's (N, H, W) Boolean tensor.

    For ``DetLocalVisualizer`` and ``DumpDetResults``, which cannot read RLE. Costs N H W bytes.

    Raises:
        PredictionError: See :func:`to_instance_set`.
    """
    masks = torch.from_numpy(to_instance_set(data_sample).masks())
    if _is_dict(data_sample):
        return {**data_sample, 'pred_instances': {**data_sample['pred_instances'], 'masks': masks}}
    copy = data_sample.new()
    copy.pred_instances = data_sample.pred_instances.new()
    copy.pred_instances.masks = masks
    return copy


def case_name(data_sample: DetDataSample | Mapping) -> str:
    """Return ``name``; without it the file's name, or the folder's of ``<name>/image.tif``."""
    name = _meta(data_sample, 'name', None)
    if name is not None:
        return str(name)
    path = PurePath(_meta(data_sample, 'img_path'))
    return path.parent.name if path.stem.lower() == 'image' and path.parent.name else path.stem


def _is_dict(data_sample: DetDataSample | Mapping) -> bool:
    return isinstance(data_sample, Mapping)


def _meta(data_sample: DetDataSample | Mapping, key: str, *default: object) -> object:
    source = data_sample if _is_dict(data_sample) else data_sample.metainfo
    if key not in source and not default:
        raise PredictionError(
            f'data sample: has no {key!r}; it must be kept from the data set to here; '
            f"add {key!r} to meta_keys of the pipeline's PackDetInputs."
        )
    return source.get(key, *default)


def _image_hw(data_sample: DetDataSample | Mapping) -> tuple[int, int]:
    height, width = _meta(data_sample, 'ori_shape')[:2]
    return int(height), int(width)


def _array(values: object) -> NDArray:
    values = getattr(values, 'tensor', values)  # HorizontalBoxes
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    # numpy has no bfloat16, which mixed precision leaves on a CPU.
    values = values.float() if values.dtype == torch.bfloat16 else values
    return values.detach().cpu().numpy()


def _rles(name: str, masks: object, image_hw: tuple[int, int]) -> list[bytes]:
    if not isinstance(masks, list | tuple):
        return _rles_of_pixels(name, _array(masks), image_hw)
    sizes = {tuple(mask['size']) for mask in masks} - {image_hw}
    if sizes:
        _raise_size(name, sizes.pop(), image_hw)
    # CocoMetric turns counts into text, in place.
    return [c.encode() if isinstance(c := mask['counts'], str) else c for mask in masks]


def _rles_of_pixels(name: str, masks: NDArray, image_hw: tuple[int, int]) -> list[bytes]:
    if masks.dtype != bool:
        raise PredictionError(
            f'{name}: masks have type {masks.dtype}; Boolean masks were expected; '
            'set test_cfg.rcnn.mask_thr_binary to a number above 0.'
        )
    if len(masks) and masks.shape[1:] != image_hw:
        _raise_size(name, masks.shape[1:], image_hw)
    crops, offsets = [], np.zeros((len(masks), 2), dtype=np.int64)
    for i, mask in enumerate(masks):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            crops.append(np.zeros((0, 0), dtype=bool))
            continue
        offsets[i] = rows[0], columns[0]
        crops.append(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    return rle.encode_crops(crops, offsets, image_hw)


def _raise_size(name: str, found_hw: tuple[int, ...], image_hw: tuple[int, int]) -> None:
    raise PredictionError(
        f'{name}: masks are of {found_hw[0]} x {found_hw[1]} px, the image of '
        f'{image_hw[0]} x {image_hw[1]}; they must match; predict with rescale=True.'
    )

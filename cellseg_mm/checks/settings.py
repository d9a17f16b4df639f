"""The doctor's look at one config: learning rates, norms, anchors, caps, schedules, pipelines.

In: a config and the ground truth of its cases. Out: :class:`~cellseg_mm.checks.lines.Line` records.
Invariant: nothing is trained or written; each check stands alone.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mmcv.transforms as mmcv_transforms
import numpy as np
from mmdet.registry import MODELS, TASK_UTILS, TRANSFORMS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from numpy.typing import NDArray

from cellseg_mm.checks.anchors import AnchorFit, AnchorLevel, best_ious
from cellseg_mm.checks.lines import Line, error, ok, warn
from cellseg_mm.core.errors import CellSegError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data import stain
from cellseg_mm.data.config import DataSettings, dataset_settings
from cellseg_mm.data.intensity import ValueRange
from cellseg_mm.data.labels import Case, read_image, read_label_layers
from cellseg_mm.training.fold_guard import refuse_other_class_count

RESIZES = (
    mmcv_transforms.Resize,
    mmcv_transforms.RandomResize,
    mmcv_transforms.RandomChoiceResize,
)
NEEDED_META = {
    'test': ('img_id', 'name', 'img_path', 'label_paths', 'ori_shape', 'img_shape', 'scale_factor'),
    'train': ('img_id', 'img_path', 'img_shape', 'ori_shape'),
}
HIGH_SCORE_THR = 0.05
N_HUE_CASES = 24


@dataclass(frozen=True, slots=True)
class Truth:
    """Cases and their cells.

    Attributes:
        cases: Training cases.
        sets: Their ground truth.
    """

    cases: tuple[Case, ...]
    sets: tuple[InstanceSet, ...]


def nodes(node: object, path: str = '') -> Iterator[tuple[str, dict]]:
    """Yield every dict of a config with its dotted path."""
    if isinstance(node, dict):
        yield path, node
        for key, value in node.items():
            yield from nodes(value, f'{path}.{key}' if path else str(key))
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from nodes(value, f'{path}[{i}]')


# ---- optimizer


def check_learning_rates(cfg: Config) -> Iterator[Line]:
    """Build the model and the optimizer: every key must decide a parameter; print the table."""
    from cellseg_mm.training.optim import group_table

    settings = copy.deepcopy(cfg.model)
    for _, node in nodes(settings):
        if node.get('type') in ('MMSyncBN', 'SyncBN'):
            node['type'] = 'BN'  # the same parameters, and built without a process group
    model = MODELS.build(settings)
    try:
        refuse_other_class_count(model, DataSettings.from_config(cfg).class_names)
    except CellSegError as problem:
        yield error('classes', str(problem))
    try:
        wrapper = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))
    except CellSegError as problem:
        yield error('learning rates', str(problem))
        return
    groups = wrapper.optimizer.param_groups
    in_groups = {id(p) for group in groups for p in group['params']}
    left_out = [
        n for n, p in model.named_parameters() if p.requires_grad and id(p) not in in_groups
    ]
    frozen = sum(not p.requires_grad for p in model.parameters())
    if left_out:
        yield error(
            'learning rates', f'{len(left_out)} trainable tensors in no group: {left_out[:5]}'
        )
    n_tensors = sum(len(group['params']) for group in groups)
    yield ok(
        'learning rates',
        f'{n_tensors} tensors in {len(groups)} groups, every key matches, {frozen} tensors frozen\n'
        + group_table(groups).split('\n', 1)[1],
    )
    yield from _check_eta_min(cfg, groups)


def _check_eta_min(cfg: Config, groups: Sequence[dict]) -> Iterator[Line]:
    rates = sorted({float(g.get('initial_lr', g['lr'])) for g in groups})
    schedulers = cfg.get('param_scheduler') or []
    n_fine = 0
    for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
        floor = float(scheduler.get('eta_min') or 0)
        where = f'param_scheduler {scheduler["type"]}'
        if floor and floor >= rates[0]:
            yield error(
                'schedule',
                f'{where}: eta_min {floor:g} is not below the rate {rates[0]:g} of one group, '
                'which would rise; expected a fraction of each rate; set eta_min_ratio instead',
            )
        elif floor and len(rates) > 1:
            yield warn(
                'schedule',
                f'{where}: eta_min {floor:g} is absolute, so groups end at {floor / rates[-1]:.2g} '
                f'to {floor / rates[0]:.2g} of their own rates; expected one share for all; set '
                'eta_min_ratio instead',
            )
        else:
            n_fine += 1
    if n_fine:
        yield ok('schedule', f'{n_fine} schedulers, no absolute floor')


# ---- norms


def check_norms(cfg: Config, *, n_devices: int = 1, has_cuda: bool = True) -> Iterator[Line]:
    """Check that each norm works on one device, with this batch and these weights."""
    found = [(path, node) for path, node in nodes(cfg.model, 'model') if 'type' in node]
    multi = [path for path, node in found if node['type'] == 'MMSyncBN']
    if multi and n_devices == 1:
        yield error(
            'norm',
            f'{multi[0]} and {len(multi) - 1} more are MMSyncBN, which cannot be built on one '
            'device; expected a norm that can; set type=SyncBN',
        )
    sync = [path for path, node in found if node['type'] == 'SyncBN']
    if sync and not has_cuda:
        yield ok('norm', f'{len(sync)} SyncBN settings run as plain BN without CUDA')
    batch = int(cfg.train_dataloader.batch_size)
    has_bn = any(node['type'] in ('BN', 'SyncBN', 'MMSyncBN') for _, node in found)
    backbone = cfg.model.get('backbone', {})
    kind = (backbone.get('norm_cfg') or {}).get('type', 'BN')
    is_pretrained = bool(cfg.get('load_from')) or bool(
        (backbone.get('init_cfg') or {}).get('checkpoint')
    )
    is_bn = kind in ('BN', 'SyncBN', 'MMSyncBN')
    is_frozen = _keeps_statistics(backbone)
    if is_bn and is_frozen and not is_pretrained:
        yield error(
            'norm',
            f'model.backbone: {kind} with norm_eval=True and no pretrained weights would keep '
            'statistics of nothing; set load_from, or norm_eval=False, or norm_cfg type=GN',
        )
    elif has_bn and batch * n_devices <= 2 and not is_frozen:
        yield warn(
            'norm',
            f'batches of {batch * n_devices} images are small for {kind} statistics; expected 4 or '
            'more; raise train_dataloader.batch_size, or set norm_cfg type=GN',
        )
    else:
        how = 'frozen statistics' if is_bn and is_frozen else f'batch {batch}'
        yield ok('norm', f'backbone {kind}, {how}')


def _keeps_statistics(backbone: Mapping) -> bool:
    """Return ``norm_eval`` as the backbone will have it: backbones differ in its default."""
    if 'norm_eval' in backbone:
        return bool(backbone['norm_eval'])
    made = MODELS.get(backbone.get('type', ''))
    setting = inspect.signature(made).parameters.get('norm_eval') if made else None
    return setting is not None and bool(setting.default)


# ---- sizes


def scaled_hws(cfg: Config, loader: str, cases: Sequence[Case], seed: int = 0) -> list[tuple]:
    """Return the size that each image gets from the resizing steps of a pipeline.

    Steps that draw at random draw once for each image.
    """
    steps = []
    for step in dataset_settings(cfg, loader).pipeline:
        kind = TRANSFORMS.get(step['type'])
        if isinstance(kind, type) and issubclass(kind, RESIZES):
            steps.append(TRANSFORMS.build(copy.deepcopy(step)))
    with _seeded(seed):
        return [_scaled_hw(case.image_hw, steps) for case in cases]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed what transforms draw from, and put it back afterwards."""
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def _scaled_hw(image_hw: tuple[int, int], steps: Sequence) -> tuple[int, int]:
    results = {'img': np.zeros(image_hw, np.uint8), 'img_shape': image_hw, 'ori_shape': image_hw}
    for step in steps:
        results = step(results)
    return tuple(int(side) for side in results['img'].shape[:2])


def anchor_levels(cfg: Config) -> list[AnchorLevel]:
    """Return the anchors of the model's RPN."""
    generator = TASK_UTILS.build(copy.deepcopy(cfg.model.rpn_head.anchor_generator))
    return [
        AnchorLevel(base.double().numpy(), tuple(map(float, stride)))
        for base, stride in zip(generator.base_anchors, generator.strides, strict=True)
    ]


def fit_anchors(cfg: Config, loader: str, truth: Truth) -> AnchorFit:
    """Compare every cell at the scale of a loader's pipeline with all anchors."""
    levels = anchor_levels(cfg)
    divisor = int(cfg.model.get('data_preprocessor', {}).get('pad_size_divisor', 1))
    ious, class_ids, sides = [np.zeros(0)], [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    hws = scaled_hws(cfg, loader, truth.cases)
    for case, one, hw in zip(truth.cases, truth.sets, hws, strict=True):
        boxes = scaled_boxes(one, case.image_hw, hw)
        padded = tuple(-(-side // divisor) * divisor for side in hw)
        ious.append(best_ious(boxes, padded, levels))
        class_ids.append(one.class_ids)
        sides.append(np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)))
    return AnchorFit(np.concatenate(ious), np.concatenate(class_ids), np.concatenate(sides))


def scaled_boxes(
    one: InstanceSet, image_hw: tuple[int, int], hw: tuple[int, int]
) -> NDArray[np.float64]:
    """Return an image's boxes after it was resized to ``hw``."""
    factor = np.array([hw[1] / image_hw[1], hw[0] / image_hw[0]])
    return one.boxes_xyxy.astype(np.float64) * np.tile(factor, 2)


def check_anchors(cfg: Config, truth: Truth) -> Iterator[Line]:
    """Tell which cells no anchor is assigned to, at the scale of training."""
    assigner = cfg.model.train_cfg.rpn.assigner
    low = float(assigner.get('min_pos_iou', 0.0))
    high = float(assigner.pos_iou_thr)
    needed = min(low, high) if assigner.get('match_low_quality', True) else high
    fit = fit_anchors(cfg, 'train_dataloader', truth)
    share = fit.share_below(max(needed, 1e-12))
    classes = DataSettings.from_config(cfg).class_names
    table = fit.table(classes, sorted({max(needed, 1e-12), 0.3, 0.5, high}))
    text = (
        f'{100 * share:.2f} % of {len(fit.ious)} cells get no anchor (best IoU below {needed:g}), '
        f'{100 * fit.share_below(0.3):.2f} % only one that overlaps badly (below 0.3)'
    )
    advice = (
        '; expected none; set model.train_cfg.rpn.assigner.min_pos_iou=1e-4, choose smaller '
        'anchor_generator.scales, or enlarge the images'
    )
    if share > 0.01:
        yield error('anchors', f'{text}{advice}\n{table}')
    elif fit.share_below(0.3) > 0.1:
        yield warn(
            'anchors',
            f'{text}; expected few; choose smaller anchor_generator.scales, or enlarge the images\n'
            f'{table}',
        )
    else:
        yield ok('anchors', f'{text}\n{table}')


def check_min_sizes(cfg: Config, truth: Truth) -> Iterator[Line]:
    """Tell how many cells filters by size take away."""
    hws = scaled_hws(cfg, 'train_dataloader', truth.cases)
    sizes = [
        boxes[:, 2:] - boxes[:, :2]
        for case, one, hw in zip(truth.cases, truth.sets, hws, strict=True)
        for boxes in [scaled_boxes(one, case.image_hw, hw)]
    ]
    wh = np.concatenate([np.zeros((0, 2)), *sizes])
    limits = {}
    for step in dataset_settings(cfg).pipeline:
        if step.get('type') == 'FilterAnnotations':
            limits['FilterAnnotations.min_gt_bbox_wh'] = tuple(step.get('min_gt_bbox_wh', (1, 1)))
    for where in ('train_cfg.rpn_proposal', 'test_cfg.rpn'):
        section, part = where.split('.')
        size = cfg.model[section].get(part, {}).get('min_bbox_size', 0)
        limits[f'model.{where}.min_bbox_size'] = (size, size)
    for where, (width, height) in limits.items():
        n_lost = (
            int(((wh[:, 0] <= width) | (wh[:, 1] <= height)).sum()) if max(width, height) > 0 else 0
        )
        if n_lost:
            yield warn(
                'smallest size',
                f'{where}={width:g} takes away {n_lost} of {len(wh)} cells '
                f'({100 * n_lost / len(wh):.2f} %); expected none; lower it',
            )
    if not any(w > 0 for w, _ in limits.values()):
        yield ok('smallest size', 'no filter by size')
    else:
        yield ok(
            'smallest size', 'filters: ' + ', '.join(f'{k}={v[0]:g}' for k, v in limits.items())
        )


def check_caps(cfg: Config, truth: Truth) -> Iterator[Line]:
    """Compare every limit on detections with the cells per image."""
    counts = np.array([len(one) for one in truth.sets])
    rpn, rcnn = cfg.model.test_cfg.rpn, cfg.model.test_cfg.rcnn
    limits = {
        'model.test_cfg.rcnn.max_per_img': rcnn.max_per_img,
        'model.test_cfg.rpn.max_per_img': rpn.max_per_img,
        'model.test_cfg.rpn.nms_pre (per level)': rpn.nms_pre,
    }
    if not any('Crop' in str(step.get('type')) for step in dataset_settings(cfg).pipeline):
        proposals = cfg.model.train_cfg.rpn_proposal.max_per_img
        limits['model.train_cfg.rpn_proposal.max_per_img'] = proposals
    densest = truth.cases[int(counts.argmax())].name if len(counts) else '-'
    top = int(counts.max(initial=0))
    for where, limit in limits.items():
        n_images = int((counts > limit).sum())
        n_lost = int(np.maximum(counts - limit, 0).sum())
        if n_images:
            yield warn(
                'caps',
                f'{where}={limit}: {n_images} images have more cells, the densest {top} '
                f'({densest}); {n_lost} of {counts.sum()} cells cannot be found '
                f'({100 * n_lost / max(counts.sum(), 1):.2f} %); expected at least {top}; raise it',
            )
    if all(top <= limit for limit in limits.values()):
        yield ok(
            'caps',
            f'the densest image has {top} cells ({densest}), the lowest cap is '
            f'{min(limits.values())}',
        )
    yield from _check_evaluator(cfg)


def _check_evaluator(cfg: Config) -> Iterator[Line]:
    rcnn = cfg.model.test_cfg.rcnn
    if rcnn.score_thr > HIGH_SCORE_THR:
        yield warn(
            'score threshold',
            f'model.test_cfg.rcnn.score_thr={rcnn.score_thr:g} cuts the tail that average '
            f'precision counts; expected at most {HIGH_SCORE_THR}; lower it, choose one afterwards',
        )
    else:
        yield ok('score threshold', f'score_thr={rcnn.score_thr:g}')
    for name in ('val_evaluator', 'test_evaluator'):
        evaluator = cfg.get(name) or {}
        if evaluator.get('type') != 'CellMetric':
            yield warn('evaluator', f'{name} is {evaluator.get("type")}; expected CellMetric')
            continue
        for key in ('max_per_img', 'score_thr'):
            if evaluator.get(key) is not None and evaluator[key] != rcnn[key]:
                yield warn(
                    'evaluator',
                    f'{name}.{key}={evaluator[key]:g}, the model has {rcnn[key]:g}; the report on '
                    'truncation would be wrong; set both alike',
                )


# ---- pipelines


def check_meta_keys(cfg: Config) -> Iterator[Line]:
    """Check that scores and messages get the keys they need."""
    n_fine = 0
    for name in ('train', 'val', 'test'):
        packing = [
            step
            for step in dataset_settings(cfg, f'{name}_dataloader').pipeline
            if str(step.get('type', '')).startswith('Pack')
        ]
        has = set(packing[-1].get('meta_keys', ())) if packing else set()
        lacking = [
            key for key in NEEDED_META['train' if name == 'train' else 'test'] if key not in has
        ]
        if lacking:
            yield error(
                'meta keys',
                f'{name}_dataloader: the pipeline packs no {", ".join(lacking)}; scores and '
                'messages need them; add them to meta_keys of PackDetInputs',
            )
        else:
            n_fine += 1
    if n_fine:
        yield ok('meta keys', f'{n_fine} pipelines pack what scores and messages need')


def check_colours(cfg: Config, truth: Truth) -> Iterator[Line]:
    """Compare the hue of nuclei under both orders of red and blue.

    Cells of H&E that are read rightly take more red than blue out of the light, see ``data.stain``.
    """
    data = DataSettings.from_config(cfg)
    swapped, value_range = data.red_blue_swapped, data.value_range()
    filled = [case for case, one in zip(truth.cases, truth.sets, strict=True) if len(one)]
    chosen = filled[:: max(1, len(filled) // N_HUE_CASES)]
    gaps = np.array([red_minus_blue(case, value_range) for case in chosen])
    gaps = -gaps if swapped else gaps
    if not len(gaps):
        return
    share = float((gaps > 0).mean())
    text = (
        f'red_blue_swapped={swapped}: in {100 * share:.0f} % of {len(gaps)} images cells absorb '
        f'more red (less blue) than their surroundings, as haematoxylin does '
        f'({np.median(gaps):+.3f} optical density)'
    )
    if share < 0.5:
        yield warn(
            'colours',
            f'{text}; expected most of them if this is H&E; set red_blue_swapped={not swapped} in '
            'every LoadCellImage, and look at an image to be sure',
        )
    else:
        yield ok('colours', text)


def red_minus_blue(case: Case, value_range: ValueRange | None = None) -> float:
    """Return :func:`stain.red_minus_blue` of a case's cells, channels as stored."""
    image = read_image(case.image_path, value_range=value_range)
    return stain.red_minus_blue(image, (read_label_layers(case).layers > 0).any(axis=0))

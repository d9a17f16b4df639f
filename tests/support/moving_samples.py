"""Samples whose image shows the label map as pixel values, so that what moves alone shows."""

from __future__ import annotations

import random

import mmdet.datasets.transforms  # noqa: F401
import numpy as np
import torch
from mmdet.registry import TRANSFORMS
from mmengine.dataset import Compose

from cellseg_mm.pipeline.label_map_masks import LabelMapMasks

SEEDS = range(8)
HW = (61, 47)


def build(*steps: dict) -> Compose:
    return Compose([TRANSFORMS.build(step) for step in steps])


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (what mmdet's transforms draw from)


def label_map(seed: int, hw: tuple[int, int] = HW, n: int = 25) -> np.ndarray:
    """Touching rectangles and Ls, 1-px cells, cells on the border; ids 1..n, some hidden."""
    rng = np.random.default_rng(seed)
    cells = np.zeros(hw, np.int32)
    for i in range(1, n + 1):
        y, x = rng.integers(0, hw[0]), rng.integers(0, hw[1])
        height, width = rng.integers(1, 13, 2)
        cells[y : y + height, x : x + width] = i
        cells[y : y + height // 2, x : x + width // 2] = 0  # not symmetric, some fall apart
    return cells


def sample(seed: int, hw: tuple[int, int] = HW) -> dict:
    """A sample whose image shows the label map as pixel values."""
    cells = label_map(seed, hw)
    ids = np.unique(cells)[1:]
    masks = LabelMapMasks(cells[None], ids, np.zeros(len(ids), np.int64))
    return {
        'img': np.repeat(cells[..., None], 3, axis=2).astype(np.uint8),
        'img_shape': hw,
        'ori_shape': hw,
        'img_id': seed,
        'gt_masks': masks,
        'gt_bboxes': masks.get_bboxes(),
        'gt_bboxes_labels': (ids % 3).astype(np.int64),
        'gt_ignore_flags': np.zeros(len(ids), bool),
    }


def painted(results: dict) -> np.ndarray:
    """Draw the masks with their ids, by looping over them."""
    masks = results['gt_masks']
    canvas = np.zeros((masks.height, masks.width), np.int32)
    for value, mask in zip(masks.ids, masks, strict=True):
        canvas[mask > 0] = value
    return canvas


def assert_moved_together(results: dict, *, tight: bool, all_kept: bool = True) -> None:
    img, canvas = results['img'], painted(results)
    assert img.shape[:2] == tuple(results['img_shape']) == canvas.shape
    shown = img[..., 0].astype(np.int32)
    if not all_kept:
        shown = np.where(np.isin(shown, results['gt_masks'].ids), shown, 0)
    np.testing.assert_array_equal(shown, canvas)
    np.testing.assert_array_equal(results['gt_bboxes_labels'], results['gt_masks'].ids % 3)
    n = {len(results[key]) for key in ('gt_bboxes', 'gt_masks', 'gt_ignore_flags')}
    assert n == {len(results['gt_bboxes_labels'])}
    if tight:
        wanted = results['gt_masks'].get_bboxes().tensor
        assert torch.equal(results['gt_bboxes'].tensor, wanted)


NEAREST = {'interpolation': 'nearest'}


CROP = {'type': 'RandomCrop', 'crop_size': (30, 41), 'allow_negative_crop': True}


LSJ = (
    {'type': 'RandomResize', 'scale': (64, 64), 'ratio_range': (0.1, 2.0), 'keep_ratio': True},
    {**CROP, 'crop_type': 'absolute_range', 'crop_size': (64, 64), 'recompute_bbox': True},
    {'type': 'FilterAnnotations', 'min_gt_bbox_wh': (1e-2, 1e-2)},
    {'type': 'RandomFlip', 'prob': 0.5},
    {'type': 'PackDetInputs'},
)


def truncation_sample() -> dict:
    cells = np.zeros((10, 20), np.int32)
    cells[0:4, 0:10] = 1  # 40 px, of which the crop below keeps 8 = 20 %
    cells[5:9, 6:12] = 2  # 24 px, keeps 16
    cells[0:2, 18:20] = 3  # keeps 4 of 4
    cells[9, 0:3] = 4  # goes altogether
    results = sample(0, (10, 20))
    masks = LabelMapMasks(cells[None], [1, 2, 3, 4], [0] * 4)
    results.update(gt_masks=masks, gt_bboxes=masks.get_bboxes())
    results['gt_bboxes_labels'] = np.array([1, 2, 0, 1])
    results['gt_ignore_flags'] = np.zeros(4, bool)
    return results

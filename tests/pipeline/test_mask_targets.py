"""pipeline.mask_targets: what the mask head learns, equal to loops and to targets of full masks."""

from __future__ import annotations

import math

import mmdet.models  # noqa: F401
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures.mask import BitmapMasks, mask_target
from mmengine.config import Config
from mmengine.structures import InstanceData

from cellseg_mm.pipeline.label_map_masks import LabelMapMasks
from cellseg_mm.pipeline.mask_targets import roi_shares
from tests.support import moving_samples as moving
from tests.support.provoking_masks import HW, SEEDS, some_masks, stock

pytestmark = pytest.mark.mm


def roi_align_by_loops(mask: np.ndarray, box: np.ndarray, out_hw: tuple[int, int]) -> np.ndarray:
    """RoIAlign of one mask with sampling ratio 0, aligned: by its definition, in float64."""
    height, width = mask.shape
    x1, y1 = float(box[0]) - 0.5, float(box[1]) - 0.5
    bin_h, bin_w = float(box[3] - box[1]) / out_hw[0], float(box[2] - box[0]) / out_hw[1]
    n_y, n_x = math.ceil(bin_h), math.ceil(bin_w)
    out = np.zeros(out_hw)
    for row in range(out_hw[0]):
        for column in range(out_hw[1]):
            total = 0.0
            for i in range(n_y):
                for j in range(n_x):
                    y = y1 + row * bin_h + (i + 0.5) * bin_h / n_y
                    x = x1 + column * bin_w + (j + 0.5) * bin_w / n_x
                    total += bilinear(mask, y, x, height, width)
            out[row, column] = total / max(n_y * n_x, 1)
    return out


def bilinear(mask: np.ndarray, y: float, x: float, height: int, width: int) -> float:
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    fy, fx = y - top, x - left
    upper = (1 - fx) * mask[top, left] + fx * mask[top, right]
    lower = (1 - fx) * mask[bottom, left] + fx * mask[bottom, right]
    return (1 - fy) * upper + fy * lower


BOXES = np.array(
    [
        [3.2, 4.1, 17.9, 20.3],
        [0, 0, 29, 37],  # the whole image
        [4, 6, 11, 13],  # whole pixels, one sample per pixel
        [2, 2, 16, 16],  # two per cell: exact ties at one half
        [5.5, 5.5, 6.0, 30.0],  # thinner than a pixel
        [8, 8, 8, 20],  # no width
        [-4, -6, 12, 9],  # leaves the image
        [20, 30, 45, 60],  # leaves it on the other side
        [60, 60, 70, 80],  # outside
        [0.1, 0.1, 0.3, 0.2],
        [27.9, 35.5, 29, 37],
    ],
    dtype=np.float32,
)


@pytest.mark.parametrize('seed', SEEDS[:3])
@pytest.mark.parametrize('out_hw', [(7, 7), (5, 14)])
def test_crop_and_resize_equals_roi_align_by_loops(out_hw, seed: int) -> None:
    masks = some_masks(seed)
    inds = np.random.default_rng(seed).integers(0, len(masks), len(BOXES))
    bitmaps = stock(masks).masks
    wanted = np.stack(
        [roi_align_by_loops(bitmaps[i], box, out_hw) for i, box in zip(inds, BOXES, strict=True)]
    )
    soft = masks.crop_and_resize(BOXES, out_hw, inds, binarize=False)
    assert isinstance(soft, BitmapMasks)
    np.testing.assert_allclose(soft.masks, wanted, atol=1e-5)
    hard = masks.crop_and_resize(BOXES, out_hw, inds).masks
    assert hard.dtype == bool
    decided = np.abs(wanted - 0.5) > 1e-5
    np.testing.assert_array_equal(hard[decided], wanted[decided] >= 0.5)


@pytest.mark.parametrize('seed', SEEDS)
def test_crop_and_resize_equals_bitmaps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = some_masks(seed)
    corners = rng.uniform(-3, 30, (40, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0.5, 30, (40, 2))], axis=1)
    boxes = np.concatenate([boxes, np.rint(boxes), BOXES]).astype(np.float32)  # whole pixels: ties
    inds = rng.integers(0, len(masks), len(boxes))
    soft = stock(masks).crop_and_resize(boxes, (14, 14), inds, 'cpu', binarize=False).masks
    ours = masks.crop_and_resize(boxes, (14, 14), inds, binarize=False)
    np.testing.assert_allclose(ours.masks, soft, atol=1e-5)
    hard = stock(masks).crop_and_resize(boxes, (14, 14), inds, 'cpu').masks
    differs = masks.crop_and_resize(boxes, (14, 14), inds).masks != hard
    assert (np.abs(soft[differs] - 0.5) < 1e-5).all()


@pytest.mark.parametrize('seed', SEEDS[:3])
def test_crop_and_resize_of_a_view_with_padding(seed: int) -> None:
    masks = some_masks(seed)
    box = np.array([2, 3, 27, 33])  # cells are cut at its border, where padding begins
    seen = masks.crop(box).flip().expand(44, 41, 6, 8)
    dense = stock(masks).crop(box).flip().expand(44, 41, 6, 8).masks
    inds = np.arange(len(BOXES))
    wanted = [roi_align_by_loops(dense[i], b, (7, 7)) for i, b in enumerate(BOXES)]
    got = seen.crop_and_resize(BOXES, (7, 7), inds, binarize=False)
    np.testing.assert_allclose(got.masks, np.stack(wanted), atol=1e-5)


def test_exact_ties_count_as_covered() -> None:
    layers = np.zeros((1, 12, 12), np.int32)
    layers[0, :, :3] = 1  # cells of 2 px from column 0: the second one is half covered
    hard = LabelMapMasks(layers, [1], [0]).crop_and_resize(
        np.array([[0, 0, 12, 12]], np.float32), (6, 6), np.array([0])
    )
    assert hard.masks[0].tolist() == [[True, True, False, False, False, False]] * 6


def test_crop_and_resize_takes_tensors_and_layers_on_a_device() -> None:
    masks = some_masks(1)
    inds = np.arange(len(BOXES))
    wanted = masks.crop_and_resize(BOXES, (7, 7), inds).masks
    moved = LabelMapMasks(torch.from_numpy(masks.layers), masks.ids, masks.layer_of)
    for chosen in (moved, masks, masks.flip().flip()):
        got = chosen.crop_and_resize(torch.from_numpy(BOXES), (7, 7), torch.from_numpy(inds))
        np.testing.assert_array_equal(got.masks, wanted)


def test_large_and_small_boxes_share_a_call() -> None:
    masks = some_masks(0, (300, 350), n=20)
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 250, (60, 2))
    side = np.exp(rng.uniform(0, 6, (60, 2)))
    boxes = np.concatenate([corner, corner + side], axis=1).astype(np.float32)
    inds = rng.integers(0, len(masks), 60)
    together = masks.crop_and_resize(boxes, (14, 14), inds, binarize=False).masks
    for i in range(60):
        alone = masks.crop_and_resize(boxes[[i]], (14, 14), inds[[i]], binarize=False).masks
        np.testing.assert_allclose(together[[i]], alone, atol=1e-6)


def test_no_box_and_no_instance_give_no_target() -> None:
    none = np.zeros((0, 4), np.float32)
    assert some_masks(0).crop_and_resize(none, (7, 5), np.zeros(0, int)).masks.shape == (0, 7, 5)
    empty = LabelMapMasks.empty(*HW).crop_and_resize(BOXES, (7, 5), np.zeros(11, int))
    assert empty.masks.shape == (0, 7, 5)


def test_mask_target_of_mmdet_runs_on_it() -> None:
    masks, cfg = some_masks(2), Config({'mask_size': 14})
    inds = torch.tensor([0, 4, 10])
    targets = mask_target([torch.from_numpy(BOXES[:3])], [inds], [masks], cfg)
    boxes = np.clip(BOXES[:3], 0, [[29, 37, 29, 37]]).astype(np.float32)
    wanted = masks.crop_and_resize(boxes, (14, 14), inds).masks
    assert targets.dtype is torch.float32
    np.testing.assert_array_equal(targets.numpy(), wanted)


def test_shares_of_float64_boxes_are_float64() -> None:
    masks = some_masks(2)
    shares = roi_shares(
        masks.view,
        torch.from_numpy(masks.ids[:1]),
        torch.from_numpy(masks.layer_of[:1]),
        torch.tensor([[1.0, 2.0, 9.0, 11.0]], dtype=torch.float64),
        (7, 7),
    )
    assert shares.dtype is torch.float64


def test_mask_head_targets_equal_the_stock_ones() -> None:
    head = MODELS.build({'type': 'mmdet.FCNMaskHead', 'num_classes': 3, 'num_convs': 0})
    cfg = Config({'mask_size': 14})
    rng = np.random.default_rng(0)
    targets = []
    for as_bitmaps in (False, True):
        gts, sampled = [], []
        for seed in (0, 1):
            masks = moving.sample(seed)['gt_masks']
            boxes = masks.get_bboxes().tensor
            rng = np.random.default_rng(seed)
            inds = torch.from_numpy(rng.integers(0, len(masks), 30))
            noise = torch.from_numpy(rng.normal(0, 1.5, (30, 4))).float()
            positives = boxes[inds] + noise
            positives[:, 2:] = torch.maximum(positives[:, 2:], positives[:, :2] + 1)
            sampled.append(InstanceData(pos_priors=positives, pos_assigned_gt_inds=inds))
            if as_bitmaps:
                masks = BitmapMasks(masks.to_ndarray(), masks.height, masks.width)
            gts.append(InstanceData(masks=masks))
        targets.append(head.get_targets(sampled, gts, cfg))
    assert targets[0].shape == (60, 14, 14)
    assert 0.2 < targets[0].mean() < 0.9
    assert (targets[0] != targets[1]).float().mean() < 1e-4  # only near ties of float32 sums

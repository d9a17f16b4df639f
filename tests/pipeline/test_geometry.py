"""pipeline.geometry: image, masks and boxes move together, in mmdet's transforms and in our own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks

from cellseg_mm.pipeline.geometry import ClassAwareCrop, DropTruncatedInstances, RandomRotate90
from tests.support.moving_samples import (
    CROP,
    HW,
    LSJ,
    NEAREST,
    SEEDS,
    assert_moved_together,
    build,
    sample,
    seed_all,
    truncation_sample,
)

pytestmark = pytest.mark.mm

STOCK = {
    'Resize': ({'type': 'Resize', 'scale': (97, 80), 'keep_ratio': True, **NEAREST}, False),
    'Resize freely': ({'type': 'Resize', 'scale': (33, 90), 'keep_ratio': False, **NEAREST}, False),
    'RandomResize': (
        {
            'type': 'RandomResize',
            'scale': (64, 64),
            'ratio_range': (0.3, 2.0),
            'keep_ratio': True,
            **NEAREST,
        },
        False,
    ),
    'RandomCrop': ({**CROP, 'recompute_bbox': True}, True),
    'flip horizontal': ({'type': 'RandomFlip', 'prob': 1.0, 'direction': 'horizontal'}, True),
    'flip vertical': ({'type': 'RandomFlip', 'prob': 1.0, 'direction': 'vertical'}, True),
    'flip diagonal': ({'type': 'RandomFlip', 'prob': 1.0, 'direction': 'diagonal'}, True),
    'Pad': ({'type': 'Pad', 'size': (70, 90), 'pad_val': {'img': 0}}, True),
    'Pad divisor': ({'type': 'Pad', 'size_divisor': 32, 'pad_val': {'img': 0}}, True),
    'Expand': ({'type': 'Expand', 'prob': 1.0, 'mean': (0, 0, 0), 'to_rgb': False}, True),
    'Rotate': ({'type': 'Rotate', 'prob': 1.0, 'img_border_value': 0, **NEAREST}, False),
    'ShearX': ({'type': 'ShearX', 'prob': 1.0, 'img_border_value': 0, **NEAREST}, False),
    'ShearY': ({'type': 'ShearY', 'prob': 1.0, 'img_border_value': 0, **NEAREST}, False),
    'TranslateX': ({'type': 'TranslateX', 'prob': 1.0, 'img_border_value': 0, **NEAREST}, False),
    'TranslateY': ({'type': 'TranslateY', 'prob': 1.0, 'img_border_value': 0, **NEAREST}, False),
    'MinIoURandomCrop': ({'type': 'MinIoURandomCrop', 'min_ious': (0.1, 0.3)}, False),
    'RandomScale': ({'type': 'RandomScale', 'ratio_range': (0.3, 2.0), **NEAREST}, False),
    'RandomRotate90': ({'type': 'RandomRotate90', 'prob': 1.0}, True),
    'ClassAwareCrop': ({'type': 'ClassAwareCrop', 'crop_size': (30, 41)}, True),
}


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize(('step', 'tight'), STOCK.values(), ids=STOCK)
def test_joint_motion(step: dict, tight: bool, seed: int) -> None:
    seed_all(seed)
    results = build(step)(sample(seed))
    assert_moved_together(results, tight=tight, all_kept='MinIoU' not in step['type'])


@pytest.mark.parametrize('seed', SEEDS)
def test_chain_of_many(seed: int) -> None:
    seed_all(seed)
    # Boxes of the stock Resize are scaled, not recomputed; the crop recomputes them.
    names = ('RandomResize', 'flip diagonal', 'RandomRotate90', 'Rotate', 'RandomCrop', 'Pad')
    results = build(*(STOCK[name][0] for name in names))(sample(seed))
    assert_moved_together(results, tight=True, all_kept=False)


@pytest.mark.parametrize('by_mask', [False, True])
def test_filter_annotations(by_mask: bool) -> None:
    results = sample(1)
    areas = results['gt_masks'].areas
    step = {
        'type': 'FilterAnnotations',
        'by_mask': by_mask,
        'by_box': not by_mask,
        'min_gt_mask_area': 20,
        'min_gt_bbox_wh': (4, 4),
    }
    filtered = build(step)(results)
    assert 0 < len(filtered['gt_masks']) < len(areas)
    assert_moved_together(filtered, tight=True, all_kept=False)
    if by_mask:
        assert filtered['gt_masks'].areas.tolist() == areas[areas >= 20].tolist()


@pytest.mark.parametrize('seed', range(20))
def test_large_scale_jitter_equals_the_stock_pipeline(seed: int) -> None:
    packed = []
    for as_bitmaps in (False, True):
        results = sample(seed)
        if as_bitmaps:
            masks = results['gt_masks'].to_ndarray()
            results['gt_masks'] = BitmapMasks(masks, *masks.shape[1:])
        seed_all(seed)
        packed.append(build(*LSJ)(results))
    ours, stock = packed
    if ours is None:  # nothing was left for either
        assert stock is None
        return
    assert torch.equal(ours['inputs'], stock['inputs'])
    got, wanted = ours['data_samples'].gt_instances, stock['data_samples'].gt_instances
    assert torch.equal(got.bboxes.tensor, wanted.bboxes.tensor)
    assert torch.equal(got.labels, wanted.labels)
    np.testing.assert_array_equal(got.masks.to_ndarray(), wanted.masks.to_ndarray())


def test_four_quarter_turns_are_the_identity() -> None:
    before, results = sample(3), sample(3)
    for _ in range(4):
        results = RandomRotate90().turn(results, 1)
    np.testing.assert_array_equal(results['img'], before['img'])
    np.testing.assert_array_equal(results['gt_masks'].to_ndarray(), before['gt_masks'].to_ndarray())
    assert torch.equal(results['gt_bboxes'].tensor, before['gt_bboxes'].tensor)
    np.testing.assert_allclose(results['homography_matrix'], np.eye(3))


def test_quarter_turn_by_hand() -> None:
    results = sample(0, (5, 9))
    results['gt_bboxes'] = HorizontalBoxes(torch.tensor([[1.0, 0.0, 4.0, 2.5]]))
    turned = RandomRotate90().turn(results, 1)
    # Counter-clockwise: the right edge (x = 9) becomes the top, so y' = 9 - x and x' = y.
    assert turned['gt_bboxes'].tensor.tolist() == [[0.0, 5.0, 2.5, 8.0]]
    assert turned['img_shape'] == (9, 5)
    corner = turned['homography_matrix'] @ np.array([4.0, 0.0, 1.0])
    assert corner.tolist() == [0.0, 5.0, 1.0]


def test_rotate90_draws_all_turns_and_none_at_zero() -> None:
    rng = np.random.default_rng(0)
    assert {RandomRotate90(prob=1.0).draw(rng) for _ in range(60)} == {1, 2, 3}
    assert {RandomRotate90(prob=0.0).draw(rng) for _ in range(60)} == {0}
    results = RandomRotate90(prob=0.0)(sample(0))
    np.testing.assert_array_equal(results['img'], sample(0)['img'])


def test_class_aware_crop_keeps_the_rare_class() -> None:
    boxes = np.zeros((101, 4), np.int64)
    boxes[:100] = [2, 2, 8, 8]
    boxes[100] = [90, 90, 96, 97]
    class_ids = np.array([0] * 100 + [3])
    crop, rng = ClassAwareCrop(crop_size=20), np.random.default_rng(0)
    n_rare = 0
    for _ in range(300):
        top, left = crop.draw(rng, (100, 110), class_ids, boxes)
        assert 0 <= top <= 80
        assert 0 <= left <= 90
        n_rare += top <= 93 < top + 20 and left <= 93 < left + 20
    # The rare class has weight 1, the common one 1 / 100: 99 %. A random crop: 8 * 17 / (81 * 91).
    assert n_rare > 280
    plain = ClassAwareCrop(crop_size=20, class_aware_prob=0.0)
    assert {plain.draw(rng, (100, 110), class_ids, boxes) for _ in range(9)} != {(0, 0)}


def test_class_aware_crop_falls_back_and_keeps_small_images() -> None:
    rng = np.random.default_rng(0)
    nothing = np.zeros(0, np.int64), np.zeros((0, 4), np.int64)
    tops = {ClassAwareCrop(crop_size=10).draw(rng, (30, 8), *nothing) for _ in range(200)}
    assert tops == {(top, 0) for top in range(21)}
    results = ClassAwareCrop(crop_size=(500, 20))(sample(2))
    assert results['img'].shape == (HW[0], 20, 3)
    assert_moved_together(results, tight=True)


class CropAtEight:
    """Columns from 8 on, through the same code as ClassAwareCrop."""

    def __call__(self, results: dict) -> dict:
        return ClassAwareCrop(crop_size=(10, 12)).cut(results, 0, 8)


@pytest.mark.parametrize(('min_share', 'kept'), [(0.2, [1, 2, 3]), (0.21, [2, 3]), (0.7, [3])])
def test_slivers_are_dropped_and_counted(min_share: float, kept: list[int]) -> None:
    drop = DropTruncatedInstances(crop=CROP, min_share=min_share)
    drop.crop = CropAtEight()
    results = drop(truncation_sample())
    assert results['gt_masks'].ids.tolist() == kept
    assert results['n_truncated'] == 3 - len(kept)
    assert len(results['gt_bboxes']) == len(results['gt_bboxes_labels']) == len(kept)
    ignoring = DropTruncatedInstances(crop=CROP, min_share=min_share, as_ignored=True)
    ignoring.crop = CropAtEight()
    results = ignoring(truncation_sample())
    assert results['gt_masks'].ids[~results['gt_ignore_flags']].tolist() == kept


def test_drop_truncated_runs_the_stock_crop() -> None:
    seed_all(0)
    step = {
        'type': 'DropTruncatedInstances',
        'crop': {**CROP, 'recompute_bbox': True},
        'min_share': 0.99,
    }
    results = build(step)(sample(5))
    assert results['n_truncated'] > 0
    assert_moved_together(results, tight=True, all_kept=False)

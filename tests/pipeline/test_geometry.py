"""Transforms: image, masks and boxes move together, in mmdet's transforms and in our own."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import tifffile

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

import cellseg_mm  # noqa: E402, F401, I001  (before mmdet: gives it NMS and RoIAlign)
import mmdet.datasets.transforms  # noqa: E402
import mmdet.models  # noqa: E402, F401
from mmdet.registry import MODELS, TRANSFORMS  # noqa: E402
from mmdet.structures.bbox import HorizontalBoxes  # noqa: E402
from mmdet.structures.mask import BitmapMasks  # noqa: E402
from mmdet.visualization import DetLocalVisualizer  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.dataset import Compose  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

from cellseg_mm.core.errors import ConfigError, LabelMapError  # noqa: E402
from cellseg_mm.pipeline.label_map_masks import LabelMapMasks  # noqa: E402
from cellseg_mm.pipeline.geometry import ClassAwareCrop, DropTruncatedInstances, RandomRotate90  # noqa: E402
from cellseg_mm.pipeline.colour import STAINS_RGB, BlurNoise, HEDJitter, RandomBlurNoise, restain  # noqa: E402
from cellseg_mm.pipeline.copy_paste import LabelMapCopyPaste, Paste  # noqa: E402
from cellseg_mm.pipeline.loading import LoadCellImage, LoadLabelMaps  # noqa: E402

pytestmark = pytest.mark.mm

SEEDS = range(8)
HW = (61, 47)


@pytest.fixture(autouse=True)
def _scope() -> None:
    init_default_scope('mmdet')  # as the Runner does: RandomResize builds its Resize by name


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


LSJ = (
    {'type': 'RandomResize', 'scale': (64, 64), 'ratio_range': (0.1, 2.0), 'keep_ratio': True},
    {**CROP, 'crop_type': 'absolute_range', 'crop_size': (64, 64), 'recompute_bbox': True},
    {'type': 'FilterAnnotations', 'min_gt_bbox_wh': (1e-2, 1e-2)},
    {'type': 'RandomFlip', 'prob': 0.5},
    {'type': 'PackDetInputs'},
)


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


def packed_pair() -> list[dict]:
    return [build(LSJ[-1])(sample(seed, hw)) for seed, hw in ((0, HW), (1, (40, 70)))]


def test_data_preprocessor_pads_masks() -> None:
    packed = packed_pair()
    wanted = [p['data_samples'].gt_instances.masks.to_ndarray() for p in packed]
    preprocessor = MODELS.build(
        {
            'type': 'DetDataPreprocessor',
            'mean': [0, 0, 0],
            'std': [1, 1, 1],
            'pad_size_divisor': 32,
            'pad_mask': True,
            'batch_augments': [
                {'type': 'BatchFixedSizePad', 'size': (128, 160), 'pad_mask': True},
            ],
        }
    )
    batch = {
        'inputs': [p['inputs'] for p in packed],
        'data_samples': [p['data_samples'] for p in packed],
    }
    out = preprocessor(batch, training=True)
    assert out['inputs'].shape == (2, 3, 128, 160)
    for image, data_sample, before in zip(out['inputs'], out['data_samples'], wanted, strict=True):
        masks = data_sample.gt_instances.masks
        assert type(masks) is LabelMapMasks
        after = masks.to_ndarray()
        assert after.shape[1:] == (128, 160)
        np.testing.assert_array_equal(after[:, : before.shape[1], : before.shape[2]], before)
        assert after.sum() == before.sum()
        shown = sum(mask * int(value) for mask, value in zip(after, masks.ids, strict=True))
        np.testing.assert_array_equal(image[0].numpy(), shown)


def test_mask_head_targets_equal_the_stock_ones() -> None:
    head = MODELS.build({'type': 'FCNMaskHead', 'num_classes': 3, 'num_convs': 0})
    cfg = Config({'mask_size': 14})
    rng = np.random.default_rng(0)
    targets = []
    for as_bitmaps in (False, True):
        gts, sampled = [], []
        for seed in (0, 1):
            masks = sample(seed)['gt_masks']
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


def test_visualizer_draws_it() -> None:
    packed = packed_pair()[0]
    data_sample = packed['data_samples']
    data_sample.gt_instances.bboxes = data_sample.gt_instances.bboxes.tensor
    image = np.zeros((*HW, 3), np.uint8)
    drawn = []
    for as_bitmaps in (False, True):
        visualizer = DetLocalVisualizer()
        visualizer.dataset_meta = {'classes': ('a', 'b', 'c'), 'palette': [(255, 0, 0)] * 3}
        if as_bitmaps:
            masks = data_sample.gt_instances.masks.to_ndarray()
            data_sample.gt_instances.masks = BitmapMasks(masks, *masks.shape[1:])
        seed_all(0)
        visualizer.add_datasample('x', image, data_sample, draw_pred=False, show=False)
        drawn.append(visualizer.get_image())
    assert drawn[0].any()
    np.testing.assert_array_equal(*drawn)


VIEWS = {
    'whole': lambda a: a,
    'cropped': lambda a: a[2:9, 3:10],
    'mirrored': lambda a: a[:, ::-1],
    'upside down': lambda a: a[::-1],
    'both, cropped': lambda a: a[1:, 2:][::-1, ::-1],
    'one column': lambda a: a[:, 4:5],
    'one column mirrored': lambda a: a[:, 4:5][:, ::-1],
    'turned': lambda a: a.transpose(1, 0, 2),
    'float': lambda a: a.astype(np.float32)[:, ::-1],
}


@pytest.mark.parametrize('view', VIEWS.values(), ids=VIEWS)
def test_packing_equals_the_stock_one(view) -> None:
    img = view(np.random.default_rng(0).integers(0, 256, (13, 12, 3)).astype(np.uint8))
    results = {**sample(0), 'img': img}
    ours, stock = (build({'type': t})({**results}) for t in ('PackCellInputs', 'PackDetInputs'))
    assert torch.equal(ours['inputs'], stock['inputs'])
    assert ours['inputs'].dtype == stock['inputs'].dtype
    assert ours['inputs'].is_contiguous()
    assert ours['data_samples'].metainfo == stock['data_samples'].metainfo
    got, wanted = ours['data_samples'].gt_instances, stock['data_samples'].gt_instances
    assert torch.equal(got.bboxes.tensor, wanted.bboxes.tensor)
    np.testing.assert_array_equal(got.masks.masks, wanted.masks.masks)


# ---- loading


def write_case(folder, img: np.ndarray, maps: dict[int, np.ndarray]) -> dict:
    tifffile.imwrite(folder / 'image.tif', img)
    for class_id, cells in maps.items():
        tifffile.imwrite(folder / f'class{class_id + 1}.tif', cells)
    return {
        'img_path': str(folder / 'image.tif'),
        'label_paths': {k: str(folder / f'class{k + 1}.tif') for k in maps},
        'img_id': 7,
    }


@pytest.mark.parametrize('swapped', [False, True])
def test_image_is_bgr(tmp_path, swapped: bool) -> None:
    red = np.zeros((4, 6, 3), np.uint8)
    red[..., 2 if swapped else 0] = 200
    results = LoadCellImage(red_blue_swapped=swapped)(write_case(tmp_path, red, {}))
    assert results['img'][0, 0].tolist() == [0, 0, 200]
    assert results['img'].flags.c_contiguous
    assert results['img_shape'] == results['ori_shape'] == (4, 6)


def test_image_as_float(tmp_path) -> None:
    img = np.full((4, 6, 3), 9, np.uint8)
    results = LoadCellImage(to_float32=True)(write_case(tmp_path, img, {}))
    assert results['img'].dtype == np.float32
    assert results['img'].max() == 9


def test_label_maps_become_ground_truth(tmp_path) -> None:
    first, third = np.zeros((5, 7), np.float64), np.zeros((5, 7), np.float64)
    first[0:2, 0:3], first[4, 6] = 4, 9
    third[1:4, 2:6] = 2  # overlaps id 4 in one pixel
    case = write_case(tmp_path, np.zeros((5, 7, 3), np.uint8), {0: first, 2: third})
    results = LoadLabelMaps()(LoadCellImage()(case))
    wanted = np.stack([first == 4, first == 9, third == 2])
    np.testing.assert_array_equal(results['gt_masks'].to_ndarray(), wanted)
    assert results['gt_bboxes'].tensor.tolist() == [[0, 0, 3, 2], [6, 4, 7, 5], [2, 1, 6, 4]]
    assert isinstance(results['gt_bboxes'], HorizontalBoxes)
    assert results['gt_bboxes_labels'].tolist() == [0, 0, 2]
    assert results['gt_bboxes_labels'].dtype == np.int64
    assert results['gt_ignore_flags'].tolist() == [False] * 3


def test_remembered_label_maps_are_the_same_and_never_stale(tmp_path) -> None:
    cells = label_map(1).astype(np.uint16)
    other = np.zeros(HW, np.uint16)
    other[3:30, 2:20] = 999  # overlaps: two layers
    case = LoadCellImage()(write_case(tmp_path, np.zeros((*HW, 3), np.uint8), {0: cells, 1: other}))
    load, fresh = LoadLabelMaps(), LoadLabelMaps(cache_mb=0)
    first, again, wanted = (step({**case}) for step in (load, load, fresh))
    assert (len(load.cache), len(fresh.cache)) == (1, 0)
    for got in (first, again):
        np.testing.assert_array_equal(got['gt_masks'].layers, wanted['gt_masks'].layers)
        np.testing.assert_array_equal(got['gt_masks'].areas, wanted['gt_masks'].areas)
        np.testing.assert_array_equal(got['gt_bboxes_labels'], wanted['gt_bboxes_labels'])
        assert torch.equal(got['gt_bboxes'].tensor, wanted['gt_bboxes'].tensor)
        got['gt_masks'].layers[:] = 0  # what a caller does to its sample must not come back
        got['gt_bboxes_labels'][:] = 9
    np.testing.assert_array_equal(load({**case})['gt_masks'].areas, wanted['gt_masks'].areas)

    write_case(tmp_path, np.zeros((*HW, 3), np.uint8), {1: np.rot90(other, 2)})
    changed = load({**case})
    assert len(load.cache) == 1
    np.testing.assert_array_equal(changed['gt_masks'].layers, fresh({**case})['gt_masks'].layers)
    assert (changed['gt_masks'].layers != wanted['gt_masks'].layers).any()
    (tmp_path / 'class2.tif').unlink()
    with pytest.raises(LabelMapError, match='class2'):
        load({**case})


def test_cache_keeps_to_its_memory(tmp_path) -> None:
    cases = []
    for seed in range(4):
        folder = tmp_path / str(seed)
        folder.mkdir()
        maps = {0: label_map(seed).astype(np.uint16)}
        cases.append(LoadCellImage()(write_case(folder, np.zeros((*HW, 3), np.uint8), maps)))
    load = LoadLabelMaps()
    sizes = []
    for case in cases:
        before = load.cache.n_bytes
        load({**case})
        sizes.append(load.cache.n_bytes - before)
    assert min(sizes) > 0
    tight = LoadLabelMaps(cache_mb=(sizes[2] + sizes[3]) / 2**20)
    for case in cases:
        tight({**case})
    assert len(tight.cache) == 2
    assert tight.cache.n_bytes == sizes[2] + sizes[3]
    assert len(pickle.loads(pickle.dumps(tight)).cache) == 0
    with pytest.raises(ConfigError, match='cache_mb'):
        LoadLabelMaps(cache_mb=-1)


def test_image_without_cells_goes_through_the_pipeline(tmp_path) -> None:
    case = write_case(tmp_path, np.zeros((30, 40, 3), np.uint8), {})
    packed = build({'type': 'LoadCellImage'}, {'type': 'LoadLabelMaps'}, *LSJ)(case)
    instances = packed['data_samples'].gt_instances
    assert len(instances.masks) == len(instances.bboxes) == len(instances.labels) == 0


def test_label_map_of_another_size_is_named(tmp_path) -> None:
    case = write_case(tmp_path, np.zeros((5, 7, 3), np.uint8), {1: np.ones((7, 5), np.uint16)})
    with pytest.raises(LabelMapError, match=r'class2\.tif.*must match'):
        LoadLabelMaps()(LoadCellImage()(case))


# ---- RandomRotate90


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


# ---- ClassAwareCrop


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


# ---- DropTruncatedInstances


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


# ---- colour


def test_restain_is_the_identity_without_a_change() -> None:
    values = np.arange(256, dtype=np.uint8)
    img = np.stack([values, values[::-1], np.roll(values, 99)], axis=1)[None]
    np.testing.assert_array_equal(restain(img, np.ones(3), np.zeros(3)), img)


def test_restain_by_hand() -> None:
    # A pixel that is pure haematoxylin of amount 1; twice as much must square its transmission.
    stain = STAINS_RGB[0] / np.linalg.norm(STAINS_RGB[0])
    pixel_rgb = np.rint(256 * np.exp(-stain) - 1)
    wanted_rgb = 256 * np.exp(-2 * stain) - 1
    got = restain(pixel_rgb[None, None, ::-1].astype(np.uint8), np.array([2.0, 1, 1]), np.zeros(3))
    assert np.abs(got[0, 0, ::-1] - wanted_rgb).max() <= 2  # the input was rounded
    more_eosin = restain(got, np.ones(3), np.array([0, 0.3, 0]))
    loss = np.log((got[0, 0, ::-1] + 1.0) / (more_eosin[0, 0, ::-1] + 1.0))
    eosin = STAINS_RGB[1] / np.linalg.norm(STAINS_RGB[1])
    np.testing.assert_allclose(loss, 0.3 * eosin, atol=0.02)
    assert loss[1] > loss[0]  # eosin takes green: channels are not swapped


def test_hed_jitter_draws_within_sigma_and_nothing_at_zero() -> None:
    rng = np.random.default_rng(0)
    drawn = [HEDJitter(prob=1.0, sigma=0.1).draw(rng) for _ in range(50)]
    scales, shifts = np.array([d[0] for d in drawn]), np.array([d[1] for d in drawn])
    assert 0.08 < np.abs(scales - 1).max() <= 0.1
    assert 0.08 < np.abs(shifts).max() <= 0.1
    results = sample(1)
    img = results['img']
    assert HEDJitter(prob=0.0)(results)['img'] is img
    assert (HEDJitter(prob=1.0, sigma=0.2)(results)['img'] != img).any()


def test_blur_and_noise_have_the_stated_strength() -> None:
    img = np.full((200, 200, 3), 128, np.uint8)
    noisy = RandomBlurNoise.degrade(img, BlurNoise(0, 5.0, seed=3))
    assert abs(noisy.std() - 5.0) < 0.2
    assert abs(noisy.mean() - 128) < 0.2
    np.testing.assert_array_equal(noisy, RandomBlurNoise.degrade(img, BlurNoise(0, 5.0, seed=3)))
    dot = np.zeros((41, 41, 3), np.uint8)
    dot[20, 20] = 255
    spread = RandomBlurNoise.degrade(dot, BlurNoise(2.0, 0, seed=0))[20, 20, 0]
    assert abs(spread - 255 / (2 * np.pi * 2.0**2)) < 1  # height of a Gaussian of sigma 2
    assert RandomBlurNoise.degrade(img, BlurNoise(0, 0, seed=0)) is img


def test_blur_noise_probabilities() -> None:
    rng = np.random.default_rng(0)
    never = [RandomBlurNoise(blur_prob=0, noise_prob=0).draw(rng) for _ in range(20)]
    assert {(d.blur_sigma, d.noise_sigma) for d in never} == {(0.0, 0.0)}
    step = RandomBlurNoise(blur_prob=1, noise_prob=1, blur_sigma=(1, 2), noise_sigma=(3, 4))
    always = [step.draw(rng) for _ in range(20)]
    assert all(1 <= d.blur_sigma <= 2 and 3 <= d.noise_sigma <= 4 for d in always)
    assert (step(sample(0))['img'] != sample(0)['img']).any()


# ---- LabelMapCopyPaste


def test_paste_by_hand() -> None:
    target, source = truncation_sample(), sample(4)
    target['img'] = np.zeros((10, 20, 3), np.uint8)
    heights = source['gt_masks'].boxes_xyxy[:, 3] - source['gt_masks'].boxes_xyxy[:, 1]
    row = int(np.argmax(np.where(heights <= 10, source['gt_masks'].areas, 0)))
    x1, y1, x2, y2 = source['gt_masks'].boxes_xyxy[row]
    cell = source['gt_masks'].to_ndarray()[row, y1:y2, x1:x2].astype(bool)
    results = LabelMapCopyPaste(min_share=0.5).paste(target, source, [Paste(row, 0, 0)])

    before = truncation_sample()['gt_masks'].to_ndarray()
    pasted = np.zeros((10, 20), bool)
    pasted[: cell.shape[0], : cell.shape[1]] = cell
    wanted = [mask & ~pasted for mask in before] + [pasted]
    enough = [w.sum() >= 0.5 * b.sum() for w, b in zip(wanted, [*before, pasted], strict=True)]
    wanted = np.array([w for w, keep in zip(wanted, enough, strict=True) if keep])
    np.testing.assert_array_equal(results['gt_masks'].to_ndarray(), wanted)
    assert results['n_covered'] == enough.count(False) > 0
    assert results['n_pasted'] == 1
    assert results['gt_bboxes_labels'][-1] == source['gt_bboxes_labels'][row]
    assert torch.equal(results['gt_bboxes'].tensor, results['gt_masks'].get_bboxes().tensor)
    value = source['gt_masks'].ids[row]
    np.testing.assert_array_equal(
        results['img'], np.where(pasted, value, 0)[..., None].repeat(3, 2)
    )


@pytest.mark.parametrize('source', ['same', 'other'])
@pytest.mark.parametrize('seed', SEEDS)
def test_copy_paste_equals_painting_by_loops(seed: int, source: str) -> None:
    results, other = sample(seed), sample(seed + 50, (33, 90))
    giver = {**(results if source == 'same' else other)}
    step = LabelMapCopyPaste(source=source, max_pasted=12, min_share=0.3)
    masks = giver['gt_masks']
    pastes = step.draw(np.random.default_rng(seed), HW, giver['gt_bboxes_labels'], masks.boxes_xyxy)
    canvas, img = results['gt_masks'].to_ndarray().astype(bool), results['img'].copy()
    bitmaps = list(canvas)
    for paste in pastes:
        new = np.zeros(HW, bool)
        x1, y1, x2, y2 = masks.boxes_xyxy[paste.row]
        for y in range(y1, y2):
            for x in range(x1, x2):
                if masks.layers[0, y, x] == masks.ids[paste.row]:
                    at = paste.top + y - y1, paste.left + x - x1
                    new[at] = True
                    img[at] = giver['img'][y, x] if source == 'other' else sample(seed)['img'][y, x]
        bitmaps = [mask & ~new for mask in bitmaps] + [new]
    areas = [*results['gt_masks'].areas, *(masks.areas[p.row] for p in pastes)]
    kept = [m for m, a in zip(bitmaps, areas, strict=True) if m.any() and m.sum() >= 0.3 * a]
    got = step.paste(results, results if source == 'same' else other, pastes)
    np.testing.assert_array_equal(got['gt_masks'].to_ndarray(), np.array(kept))
    np.testing.assert_array_equal(got['img'], img)


def test_paste_covers_every_layer() -> None:
    bitmaps = np.zeros((2, 9, 9), bool)
    bitmaps[0, :, :6] = bitmaps[1, :, 4:] = True  # they overlap, so they lie in two layers
    results = {**sample(0, (9, 9)), 'gt_bboxes_labels': np.arange(2)}
    results['gt_masks'] = LabelMapMasks.from_bitmaps(bitmaps)
    results['gt_ignore_flags'] = np.zeros(2, bool)
    cell = {**results, 'gt_masks': LabelMapMasks(np.ones((1, 3, 3)), [1], [0])}
    got = LabelMapCopyPaste(min_share=0).paste(results, cell, [Paste(0, 2, 4)])
    bitmaps[:, 2:5, 4:7] = False
    np.testing.assert_array_equal(got['gt_masks'].to_ndarray()[:2], bitmaps)
    assert got['gt_masks'].areas.tolist()[2] == 9


def test_copy_paste_does_not_touch_shared_layers() -> None:
    results = sample(1)
    shared, before = results['gt_masks'].layers, results['gt_masks'].layers.copy()
    img, img_before = results['img'], results['img'].copy()
    seed_all(3)
    pasted = LabelMapCopyPaste(max_pasted=15)(results)
    assert pasted['n_pasted'] > 0
    np.testing.assert_array_equal(shared, before)
    np.testing.assert_array_equal(img, img_before)


def test_copy_paste_into_an_image_without_cells() -> None:
    empty = sample(0)
    empty.update(
        gt_masks=LabelMapMasks.empty(*HW),
        gt_bboxes=LabelMapMasks.empty(*HW).get_bboxes(),
        gt_bboxes_labels=np.zeros(0, np.int64),
        gt_ignore_flags=np.zeros(0, bool),
        mix_results=[sample(1)],
    )
    seed_all(1)
    results = LabelMapCopyPaste(source='other', max_pasted=9)(empty)
    assert len(results['gt_masks']) == len(results['gt_bboxes_labels']) > 0
    unchanged = LabelMapCopyPaste(max_pasted=0)(sample(2))
    np.testing.assert_array_equal(unchanged['gt_masks'].to_ndarray(), sample(2)['gt_masks'].masks)


def test_copy_paste_runs_in_mmdet_mix_data_set() -> None:
    class Samples:
        metainfo = {}

        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> dict:
            return sample(index)

        def full_init(self) -> None: ...

    from mmdet.datasets import MultiImageMixDataset

    step = {'type': 'LabelMapCopyPaste', 'source': 'other', 'max_pasted': 10}
    mixed = MultiImageMixDataset.__new__(MultiImageMixDataset)
    mixed.dataset, mixed._skip_type_keys, mixed.max_refetch = Samples(), None, 3
    mixed.pipeline, mixed.pipeline_types = [TRANSFORMS.build(step)], ['LabelMapCopyPaste']
    mixed.num_samples = 5
    seed_all(0)
    n_pasted = 0
    for index in range(5):
        results = mixed[index]
        n_pasted += results['n_pasted']
        assert 'mix_results' not in results
        wanted = results['gt_masks'].get_bboxes().tensor
        assert torch.equal(results['gt_bboxes'].tensor, wanted)
    assert n_pasted > 5


# ---- errors and reproducibility

BAD = {
    r'RandomRotate90\.prob': lambda: RandomRotate90(prob=1.2),
    r'crop_size': lambda: ClassAwareCrop(crop_size=0),
    r'class_aware_prob': lambda: ClassAwareCrop(crop_size=9, class_aware_prob=-1),
    r'min_share': lambda: DropTruncatedInstances(crop=CROP, min_share=2),
    r'HEDJitter\.sigma': lambda: HEDJitter(sigma=-0.1),
    r'noise_sigma': lambda: RandomBlurNoise(noise_sigma=(3, 1)),
    r'source': lambda: LabelMapCopyPaste(source='elsewhere'),
    r'max_pasted': lambda: LabelMapCopyPaste(max_pasted=-1),
    r'MultiImageMixDataset': lambda: LabelMapCopyPaste(source='other')(sample(0)),
    r'put LoadLabelMaps': lambda: ClassAwareCrop(crop_size=9)(
        {**sample(0), 'gt_masks': BitmapMasks.random(3, *HW)}
    ),
}


@pytest.mark.parametrize(('message', 'call'), BAD.items())
def test_wrong_settings_are_named(message: str, call) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_same_seed_same_sample() -> None:
    pipeline = build(
        {'type': 'RandomRotate90'},
        {'type': 'ClassAwareCrop', 'crop_size': (30, 30)},
        {'type': 'LabelMapCopyPaste'},
        {'type': 'HEDJitter', 'prob': 1.0},
        {'type': 'RandomBlurNoise', 'blur_prob': 0.5, 'noise_prob': 1.0},
    )
    drawn = []
    for seed in (4, 4, 5):
        seed_all(seed)
        drawn.append(pipeline(sample(2))['img'])
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert drawn[0].shape != drawn[2].shape or (drawn[0] != drawn[2]).any()
    text = repr(pipeline)
    assert 'ClassAwareCrop(crop_size=(30, 30)' in text
    assert 'max_pasted=20' in text

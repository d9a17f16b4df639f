"""pipeline.label_map_masks against mmdet's BitmapMasks of the same instances and slow loops."""

from __future__ import annotations

import copy
import pickle

import cv2
import mmdet.models  # noqa: F401
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData

from cellseg_mm.pipeline.label_map_masks import LabelMapMasks
from cellseg_mm.pipeline.layer_view import LayerView
from tests.support import moving_samples as moving
from tests.support.provoking_masks import HW, SEEDS, assert_same, some_masks, stock

pytestmark = pytest.mark.mm

EXACT = {
    'resize up': lambda m: m.resize((91, 40)),
    'resize down': lambda m: m.resize((11, 19)),
    'resize to nothing': lambda m: m.resize((2, 1)),
    'rescale by factor': lambda m: m.rescale(0.37),
    'rescale into a size': lambda m: m.rescale((64, 50)),
    'flip horizontal': lambda m: m.flip('horizontal'),
    'flip vertical': lambda m: m.flip('vertical'),
    'flip diagonal': lambda m: m.flip('diagonal'),
    'pad': lambda m: m.pad((40, 33), pad_val=0),
    'pad by nothing': lambda m: m.pad(HW),
    'crop': lambda m: m.crop(np.array([3, 4, 20, 30])),
    'crop clipped': lambda m: m.crop(np.array([-5, 10, 99, 99])),
    'crop to one px': lambda m: m.crop(np.array([7, 8, 7, 8])),
    'expand': lambda m: m.expand(50, 61, 5, 9),
    'translate right': lambda m: m.translate(HW, 4),
    'translate up': lambda m: m.translate(HW, -6, 'vertical'),
    'translate both': lambda m: m.translate(HW, (-3, 5), 'both'),
    'translate into a larger image': lambda m: m.translate((50, 45), 7),
    'translate into a smaller image': lambda m: m.translate((20, 15), 2, 'vertical'),
    'rotate by 180': lambda m: m.rotate(HW, 180),
    'shear by 0': lambda m: m.shear(HW, 0.0),
    'shear by whole px': lambda m: m.shear(HW, 1.0, 'vertical'),
    'several': lambda m: m.flip().crop(np.array([2, 2, 25, 31])).resize((64, 48)).flip('vertical'),
}


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('change', EXACT.values(), ids=EXACT)
def test_exact_geometry_equals_bitmaps(change, seed: int) -> None:
    masks = some_masks(seed)
    # mmdet warps masks as channels of one picture, which not every OpenCV can do: one by one.
    wanted = np.concatenate([change(stock(masks)[i]).to_ndarray() for i in range(len(masks))])
    assert_same(change(masks), BitmapMasks(wanted, *wanted.shape[1:]))


@pytest.mark.parametrize('change', EXACT.values(), ids=EXACT)
def test_geometry_of_no_instance(change) -> None:
    for masks in (LabelMapMasks.empty(*HW), some_masks(0)[np.zeros(0, int)]):
        wanted = change(BitmapMasks([], *HW))
        assert_same(change(masks), wanted)


@pytest.mark.parametrize('k', range(-1, 5))
def test_rotation_by_right_angles(k: int) -> None:
    masks = some_masks(3, (33, 33))
    wanted = np.rot90(stock(masks).masks, k, axes=(1, 2))
    assert_same(masks.rotate90(k), BitmapMasks(wanted, 33, 33))
    # mmdet's angles are clockwise in image coordinates although its docstring says otherwise.
    peer = np.concatenate([stock(masks)[i].rotate((33, 33), -90 * k).masks for i in range(12)])
    assert_same(masks.rotate((33, 33), -90 * k), BitmapMasks(peer, 33, 33))
    np.testing.assert_array_equal(peer, wanted)
    swapped = some_masks(3).rotate90(1)
    assert (swapped.height, swapped.width) == HW[::-1]


INTERPOLATED = {
    'rotate': lambda m: m.rotate((101, 90), 27.3),
    'rotate off centre and scale': lambda m: m.rotate(
        (101, 90), -71, center=(20.0, 31.5), scale=1.4
    ),
    'shear horizontal': lambda m: m.shear((101, 90), 0.31),
    'shear vertical': lambda m: m.shear((101, 90), -0.27, 'vertical'),
    'translate by parts of a px': lambda m: m.translate((101, 90), 3.4),
}


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('change', INTERPOLATED.values(), ids=INTERPOLATED)
def test_interpolated_geometry_differs_on_the_outline_only(change, seed: int) -> None:
    masks = some_masks(seed, (101, 90), n=7)
    got = change(masks).to_ndarray()
    n_different = 0
    for i, ours in enumerate(got):
        theirs = change(stock(masks)[i]).to_ndarray()[0]
        different = ours != theirs
        assert not (different & ~outline(ours) & ~outline(theirs)).any()
        n_different += int(different.sum())
    assert n_different <= 0.15 * got.sum()  # tiny cells, half of them strokes of 1 px


def outline(mask: np.ndarray) -> np.ndarray:
    """Pixels with both values in their 3x3 neighbourhood."""
    kernel = np.ones((3, 3), np.uint8)
    return cv2.dilate(mask, kernel) != cv2.erode(mask, kernel)


def test_interpolation_never_invents_an_id() -> None:
    masks = some_masks(1)
    rotated = masks.rotate(HW, 33, interpolation='bilinear')
    assert set(np.unique(rotated.layers)) <= {0, *masks.ids.tolist()}


@pytest.mark.parametrize('seed', SEEDS)
def test_measure_equals_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    label_map = rng.integers(0, 6, (13, 7)).astype(np.int32)
    label_map[rng.random((13, 7)) < 0.05] = 2**31 - 1  # does not fit a table
    ids = np.array([3, 77, 1, 3, 2**31 - 1], dtype=np.int32)  # a repeat, and one that is not there
    for chosen in (ids, ids[:4]):
        areas, boxes = LayerView.of(label_map[None]).measure(0, chosen)
        for value, area, box in zip(chosen, areas, boxes, strict=True):
            pixels = [(y, x) for y in range(13) for x in range(7) if label_map[y, x] == value]
            ys, xs = [y for y, _ in pixels], [x for _, x in pixels]
            wanted = [min(xs), min(ys), max(xs) + 1, max(ys) + 1] if pixels else [0, 0, 0, 0]
            assert (area, box.tolist()) == (len(pixels), wanted)


def test_instance_cropped_away_keeps_its_row() -> None:
    layers = np.zeros((1, 6, 8), np.int32)
    layers[0, 0:2, 0:2], layers[0, 3:6, 5:7] = 1, 2
    cropped = LabelMapMasks(layers, [1, 2], [0, 0]).crop(np.array([4, 2, 8, 6]))
    assert cropped.areas.tolist() == [0, 6]
    assert cropped.get_bboxes().tensor.tolist() == [[0, 0, 0, 0], [1, 1, 3, 4]]
    beyond = LabelMapMasks(layers, [1, 2], [0, 0]).crop(np.array([8, 6, 12, 9]))
    assert beyond.to_ndarray().shape == (2, 1, 1)
    assert beyond.areas.tolist() == [0, 0]


INDICES = {
    'int': 2,
    'negative int': -1,
    'numpy int': np.int64(3),
    'slice': slice(1, 7, 2),
    'list': [5, 0, 0],
    'int array': np.array([4, 1]),
    'int32 array': np.array([4, 1], np.int32),
    'bool array': np.arange(12) % 3 == 0,
    'no bool': np.zeros(12, bool),
    'empty int array': np.zeros(0, np.int64),
    'long tensor': torch.tensor([7, 2, 2]),
    'bool tensor': torch.arange(12) % 2 == 0,
}


@pytest.mark.parametrize('measured', [False, True])
@pytest.mark.parametrize('index', INDICES.values(), ids=INDICES)
def test_index_equals_bitmaps_and_shares_layers(index, measured: bool) -> None:
    masks = some_masks(5)
    if measured:
        assert masks.areas.sum() > 0
    chosen = masks[index]
    assert_same(chosen, stock(masks)[index])
    assert chosen.layers is masks.layers


def test_index_out_of_range_raises() -> None:
    with pytest.raises(IndexError):
        some_masks(0)[99]


def test_iteration_gives_each_mask() -> None:
    masks = some_masks(2)
    np.testing.assert_array_equal(np.stack(list(masks)), stock(masks).masks)


def test_cat_equals_bitmaps_and_shares_layers() -> None:
    first, second = some_masks(1), some_masks(2)
    joined = LabelMapMasks.cat([first[[3, 1]], second, stock(second)[[0]], first[5:]])
    wanted = [stock(first)[[3, 1]], stock(second), stock(second)[[0]], stock(first)[5:]]
    assert_same(joined, BitmapMasks.cat(wanted))
    assert len(joined.layers) == len(first.layers) + len(second.layers) + 1
    assert LabelMapMasks.cat([first[:2], first[2:]]).layers is first.layers
    with pytest.raises(ValueError, match='different sizes'):
        LabelMapMasks.cat([first, LabelMapMasks.empty(3, 3)])
    with pytest.raises(ValueError, match='empty'):
        LabelMapMasks.cat([])


def test_from_bitmaps_packs_disjoint_masks_into_one_layer() -> None:
    bitmaps = np.zeros((3, 4, 6), np.uint8)
    bitmaps[0, :, :2] = bitmaps[1, :, 2:4] = bitmaps[2, :, 1:3] = 1
    masks = LabelMapMasks.from_bitmaps(bitmaps)
    assert masks.layer_of.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(masks.to_ndarray(), bitmaps)


def test_random_equals_bitmaps() -> None:
    assert_same(LabelMapMasks.random(4, 9, 7, rng=3), BitmapMasks.random(4, 9, 7, rng=3))


def test_instance_data_selects_cats_and_moves() -> None:
    masks = some_masks(6)
    data = InstanceData(masks=masks, labels=torch.arange(len(masks)))
    chosen = data[torch.tensor([1, 4, 9])]
    assert_same(chosen.masks, stock(masks)[[1, 4, 9]])
    assert chosen.masks.layers is masks.layers
    assert_same(InstanceData.cat([chosen, data]).masks, stock(masks)[[1, 4, 9, *range(12)]])
    assert data.to('cpu').masks.layers is masks.layers


def test_pickle_and_deepcopy_drop_what_is_not_needed() -> None:
    masks = some_masks(4, (400, 500))
    cropped = masks.flip().crop(np.array([0, 0, 20, 10]))
    assert cropped.masks.shape == (12, 10, 20)  # decoded: must not travel
    packed = pickle.dumps(cropped)
    assert len(packed) < 4 * len(masks.layers) * 10 * 20 + 2000
    assert_same(pickle.loads(packed), stock(cropped))
    assert_same(copy.deepcopy(cropped), stock(cropped))


@pytest.mark.parametrize('measured', [False, True])  # sent as pixels, or as runs
def test_pickle_of_a_window_inside_padding(measured: bool) -> None:
    masks = some_masks(4, (90, 80))
    if measured:
        assert masks.areas.any()
    seen = masks.crop(np.array([21, 33, 62, 71])).flip('diagonal').expand(60, 70, 9, 11)
    wanted = stock(masks).crop(np.array([21, 33, 62, 71])).flip('diagonal').expand(60, 70, 9, 11)
    received = pickle.loads(pickle.dumps(seen))
    assert (received.view.source.shape == masks.view.source.shape) == measured  # not cut
    assert_same(received, wanted)


def test_decoded_masks_refuse_writes() -> None:
    masks = some_masks(0)
    with pytest.raises(ValueError, match='read-only'):
        masks.masks[:, :2, :2] = 0
    masks.to_ndarray()[:] = 0
    assert masks.masks.any()
    assert masks.to_tensor(torch.float64, 'cpu').dtype is torch.float64
    assert torch.equal(masks.to_tensor(torch.uint8, 'cpu'), torch.from_numpy(stock(masks).masks))


def test_stock_isinstance_tests_accept_it() -> None:
    masks = some_masks(0)
    assert isinstance(masks, BitmapMasks)
    boxes = HorizontalBoxes.from_instance_masks(masks)
    assert torch.equal(boxes.tensor, masks.get_bboxes().tensor)


BAD = {
    'layers must be': lambda m: LabelMapMasks(np.zeros((3, 4)), [1], [0]),
    'ids but': lambda m: LabelMapMasks(np.zeros((1, 3, 4)), [1, 2], [0]),
    'above 0': lambda m: LabelMapMasks(np.zeros((1, 3, 4)), [0], [0]),
    'layer indices': lambda m: LabelMapMasks(np.zeros((1, 3, 4)), [1], [1]),
    'pad_val is 255': lambda m: m.pad((99, 99), pad_val=255),
    'cannot pad': lambda m: m.pad((3, 3)),
    'border_value is 1': lambda m: m.rotate(HW, 3, border_value=1),
    'shear keeps': lambda m: m.shear((3, 3), 0.1),
    'is unknown': lambda m: m.flip('sideways'),
    'crop box': lambda m: m.crop(np.zeros((2, 4))),
}


@pytest.mark.parametrize(('message', 'call'), BAD.items())
def test_misuse_is_named(message: str, call) -> None:
    with pytest.raises(ValueError, match=message):
        call(some_masks(0))


def test_tensor_layers_behave_as_numpy_layers() -> None:
    masks = some_masks(1)
    moved = LabelMapMasks(torch.from_numpy(masks.layers), masks.ids, masks.layer_of)
    for change in EXACT.values():
        assert_same(change(moved), stock(change(masks)))
    assert_same(LabelMapMasks.cat([moved, moved[:2]]), stock(masks)[[*range(12), 0, 1]])


def packed_pair() -> list[dict]:
    return [
        moving.build(moving.LSJ[-1])(moving.sample(seed, hw))
        for seed, hw in ((0, moving.HW), (1, (40, 70)))
    ]


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


# cells and their labels reach over the border
@pytest.mark.filterwarnings('ignore:Warning. The (text|bbox|polygon) is out of bounds')
def test_visualizer_draws_it() -> None:
    packed = packed_pair()[0]
    data_sample = packed['data_samples']
    data_sample.gt_instances.bboxes = data_sample.gt_instances.bboxes.tensor
    image = np.zeros((*moving.HW, 3), np.uint8)
    drawn = []
    for as_bitmaps in (False, True):
        visualizer = DetLocalVisualizer()
        visualizer.dataset_meta = {'classes': ('a', 'b', 'c'), 'palette': [(255, 0, 0)] * 3}
        if as_bitmaps:
            masks = data_sample.gt_instances.masks.to_ndarray()
            data_sample.gt_instances.masks = BitmapMasks(masks, *masks.shape[1:])
        moving.seed_all(0)
        visualizer.add_datasample('x', image, data_sample, draw_pred=False, show=False)
        drawn.append(visualizer.get_image())
    assert drawn[0].any()
    np.testing.assert_array_equal(*drawn)

"""LabelMapMasks against mmdet's BitmapMasks of the same instances, and against slow loops."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

import cellseg_mm  # noqa: E402, F401, I001  (before mmdet: gives BitmapMasks its RoIAlign)
import cv2  # noqa: E402
from mmdet.structures.bbox import HorizontalBoxes  # noqa: E402
from mmdet.structures.mask import BitmapMasks, mask_target  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

from cellseg_mm.pipeline.label_map_masks import LabelMapMasks  # noqa: E402
from cellseg_mm.pipeline.layer_view import LayerView, find_runs, paint_runs  # noqa: E402
from cellseg_mm.pipeline.mask_targets import roi_shares  # noqa: E402

pytestmark = pytest.mark.mm

SEEDS = range(8)
HW = (37, 29)  # odd and not square: a transposition cannot pass


def f_shape(size: int) -> np.ndarray:
    """An F: no symmetry, so a wrong flip or rotation shows."""
    shape = np.zeros((size, size), dtype=bool)
    shape[:, 0] = shape[0, :] = True
    shape[size // 2, : size - 1] = True
    return shape


def some_masks(seed: int, hw: tuple[int, int] = HW, n: int = 9) -> LabelMapMasks:
    """Overlapping, touching, border and 1-px instances, one in two parts, one without a pixel."""
    rng = np.random.default_rng(seed)
    bitmaps = np.zeros((n + 3, *hw), dtype=np.uint8)
    for bitmap in bitmaps[:n]:
        size = int(rng.integers(3, 12))
        y, x = rng.integers(-size // 2, hw[0] - 2), rng.integers(-size // 2, hw[1] - 2)
        shape = f_shape(size) if rng.random() < 0.5 else np.ones((size, size), bool)
        top, left = max(y, 0), max(x, 0)
        part = shape[top - y : hw[0] - y, left - x : hw[1] - x]
        bitmap[top : top + part.shape[0], left : left + part.shape[1]] = part
    bitmaps[n, 0, hw[1] - 1] = 1  # 1 px in a corner
    bitmaps[n + 1, 2:5, 2:5] = bitmaps[n + 1, -5:-3, -6:-3] = 1  # two parts
    return shuffled_ids(LabelMapMasks.from_bitmaps(bitmaps), rng)  # the last one stays empty


def shuffled_ids(masks: LabelMapMasks, rng: np.random.Generator) -> LabelMapMasks:
    """Give the same masks ids with gaps, in no order, some above 65535."""
    new_ids = rng.permutation(np.arange(1, 2 * len(masks) + 1) * 9001)[: len(masks)]
    layers = np.zeros_like(masks.layers)
    for old, new, k in zip(masks.ids, new_ids, masks.layer_of, strict=True):
        layers[k][masks.layers[k] == old] = new
    return LabelMapMasks(layers, new_ids, masks.layer_of)


def stock(masks: LabelMapMasks) -> BitmapMasks:
    """The same instances as mmdet holds them, decoded by the slowest possible comparison."""
    bitmaps = [masks.layers[k] == i for k, i in zip(masks.layer_of, masks.ids, strict=True)]
    array = np.array(bitmaps, dtype=np.uint8).reshape(-1, masks.height, masks.width)
    return BitmapMasks(array, masks.height, masks.width)


def assert_same(got: LabelMapMasks, wanted: BitmapMasks) -> None:
    assert (got.height, got.width) == (wanted.height, wanted.width)
    assert len(got) == len(wanted)
    np.testing.assert_array_equal(got.to_ndarray(), wanted.to_ndarray())
    np.testing.assert_array_equal(got.areas, wanted.areas)
    boxes = wanted.get_bboxes('hbox').tensor
    assert torch.equal(got.get_bboxes(HorizontalBoxes).tensor, boxes)


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


@pytest.mark.parametrize('seed', SEEDS)
def test_painting_runs_is_the_inverse_of_finding_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    hw = (int(rng.integers(1, 9)), int(rng.integers(1, 9)))
    cells = rng.integers(0, 3, hw).astype(np.int32) * (rng.random(hw) < 0.2 * seed)
    np.testing.assert_array_equal(paint_runs(find_runs(cells.astype(np.int32)), hw), cells)


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


# ---- mask targets


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


def test_tensor_layers_behave_as_numpy_layers() -> None:
    masks = some_masks(1)
    moved = LabelMapMasks(torch.from_numpy(masks.layers), masks.ids, masks.layer_of)
    for change in EXACT.values():
        assert_same(change(moved), stock(change(masks)))
    assert_same(LabelMapMasks.cat([moved, moved[:2]]), stock(masks)[[*range(12), 0, 1]])


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

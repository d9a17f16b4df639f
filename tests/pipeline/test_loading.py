"""pipeline.loading: images, label maps, their cache, and packing."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import tifffile
import torch
from mmdet.structures.bbox import HorizontalBoxes

from cellseg_mm.core.errors import ConfigError, LabelMapError
from cellseg_mm.data.cases import find_cases
from cellseg_mm.data.intensity import ValueRange, save_range
from cellseg_mm.pipeline.dataset import CellDataset, data_fingerprint
from cellseg_mm.pipeline.loading import LoadCellImage, LoadLabelMaps
from tests.support.moving_samples import HW, LSJ, build, label_map, sample

pytestmark = pytest.mark.mm

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


def test_the_range_of_the_collection_decides_about_wide_values(tmp_path) -> None:
    values = np.array([[0, 100, 200, 250, 255]] * 4, np.uint16)
    info = write_case(tmp_path, values, {})
    known = {**info, 'value_range': ValueRange(0, 4080)}  # 4080 / 16 = 255
    assert LoadCellImage().transform(known)['img'][0, :, 1].tolist() == [0, 6, 12, 16, 16]
    assert LoadCellImage().transform(info)['img'][0, :, 1].tolist() == values[0].tolist()


@pytest.mark.parametrize('is_recorded', [False, True])
def test_the_data_set_passes_the_recorded_range_on(tmp_path, is_recorded: bool) -> None:
    (tmp_path / 'train' / 'a').mkdir(parents=True)
    values = np.array([[0, 100, 200, 250, 255]] * 4, np.uint16)
    write_case(tmp_path / 'train' / 'a', values, {})
    if is_recorded:
        save_range(tmp_path / 'range.json', ValueRange(0, 510))
    dataset = CellDataset(
        data_root=str(tmp_path),
        split='all',
        metainfo={'classes': ('cell',)},
        pipeline=[{'type': 'LoadCellImage'}],
    )
    found = dataset[0]['img'][0, :, 0].tolist()
    assert found == ([0, 50, 100, 125, 128] if is_recorded else values[0].tolist())
    cases = find_cases(tmp_path, 'train', 1)
    # without a range the fingerprint is that of earlier versions
    assert (dataset.data_hash == data_fingerprint(cases)) == (not is_recorded)


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

"""labels: equal to loops over pixels, ordered, in as few layers as overlaps need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_mm.core.errors import LabelMapError
from cellseg_mm.data import labels
from cellseg_mm.data.labels import Case

HW = (17, 11)  # not square and odd, so that transpositions fail


def random_maps(seed: int, *, is_disjoint: bool) -> dict[int, np.ndarray]:
    """Class maps with gaps in ids, ids above 255, touching cells, 1-px cells, empty classes."""
    rng = np.random.default_rng(seed)
    taken = np.zeros(HW, dtype=bool)
    maps = {}
    for class_id in range(4):
        label_map = np.zeros(HW, dtype=np.int64)
        for _ in range(int(rng.integers(0, 6))):
            y0, x0 = rng.integers(HW[0]), rng.integers(HW[1])
            y1, x1 = y0 + rng.integers(1, 6), x0 + rng.integers(1, 6)
            spot = np.zeros(HW, dtype=bool)
            spot[y0:y1, x0:x1] = rng.random(spot[y0:y1, x0:x1].shape) < 0.8  # holes, parts
            if is_disjoint:
                spot &= ~taken
            label_map[spot] = rng.choice([1, 2, 3, 7, 255, 256, 40000])
            taken |= spot
        if rng.random() < 0.8:
            maps[class_id] = label_map
    return maps


def write_case(folder: Path, maps: dict[int, np.ndarray], dtype: str = 'float64') -> Case:
    folder.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(folder / 'image.tif', np.zeros((*HW, 3), np.uint8), photometric='rgb')
    paths = {}
    for class_id, label_map in maps.items():
        paths[class_id] = folder / f'class{class_id + 1}.tif'
        tifffile.imwrite(paths[class_id], label_map.astype(dtype))
    return Case(folder.name, folder / 'image.tif', paths, 5, HW)


def slow_masks(maps: dict[int, np.ndarray]) -> list[tuple[int, int, np.ndarray]]:
    """Class, id and mask of every instance, in the promised order, pixel by pixel."""
    found = []
    for class_id in sorted(maps):
        pixels: dict[int, np.ndarray] = {}
        for y in range(HW[0]):
            for x in range(HW[1]):
                value = int(maps[class_id][y, x])
                if value:
                    pixels.setdefault(value, np.zeros(HW, dtype=bool))[y, x] = True
        found += [(class_id, value, pixels[value]) for value in sorted(pixels)]
    return found


@pytest.mark.parametrize('is_disjoint', [True, False])
@pytest.mark.parametrize('seed', range(20))
def test_layers_hold_every_instance(tmp_path: Path, seed: int, is_disjoint: bool) -> None:
    maps = random_maps(seed, is_disjoint=is_disjoint)
    found = labels.read_label_layers(write_case(tmp_path / 'a', maps))
    expected = slow_masks(maps)
    assert found.class_ids.tolist() == [class_id for class_id, _, _ in expected]
    assert found.original_ids.tolist() == [value for _, value, _ in expected]
    assert found.layers.dtype == np.int32
    assert found.layers.shape[1:] == HW
    for i, (_, _, mask) in enumerate(expected):
        assert np.array_equal(found.layers[found.layer_of[i]] == i + 1, mask)
    # Nothing else is in the layers, and there are no more of them than needed.
    assert (found.layers != 0).sum() == sum(int(mask.sum()) for _, _, mask in expected)
    n_needed = (
        int(max(sum(mask.astype(int) for _, _, mask in expected).max(), 1)) if expected else 1
    )
    n_classes = len({class_id for class_id, _, _ in expected})
    assert n_needed <= len(found.layers) <= max(n_classes, 1)
    if is_disjoint:
        assert len(found.layers) == 1


@pytest.mark.parametrize('seed', range(5))
def test_read_gt_has_the_same_masks(tmp_path: Path, seed: int) -> None:
    maps = random_maps(seed, is_disjoint=False)
    gt = labels.read_gt(write_case(tmp_path / 'a', maps))
    expected = slow_masks(maps)
    assert (gt.name, gt.image_id, gt.image_hw) == ('a', 5, HW)
    assert gt.masks().tolist() == [mask.tolist() for _, _, mask in expected]
    assert gt.scores.tolist() == [1.0] * len(expected)


def test_overlap_moves_only_the_cells_that_overlap(tmp_path: Path) -> None:
    first, second = np.zeros(HW), np.zeros(HW)
    first[2:6, 2:6] = 9
    second[5:8, 5:8] = 4  # shares the pixel (5, 5)
    second[12:14, 1:3] = 6  # free
    found = labels.read_label_layers(write_case(tmp_path / 'a', {0: first, 2: second}))
    assert found.layer_of.tolist() == [0, 1, 0]
    assert found.class_ids.tolist() == [0, 2, 2]
    assert found.original_ids.tolist() == [9, 4, 6]
    assert found.layers[0, 5, 5] == 1
    assert found.layers[1, 5, 5] == 2


def test_no_cells_give_one_empty_layer(tmp_path: Path) -> None:
    for maps in ({}, {1: np.zeros(HW)}):
        found = labels.read_label_layers(write_case(tmp_path / str(len(maps)), maps))
        assert found.layers.shape == (1, *HW)
        assert not found.layers.any()
        assert len(found) == len(found.layer_of) == len(found.original_ids) == 0
        assert len(labels.read_gt(write_case(tmp_path / str(len(maps)), maps))) == 0


DTYPES = ['uint8', 'int8', 'uint16', 'int16', 'uint32', 'int32', 'uint64', 'int64']
DTYPES += ['float16', 'float32', 'float64']


@pytest.mark.parametrize('dtype', DTYPES)
def test_label_maps_of_every_dtype(tmp_path: Path, dtype: str) -> None:
    label_map = np.zeros(HW, dtype=np.int32)
    label_map[3:5, 2:9], label_map[16, 10], label_map[0, 1] = 1, 100, 127
    tifffile.imwrite(tmp_path / 'm.tif', label_map.astype(dtype))
    found = labels.read_label_map(tmp_path / 'm.tif', HW)
    assert found.dtype == np.int32
    assert np.array_equal(found, label_map)


def test_bilevel_label_map_is_one_instance(tmp_path: Path) -> None:
    mask = np.zeros(HW, dtype=bool)
    mask[4:7, 5:9] = True
    tifffile.imwrite(tmp_path / 'm.tif', mask)
    assert np.array_equal(labels.read_label_map(tmp_path / 'm.tif'), mask.astype(np.int32))


@pytest.mark.parametrize('value', [2**31 - 1, 2**24 + 1, 70000])
def test_large_ids_are_exact(tmp_path: Path, value: int) -> None:
    label_map = np.zeros(HW, dtype=np.float64)
    label_map[3, 4], label_map[5, 6] = value, 1
    tifffile.imwrite(tmp_path / 'm.tif', label_map)
    assert labels.read_label_map(tmp_path / 'm.tif')[3, 4] == value
    found = labels.read_label_layers(write_case(tmp_path / 'a', {0: label_map}))
    assert found.original_ids.tolist() == [1, value]
    assert found.layers[0, 3, 4] == 2


LAYOUTS = {
    'plain': {},
    'LZW with predictor': {'compression': 'lzw', 'predictor': True, 'rowsperstrip': 3},
    'deflate': {'compression': 'zlib'},
    'tiled': {'tile': (16, 16), 'compression': 'lzw'},
    'packbits': {'compression': 'packbits', 'rowsperstrip': 5},
    'big-endian': {'byteorder': '>'},
    'BigTIFF': {'bigtiff': True},
    'zstd': {'compression': 'zstd'},
}


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('n_channels', [3, 4])
@pytest.mark.parametrize('is_planar', [False, True])
def test_colour_images_of_every_layout(
    tmp_path: Path, layout: str, n_channels: int, is_planar: bool
) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*HW, n_channels)).astype(np.uint8)
    kwargs = dict(LAYOUTS[layout])
    if n_channels == 4:
        kwargs['extrasamples'] = ['unassalpha']
    if is_planar:
        kwargs['planarconfig'] = 'separate'
    stored = np.moveaxis(image, 2, 0) if is_planar else image
    tifffile.imwrite(tmp_path / 'i.tif', stored, photometric='rgb', **kwargs)
    found = labels.read_image(tmp_path / 'i.tif')
    assert found.dtype == np.uint8
    assert found.flags['C_CONTIGUOUS']
    assert np.array_equal(found, image[..., :3])


def grey(values: list[float], dtype: str) -> np.ndarray:
    return np.array([values, values[::-1]], dtype=dtype)


SCALED = [
    pytest.param(grey([0, 7, 255], 'uint8'), [0, 7, 255], id='uint8 as it is'),
    # 65535 / 257 = 255; 384 / 257 = 1.494 -> 1; 386 / 257 = 1.502 -> 2
    pytest.param(grey([0, 384, 386, 65535], 'uint16'), [0, 1, 2, 255], id='uint16 by its range'),
    pytest.param(grey([0, 7, 255], 'uint16'), [0, 7, 255], id='uint16 that holds 8 bits'),
    # 255 * 255 / 256 = 254.004
    pytest.param(grey([0, 255, 256], 'uint16'), [0, 254, 255], id='uint16 just above 8 bits'),
    pytest.param(grey([0, 2**31, 2**32 - 1], 'uint32'), [0, 128, 255], id='uint32 by its range'),
    pytest.param(grey([0, 256, 32767], 'int16'), [0, 2, 255], id='int16 by its range'),
    pytest.param(grey([0, 0.5, 1], 'float32'), [0, 128, 255], id='float 0..1'),
    pytest.param(grey([0, 0.4, 254.6], 'float64'), [0, 0, 255], id='float 0..255'),
    pytest.param(grey([0, 100, 400], 'float32'), [0, 64, 255], id='float above 255'),
    pytest.param(grey([0, 1, 1], 'bool'), [0, 255, 255], id='bilevel'),
]


@pytest.mark.parametrize(('stored', 'expected'), SCALED)
def test_values_become_8_bit(tmp_path: Path, stored: np.ndarray, expected: list[int]) -> None:
    tifffile.imwrite(tmp_path / 'i.tif', stored, photometric='minisblack')
    found = labels.read_image(tmp_path / 'i.tif')
    assert found.shape == (*stored.shape, 3)
    for channel in range(3):
        assert found[0, :, channel].tolist() == expected
        assert found[1, :, channel].tolist() == expected[::-1]


def test_rgb16_is_scaled_by_one_factor(tmp_path: Path) -> None:
    image = np.zeros((*HW, 3), dtype=np.uint16)
    image[..., 0], image[..., 1], image[2:4, 3, 2] = 257, 514, 65535
    tifffile.imwrite(tmp_path / 'i.tif', image, photometric='rgb')
    found = labels.read_image(tmp_path / 'i.tif')
    assert found[0, 0].tolist() == [1, 2, 0]
    assert found[2, 3].tolist() == [1, 2, 255]


def test_grey_with_alpha_drops_alpha(tmp_path: Path) -> None:
    image = np.stack([np.full(HW, 40), np.full(HW, 9)], axis=2).astype(np.uint8)
    path = tmp_path / 'i.tif'
    tifffile.imwrite(
        path, image, photometric='minisblack', planarconfig='contig', extrasamples=['unassalpha']
    )
    assert np.array_equal(labels.read_image(path), np.full((*HW, 3), 40, np.uint8))


def test_palette_and_white_is_zero(tmp_path: Path) -> None:
    index = np.array([[0, 1, 2]], dtype=np.uint8)
    palette = np.zeros((3, 256), dtype=np.uint16)
    palette[:, 1], palette[:, 2] = (257 * 10, 257 * 20, 257 * 30), (65535, 0, 257)
    tifffile.imwrite(tmp_path / 'p.tif', index, photometric='palette', colormap=palette)
    expected = [[0, 0, 0], [10, 20, 30], [255, 0, 1]]
    assert labels.read_image(tmp_path / 'p.tif')[0].tolist() == expected
    tifffile.imwrite(tmp_path / 'w.tif', index, photometric='miniswhite')
    assert labels.read_image(tmp_path / 'w.tif')[0, :, 0].tolist() == [255, 254, 253]


def test_jpeg_in_tiff_is_close(tmp_path: Path) -> None:
    ramp = np.linspace(40, 200, 32 * 48).reshape(32, 48)
    image = np.stack([ramp, ramp[::-1], 255 - ramp], axis=2).astype(np.uint8)
    tifffile.imwrite(tmp_path / 'i.tif', image, photometric='rgb', compression='jpeg')
    difference = labels.read_image(tmp_path / 'i.tif').astype(int) - image
    assert abs(difference).max() < 24  # lossy; swapped or raw YCbCr channels differ by 100 and more


def test_a_turned_label_map_is_refused(tmp_path: Path) -> None:
    label_map = np.arange(6, dtype=np.uint16).reshape(2, 3)
    tifffile.imwrite(tmp_path / 'm.tif', label_map, extratags=[(274, 'H', 1, 3, True)])
    with pytest.raises(LabelMapError, match='the orientation tag is 3'):
        labels.read_label_map(tmp_path / 'm.tif', (2, 3))

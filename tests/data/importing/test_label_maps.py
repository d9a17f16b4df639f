"""Label maps arrive pixel by pixel; what are no ids is refused with the way out."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from cellseg_mm.core.errors import CellSegError
from cellseg_mm.data.importing.import_data import import_data
from cellseg_mm.data.importing.sources import ImportParams
from tests.support.import_sources import HW, IMAGE, assert_masks, f_mask, numbered, run, stored


def test_label_maps_of_cellpose_and_stardist(tmp_path: Path) -> None:
    masks = [f_mask(1, 1), f_mask(9, 8)]
    label_map = numbered(masks, [700, 3])  # above 255, with gaps, not in order
    flat, paired = tmp_path / 'cellpose', tmp_path / 'stardist'
    flat.mkdir()
    (paired / 'images').mkdir(parents=True)
    (paired / 'masks').mkdir()
    Image.fromarray(IMAGE).save(flat / 'x.png')
    Image.fromarray(label_map).save(flat / 'x_cp_masks.png')
    Image.fromarray(IMAGE).save(flat / '000_img.png')
    tifffile.imwrite(flat / '000_masks.tif', label_map)
    tifffile.imwrite(paired / 'images' / 'y.tif', IMAGE, photometric='rgb')
    tifffile.imwrite(paired / 'masks' / 'y.tif', label_map.astype(np.int32))
    params = ImportParams(class_names=('a', 'b'), single_class='B')
    for source in (flat, paired):
        report = import_data('label-map', source, tmp_path / 'out', params)
        assert report.problems == ()
    for name in ('x', '000', 'y'):
        assert_masks(stored(tmp_path / 'out', name), {2: [masks[1], masks[0]]})
    rows = list(csv.DictReader((tmp_path / 'out' / 'manifest.csv').read_text().splitlines()))
    assert [row['uuid'] for row in rows] == ['000', 'x', 'y']  # both runs are in the table


def test_label_map_problems(tmp_path: Path) -> None:
    source = tmp_path / 'in'
    source.mkdir()
    for name in ('alone', 'size', 'colour', 'full'):
        Image.fromarray(IMAGE).save(source / f'{name}.png')
    Image.fromarray(numbered([f_mask(1, 1)], [1]).T).save(source / 'size_masks.png')
    Image.fromarray(IMAGE).save(source / 'colour_masks.png')
    full = np.full(HW, 5, np.uint8)  # no background
    full[3:] = 6
    Image.fromarray(full).save(source / 'full_masks.png')
    Image.fromarray(np.ones(HW, np.uint8)).save(source / 'map_masks.png')
    report = import_data('label-map', source, tmp_path / 'out', ImportParams())
    text = '\n'.join(report.problems)
    assert 'alone has 0 label maps (none); expected one' in text
    assert 'map has 0 images (none); expected one' in text
    assert 'size_masks.png: is 23 x 17 px, the image is 17 x 23 px' in text
    assert 'colour_masks.png: has colours (red, green and blue differ); expected one' in text
    assert len(report.problems) == 4
    assert_masks(stored(tmp_path / 'out', 'full'), {1: [full == 5, full == 6]})


def source_of(folder: Path, label_map: np.ndarray, name: str = 'a_masks.png') -> Path:
    """One image and its label map."""
    folder.mkdir()
    Image.fromarray(IMAGE).save(folder / 'a.png')
    if name.endswith('.tif'):
        tifffile.imwrite(folder / name, label_map)
    else:
        Image.fromarray(label_map).save(folder / name)
    return folder


PARTS = [f_mask(1, 1), f_mask(9, 8), f_mask(1, 15)]


@pytest.mark.parametrize(
    'mask',
    [
        pytest.param(numbered(PARTS, [1, 1, 1]).astype(np.uint8), id='0 and 1'),
        pytest.param(numbered(PARTS, [255, 255, 255]).astype(np.uint8), id='0 and 255'),
        pytest.param(numbered(PARTS, [1, 1, 1]).astype(bool), id='1 bit'),
        pytest.param(numbered(PARTS, [7, 7, 7]), id='another value'),
        pytest.param(numbered(PARTS, [65535] * 3), id='16 bit'),
    ],
)
def test_a_mask_is_not_one_cell(tmp_path: Path, mask: np.ndarray) -> None:
    source = source_of(tmp_path / 'in', mask)
    report = run('label-map', source, tmp_path / 'out')
    assert 'in 3 parts' in report.problems[0]
    assert '--binary components' in report.problems[0]
    assert not (tmp_path / 'out').exists()
    report = run('label-map', source, tmp_path / 'out', binary='components')
    assert 'a mask of one value became 3 cells' in report.notes[0]
    by_row = [PARTS[0], PARTS[2], PARTS[1]]  # in reading order of their first pixels
    assert_masks(stored(tmp_path / 'out', 'a'), {1: by_row})
    run('label-map', source, tmp_path / 'ids', binary='ids')
    assert_masks(stored(tmp_path / 'ids', 'a'), {1: [np.any(PARTS, axis=0)]})


def test_one_part_is_a_mask_where_its_value_says_so(tmp_path: Path) -> None:
    one = f_mask(1, 1)
    report = run('label-map', source_of(tmp_path / 'id', one.astype(np.uint8)), tmp_path / 'out')
    assert_masks(stored(tmp_path / 'out', 'a'), {1: [one]})
    assert 'a single value (1) was taken as one cell' in report.notes[0]
    for name, mask in (('white', one * np.uint8(255)), ('full', np.full(HW, 3, np.uint8))):
        problems = run('label-map', source_of(tmp_path / name, mask), tmp_path / 'no').problems
        assert '--binary components' in problems[0]


def test_components_leave_label_maps_as_they_are(tmp_path: Path) -> None:
    source = source_of(tmp_path / 'in', numbered(PARTS, [1, 1, 2]))  # a cell cut in two
    report = run('label-map', source, tmp_path / 'out', binary='components')
    assert_masks(stored(tmp_path / 'out', 'a'), {1: [PARTS[0] | PARTS[1], PARTS[2]]})
    assert '1 of 2 cells lie in several parts' in report.notes[0]


def test_maps_of_classes_and_grey_values_are_refused(tmp_path: Path) -> None:
    classes = np.zeros(HW, np.uint8)
    for value in (1, 2, 3):
        for column in range(0, 21, 5):
            classes[5 * value - 4 : 5 * value - 2, column : column + 2] = value
    grey = np.random.default_rng(0).integers(0, 30, HW).astype(np.uint8)
    for name, values in (('classes', classes), ('grey', grey)):
        source = source_of(tmp_path / name, values)
        for binary in ('', 'components'):
            problem = run('label-map', source, tmp_path / 'no', binary=binary).problems[0]
            assert 'lie in several parts' in problem
            assert '--binary ids' in problem
        report = run('label-map', source, tmp_path / f'{name} ids', binary='ids')
        assert report.rows[0]['c1'] == str(values.max())


@pytest.mark.parametrize('name', ['a_masks.jpg', 'masks/a.jpg', 'a_masks.png', 'jpeg.tif'])
def test_lossy_label_maps_are_refused(tmp_path: Path, name: str) -> None:
    source = tmp_path / 'in'
    (source / 'masks').mkdir(parents=True)
    Image.fromarray(IMAGE).save(source / 'a.png')
    values = numbered(PARTS, [80, 160, 240]).astype(np.uint8)
    if name == 'jpeg.tif':
        name = 'a_masks.tif'
        tifffile.imwrite(source / name, values, compression='jpeg')
    else:  # a_masks.png is a JPEG too, whatever it is called
        Image.fromarray(values).save(source / name, format='JPEG')
    problem = run('label-map', source, tmp_path / 'out').problems[0]
    assert 'expected ids without loss' in problem
    assert 'PNG or TIFF' in problem


def test_one_class_must_be_named_among_several(tmp_path: Path) -> None:
    source = source_of(tmp_path / 'in', numbered(PARTS, [1, 2, 3]))
    with pytest.raises(CellSegError, match='name it with --class NAME'):
        run('label-map', source, tmp_path / 'out', class_names=('a', 'b'))
    for options in ({'class_map': {'x': 'cell'}}, {'skipped': frozenset({'x'})}):
        with pytest.raises(CellSegError, match='the source has no class names'):
            run('label-map', source, tmp_path / 'out', **options)


@pytest.mark.parametrize(
    'name', ['a_mask.png', 'a_label.png', 'a-labels.png', 'a_seg.png', 'a_instance_map.tif']
)
def test_names_of_label_maps(tmp_path: Path, name: str) -> None:
    source = source_of(tmp_path / 'in', numbered(PARTS, [1, 2, 3]), name)
    tifffile.imwrite(
        source / 'a_flows.tif', np.zeros((4, *HW), np.float32), photometric='minisblack'
    )  # Cellpose
    (source / 'a_seg.npy').write_bytes(b'x')
    report = run('label-map', source, tmp_path / 'out')
    assert report.problems == ()
    assert_masks(stored(tmp_path / 'out', 'a'), {1: PARTS})
    assert 'not used: 1 .npy' in report.notes[0]
    assert 'not used: a_flows.tif' in report.notes[1]


def test_an_image_may_be_named_like_a_label_map(tmp_path: Path) -> None:
    (tmp_path / 'in' / 'images').mkdir(parents=True)
    (tmp_path / 'in' / 'masks').mkdir()
    Image.fromarray(IMAGE).save(tmp_path / 'in' / 'images' / 'x_label.png')
    label_map = numbered(PARTS, [1, 2, 3])
    Image.fromarray(label_map).save(tmp_path / 'in' / 'masks' / 'x_label.png')
    report = run('label-map', tmp_path / 'in', tmp_path / 'out')
    assert [row['uuid'] for row in report.rows] == ['x_label']


def test_the_right_folder_is_named(tmp_path: Path) -> None:
    for part in ('train', 'test'):
        (tmp_path / part / 'images').mkdir(parents=True)
    with pytest.raises(CellSegError, match=f'name one of its folders: {tmp_path}/test, {tmp_path}'):
        run('label-map', tmp_path, tmp_path / 'out')


def test_the_nearest_name_is_said(tmp_path: Path) -> None:
    (tmp_path / 'masks').mkdir()
    Image.fromarray(IMAGE).save(tmp_path / 'slide 1.png')
    Image.fromarray(numbered(PARTS, [1, 2, 3])).save(tmp_path / 'masks' / 'slide1.png')
    problems = run('label-map', tmp_path, tmp_path / 'out').problems
    assert 'slide 1 has 0 label maps (none) (nearest: slide1)' in problems[0]


def test_parts_of_a_mask_that_look_like_several_cells_are_counted(tmp_path: Path) -> None:
    mask = np.zeros((40, 60), np.uint8)
    for x in (10, 22, 45):  # two discs of radius 8 that touch in a neck, and one alone
        mask[np.hypot(*(np.mgrid[:40, :60] - np.array([20, x])[:, None, None])) <= 8] = 255
    (tmp_path / 'in').mkdir()
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / 'in' / 'a.png')
    Image.fromarray(mask).save(tmp_path / 'in' / 'a_mask.png')
    report = run('label-map', tmp_path / 'in', tmp_path / 'out', binary='components')
    assert len(stored(tmp_path / 'out', 'a')[1]) == 2
    assert '1 of 2 connected parts look like several cells that touch' in report.text()

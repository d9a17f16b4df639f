"""COCO files arrive pixel by pixel; one bad annotation costs no other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from pycocotools import mask as coco_mask

from cellseg_mm.core.errors import CellSegError
from cellseg_mm.data.importing.coco_shapes import UnusableError, coco_cell
from cellseg_mm.data.importing.import_data import import_data
from cellseg_mm.data.importing.sources import ImportParams
from cellseg_mm.data.labels import read_image
from tests.support.import_sources import (
    HW,
    IMAGE,
    assert_masks,
    coco,
    f_mask,
    packed,
    run,
    stored,
    unpacked,
)


def test_coco_masks_arrive_pixel_by_pixel(tmp_path: Path) -> None:
    polygons = [[2.0, 2.0, 9.0, 2.0, 9.0, 7.0], [15, 10, 20, 10, 20, 15, 15, 15]]  # two parts
    source = coco(
        tmp_path,
        [
            {'segmentation': packed(f_mask(1, 1))},
            {'segmentation': unpacked(f_mask(9, 2)), 'category_id': 30},
            {'segmentation': polygons, 'category_id': 30},
            {'segmentation': packed(f_mask(1, 1)), 'iscrowd': 1},
            {'segmentation': packed(np.zeros(HW, bool))},
        ],
    )
    report = import_data('coco', source, tmp_path / 'out', ImportParams())
    assert report.problems == ()
    assert report.class_names == ('pale', 'dark')  # by rising category id
    rles = coco_mask.frPyObjects([[float(v) for v in p] for p in polygons], *HW)
    polygon = coco_mask.decode(coco_mask.merge(rles)).astype(bool)
    assert polygon.sum() > 30
    expected = {1: [f_mask(1, 1)], 2: [f_mask(9, 2), polygon]}
    assert_masks(stored(tmp_path / 'out', 'a'), expected)
    notes = '\n'.join(report.notes)
    assert '1 crowd areas (iscrowd) left out' in notes
    assert '1 cells without a pixel left out' in notes


@pytest.mark.parametrize(
    ('segmentation', 'message'),
    [
        pytest.param([], 'without a segmentation', id='empty'),
        pytest.param(None, 'without a segmentation', id='none'),
        pytest.param({}, 'without a segmentation', id='empty rle'),
        pytest.param('x', 'without a segmentation', id='text'),
        pytest.param([[1, 2, 3, 4]], 'fewer than 3 points', id='short'),
        pytest.param([[]], 'fewer than 3 points', id='empty polygon'),
        pytest.param([[1, 2, 3, 4, 5, 6, 7]], 'odd number', id='odd'),
        pytest.param([[1, 2, 3, 4, 5, 'x']], 'no lists of numbers', id='letters in a polygon'),
        pytest.param([[[1, 2], [3, 4], [5, 9]]], 'no lists of numbers', id='pairs'),
        pytest.param([5, 5, 15, 5, 15, 15], 'flat list of numbers', id='flat'),
        pytest.param([[1, 2, 3, 4, 5, 1e12]], 'leave the image by far', id='far'),
        pytest.param([[1, 2, 3, 4, 5, float('nan')]], 'leave the image by far', id='nan'),
        pytest.param([[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]], 'fractions of the image', id='fractions'),
        pytest.param([[-9, -9, -5, -9, -5, -5]], 'without a pixel', id='outside'),
        pytest.param({'size': [23, 17], 'counts': [391]}, 'another size', id='transposed'),
        pytest.param({'size': [17, 23], 'counts': [390]}, 'broken run lengths', id='sum'),
        pytest.param({'size': [17, 23], 'counts': [-9, 400]}, 'broken run lengths', id='negative'),
        pytest.param({'size': [17, 23], 'counts': [0.5, 390.5]}, 'broken run lengths', id='half'),
        pytest.param({'size': [17, 23], 'counts': 'abc'}, 'broken run lengths', id='rle'),
        pytest.param({'size': [17, 23], 'counts': 'é'}, 'broken run lengths', id='letters'),
    ],
)
def test_a_segmentation_that_cannot_be_used_costs_only_itself(
    tmp_path: Path, segmentation: object, message: str
) -> None:
    with pytest.raises(UnusableError, match=message):
        coco_cell(segmentation, 1, HW)
    good = packed(f_mask(1, 1))
    source = coco(tmp_path, [{'segmentation': good}, {'segmentation': segmentation}])
    report = run('coco', source, tmp_path / 'out')
    assert_masks(stored(tmp_path / 'out', 'a'), {1: [f_mask(1, 1)]})
    assert sum(report.left_out.values()) == 1
    assert message in next(iter(report.left_out))
    assert any('left out (annotation 1)' in note for note in report.notes)
    strict = run('coco', source, tmp_path / 'strict', strict=True)
    assert message in strict.problems[0]
    assert 'import without --strict' in strict.problems[0]
    assert not (tmp_path / 'strict').exists()


def test_a_part_that_cannot_be_used_costs_only_itself() -> None:
    square = [3.0, 3.0, 9.0, 3.0, 9.0, 9.0, 3.0, 9.0]
    cell, lost = coco_cell([square, [1, 1, 2, 2]], 1, HW)
    whole, nothing = coco_cell([square], 1, HW)
    assert cell.mask.tolist() == whole.mask.tolist()
    assert (len(lost), nothing) == (1, [])


def test_an_image_of_which_no_cell_can_be_used_is_refused(tmp_path: Path) -> None:
    """Written without its cells, it would be learnt as background."""
    source = coco(tmp_path, [{'segmentation': []}, {'bbox': [1, 1, 5, 5]}])
    report = run('coco', source, tmp_path / 'out')
    assert 'no cell can be used: 2 annotations without a segmentation' in report.problems[0]
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('entry', 'message'),
    [
        pytest.param({'height': 23, 'width': 17}, 'must match', id='transposed'),
        pytest.param({'file_name': '../a.png'}, 'expected a file inside', id='parent'),
        pytest.param({'file_name': '/etc/hostname'}, 'is not there', id='absolute'),
        pytest.param({'file_name': 'a\0.png'}, 'expected a file inside', id='zero byte'),
        pytest.param({'file_name': 3}, 'expected a file inside', id='number'),
        pytest.param({'file_name': 'b.png'}, 'is not there', id='missing'),
        pytest.param({'file_name': 'A.png'}, 'is not there', id='capitals'),
    ],
)
def test_coco_image_entries_are_checked(tmp_path: Path, entry: dict, message: str) -> None:
    source = coco(tmp_path / 'in', [{'segmentation': packed(f_mask(1, 1))}], **entry)
    report = import_data('coco', source, tmp_path / 'out', ImportParams())
    assert len(report.problems) == 1
    assert message in report.problems[0]
    assert not (tmp_path / 'out' / 'train').exists()


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        pytest.param('{"images": [', 'not valid JSON', id='torn'),
        pytest.param('[]', 'images is no list of objects', id='list'),
        pytest.param(
            '{"images": 1, "annotations": [], "categories": []}', 'images is no list', id='type'
        ),
        pytest.param(
            '{"images": [{"id": 1}, {"id": 1}], "annotations": [], "categories": []}',
            'ids .1. occur more than once',
            id='ids',
        ),
        pytest.param(
            '{"images": [{"id": true}], "annotations": [], "categories": []}',
            'id is True',
            id='id type',
        ),
        pytest.param(
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, '
            '{"id": 1, "name": "b"}]}',
            'categories ids .1. occur more than once',
            id='category ids',
        ),
        pytest.param(
            '{"images": [], "annotations": []}',
            'name the class of all cells with --class',
            id='no categories',
        ),
    ],
)
def test_broken_coco_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / 'c.json'
    path.write_text(text)
    with pytest.raises(CellSegError, match=message):
        import_data('coco', path, tmp_path / 'out', ImportParams())


def test_unknown_class_names_the_options(tmp_path: Path) -> None:
    source = coco(tmp_path, [{'segmentation': packed(f_mask(1, 1))}])
    problem = run('coco', source, tmp_path / 'out', class_names=('dark',)).problems[0]
    assert "cells of class 'pale'; expected dark" in problem
    assert '--map pale=dark' in problem
    assert '--skip pale' in problem


def rewrite(path: Path, change: object) -> Path:
    """Change a COCO file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


TWO = [{'segmentation': packed(f_mask(1, 1))}, {'segmentation': packed(f_mask(9, 8))}]


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (lambda a: a.update(category_id=99), 'annotations of categories that are not listed'),
        (lambda a: a.pop('category_id'), 'annotations without a category'),
        (lambda a: a.update(category_id=[4]), 'annotations without a category'),
    ],
)
def test_an_annotation_without_its_category_costs_only_itself(
    tmp_path: Path, change: object, reason: str
) -> None:
    source = rewrite(coco(tmp_path, TWO), lambda c: change(c['annotations'][0]))
    report = run('coco', source, tmp_path / 'out')
    assert_masks(stored(tmp_path / 'out', 'a'), {1: [f_mask(9, 8)]})
    assert [r.startswith(reason) for r in report.left_out] == [True]


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (lambda c: c['annotations'][0].update(image_id=99), 'of images that are not listed'),
        (lambda c: c['annotations'][0].pop('image_id'), 'without an image_id'),
        (lambda c: c['annotations'].insert(0, None), 'entries of annotations that are no objects'),
    ],
)
def test_what_belongs_to_no_image_is_named(tmp_path: Path, change: object, reason: str) -> None:
    source = rewrite(coco(tmp_path, TWO), change)
    report = run('coco', source, tmp_path / 'out')
    assert len(report.rows) == 1
    assert reason in report.notes[0]
    with pytest.raises(CellSegError, match='--strict'):
        run('coco', source, tmp_path / 'strict', strict=True)


@pytest.mark.parametrize(
    'change',
    [
        pytest.param(
            lambda c: c.update(annotations={str(a['id']): a for a in c['annotations']}),
            id='objects by id',
        ),
        pytest.param(lambda c: [a.update(image_id='7') for a in c['annotations']], id='text ids'),
        pytest.param(
            lambda c: [a.update(category_id=4.0) for a in c['annotations']], id='float ids'
        ),
        pytest.param(lambda c: c['images'][0].pop('height'), id='no height'),
        pytest.param(
            lambda c: (
                [c['images'][0].update(id='x')] + [a.update(image_id='x') for a in c['annotations']]
            ),
            id='named ids',
        ),
        pytest.param(lambda c: c['images'][0].update(file_name='/home/me/a.png'), id='elsewhere'),
        pytest.param(lambda c: c['images'][0].update(file_name='C:\\data\\a.png'), id='windows'),
        pytest.param(lambda c: c['images'][0].update(file_name='%61.png'), id='url'),
    ],
)
def test_habits_of_other_tools_are_read(tmp_path: Path, change: object) -> None:
    source = rewrite(coco(tmp_path, TWO), change)
    report = run('coco', source, tmp_path / 'out')
    assert report.problems == ()
    name = report.rows[0]['uuid']
    assert_masks(stored(tmp_path / 'out', name), {1: [f_mask(1, 1), f_mask(9, 8)]})


def test_equal_names_in_two_folders_are_two_cases(tmp_path: Path) -> None:
    def spread(content: dict) -> None:
        content['images'] = [
            {'id': i, 'file_name': f's{i}\\t.png', 'height': HW[0], 'width': HW[1]} for i in (0, 1)
        ]
        for i, annotation in enumerate(content['annotations']):
            annotation['image_id'] = i

    source = rewrite(coco(tmp_path, TWO), spread)
    for i in (0, 1):
        (tmp_path / f's{i}').mkdir()
        Image.fromarray(IMAGE + np.uint8(i)).save(tmp_path / f's{i}' / 't.png')
    report = run('coco', source, tmp_path / 'out')
    assert report.problems == ()
    for i, mask in enumerate([f_mask(1, 1), f_mask(9, 8)]):
        assert_masks(stored(tmp_path / 'out', f's{i}_t'), {1: [mask]})
        image = read_image(tmp_path / 'out' / 'train' / f's{i}_t' / 'image.tif')
        assert (image == IMAGE + np.uint8(i)).all()
    # a name alone would be either image
    rewrite(source, lambda c: c['images'][0].update(file_name='/other/t.png'))
    Image.fromarray(IMAGE).save(tmp_path / 't.png')
    assert '/other/t.png' in run('coco', source, tmp_path / 'again').problems[0]


def test_an_image_that_is_listed_twice_is_said(tmp_path: Path) -> None:
    source = rewrite(
        coco(tmp_path, TWO), lambda c: c['images'].append({'id': 8, 'file_name': 'a.png'})
    )
    assert 'a.png: is listed twice' in run('coco', source, tmp_path / 'out').problems[0]


# ---- categories ----


@pytest.mark.parametrize('skip', ['dark', ' dark ', 'Dark'])
def test_a_skipped_category_is_no_class(tmp_path: Path, skip: str) -> None:
    source = coco(tmp_path, [TWO[0], {**TWO[1], 'category_id': 30}])
    report = run('coco', source, tmp_path / 'out', skipped=frozenset({skip}))
    assert report.class_names == ('pale',)
    assert report.left_out == {'cells of class dark': 1}
    assert_masks(stored(tmp_path / 'out', 'a'), {1: [f_mask(1, 1)]})
    assert any('only capitals differ' in note for note in report.notes) == (skip == 'Dark')


def test_renamed_categories_are_the_classes(tmp_path: Path) -> None:
    source = coco(tmp_path, [TWO[0], {**TWO[1], 'category_id': 30}])
    report = run('coco', source, tmp_path / 'out', class_map={'dark': 'cell', 'pale': 'cell'})
    assert report.class_names == ('cell',)
    assert_masks(stored(tmp_path / 'out', 'a'), {1: [f_mask(1, 1), f_mask(9, 8)]})


def test_roots_and_equal_names(tmp_path: Path) -> None:
    source = coco(tmp_path, [TWO[0], {**TWO[1], 'category_id': 30}])
    categories = [
        {'id': 0, 'name': 'cells', 'supercategory': 'none'},  # Roboflow's root
        {'id': 4, 'name': 'pale ', 'supercategory': 'cells'},
        {'id': 30, 'name': 'pale', 'supercategory': 'cells'},
    ]
    rewrite(source, lambda c: c.update(categories=categories))
    report = run('coco', source, tmp_path / 'out')
    assert report.class_names == ('pale',)
    assert_masks(stored(tmp_path / 'out', 'a'), {1: [f_mask(1, 1), f_mask(9, 8)]})
    assert 'several categories are named pale' in report.notes[0]
    assert 'category cells has no cells and stands above others' in report.notes[1]


@pytest.mark.parametrize('categories', [None, [], [{'id': 4}], [{'id': 4, 'name': ' '}]])
def test_categories_without_a_name(tmp_path: Path, categories: list | None) -> None:
    source = coco(tmp_path, TWO)
    rewrite(source, lambda c: c.pop('categories'))
    if categories is not None:
        rewrite(source, lambda c: c.update(categories=categories))
    with pytest.raises(CellSegError, match='name the class of all cells with --class'):
        run('coco', source, tmp_path / 'out')
    for options in ({'single_class': 'cell'}, {'class_names': ('cell',)}):
        report = run('coco', source, tmp_path / 'out', replace=True, **options)
        assert report.class_names == ('cell',)
        assert len(stored(tmp_path / 'out', 'a')[1]) == 2


# ---- masks of many cells ----


def test_a_mask_of_all_cells_is_not_one(tmp_path: Path) -> None:
    spots = np.zeros(HW, bool)
    spots[1:16:4, 1:22:5] = True
    source = coco(tmp_path, [{'segmentation': packed(spots)}])
    problem = run('coco', source, tmp_path / 'out').problems[0]
    assert f'1 of 1 masks lie in several parts, {spots.sum()} in all' in problem
    assert '--binary components' in problem
    report = run('coco', source, tmp_path / 'out', binary='components')
    assert report.rows[0]['c1'] == str(spots.sum())
    run('coco', source, tmp_path / 'ids', binary='ids')
    assert_masks(stored(tmp_path / 'ids', 'a'), {1: [spots]})


def test_a_cell_in_two_parts_is_one(tmp_path: Path) -> None:
    torn = f_mask(1, 1) | f_mask(9, 8)
    source = coco(tmp_path, [{'segmentation': packed(torn)}])
    report = run('coco', source, tmp_path / 'out')
    assert_masks(stored(tmp_path / 'out', 'a'), {1: [torn]})
    assert '1 of 1 cells lie in several parts' in report.notes[0]


def test_half_letters_of_json_can_be_reported(tmp_path: Path) -> None:
    source = coco(tmp_path, TWO)
    half = '\ud800'  # JSON can write it, no file and no terminal can
    rewrite(source, lambda c: c['annotations'][0].update(id=half, segmentation=[]))
    rewrite(source, lambda c: c['categories'][0].update(name=half))
    rewrite(source, lambda c: c['images'].append({'id': half, 'file_name': f'{half}.png'}))
    report = run('coco', source, tmp_path / 'out')
    assert len(report.problems) == 1
    assert report.text().encode().count(b'\\ud800') >= 3


def test_livecell_as_it_is_unpacked(tmp_path: Path) -> None:
    images = tmp_path / 'images' / 'livecell_train_val_images'
    (images / 'A172').mkdir(parents=True)
    (images / 'BV2').mkdir()
    name = 'A172_Phase_A7_1_00d00h00m_1.tif'
    tifffile.imwrite(images / 'A172' / name, IMAGE[..., 0], photometric='minisblack')
    square = [3.0, 3.0, 12.0, 3.0, 12.0, 12.0, 3.0, 12.0]
    content = {  # objects by id, as LIVECell has them
        'info': {},
        'licenses': [],
        'images': [
            {'id': 9, 'file_name': name, 'original_filename': name, 'url': 'x/' + name}
            | {'height': HW[0], 'width': HW[1]}
        ],
        'annotations': {
            '5': {
                'id': 5,
                'image_id': 9,
                'category_id': 1,
                'segmentation': [square],
                'area': 81.0,
                'bbox': [3.0, 3.0, 9.0, 9.0],
                'iscrowd': 0,
            }
        },
        'categories': [{'supercategory': 'cell', 'id': 1, 'name': 'cell'}],
    }
    path = tmp_path / 'livecell_coco_train.json'
    path.write_text(json.dumps(content))
    report = run('coco', path, tmp_path / 'out', image_dir=images)
    assert 'images were found one folder further down' in report.text()
    expected = np.zeros(HW, bool)
    expected[3:12, 3:12] = True
    assert_masks(stored(tmp_path / 'out', Path(name).stem), {1: [expected]})
    tifffile.imwrite(images / 'BV2' / name, IMAGE[..., 0], photometric='minisblack')
    report = run('coco', path, tmp_path / 'again', image_dir=images)
    assert 'is not there' in report.problems[0]  # two of the name: none is guessed

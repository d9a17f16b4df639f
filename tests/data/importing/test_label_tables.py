"""Label maps with a table: each cell gets the class of its row, whatever lacks one is counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.results.export import write_cells_csv, write_label_map
from tests.support.import_sources import HW, IMAGE, assert_masks, f_mask, numbered, run, stored

MASKS = [f_mask(1, 1), f_mask(9, 8), f_mask(1, 15)]
IDS = [300, 2, 7]


def source_of(folder: Path, table: str, name: str) -> Path:
    folder.mkdir()
    Image.fromarray(IMAGE).save(folder / 'a.png')
    Image.fromarray(numbered(MASKS, IDS)).save(folder / 'a_masks.png')
    (folder / name).write_text(table, encoding='utf-8')
    return folder


@pytest.mark.parametrize(
    ('name', 'table'),
    [
        ('a_classes.csv', 'id,class\n300,x\n2,y\n7,x\n'),
        ('a.csv', '\ufeffarea;Label;Cell_Type\n1,5;300.0;x\n2;2;y \n3;7;x\n'),  # a spreadsheet
        ('a_masks.json', json.dumps({'0': 'background', '300': 'x', '2': 'y', '7': 'x'})),
        (
            'a_types.json',
            json.dumps({'2': {'type': 'y'}, '300': {'type': 'x'}, '7': {'type': 'x'}}),
        ),
        (
            'a.json',
            json.dumps({'cells': [{'id': i, 'class': c} for i, c in zip(IDS, 'xyx', strict=True)]}),
        ),
    ],
)
def test_tables(tmp_path: Path, name: str, table: str) -> None:
    report = run('label-table', source_of(tmp_path / 'in', table, name), tmp_path / 'out')
    assert (report.problems, report.notes) == ((), ())
    assert report.class_names == ('x', 'y')
    assert_masks(stored(tmp_path / 'out', 'a'), {1: [MASKS[2], MASKS[0]], 2: [MASKS[1]]})


def test_own_exports_come_back(tmp_path: Path) -> None:
    (tmp_path / 'in').mkdir()
    Image.fromarray(IMAGE).save(tmp_path / 'in' / 'a.png')
    cells = InstanceSet.from_crops(
        'a',
        1,
        HW,
        crops=MASKS,
        offsets_yx=np.zeros((3, 2), np.int64),
        class_ids=np.array([1, 0, 1]),
        scores=np.array([0.5, 0.9, 0.7], np.float32),
    )
    write_label_map(tmp_path / 'in' / 'a.labels.tif', cells)
    write_cells_csv(tmp_path / 'in' / 'a.cells.csv', cells, ('x', 'y'))
    report = run('label-table', tmp_path / 'in', tmp_path / 'out')
    assert not report.problems
    assert_masks(stored(tmp_path / 'out', 'a'), {1: [MASKS[1]], 2: [MASKS[2], MASKS[0]]})


def test_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    table = 'id,class\n300,x\n300,y\n2,y\n9,x\ntwo,x\n7,\n'
    report = run('label-table', source_of(tmp_path / 'in', table, 'a.csv'), tmp_path / 'out')
    assert_masks(stored(tmp_path / 'out', 'a'), {2: [MASKS[1]]})
    assert report.left_out == {
        'ids with several classes': 1,
        'cells without a class (--class names one for them)': 2,
        'rows whose id the label map has not': 1,
        'rows whose id is no whole number': 1,
    }


def test_bad_tables_cost_no_other(tmp_path: Path) -> None:
    source = source_of(tmp_path / 'in', 'id,class\n300,x\n2,y\n7,x\n', 'a.csv')
    for name, suffix, table in (
        ('b', 'json', '{"1": '),
        ('c', 'csv', 'one,two\n1,x\n'),
        ('d', 'txt', ''),
        ('e', 'json', '[1, 2]'),
    ):
        Image.fromarray(IMAGE).save(source / f'{name}.png')
        Image.fromarray(numbered(MASKS, IDS)).save(source / f'{name}_masks.png')
        (source / f'{name}.{suffix}').write_text(table)
    problems = run('label-table', source, tmp_path / 'out').problems
    assert 'b.json: not valid JSON' in problems[0]
    assert "c.csv: has the columns ['one', 'two']; expected a CSV file with" in problems[1]
    assert 'd_masks.png: has 0 tables of classes (none); expected one' in problems[2]
    assert 'e.json: is no table of classes' in problems[3]
    assert [path.name for path in (tmp_path / 'out' / 'train').iterdir()] == ['a']


def test_unknown_classes_are_named(tmp_path: Path) -> None:
    source = source_of(tmp_path / 'in', 'id,class\n300,x\n2,z\n7,x\n', 'a.csv')
    report = run('label-table', source, tmp_path / 'out', class_names=('x', 'y'))
    assert "has cells of class 'z'; expected x, y" in report.problems[0]
    report = run('label-table', source, tmp_path / 'out', skipped=frozenset({'z'}))
    assert report.left_out == {'cells of class z': 1}

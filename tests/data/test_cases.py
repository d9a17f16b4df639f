"""cases: folders and lists become cases, in order, with the ids of the collection."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tifffile

from cellseg_mm.data.cases import Case, find_cases, scan_cases
from tests.data.test_labels import write_case

HW = (17, 11)


def make_data(root: Path, names: list[str]) -> None:
    for name in names:
        write_case(root / 'train' / name, {0: np.zeros(HW), 2: np.zeros(HW)})
    test = root / 'test_release'
    test.mkdir()
    entries = []
    for i, name in enumerate(reversed(names)):
        tifffile.imwrite(test / f'{name}.tif', np.zeros((*HW, 3), np.uint8), photometric='rgb')
        size = {'height': HW[0], 'width': HW[1]}
        entries.append({'file_name': f'{name}.tif', 'id': 10 * (i + 1), **size})
    (root / 'test_image_name_to_ids.json').write_text(json.dumps(entries))


NAMES = ['b b', 'a', 'zürich', 'C']


def test_find_cases_of_both_splits(tmp_path: Path) -> None:
    make_data(tmp_path, NAMES)
    train = find_cases(tmp_path, 'train', 4)
    assert [case.name for case in train] == ['C', 'a', 'b b', 'zürich']
    assert [case.image_id for case in train] == [1, 2, 3, 4]
    assert train[0] == Case(
        'C',
        tmp_path / 'train/C/image.tif',
        {0: tmp_path / 'train/C/class1.tif', 2: tmp_path / 'train/C/class3.tif'},
        1,
        HW,
    )
    test = find_cases(tmp_path, 'test', 4)
    assert [(case.name, case.image_id) for case in test] == [
        ('C', 10),
        ('a', 30),
        ('b b', 40),
        ('zürich', 20),
    ]
    assert all(case.image_hw == HW and not case.label_paths for case in test)


def test_find_cases_through_links(tmp_path: Path) -> None:
    make_data(tmp_path / 'real', NAMES)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/train').symlink_to(tmp_path / 'real/train', target_is_directory=True)
    cases = find_cases(tmp_path / 'data', 'train', 3)
    assert [case.name for case in cases] == sorted(NAMES)
    assert cases[0].image_path == tmp_path / 'data/train/C/image.tif'


def test_class_files_in_other_spelling(tmp_path: Path) -> None:
    folder = write_case(tmp_path / 'train/a', {1: np.ones(HW)}).image_path.parent
    (folder / 'class2.tif').rename(folder / 'Class2.TIF')
    (folder / 'image.tif').rename(folder / 'image.tiff')
    (case,) = find_cases(tmp_path, 'train', 4)
    assert case.label_paths == {1: folder / 'Class2.TIF'}
    assert case.image_path == folder / 'image.tiff'


def test_exclude_keeps_the_ids_of_others(tmp_path: Path) -> None:
    make_data(tmp_path, NAMES)
    (tmp_path / 'exclude.txt').write_text('# broken scan\na   # too dark\n\nzürich\n')
    train = find_cases(tmp_path, 'train', 4)
    assert [(case.name, case.image_id) for case in train] == [('C', 1), ('b b', 3)]
    assert [case.name for case in find_cases(tmp_path, 'test', 4)] == ['C', 'b b']
    scan = scan_cases(tmp_path, 'train', 4)
    assert scan.excluded == ['a', 'zürich']
    (tmp_path / 'none.txt').write_text('')
    assert len(scan_cases(tmp_path, 'train', 4, exclude_file=tmp_path / 'none.txt').cases) == 4
    (problem,) = scan_cases(tmp_path, 'train', 4, exclude_file=tmp_path / 'other.txt').problems
    assert 'other.txt: cannot be read' in problem


def test_decomposed_accents_match(tmp_path: Path) -> None:
    make_data(tmp_path, ['a'])
    test = tmp_path / 'test_release'
    (test / 'a.tif').rename(test / 'u\u0308.tif')
    entries = [{'file_name': '\u00fc.tif', 'id': 3, 'height': HW[0], 'width': HW[1]}]
    (tmp_path / 'test_image_name_to_ids.json').write_text(json.dumps(entries))
    assert [case.image_id for case in find_cases(tmp_path, 'test', 4)] == [3]


def test_entries_without_file_are_noted_not_refused(tmp_path: Path) -> None:
    make_data(tmp_path, ['a', 'b'])
    (tmp_path / 'test_release/b.tif').unlink()
    scan = scan_cases(tmp_path, 'test', 4)
    assert [case.name for case in scan.cases] == ['a']
    assert not scan.problems
    assert len(scan.notes) == 1
    assert 'b.tif has no file' in scan.notes[0]

"""CoNSeP's files, written by scipy as HoVer-Net's authors did, arrive cell by cell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy import io

from tests.support.import_sources import IMAGE, assert_masks, f_mask, numbered, run, stored

MASKS = [f_mask(1, 1), f_mask(9, 8), f_mask(1, 15)]
IDS = [9, 2, 4]
TYPES = [1, 7, 7]  # of the cells above


def add(source: Path, name: str, **variables: np.ndarray) -> Path:
    """One image of CoNSeP, types as floats, as MATLAB keeps them."""
    for folder in ('Images', 'Labels'):
        (source / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(IMAGE).save(source / 'Images' / f'{name}.png')
    path = source / 'Labels' / f'{name}.mat'
    io.savemat(path, {'inst_map': numbered(MASKS, IDS).astype(np.float64), **variables})
    return path


TYPE_MAP = numbered(MASKS, TYPES).astype(np.float64)
INST_TYPE = np.array([[7.0], [7.0], [1.0]])  # by rising id
EXPECTED = {1: [MASKS[0]], 7: [MASKS[1], MASKS[2]]}


def test_types_of_maps_and_of_cells(tmp_path: Path) -> None:
    add(tmp_path / 'Train', 'train_1', type_map=TYPE_MAP, inst_type=INST_TYPE)
    add(tmp_path / 'Train', 'train_2', type_map=TYPE_MAP)
    by_number = np.array([0, 7, 0, 7, 0, 0, 0, 0, 1])[:, None]  # one row for each id up to 9
    add(tmp_path / 'Train', 'train_3', inst_type=by_number)
    report = run('consep', tmp_path / 'Train', tmp_path / 'out')
    assert (report.problems, report.notes) == ((), ())
    assert report.class_names[0] == 'other'
    for k in (1, 2, 3):
        assert_masks(stored(tmp_path / 'out', f'train_{k}'), EXPECTED)


def test_files_without_types_hold_one_class(tmp_path: Path) -> None:
    add(tmp_path / 'in', 'a')
    report = run('consep', tmp_path / 'in', tmp_path / 'out', single_class='nucleus')
    assert report.class_names == ('nucleus',)
    assert_masks(stored(tmp_path / 'out', 'a'), {1: [MASKS[1], MASKS[2], MASKS[0]]})


def test_types_may_be_joined_and_missing(tmp_path: Path) -> None:
    types = np.array([[7], [0], [1]])
    add(tmp_path / 'in', 'a', inst_type=types)
    report = run('consep', tmp_path / 'in', tmp_path / 'out', skipped=frozenset({'other'}))
    assert report.left_out == {
        'cells of class other': 1,
        'cells of type 0 (--class names one for them)': 1,
    }
    assert_masks(stored(tmp_path / 'out', 'a'), {7: [MASKS[1]]})


def test_bad_files_cost_no_other(tmp_path: Path) -> None:
    source = tmp_path / 'in'
    add(source, 'a', type_map=TYPE_MAP)
    whole = add(source, 'b', type_map=TYPE_MAP)
    whole.write_bytes(whole.read_bytes()[:300])
    add(source, 'c', type_map=TYPE_MAP[1:])
    add(source, 'd', inst_type=np.array([[9], [9], [9]]))
    add(source, 'e', inst_map=numbered(MASKS, IDS).T)
    io.savemat(add(source, 'f'), {'other': TYPE_MAP})
    add(source, 'g', inst_type=np.array([[1], [1]]))
    add(source, 'h', inst_map=TYPE_MAP / 2)
    add(source, 'j', inst_type=np.zeros((0, 1)))
    (source / 'Images' / 'a.png').rename(source / 'Images' / 'i.png')
    Image.fromarray(IMAGE).save(source / 'Images' / 'a.png')
    report = run('consep', source, tmp_path / 'out')
    text = '\n'.join(report.problems)
    assert 'b.mat: cannot be read' in text
    assert 'c.mat: type_map has the shape (16, 23), inst_map (17, 23)' in text
    assert "d.mat: has cells of class 'type 9'; expected other, inflammatory" in text
    assert 'e.mat: inst_map has the shape (23, 17), the image (17, 23)' in text
    assert 'f.mat: has no inst_map' in text
    assert 'g.mat: inst_type has 2 entries, inst_map 3 cells up to id 9' in text
    assert 'h.mat: inst_map holds float64' in text
    assert 'j.mat: inst_type has 0 entries' in text
    assert '1 images without annotations were not used (i.png)' in report.text()
    assert [path.name for path in (tmp_path / 'out' / 'train').iterdir()] == ['a']

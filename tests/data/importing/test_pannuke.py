"""PanNuke's arrays arrive cell by cell, and arrays that are none are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_mm.core.errors import CellSegError
from tests.support.import_sources import HW, IMAGE, assert_masks, f_mask, run, stored

MASKS = [f_mask(1, 1), f_mask(9, 8), f_mask(1, 15)]


def fold_of(source: Path) -> Path:
    """Two images as the data set is unpacked: float64, ids per channel, the last the rest."""
    images, masks = source / 'images' / 'fold1', source / 'masks' / 'fold1'
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    layers = np.zeros((2, *HW, 6))
    layers[0, MASKS[0], 0] = 7
    layers[0, MASKS[1], 0] = 3
    layers[0, MASKS[2], 4] = 7  # the same id in another channel is another cell
    layers[..., 5] = (layers[..., :5] == 0).all(axis=3)
    np.save(images / 'images.npy', np.stack([IMAGE, IMAGE[::-1]]).astype(np.float64))
    np.save(images / 'types.npy', np.array(['Breast', 'Colon']))
    np.save(masks / 'masks.npy', layers)
    return masks / 'masks.npy'


def test_a_fold(tmp_path: Path) -> None:
    fold_of(tmp_path / 'in')
    report = run('pannuke', tmp_path / 'in', tmp_path / 'out')
    assert not report.problems
    names = ['fold1_00000_Breast', 'fold1_00001_Colon']
    assert [row['uuid'] for row in report.rows] == names
    assert_masks(stored(tmp_path / 'out', names[0]), {1: [MASKS[1], MASKS[0]], 5: [MASKS[2]]})
    assert stored(tmp_path / 'out', names[1]) == {}
    for name, image in zip(names, (IMAGE, IMAGE[::-1]), strict=True):
        written = tifffile.imread(tmp_path / 'out' / 'train' / name / 'image.tif')
        assert (written[..., :3] == image).all()
    assert 'tissues, which end the names of cases: 1 Breast, 1 Colon' in report.text()


def test_classes_may_be_joined_and_left_out(tmp_path: Path) -> None:
    fold_of(tmp_path / 'in')
    options = {'class_names': ('cell',), 'class_map': {'Neoplastic': 'cell'}}
    names = ('Inflammatory', 'Connective', 'Dead', 'Epithelial')
    report = run('pannuke', tmp_path / 'in', tmp_path / 'out', skipped=frozenset(names), **options)
    assert report.left_out == {'cells of class Epithelial': 1}
    assert_masks(stored(tmp_path / 'out', report.rows[0]['uuid']), {1: [MASKS[1], MASKS[0]]})


@pytest.mark.parametrize(
    ('shape', 'sentence'),
    [((2, *HW, 5), 'has the shape'), ((3, *HW, 6), 'has the shape'), ((0,), 'has the shape')],
)
def test_arrays_that_do_not_fit(tmp_path: Path, shape: tuple[int, ...], sentence: str) -> None:
    np.save(fold_of(tmp_path / 'in'), np.zeros(shape))
    with pytest.raises(CellSegError, match=sentence):
        run('pannuke', tmp_path / 'in', tmp_path / 'out')


def test_damaged_and_pickled_arrays_are_refused(tmp_path: Path) -> None:
    masks = fold_of(tmp_path / 'in')
    masks.write_bytes(masks.read_bytes()[:-8])
    with pytest.raises(CellSegError, match=r'masks.npy: cannot be read'):
        run('pannuke', tmp_path / 'in', tmp_path / 'out')
    masks.write_bytes(masks.read_bytes().replace(b"'shape': (", b"'shape': [", 1))
    with pytest.raises(CellSegError, match=r'masks.npy: cannot be read'):
        run('pannuke', tmp_path / 'in', tmp_path / 'out')
    np.save(masks, np.array([{'a': 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CellSegError, match='without pickled objects'):
        run('pannuke', tmp_path / 'in', tmp_path / 'out')
    with pytest.raises(CellSegError, match='nothing to import as pannuke'):
        run('pannuke', tmp_path / 'in' / 'images', tmp_path / 'out')


def test_a_bad_image_costs_no_other(tmp_path: Path) -> None:
    masks = fold_of(tmp_path / 'in')
    layers = np.load(masks)
    layers[0, 0, 0, 0] = 0.5
    np.save(masks, layers)
    images = tmp_path / 'in' / 'images' / 'fold1'
    np.save(images / 'types.npy', np.array(['Breast', None], dtype=object), allow_pickle=True)
    report = run('pannuke', tmp_path / 'in', tmp_path / 'out')
    assert 'image 0 has values that are no ids' in report.problems[0]
    assert [row['uuid'] for row in report.rows] == ['fold1_00001']
    assert 'types.npy: tissues are left out' in report.text()
    np.save(images / 'types.npy', np.frombuffer(b'\xff' * 8, '<U1'))  # beyond Unicode
    np.save(images / 'images.npy', np.stack([IMAGE, IMAGE]) / 255)
    report = run('pannuke', tmp_path / 'in', tmp_path / 'again')
    assert 'no whole numbers from 0 to 255' in report.problems[1]
    assert 'types.npy: tissues are left out' in report.text()

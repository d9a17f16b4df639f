"""results.whose: each way in which a file of predictions can be another's, one by one."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from cellseg_mm.core import files
from cellseg_mm.core.errors import PredictionError
from cellseg_mm.core.trainings import MARK_VERSION
from cellseg_mm.results.whose import refuse_foreign, why_foreign

NAMES = ['round', 'long']


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A work folder of fold 1 with one checkpoint."""
    folder = tmp_path / 'fold1'
    folder.mkdir()
    with zipfile.ZipFile(folder / 'best_x_iter_2.pth', 'w') as archive:
        archive.writestr('data.pkl', 'weights')
    mark = {'parts': {'model': 'm', 'train_cfg': 't'}, 'fold': 1, 'class_names': NAMES}
    files.write_json(folder / 'started.json', {'version': MARK_VERSION, **mark})
    return folder


def origin(folder: Path, **changes: object) -> dict:
    trained = {'fold': 1, 'class_names': NAMES, 'parts': {'model': 'm', 'train_cfg': 'longer'}}
    known = {
        'split': 'val',
        'fold': 1,
        'class_names': NAMES,
        'checkpoint_hash': files.file_hash(folder / 'best_x_iter_2.pth')[:16],
        'trained': trained,
    }
    return {**known, **changes, 'trained': {**trained, **changes.get('trained', {})}}


@pytest.mark.parametrize(
    ('name', 'changes'),
    [
        ('val.predictions.npz', {}),
        ('val.scores.json', {}),
        ('val.flips.predictions.npz', {'tta': 'flips'}),
        ('val.d4-scales-0-8.predictions.npz', {'tta': 'd4,scales=0.8'}),
        ('on_fold4/val.predictions.npz', {'fold': 4}),
        ('any name.npz', {}),
        ('test.predictions.npz', {'members': [], 'checkpoint_hash': ''}),
        ('val.predictions.npz', {'trained': {'parts': None, 'class_names': None}}),  # of 5578a2e
    ],
)
def test_a_folder_s_own_results_pass(folder: Path, name: str, changes: dict) -> None:
    assert why_foreign(folder / name, origin(folder, **changes)) == ''


@pytest.mark.parametrize(
    ('name', 'changes', 'says'),
    [
        pytest.param(
            'val.predictions.npz',
            {'checkpoint_hash': '0' * 16},
            rf'another checkpoint \({"0" * 16}\) than best_x_iter_2\.pth \(\w+\), which is',
            id='trained anew, not tested again',
        ),
        pytest.param(
            'on_fold4/val.predictions.npz',
            {'checkpoint_hash': '0' * 16},
            'of another checkpoint',
            id='the same on a held-out fold',
        ),
        pytest.param(
            'val.predictions.npz', {'split': 'train'}, 'is of train .*called val', id='other split'
        ),
        pytest.param(
            'val.predictions.npz', {'tta': 'flips'}, r'is of val\.flips .*called val', id='views'
        ),
        pytest.param(
            'val.flips.predictions.npz', {}, r'is of val .*called val\.flips', id='no views'
        ),
        pytest.param(
            'val.predictions.npz', {'trained': {'fold': 0}}, 'model of fold 0, .*fold 1', id='fold'
        ),
        pytest.param(
            'val.predictions.npz',
            {'trained': {'parts': {'model': 'other'}}},
            'other values of model than the folder',
            id='recipe',
        ),
        pytest.param(
            'val.predictions.npz',
            {'class_names': NAMES[::-1]},
            'classes long, round, its checkpoint has round, long',
            id='order of classes',
        ),
        pytest.param(
            'val.predictions.npz',
            {'class_names': ['a', 'b'], 'trained': {'class_names': None}},
            'classes a, b, the folder has round, long',
            id='other classes',
        ),
    ],
)
def test_what_is_another_s_is_refused(folder: Path, name: str, changes: dict, says: str) -> None:
    with pytest.raises(PredictionError, match=says) as caught:
        refuse_foreign(folder / name, origin(folder, **changes))
    assert str(caught.value).startswith(f'{folder / name}: ')
    assert 'test it again' in str(caught.value)


def test_a_mark_that_names_another_file_is_the_reason(folder: Path) -> None:
    mark = {'version': MARK_VERSION, 'best': 'best_x_iter_2.pth', 'best_hash': '1' * 16}
    files.write_json(folder / 'finished.json', mark)
    why = why_foreign(folder / 'val.predictions.npz', origin(folder))
    assert f'finished.json says that training ended with {"1" * 16}' in why


def test_files_elsewhere_are_taken_at_their_word(folder: Path, tmp_path: Path) -> None:
    moved = origin(folder, checkpoint_hash='0' * 16, split='train')
    assert why_foreign(tmp_path / 'val.predictions.npz', moved) == ''
    with pytest.raises(PredictionError, match='its checkpoint has round, long'):
        refuse_foreign(tmp_path / 'x.npz', {**moved, 'class_names': ['a', 'b']})

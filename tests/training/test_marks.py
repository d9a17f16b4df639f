"""training.marks: a recipe is what decides the weights; a folder holds one training's."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from cellseg_mm.core.errors import CellSegError, ConfigError
from cellseg_mm.core.trainings import MARK_VERSION, read_mark
from cellseg_mm.training import marks
from cellseg_mm.training.marks import (
    alone,
    recipe_hash,
    recipe_parts,
    refuse_changed_settings,
    refuse_other_training,
)
from tests.support.micro import ROOT

pytestmark = pytest.mark.mm


def recipe(**changes: object) -> Config:
    cfg = Config(
        {
            'model': {
                'norm': {'type': 'BN', 'eps': 0.001},
                'roi_head': {'type': 'StandardRoIHead'},
                'test_cfg': {'score_thr': 0.05},
            },
            'train_dataloader': {
                'batch_size': 2,
                'num_workers': 4,
                'dataset': {'data_root': '/a', 'folds_file': 'auto', 'steps': [{'prob': 0.5}]},
            },
            'optim_wrapper': {'lr': 0.01},
            'train_cfg': {'max_iters': 9},
            'work_dir': '/a/out',
            'load_from': '/a/start.pth',
        }
    )
    cfg.merge_from_dict(changes)
    return cfg


@pytest.mark.parametrize(
    'changes',
    [
        {'train_dataloader.num_workers': 0, 'train_dataloader.persistent_workers': False},
        {'train_dataloader.dataset.data_root': '/b'},
        {'train_dataloader.dataset.folds_file': '/b/folds.json'},
        {'model.test_cfg.score_thr': 0.5},
        {'model.norm.type': 'SyncBN'},  # the same norm, where there is a kernel for it
        {'model.roi_head.type': 'CellRoIHead'},  # the same, without settings of its own
        {'work_dir': '/b', 'log_level': 'DEBUG'},
        {'load_from': '/b/start.pth'},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_places_and_machines_change_no_recipe(changes: dict) -> None:
    assert recipe_hash(recipe(**changes)) == recipe_hash(recipe())
    assert recipe_parts(recipe(**changes)) == recipe_parts(recipe())


@pytest.mark.parametrize(
    ('change', 'part'),
    [
        ({'model.norm.eps': 0.002}, 'model'),
        ({'model.roi_head': {'type': 'CellRoIHead', 'mask_frame': 1.2}}, 'model'),
        ({'train_dataloader.batch_size': 4}, 'train_dataloader'),
        ({'train_dataloader.dataset.steps.0.prob': 0.6}, 'train_dataloader'),
        ({'optim_wrapper.lr': 0.02}, 'optim_wrapper'),
        ({'train_cfg.max_iters': 8}, 'train_cfg'),
        ({'randomness': {'seed': 1}}, 'randomness'),
        ({'load_from': '/a/other.pth'}, 'load_from'),
    ],
    ids=str,
)
def test_what_decides_the_weights_changes_it(change: dict, part: str) -> None:
    changed, before = recipe(**change), recipe()
    assert recipe_hash(changed) != recipe_hash(before)
    parts = recipe_parts(before)
    found = [key for key, value in recipe_parts(changed).items() if value != parts[key]]
    assert found == [part]


def test_only_whole_marks_of_this_version_count(tmp_path: Path) -> None:
    path = tmp_path / 'started.json'
    assert read_mark(path) == {}
    mark = {'version': MARK_VERSION, 'recipe': 'é'}
    path.write_text(json.dumps(mark), encoding='utf-8')
    assert read_mark(path) == mark
    for text in ('', '[1]', json.dumps(mark)[:-1], json.dumps({**mark, 'version': 1}), '{}'):
        path.write_text(text)
        assert read_mark(path) == {}
    path.write_bytes(b'\xff\xfe')
    assert read_mark(path) == {}


def state_of(**changes: object) -> dict:
    return {'parts': recipe_parts(recipe(**changes)), 'fold_hash': 'ours', 'version': MARK_VERSION}


def checkpoint(path: Path, said: dict | None) -> Path:
    torch.save({'meta': {'cellseg': said} if said else {}, 'state_dict': {}}, path)
    return path


@pytest.mark.parametrize(
    'file',
    ['best_x_iter_9.pth', 'iter_9.pth', 'epoch_1.pth', 'started.json', 'finished.json'],
)
@pytest.mark.parametrize(
    ('changes', 'folds', 'named'),
    [
        pytest.param({}, 'ours', '', id='the same training'),
        pytest.param({'optim_wrapper.lr': 0.1}, 'ours', 'optim_wrapper', id='rate'),
        pytest.param({'train_cfg.max_iters': 90}, 'ours', 'train_cfg', id='length'),
        pytest.param({'load_from': '/b/other.pth'}, 'ours', 'load_from', id='other start'),
        pytest.param({}, 'theirs', 'the folds', id='folds'),
    ],
)
def test_a_folder_that_holds_another_training_is_refused(
    tmp_path: Path, file: str, changes: dict, folds: str, named: str
) -> None:
    """Whichever of its files says so; the others are old and say nothing."""
    said = {**state_of(**changes), 'fold_hash': folds}
    checkpoint(tmp_path / 'best_x_iter_1.pth', None)
    if file.endswith('.pth'):
        checkpoint(tmp_path / file, said)
    else:
        (tmp_path / file).write_text(json.dumps(said))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if named:
        with pytest.raises(ConfigError, match=rf'{file}: is of a .*of {named} .*--work-dir'):
            refuse_other_training(tmp_path, state_of(), goes_on=False)
    else:
        refuse_other_training(tmp_path, state_of(), goes_on=False)
    if named in ('', 'train_cfg'):
        refuse_other_training(tmp_path, state_of(), goes_on=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_training_without_a_checkpoint_leaves_nothing_to_mix(tmp_path: Path) -> None:
    (tmp_path / 'started.json').write_text(json.dumps(state_of(**{'optim_wrapper.lr': 0.1})))
    refuse_other_training(tmp_path, state_of(), goes_on=False)
    refuse_other_training(tmp_path / 'not there', state_of(), goes_on=False)


def test_going_on_believes_the_checkpoint_before_the_mark(tmp_path: Path) -> None:
    """A training that was cut before its first checkpoint has left its mark beside another's."""
    other = state_of(**{'optim_wrapper.lr': 0.1})
    (tmp_path / 'started.json').write_text(json.dumps(state_of()))
    path = checkpoint(tmp_path / 'iter_9.pth', other)
    with pytest.raises(ConfigError, match=r'iter_9\.pth: training began with other .*optim_wrapp'):
        refuse_changed_settings(path, state_of())
    refuse_changed_settings(path, other)
    old = checkpoint(tmp_path / 'iter_8.pth', {'fold': 0})
    refuse_changed_settings(old, state_of())
    with pytest.raises(ConfigError, match=r'started\.json: training began'):
        refuse_changed_settings(old, other)


HOLD = """
import sys, time
from pathlib import Path
from cellseg_mm.training.marks import alone
with alone(Path(sys.argv[1])):
    print('held', flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen:
    """Let another process train in a folder; return when it does."""
    process = subprocess.Popen(
        [sys.executable, '-c', HOLD, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == 'held\n'
    return process


def test_two_trainings_in_one_folder_exclude_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(marks, 'print_log', lambda text, *_, **__: said.append(text))
    first = hold(tmp_path)
    says = rf'process {first.pid} on .*trains in this folder'
    with pytest.raises(CellSegError, match=says), alone(tmp_path):
        raise AssertionError('two at once')
    with alone(tmp_path / 'another folder'):
        pass
    first.kill()
    first.communicate()
    assert (tmp_path / 'training.lock').read_text()  # nobody could take it away
    with alone(tmp_path):
        assert str(os.getpid()) in (tmp_path / 'training.lock').read_text()
    (text,) = said
    assert f'was left by process {first.pid} on ' in text
    assert text.endswith('which is gone; taken over')
    assert not (tmp_path / 'training.lock').exists()


def test_an_error_frees_the_folder_and_a_damaged_lock_is_no_lock(tmp_path: Path) -> None:
    for text in ('', '{"process": 1', '[]', 'é'):
        (tmp_path / 'training.lock').write_text(text, encoding='utf-8')
        with pytest.raises(KeyError), alone(tmp_path):
            raise KeyError
        assert not (tmp_path / 'training.lock').exists()
    second = hold(tmp_path)  # it is free for others too
    second.communicate()
    assert second.returncode == 0


@pytest.mark.parametrize(
    ('owner', 'is_free'),
    [
        ({'process': 1, 'host': platform.node()}, False),  # lives as long as the machine does
        ({'process': 1, 'host': 'another machine'}, True),
        ({'process': os.getpid(), 'host': platform.node()}, True),
        ({}, True),
    ],
    ids=['alive', 'another machine', 'this process', 'unknown'],
)
def test_where_files_cannot_be_locked_the_owner_s_life_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: dict, is_free: bool
) -> None:
    def cannot(*_: object) -> None:
        raise OSError(errno.ENOLCK, 'no locks available')

    monkeypatch.setattr(fcntl, 'lockf', cannot)
    (tmp_path / 'training.lock').write_text(json.dumps(owner) if owner else '')
    if is_free:
        with alone(tmp_path):
            pass
    else:
        with pytest.raises(CellSegError, match='process 1 on'), alone(tmp_path):
            raise AssertionError('two at once')

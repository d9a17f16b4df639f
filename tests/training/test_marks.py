"""training.marks: a recipe is what decides the weights, wherever and however it is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mmengine.config import Config

from cellseg_mm.training.marks import MARK_VERSION, read_mark, recipe_hash, recipe_parts

pytestmark = pytest.mark.mm


def recipe(**changes: object) -> Config:
    cfg = Config(
        {
            'model': {'norm': {'type': 'BN', 'eps': 0.001}, 'test_cfg': {'score_thr': 0.05}},
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
        ({'train_dataloader.batch_size': 4}, 'train_dataloader'),
        ({'train_dataloader.dataset.steps.0.prob': 0.6}, 'train_dataloader'),
        ({'optim_wrapper.lr': 0.02}, 'optim_wrapper'),
        ({'train_cfg.max_iters': 8}, 'train_cfg'),
        ({'randomness': {'seed': 1}}, 'randomness'),
        ({'load_from': '/a/other.pth'}, None),
    ],
    ids=str,
)
def test_what_decides_the_weights_changes_it(change: dict, part: str | None) -> None:
    changed, before = recipe(**change), recipe()
    assert recipe_hash(changed) != recipe_hash(before)
    parts = recipe_parts(before)
    found = [key for key, value in recipe_parts(changed).items() if value != parts[key]]
    assert found == ([part] if part else [])


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

"""core.trainings: what is compared is what stands inside; names and times decide nothing."""

from __future__ import annotations

import logging
import os
import zipfile
from pathlib import Path

import pytest

from cellseg_mm.core import files, trainings
from cellseg_mm.core.errors import CheckpointError
from cellseg_mm.core.trainings import (
    MARK_VERSION,
    differing,
    finished_best,
    hash_in_force,
    recipe_parts,
    refuse_mixed_folder,
    refuse_other_network,
    refuse_other_recipe,
    say_once,
)

SETTINGS = {
    'model': {'type': 'Net', 'anchors': [4, 8], 'norm': {'type': 'BN'}, 'test_cfg': {'cap': 5}},
    'train_dataloader': {'batch_size': 2, 'dataset': {'fold': 0, 'classes': ('a', 'b')}},
    'optim_wrapper': {'lr': 0.01},
    'train_cfg': {'max_iters': 9},
    'load_from': '/x/start.pth',
}


def weights(path: Path, content: str, second: int) -> Path:
    """A file that looks like torch's; only hash and time are read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr(zipfile.ZipInfo('data.pkl'), content)  # dated 1980: equal bytes
    os.utime(path, (second, second))
    return path


def short(path: Path) -> str:
    return files.file_hash(path)[:16]


def finish(folder: Path, best: Path, **more: object) -> None:
    known = {'version': MARK_VERSION, 'best': best.name, 'best_hash': short(best)}
    files.write_json(folder / 'finished.json', {**known, **more})


def record(**changes: object) -> dict:
    settings = {**SETTINGS, **changes}
    return {
        'parts': recipe_parts(settings),
        'network': trainings.network_hash(settings),
        'fold': 0,
    }


def test_the_newest_best_counts_until_a_mark_names_one(tmp_path: Path) -> None:
    assert hash_in_force(tmp_path) == ('', '')
    regular = weights(tmp_path / 'iter_9.pth', 'r', 50)
    assert hash_in_force(tmp_path) == ('iter_9.pth', short(regular))
    old, new = (weights(tmp_path / f'best_x_iter_{k}.pth', str(k), k) for k in (3, 6))
    assert hash_in_force(tmp_path) == (new.name, short(new))
    (tmp_path / 'best_x_iter_9.pth').write_bytes(new.read_bytes()[:40])  # torn by a full disk
    assert hash_in_force(tmp_path) == (new.name, short(new))
    finish(tmp_path, old)
    assert finished_best(tmp_path) == old
    assert hash_in_force(tmp_path) == (old.name, short(old))


def test_a_finished_training_s_best_is_the_file_that_it_wrote(tmp_path: Path) -> None:
    best = weights(tmp_path / 'best_x_iter_6.pth', 'a', 1)
    wanted = short(best)
    finish(tmp_path, best)
    best.unlink()  # to save room: its predictions are its own still
    assert hash_in_force(tmp_path) == (best.name, wanted)
    assert finished_best(tmp_path) is None
    other = weights(tmp_path / 'best_y_iter_3.pth', 'b', 2)
    with pytest.raises(
        CheckpointError, match=r'best_x_iter_6\.pth: is gone.*best_y_iter_3\.pth is'
    ):
        hash_in_force(tmp_path)
    other.unlink()
    renamed = weights(tmp_path / 'best_z.pth', 'a', 1)
    assert finished_best(tmp_path) == renamed
    weights(best, 'from another folder', 3)
    with pytest.raises(
        CheckpointError, match=f'finished.json says that training ended with {wanted}'
    ):
        finished_best(tmp_path)


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        ({'optim_wrapper': {'lr': 0.1}}, ['optim_wrapper']),
        ({'train_cfg': {'max_iters': 8}}, ['train_cfg']),
        ({'load_from': '/y/other.pth'}, ['load_from']),
        ({'auto_scale_lr': {'enable': True, 'base_batch_size': 16}}, ['auto_scale_lr']),
        ({'auto_scale_lr': {'enable': False, 'base_batch_size': 16}}, []),
        ({'load_from': '/y/start.pth'}, []),
    ],
    ids=str,
)
def test_a_work_folder_s_best_must_be_of_the_config_s_recipe(
    tmp_path: Path, change: dict, named: list[str]
) -> None:
    path, settings = tmp_path / 'best_x.pth', {**SETTINGS, **change}
    assert trainings.other_parts(path, record(), settings) == named
    if named:
        with pytest.raises(CheckpointError, match=f'best_x.pth: .*other values of {named[0]} than'):
            refuse_other_recipe(path, record(), settings)
    else:
        refuse_other_recipe(path, record(), settings)


def test_options_of_training_alone_are_no_other_recipe(tmp_path: Path) -> None:
    """docs/fusion.md trains with exclude_folds and tests without; --amp is no setting of a test."""
    path = tmp_path / 'best_x.pth'
    asked = {**SETTINGS, 'train_dataloader': {'batch_size': 2, 'dataset': {'exclude_folds': [4]}}}
    mixed = {**asked, 'optim_wrapper': {'lr': 0.01, 'type': 'AmpOptimWrapper'}}
    said = {
        'parts': recipe_parts(mixed),
        'config_parts': recipe_parts(asked),
        'file_parts': recipe_parts(SETTINGS),
    }
    for settings in (SETTINGS, asked, mixed):
        refuse_other_recipe(path, said, settings)
    with pytest.raises(CheckpointError, match='other values of optim_wrapper than'):
        refuse_other_recipe(path, said, {**SETTINGS, 'optim_wrapper': {'lr': 0.1}})


def test_a_training_that_went_on_for_longer_keeps_its_best(tmp_path: Path) -> None:
    longer = {**SETTINGS, 'train_cfg': {'max_iters': 90}}
    files.write_json(
        tmp_path / 'started.json', {'version': MARK_VERSION, 'parts': recipe_parts(longer)}
    )
    refuse_other_recipe(tmp_path / 'best_x.pth', record(), longer)
    refuse_mixed_folder(tmp_path / 'best_x.pth', record())
    with pytest.raises(CheckpointError, match='train_cfg'):
        refuse_other_recipe(tmp_path / 'b/best_x.pth', record(), longer)


@pytest.mark.parametrize(
    ('said', 'named'),
    [
        (record(), ''),
        ({}, ''),  # an older file: nothing can be compared
        (record(model={'type': 'Other'}), 'model'),
        ({**record(), 'fold': 1}, 'fold'),
        ({**record(), 'fold_hash': 'theirs'}, 'fold_hash'),
        (record(train_cfg={'max_iters': 90}), ''),
    ],
    ids=['its own', 'old', 'model', 'fold', 'folds', 'longer'],
)
def test_a_checkpoint_from_another_folder_is_refused(
    tmp_path: Path, said: dict, named: str
) -> None:
    mark = {'version': MARK_VERSION, **record(), 'fold_hash': 'ours'}
    files.write_json(tmp_path / 'started.json', mark)
    if named:
        with pytest.raises(CheckpointError, match=f'other values of {named} than started.json'):
            refuse_mixed_folder(tmp_path / 'best_x.pth', said)
    else:
        refuse_mixed_folder(tmp_path / 'best_x.pth', said)


def test_weights_that_fit_another_network_by_shape_are_refused() -> None:
    refuse_other_network('x.pth', {}, SETTINGS)
    for same in ({'test_cfg': {'cap': 9}}, {'memory_format': 'x'}, {'init_cfg': 'somewhere'}):
        refuse_other_network(
            'x.pth', record(), {**SETTINGS, 'model': {**SETTINGS['model'], **same}}
        )
    other = {**SETTINGS, 'model': {**SETTINGS['model'], 'anchors': [8, 16]}}
    with pytest.raises(CheckpointError, match=r'x\.pth: was trained with other settings of model'):
        refuse_other_network('x.pth', record(), other)


def test_unknown_parts_pass_and_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert differing({'a': '1', 'b': '2'}, {'a': '1'}) == []
    assert differing({'a': '1'}, {'a': '2'}, {'a': '1'}) == []
    assert differing({'a': '1'}, {'a': '2'}) == ['a']
    with caplog.at_level(logging.WARNING):
        for name in ('first.pth', 'second.pth'):
            say_once(tmp_path / name, 'does not say what this test asks')
            refuse_other_recipe(tmp_path / name, {'fold': 0}, SETTINGS)
    said = [text for text in caplog.messages if 'this test' in text]
    assert said == [
        f'{tmp_path}/first.pth: does not say what this test asks (said for the first such file '
        'only)'
    ]

"""weights.find: the newest or best file that is whole; torn ones are passed over and said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cellseg_mm.core import files
from cellseg_mm.core.errors import CheckpointError
from cellseg_mm.core.trainings import MARK_VERSION
from cellseg_mm.weights.find import best_checkpoint, last_good_checkpoint
from tests.support.weights_files import save

pytestmark = pytest.mark.mm


def dated(path: Path, second: int) -> Path:
    os.utime(path, (second, second))
    return path


def test_last_good_checkpoint_goes_back_from_a_torn_one(tmp_path: Path) -> None:
    assert last_good_checkpoint(tmp_path) == (None, [])
    assert last_good_checkpoint(tmp_path / 'missing') == (None, [])
    stale = dated(save(tmp_path / 'iter_900.pth'), 1)  # of an earlier run in the same folder
    old = dated(save(tmp_path / 'iter_50.pth'), 2)
    torn = save(tmp_path / 'iter_100.pth')
    torn.write_bytes(torn.read_bytes()[:-40])
    dated(torn, 3)
    dated(save(tmp_path / 'iter_150.pth', {'meta': {}}), 4)
    dated(save(tmp_path / 'best_segm_iter_100.pth'), 5)  # has no optimiser state
    (tmp_path / 'last_checkpoint').write_text('')
    found, skipped = last_good_checkpoint(tmp_path)
    assert found == old
    assert len(skipped) == 2
    assert 'iter_150.pth: has no state_dict' in skipped[0]
    assert 'iter_100.pth: is cut short' in skipped[1]
    old.unlink()
    assert last_good_checkpoint(tmp_path)[0] == stale


def test_equal_times_go_by_step_number(tmp_path: Path) -> None:
    for step in (1000, 750, 50):
        dated(save(tmp_path / f'iter_{step}.pth'), 7)
    assert last_good_checkpoint(tmp_path)[0] == tmp_path / 'iter_1000.pth'


def test_best_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r'has no checkpoint .*train first'):
        best_checkpoint(tmp_path)
    regular = save(tmp_path / 'iter_50.pth')
    assert best_checkpoint(tmp_path) == regular
    best = dated(save(tmp_path / 'best_AP50_iter_40.pth'), 1)
    newer = dated(save(tmp_path / 'best_AP50_iter_50.pth'), 2)
    assert best_checkpoint(tmp_path) == newer
    newer.write_bytes(b'')
    dated(newer, 2)
    assert best_checkpoint(tmp_path) == best
    best.write_bytes(b'')
    with pytest.raises(CheckpointError, match='is empty'):
        best_checkpoint(tmp_path)


def told(path: Path, second: int, **trained: object) -> Path:
    meta = {'meta': {'cellseg': trained}, 'state_dict': {'w': torch.ones(2)}}
    return dated(save(path, meta), second)


def finish(folder: Path, best: Path, **said: object) -> None:
    mark = {'version': MARK_VERSION, 'best': best.name, 'best_hash': files.file_hash(best)[:16]}
    files.write_json(folder / 'finished.json', {**mark, **said})


def test_the_best_of_a_finished_training_is_the_one_that_it_names(tmp_path: Path) -> None:
    ours = told(tmp_path / 'best_x_iter_2.pth', 1, fold=0, parts={'model': 'm'})
    again = told(tmp_path / 'best_x_iter_4.pth', 2, fold=0, parts={'model': 'm'})
    assert best_checkpoint(tmp_path) == again  # the newest
    finish(tmp_path, ours, fold=0, parts={'model': 'm'})
    assert best_checkpoint(tmp_path) == ours  # a copy of the folder may have other times
    told(ours, 3, fold=0, parts={'model': 'm'}, other=1)
    with pytest.raises(CheckpointError, match=r'best_x_iter_2\.pth: has the hash .*finished\.json'):
        best_checkpoint(tmp_path)


@pytest.mark.parametrize('is_finished', [True, False])
@pytest.mark.parametrize(
    ('stranger', 'named'),
    [({'fold': 1, 'parts': {'model': 'm'}}, 'fold'), ({'fold': 0, 'parts': {'model': 'n'}}, 'mod')],
)
def test_a_best_that_was_copied_here_is_refused(
    tmp_path: Path, stranger: dict, named: str, is_finished: bool
) -> None:
    said = {'fold': 0, 'parts': {'model': 'm'}}
    ours = told(tmp_path / 'best_x_iter_2.pth', 1, **said)
    files.write_json(tmp_path / 'started.json', {'version': MARK_VERSION, **said})
    if is_finished:
        finish(tmp_path, ours, **said)
    told(tmp_path / 'best_y_iter_9.pth', 2, **stranger)
    with pytest.raises(CheckpointError, match=f'best_y_iter_9.pth: was .*values of {named}'):
        best_checkpoint(tmp_path)

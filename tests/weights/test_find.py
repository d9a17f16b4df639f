"""weights.find: the newest or best file that is whole; torn ones are passed over and said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cellseg_mm.core.errors import CheckpointError
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

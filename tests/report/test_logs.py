"""Logs of several runs are one curve."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import cellseg_mm  # noqa: F401  (makes mmdet importable where mmcv has no compiled ops)
from cellseg_mm.report.logs import read_training_log, step_of_checkpoint

pytestmark = pytest.mark.mm


def write_log(work_dir: Path, stamp: str, rows: list[dict]) -> None:
    folder = work_dir / stamp / 'vis_data'
    folder.mkdir(parents=True)
    lines = [json.dumps(row) for row in rows]
    (folder / 'scalars.json').write_text('\n'.join(lines) + '\n')


def train_row(step: int, loss: float = 1.0, lr: float = 0.1) -> dict:
    return {'loss': loss, 'lr': lr, 'step': step, 'iter': step}


def test_resumed_runs_join_and_the_later_wins(tmp_path: Path) -> None:
    first = [train_row(5, 3.0), train_row(10, 2.0), {'cell/AJI': 0.1, 'step': 0}]
    first += [train_row(15, 1.5), train_row(20, 1.4), {'cell/AJI': 0.2, 'step': 0}, train_row(25)]
    write_log(tmp_path, '20260101_000000', first)
    # resumed from iteration 20: its validation is repeated, then other steps follow
    second = [{'cell/AJI': 0.25, 'step': 0}, train_row(22, 9.0), train_row(30, 8.0)]
    second += [{'cell/AJI': math.nan, 'step': 0}]
    write_log(tmp_path, '20260102_000000', second)
    write_log(tmp_path, '20260103_000000', [{'cell/AJI': 0.9, 'step': 0}])  # a test run
    log = read_training_log(tmp_path, val_interval=10)
    assert log.train['loss'] == {5: 3.0, 10: 2.0, 15: 1.5, 20: 1.4, 22: 9.0, 30: 8.0}
    assert log.val['AJI'] == {10: 0.1, 20: 0.25}
    assert log.n_runs == 2


def test_logged_validation_steps_are_kept_and_bad_lines_counted(tmp_path: Path) -> None:
    write_log(tmp_path, '20260101_000000', [train_row(7), {'cell/AJI': 0.5, 'step': 7}])
    path = tmp_path / '20260101_000000' / 'vis_data' / 'scalars.json'
    path.write_text(path.read_text() + '{"loss": 1.0, "st')
    log = read_training_log(tmp_path)
    assert (log.val['AJI'], log.n_bad_lines) == ({7: 0.5}, 1)


def test_learning_rate_of_each_group(tmp_path: Path) -> None:
    from torch import nn

    from cellseg_mm.training.optim import group_table

    write_log(tmp_path, '20260101_000000', [train_row(5, lr=0.05), train_row(10, lr=0.1)])
    weights = [nn.Parameter(nn.Linear(1, 1).weight)]
    groups = [
        {'params': weights, 'lr': 0.1, 'initial_lr': 0.1, 'weight_decay': 1e-4, 'pattern': 'x'},
        {
            'params': weights,
            'lr': 0.1,
            'initial_lr': 1e-3,
            'weight_decay': 0,
            'pattern': 'back bone',
        },
    ]
    text = f'01/01 - mmengine - INFO - {group_table(groups)}\nsomething else\n'
    (tmp_path / '20260101_000000' / '20260101_000000.log').write_text(text)
    curves = read_training_log(tmp_path).lr_curves()
    assert curves['x'] == {5: 0.05, 10: 0.1}
    assert curves['back bone'] == pytest.approx({5: 0.0005, 10: 0.001})


@pytest.mark.parametrize(
    ('name', 'step'),
    [
        ('best_cell_segm_mAP_50_iter_400.pth', 400),
        ('epoch_12.pth', None),
        ('best_x_epoch_3.pth', 3),
    ],
)
def test_step_of_checkpoint(name: str, step: int | None) -> None:
    assert step_of_checkpoint(name) == step

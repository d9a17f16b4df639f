"""data.preparing.text: tables add up; the next command can be typed as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from cellseg_mm.data.preparing import prepare
from cellseg_mm.data.preparing.text import (
    class_table,
    fold_table,
    next_command,
    size_table,
)
from tests.support.prepared_cases import PARAMS


def test_tables_add_up(data: Path) -> None:
    report = prepare.prepare(data, PARAMS)
    assert class_table(report).splitlines() == [
        'class  cells  images  most in one  mean px',
        'round     10      10            1       28',
        'long      10      10            1       21',
    ]
    assert size_table(report).splitlines()[:2] == [
        'longer side    train  test',
        'to 64 px          10     2',
    ]
    rows = [list(map(int, line.split())) for line in fold_table(report).splitlines()[1:]]
    assert np.array(rows)[:, 1:].sum(axis=0).tolist() == [10, 10, 10, 10]


def test_next_command_says_where_the_data_are(data: Path, tmp_path: Path) -> None:
    train = 'python tools/train.py configs/fold0.py'
    out = tmp_path / 'my folds'
    out.mkdir()
    inside = prepare.prepare(data, PARAMS)
    apart = prepare.prepare(data, replace(PARAMS, out_dir=out))
    known = {'CELLSEG_DATA': str(data)}
    assert next_command(inside, {}) == f'export CELLSEG_DATA={data} && {train}'
    assert next_command(inside, known) == train
    folds = f"CELLSEG_FOLDS='{out}/folds.json'"
    assert next_command(apart, {}) == f'export CELLSEG_DATA={data} {folds} && {train}'
    assert next_command(apart, known) == f'export {folds} && {train}'
    stale = {**known, 'CELLSEG_FOLDS': str(out / 'folds.json')}
    assert next_command(inside, stale) == (f'export CELLSEG_FOLDS={data}/folds.json && {train}')

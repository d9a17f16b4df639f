"""data.preparing.index: used for unchanged files only."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_mm.data.preparing import prepare
from tests.support.prepared_cases import PARAMS, cell_map


def test_index_is_used_only_for_unchanged_files(data: Path) -> None:
    prepare.prepare(data, PARAMS)
    path = data / 'train/p0-0/class1.tif'
    before = path.stat()
    tifffile.imwrite(path, cell_map((1, 2, 6, 2, 9), (3, 20, 24, 2, 9)))
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # one nanosecond is enough
    report = prepare.prepare(data, PARAMS)
    assert report.n_reused == 11
    assert report.train[0].counts == (2, 1)
    tifffile.imwrite(data / 'train/p0-1/class1.tif', cell_map((1, 2, 6, 2, 9)).astype(np.uint16))
    (data / 'train/p1-2/class2.tif').unlink()
    report = prepare.prepare(data, PARAMS)
    assert report.n_reused == 10
    assert report.train[2].counts == (1, 0)
    assert prepare.prepare(data, replace(PARAMS, use_index=False)).n_reused == 0


@pytest.mark.parametrize(
    'damage',
    [
        pytest.param(lambda text: '', id='empty'),
        pytest.param(lambda text: text[: len(text) // 2], id='cut'),
        pytest.param(lambda text: '[]', id='list'),
        pytest.param(lambda text: '{"settings": 3}', id='other keys'),
        pytest.param(lambda text: text.replace('"version": 3', '"version": 2'), id='version'),
        pytest.param(lambda text: text.replace('"um_per_px": null', '"um_per_px": -1'), id='size'),
        pytest.param(lambda text: text.replace('"n_classes": 2', '"n_classes": 3'), id='classes'),
        pytest.param(lambda text: text.replace('"thumb": "', '"thumb": "zz'), id='thumb'),
        pytest.param(lambda text: text.replace('"detail": "', '"detail": "00'), id='detail'),
        pytest.param(lambda text: re.sub(r'"counts": \[.', '"counts": [[]', text), id='counts'),
        pytest.param(
            lambda text: re.sub(r'"counts": \[., .\]', '"counts": [1]', text), id='length'
        ),
        pytest.param(lambda text: text.replace('"facts"', '"fact"'), id='no facts'),
        pytest.param(lambda text: '[' * 100_000, id='deep'),
    ],
)
def test_damaged_index_is_not_trusted(data: Path, damage) -> None:
    good = prepare.prepare(data, PARAMS)
    text = (data / 'index.json').read_text()
    assert damage(text) != text
    (data / 'index.json').write_text(damage(text))
    report = prepare.prepare(data, PARAMS)
    assert report.n_reused == 0
    assert report.train == good.train
    assert (data / 'index.json').read_text() == text


def test_cases_with_errors_are_read_again(data: Path) -> None:
    tifffile.imwrite(data / 'train/p0-0/class1.tif', -cell_map((1, 2, 6, 2, 9)))
    assert len(prepare.prepare(data, PARAMS).errors) == 1
    report = prepare.prepare(data, PARAMS)
    assert len(report.errors) == 1
    assert report.n_reused == 11

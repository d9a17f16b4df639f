"""The range of values of a data folder: decided once for all images, recorded, kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.data.config import CLASS_NAMES
from cellseg_mm.data.intensity import ValueRange, load_range
from cellseg_mm.data.preparing import prepare
from cellseg_mm.data.preparing.records import PrepareParams
from cellseg_mm.data.preparing.text import screen_text

HW = (40, 50)
PARAMS = PrepareParams(class_names=CLASS_NAMES, n_folds=2, n_workers=1)


def write_image(root: Path, name: str, high: int, dtype: str = 'uint16', seed: int = 0) -> Path:
    """Write a case whose values go up to ``high``, and beyond in one burnt pixel."""
    folder = root / 'train' / name
    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).uniform(0, high, HW).astype(dtype)
    values[0, :5] = high
    if dtype != 'uint8':
        values[9, 9] = 16 * high
    tifffile.imwrite(folder / 'image.tif', values)
    tifffile.imwrite(
        folder / 'class1.tif', (np.arange(HW[0] * HW[1]).reshape(HW) < 60).astype('u1')
    )
    return folder / 'image.tif'


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for i, high in enumerate((4000, 3000, 3500, 4095)):
        write_image(tmp_path, f'c{i}', high, seed=i)
    return tmp_path


def kinds(report) -> set[str]:
    return {warning.kind for warning in report.warnings}


def test_one_range_is_recorded_and_said_in_one_line(data: Path) -> None:
    write_image(data, 'eight', 200, 'uint8', seed=9)
    report = prepare.prepare(data, PARAMS)
    assert report.errors == ()
    assert load_range(data / 'range.json') == ValueRange(0, 4095)
    lines = [line for line in screen_text(report).splitlines() if line.startswith('range of')]
    assert len(lines) == 1
    assert '4 of 5 images have more than 8 bits; their values 0..4095 become 0..255' in lines[0]
    assert not kinds(report) & {'dim image', 'image of another scale', 'range of values'}


def test_8_bit_data_have_no_range(tmp_path: Path) -> None:
    for i in range(2):
        write_image(tmp_path, f'c{i}', 200, 'uint8', seed=i)
    report = prepare.prepare(tmp_path, replace(PARAMS, value_range='0,99'))
    assert (report.errors, report.chosen) == ((), None)
    assert not (tmp_path / 'range.json').exists()
    assert 'range of values' in kinds(report)  # it was asked for and had no effect


def test_odd_images_are_named_and_do_not_decide(data: Path) -> None:
    write_image(data, 'black', 300, seed=7)
    write_image(data, 'white', 60000, 'uint32', seed=8)
    report = prepare.prepare(data, PARAMS)
    assert report.chosen.value_range == ValueRange(0, 4095)
    texts = {w.kind: w.text for w in report.warnings}
    assert 'black/image.tif' in texts['dim image']
    assert 'white/image.tif' in texts['image of another scale']


def test_what_is_recorded_is_kept_until_told_otherwise(data: Path) -> None:
    prepare.prepare(data, PARAMS)
    for i in range(4):
        write_image(data, f'c{i}', 2000, seed=i)
    report = prepare.prepare(data, PARAMS)
    assert load_range(data / 'range.json') == ValueRange(0, 4095)
    assert 'range of values' in kinds(report)
    report = prepare.prepare(data, replace(PARAMS, value_range='auto'))
    assert load_range(data / 'range.json') == ValueRange(0, 2000)
    assert 'range of values' not in kinds(report)
    report = prepare.prepare(data, replace(PARAMS, value_range='100,900'))
    assert load_range(data / 'range.json') == ValueRange(100, 900)
    assert prepare.prepare(data, PARAMS).chosen.value_range == ValueRange(100, 900)


def test_with_another_folder_for_results_the_range_lies_beside_the_folds(
    data: Path, tmp_path: Path
) -> None:
    prepare.prepare(data, replace(PARAMS, out_dir=tmp_path / 'out'))
    assert load_range(tmp_path / 'out' / 'range.json') == ValueRange(0, 4095)
    assert not (data / 'range.json').exists()


def test_facts_that_are_remembered_give_the_same_range(data: Path) -> None:
    prepare.prepare(data, PARAMS)
    (data / 'range.json').unlink()
    report = prepare.prepare(data, PARAMS)
    assert report.n_reused == 4
    assert load_range(data / 'range.json') == ValueRange(0, 4095)


def test_a_damaged_range_file_is_an_error(data: Path) -> None:
    (data / 'range.json').write_text(json.dumps({'range': [9]}))
    report = prepare.prepare(data, PARAMS)
    assert 'range.json: holds no range' in report.errors[0]


def test_a_wrong_word_is_an_error_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match='expected two numbers'):
        replace(PARAMS, value_range='bright')

"""The size of pixels of a data folder: found per case, recorded where all agree."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tifffile

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.data.pixel_size import recorded_size
from cellseg_mm.data.preparing import prepare
from cellseg_mm.data.preparing.records import PrepareParams
from cellseg_mm.data.preparing.text import screen_text
from tests.support.prepared_cases import PARAMS, kinds, picture

KIND = 'size of pixels'


def give_size(path: Path, um: float, seed: int) -> None:
    tifffile.imwrite(
        path,
        picture(seed),
        photometric='rgb',
        resolution=(1e4 / um, 1e4 / um),
        resolutionunit='CENTIMETER',
    )


def images_of(data: Path) -> list[Path]:
    return [
        *sorted((data / 'train').glob('*/image.tif')),
        *sorted((data / 'test_release').iterdir()),
    ]


def test_what_all_images_say_is_recorded_once(data: Path) -> None:
    for k, path in enumerate(images_of(data)):
        give_size(path, 0.25, k)
    report = prepare.prepare(data, PARAMS)
    assert report.um_per_px == pytest.approx((0.25, 0.25))
    assert recorded_size(data, data / 'folds.json') == report.um_per_px
    assert 'size of pixels: 0.25 um, recorded' in screen_text(report)
    assert KIND not in kinds(report)
    cases = json.loads((data / 'index.json').read_text())['cases']
    assert {tuple(entry['facts']['um_per_px']) for entry in cases.values()} == {report.um_per_px}
    again = prepare.prepare(data, PARAMS)
    assert again.n_reused == len(cases)
    assert again.train == report.train


def test_mixed_sizes_are_a_warning_with_counts(data: Path) -> None:
    paths = images_of(data)
    for k, path in enumerate(paths[:9]):
        give_size(path, 0.25 if k < 6 else 0.5, k)
    report = prepare.prepare(data, PARAMS)
    assert report.um_per_px is None
    assert not (data / 'pixel_size.json').exists()
    (text,) = [warning.text for warning in report.warnings if warning.kind == KIND]
    counts = f'6 images of 0.25 um, 3 images of 0.5 um, {len(paths) - 9} that do not say it'
    assert counts in text


def test_files_that_do_not_say_it_record_nothing_unless_it_is_stated(data: Path) -> None:
    assert prepare.prepare(data, PARAMS).um_per_px is None
    assert not (data / 'pixel_size.json').exists()
    report = prepare.prepare(data, replace(PARAMS, um_per_px=0.25))
    assert recorded_size(data, data / 'folds.json') == (0.25, 0.25)
    assert KIND not in kinds(report)
    give_size(images_of(data)[0], 0.5, 0)
    report = prepare.prepare(data, replace(PARAMS, um_per_px=0.25))
    (text,) = [warning.text for warning in report.warnings if warning.kind == KIND]
    assert '--um-per-px says 0.25 um, the files 1 images of 0.5 um' in text
    with pytest.raises(ConfigError, match='um_per_px is 40'):
        PrepareParams(um_per_px=40.0)

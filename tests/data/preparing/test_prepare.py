"""data.preparing.prepare: nothing is dropped in silence, folds and index are safe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tifffile

from cellseg_mm.core.errors import CellSegError, ConfigError, DataError
from cellseg_mm.data.folds import excluded_by, load_folds
from cellseg_mm.data.labels import find_cases
from cellseg_mm.data.preparing import prepare
from cellseg_mm.data.preparing.groups import GroupRule
from cellseg_mm.data.preparing.records import PrepareParams
from cellseg_mm.data.preparing.text import (
    screen_text,
)
from tests.support.prepared_cases import CLASSES, PARAMS, ROOT, cell_map, kinds, picture, write_case


def test_good_data_gives_folds_index_and_report(data: Path) -> None:
    report = prepare.prepare(data, PARAMS)
    assert report.errors == ()
    assert kinds(report) == {prepare.NO_GROUPS: 10}
    assert [facts.name for facts in report.train] == [f'p{i // 2}-{i}' for i in range(10)]
    assert all(facts.counts == (1, 1) for facts in report.train)
    assert all(facts.area_sums == (28, 21) for facts in report.train)
    names = [case.name for case in find_cases(data, 'train', 2)]
    assert load_folds(data / 'folds.json', names) == report.folds
    assert len((data / 'data_report.txt').read_text().splitlines()) > 10
    assert sorted(json.loads((data / 'index.json').read_text())['cases']) == sorted(
        [f'train/{name}' for name in names] + ['test/t0', 'test/t1']
    )
    assert sorted(path.name for path in data.iterdir()) == [
        'data_report.txt',
        'folds.json',
        'index.json',
        'test_image_name_to_ids.json',
        'test_release',
        'train',
    ]


def test_all_errors_at_once_and_nothing_is_dropped(data: Path) -> None:
    (data / 'train/p0-0/image.tif').write_bytes(b'')
    tifffile.imwrite(data / 'train/p0-1/class1.tif', cell_map((1, 0, 3, 0, 3)) * -1)
    tifffile.imwrite(data / 'train/p0-1/class2.tif', cell_map((1, 0, 3, 0, 3))[1:])
    damaged = bytearray((data / 'train/p1-2/image.tif').read_bytes())
    (data / 'train/p1-2/image.tif').write_bytes(damaged[:-40])
    tifffile.imwrite(data / 'train/p1-3/class3.tif', cell_map((1, 0, 3, 0, 3)))
    (data / 'test_release/t0.tif').write_text('no picture')
    tifffile.imwrite(data / 'test_release/t9.tif', picture(1), photometric='rgb')
    report = prepare.prepare(data, PARAMS)
    expected = [
        ('train/p0-0/image.tif', 'is empty'),
        ('train/p1-2/image.tif', 'truncated'),
        ('train/p1-3/class3.tif', 'class 3, but there are 2 classes'),
        ('test_release/t0.tif', 'a text file'),
        ('test_release/t9.tif', 'expected an entry with its id'),
        ('train/p0-1/class1.tif', 'negative'),
        ('train/p0-1/class2.tif', 'must match'),
    ]
    assert len(report.errors) == len(expected)
    for sentence, (where, what) in zip(report.errors, expected, strict=True):
        assert sentence.startswith(f'{data}/{where}: ')
        assert what in sentence
        assert sentence in screen_text(report)
    assert report.folds is None
    assert not (data / 'folds.json').exists()
    with pytest.raises(DataError, match=r'7 problem\(s\) in the data'):
        report.raise_for_errors()


def test_excluding_the_bad_cases_is_enough(data: Path) -> None:
    (data / 'train/p0-0/image.tif').write_bytes(b'')
    (data / 'test_release/t0.tif').write_bytes(b'')
    (data / 'exclude.txt').write_text('p0-0\nt0\n')
    report = prepare.prepare(data, PARAMS)
    assert report.errors == ()
    assert report.excluded == ('p0-0', 't0')
    assert '2 excluded (p0-0, t0)' in screen_text(report)
    assert len(report.folds.names) == 9
    # Whoever reads the data afterwards sees the same cases.
    load_folds(data / 'folds.json', [case.name for case in find_cases(data, 'train', 2)])


def test_folds_record_an_exclude_file_elsewhere(data: Path, tmp_path: Path) -> None:
    """A data folder that cannot be written: the list lies elsewhere, and every reader knows."""
    (data / 'train/p0-0/class1.tif').write_bytes(b'')
    (data / 'train/p1-2/image.tif').write_bytes(b'')
    (data / 'exclude.txt').write_text('p3-7\n')  # replaced by the list that is named
    listed, out_dir = tmp_path / 'my list.txt', tmp_path / 'out'
    listed.write_text('p1-2 # empty\np0-0\n')
    params = replace(PARAMS, out_dir=out_dir, exclude_file=listed, n_folds=2)
    report = prepare.prepare(data, params)
    assert report.errors == ()
    excluded = excluded_by(out_dir / 'folds.json')
    assert excluded == ('p0-0', 'p1-2')
    cases = find_cases(data, 'train', 2, exclude_names=excluded)
    folds = load_folds(out_dir / 'folds.json', [case.name for case in cases])
    assert 'p3-7' in folds.names
    assert 'p1-2' not in folds.names
    # Leaving out a test image changes no fold, and is recorded.
    listed.write_text('p1-2\np0-0\nt1\n')
    again = prepare.prepare(data, params)
    assert (again.is_folds_kept, again.folds.hash) == (True, folds.hash)
    assert excluded_by(out_dir / 'folds.json') == ('p0-0', 'p1-2', 't1')
    # Without a list of its own the data folder's holds, now and later.
    assert prepare.prepare(data, replace(params, exclude_file=None)).errors
    assert excluded_by(tmp_path / 'none.json') is None


def test_second_run_changes_nothing(data: Path) -> None:
    prepare.prepare(data, PARAMS)
    before = {p.name: p.read_bytes() for p in data.iterdir() if p.is_file()}
    report = prepare.prepare(data, PARAMS)
    assert report.is_folds_kept
    assert report.n_reused == 12
    assert {p.name: p.read_bytes() for p in data.iterdir() if p.is_file()} == before


def test_folds_changed_by_hand_are_kept(data: Path) -> None:
    folds = prepare.prepare(data, PARAMS).folds
    text = (data / 'folds.json').read_text()
    moved, stays = folds.names_by_fold[0][0], folds.names_by_fold[1][0]
    for name, old, new in ((moved, 0, 1), (stays, 1, 0)):
        text = text.replace(f'"fold": {old}, "case": "{name}"', f'"fold": {new}, "case": "{name}"')
    (data / 'folds.json').write_text(text)
    report = prepare.prepare(data, PARAMS)
    assert moved in report.folds.names_by_fold[1]
    assert kinds(report) == {'folds changed by hand': 1, prepare.NO_GROUPS: 10}
    assert (data / 'folds.json').read_text() == text
    assert prepare.prepare(data, replace(PARAMS, new_folds=True)).folds == folds


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        pytest.param({'n_folds': 3}, r'another setting of n_folds (5, now 3)', id='n_folds'),
        pytest.param({'seed': 1}, 'another setting of seed', id='seed'),
        pytest.param({'method': 'original'}, 'another setting of method', id='method'),
        pytest.param({'groups': GroupRule(regex='^p.')}, 'another setting of groups', id='groups'),
    ],
)
def test_folds_of_other_settings_are_not_replaced(data: Path, change: dict, sentence: str) -> None:
    prepare.prepare(data, PARAMS)
    before = (data / 'folds.json').read_bytes()
    report = prepare.prepare(data, replace(PARAMS, **change))
    assert len(report.errors) == 1
    assert sentence in report.errors[0]
    assert '--new-folds' in report.errors[0]
    assert (data / 'folds.json').read_bytes() == before
    assert prepare.prepare(data, replace(PARAMS, new_folds=True, **change)).errors == ()


def test_folds_that_do_not_fit_new_cases(data: Path) -> None:
    prepare.prepare(data, PARAMS)
    write_case(data, 'new')
    report = prepare.prepare(data, PARAMS)
    assert len(report.errors) == 1
    assert 'new' in report.errors[0]
    assert 'pass --new-folds' in report.errors[0]


def test_too_few_cases_for_folds_is_an_error_beside_the_tables(data: Path) -> None:
    report = prepare.prepare(data, replace(PARAMS, n_folds=11))
    assert len(report.errors) == 1
    assert 'folds' in report.errors[0]
    assert report.folds is None


def test_processes_give_the_same_bytes(data: Path) -> None:
    for i in range(20):  # enough that processes are started
        write_case(data, f'more-{i}', seed=1000 + i)
    outs = [data.parent / 'one', data.parent / 'two']
    for out, n_workers in zip(outs, (1, 2), strict=True):
        prepare.prepare(data, replace(PARAMS, out_dir=out, n_workers=n_workers))
    for name in ('folds.json', 'index.json', 'data_report.txt'):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    assert not (data / 'folds.json').exists()


def test_folder_problems_are_said_before_the_work(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match='nowhere: no such folder'):
        prepare.prepare(tmp_path / 'nowhere', PARAMS)
    (tmp_path / 'file').write_text('x')
    with pytest.raises(CellSegError, match='name another with --out'):
        prepare.prepare(data, replace(PARAMS, out_dir=tmp_path / 'file'))
    (tmp_path / 'out/index.json').mkdir(parents=True)  # cannot be replaced by a file
    with pytest.raises(CellSegError, match='cannot be written'):
        prepare.prepare(data, replace(PARAMS, out_dir=tmp_path / 'out'))


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match='not a regular expression'):
        GroupRule(regex='(')
    with pytest.raises(ConfigError, match='all different'):
        PrepareParams(class_names=('a', 'a'))
    with pytest.raises(ConfigError, match='n_workers is -1'):
        PrepareParams(n_workers=-1)
    with pytest.raises(ConfigError, match='max_pixels is 0'):
        PrepareParams(max_pixels=0)


def run_tool(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / 'tools/prepare_data.py'), *args]
    kept = {key: value for key, value in os.environ.items() if not key.startswith('CELLSEG_')}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**kept, **variables}
    )


def test_tool_takes_the_variables_that_the_configs_read(data: Path, tmp_path: Path) -> None:
    out = tmp_path / 'my folds'
    out.mkdir()
    variables = {'CELLSEG_DATA': str(data), 'CELLSEG_FOLDS': str(out / 'folds.json')}
    done = run_tool('--classes', *CLASSES, **variables)
    assert done.returncode == 0, done.stderr
    assert (out / 'folds.json').is_file()
    assert not (data / 'folds.json').exists()
    assert done.stdout.endswith('\nnext: python tools/train.py configs/fold0.py\n')


def test_tool_prints_and_exits(data: Path) -> None:
    done = run_tool(str(data), '--classes', *CLASSES)
    assert done.returncode == 0, done.stderr
    assert 'round     10      10            1       28' in done.stdout
    assert f'in {data}/folds.json' in done.stdout
    (data / 'train/p0-0/image.tif').write_bytes(b'')
    done = run_tool(str(data), '--classes', *CLASSES)
    assert done.returncode == 1
    assert f'{data}/train/p0-0/image.tif: the file is empty (0 bytes)' in done.stdout
    assert done.stderr == 'error: 1 problem(s), see above\n'
    done = run_tool(str(data / 'nowhere'))
    assert done.returncode == 2
    assert 'Traceback' not in done.stderr
    assert 'no such folder' in done.stderr

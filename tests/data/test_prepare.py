"""prepare: every oddity is found and named, nothing is dropped, folds and index are safe."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_mm.core.errors import CellSegError, ConfigError, DataError
from cellseg_mm.data.folds import excluded_by, load_folds
from cellseg_mm.data.labels import find_cases
from cellseg_mm.data.preparing import prepare
from cellseg_mm.data.preparing.case_checks import CaseFacts, check_case, near_duplicates
from cellseg_mm.data.preparing.groups import GroupRule, find_groups
from cellseg_mm.data.preparing.records import PrepareParams, PrepareReport
from cellseg_mm.data.preparing.text import (
    class_table,
    fold_table,
    full_text,
    next_command,
    screen_text,
    size_table,
)

HW = (40, 61)
CLASSES = ('round', 'long')
ROOT = Path(__file__).parents[2]


def picture(seed: int) -> np.ndarray:
    """Smooth random colour, so that different seeds do not look alike."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (8, 12, 3))
    image = np.kron(coarse, np.ones((5, 6, 1)))[: HW[0], : HW[1]]
    padded = np.zeros((*HW, 3))
    padded[: image.shape[0], : image.shape[1]] = image
    return padded.astype(np.uint8)


def cell_map(*cells: tuple[int, int, int, int, int]) -> np.ndarray:
    """Rectangles (id, y0, y1, x0, x1)."""
    label_map = np.zeros(HW)
    for value, y0, y1, x0, x1 in cells:
        label_map[y0:y1, x0:x1] = value
    return label_map


def write_case(root: Path, name: str, *, seed: int | None = None, **maps: np.ndarray) -> Path:
    folder = root / 'train' / name
    folder.mkdir(parents=True)
    seed = sum(name.encode()) * 31 + len(name) if seed is None else seed
    tifffile.imwrite(folder / 'image.tif', picture(seed), photometric='rgb', compression='lzw')
    maps = maps or {'class1': cell_map((1, 2, 6, 2, 9)), 'class2': cell_map((2, 9, 12, 2, 9))}
    for key, label_map in maps.items():
        tifffile.imwrite(folder / f'{key}.tif', label_map)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten good cases and two test images."""
    root = tmp_path / 'data'
    for i in range(10):
        write_case(root, f'p{i // 2}-{i}', seed=i)
    (root / 'test_release').mkdir()
    entries = []
    for i in range(2):
        image = picture(100 + i)
        tifffile.imwrite(root / f'test_release/t{i}.tif', image, photometric='rgb')
        entries.append({'file_name': f't{i}.tif', 'id': i + 1, 'height': HW[0], 'width': HW[1]})
    (root / 'test_image_name_to_ids.json').write_text(json.dumps(entries))
    return root


PARAMS = PrepareParams(class_names=CLASSES, n_workers=1)


def kinds(report: PrepareReport) -> dict[str, int]:
    found: dict[str, int] = {}
    for warning in report.warnings:
        found[warning.kind] = found.get(warning.kind, 0) + warning.count
    return found


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


def slow_n_in_parts(label_map: np.ndarray) -> int:
    """Flood fill with eight neighbours, pixel by pixel."""
    n = 0
    for value in set(label_map[label_map > 0].tolist()):
        todo = {(int(y), int(x)) for y, x in np.argwhere(label_map == value)}
        queue = deque([todo.pop()])
        while queue:
            y, x = queue.popleft()
            near = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            for spot in near:
                if spot in todo:
                    todo.remove(spot)
                    queue.append(spot)
        n += bool(todo)
    return n


@pytest.mark.parametrize('seed', range(8))
def test_parts_and_small_cells_equal_a_flood_fill(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sparse = rng.integers(1, 60, HW) * (rng.random(HW) < 0.02)
    blocks = np.kron(rng.integers(0, 30, (8, 13)), np.ones((5, 5), int))[: HW[0], : HW[1]]
    maps = [sparse, np.where(rng.random(HW) < 0.9, blocks + 100 * (blocks > 0), 0)]
    write_case(tmp_path, 'a', class1=maps[0], class2=maps[1])
    (case,) = find_cases(tmp_path, 'train', 2)
    facts = check_case(case, 2)
    by_kind: dict[str, int] = {}
    for warning in facts.warnings:
        by_kind[warning.kind] = by_kind.get(warning.kind, 0) + warning.count
    sizes = [np.unique(m[m > 0], return_counts=True)[1] for m in maps]
    assert facts.counts == tuple(len(s) for s in sizes)
    assert facts.area_sums == tuple(int((m > 0).sum()) for m in maps)
    assert by_kind.get('disconnected instance', 0) == sum(map(slow_n_in_parts, maps))
    assert by_kind.get('1-px instance', 0) == sum(int((s == 1).sum()) for s in sizes)
    assert by_kind.get('px in two classes', 0) == int(((maps[0] > 0) & (maps[1] > 0)).sum())


def test_every_warning(data: Path) -> None:
    write_case(data, 'w parts', class1=cell_map((5, 0, 3, 0, 3), (5, 8, 9, 8, 9)))
    diagonal = cell_map((5, 0, 3, 0, 3), (5, 3, 4, 3, 4))
    write_case(data, 'w corner', class1=diagonal)  # touches at a corner: one part
    write_case(data, 'w 1 px', class1=cell_map((1, 0, 1, 0, 1), (2, 5, 9, 5, 9)))
    write_case(data, 'w shared', class1=cell_map((1, 0, 4, 0, 4)), class2=cell_map((1, 3, 6, 2, 6)))
    write_case(data, 'w no cell', class1=np.zeros(HW), class2=np.zeros(HW))
    write_case(data, 'w half', class1=np.zeros(HW), class2=cell_map((1, 0, 4, 0, 4)))
    folder = write_case(data, 'w blank')
    tifffile.imwrite(folder / 'image.tif', np.full((*HW, 3), 9, np.uint8), photometric='rgb')
    folder = write_case(data, 'w dim')
    tifffile.imwrite(folder / 'image.tif', picture(900).astype(np.uint16) * 16, photometric='rgb')
    write_case(data, 'w twin', seed=3)
    write_case(data, 'w leak', seed=100)
    folder = write_case(data, 'w mirrored')
    image = np.clip(picture(5)[::-1].astype(int) + 3, 0, 255).astype(np.uint8)
    tifffile.imwrite(folder / 'image.tif', image, photometric='rgb')
    (folder / 'notes.doc').write_text('x')
    (data / 'train/stray.txt').write_text('x')
    (data / 'exclude.txt').write_text('w typo\n')
    report = prepare.prepare(data, PARAMS)
    assert report.errors == ()
    assert kinds(report) == {
        'disconnected instance': 1,
        '1-px instance': 1,
        'id shared by classes': 1,
        'px in two classes': 2,  # row 3, columns 2 and 3
        'no cell': 1,
        'empty class file': 1,
        'blank image': 1,
        'dim image': 1,
        'duplicate image': 2,
        'test image among the training images': 2,
        'near-duplicate image': 2,
        'unknown name in exclude.txt': 1,
        'note': 2,
        prepare.NO_GROUPS: len(report.train),
    }
    text = full_text(report)
    for name in ('parts', '1 px', 'shared', 'no cell', 'half/class1.tif', 'blank', 'twin', 'leak'):
        assert f'w {name}' in text
    assert 'w corner' not in text
    fold_of = report.folds.fold_of()
    assert fold_of['w twin'] == fold_of['p1-3']
    assert fold_of['w mirrored'] == fold_of['p2-5']


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


# ---- groups


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


def test_groups_from_names(data: Path) -> None:
    params = replace(PARAMS, groups=GroupRule(regex=r'^(p\d)-'))
    folds = prepare.prepare(data, params).folds
    assert folds.groups == {f'p{i // 2}-{i}': f'p{i // 2}' for i in range(10)}
    assert all(len({name[:2] for name in names}) == 1 for names in folds.names_by_fold)


def test_folds_without_groups_are_warned_of(data: Path) -> None:
    assert '--groups-csv' in screen_text(prepare.prepare(data, PARAMS))
    for change in ({'groups': GroupRule(regex='^p.')}, {'method': 'original'}):
        report = prepare.prepare(data, replace(PARAMS, new_folds=True, **change))
        assert prepare.NO_GROUPS not in kinds(report)  # asked for, or the choice of who knows


def test_groups_from_a_table(data: Path, tmp_path: Path) -> None:
    table = tmp_path / 'groups.csv'
    table.write_text('case,who\np0-0,"Ann, B."\np4-9,"Ann, B."\np1-2,\nunknown,Zoe\n', 'utf-8-sig')
    rule = GroupRule(table, 'case', 'who')
    report = prepare.prepare(data, replace(PARAMS, groups=rule))
    assert report.folds.groups == {'p0-0': 'Ann, B.', 'p4-9': 'Ann, B.'}
    assert kinds(report) == {'no group': 8}
    rule = GroupRule(table, 'case', 'who', regex='^Ann')
    params = replace(PARAMS, groups=rule, new_folds=True)
    assert prepare.prepare(data, params).folds.groups == {'p0-0': 'Ann', 'p4-9': 'Ann'}


@pytest.mark.parametrize(
    ('content', 'sentence'),
    [
        pytest.param('uuid,x\na,b\n', 'no column patient; the columns are uuid, x', id='column'),
        pytest.param('', 'no column uuid and patient; the columns are none', id='empty'),
        pytest.param('uuid,patient\na,b\na,c\n', 'a has the groups b and c', id='two groups'),
        pytest.param(b'uuid,patient\n\xff\xff,b\n', 'cannot be read', id='not UTF-8'),
        pytest.param(None, 'cannot be read', id='missing'),
    ],
)
def test_bad_group_tables(data: Path, content: str | bytes | None, sentence: str) -> None:
    table = data.parent / 'g.csv'
    if content is not None:
        table.write_bytes(content if isinstance(content, bytes) else content.encode())
    report = prepare.prepare(data, replace(PARAMS, groups=GroupRule(table)))
    assert len(report.errors) == 1
    assert report.errors[0].startswith(f'{table}: ')
    assert sentence in report.errors[0]


def facts_of(name: str, image: np.ndarray, pixel_hash: str) -> CaseFacts:
    thumb = image.astype(np.uint8).tobytes().hex()
    return CaseFacts(name, (100, 100), (1,), (1,), pixel_hash, thumb)


def test_likeness_joins_groups() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 250, (16, 16))
    others = [rng.integers(0, 250, (16, 16)) for _ in range(4)]
    facts = [
        facts_of('a', base, 'h0'),
        facts_of('b', np.rot90(base) + 4, 'h1'),  # turned and brighter
        facts_of('c', others[0], 'h2'),
        facts_of('d', others[1], 'h2'),  # the same pixels as c by hash
        facts_of('e', others[2], 'h3'),
        facts_of('f', np.full((16, 16), 7), 'h4'),
        facts_of('g', np.full((16, 16), 8), 'h5'),  # one shade is no likeness
    ]
    assert near_duplicates(facts) == [(0, 1)]
    groups, warnings = find_groups(facts, GroupRule(), near_duplicates(facts))
    assert groups == {'a': 'alike:a', 'b': 'alike:a', 'c': 'alike:c', 'd': 'alike:c'}
    assert warnings == []
    groups, _ = find_groups(facts, GroupRule(alike=False), [(0, 1)])
    assert groups == {'c': 'alike:c', 'd': 'alike:c'}
    groups, warnings = find_groups(facts, GroupRule(regex='[abe]'), [(0, 1)])
    assert groups['a'] == groups['b'] == 'a+b'
    assert groups['e'] == 'e'
    assert [warning.kind for warning in warnings] == ['no group', 'groups joined']


@pytest.mark.parametrize('seed', range(3))
def test_near_duplicates_equal_a_loop_over_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pictures = [rng.integers(0, 256, (16, 16)) for _ in range(12)]
    for i in range(0, 12, 2):  # noise that makes some pairs just match and others not
        turned = np.rot90(pictures[i], i)[:, :: (-1) ** (i // 2)]
        noise = rng.normal(0, 12 * (i + 1) / 2, (16, 16))
        pictures[i + 1] = np.clip(turned + noise, 0, 255).astype(int)
    facts = [facts_of(str(i), p, str(i)) for i, p in enumerate(pictures)]
    expected = []
    for i in range(12):
        for j in range(i + 1, 12):
            best = max(
                np.corrcoef(moved.ravel(), pictures[j].ravel())[0, 1]
                for n in range(4)
                for moved in (np.rot90(pictures[i], n), np.rot90(pictures[i], n)[:, ::-1])
            )
            expected += [(i, j)] if best >= 0.95 else []
    assert 0 < len(expected) < 6
    assert near_duplicates(facts) == expected


@pytest.mark.parametrize('where', ['everywhere', 'diagonals', 'elsewhere'])
def test_near_duplicates_that_look_the_same_from_all_sides(where: str) -> None:
    """Where averaging over turns changes nothing, pairs are as far apart as they may be."""
    rng = np.random.default_rng(3)
    symmetric = []
    for _ in range(2):
        quarter = rng.normal(0, 1, (8, 8))
        half = np.concatenate([quarter + quarter.T, (quarter + quarter.T)[::-1]])
        symmetric.append(np.concatenate([half, half[:, ::-1]], axis=1))
    row, column = np.indices((16, 16))
    on_diagonal = (row == column) | (row + column == 15)
    chosen = {'everywhere': True, 'diagonals': on_diagonal, 'elsewhere': ~on_diagonal}[where]
    base, noise = symmetric[0], np.where(chosen, symmetric[1], 0)
    noise *= np.linalg.norm(base) / np.linalg.norm(noise)
    pictures = {}
    for strength in np.linspace(0.2, 0.5, 301):
        first, second = 128 + 14 * base, 128 + 14 * (base + strength * noise)
        pair = np.rint(np.clip([first, second], 0, 255))
        pictures[float(np.corrcoef(pair[0].ravel(), pair[1].ravel())[0, 1])] = pair
    just_above = min(r for r in pictures if r >= 0.9501)
    just_below = max(r for r in pictures if r < 0.9499)
    assert just_above < 0.953
    for likeness, expected in ((just_above, [(0, 1)]), (just_below, [])):
        facts = [facts_of(str(i), picture, str(i)) for i, picture in enumerate(pictures[likeness])]
        assert near_duplicates(facts) == expected


# ---- folds file


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


# ---- index


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
        pytest.param(lambda text: text.replace('"version": 1', '"version": 0'), id='version'),
        pytest.param(lambda text: text.replace('"n_classes": 2', '"n_classes": 3'), id='classes'),
        pytest.param(lambda text: text.replace('"thumb": "', '"thumb": "zz'), id='thumb'),
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


# ---- running


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

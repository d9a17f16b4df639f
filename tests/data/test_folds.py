"""Folds: whole, even, unsplit, the same for any order of input, and safe to edit by hand."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from cellseg_mm.core.errors import FoldError
from cellseg_mm.data.folds import (
    ORIGINAL_SEED,
    Folds,
    load_folds,
    make_folds,
    save_folds,
    shares_of,
)


def share_table(
    folds: Folds, names: Sequence[str], counts: NDArray[np.integer]
) -> NDArray[np.float64]:
    """Return how evenly the folds share the data.

    Args:
        folds: The assignment.
        names: n case names; all cases of ``folds``.
        counts: (n, K) integers, instances of each class in each case.

    Returns:
        (n_folds, 1 + 2K) float64: each fold's share of the images, of each class's instances, and
        of the images that have the class. Even means 1 / n_folds; a class that never occurs is 0.
    """
    fold_of = folds.fold_of()
    table = np.zeros((folds.n_folds, 1 + 2 * np.asarray(counts).shape[1]))
    np.add.at(table, [fold_of[name] for name in names], shares_of(np.asarray(counts)))
    return table


def random_data(seed: int, *, n: int = 60, n_classes: int = 4):
    """Cases of unequal patients: dense ones, empty ones, one rare class."""
    rng = np.random.default_rng(seed)
    names = [f'case-{i:03d}' for i in rng.permutation(n)]
    scale = rng.choice([0, 3, 10, 80], size=(n, 1))
    counts = rng.poisson(scale * np.array([1.0, 2.0, 0.3, 0.05])[:n_classes])
    groups = {name: f'patient-{rng.integers(n // 4)}' for name in names if rng.random() < 0.8}
    return names, counts, groups


def small() -> Folds:
    groups = {'a': 'p', 'b': 'p', 'c': 'q'}
    return Folds((('a', 'b'), ('c', 'd'), ('e',)), groups, 'grouped', 7)


@pytest.mark.parametrize('seed', range(20))
def test_parts_are_disjoint_cover_all_and_keep_groups(seed: int) -> None:
    names, counts, groups = random_data(seed)
    folds = make_folds(names, counts, seed=seed, groups=groups)
    flat = [name for part in folds.names_by_fold for name in part]
    assert sorted(flat) == sorted(names)
    assert folds.n_folds == 5
    fold_of = {name: k for k, part in enumerate(folds.names_by_fold) for name in part}
    for group in set(groups.values()):
        assert len({fold_of[name] for name in names if groups.get(name) == group}) == 1
    for fold in range(5):
        train, val = folds.train_names(fold), folds.val_names(fold)
        assert not set(train) & set(val)
        assert sorted(train + val) == list(folds.names) == sorted(names)
        assert list(train) == sorted(train)
    assert folds.fold_of() == fold_of


@pytest.mark.parametrize('method', ['grouped', 'original'])
@pytest.mark.parametrize('seed', range(5))
def test_order_of_input_does_not_matter(seed: int, method: str) -> None:
    names, counts, groups = random_data(seed)
    first = make_folds(names, counts, seed=seed, groups=groups, method=method)
    order = np.random.default_rng(seed).permutation(len(names))
    shuffled = [names[i] for i in order]
    second = make_folds(
        shuffled,
        counts[order],
        seed=seed,
        groups=dict(reversed(list(groups.items()))),
        method=method,
    )
    assert first == second
    assert first.hash == second.hash


@pytest.mark.parametrize('seed', range(5))
def test_without_groups_every_share_is_within_one_case_of_even(seed: int) -> None:
    names, counts, _ = random_data(seed)
    folds = make_folds(names, counts, seed=seed)
    largest = counts.max(axis=0)
    fold_of = folds.fold_of()
    for k in range(counts.shape[1]):
        sums = np.zeros(5)
        np.add.at(sums, [fold_of[name] for name in names], counts[:, k])
        assert np.abs(sums - counts[:, k].sum() / 5).max() <= largest[k]
    sizes = [len(part) for part in folds.names_by_fold]
    assert max(sizes) - min(sizes) <= 2


@pytest.mark.parametrize('seed', range(3))
def test_folds_are_more_even_than_the_best_of_scikit_learns(seed: int) -> None:
    names, counts, groups = random_data(seed)
    ours = share_table(make_folds(names, counts, seed=0, groups=groups), names, counts)
    labels = (counts > 0) @ (2 ** np.arange(counts.shape[1]))
    keys = [groups.get(name, name) for name in names]
    peers = []
    for state in range(10):
        splitter = StratifiedGroupKFold(5, shuffle=True, random_state=state)
        with pytest.warns(UserWarning, match='least populated'):
            parts = [test for _, test in splitter.split(names, labels, keys)]
        peer = Folds(tuple(tuple(names[i] for i in part) for part in parts if len(part)))
        peers.append(((share_table(peer, names, counts) - 0.2) ** 2).sum())
    assert ((ours - 0.2) ** 2).sum() < min(peers)


def test_hand_computed_balance() -> None:
    # Patients with 10, 6, 4, 3 and 1 cells, one image each: two even halves are 12 + 12.
    names, counts = list('abcde'), np.array([[10], [6], [4], [3], [1]])
    folds = make_folds(names, counts, n_folds=2, seed=0)
    cells = dict(zip(names, counts[:, 0].tolist(), strict=True))
    assert sorted(sum(cells[n] for n in part) for part in folds.names_by_fold) in (
        [11, 13],  # with 2 and 3 images: 10+1 | 6+4+3 or 10+3 | 6+4+1
        [12, 12],
    )


def test_share_table_by_hand() -> None:
    folds = Folds((('a',), ('b', 'c')))
    table = share_table(folds, ['a', 'b', 'c'], np.array([[3, 0], [1, 0], [0, 0]]))
    # columns: images, instances of class 0 and 1, images with class 0 and 1
    assert np.allclose(table, [[1 / 3, 3 / 4, 0, 1 / 2, 0], [2 / 3, 1 / 4, 0, 1 / 2, 0]])


def test_no_fold_is_left_empty_by_one_huge_group() -> None:
    names = [f'{i:02d}' for i in range(12)]
    groups = dict.fromkeys(names[:9], 'one')
    folds = make_folds(names, np.ones((12, 2), int), n_folds=4, seed=0, groups=groups)
    assert sorted(len(part) for part in folds.names_by_fold) == [1, 1, 1, 9]


def test_empty_group_name_means_no_group() -> None:
    names = [f'{i:02d}' for i in range(10)]
    folds = make_folds(names, np.ones((10, 1), int), seed=0, groups=dict.fromkeys(names, ''))
    assert [len(part) for part in folds.names_by_fold] == [2] * 5
    assert folds.groups == {}


def test_a_group_named_like_a_case_is_not_that_case() -> None:
    names = ['a', 'b', 'c', 'd']
    folds = make_folds(names, np.ones((4, 1), int), n_folds=2, seed=0, groups={'b': 'a', 'c': 'a'})
    assert sorted(map(len, folds.names_by_fold)) == [2, 2]
    assert ('b', 'c') in folds.names_by_fold


def test_thousands_of_cases_stay_even() -> None:
    counts = np.random.default_rng(0).poisson(3, size=(1500, 2))
    names = [f'{i:05d}' for i in range(1500)]
    table = share_table(make_folds(names, counts, seed=0), names, counts)
    assert np.abs(table - 0.2).max() < 0.002


@pytest.mark.parametrize(('n', 'n_folds'), [(209, 5), (25, 5), (11, 5), (10, 3), (98, 49)])
def test_original_equals_the_recipe(n: int, n_folds: int) -> None:
    names = [f'{i:03d}' for i in range(n)]
    random.seed(313551058)
    indices = list(range(n))
    random.shuffle(indices)
    plain = [
        indices[int((1 / n_folds) * k * n) : int((1 / n_folds) * (k + 1) * n)]
        for k in range(n_folds)
    ]
    plain[-1] = indices[int((1 / n_folds) * (n_folds - 1) * n) :]  # 1/49 * 49 < 1 would drop one
    got = make_folds(names, np.ones((n, 1), int), n_folds=n_folds, method='original')
    assert got.names_by_fold == tuple(tuple(sorted(names[i] for i in part)) for part in plain)
    assert got.groups == {}
    assert got.seed == ORIGINAL_SEED


def test_original_warns_that_it_splits_groups(caplog: pytest.LogCaptureFixture) -> None:
    names = [f'{i}' for i in range(10)]
    groups = dict.fromkeys(names[:6], 'p')
    make_folds(names, np.ones((10, 1), int), groups=groups, method='original')
    assert 'ignores the 1 groups of 6 cases' in caplog.text


def test_golden_hash() -> None:
    """Computed by this code on 2026-11-24; a change means that saved runs no longer match."""
    names, counts, groups = random_data(0)
    assert make_folds(names, counts, seed=0, groups=groups).hash == 'de6e500fb6c13dd0'
    assert make_folds(names, counts, method='original').hash == 'a54d8cef48d456c8'
    assert small().hash == '5517b23bf857f7ca'


def test_hash_is_of_the_assignment_only() -> None:
    folds = small()
    same = Folds((('b', 'a'), ('d', 'c'), ('e',)), {}, 'original', 0)
    swapped = Folds((('c', 'd'), ('a', 'b'), ('e',)))
    assert same.hash == folds.hash
    assert swapped.hash != folds.hash
    assert re.fullmatch('[0-9a-f]{16}', folds.hash)


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    names, counts, groups = random_data(3)
    folds = make_folds(names, counts, seed=1, groups=groups)
    path = tmp_path / 'folds.json'
    save_folds(path, folds)
    assert load_folds(path) == folds
    assert load_folds(path, names) == folds
    lines = path.read_text().splitlines()
    assert sum('"case"' in line for line in lines) == len(names)
    save_folds(tmp_path / 'again.json', load_folds(path))
    assert (tmp_path / 'again.json').read_bytes() == path.read_bytes()
    for excluded in ((), ('x', 'ä b')):  # an empty list replaces the data folder's own too
        save_folds(path, replace(folds, excluded=excluded))
        assert load_folds(path, names) == replace(folds, excluded=excluded)
        assert load_folds(path).hash == folds.hash


def test_hand_edit_is_accepted_and_changes_the_hash(tmp_path: Path) -> None:
    path = tmp_path / 'folds.json'
    save_folds(path, small())
    text = path.read_text()
    path.write_text(text.replace('{"fold": 1, "case": "d"', '{"fold": 2, "case": "d"'))
    edited = load_folds(path)
    assert edited.names_by_fold == (('a', 'b'), ('c',), ('d', 'e'))
    assert edited.hash != small().hash
    assert small().hash in path.read_text()  # the stored one is stale and was not believed


def test_hand_edit_that_splits_a_group_names_it(tmp_path: Path) -> None:
    path = tmp_path / 'folds.json'
    save_folds(path, small())
    text = path.read_text()
    path.write_text(text.replace('{"fold": 0, "case": "b"', '{"fold": 2, "case": "b"'))
    with pytest.raises(FoldError, match=r'folds.json: .*group p is split \(fold 0: a; fold 2: b\)'):
        load_folds(path)


OTHER = {'case': 'b', 'fold': 0}  # a file has at least one case per fold


def replaced(**changes: object) -> str:
    content = {
        'version': 1,
        'method': 'grouped',
        'seed': 0,
        'n_folds': 2,
        'hash': '',
        'cases': [{'fold': 0, 'case': 'a', 'group': None}, {'fold': 1, 'case': 'b'}],
    }
    return json.dumps({**content, **changes})


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        pytest.param('{"version": 1, "cas', 'not valid JSON', id='torn'),
        pytest.param('\xff\xfe'.encode('latin1'), 'not valid JSON', id='not text'),
        pytest.param('[' * 100000, 'not valid JSON', id='deep'),
        pytest.param('[]', 'holds a list', id='list'),
        pytest.param(replaced(version=2), 'version is 2, expected 1', id='version'),
        pytest.param(replaced(method='best'), "method is 'best'", id='method'),
        pytest.param(replaced(method=['grouped']), 'method is', id='method type'),
        pytest.param(replaced(n_folds=1), 'n_folds is 1', id='one fold'),
        pytest.param(replaced(n_folds=True), 'n_folds is True', id='bool'),
        pytest.param(replaced(seed='0'), "seed is '0'", id='seed type'),
        pytest.param(replaced(cases=[]), 'cases is missing or empty', id='no cases'),
        pytest.param(replaced(cases={'a': 0}), 'cases is missing or empty', id='cases type'),
        pytest.param(replaced(cases=['a', 'b']), "row 1 of cases is 'a'", id='row type'),
        pytest.param(replaced(excluded='a'), 'excluded is a', id='excluded type'),
        pytest.param(replaced(excluded=[1]), r'excluded is \[1\]', id='excluded item'),
        pytest.param(
            replaced(cases=[{'case': 'a', 'fold': 2}, OTHER]), 'fold is 2', id='fold range'
        ),
        pytest.param(
            replaced(cases=[{'case': 'a', 'fold': '0'}, OTHER]), "fold is '0'", id='fold type'
        ),
        pytest.param(
            replaced(cases=[{'case': 'a', 'fold': 0, 'group': 3}, OTHER]),
            'group is 3',
            id='group type',
        ),
        pytest.param(
            replaced(cases=[{'case': 'a', 'fold': 0}, OTHER]), 'fold 1 is empty', id='empty'
        ),
        pytest.param(
            replaced(cases=[{'case': c, 'fold': k} for c, k in (('a', 0), ('b', 1), ('a', 1))]),
            'case a is in fold 0 and again in fold 1',
            id='twice',
        ),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / 'folds.json'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FoldError, match=message) as error:
        load_folds(path)
    assert str(path) in str(error.value)


def test_names_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    path = tmp_path / 'folds.json'
    save_folds(path, small())
    with pytest.raises(FoldError, match=r'1 case\(s\) of the data are in no fold: x') as error:
        load_folds(path, ['a', 'b', 'c', 'd', 'x'])
    assert '1 case(s) are not in the data: e' in str(error.value)
    with pytest.raises(FoldError, match='cannot be read'):
        load_folds(tmp_path / 'none.json')


@pytest.mark.parametrize(
    ('names', 'options', 'message'),
    [
        pytest.param(['a', 'a', 'b'], {}, 'a occur more than once', id='repeated'),
        pytest.param(['a', 'b'], {}, r'counts has shape \(3, 1\)', id='shape'),
        pytest.param(['a', 'b', 'c'], {'n_folds': 4}, '3 cases cannot make 4', id='too few'),
        pytest.param(['a', 'b', 'c'], {'n_folds': 1}, '3 cases cannot make 1', id='one fold'),
        pytest.param(
            ['a', 'b', 'c'], {'groups': {'a': 'p', 'b': 'p', 'c': 'p'}}, 'in 1 groups', id='groups'
        ),
        pytest.param(['a', 'b', 'c'], {'groups': {'z': 'p'}}, 'unknown cases: z', id='unknown'),
        pytest.param(['a', 'b', 'c'], {'method': 'best'}, "method 'best' is unknown", id='method'),
    ],
)
def test_wrong_input_is_refused(names: list[str], options: dict, message: str) -> None:
    with pytest.raises(FoldError, match=message):
        make_folds(names, np.ones((3, 1), int), **{'n_folds': 2, **options})


def test_fold_out_of_range_is_refused() -> None:
    with pytest.raises(FoldError, match='fold 3 does not exist; choose 0 to 2'):
        small().train_names(3)

"""New cases join folds: nobody moves, groups stay whole, and the lineage is proven by the cases."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cellseg_mm.core.errors import ConfigError, FoldError
from cellseg_mm.data.folds import Folds, load_folds, make_folds, save_folds
from cellseg_mm.data.preparing import prepare
from cellseg_mm.data.preparing.case_checks import CaseFacts
from cellseg_mm.data.preparing.extension import extend_folds
from tests.support.prepared_cases import PARAMS, facts_of, write_case


def facts(names: list[str], counts: list[tuple[int, int]] | None = None) -> list[CaseFacts]:
    blank = facts_of('a', np.zeros((16, 16)), 'x')
    counts = counts or [(1, 1)] * len(names)
    return [replace(blank, name=name, counts=c) for name, c in zip(names, counts, strict=True)]


OLD = Folds((('a1', 'a2'), ('b1', 'c1')), {'a1': 'A', 'a2': 'A', 'b1': 'B', 'c1': 'C'})
GROUPS = dict(OLD.groups)


def test_known_groups_find_their_fold_and_others_even_out() -> None:
    names = ['a1', 'a2', 'a3', 'b1', 'c1', 'd1', 'e1', 'e2', 'e3']
    groups = {**GROUPS, 'a3': 'A', 'e1': 'E', 'e2': 'E', 'e3': 'E'}
    new = extend_folds(OLD, facts(names), groups)
    assert new.fold_of() == {
        **OLD.fold_of(),
        **{'a3': 0, 'e1': 1, 'e2': 1, 'e3': 1, 'd1': 0},  # 3 : 2, then 3 : 5, then 4 : 5
    }
    assert new.groups == groups
    assert new.added == dict.fromkeys(('a3', 'd1', 'e1', 'e2', 'e3'), 1)
    shares = facts(['a1', 'a2', 'b1', 'c1', 'x'], [(9, 0), (9, 0), (0, 1), (0, 1), (5, 0)])
    assert extend_folds(OLD, shares, GROUPS).fold_of()['x'] == 1  # fold 0 has that class


def test_lineage_is_what_the_cases_prove(tmp_path: Path) -> None:
    first = extend_folds(OLD, facts([*OLD.names, 'd']), GROUPS)
    second = extend_folds(first, facts([*OLD.names, 'd', 'e']), GROUPS)
    assert (OLD.lineage, first.lineage) == ((), (OLD.hash,))
    assert second.lineage == (OLD.hash, first.hash)
    path = tmp_path / 'folds.json'
    save_folds(path, second)
    assert load_folds(path) == second
    assert json.loads(path.read_text())['extends'] == [OLD.hash, first.hash]
    path.write_text(path.read_text().replace('"fold": 1, "case": "b1"', '"fold": 0, "case": "b1"'))
    moved = load_folds(path)
    assert OLD.hash not in moved.lineage
    assert first.hash not in moved.lineage
    path.write_text(path.read_text().replace('"added": 2', '"added": 0'))
    with pytest.raises(FoldError, match='added is 0, expected a whole number of at least 1'):
        load_folds(path)


@pytest.mark.parametrize(
    ('names', 'groups', 'says'),
    [
        (['a1', 'a2', 'b1'], {}, r'1 case\(s\) of the folds are not in the data, such as c1'),
        ([*OLD.names, 'n'], {**GROUPS, 'a2': 'Z'}, 'a2 was of group A and is of Z now'),
        ([*OLD.names, 'n'], {'a1': 'A', 'a2': 'A'}, 'b1 was of group B and is of none now'),
        (
            [*OLD.names, 'n'],
            dict.fromkeys([*OLD.names, 'n'], 'A+B+C'),
            r'group A\+B\+C is split .* ties them together',
        ),
    ],
    ids=['gone', 'regrouped', 'no groups', 'tied'],
)
def test_what_would_leak_or_lose_is_refused(names: list[str], groups: dict, says: str) -> None:
    with pytest.raises(FoldError, match=says):
        extend_folds(OLD, facts(names), groups)
    counts = np.ones((2, 1), dtype=np.int64)
    original = make_folds(['a', 'b'], counts, n_folds=2, method='original')
    with pytest.raises(FoldError, match='splits patients'):
        extend_folds(original, facts(['a', 'b', 'c']), {})


def test_prepare_extends_when_asked_and_then_keeps(data: Path) -> None:
    old = prepare.prepare(data, PARAMS).folds
    write_case(data, 'new')
    shutil.copytree(data / 'train/p0-0', data / 'train/twin')  # equal pictures are one group
    (error,) = prepare.prepare(data, PARAMS).errors
    assert '2 case(s) of the data are in no fold' in error
    assert '--extend-folds' in error
    params = replace(PARAMS, extend_folds=True)
    report = prepare.prepare(data, params)
    assert report.errors == ()
    new = load_folds(data / 'folds.json')
    assert new == report.folds
    assert {k: v for k, v in new.fold_of().items() if k in old.names} == old.fold_of()
    assert new.fold_of()['twin'] == old.fold_of()['p0-0']
    assert new.lineage == (old.hash,)
    for again in (params, PARAMS):
        report = prepare.prepare(data, again)
        assert (report.errors, report.is_folds_kept, report.folds) == ((), True, new)
    assert 'folds changed by hand' not in {w.kind for w in report.warnings}
    with pytest.raises(ConfigError, match='one of the two'):
        replace(params, new_folds=True)

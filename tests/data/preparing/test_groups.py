"""data.preparing.groups: from names, a table or likeness."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cellseg_mm.data.preparing import prepare
from cellseg_mm.data.preparing.case_checks import near_duplicates
from cellseg_mm.data.preparing.groups import GroupRule, find_groups
from cellseg_mm.data.preparing.text import (
    screen_text,
)
from tests.support.prepared_cases import PARAMS, facts_of, kinds


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

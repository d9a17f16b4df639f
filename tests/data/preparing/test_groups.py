"""data.preparing.groups: from names, a table or likeness."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_mm.core.files import file_hash
from cellseg_mm.data.folds import Folds, load_folds, save_folds
from cellseg_mm.data.preparing import prepare
from cellseg_mm.data.preparing.groups import GroupRule, find_groups, rule_of_folds
from cellseg_mm.data.preparing.likeness import near_duplicates
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
    assert kinds(report) == {'no group': 8, 'rows without a case': 1}
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
    assert [warning.kind for warning in warnings] == [
        'groups of one',
        'no group',
        'groups joined',
    ]
    assert '--split-alike' in warnings[-1].text


# ---- tables and expressions that know no case, or only some


def sentence_of(data: Path, rule: GroupRule) -> str:
    report = prepare.prepare(data, replace(PARAMS, groups=rule))
    assert report.folds is None
    assert not (data / 'folds.json').exists()
    (sentence,) = report.errors
    return sentence


def test_a_table_that_knows_no_case_is_refused(data: Path) -> None:
    table = data.parent / 'g.csv'
    table.write_text('uuid,patient\nq0,A\nq1,A\nq2,B\nq3,B\n')
    sentence = sentence_of(data, GroupRule(table))
    assert sentence.startswith(f'{table}: none of its 4 names (q0, q1, q2 and 1 more)')
    assert 'the 10 cases (p0-0, p0-1, p1-2 and 7 more)' in sentence
    assert '--name-column (now uuid)' in sentence
    table.write_text('uuid,patient\np0-0,\np0-1,\n')
    assert 'column patient is empty for every case' in sentence_of(data, GroupRule(table))


def test_an_expression_that_finds_nothing_is_refused(data: Path) -> None:
    sentence = sentence_of(data, GroupRule(regex='(TCGA-..)'))
    assert "--groups-regex '(TCGA-..)': finds nothing in the 10 names of cases (p0-0" in sentence
    table = data.parent / 'g.csv'
    table.write_text('uuid,patient\np0-0,Ann\np0-1,Ann\n')
    sentence = sentence_of(data, GroupRule(table, regex='(TCGA-..)'))
    assert 'groups of the table' in sentence


def test_a_table_that_knows_some_cases_names_both_sides(data: Path) -> None:
    table = data.parent / 'g.csv'
    rows = ['P0-0.TIF,Ann', 'p0-1.png,Ann', 'zoe,Z', 't0,A test image']
    table.write_text('uuid,patient\n' + '\n'.join(rows))
    report = prepare.prepare(data, replace(PARAMS, groups=GroupRule(table)))
    assert report.folds.groups == {'p0-0': 'Ann', 'p0-1': 'Ann'}
    texts = {finding.kind: finding.text for finding in report.warnings}
    assert "'p0-1.png' for p0-1" in texts['names written differently']
    assert "'P0-0.TIF' for p0-0" in texts['names with other capitals']
    assert texts['rows without a case'].endswith('1 row(s) name no case: zoe.')
    assert '8 case(s) without a known group: p1-2, p1-3, p2-4 and 5 more' in texts['no group']


@pytest.mark.parametrize(
    ('regex', 'kind'),
    [
        pytest.param(r'p\d-\d', 'groups of one', id='each its own'),
        pytest.param(r'^(p)', 'one group', id='all one'),
    ],
)
def test_an_expression_that_keeps_nothing_together_is_said(
    data: Path, regex: str, kind: str
) -> None:
    report = prepare.prepare(data, replace(PARAMS, groups=GroupRule(regex=regex)))
    if kind == 'one group':  # no folds can be made, and the sentence says why
        assert 'all 10 cases are one group, p' in report.errors[0]
    else:
        assert kinds(report)[kind] == 10


def test_groups_that_differ_in_capitals_only_are_said(data: Path) -> None:
    table = data.parent / 'g.csv'
    table.write_text('uuid,patient\np0-0,Ann B\np0-1,ann  b\np1-2,Cy\n')
    report = prepare.prepare(data, replace(PARAMS, groups=GroupRule(table)))
    assert kinds(report)['groups written differently'] == 2


def test_too_few_groups_by_likeness_name_the_way_out(data: Path) -> None:
    for i in range(1, 10):
        shutil.copy(data / 'train/p0-0/image.tif', data / f'train/p{i // 2}-{i}/image.tif')
        lighten(data / f'train/p{i // 2}-{i}/image.tif', i)
    report = prepare.prepare(data, PARAMS)
    (sentence,) = report.errors
    assert 'cannot fill 5 folds' in sentence
    assert 'pass --split-alike' in sentence
    rule = GroupRule(alike=False)
    assert prepare.prepare(data, replace(PARAMS, groups=rule)).folds.groups == {}


def lighten(path: Path, step: int) -> None:
    image = np.clip(tifffile.imread(path).astype(int) + step, 0, 255).astype(np.uint8)
    image[0, 0] = step  # a saturated image stays different
    tifffile.imwrite(path, image, photometric='rgb')


# ---- the data folder's own manifest, and what folds keep of the rule


def test_the_manifest_of_the_data_folder_is_taken_and_said(data: Path) -> None:
    rows = [f'p{i // 2}-{i},who{i % 5},slide{i // 2}' for i in range(10)]
    (data / 'manifest.csv').write_text('\n'.join(['uuid,patient,slide', *rows]))
    report = prepare.prepare(data, PARAMS)
    assert report.folds.groups['p0-0'] == report.folds.groups['p2-5'] == 'who0'
    assert 'manifest.csv (columns uuid and patient)' in screen_text(report)
    rule = GroupRule(group_column='slide')
    report = prepare.prepare(data, replace(PARAMS, groups=rule, new_folds=True))
    assert report.folds.groups['p0-0'] == report.folds.groups['p0-1'] == 'slide0'
    rule = GroupRule(manifest=False)
    report = prepare.prepare(data, replace(PARAMS, groups=rule, new_folds=True))
    assert report.folds.groups == {}
    (sentence,) = prepare.prepare(data, PARAMS).errors  # folds are there, made without
    assert 'another setting of groups' in sentence
    assert 'unless --no-manifest' in sentence


def test_a_manifest_that_knows_no_group_is_as_none(data: Path) -> None:
    (data / 'manifest.csv').write_text('uuid,patient\np0-0,\np0-1, \n')
    report = prepare.prepare(data, PARAMS)
    assert report.folds.groups == {}
    assert kinds(report)[prepare.NO_GROUPS] == 10


def test_a_manifest_without_the_columns_is_said(data: Path) -> None:
    (data / 'manifest.csv').write_text('name;who\np0-0;A\n')
    report = prepare.prepare(data, PARAMS)
    (text,) = [f.text for f in report.warnings if f.kind == 'manifest not taken']
    assert 'no column uuid and patient; the columns are name;who (is it separated by' in text
    assert report.folds.groups == {}
    (data / 'manifest.csv').write_bytes('uuid,patient\nä,b\n'.encode('latin-1'))
    (sentence,) = prepare.prepare(data, replace(PARAMS, new_folds=True)).errors
    assert '--no-manifest' in sentence


def test_folds_keep_the_rule_that_made_them(data: Path) -> None:
    table = data / 'who.csv'
    table.write_text('case,slide\n' + ''.join(f'p{i // 2}-{i},s{i // 2}\n' for i in range(10)))
    rule = GroupRule(table, 'case', 'slide', regex=r's\d', alike=False)
    made = prepare.prepare(data, replace(PARAMS, groups=rule)).folds
    folds = load_folds(data / 'folds.json')
    assert folds == made
    assert folds.rule == {
        'alike': False,
        'csv': 'who.csv',
        'csv_hash': file_hash(table)[:16],
        'name_column': 'case',
        'group_column': 'slide',
        'regex': r's\d',
    }
    assert rule_of_folds(folds, data) == (replace(rule, manifest=False), '')
    table.write_text(table.read_text() + 'more,s9\n')
    assert 'changed since the folds were made' in rule_of_folds(folds, data)[1]
    table.unlink()
    kept, said = rule_of_folds(folds, data)
    assert 'gone since the folds were made' in said
    assert not kept.is_given


def test_folds_that_keep_no_rule_are_judged_by_their_groups(data: Path) -> None:
    plain = Folds((('a',), ('b',)))
    assert rule_of_folds(plain, data) == (GroupRule(), '')  # a manifest may tell
    assert rule_of_folds(None, data) == (GroupRule(), '')
    grouped = replace(plain, groups={'a': 'P'})
    assert rule_of_folds(grouped, data) == (GroupRule(manifest=False), '')


def test_older_folds_that_fit_get_the_rule(data: Path) -> None:
    made = prepare.prepare(data, PARAMS).folds
    save_folds(data / 'folds.json', replace(made, rule=None))
    assert load_folds(data / 'folds.json').rule is None
    report = prepare.prepare(data, PARAMS)
    assert report.is_folds_kept
    assert load_folds(data / 'folds.json').rule == {'alike': True}

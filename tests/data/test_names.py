"""data.names: a table's row is found however it is written, and never taken for another case."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

import pytest

from cellseg_mm.core.errors import DataError
from cellseg_mm.data.names import match_names, plain_name, safe_name

CASES = [f'Zelle_ä_{i}' for i in range(4)]


@pytest.mark.parametrize(
    'write',
    [
        pytest.param(str, id='as it is'),
        pytest.param(lambda n: f'{n}.png', id='suffix'),
        pytest.param(lambda n: f'{n}.ome.TIF', id='two suffixes, capitals'),
        pytest.param(lambda n: f' {n}\t', id='blanks'),
        pytest.param(lambda n: f'\ufeff{n}\u00a0', id='blanks that one does not see'),
        pytest.param(lambda n: unicodedata.normalize('NFD', n), id='decomposed'),
        pytest.param(lambda n: n.replace('_', ' '), id='before an import'),
        pytest.param(lambda n: f'images/train/{n}.jpg', id='a path'),
        pytest.param(lambda n: f'C:\\scans\\{n}.svs', id='a path of Windows'),
        pytest.param(str.upper, id='capitals'),
        pytest.param(lambda n: unicodedata.normalize('NFD', n).upper() + '.TIF ', id='all of it'),
    ],
)
def test_names_meet_in_one_form(write: Callable[[str], str]) -> None:
    rows = [(write(name), f'P{i // 2}') for i, name in enumerate(CASES)]
    found = match_names('t.csv', CASES, [*rows, ('stranger.png', 'P9')])
    assert found.values == {name: f'P{i // 2}' for i, name in enumerate(CASES)}
    assert found.unused == ['stranger.png']
    different = [(row, case) for (row, _), case in zip(rows, CASES, strict=True) if row != case]
    assert sorted(found.renamed + found.capitals) == sorted(different)
    has_capitals = plain_name(write('a'))[-1] == 'A'
    assert bool(found.capitals) is has_capitals


def test_what_can_mean_two_is_not_taken() -> None:
    found = match_names('t.csv', ['Abc', 'aBc', 'x'], [('ABC', 'P'), ('X1', 'Q')])
    assert (found.values, found.unused) == ({}, ['ABC', 'X1'])
    found = match_names('t.csv', ['Abc'], [('ABC', 'P'), ('abc', 'Q')])
    assert (found.values, found.unused) == ({}, ['ABC', 'abc'])
    # two cases that only a suffix tells apart are told apart by it
    found = match_names('t.csv', ['a.png', 'a.tif'], [('a.tif', 'P'), ('a.png', 'Q')])
    assert found.values == {'a.png': 'Q', 'a.tif': 'P'}
    assert found.renamed == []


@pytest.mark.parametrize(
    ('rows', 'sentence'),
    [
        pytest.param([('a', 'P'), ('a', 'Q')], 'a has the groups P and Q', id='twice'),
        pytest.param([('a', 'P'), ('a', '')], 'a has the groups P and (none)', id='once empty'),
        pytest.param(
            [('a', 'P'), ('a.png', 'Q')], "a (written 'a.png') has the groups P and Q", id='suffix'
        ),
        pytest.param([('z', 'P'), ('z', 'Q')], 'z has the groups P and Q', id='of no case'),
    ],
)
def test_rows_that_disagree(rows: list[tuple[str, str]], sentence: str) -> None:
    with pytest.raises(DataError, match=re.escape(sentence)):
        match_names('t.csv', ['a', 'b'], rows)


def test_rows_that_agree_count_once() -> None:
    found = match_names('t.csv', ['a'], [('a', 'P'), ('a', 'P'), ('a.png', 'P')])
    assert (found.values, found.unused) == ({'a': 'P'}, [])


def test_forms_by_hand() -> None:
    assert plain_name(' a.b.ome.tiff ') == 'a.b'
    assert plain_name('a.v2') == 'a.v2'  # not a suffix of an image
    assert plain_name('.png') == '.png'
    assert safe_name('.a / b?.') == 'a_b_'

"""lines: how a finding reads, how many there are, and that no check ends the others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cellseg_mm.checks.lines import Line, error, guarded, ok, summary, warn
from cellseg_mm.core.errors import DataError


def test_a_finding_is_one_line_and_its_table_is_indented() -> None:
    assert str(ok('disk', '3 GB')) == 'OK    disk: 3 GB'
    assert str(warn('anchors', 'few\na  1\nb  2')) == (
        'warn  anchors: few\n        a  1\n        b  2'
    )
    assert str(error('data', 'none')) == 'ERROR data: none'


def test_summary_counts_each_level() -> None:
    lines = [ok('a', ''), ok('b', ''), error('c', '')]
    assert summary(lines) == '2 OK, 0 warnings, 1 errors'


@pytest.mark.parametrize(
    ('problem', 'text'),
    [
        pytest.param(DataError('x.tif: bad'), 'x.tif: bad', id='ours'),
        pytest.param(KeyError('lr'), "could not be done (KeyError: 'lr')", id='foreign config'),
    ],
)
def test_a_check_that_fails_keeps_what_it_found(problem: Exception, text: str) -> None:
    def check() -> Iterator[Line]:
        yield ok('first', 'found')
        raise problem

    first, second = guarded('second', check)
    assert first == ok('first', 'found')
    assert (second.level, second.what) == ('error', 'second')
    assert text in second.text

"""One case, written in several ways: which row of a table means which case.

In: names of cases and of a table's rows. Out: the row of each case. Invariant: a row is taken for
a case only if it can mean no other one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from cellseg_mm.core.errors import DataError
from cellseg_mm.data.image_reader import SUFFIXES

# Beside those that are read: formats that images were converted from, and inner parts of suffixes.
KNOWN_SUFFIXES = {*SUFFIXES, '.ome', '.jp2', '.gif', '.webp'}
UNSEEN = '\ufeff\u200b'  # byte order mark and the space without width, from copying


@dataclass(frozen=True, slots=True)
class Matched:
    """What a table says of the cases.

    Attributes:
        values: By name of case.
        unused: Names of rows that mean no case, in the table's order.
        renamed: Row and case where both are written differently.
        capitals: As ``renamed``, where only capitals tell them apart.
    """

    values: dict[str, str]
    unused: list[str]
    renamed: list[tuple[str, str]]
    capitals: list[tuple[str, str]]


def plain_name(name: str) -> str:
    """Return a name in one Unicode form, without outer blanks and without an image's suffix."""
    plain = unicodedata.normalize('NFC', name).strip().strip(UNSEEN).strip()
    while (suffix := PurePosixPath(plain).suffix) and suffix.lower() in KNOWN_SUFFIXES:
        plain = plain[: -len(suffix)].rstrip()
    return plain


def safe_name(name: str) -> str:
    """Return a name as a file name that is safe everywhere; imported cases are called so."""
    safe = re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*\s]+', '_', name)
    return safe.lstrip('.').rstrip('. ')


def roi_label(class_name: str) -> str:
    """Return a class's name as it stands in the names of ImageJ's ROIs, which are file names."""
    return ''.join(c if c.isalnum() or c in ' -+.' else '-' for c in class_name)


def _last_part(name: str) -> str:
    return safe_name(plain_name(re.split(r'[/\\]', name)[-1]))


# From the strictest form to the loosest; each is tried for what the ones before left over.
FORMS: tuple[Callable[[str], str], ...] = (
    plain_name,
    lambda name: name,  # for cases that the plain form does not tell apart
    lambda name: safe_name(plain_name(name)),
    _last_part,
    lambda name: safe_name(plain_name(name)).casefold(),
    lambda name: _last_part(name).casefold(),
)
N_WITH_CAPITALS = 4


def match_names(source: str, names: Sequence[str], rows: Sequence[tuple[str, str]]) -> Matched:
    """Find the row of each case.

    Args:
        source: Where the rows come from, for messages.
        names: Of cases, all different.
        rows: Name and value; a repeated one counts once.

    Raises:
        DataError: Two rows of one name have two values.
    """
    left, table = list(names), _agreed(source, rows)
    found = Matched({}, [], [], [])
    for number, form in enumerate(FORMS):
        cases, keys = _by_form(left, form), _by_form(table, form)
        for key, writings in keys.items():
            if len(cases.get(key, ())) != 1:
                continue
            (case,) = cases[key]
            values = {table[writing]: writing for writing in writings}
            if len(values) > 1 and number >= N_WITH_CAPITALS:
                continue  # rows that capitals tell apart: nobody knows which is meant
            if len(values) > 1:
                raise _disagreeing(source, case, values)
            found.values[case] = next(iter(values))
            left.remove(case)
            other = [(writing, case) for writing in writings if writing != case]
            (found.capitals if number >= N_WITH_CAPITALS else found.renamed).extend(other)
            for writing in writings:
                del table[writing]
    found.unused.extend(table)
    return found


def _by_form(
    names: Sequence[str] | Mapping[str, str], form: Callable[[str], str]
) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        if key := form(name):
            found.setdefault(key, []).append(name)
    return found


def _agreed(source: str, rows: Sequence[tuple[str, str]]) -> dict[str, str]:
    table: dict[str, str] = {}
    for name, value in rows:
        if table.setdefault(name, value) != value:
            raise _disagreeing(source, name, {table[name]: name, value: name})
    return table


def _disagreeing(source: str, case: str, values: Mapping[str, str]) -> DataError:
    a, b = list(values)[:2]
    rows = sorted(set(values.values()) - {case})
    named = f' (written {", ".join(map(repr, rows))})' if rows else ''
    return DataError(
        [
            f'{source}: {case}{named} has the groups {a or "(none)"} and {b or "(none)"}; '
            'expected one; correct or remove one of the rows.'
        ]
    )

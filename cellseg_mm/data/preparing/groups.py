"""Which images belong together: a table, an expression, or looks.

In: cases. Out: a group for each. Invariant: what one patient gave stays together.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cellseg_mm.core.errors import ConfigError, DataError
from cellseg_mm.data.preparing.case_checks import CaseFacts, Finding, near_duplicates


@dataclass(frozen=True, slots=True)
class GroupRule:
    """How to know which cases belong together (one patient, one slide).

    Attributes:
        csv_path: Table with a header row, or None.
        name_column: Its column of case names.
        group_column: Its column of groups; an empty cell means unknown.
        regex: Pattern searched in the CSV's group where there is a CSV, else in the case name;
            the first bracket (or the whole match) is the group. Empty: not used.
        alike: Whether images that look alike are one group too.

    Raises:
        ConfigError: ``regex`` is no regular expression.
    """

    csv_path: Path | None = None
    name_column: str = 'uuid'
    group_column: str = 'patient'
    regex: str = ''
    alike: bool = True

    @property
    def is_given(self) -> bool:
        """Whether a table or an expression says which cases belong together."""
        return self.csv_path is not None or bool(self.regex)

    def __post_init__(self) -> None:
        try:
            re.compile(self.regex)
        except re.error as problem:
            raise ConfigError(
                f'--groups-regex {self.regex!r}: not a regular expression ({problem}); '
                "expected one such as '(TCGA-..-....)'."
            ) from problem


def _alike(train: Sequence[CaseFacts]) -> list[tuple[int, int]]:
    """Return pairs of indices of readable images that look alike."""
    usable = [i for i, facts in enumerate(train) if facts.thumb]
    return [(usable[i], usable[j]) for i, j in near_duplicates([train[i] for i in usable])]


def find_groups(
    facts: Sequence[CaseFacts], rule: GroupRule, alike: Sequence[tuple[int, int]]
) -> tuple[dict[str, str], list[Finding]]:
    """Find out which cases belong together.

    Equal images are always one group. A case without a known group is alone, unless it looks like
    another one. Where likeness joins two known groups, both become one, named ``a+b``.

    Args:
        facts: Facts of the training cases.
        rule: Where groups come from.
        alike: Pairs of indices of images that look alike; see ``case_checks.near_duplicates``.

    Returns:
        Group by case name, only for cases whose group is known or shared; and warnings.

    Raises:
        DataError: The CSV is missing, has not the columns, or names a case twice with two groups.
    """
    known, warnings = _known_groups([f.name for f in facts], rule)
    parent = list(range(len(facts)))

    def top(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_with: dict[tuple[str, str], int] = {}
    for i, one in enumerate(facts):
        keys = [('pixels', one.pixel_hash)]
        keys += [('group', known[one.name])] if one.name in known else []
        for key in keys:
            parent[top(i)] = top(first_with.setdefault(key, i))
    for i, j in alike if rule.alike else []:
        parent[top(j)] = top(i)
    members: dict[int, list[str]] = {}
    for i, one in enumerate(facts):
        members.setdefault(top(i), []).append(one.name)
    groups: dict[str, str] = {}
    for names in members.values():
        labels = sorted({known[name] for name in names if name in known})
        if labels or len(names) > 1:
            group = '+'.join(labels) or f'alike:{min(names)}'
            groups.update(dict.fromkeys(names, group))
        if len(labels) > 1:
            text = f'{" and ".join(labels)}: images of these groups look alike; they are one group.'
            warnings.append(Finding('groups joined', len(labels), text))
    return groups, warnings


def _known_groups(names: Sequence[str], rule: GroupRule) -> tuple[dict[str, str], list[Finding]]:
    if not rule.is_given:
        return {}, []
    source = {name: name for name in names}
    if rule.csv_path is not None:
        table = _read_groups_csv(rule.csv_path, rule)
        source = {name: table.get(name, '') for name in names}
    if rule.regex:
        matches = {name: re.search(rule.regex, text) for name, text in source.items()}
        source = {
            name: (match[1] or '' if match.re.groups else match[0]) if match else ''
            for name, match in matches.items()
        }
    known = {name: group for name, group in source.items() if group}
    without = [name for name in names if name not in known]
    if not without:
        return known, []
    text = f'{len(without)} case(s) without a known group, such as {without[0]}; each is alone.'
    return known, [Finding('no group', len(without), text)]


def _read_groups_csv(path: Path, rule: GroupRule) -> dict[str, str]:
    try:
        with path.open(encoding='utf-8-sig', newline='') as stream:
            reader = csv.DictReader(stream)
            columns = reader.fieldnames or []
            missing = [c for c in (rule.name_column, rule.group_column) if c not in columns]
            if missing:
                raise DataError(
                    [
                        f'{path}: no column {" and ".join(missing)}; the columns are '
                        f'{", ".join(columns) or "none"}; '
                        'name the right ones with --name-column and --group-column.'
                    ]
                )
            rows = [(row[rule.name_column], row[rule.group_column]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise DataError(
            [f'{path}: cannot be read ({problem}); expected a CSV table in UTF-8.']
        ) from problem
    table: dict[str, str] = {}
    for name, group in rows:
        name, group = (name or '').strip(), (group or '').strip()
        if table.setdefault(name, group) != group:
            raise DataError(
                [f'{path}: {name} has the groups {table[name]} and {group}; expected one.']
            )
    return table

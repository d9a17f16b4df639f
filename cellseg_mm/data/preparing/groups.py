"""Which images belong together: a table, an expression, or looks.

In: cases. Out: a group for each. Invariant: what one patient gave stays together, and a rule that
knows no case is refused.
"""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cellseg_mm.core.errors import ConfigError, DataError
from cellseg_mm.core.files import file_hash, regular
from cellseg_mm.data.folds import Folds, Rule
from cellseg_mm.data.names import match_names
from cellseg_mm.data.preparing.case_checks import CaseFacts, Finding
from cellseg_mm.data.preparing.likeness import near_duplicates

MANIFEST = 'manifest.csv'
SHOWN = 3  # names quoted in a sentence
SPLIT_ALIKE = 'if they are of different patients, pass --split-alike'


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
        manifest: Whether ``manifest.csv`` of the data folder is the table where it has the columns
            and neither ``csv_path`` nor ``regex`` is given.

    Raises:
        ConfigError: ``regex`` is no regular expression.
    """

    csv_path: Path | None = None
    name_column: str = 'uuid'
    group_column: str = 'patient'
    regex: str = ''
    alike: bool = True
    manifest: bool = True

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

    def for_data(self, root: Path) -> tuple[GroupRule, list[Finding]]:
        """Return the rule with the data folder's manifest where that is to be taken.

        Raises:
            DataError: The manifest cannot be read.
        """
        path = root / MANIFEST
        if self.is_given or not self.manifest or not path.is_file():
            return self, []
        try:
            columns, rows = _read_csv(path)
        except DataError as problem:
            hint = '; mend it, or pass --no-manifest if it is none of groups'
            raise DataError([problem.problems[0].rstrip('.') + hint]) from problem
        lacking = [c for c in (self.name_column, self.group_column) if c not in columns]
        if not lacking and any((row[self.group_column] or '').strip() for row in rows):
            return replace(self, csv_path=path), []
        if not lacking:  # an importer that knew no patients wrote it
            return self, []
        text = f'{_no_column(path, lacking, columns)}; it was not taken for groups.'
        return self, [Finding('manifest not taken', 1, text)]

    def record(self, root: Path) -> Rule:
        """Return what a folds file keeps of the rule, so that the folds can be judged by it."""
        found: dict[str, str | bool] = {'alike': self.alike}
        if self.csv_path is not None:
            path, base = self.csv_path.resolve(), root.resolve()
            is_inside = path.is_relative_to(base)
            found['csv'] = (path.relative_to(base) if is_inside else path).as_posix()
            found['csv_hash'] = file_hash(path)[:16]
            found['name_column'], found['group_column'] = self.name_column, self.group_column
        if self.regex:
            found['regex'] = self.regex
        return found


def rule_of_folds(folds: Folds | None, root: Path) -> tuple[GroupRule, str]:
    """Return the rule that made folds, and what has become of its table ('' if nothing).

    Folds that do not say it are judged by their own groups, or by a manifest where they have none.
    """
    if folds is None:
        return GroupRule(), ''
    if folds.rule is None:
        is_known = any(not group.startswith('alike:') for group in folds.groups.values())
        return GroupRule(manifest=not is_known), ''
    get = folds.rule.get
    table = root / str(get('csv')) if get('csv') else None
    said = ''
    if table is not None and not table.is_file():
        said = f'{table}: gone since the folds were made; their own groups hold; restore it'
        return GroupRule(alike=bool(get('alike', True)), manifest=False), said
    if table is not None and file_hash(table)[:16] != get('csv_hash'):
        said = f'{table}: changed since the folds were made with it; look whether groups changed'
    rule = GroupRule(
        csv_path=table,
        name_column=str(get('name_column', 'uuid')),
        group_column=str(get('group_column', 'patient')),
        regex=str(get('regex', '')),
        alike=bool(get('alike', True)),
        manifest=False,
    )
    return rule, said


def alike_pairs(train: Sequence[CaseFacts]) -> list[tuple[int, int]]:
    """Return pairs of indices of readable images that look alike."""
    usable = [i for i, facts in enumerate(train) if facts.thumb]
    return [(usable[i], usable[j]) for i, j in near_duplicates([train[i] for i in usable])]


def find_groups(
    facts: Sequence[CaseFacts],
    rule: GroupRule,
    alike: Sequence[tuple[int, int]],
    *,
    others: Collection[str] = (),
) -> tuple[dict[str, str], list[Finding]]:
    """Find out which cases belong together.

    Equal images are always one group. A case without a known group is alone, unless it looks like
    another one. Where likeness joins two known groups, both become one, named ``a+b``.

    Args:
        facts: Facts of the training cases.
        rule: Where groups come from.
        alike: Pairs of indices of images that look alike; see ``likeness.near_duplicates``.
        others: Names that a table may have beside the cases: excluded ones and test images.

    Returns:
        Group by case name, only for cases whose group is known or shared; and warnings.

    Raises:
        DataError: The CSV is missing, has not the columns, or names a case twice with two groups;
            or the rule knows no case.
    """
    known, warnings = known_groups([f.name for f in facts], rule, others)
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
            text = (
                f'{_first_of(labels, " and ")}: images of these groups look alike or are equal; '
                f'they are one group; {SPLIT_ALIKE} (equal images stay together).'
            )
            warnings.append(Finding('groups joined', len(labels), text))
    return groups, warnings


def known_groups(
    names: Sequence[str], rule: GroupRule, others: Collection[str] = ()
) -> tuple[dict[str, str], list[Finding]]:
    """Return the group of each case that the rule's table or expression knows, and warnings.

    Args:
        names: Names of the cases.
        rule: Where groups come from.
        others: Names that a table may have beside the cases.

    Raises:
        DataError: The table cannot be read or has not the columns, or the rule knows no case.
    """
    if not rule.is_given or not names:
        return {}, []
    source = {name: name for name in names}
    findings: list[Finding] = []
    if rule.csv_path is not None:
        source, findings = _groups_by_table(rule.csv_path, names, rule, others)
    if rule.regex:
        source = _groups_by_regex(rule, source)
    known = {name: group for name, group in source.items() if group}
    findings += _odd_groups(rule, known, len(names))
    without = [name for name in names if name not in known]
    if without:
        text = f'{len(without)} case(s) without a known group: {_first_of(without)}; each is alone.'
        findings.append(Finding('no group', len(without), text))
    return known, findings


def _groups_by_table(
    path: Path, names: Sequence[str], rule: GroupRule, others: Collection[str]
) -> tuple[dict[str, str], list[Finding]]:
    rows = _read_groups_csv(path, rule)
    found = match_names(str(path), names, rows)
    columns = f'name the right columns with --name-column (now {rule.name_column})'
    if not found.values:
        written = _first_of([name for name, _ in rows])
        raise DataError(
            [
                f'{path}: none of its {len(rows)} names ({written or "none"}) is one of the '
                f'{len(names)} cases ({_first_of(names)}); expected the names of the folders of '
                f'train/; correct the table, or {columns}.'
            ]
        )
    if not any(found.values.values()):
        raise DataError(
            [
                f'{path}: column {rule.group_column} is empty for every case; expected groups; '
                'name another with --group-column.'
            ]
        )
    findings = []
    if found.renamed:
        text = f'{path}: {_pairs(found.renamed)}, written in another way; taken as the same.'
        findings.append(Finding('names written differently', len(found.renamed), text))
    if found.capitals:
        text = (
            f'{path}: {_pairs(found.capitals)}, which only capitals tell apart; taken as the same.'
        )
        findings.append(Finding('names with other capitals', len(found.capitals), text))
    stranger = match_names(str(path), sorted(others), [(name, '') for name in found.unused]).unused
    if stranger:
        text = f'{path}: {len(stranger)} row(s) name no case: {_first_of(stranger)}.'
        findings.append(Finding('rows without a case', len(stranger), text))
    return found.values, findings


def _groups_by_regex(rule: GroupRule, source: Mapping[str, str]) -> dict[str, str]:
    """Search the expression in every text; a case without a match gets no group."""
    pattern = re.compile(unicodedata.normalize('NFC', rule.regex))
    found: dict[str, str] = {}
    for name, text in source.items():
        match = pattern.search(unicodedata.normalize('NFC', text))
        if match is not None:
            found[name] = ((match[1] or '') if pattern.groups else match[0]).strip()
    if not any(found.values()):
        what = 'names of cases' if rule.csv_path is None else 'groups of the table'
        raise DataError(
            [
                f'--groups-regex {rule.regex!r}: finds nothing in the {len(source)} {what} '
                f'({_first_of(list(source.values()))}); expected the part that names the patient; '
                'correct it.'
            ]
        )
    return found


def _odd_groups(rule: GroupRule, known: Mapping[str, str], n_cases: int) -> Iterator[Finding]:
    """Say what is possible and seldom meant."""
    different = sorted(set(known.values()))
    how = f'--groups-regex {rule.regex!r}' if rule.regex else f'{rule.csv_path}'
    if len(different) == 1 and len(known) == n_cases > 1:
        text = f'{how}: all {n_cases} cases are one group, {different[0]}; no folds can be made.'
        yield Finding('one group', n_cases, text)
    is_alone = len(different) == len(known) > 1
    if is_alone and (rule.regex or all(name == group for name, group in known.items())):
        text = (
            f'{how}: each case is a group of its own ({_first_of(different)}), which keeps nothing '
            'together; expected a part of the name that several share, if patients gave several.'
        )
        yield Finding('groups of one', len(known), text)
    folded: dict[str, list[str]] = {}
    for group in different:
        folded.setdefault(' '.join(group.casefold().split()), []).append(group)
    for writings in folded.values():
        if len(writings) > 1:
            text = (
                f'{how}: {" and ".join(map(repr, writings))} differ in capitals or blanks only '
                'and count as different groups; write them alike if they are one.'
            )
            yield Finding('groups written differently', len(writings), text)


def _read_groups_csv(path: Path, rule: GroupRule) -> list[tuple[str, str]]:
    columns, rows = _read_csv(path)
    lacking = [c for c in (rule.name_column, rule.group_column) if c not in columns]
    if lacking:
        raise DataError([f'{_no_column(path, lacking, columns)}.'])
    pairs = [((row[rule.name_column] or '').strip(), row[rule.group_column] or '') for row in rows]
    return [(name, unicodedata.normalize('NFC', group).strip()) for name, group in pairs if name]


def _read_csv(path: Path) -> tuple[list[str], list[dict[str, str | None]]]:
    """Return column names and rows of a CSV table; blanks around column names do not count."""
    try:
        with regular(path).open(encoding='utf-8-sig', newline='') as stream:
            reader = csv.DictReader(stream)
            columns = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            return columns, list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise DataError(
            [f'{path}: cannot be read ({problem}); expected a CSV table in UTF-8.']
        ) from problem


def _no_column(path: Path, lacking: Sequence[str], columns: Sequence[str]) -> str:
    hint = ''
    if len(columns) == 1 and re.search(r'[;\t]', columns[0]):
        hint = ' (is it separated by semicolons or tabs? expected commas)'
    return (
        f'{path}: no column {" and ".join(lacking)}; the columns are '
        f'{", ".join(columns) or "none"}{hint}; '
        'name the right ones with --name-column and --group-column'
    )


def _first_of(words: Sequence[str], between: str = ', ') -> str:
    more = f' and {len(words) - SHOWN} more' if len(words) > SHOWN else ''
    return between.join(words[:SHOWN]) + more


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    return _first_of([f'{row!r} for {case}' for row, case in pairs])

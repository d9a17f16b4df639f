"""Decides which cases each fold holds out, and keeps that decision in a file.

In: case names, instances per class, and each case's group (patient or slide). Out: :class:`Folds`
and ``folds.json``, one line per case, made to be read and edited by hand.
Invariant: every case is in exactly one fold, no fold is empty, and no group is split; folds that
were extended prove by their cases which folds they extend.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import FoldError
from cellseg_mm.core.files import regular, text_hash, write_text
from cellseg_mm.data.balance import balanced

Method = Literal['grouped', 'original']
Rule = Mapping[str, str | bool]

VERSION = 1
ORIGINAL_SEED = 313551058  # the original recipe's seed
SHOWN = 5  # names quoted in an error

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Folds:
    """An assignment of cases to folds.

    Attributes:
        names_by_fold: Case names that each fold validates on, sorted within a fold.
        groups: Group of each case that has one; cases of one group share a fold. Empty for the
            original recipe, which knows no groups.
        method: How the folds were made.
        seed: Seed that they were made with.
        excluded: Names of the cases that were left out by a list other than the data folder's own
            ``exclude.txt``; they replace it. None where that one holds.
        rule: Where ``groups`` come from, see ``preparing.groups.GroupRule.record``; None where
            nobody wrote it down.
        added: Which extension brought a case, from 1; cases that were there first are not named.

    Raises:
        FoldError: A case is in two folds, a fold is empty, there are fewer than two folds, a
            group is split, or ``groups`` or ``added`` names an unknown case.
    """

    names_by_fold: tuple[tuple[str, ...], ...]
    groups: Mapping[str, str] = field(default_factory=dict)
    method: Method = 'grouped'
    seed: int = ORIGINAL_SEED
    excluded: tuple[str, ...] | None = None
    rule: Rule | None = None
    added: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names_by_fold = tuple(tuple(sorted(names)) for names in self.names_by_fold)
        object.__setattr__(self, 'names_by_fold', names_by_fold)
        object.__setattr__(self, 'groups', dict(sorted(self.groups.items())))
        if self.n_folds < 2:
            raise FoldError(f'folds: there is {self.n_folds} fold; at least 2 are needed')
        for fold, names in enumerate(names_by_fold):
            if not names:
                raise FoldError(f'folds: fold {fold} is empty; give it at least one case')
        self._check_once()
        self._check_groups()

    def _check_once(self) -> None:
        fold_of: dict[str, int] = {}
        for fold, names in enumerate(self.names_by_fold):
            for name in names:
                if name in fold_of:
                    raise FoldError(
                        f'folds: case {name} is in fold {fold_of[name]} and again in fold {fold}; '
                        f'every case belongs to exactly one fold; remove one of the two entries'
                    )
                fold_of[name] = fold
        unknown = sorted({*self.groups, *self.added} - set(fold_of))
        if unknown:
            raise FoldError(f'folds: {_quoted(unknown)} have a group but are in no fold')

    def _check_groups(self) -> None:
        members: dict[str, dict[int, list[str]]] = {}
        for fold, names in enumerate(self.names_by_fold):
            for name in names:
                if name in self.groups:
                    members.setdefault(self.groups[name], {}).setdefault(fold, []).append(name)
        for group, by_fold in sorted(members.items()):
            if len(by_fold) > 1:
                parts = '; '.join(f'fold {f}: {_quoted(by_fold[f])}' for f in sorted(by_fold))
                raise FoldError(
                    f'folds: group {group} is split ({parts}); cases of one group must share a '
                    f'fold, or scores are optimistic; move them together'
                )

    @property
    def n_folds(self) -> int:
        """Number of folds."""
        return len(self.names_by_fold)

    @property
    def names(self) -> tuple[str, ...]:
        """All cases, sorted."""
        return tuple(sorted(name for names in self.names_by_fold for name in names))

    @property
    def hash(self) -> str:
        """16 hex digits that depend on which case is in which fold and on nothing else."""
        return text_hash(json.dumps(self.names_by_fold))

    @property
    def lineage(self) -> tuple[str, ...]:
        """Hashes of the folds that these extend, oldest first.

        They are computed from the cases: where one was moved since, its folds' hash is not here.
        A model of such folds has seen exactly what it saw then, and no case that came later.
        """
        found = []
        for step in range(max(self.added.values(), default=0)):
            parts = [
                [n for n in part if self.added.get(n, 0) <= step] for part in self.names_by_fold
            ]
            found.append(text_hash(json.dumps(parts)))
        return tuple(found)

    def val_names(self, fold: int) -> tuple[str, ...]:
        """Return the cases that ``fold`` holds out, sorted.

        Raises:
            FoldError: There is no such fold.
        """
        if not 0 <= fold < self.n_folds:
            raise FoldError(f'folds: fold {fold} does not exist; choose 0 to {self.n_folds - 1}')
        return self.names_by_fold[fold]

    def train_names(self, fold: int) -> tuple[str, ...]:
        """Return the cases that ``fold`` trains on, sorted.

        Raises:
            FoldError: There is no such fold.
        """
        held_out = set(self.val_names(fold))
        return tuple(name for name in self.names if name not in held_out)

    def fold_of(self) -> dict[str, int]:
        """Return the fold of each case, by sorted name."""
        pairs = ((name, k) for k, names in enumerate(self.names_by_fold) for name in names)
        return dict(sorted(pairs))


def _quoted(names: Sequence[str]) -> str:
    more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
    return ', '.join(names[:SHOWN]) + more


def make_folds(
    names: Sequence[str],
    counts: NDArray[np.integer],
    *,
    n_folds: int = 5,
    seed: int = ORIGINAL_SEED,
    groups: Mapping[str, str] | None = None,
    method: Method = 'grouped',
) -> Folds:
    """Assign cases to folds; the result does not depend on the order of ``names``.

    ``grouped`` keeps groups whole and makes each fold's share of the images, of every class's
    instances and of the images with that class as even as groups permit. ``original`` is the
    original recipe's split: sorted names, shuffled, cut into contiguous slices; it splits groups.

    Args:
        names: n different case names.
        counts: (n, K) integers, instances of each class in each case.
        n_folds: Number of folds.
        seed: Seed of the search (``grouped``) or of the shuffle (``original``).
        groups: Group of each case; a case that is missing here, or whose group is the empty
            string, is a group of its own.
        method: Which rule.

    Raises:
        FoldError: Names repeat, ``counts`` does not fit, or there are fewer groups than folds.
    """
    names, table = _checked_input(names, counts, n_folds, groups)
    known = {name: group for name, group in (groups or {}).items() if group}
    if method == 'original':
        _warn_about_split_groups(names, known)
        return Folds(_original_slices(names, n_folds, seed), {}, 'original', seed)
    if method != 'grouped':
        raise FoldError(f'folds: method {method!r} is unknown; choose one of {get_args(Method)}')
    keys = [(0, known[name]) if name in known else (1, name) for name in names]
    unique = sorted(set(keys))
    index_of = {key: i for i, key in enumerate(unique)}
    group_of = np.array([index_of[key] for key in keys])
    if len(unique) < n_folds:
        raise FoldError(
            f'folds: {len(names)} cases in {len(unique)} groups cannot fill {n_folds} folds; '
            f'ask for at most {len(unique)} folds'
        )
    shares = np.zeros((len(unique), table.shape[1]))
    np.add.at(shares, group_of, table)
    fold_of = balanced(shares, n_folds, np.random.default_rng(seed))[group_of]
    parts = tuple(
        tuple(name for name, f in zip(names, fold_of.tolist(), strict=True) if f == fold)
        for fold in range(n_folds)
    )
    return Folds(parts, known, 'grouped', seed)


def _checked_input(
    names: Sequence[str],
    counts: NDArray[np.integer],
    n_folds: int,
    groups: Mapping[str, str] | None,
) -> tuple[list[str], NDArray[np.float64]]:
    """Return the names sorted and each case's share of every quantity to balance."""
    counts = np.asarray(counts)
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise FoldError(f'folds: case names must differ; {_quoted(repeated)} occur more than once')
    if counts.ndim != 2 or len(counts) != len(names) or (counts < 0).any():
        raise FoldError(
            f'folds: counts has shape {counts.shape}; ({len(names)}, classes) numbers >= 0 are '
            f'needed, one row per case'
        )
    if n_folds < 2 or len(names) < n_folds:
        raise FoldError(
            f'folds: {len(names)} cases cannot make {n_folds} folds; at least 2 folds and one '
            f'case per fold are needed'
        )
    unknown = sorted(set(groups or {}) - set(names))
    if unknown:
        raise FoldError(
            f'folds: groups names unknown cases: {_quoted(unknown)}; remove these rows from the '
            f'group table or add the cases'
        )
    order = sorted(range(len(names)), key=lambda i: names[i])
    return [names[i] for i in order], shares_of(counts[order])


def shares_of(counts: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return (n, 1 + 2K) float64: share of images, instances per class, images with the class.

    Every column adds up to 1, or to 0 where a class never occurs.
    """
    parts = [np.ones((len(counts), 1)), counts.astype(np.float64), (counts > 0).astype(np.float64)]
    table = np.concatenate(parts, axis=1)
    shares: NDArray[np.float64] = table / np.maximum(table.sum(axis=0), 1)
    return shares


def _original_slices(names: Sequence[str], n_folds: int, seed: int) -> tuple[tuple[str, ...], ...]:
    """Cut the shuffled names as the original recipe does.

    Source: larrychen20011120/VDL_Homework3 at 88cd1a2: slices from int(.2 * k * n) to
    int(.2 * (k + 1) * n) after ``random.seed(313551058)`` and ``random.shuffle``. The original
    shuffled in the file system's order; sorted names make it the same everywhere.
    """
    shuffled = sorted(names)
    random.Random(seed).shuffle(shuffled)
    n = len(shuffled)
    step = 1 / n_folds  # 0.2 for five folds, and multiplied in the original's order
    cuts = [int(step * fold * n) for fold in range(n_folds)] + [n]
    return tuple(tuple(shuffled[a:b]) for a, b in pairwise(cuts))


def _warn_about_split_groups(names: Sequence[str], groups: Mapping[str, str]) -> None:
    n_cases = sum(name in groups for name in names)
    if n_cases > len(set(groups.values())):
        logger.warning(
            'The original split ignores the %d groups of %d cases, so cases of one group may be '
            'on both sides; scores will be optimistic. Use method "grouped" for scores to trust.',
            len(set(groups.values())),
            n_cases,
        )


def save_folds(path: Path | str, folds: Folds) -> None:
    """Write folds as JSON with one line per case.

    To change a fold by hand, change the number after ``"fold"``. The hash in the file is for
    people; readers compute it from the cases.
    """
    head: dict[str, object] = {
        'version': VERSION,
        'method': folds.method,
        'seed': folds.seed,
        'n_folds': folds.n_folds,
        'hash': folds.hash,
    }
    if folds.excluded is not None:
        head['excluded'] = list(folds.excluded)
    if folds.rule is not None:
        head['rule'] = dict(folds.rule)
    if folds.added:
        head['extends'] = list(folds.lineage)
    lines = [f' {json.dumps(key)}: {json.dumps(value)},' for key, value in head.items()]
    rows = [
        json.dumps(
            {'fold': fold, 'case': name, 'group': folds.groups.get(name)}
            | ({'added': folds.added[name]} if name in folds.added else {})
        )
        for fold, names in enumerate(folds.names_by_fold)
        for name in names
    ]
    body = ',\n'.join(f'  {row}' for row in rows)
    write_text(path, '\n'.join(['{', *lines, ' "cases": [', body, ' ]', '}', '']))


def load_folds(path: Path | str, names: Collection[str] | None = None) -> Folds:
    """Read and verify a folds file.

    Args:
        path: File written by :func:`save_folds`, perhaps edited.
        names: If given, exactly these cases must be assigned.

    Raises:
        FoldError: The file is missing, torn, of another version, does not hold the invariant, or
            does not fit ``names``.
    """
    path = Path(path)
    content = _read_object(path)
    if content.get('version') != VERSION:
        raise FoldError(
            f'{path}: version is {content.get("version")!r}, expected {VERSION}; write the file '
            f'again with tools/prepare_data.py'
        )
    n_folds = _whole_number(path, content, 'n_folds', least=2)
    seed = _whole_number(path, content, 'seed', least=0)
    method = content.get('method')
    if method not in get_args(Method):
        raise FoldError(f'{path}: method is {method!r}, expected one of {get_args(Method)}')
    parts, groups, added = _read_cases(path, content, n_folds)
    try:
        folds = Folds(
            parts,
            groups,
            cast(Method, method),
            seed,
            _read_excluded(path, content),
            _read_rule(path, content),
            added,
        )
    except FoldError as error:
        raise FoldError(f'{path}: {error}') from None
    if names is not None:
        _check_names(path, folds, names)
    if content.get('hash') != folds.hash:
        logger.info('%s was edited by hand; its hash is now %s', path, folds.hash)
    return folds


def excluded_by(path: Path | str) -> tuple[str, ...] | None:
    """Return ``Folds.excluded`` of a folds file; None without a file.

    Raises:
        FoldError: See :func:`load_folds`.
    """
    return load_folds(path).excluded if Path(path).is_file() else None


def _read_excluded(path: Path, content: Mapping[str, object]) -> tuple[str, ...] | None:
    names = content.get('excluded')
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FoldError(f'{path}: excluded is {str(names)[:80]}, expected a list of case names')
    return tuple(sorted(names))


def _read_rule(path: Path, content: Mapping[str, object]) -> Rule | None:
    rule = content.get('rule')
    if rule is None:
        return None
    if not isinstance(rule, dict) or not all(isinstance(v, str | bool) for v in rule.values()):
        raise FoldError(
            f'{path}: rule is {str(rule)[:80]}, expected an object of texts, true and false, as '
            f'tools/prepare_data.py writes it; mend it or remove the line'
        )
    return rule


def _read_object(path: Path) -> dict[str, object]:
    try:
        content = json.loads(regular(path).read_text(encoding='utf-8'))
    except OSError as error:
        raise FoldError(
            f'{path}: the folds file cannot be read ({error.strerror}); make it with '
            f'tools/prepare_data.py'
        ) from None
    except (ValueError, RecursionError) as error:
        raise FoldError(
            f'{path}: not valid JSON ({error}); mend the line or make the file again with '
            f'tools/prepare_data.py'
        ) from None
    if not isinstance(content, dict):
        raise FoldError(f'{path}: holds a {type(content).__name__}, expected an object')
    return content


def _whole_number(path: Path, content: Mapping[str, object], key: str, *, least: int) -> int:
    value = content.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise FoldError(f'{path}: {key} is {value!r}, expected a whole number of at least {least}')
    return value


def _read_cases(
    path: Path, content: Mapping[str, object], n_folds: int
) -> tuple[tuple[tuple[str, ...], ...], dict[str, str], dict[str, int]]:
    rows = content.get('cases')
    if not isinstance(rows, list) or not rows:
        raise FoldError(f'{path}: cases is missing or empty, expected a list with one row per case')
    if n_folds > len(rows):
        raise FoldError(
            f'{path}: n_folds is {n_folds}, but there are {len(rows)} cases; expected at least one '
            f'case per fold; mend n_folds or make the file again with tools/prepare_data.py'
        )
    parts: list[list[str]] = [[] for _ in range(n_folds)]
    groups: dict[str, str] = {}
    added: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        where = f'{path}: row {number} of cases'
        if not isinstance(row, dict) or not isinstance(row.get('case'), str) or not row['case']:
            raise FoldError(f'{where} is {row!r}, expected an object with a case name')
        fold, group = row.get('fold'), row.get('group')
        if not isinstance(fold, int) or isinstance(fold, bool) or not 0 <= fold < n_folds:
            raise FoldError(
                f'{where} ({row["case"]}): fold is {fold!r}, expected 0 to {n_folds - 1}'
            )
        if group is not None and not isinstance(group, str):
            raise FoldError(f'{where} ({row["case"]}): group is {group!r}, expected text or null')
        parts[fold].append(row['case'])
        if group:
            groups[row['case']] = group
        if 'added' in row:
            added[row['case']] = _whole_number(path, row, 'added', least=1)
    return tuple(tuple(part) for part in parts), groups, added


def _check_names(path: Path, folds: Folds, names: Collection[str]) -> None:
    assigned, expected = set(folds.names), set(names)
    problems = []
    if missing := sorted(expected - assigned):
        problems.append(f'{len(missing)} case(s) of the data are in no fold: {_quoted(missing)}')
    if unknown := sorted(assigned - expected):
        problems.append(f'{len(unknown)} case(s) are not in the data: {_quoted(unknown)}')
    if problems:
        raise FoldError(
            f'{path}: {"; ".join(problems)}; make the file again with tools/prepare_data.py '
            f'(its --exclude names cases to leave out) or mend the rows'
        )

"""Adds new cases to folds that models were trained on.

In: folds, the facts of all cases now, their groups. Out: the folds with the new cases. Invariant:
no case that was there changes its fold, so that a model of the old folds has seen no image of the
fold that it held out, neither an old nor a new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import FoldError
from cellseg_mm.data.folds import Folds, shares_of
from cellseg_mm.data.preparing.case_checks import CaseFacts
from cellseg_mm.data.preparing.groups import SPLIT_ALIKE

Unit = tuple[bool, str]  # a group, or a case without one


def extend_folds(old: Folds, facts: Sequence[CaseFacts], groups: Mapping[str, str]) -> Folds:
    """Add the cases that ``old`` does not know.

    A case of a known group goes to its group's fold. The others go, the largest group first, where
    they even out each fold's share of images and of every class's instances best.

    Args:
        old: Made by ``grouped``.
        facts: Of all cases now, those of ``old`` among them.
        groups: Group of each case that has one, by the rule that ``old`` was made with.

    Raises:
        FoldError: Old cases are gone, have other groups, or a new one ties groups of two folds
            together.
    """
    fold_of = old.fold_of()
    if gone := sorted(set(fold_of) - {one.name for one in facts}):
        raise FoldError(
            f'{len(gone)} case(s) of the folds are not in the data, such as {gone[0]}; new cases '
            'can be added, none taken away; bring them back'
        )
    if old.method != 'grouped':
        raise FoldError(
            f'the folds were made by method {old.method}, which splits patients; expected grouped '
            'ones; make new folds'
        )
    _refuse_other_groups(old, groups)
    new = [one for one in facts if one.name not in fold_of]
    step = 1 + max(old.added.values(), default=0)
    try:
        return replace(
            old,
            names_by_fold=_with_new(old, facts, groups),
            groups={name: group for name, group in groups.items() if group},
            added={**old.added, **{one.name: step for one in new}},
        )
    except FoldError as problem:  # a group is split
        raise FoldError(
            f'{problem}; a new image that looks like images of two groups ties them together: '
            f'leave it out with exclude.txt, or {SPLIT_ALIKE}'
        ) from problem


def _with_new(
    old: Folds, facts: Sequence[CaseFacts], groups: Mapping[str, str]
) -> tuple[tuple[str, ...], ...]:
    """Return the names of each fold, the new cases placed."""
    fold_of = old.fold_of()
    shares = shares_of(np.array([one.counts for one in facts], dtype=np.int64))
    totals = np.zeros((old.n_folds, shares.shape[1]))
    home: dict[Unit, int] = {}
    units: dict[Unit, list[int]] = {}  # of new cases
    for i, one in enumerate(facts):
        unit = (True, groups[one.name]) if groups.get(one.name) else (False, one.name)
        if one.name in fold_of:
            home[unit] = fold_of[one.name]
            totals[home[unit]] += shares[i]
        else:
            units.setdefault(unit, []).append(i)
    parts = [list(part) for part in old.names_by_fold]
    for unit in sorted(units, key=lambda unit: (unit not in home, -len(units[unit]), unit)):
        share: NDArray[np.float64] = shares[units[unit]].sum(axis=0)
        # where the sum of squared totals grows least
        fold = home[unit] if unit in home else int(np.argmin(totals @ share))
        totals[fold] += share
        parts[fold] += [facts[i].name for i in units[unit]]
    return tuple(map(tuple, parts))


def _refuse_other_groups(old: Folds, groups: Mapping[str, str]) -> None:
    """Refuse another rule of grouping: cases that were kept together must stay so."""
    now: dict[str, str] = {}
    for name, group in old.groups.items():
        is_same = groups.get(name) and now.setdefault(group, groups[name]) == groups[name]
        if not is_same:
            raise FoldError(
                f'case {name} was of group {group} and is of {groups.get(name) or "none"} now, '
                'others of that group are not; expected the groups that the folds were made with; '
                'give the same options'
            )

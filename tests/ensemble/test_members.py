"""ensemble.members: who is clean on which image, by hand; doubles and strangers are refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest

from cellseg_mm.core.errors import ConfigError, FoldError, PredictionError
from cellseg_mm.data.folds import Folds
from cellseg_mm.ensemble.members import (
    Member,
    check_classes,
    clean_members,
    in_order,
    trained_member,
)

FOLDS = Folds((('a', 'b'), ('c',), ('d', 'e')))
NAMES = ('a', 'b', 'c', 'd', 'e')


def member(fold: int | None, *excluded: int) -> Member:
    """A member that held out ``fold`` and never saw ``excluded`` either."""
    text = f'{fold}{excluded}'
    return Member(f'{text}.pth', text, fold, FOLDS.hash, excluded_folds=excluded)


def test_an_image_has_the_members_that_held_its_fold_out() -> None:
    members = [member(0), member(1), member(2, 0)]
    found = clean_members(members, NAMES, FOLDS, leave_out_seen=True)
    # Fold 0 (a, b) was held out by the first and by the third, which excluded it.
    assert found == {'a': (0, 2), 'b': (0, 2), 'c': (1,), 'd': (2,), 'e': (2,)}


def test_a_member_that_saw_an_image_stops_where_it_may_not_be_left_out() -> None:
    both = [member(0, 1), member(1, 0)]
    assert clean_members(both, ('a', 'c'), FOLDS, leave_out_seen=False) == {
        'a': (0, 1),
        'c': (0, 1),
    }
    with pytest.raises(FoldError, match=r'1\(0,\)\.pth: has trained on image d \(fold 2 of'):
        clean_members([member(2), both[1]], ('d',), FOLDS, leave_out_seen=False)


def test_an_image_that_all_have_seen_stops_in_any_case() -> None:
    with pytest.raises(FoldError, match=r'image c: every member .*add the member of fold 1'):
        clean_members([member(0), member(2)], NAMES, FOLDS, leave_out_seen=True)
    unknown = member(None)  # of these folds, but nobody wrote which one it held out
    with pytest.raises(FoldError, match='image a: every member has trained on it'):
        clean_members([unknown], NAMES, FOLDS, leave_out_seen=True)


@pytest.mark.parametrize('fold_hash', ['', 'another'])
def test_members_of_other_folds_are_never_clean(fold_hash: str) -> None:
    stranger = replace(member(0), fold_hash=fold_hash)
    with pytest.raises(FoldError, match=f'folds {fold_hash or "unknown"}, x.json has {FOLDS.hash}'):
        clean_members([stranger], ('a',), FOLDS, leave_out_seen=True, folds_path='x.json')


def test_members_of_folds_that_were_extended_are_clean_where_they_were_and_on_new_cases() -> None:
    longer = Folds((('a', 'b', 'n'), ('c',), ('d', 'e')), added={'n': 1})
    members = [member(0), member(1)]
    found = clean_members(members, ('a', 'n', 'c'), longer, leave_out_seen=True)
    assert found == {'a': (0,), 'n': (0,), 'c': (1,)}
    with pytest.raises(FoldError, match='has trained on image n'):
        clean_members(members, ('n',), longer, leave_out_seen=False)
    moved = Folds((('a', 'n'), ('b', 'c'), ('d', 'e')), added={'n': 1})
    with pytest.raises(FoldError, match='nobody knows which of these images it saw'):
        clean_members(members, ('a',), moved, leave_out_seen=True)


def test_an_image_outside_the_folds_is_named() -> None:
    with pytest.raises(FoldError, match='image zz: is in no fold of the folds file'):
        clean_members([member(0)], ('a', 'zz'), FOLDS, leave_out_seen=True)


def test_the_order_is_that_of_the_contents() -> None:
    members = [member(2), member(0), member(1)]
    for shuffled in permutations(members):
        assert [shuffled[i].fold for i in in_order(shuffled)] == [0, 1, 2]
    with pytest.raises(PredictionError, match='no member'):
        in_order([])
    twin = replace(members[0], source='copy.pth')
    with pytest.raises(PredictionError, match=r'copy\.pth and 2\(\)\.pth have the same content'):
        in_order([*members, twin])


def test_classes_agree_in_names_and_order_where_they_are_known() -> None:
    known = replace(member(0), class_names=('round', 'long'))
    check_classes([known, member(1)], ['round', 'long'])  # one that names none is trusted
    with pytest.raises(
        PredictionError, match=r'0\(\)\.pth: its classes are round, long; the .* long, round'
    ):
        check_classes([member(1), known], ['long', 'round'])


def test_what_a_checkpoint_says_is_read_with_doubt() -> None:
    said = {'fold': 1, 'fold_hash': 'h', 'excluded_folds': [3, 4], 'class_names': ['x']}
    made = trained_member('p', 's', said, score=0.5)
    assert made == Member('p', 's', 1, 'h', (3, 4), ('x',), 0.5)
    assert made.clean_folds == {1, 3, 4}
    assert made.describe() == 'fold 1 (never saw 1, 3, 4), folds h, score 0.5000: p'
    assert trained_member('p', 's', made.to_json(), score=0.5) == replace(made, class_names=())
    nothing = trained_member('p', 's', {'fold': None, 'excluded_folds': None})
    assert nothing == Member('p', 's')
    assert nothing.clean_folds == frozenset()
    assert nothing.describe() == 'fold -, folds unknown, no score: p'
    assert trained_member('p', 's', {'fold': True}).fold is None  # no number at all


def test_members_keep_the_size_of_pixels() -> None:
    known = trained_member('a.pth', '0' * 16, {'um_per_px': [0.25, 0.5]})
    assert known.um_per_px == (0.25, 0.5)
    assert known.to_json()['um_per_px'] == [0.25, 0.5]
    assert 'um_per_px' not in trained_member('a.pth', '0' * 16, {}).to_json()
    with pytest.raises(ConfigError, match=r'a\.pth: um_per_px is 40'):
        trained_member('a.pth', '0' * 16, {'um_per_px': 40})

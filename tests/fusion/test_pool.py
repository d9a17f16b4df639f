"""fusion.pool: the same pool for any order of members and of their instances."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.fusion.pool import pool_members
from tests.support.fusion_members import HW, assert_identical, random_members, separate_cells


@pytest.mark.parametrize('with_probs', [False, True], ids=['masks', 'probs'])
@pytest.mark.parametrize('seed', range(4))
def test_order_of_members_is_irrelevant(seed: int, with_probs: bool) -> None:
    members = random_members(seed, n_members=3, with_probs=with_probs)
    wanted = pool_members(members)
    assert len(wanted) == sum(map(len, members))
    for shuffled in permutations(members):
        got = pool_members([member[::-1] for member in shuffled])
        assert_identical(got.instances, wanted.instances)
        assert got.member_of.tolist() == wanted.member_of.tolist()


def test_each_instance_knows_its_member() -> None:
    members = random_members(1, n_members=3)
    pool = pool_members(members)
    parts = [pool.take(pool.member_of == rank) for rank in range(3)]
    found = {tuple(sorted(part.instances.rles)) for part in parts}
    assert found == {tuple(sorted(member.rles)) for member in members}
    assert np.all(np.diff(pool.instances.scores) <= 0)
    assert {part.n_members for part in parts} == {3}


def test_members_without_instances_count_as_members() -> None:
    empty = InstanceSet.empty('case', 7, HW)
    assert pool_members([empty, empty]).n_members == 2
    assert len(pool_members([empty])) == 0
    pool = pool_members([empty, separate_cells(True), empty])
    assert (pool.n_members, pool.has_probs, len(set(pool.member_of.tolist()))) == (3, True, 1)


def test_probabilities_go_where_one_member_lacks_them() -> None:
    full, bare = separate_cells(True), separate_cells(False)
    assert not pool_members([full, bare]).has_probs
    small = replace(full, extra={**full.extra, 'mask_probs': full.extra['mask_probs'][:, 1:, 1:]})
    assert not pool_members([full, small]).has_probs  # of another size
    other = replace(full, extra={**full.extra, 'n_votes': np.arange(len(full))})
    assert sorted(pool_members([other]).instances.extra) == ['mask_boxes', 'mask_probs']

"""What a second model changes: paired, by hand, and nothing where nothing changed."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.scores.change import changes
from cellseg_mm.scores.records import ScoreParams
from cellseg_mm.scores.score import score

CLASSES = ('one', 'two')
PARAMS = ScoreParams(n_bootstrap=200)
HW = (20, 60)


def cells(k: int, n: int, *, start: int = 0) -> InstanceSet:
    """Image k with the cells ``start`` to ``n`` of a row of five."""
    numbers = np.arange(start, n)
    return InstanceSet.from_crops(
        f'image{k}',
        k,
        HW,
        crops=[np.ones((8, 8), dtype=bool)] * len(numbers),
        offsets_yx=np.array([[2, 12 * int(i)] for i in numbers]).reshape(-1, 2),
        class_ids=np.zeros(len(numbers), dtype=np.int64),
        scores=np.full(len(numbers), 0.9),
    )


def test_an_image_more_of_cells_found_is_a_gain_with_its_interval() -> None:
    gts = [cells(k, 5) for k in range(8)]
    before = [cells(k, 5 if k % 2 else 3) for k in range(8)]
    after = [cells(k, 5 if k % 2 else 4) for k in range(8)]
    found, unit, n = changes(gts, before, after, CLASSES, PARAMS, groups={})
    assert (unit, n) == ('images', 8)
    for change in found:
        key = {'AP50': 'segm_AP50', 'mPQ': 'mPQ'}[change.name]
        alone = [score(gts, sets, CLASSES, PARAMS).headline()[key] for sets in (before, after)]
        assert (change.before, change.after) == tuple(alone)
        low, high = change.interval
        assert low < change.after - change.before < high
        assert low >= 0  # no resample is worse: without pairing the interval would reach below
    pq = found[1]
    assert pq.before == pytest.approx(32 / 36)  # masks are whole: 2 TP / (2 TP + FN)
    assert pq.after == pytest.approx(36 / 38 * 2 / 2)
    assert pq.text().startswith('mPQ 0.889 -> 0.947 (+0.058, 95 % interval +0.0')


def test_groups_are_drawn_together_and_few_make_no_interval() -> None:
    gts = [cells(k, 5) for k in range(4)]
    groups = {f'image{k}': f'patient{k % 2}' for k in range(4)}
    found, unit, n = changes(gts, gts, gts, CLASSES, PARAMS, groups=groups)
    assert (unit, n) == ('groups', 2)
    assert [change.interval for change in found] == [None, None]
    assert found[0].text() == 'AP50 1.000 -> 1.000 (+0.000, too few images for an interval)'
    same, _, _ = changes(gts, gts, gts, CLASSES, PARAMS, groups={})
    assert [change.interval for change in same] == [(0, 0), (0, 0)]


def test_what_is_not_defined_is_null() -> None:
    nothing = [cells(k, 0) for k in range(3)]
    found, _, _ = changes(nothing, nothing, nothing, CLASSES, PARAMS, groups={})
    record = json.loads(json.dumps(found[0].to_json(), allow_nan=False))
    assert math.isnan(found[0].before)
    assert set(record.values()) == {None}

"""scores.bootstrap: intervals are reproducible and draw groups together."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.scores.bootstrap import resampled_weights, sampling_units
from cellseg_mm.scores.score import score
from cellseg_mm.scores.table import score_table
from tests.support.scored_sets import (
    NAMES,
    PARAMS,
    random_image,
    random_sets,
    to_sets,
)


def test_intervals_are_reproducible_and_hold_the_score() -> None:
    _, gts, preds = random_sets(21, n_images=12)
    params = dataclasses.replace(PARAMS, n_bootstrap=200)
    scores = score(gts, preds, NAMES, params)
    values = scores.headline()
    for name in ('segm_AP', 'segm_AP50', 'mPQ', 'F1_50', 'F1_70_detection', 'AJI', 'PQ_a'):
        low, high = scores.intervals[name]
        assert low < values[name] < high, name
    again = score(gts, preds, NAMES, params)
    assert again.intervals['segm_AP50'] == scores.intervals['segm_AP50']
    other = score(gts, preds, NAMES, dataclasses.replace(params, seed=1))
    assert other.intervals['segm_AP50'] != scores.intervals['segm_AP50']


def test_intervals_of_equal_images_have_no_width() -> None:
    image = random_image(np.random.default_rng(5), ties=False)
    gts, preds = to_sets([image] * 6)
    scores = score(gts, preds, NAMES, dataclasses.replace(PARAMS, n_bootstrap=30))
    values = scores.headline()
    for name in ('segm_AP', 'segm_AP50', 'mPQ', 'F1_50', 'AJI'):
        assert scores.intervals[name] == (
            pytest.approx(values[name], rel=1e-9),
            pytest.approx(values[name], rel=1e-9),
        )


def twins(sets: list[InstanceSet]) -> list[InstanceSet]:
    """Every image twice, the second under another id and name."""
    again = [dataclasses.replace(s, image_id=s.image_id + 1, name=f'{s.name} again') for s in sets]
    return [*sets, *again]


def test_intervals_draw_the_images_of_a_group_together() -> None:
    """Twins add nothing: drawn together they give the intervals of the images without twins."""
    _, gts, preds = random_sets(21, n_images=8, ties=False)
    params = dataclasses.replace(PARAMS, n_bootstrap=200)
    alone = score(gts, preds, NAMES, params)
    group_of = {
        name: f'patient {s.image_id:02d}' for s in gts for name in (s.name, s.name + ' again')
    }
    pairs = score(twins(gts), twins(preds), NAMES, params, groups=group_of)
    assert (pairs.interval_unit, pairs.n_interval_units) == ('groups', 8)
    assert pairs.intervals.keys() == alone.intervals.keys()
    for name, interval in alone.intervals.items():
        assert pairs.intervals[name] == pytest.approx(interval, rel=1e-9, nan_ok=True), name
    assert '200 resamples of 8 groups' in score_table(pairs)
    record = pairs.to_dict()
    assert (record['interval_unit'], record['n_interval_units']) == ('groups', 8)
    # Drawn one by one they would make the intervals narrower than the data allow.
    apart = score(twins(gts), twins(preds), NAMES, params)
    assert (apart.interval_unit, apart.n_interval_units) == ('images', 16)
    assert '200 resamples of 16 images' in score_table(apart)
    for name in ('segm_AP50', 'mPQ', 'F1_50', 'AJI'):
        assert np.ptp(apart.intervals[name]) < np.ptp(pairs.intervals[name]), name


def test_images_without_a_group_are_drawn_alone_and_order_does_not_matter() -> None:
    _, gts, preds = random_sets(23, n_images=6)
    params = dataclasses.replace(PARAMS, n_bootstrap=50)
    names = [s.name for s in gts]
    groups = {names[0]: 'p', names[4]: 'p', names[2]: 'a', 'not here': 'x'}
    first = score(gts, preds, NAMES, params, groups=groups)
    assert (first.interval_unit, first.n_interval_units) == ('groups', 5)
    turned = dict(reversed(groups.items()))
    assert score(gts[::-1], preds[::-1], NAMES, params, groups=turned).intervals == first.intervals
    unit, unit_of = sampling_units(names, groups)
    assert unit == 'groups'
    assert [np.flatnonzero(unit_of == k).tolist() for k in unit_of[[0, 2, 1, 3, 5]]] == [
        [0, 4],
        [2],
        [1],
        [3],
        [5],
    ]
    weights = resampled_weights(unit_of, 50, seed=3)
    assert (weights[:, 0] == weights[:, 4]).all()
    drawn = weights[:, [0, 1, 2, 3, 5]].sum(axis=1)
    assert (drawn == 5).all()  # as many units as there are, each time
    for nothing in ({}, {'not here': 'x'}):
        assert score(gts, preds, NAMES, params, groups=nothing).interval_unit == 'images'

"""scores.records: parameters are checked, scores are frozen."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.scores.records import Calibration, ScoreParams, Scores, as_json
from cellseg_mm.scores.score import score
from tests.support.scored_sets import (
    NAMES,
    PARAMS,
    random_sets,
)


@pytest.mark.parametrize(
    'fields',
    [
        {'cap': 0},
        {'iou_thrs': (0.5, 0.6)},
        {'f1_iou_thrs': (0.4,)},
        {'f1_iou_thrs': (0.7, 0.5)},
        {'cell_area_edges': (9.0, 4.0)},
        {'n_bootstrap': -1},
        {'n_calibration_bins': 0},
    ],
)
def test_wrong_params_are_refused(fields: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))[:4]):
        ScoreParams(**fields)


def test_scores_are_frozen() -> None:
    _, gts, preds = random_sets(51, n_images=1)
    scores = score(gts, preds, NAMES, PARAMS)
    assert isinstance(scores, Scores)
    with pytest.raises(dataclasses.FrozenInstanceError):
        scores.aji = 1.0


def test_calibration_counts_each_detection_once() -> None:
    scores, is_right = np.array([0.05, 0.0, 1.0, 0.95]), np.array([False, True, True, True])
    found = Calibration.of(scores, is_right)
    assert found.n.tolist() == [2, *[0] * 8, 2]
    assert found.share_right[0] == 0.5
    assert found.mean_score[9] == pytest.approx(0.975)
    assert np.isnan(found.share_right[5])
    assert found.brier == pytest.approx((0.05**2 + 1 + 0 + 0.05**2) / 4)
    assert found.gap == pytest.approx((0.475 + 0.025) / 2)
    again = Calibration.from_json(json.loads(json.dumps(as_json(found))))
    for one, other in zip(dataclasses.astuple(found), dataclasses.astuple(again), strict=True):
        np.testing.assert_array_equal(one, other)
    nothing = Calibration.of(np.zeros(0), np.zeros(0, bool))
    assert nothing.n.sum() == 0
    assert np.isnan(nothing.brier)

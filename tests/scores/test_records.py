"""scores.records: parameters are checked, scores are frozen."""

from __future__ import annotations

import dataclasses

import pytest

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.scores.records import ScoreParams, Scores
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

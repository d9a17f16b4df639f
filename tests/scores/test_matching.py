"""scores.matching: greedy matches equal a full loop; contested pixels by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cellseg_mm.scores.matching import greedy_matches
from cellseg_mm.scores.score import score
from tests.support.scored_sets import (
    NAMES,
    PARAMS,
    to_set,
)


@pytest.mark.parametrize('seed', range(20))
def test_greedy_matches_equal_full_loop(seed: int) -> None:
    generator = np.random.default_rng(seed)
    # Few levels provoke equal IoUs and IoUs exactly at a threshold.
    iou = generator.choice([0.0, 0.3, 0.5, 0.6, 0.75, 1.0], size=(9, 7), p=[0.5] + [0.1] * 5)
    thrs = np.array([0.5, 0.6, 0.75, 1.0])
    got = greedy_matches(iou, thrs)
    for t, thr in enumerate(thrs):
        free = set(range(7))
        for d in range(9):
            fits = [g for g in free if iou[d, g] >= min(thr, 1 - 1e-10)]
            want = max(fits, key=lambda g: (iou[d, g], g), default=-1)
            free.discard(want)
            assert got[t, d] == want


def test_contested_pixels_go_to_the_higher_score() -> None:
    masks = np.zeros((3, 5, 9), dtype=bool)
    masks[0, 0:3, 0:4] = True  # 12 px, score 0.6: loses 9 px to the next, 3 are left: dropped
    masks[1, 0:3, 1:6] = True  # 15 px, score 0.9
    masks[2, 4, 8] = True  # 1 px, uncut: stays though smaller than min_left_px
    gt = to_set(1, masks[1:], [0, 0])
    pred = to_set(1, masks, [0, 0, 0], [0.6, 0.9, 0.5])
    scores = score([gt], [pred], ('a',), PARAMS)
    assert dataclasses.astuple(scores.overlaps) == (3, 0, 1, 1)
    assert scores.mpq == 1.0
    assert scores.errors[scores.error_names.index('predicted')].sum() == 3


def test_of_two_overlapping_cells_the_better_is_matched() -> None:
    """Class maps overlap: a prediction of 10 px meets 6 px of one cell and all 8 px of another."""
    masks = np.zeros((3, 3, 12), dtype=bool)
    masks[0, 1, :6] = masks[1, 1, 1:9] = masks[2, 1, :10] = True
    gt = to_set(1, masks[:2], [0, 1])
    scores = score([gt], [to_set(1, masks[2:], [2], [0.9])], NAMES, PARAMS)
    assert scores.detected[0].tp.tolist() == [1]
    assert scores.detected[0].iou_sum[0] == pytest.approx(0.8)  # not 0.6
    assert scores.counted[0].tp.tolist() == [0, 0, 0]

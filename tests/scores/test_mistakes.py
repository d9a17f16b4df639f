"""scores.mistakes: equal to loops over pixels; everything is counted once."""

from __future__ import annotations

import numpy as np
import pytest

from cellseg_mm.scores.matching import compare
from cellseg_mm.scores.mistakes import match_in_class
from cellseg_mm.scores.score import score
from tests.support import reference_scoring as reference
from tests.support.scored_sets import (
    NAMES,
    PARAMS,
    random_sets,
    to_set,
)


@pytest.mark.parametrize('seed', range(12))
def test_mistakes_equal_dense_reference(seed: int) -> None:
    images, gts, preds = random_sets(200 + seed)
    scores = score(gts, preds, NAMES, PARAMS)
    assert scores.confusion.tolist() == reference.confusion(images, 3, PARAMS.pq_score_thr)
    want = np.zeros_like(scores.errors)

    def size_of(mask: np.ndarray) -> int:
        return sum(int(mask.sum()) >= edge for edge in PARAMS.cell_area_edges)

    row = {name: e for e, name in enumerate(scores.error_names)}
    for image in images:
        kinds, missed = reference.errors(image, PARAMS.pq_score_thr)
        for i, kind in kinds.items():
            at = image['pred_classes'][i], size_of(image['pred_masks'][i])
            want[row['predicted']][at] += 1
            want[row[kind]][at] += 1
        for g, mask in enumerate(image['gt_masks']):
            at = image['gt_classes'][g], size_of(mask)
            want[row['gt']][at] += 1
            want[row['missed']][at] += g in missed
    assert scores.errors.tolist() == want.tolist()


def test_mistakes_count_everything_once() -> None:
    _, gts, preds = random_sets(7)
    scores = score(gts, preds, NAMES, PARAMS)
    n_taking_part = sum(int((p.scores >= PARAMS.pq_score_thr).sum()) for p in preds)
    totals = dict(zip(scores.error_names, scores.errors.sum(axis=(1, 2)).tolist(), strict=True))
    kinds = ('correct', 'duplicate', 'class', 'localisation', 'both', 'background')
    assert sum(totals[kind] for kind in kinds) == totals['predicted'] == n_taking_part
    assert scores.confusion[:, :3].sum() == n_taking_part
    assert scores.confusion[:3].sum() == totals['gt'] == sum(map(len, gts))


def test_match_in_class_gives_the_score_that_found_a_cell() -> None:
    first, moved, other = np.zeros((3, 8, 30), dtype=bool)
    first[:6, :6] = moved[1:7, :6] = other[:6, 20:26] = True
    gt = to_set(1, np.array([first, other]), [0, 1])
    pred = to_set(1, np.array([first, moved, other]), [0, 0, 0], [0.4, 0.9, 0.8])
    matched, found = match_in_class(compare(gt, pred))
    assert matched.tolist() == [0, -1, -1]  # 0.9 takes the cell, 0.8 has the wrong class
    assert found.tolist() == pytest.approx([0.9, -1])

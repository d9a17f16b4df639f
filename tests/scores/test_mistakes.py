"""scores.mistakes: equal to loops over pixels; everything is counted once."""

from __future__ import annotations

import numpy as np
import pytest

from cellseg_mm.scores.score import score
from tests.support import reference_scoring as reference
from tests.support.scored_sets import (
    NAMES,
    PARAMS,
    random_sets,
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

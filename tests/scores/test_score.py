"""scores.score: equal to dense references, by hand, and unmoved by names and order."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from cellseg_mm.core.errors import PredictionError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.scores.score import score
from cellseg_mm.scores.table import score_table
from tests.support import reference_scoring as reference
from tests.support.scored_sets import (
    NAMES,
    PARAMS,
    random_sets,
    squares,
    to_set,
)


@pytest.mark.parametrize('seed', range(12))
def test_counts_equal_dense_reference(seed: int) -> None:
    images, gts, preds = random_sets(100 + seed)
    scores = score(gts, preds, NAMES, PARAMS)
    thr, left = PARAMS.pq_score_thr, PARAMS.min_left_px
    for counted, detected in zip(scores.counted, scores.detected, strict=True):
        for k in range(3):
            want = reference.tally(images, k, counted.iou_thr, thr, left)
            got = {name: getattr(counted, name)[k] for name in want}
            assert got == pytest.approx(want, rel=1e-12)
            assert counted.f1[k] == pytest.approx(reference.f1(want), rel=1e-12, nan_ok=True)
            assert counted.pq[k] == pytest.approx(reference.pq(want), rel=1e-12, nan_ok=True)
        want = reference.tally(images, None, counted.iou_thr, thr, left)
        assert detected.f1[0] == pytest.approx(reference.f1(want), rel=1e-12)
    parts = [reference.aji_parts(image, thr, left) for image in images]
    assert scores.aji == pytest.approx(sum(a for a, _ in parts) / sum(b for _, b in parts))
    np.testing.assert_allclose(scores.per_image.aji, [a / b for a, b in parts], rtol=1e-12)
    for i, image in enumerate(images):
        one = [reference.tally([image], k, 0.5, thr, left) for k in range(3)]
        pooled = {name: sum(t[name] for t in one) for name in one[0]}
        assert scores.per_image.f1_50[i] == pytest.approx(reference.f1(pooled), nan_ok=True)
        assert scores.per_image.pq[i] == pytest.approx(reference.pq(pooled), nan_ok=True)
        kept = [c for _, c in reference.disjoint(image, thr, left)]
        assert scores.per_image.pred_counts[i].tolist() == [kept.count(k) for k in range(3)]


def test_perfect_is_one_with_many_cells() -> None:
    masks = squares(150)
    gt = to_set(1, masks, [0] * 140 + [1] * 10)
    pred = dataclasses.replace(gt, scores=np.linspace(0.6, 1, 150))
    scores = score([gt], [pred], NAMES[:2], PARAMS)
    one = {
        'segm_AP', 'segm_AP50', 'segm_AP75', 'bbox_AP', 'bbox_AP50', 'mPQ', 'mSQ', 'mDQ', 'AJI',
        'F1_50', 'F1_70', 'F1_50_detection', 'F1_70_detection', 'PQ_a', 'segm_AP50_b',
    }  # fmt: skip
    assert {name: value for name, value in scores.headline().items() if name in one} == {
        name: pytest.approx(1.0, abs=1e-12) for name in one
    }
    assert scores.cap == 150
    # 100 of class a's 140 cells: recall 100 / 140 reaches 72 of COCO's 101 recall points.
    assert scores.segm_at_100.ap[0, 0] == pytest.approx(72 / 101, abs=1e-12)
    assert scores.confusion.tolist() == [[140, 0, 0], [0, 10, 0], [0, 0, 0]]


def test_empty_prediction_is_zero() -> None:
    _, gts, _ = random_sets(3)
    preds = [InstanceSet.empty(s.name, s.image_id, s.image_hw) for s in gts]
    scores = score(gts, preds, NAMES[:2], dataclasses.replace(PARAMS, n_bootstrap=20))
    values = scores.headline()
    assert math.isnan(values.pop('mSQ'))  # the mean IoU of no pairs
    assert values == dict.fromkeys(values, 0.0)
    assert scores.intervals['segm_AP50'] == (0.0, 0.0)
    assert scores.cap == 1


def test_class_without_cells_is_nan_and_not_in_means() -> None:
    masks = squares(6)
    gt = to_set(1, masks, [0, 0, 0, 1, 1, 1])
    # One false alarm of class c; classes a and b are perfect.
    pred = to_set(1, masks[[0, 1, 2, 3, 4, 5]], [0, 0, 0, 1, 1, 1], [0.9] * 6)
    false_alarm = to_set(1, squares(7)[6:, :7, :], [2], [0.9])
    both = dataclasses.replace(
        pred,
        class_ids=np.append(pred.class_ids, 2),
        scores=np.append(pred.scores, np.float32(0.9)),
        boxes_xyxy=np.concatenate([pred.boxes_xyxy, false_alarm.boxes_xyxy]),
        rles=(*pred.rles, *false_alarm.rles),
    )
    scores = score([gt], [both], NAMES, dataclasses.replace(PARAMS, n_bootstrap=10))
    values = scores.headline()
    for name in ('segm_AP_c', 'segm_AP50_c', 'PQ_c', 'F1_50_c'):
        assert math.isnan(values[name])
    assert values['segm_AP'] == values['mPQ'] == values['F1_50'] == 1.0
    assert scores.counted[0].fp.tolist() == [0, 0, 1]
    assert scores.n_undefined_classes == 1
    assert all(map(math.isnan, scores.intervals['PQ_c']))
    # The false alarm is not forgotten where classes do not matter: 6 / (6 + 1/2).
    assert values['F1_50_detection'] == pytest.approx(6 / 6.5)


def test_false_alarms_in_images_without_the_class_count() -> None:
    """MoNuSAC's script never looked at a class that an image's ground truth lacks."""
    masks = squares(4)
    gts = [to_set(1, masks[:2], [0, 0]), to_set(2, masks[:2], [1, 1])]
    preds = [to_set(1, masks, [0, 0, 1, 1]), to_set(2, masks[:2], [1, 1])]
    scores = score(gts, preds, NAMES[:2], PARAMS)
    assert scores.counted[0].fp.tolist() == [0, 2]
    assert scores.counted[0].pq.tolist() == [1.0, pytest.approx(2 / (2 + 2 / 2))]


def test_pq_by_hand() -> None:
    """Two images, class a: IoU 0.6 and 1.0 matched, 0.5 not, one false alarm, one missed.

    Image 1: ground truth 5 x 1 px, prediction 3 of them: IoU 3/5. Ground truth 4 px, prediction 2
    of them: IoU exactly 2/4, no match for PQ (> 0.5), a match for AP50 (>= 0.5).
    Image 2: a perfect cell, a prediction over nothing, a missed cell.
    TP 2, FP 2, FN 2, IoU sum 1.6: PQ = 1.6 / (2 + 1 + 1) = 0.4, SQ = 0.8, DQ = F1 = 0.5.
    """

    def bar(y: int, x: int, n: int) -> np.ndarray:
        mask = np.zeros((9, 11), dtype=bool)
        mask[y, x : x + n] = True
        return mask

    gts = [
        to_set(1, np.array([bar(0, 0, 5), bar(4, 2, 4)]), [0, 0]),
        to_set(2, np.array([bar(1, 1, 4), bar(7, 0, 3)]), [0, 0]),
    ]
    preds = [
        to_set(1, np.array([bar(0, 1, 3), bar(4, 2, 2)]), [0, 0], [0.95, 0.85]),
        to_set(2, np.array([bar(1, 1, 4), bar(3, 3, 5)]), [0, 0], [0.75, 0.65]),
    ]
    scores = score(gts, preds, ('a',), dataclasses.replace(PARAMS, min_left_px=1))
    counted = scores.counted[0]
    assert [int(v[0]) for v in (counted.tp, counted.fp, counted.fn)] == [2, 2, 2]
    assert counted.pq[0] == pytest.approx(0.4)
    assert counted.sq[0] == pytest.approx(0.8)
    assert counted.f1[0] == pytest.approx(0.5)
    assert scores.counted[1].f1[0] == pytest.approx(1 / (1 + 3 / 2 + 3 / 2))  # at 0.7 one is left
    assert scores.per_image.pq.tolist() == [pytest.approx(0.3), pytest.approx(0.5)]
    # AJI: shared 3 + 2 + 4, united 5 + 4 + 4, the missed 3 and the false alarm's 5.
    assert scores.aji == pytest.approx(9 / 21)
    # AP50: TP, TP, TP, FP of four cells: precision 1 up to recall 0.75, 76 of 101 points.
    assert scores.segm.ap50[0, 0] == pytest.approx(76 / 101)
    assert scores.calibration.n.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert scores.calibration.share_right[6:].tolist() == [0, 1, 1, 1]


def test_classes_can_be_renamed() -> None:
    _, gts, preds = random_sets(11, n_images=4)
    new_id = np.array([2, 0, 1])
    base = score(gts, preds, NAMES, PARAMS)
    moved = [
        [dataclasses.replace(s, class_ids=new_id[s.class_ids]) for s in sets]
        for sets in (gts, preds)
    ]
    other = score(*moved, ('b', 'c', 'a'), PARAMS)
    mine, theirs = base.headline(), other.headline()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert theirs[name] == pytest.approx(value, rel=1e-12, nan_ok=True), name


def test_order_of_images_is_irrelevant() -> None:
    _, gts, preds = random_sets(12, n_images=5)
    params = dataclasses.replace(PARAMS, n_bootstrap=50)
    base = score(gts, preds, NAMES, params)
    other = score(gts[::-1], [preds[i] for i in (3, 0, 4, 2, 1)], NAMES, params)
    assert other.to_dict() == base.to_dict()
    assert score_table(other) == score_table(base)


def test_json_has_null_for_nan_and_table_shows_the_cap() -> None:
    _, gts, preds = random_sets(31)
    scores = score(gts, preds, NAMES, dataclasses.replace(PARAMS, n_bootstrap=10))
    text = json.dumps(scores.to_dict(), allow_nan=False)
    record = json.loads(text)
    assert record['segm']['ap'][2][0] is None
    assert record['headline']['mPQ'] == scores.mpq
    assert record['params']['pq_score_thr'] == 0.5
    table = score_table(scores)
    assert f'segm AP50 @{scores.cap}' in table
    assert 'segm AP50 @100 (conventional)' in table
    assert '1 classes without cells' in table


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        pytest.param(lambda g, p: (g, p[1:]), r'1 images without predictions \[5\]', id='missing'),
        pytest.param(lambda g, p: (g[1:], p), 'without ground truth', id='extra'),
        pytest.param(lambda g, p: (g, [*p, p[0]]), 'there once', id='doubled'),
        pytest.param(lambda g, p: ([], []), 'no images', id='none'),
        pytest.param(
            lambda g, p: (g, [InstanceSet.empty('x', g[0].image_id, (4, 5)), *p[1:]]),
            '4 x 5 px',
            id='size',
        ),
        pytest.param(
            lambda g, p: (g, [dataclasses.replace(p[0], class_ids=p[0].class_ids + 3), *p[1:]]),
            'class ids 3 to',
            id='class',
        ),
        pytest.param(
            lambda g, p: (g, [dataclasses.replace(p[0], scores=p[0].scores * np.nan), *p[1:]]),
            'not finite',
            id='nan score',
        ),
    ],
)
def test_wrong_sets_are_refused(change, message: str) -> None:
    _, gts, preds = random_sets(41)
    with pytest.raises(PredictionError, match=message):
        score(*change(gts, preds), NAMES, PARAMS)

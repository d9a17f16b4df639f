"""Scores against pycocotools, against a dense reference, and against arithmetic on paper."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cellseg_mm.core.errors import ConfigError, PredictionError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.scores.average_precision import RECALL_POINTS, needed_tp, rank_class, weighted_ap
from cellseg_mm.scores.bootstrap import resampled_weights, sampling_units
from cellseg_mm.scores.matching import compare, greedy_matches
from cellseg_mm.scores.records import ScoreParams, Scores
from cellseg_mm.scores.score import score
from cellseg_mm.scores.table import score_table
from tests.support import reference_scoring as reference

NAMES = ('a', 'b', 'c')
# Small areas, so that every range has cells in images of a few hundred pixels.
PARAMS = ScoreParams(
    coco_area_edges=(9.0, 25.0), cell_area_edges=(6.0, 16.0), n_bootstrap=0, min_left_px=4
)


def random_image(
    generator: np.random.Generator, *, n_gt: int = 14, n_classes: int = 2, ties: bool = True
) -> dict:
    """Make one image with what breaks scorers.

    Touching and overlapping cells (overlap between classes only, as between class maps), one-pixel
    cells, moved, doubled, wrong-class and invented predictions, an empty predicted mask, ties.
    """
    h, w = int(generator.integers(17, 24)), int(generator.integers(25, 32))
    rows, columns = np.mgrid[:h, :w]

    def blob() -> np.ndarray:
        y, x = generator.uniform(0, h), generator.uniform(0, w)
        radius = generator.choice([0.6, 2.0, 3.5])
        mask = ((rows - y) ** 2 + 1.5 * (columns - x) ** 2) <= radius**2
        mask[min(int(y), h - 1), min(int(x), w - 1)] = True
        return mask

    used = np.zeros((n_classes, h, w), dtype=bool)
    gt_masks, gt_classes = [], []
    for _ in range(n_gt):
        c = int(generator.integers(n_classes))
        mask = blob() & ~used[c]
        if mask.any():
            used[c] |= mask
            gt_masks.append(mask)
            gt_classes.append(c)
    pred_masks, pred_classes = [], []
    for mask, c in zip(gt_masks, gt_classes, strict=True):
        for _ in range(int(generator.choice([0, 1, 1, 2]))):
            pred_masks.append(np.roll(mask, generator.integers(-1, 2, size=2), axis=(0, 1)))
            pred_classes.append(c if generator.random() < 0.8 else int(generator.integers(3)))
    for _ in range(4):
        pred_masks.append(blob())
        pred_classes.append(int(generator.integers(3)))
    pred_masks.append(np.zeros((h, w), dtype=bool))
    pred_classes.append(0)
    scores = generator.random(len(pred_masks))
    return {
        'gt_masks': np.array(gt_masks).reshape(-1, h, w),
        'gt_classes': gt_classes,
        'pred_masks': np.array(pred_masks),
        'pred_classes': pred_classes,
        'pred_scores': (np.round(scores, 1) if ties else scores).astype(np.float32).tolist(),
    }


def to_set(
    image_id: int, masks: np.ndarray, classes: list[int], scores: list[float] | None = None
) -> InstanceSet:
    masks = np.asarray(masks, dtype=bool)
    return InstanceSet.from_crops(
        f'case{image_id}',
        image_id,
        masks.shape[1:],
        crops=list(masks),
        offsets_yx=np.zeros((len(masks), 2), dtype=np.int64),
        class_ids=np.array(classes, dtype=np.int64),
        scores=np.ones(len(masks)) if scores is None else np.array(scores),
    )


def to_sets(images: list[dict]) -> tuple[list[InstanceSet], list[InstanceSet]]:
    gts = [to_set(5 + 3 * i, im['gt_masks'], im['gt_classes']) for i, im in enumerate(images)]
    preds = [
        to_set(5 + 3 * i, im['pred_masks'], im['pred_classes'], im['pred_scores'])
        for i, im in enumerate(images)
    ]
    return gts, preds


def random_sets(
    seed: int, n_images: int = 3, **options
) -> tuple[list[dict], list[InstanceSet], list[InstanceSet]]:
    generator = np.random.default_rng(seed)
    images = [random_image(generator, **options) for _ in range(n_images)]
    gts, preds = to_sets(images)
    # A detector's boxes are not the tight boxes of its masks.
    preds = [
        dataclasses.replace(
            p, boxes_xyxy=p.boxes_xyxy + generator.uniform([0, 0, 0.1, 0.1], 1, (len(p), 4))
        )
        for p in preds
    ]
    return images, gts, preds


def coco_precision(
    gts: list[InstanceSet], preds: list[InstanceSet], kind: str, caps: list[int]
) -> np.ndarray:
    """Precision by pycocotools with our area ranges, (T, R, K, A, M), NaN where undefined."""
    coco = {}
    for key, sets in (('gt', gts), ('pred', preds)):
        rows = []
        for s in sets:
            for i, counts in enumerate(s.rles):
                x1, y1, x2, y2 = s.boxes_xyxy[i].astype(float).tolist()
                box_area = (x2 - x1) * (y2 - y1)
                use_box = key == 'pred' and kind == 'bbox'
                rows.append(
                    {
                        'id': len(rows) + 1,
                        'image_id': s.image_id,
                        'category_id': int(s.class_ids[i]) + 1,
                        'segmentation': {'size': list(s.image_hw), 'counts': counts},
                        'bbox': [x1, y1, x2 - x1, y2 - y1],
                        'area': box_area if use_box else float(s.areas[i]),
                        'iscrowd': 0,
                        'score': float(s.scores[i]),
                    }
                )
        coco[key] = COCO()
        coco[key].dataset = {
            'images': [
                {'id': s.image_id, 'height': s.image_hw[0], 'width': s.image_hw[1]} for s in gts
            ],
            'categories': [{'id': k + 1} for k in range(len(NAMES))],
            'annotations': rows,
        }
    with contextlib.redirect_stdout(io.StringIO()):
        for one in coco.values():
            one.createIndex()
        evaluator = COCOeval(coco['gt'], coco['pred'], kind)
        evaluator.params.maxDets = caps
        evaluator.params.areaRng = [[low, high] for _, low, high in PARAMS.area_ranges]
        evaluator.params.areaRngLbl = [name for name, _, _ in PARAMS.area_ranges]
        evaluator.evaluate()
        evaluator.accumulate()
    precision = evaluator.eval['precision']
    return np.where(precision < 0, np.nan, precision)


@pytest.mark.parametrize('cap', [None, 2, 7])
@pytest.mark.parametrize('seed', range(6))
def test_ap_equals_pycocotools(seed: int, cap: int | None) -> None:
    _, gts, preds = random_sets(seed)
    scores = score(gts, preds, NAMES, dataclasses.replace(PARAMS, cap=cap))
    assert scores.cap == (cap or max(map(len, preds)))
    for kind, table, at_100 in (
        ('segm', scores.segm, scores.segm_at_100),
        ('bbox', scores.bbox, scores.bbox_at_100),
    ):
        precision = coco_precision(gts, preds, kind, [scores.cap, 100])
        for m, mine in enumerate((table, at_100)):
            want = precision[..., m]  # (T, R, K, A)
            np.testing.assert_allclose(mine.ap, want.mean(axis=(0, 1)), rtol=0, atol=1e-10)
            np.testing.assert_allclose(mine.ap50, want[0].mean(axis=0), rtol=0, atol=1e-10)
            np.testing.assert_allclose(mine.ap75, want[5].mean(axis=0), rtol=0, atol=1e-10)
            np.testing.assert_allclose(mine.curve50, want[0, :, :, 0].T, rtol=0, atol=1e-10)
    # Class c has no cells: undefined everywhere, and not part of a mean.
    assert np.isnan(scores.segm.ap[2]).all()
    assert scores.segm.mean('ap')[0] == pytest.approx(scores.segm.ap[:2, 0].mean(), abs=1e-12)


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


def squares(n: int, *, size: int = 4, per_row: int = 16) -> np.ndarray:
    """(n, H, W) touching squares, all different."""
    image_hw = (size * math.ceil(n / per_row) + 3, size * per_row + 5)
    masks = np.zeros((n, *image_hw), dtype=bool)
    for i in range(n):
        y, x = size * (i // per_row), size * (i % per_row)
        masks[i, y : y + size, x : x + size] = True
    return masks


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
    assert scores.calibration.share_tp[6:].tolist() == [0, 1, 1, 1]


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


@pytest.mark.parametrize('seed', range(4))
def test_weighted_ap_equals_pycocotools_on_repeated_images(seed: int) -> None:
    _, gts, preds = random_sets(300 + seed, n_images=4, ties=False)
    weights = np.array([[1, 1, 1, 1], [2, 0, 1, 3], [0, 0, 4, 0]])
    images = [compare(g, p) for g, p in zip(gts, preds, strict=True)]
    cap = max(map(len, preds))
    for row in weights:
        copies = [[], []]
        for i, n in enumerate(row.tolist()):
            for j in range(n):
                for out, source in zip(copies, (gts, preds), strict=True):
                    out.append(dataclasses.replace(source[i], image_id=100 * i + j))
        want = coco_precision(*copies, 'segm', [cap])[:, :, :, 0, 0].mean(axis=1)  # (T, K)
        for k in range(3):
            ranked = rank_class(images, k, np.array(PARAMS.iou_thrs), cap=cap)
            got = weighted_ap(ranked, row[None])[0]
            np.testing.assert_allclose(got, want[:, k], rtol=0, atol=1e-10)


def test_needed_true_positives_round_like_coco() -> None:
    """ceil(r * n) misses the first c with c / n >= r on either side in a thousandth of cases."""
    for n_positive in range(1, 600):
        recalls = np.arange(n_positive + 1) / n_positive
        want = np.searchsorted(recalls, RECALL_POINTS, side='left')
        assert needed_tp(n_positive).tolist() == want.tolist()


@pytest.mark.parametrize('cap', [1, 3, 50])
def test_weighted_ap_of_ones_is_the_table(cap: int) -> None:
    _, gts, preds = random_sets(310, n_images=5)
    table = score(gts, preds, NAMES, dataclasses.replace(PARAMS, cap=cap)).segm
    images = [compare(g, p) for g, p in zip(gts, preds, strict=True)]
    for k in range(3):
        ranked = rank_class(images, k, np.array(PARAMS.iou_thrs), cap=cap)
        got = weighted_ap(ranked, np.ones((1, 5), dtype=np.int64))[0]
        np.testing.assert_allclose(got.mean(), table.ap[k, 0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(got[0], table.ap50[k, 0], rtol=0, atol=1e-12)


def test_of_two_overlapping_cells_the_better_is_matched() -> None:
    """Class maps overlap: a prediction of 10 px meets 6 px of one cell and all 8 px of another."""
    masks = np.zeros((3, 3, 12), dtype=bool)
    masks[0, 1, :6] = masks[1, 1, 1:9] = masks[2, 1, :10] = True
    gt = to_set(1, masks[:2], [0, 1])
    scores = score([gt], [to_set(1, masks[2:], [2], [0.9])], NAMES, PARAMS)
    assert scores.detected[0].tp.tolist() == [1]
    assert scores.detected[0].iou_sum[0] == pytest.approx(0.8)  # not 0.6
    assert scores.counted[0].tp.tolist() == [0, 0, 0]


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

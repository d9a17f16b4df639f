"""scores.average_precision: equal to pycocotools, weighted or not."""

from __future__ import annotations

import contextlib
import dataclasses
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.scores.average_precision import RECALL_POINTS, needed_tp, rank_class, weighted_ap
from cellseg_mm.scores.matching import compare
from cellseg_mm.scores.score import score
from tests.support.scored_sets import (
    NAMES,
    PARAMS,
    random_sets,
)


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

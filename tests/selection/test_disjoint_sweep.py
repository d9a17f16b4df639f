"""The sweep counts what post-processing and scoring count, at any thresholds."""

from __future__ import annotations

import numpy as np
import pytest

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.fusion.fuse import PostProcess, postprocess
from cellseg_mm.scores.records import ScoreParams
from cellseg_mm.scores.score import score
from cellseg_mm.selection.disjoint_sweep import make_scene

HW = (47, 61)
CLASSES = ('a', 'b', 'c')


def random_set(
    rng: np.random.Generator, image_id: int, n: int, *, is_gt: bool = False
) -> InstanceSet:
    """Overlapping blobs; scores in tenths, so that ties occur; some masks one pixel, some holed."""
    crops, offsets = [], []
    for _ in range(n):
        h, w = rng.integers(1, 14, size=2)
        crop = rng.random((h, w)) < 0.85
        crop[rng.integers(h), rng.integers(w)] = True
        crops.append(crop)
        offsets.append((rng.integers(0, HW[0] - h + 1), rng.integers(0, HW[1] - w + 1)))
    # the third class never occurs in the ground truth
    class_ids = rng.integers(0, 2 if is_gt else 3, size=n)
    scores = np.ones(n) if is_gt else rng.integers(0, 11, size=n) / 10
    return InstanceSet.from_crops(
        f'image{image_id}',
        image_id,
        HW,
        crops=crops,
        offsets_yx=np.array(offsets).reshape(-1, 2),
        class_ids=class_ids,
        scores=scores.astype(np.float32),
    )


def near(rng: np.random.Generator, gt: InstanceSet, extra: InstanceSet) -> InstanceSet:
    """Predictions: the ground truth shifted by up to a pixel, some twice, and false alarms."""
    crops, offsets = gt.crops()
    picked = rng.integers(0, len(gt), size=len(gt) + 3) if len(gt) else np.empty(0, np.int64)
    moved = np.clip(
        offsets[picked] + rng.integers(-1, 2, size=(len(picked), 2)),
        0,
        np.array([np.array(HW) - crops[i].shape for i in picked]).reshape(-1, 2),
    )
    shifted = InstanceSet.from_crops(
        gt.name,
        gt.image_id,
        HW,
        crops=[crops[i] for i in picked],
        offsets_yx=moved,
        class_ids=np.where(rng.random(len(picked)) < 0.8, gt.class_ids[picked], 2),
        scores=(rng.integers(0, 11, size=len(picked)) / 10).astype(np.float32),
    )
    from cellseg_mm.core.instances import concatenate

    return concatenate([shifted, extra])


@pytest.mark.parametrize('seed', range(20))
def test_tally_equals_postprocess_and_score(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gts = [random_set(rng, i, int(rng.integers(0, 12)), is_gt=True) for i in range(4)]
    preds = [near(rng, gt, random_set(rng, gt.image_id, int(rng.integers(0, 9)))) for gt in gts]
    scene = make_scene(gts, preds, len(CLASSES), floor=0.1)
    for _ in range(6):
        thrs = tuple((rng.integers(1, 11, size=3) / 10).tolist())
        min_area = int(rng.choice([0, 1, 5, 30, 80]))
        tally = scene.tally(thrs, min_area)
        post = PostProcess(score_thr=thrs, disjoint=True, min_area_px=min_area)
        done = [postprocess(pred, post)[0] for pred in preds]
        params = ScoreParams(n_bootstrap=0, pq_score_thr=0.0, min_left_px=0)
        wanted = score(gts, done, CLASSES, params).counted[0]
        assert tally.tp.sum(axis=0).tolist() == wanted.tp.tolist()
        assert (tally.n_pred - tally.tp).sum(axis=0).tolist() == wanted.fp.tolist()
        assert (tally.n_gt - tally.tp).sum(axis=0).tolist() == wanted.fn.tolist()
        np.testing.assert_allclose(tally.iou_sum.sum(axis=0), wanted.iou_sum, rtol=1e-12)
        weights = np.ones((1, 4), dtype=np.int64)
        np.testing.assert_allclose(tally.pq(weights)[0], wanted.pq, rtol=1e-12)


def test_images_without_anything_count_nothing() -> None:
    empty = [InstanceSet.empty('a', 1, HW), InstanceSet.empty('b', 2, HW)]
    tally = make_scene(empty, empty, 2).tally((0.5, 0.5), 0)
    assert tally.tp.tolist() == tally.n_pred.tolist() == tally.n_gt.tolist() == [[0, 0], [0, 0]]
    assert np.isnan(tally.pq(np.ones((1, 2)))).all()


def test_a_better_detection_that_falls_gives_its_pixels_back() -> None:
    # Both lie on the one cell; the better one is of the wrong class and covers all of the other.
    cell = {'crops': [np.ones((8, 8), bool)], 'offsets_yx': np.array([[3, 3]])}
    gt = InstanceSet.from_crops('a', 1, HW, **cell, class_ids=np.array([1]), scores=np.ones(1))
    pred = InstanceSet.from_crops(
        'a',
        1,
        HW,
        crops=[np.ones((8, 8), bool)] * 2,
        offsets_yx=np.array([[3, 3], [3, 3]]),
        class_ids=np.array([0, 1]),
        scores=np.array([0.6, 0.5]),
    )
    scene = make_scene([gt], [pred], 2)
    assert scene.tally((0.55, 0.5), 0).tp.tolist() == [[0, 0]]
    assert scene.tally((0.65, 0.5), 0).tp.tolist() == [[0, 1]]

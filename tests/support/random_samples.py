"""Random images with truth and predictions to choose settings on."""

from __future__ import annotations

import numpy as np

from cellseg_mm.core.instances import InstanceSet, concatenate
from cellseg_mm.fusion.settings import DEFAULT_FUSION
from cellseg_mm.scores.records import ScoreParams
from cellseg_mm.selection.objectives import Samples

HW = (47, 61)


CLASSES = ('a', 'b', 'c')


PLAIN = (None, DEFAULT_FUSION)


QUICK = ScoreParams(n_bootstrap=0, pq_score_thr=0.0, min_left_px=0)


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
    return concatenate([shifted, extra])


def random_samples(seed: int, n_images: int = 6, n_folds: int = 3) -> Samples:
    rng = np.random.default_rng(seed)
    gts = [random_set(rng, i, int(rng.integers(3, 12)), is_gt=True) for i in range(n_images)]
    preds = [near(rng, gt, random_set(rng, gt.image_id, int(rng.integers(0, 9)))) for gt in gts]
    return Samples(tuple(gts), {PLAIN: tuple(preds)}, np.arange(n_images) % n_folds, CLASSES)

"""Random images with ground truth and predictions that provoke ties, touching and empty cells."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.scores.records import ScoreParams

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


def squares(n: int, *, size: int = 4, per_row: int = 16) -> np.ndarray:
    """(n, H, W) touching squares, all different."""
    image_hw = (size * math.ceil(n / per_row) + 3, size * per_row + 5)
    masks = np.zeros((n, *image_hw), dtype=bool)
    for i in range(n):
        y, x = size * (i // per_row), size * (i % per_row)
        masks[i, y : y + size, x : x + size] = True
    return masks

"""Compares the ground truth and the predictions of one image, once, for every score.

In: two InstanceSets of one image. Out: IoU tables, matches and counts, which ``score`` pools.
Invariant: nothing after this stage looks at a mask again, so resampling images costs only sums.

Two views of the predictions are compared. AP, the confusion matrix and the error breakdown see the
detections as they are, overlaps included. PQ, AJI and F1 see disjoint masks (see :func:`flatten`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from cellseg_mm.core import rle
from cellseg_mm.core.arrays import Float, Int, ranges_of
from cellseg_mm.core.instances import InstanceSet

# COCO's matching treats a threshold of 1 as just below 1 (pycocotools cocoeval.evaluateImg).
LARGEST_THR = 1 - 1e-10


@dataclass(frozen=True, slots=True)
class Compared:
    """One image's two sets and their IoU; D predictions, G ground truth instances.

    Attributes:
        gt: Ground truth.
        pred: Predictions by falling score; equal scores keep their order.
        gt_areas: (G,) int64 mask px.
        pred_areas: (D,) int64 mask px.
        mask_iou: (D, G) float64.
        box_iou: (D, G) float64.
    """

    gt: InstanceSet
    pred: InstanceSet
    gt_areas: Int
    pred_areas: Int
    mask_iou: Float
    box_iou: Float


def compare(gt: InstanceSet, pred: InstanceSet) -> Compared:
    """Compute the IoU of all pairs of one image."""
    pred = pred.by_score()
    return Compared(
        gt=gt,
        pred=pred,
        gt_areas=gt.areas,
        pred_areas=pred.areas,
        mask_iou=rle.iou_matrix(pred.rles, gt.rles, gt.image_hw),
        box_iou=box_iou_matrix(pred.boxes_xyxy, gt.boxes_xyxy),
    )


def box_iou_matrix(first: NDArray[np.float32], second: NDArray[np.float32]) -> Float:
    """Return the IoU of (N, 4) and (M, 4) xyxy boxes, (N, M) float64, as COCO computes it."""
    if not len(first) or not len(second):
        return np.zeros((len(first), len(second)))
    table = coco_mask.iou(boxes_xywh(first), boxes_xywh(second), [0] * len(second))
    return np.nan_to_num(np.asarray(table).reshape(len(first), len(second)))


def boxes_xywh(boxes_xyxy: NDArray[np.float32]) -> Float:
    """Return corner boxes as left, top, width, height, (N, 4) float64."""
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def greedy_matches(iou: Float, iou_thrs: Float) -> Int:
    """Match detections to instances as COCO does: by falling score, each to its best free instance.

    A pair counts at IoU >= threshold. Of instances with equal IoU the last one is taken.

    Args:
        iou: (D, G), rows by falling score, nothing to ignore.
        iou_thrs: (T,) thresholds in 0..1.

    Returns:
        (T, D) int64: index of the matched instance, or -1.

    Source: pycocotools ``cocoeval.evaluateImg`` without crowd and ignored instances.
    """
    thrs = np.minimum(np.asarray(iou_thrs, dtype=np.float64), LARGEST_THR)
    matched = np.full((len(thrs), iou.shape[0]), -1, dtype=np.int64)
    rows, columns = np.nonzero(iou >= thrs.min())
    values = iou[rows, columns]
    # Most cells have one candidate that no other detection wants: no order to respect there.
    alone = (np.bincount(rows, minlength=iou.shape[0])[rows] == 1) & (
        np.bincount(columns, minlength=iou.shape[1])[columns] == 1
    )
    matched[:, rows[alone]] = np.where(values[alone] >= thrs[:, None], columns[alone], -1)
    contested = list(
        zip(rows[~alone].tolist(), columns[~alone].tolist(), values[~alone].tolist(), strict=True)
    )
    for t, thr in enumerate(thrs.tolist()):
        for row, column in _greedy_loop(contested, thr).items():
            matched[t, row] = column
    return matched


def _greedy_loop(pairs: list[tuple[int, int, float]], thr: float) -> dict[int, int]:
    """Match (row, column, IoU) pairs that are sorted by row, then column."""
    best: dict[int, tuple[int, float]] = {}
    taken: set[int] = set()
    current = -1
    for row, column, value in pairs:
        if row != current and current in best:
            taken.add(best[current][0])
        current = row
        if value < thr or column in taken:
            continue
        if row not in best or value >= best[row][1]:
            best[row] = (column, value)
    return {row: column for row, (column, _) in best.items()}


@dataclass(frozen=True, slots=True)
class Flat:
    """Disjoint predictions of one image and where they meet the ground truth.

    Attributes:
        class_ids: (P,) int64 of the predictions that are left.
        areas: (P,) int64 px that are left of each.
        pair_gt: (M,) int64, ground truth index of each overlapping pair.
        pair_pred: (M,) int64, prediction index in ``class_ids``.
        pair_px: (M,) int64, shared px, > 0.
        pair_iou: (M,) float64.
        n_below: Predictions under the score threshold.
        n_cut: Predictions that lost pixels to a higher score, those dropped included.
        n_dropped: Predictions without pixels, and cut ones with too few left.
    """

    class_ids: Int
    areas: Int
    pair_gt: Int
    pair_pred: Int
    pair_px: Int
    pair_iou: Float
    n_below: int
    n_cut: int
    n_dropped: int


def flatten(compared: Compared, *, score_thr: float, min_left_px: int) -> Flat:
    """Make the predictions disjoint, and intersect them with the ground truth.

    Predictions with score >= ``score_thr`` are painted so that a contested pixel goes to the higher
    score. A prediction that lost pixels and has fewer than ``min_left_px`` left is dropped; its
    pixels become background. A prediction that lost nothing stays, however small.
    """
    chosen = np.flatnonzero(compared.pred.scores >= score_thr)
    kept, uncut = compared.pred[chosen], compared.pred_areas[chosen]
    label_map = kept.to_label_map().ravel(order='F')  # column-major like RLE
    left = np.bincount(label_map, minlength=len(kept) + 1)[1:].astype(np.int64)
    cut = left < uncut
    stays = (left > 0) & (~cut | (left >= min_left_px))
    new_index = np.cumsum(stays) - 1
    gt_of, pred_of, px = _shared_pixels(compared.gt, label_map, len(kept))
    good = stays[pred_of]
    gt_of, pred_of, px = gt_of[good], new_index[pred_of[good]], px[good]
    areas = left[stays]
    return Flat(
        class_ids=kept.class_ids[stays],
        areas=areas,
        pair_gt=gt_of,
        pair_pred=pred_of,
        pair_px=px,
        pair_iou=px / (compared.gt_areas[gt_of] + areas[pred_of] - px),
        n_below=len(compared.pred) - len(kept),
        n_cut=int(cut.sum()),
        n_dropped=int((~stays).sum()),
    )


def _shared_pixels(
    gt: InstanceSet, label_map: NDArray[np.int32], n_labels: int
) -> tuple[Int, Int, Int]:
    """Return ground truth index, label index (from 0) and shared px of all overlapping pairs."""
    runs = rle.decode_runs(gt.rles, gt.image_hw)
    lengths = runs.ends - runs.starts
    pixels = np.repeat(runs.starts, lengths) + ranges_of(lengths)
    labels = label_map[pixels].astype(np.int64)
    keys = np.repeat(runs.owner, lengths) * (n_labels + 1) + labels
    keys, px = np.unique(keys[labels > 0], return_counts=True)
    gt_of, label = np.divmod(keys, n_labels + 1)
    return gt_of, label - 1, px.astype(np.int64)


def unique_matches(flat: Flat, usable: NDArray[np.bool_], iou_thr: float) -> Int:
    """Return the indices of the pairs that match at IoU > ``iou_thr`` >= 0.5.

    Among disjoint masks such a pair is the only one for both of its members. Ground truth of
    different classes may overlap; then the pair with the larger IoU wins (ties: earlier pair).

    Args:
        flat: The overlapping pairs.
        usable: (M,) bool, pairs that may match, for example those of equal class.
        iou_thr: Exclusive threshold.
    """
    candidates = np.flatnonzero(usable & (flat.pair_iou > iou_thr))
    order = candidates[np.argsort(-flat.pair_iou[candidates], kind='stable')]
    used_gt: set[int] = set()
    used_pred: set[int] = set()
    chosen = []
    for pair, gt, pred in zip(
        order.tolist(), flat.pair_gt[order].tolist(), flat.pair_pred[order].tolist(), strict=True
    ):
        if gt not in used_gt and pred not in used_pred:
            used_gt.add(gt)
            used_pred.add(pred)
            chosen.append(pair)
    return np.array(sorted(chosen), dtype=np.int64)


def jaccard_sums(flat: Flat, gt_areas: Int) -> tuple[int, int]:
    """Return the intersection and the union of the aggregated Jaccard index, in px.

    Each instance takes the prediction with the largest IoU (a prediction may be taken again);
    instances without overlap and predictions never taken add their area to the union.

    Source: N. Kumar et al., IEEE TMI 36(7), 2017, algorithm 1.
    """
    # By instance, then falling IoU, then prediction: the first of each instance is its choice.
    order = np.lexsort((flat.pair_pred, -flat.pair_iou, flat.pair_gt))
    gt_found, first = np.unique(flat.pair_gt[order], return_index=True)
    best = order[first]
    shared = int(flat.pair_px[best].sum())
    taken = np.zeros(len(flat.areas), dtype=bool)
    taken[flat.pair_pred[best]] = True
    missed = np.ones(len(gt_areas), dtype=bool)
    missed[gt_found] = False
    union = int((gt_areas[gt_found] + flat.areas[flat.pair_pred[best]]).sum()) - shared
    return shared, union + int(gt_areas[missed].sum()) + int(flat.areas[~taken].sum())

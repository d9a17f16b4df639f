"""COCO average precision at the true cap, and again under image weights for the bootstrap.

In: compared images (``matching.Compared``). Out: AP tables per class, area range and cap.
Invariant: every number of one table has the same cap; the table says which.

The tables come from faster-coco-eval, which is given our IoU so that each pair is compared once.
Its ``stats`` are not used: like pycocotools' they pin the headline AP to 100 detections while the
next columns follow ``maxDets``; we read the precision array.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval.core.coco import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster
from numpy.typing import NDArray

from cellseg_mm.core.arrays import Float, Int
from cellseg_mm.scores.matching import Compared, boxes_xywh, greedy_matches

Annotation = dict[str, Any]  # of COCO

_LOGGER = logging.getLogger(__name__)

RECALL_POINTS = np.linspace(0.0, 1.0, 101)  # COCO's
CONVENTIONAL_CAP = 100


@dataclass(frozen=True, slots=True)
class ApTable:
    """AP of one kind of IoU at one cap; K classes, A area ranges (the first is all areas).

    Attributes:
        kind: ``segm`` or ``bbox``.
        cap: Detections per class and image that count, highest scores first.
        area_names: A names.
        ap: (K, A) float64, mean over the IoU thresholds; NaN where the class has no instance.
        ap50: (K, A) float64.
        ap75: (K, A) float64.
        recall: (K, A) float64, largest recall, mean over the IoU thresholds (COCO's AR).
        curve50: (K, 101) float64, interpolated precision at ``RECALL_POINTS``, IoU 0.5, all areas.
        curve50_scores: (K, 101) float64, score at which each recall is reached; 0 if it is not.
    """

    kind: str
    cap: int
    area_names: tuple[str, ...]
    ap: Float
    ap50: Float
    ap75: Float
    recall: Float
    curve50: Float
    curve50_scores: Float

    def mean(self, name: str) -> Float:
        """Return (A,) the mean of ``ap``, ``ap50``, ``ap75`` or ``recall`` over defined classes."""
        return mean_defined(getattr(self, name))


def mean_defined(values: Float) -> Float:
    """Return the mean over axis 0 without NaN; NaN where nothing is defined."""
    defined = ~np.isnan(values)
    n = defined.sum(axis=0)
    total = np.where(defined, values, 0.0).sum(axis=0)
    mean: Float = np.divide(total, n, out=np.full(np.shape(total), np.nan), where=n > 0)
    return mean


class _SharedIouEval(COCOeval_faster):  # type: ignore[misc]  # it has no annotations
    """The evaluator with IoU tables that are already there."""

    tables: dict[tuple[int, int], Float]
    n_asked: int = 0

    def computeIoU(self, imgId: int, catId: int) -> Float:
        self.n_asked += 1
        return self.tables[imgId, catId]


def ap_tables(
    images: Sequence[Compared],
    n_classes: int,
    *,
    kind: str,
    caps: Sequence[int],
    iou_thrs: Float,
    area_ranges: Sequence[tuple[str, float, float]],
) -> list[ApTable]:
    """Return one table per cap.

    An instance or an unmatched detection outside an area range (both ends inside) is ignored, as
    in COCO. The area of an instance is its mask's for both kinds; the area of a detection is its
    mask's for ``segm`` and its box's for ``bbox``, as in COCO.

    Args:
        images: Sorted by image id: of equal scores the smaller image id comes first.
        n_classes: K.
        kind: ``segm`` or ``bbox``.
        caps: Different positive integers.
        iou_thrs: (T,) float64 with 0.5 and 0.75 among them.
        area_ranges: Name, smallest and largest area in px; the first must be all areas.
    """
    evaluator = _evaluator(images, n_classes, kind=kind)
    evaluator.params.iouThrs = np.asarray(iou_thrs)
    evaluator.params.recThrs = RECALL_POINTS
    evaluator.params.maxDets = sorted(caps)
    evaluator.params.areaRng = [[low, high] for _, low, high in area_ranges]
    evaluator.params.areaRngLbl = [name for name, _, _ in area_ranges]
    evaluator.tables = _iou_tables(images, n_classes, kind=kind, cap=max(caps))
    evaluator.evaluate()
    if not evaluator.n_asked and any(table.size for table in evaluator.tables.values()):
        raise RuntimeError('this faster-coco-eval does not call computeIoU; 1.8.0 does')
    evaluator.accumulate()
    shape = (len(iou_thrs), 101, n_classes, len(area_ranges), len(caps))
    result: dict[str, Float] = {
        name: np.asarray(evaluator.eval[name], dtype=np.float64).reshape(shape)
        for name in ('precision', 'scores')
    }
    recall = np.asarray(evaluator.eval['recall'], dtype=np.float64)
    result['recall'] = recall.reshape(shape[:1] + shape[2:])
    names = tuple(name for name, _, _ in area_ranges)
    at = {cap: i for i, cap in enumerate(sorted(caps))}
    return [_table(result, at[cap], kind, cap, names, np.asarray(iou_thrs)) for cap in caps]


def _table(
    result: dict[str, Float], m: int, kind: str, cap: int, names: tuple[str, ...], iou_thrs: Float
) -> ApTable:
    precision = result['precision'][..., m]  # (T, 101, K, A)
    precision = np.where(precision < 0, np.nan, precision)
    recall = np.where(result['recall'][..., m] < 0, np.nan, result['recall'][..., m])
    at_thr = precision.mean(axis=1)  # (T, K, A)
    i50, i75 = (int(np.argmin(np.abs(iou_thrs - thr))) for thr in (0.5, 0.75))
    return ApTable(
        kind=kind,
        cap=cap,
        area_names=names,
        ap=precision.mean(axis=(0, 1)),
        ap50=at_thr[i50],
        ap75=at_thr[i75],
        recall=recall.mean(axis=0),
        curve50=precision[i50, :, :, 0].T,
        curve50_scores=np.maximum(result['scores'][i50, :, :, 0, m].T, 0.0),
    )


def _evaluator(images: Sequence[Compared], n_classes: int, *, kind: str) -> _SharedIouEval:
    frames = [{'id': c.gt.image_id, 'height': 1, 'width': 1} for c in images]
    categories = [{'id': k, 'name': str(k)} for k in range(1, n_classes + 1)]
    gt_rows: list[Annotation] = []
    pred_rows: list[Annotation] = []
    for c in images:
        gt_rows += _rows(c.gt.image_id, c.gt.class_ids, c.gt_areas, np.ones(len(c.gt)), gt_rows)
        boxes = boxes_xywh(c.pred.boxes_xyxy)
        areas = c.pred_areas if kind == 'segm' else boxes[:, 2] * boxes[:, 3]
        scores = c.pred.scores.astype(np.float64)
        pred_rows += _rows(c.gt.image_id, c.pred.class_ids, areas, scores, pred_rows)
    datasets = []
    for rows in (gt_rows, pred_rows):
        coco = COCO()
        coco.dataset = {'images': frames, 'annotations': rows, 'categories': categories}
        coco.createIndex()
        datasets.append(coco)
    # Always 'bbox': with 'segm' it would decode the masks that our tables make unnecessary.
    return _SharedIouEval(
        *datasets, iouType='bbox', separate_eval=True, print_function=_LOGGER.debug
    )


def _rows(
    image_id: int, class_ids: Int, areas: Int | Float, scores: Float, before: list[Annotation]
) -> list[Annotation]:
    """Return COCO annotations with ids from 1; 0 would read as unmatched."""
    values = zip(class_ids.tolist(), areas.tolist(), scores.tolist(), strict=True)
    return [
        {
            'id': len(before) + 1 + i,
            'image_id': image_id,
            'category_id': class_id + 1,
            'area': float(area),
            'score': score,
            'bbox': [0.0, 0.0, 0.0, 0.0],  # never read, see _SharedIouEval
            'iscrowd': 0,
        }
        for i, (class_id, area, score) in enumerate(values)
    ]


def _iou_tables(
    images: Sequence[Compared], n_classes: int, *, kind: str, cap: int
) -> dict[tuple[int, int], Float]:
    tables = {}
    for c in images:
        iou = c.mask_iou if kind == 'segm' else c.box_iou
        for k in range(n_classes):
            rows = np.flatnonzero(c.pred.class_ids == k)[:cap]
            tables[c.gt.image_id, k + 1] = iou[np.ix_(rows, np.flatnonzero(c.gt.class_ids == k))]
    return tables


@dataclass(frozen=True, slots=True)
class RankedClass:
    """All detections of one class in the order of the PR curve, with what each image adds.

    Attributes:
        image_index: (D,) int64, image of each detection.
        scores: (D,) float32, falling.
        is_tp: (T, D) bool per IoU threshold.
        n_gt: (I,) int64 instances of the class per image.
    """

    image_index: Int
    scores: NDArray[np.float32]
    is_tp: NDArray[np.bool_]
    n_gt: Int


def rank_class(
    images: Sequence[Compared], class_id: int, iou_thrs: Float, *, cap: int
) -> RankedClass:
    """Match one class in every image by mask IoU (COCO's rule) and sort all by score."""
    image_index, scores, is_tp, n_gt = [], [], [], []
    for i, c in enumerate(images):
        rows = np.flatnonzero(c.pred.class_ids == class_id)[:cap]
        columns = np.flatnonzero(c.gt.class_ids == class_id)
        is_tp.append(greedy_matches(c.mask_iou[np.ix_(rows, columns)], iou_thrs) >= 0)
        image_index.append(np.full(len(rows), i, dtype=np.int64))
        scores.append(c.pred.scores[rows])
        n_gt.append(len(columns))
    all_scores = np.concatenate(scores)
    order = np.argsort(-all_scores, kind='stable')
    return RankedClass(
        np.concatenate(image_index)[order],
        all_scores[order],
        np.concatenate(is_tp, axis=1)[:, order],
        np.array(n_gt, dtype=np.int64),
    )


def weighted_ap(ranked: RankedClass, weights: NDArray[np.int64]) -> Float:
    """Return AP per IoU threshold when image i is there ``weights[b, i]`` times.

    Weights of one give exactly the AP of all images, without matching anything again: matches
    are made inside an image, so an image's contribution does not depend on the others.

    Args:
        ranked: One class.
        weights: (B, I) int64.

    Returns:
        (B, T) float64; NaN where no instance of the class is drawn.
    """
    result = np.full((len(weights), len(ranked.is_tp)), np.nan)
    tp_at = [np.flatnonzero(row) for row in ranked.is_tp]
    tp_image = [ranked.image_index[at] for at in tp_at]
    n_positive = weights @ ranked.n_gt
    for b in np.flatnonzero(n_positive > 0).tolist():
        n_seen = np.cumsum(weights[b][ranked.image_index])
        needed = needed_tp(int(n_positive[b]))
        for t, at in enumerate(tp_at):
            # Precision is highest and recall rises only at true positives: others can be left out.
            n_tp = np.cumsum(weights[b][tp_image[t]])
            result[b, t] = _interpolated(n_tp, n_seen[at], needed)
    return result


def needed_tp(n_positive: int) -> Int:
    """Return (101,) int64: fewest true positives that reach each of COCO's recall points."""
    needed: Float = np.ceil(RECALL_POINTS * n_positive)
    # Rounding must fall as it does when COCO compares n / n_positive with the point.
    needed -= (needed - 1) / n_positive >= RECALL_POINTS
    needed += needed / n_positive < RECALL_POINTS
    return needed.astype(np.int64)


def _interpolated(n_tp: Int, n_seen: Int, needed: Int) -> float:
    """Return the mean over recall points of the best precision from there on."""
    at = np.searchsorted(n_tp, needed, side='left')
    at = at[at < len(n_tp)]
    if not len(at):
        return 0.0
    precision = n_tp / (n_seen + np.spacing(1))
    best = np.maximum.reduceat(precision, at)  # from each point to the next
    return float(np.maximum.accumulate(best[::-1]).sum() / len(RECALL_POINTS))

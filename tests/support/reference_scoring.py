"""Scores by dense masks and loops: slow, obvious, and without anything of ours.

An image is a dict: ``gt_masks`` (G, H, W) bool, ``gt_classes`` list, ``pred_masks`` (D, H, W) bool,
``pred_classes`` list, ``pred_scores`` list.
"""

from __future__ import annotations

import math

import numpy as np


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 0.0


def by_score(image: dict) -> list[int]:
    """Indices of predictions by falling score, ties in order."""
    return sorted(range(len(image['pred_scores'])), key=lambda i: (-image['pred_scores'][i], i))


def disjoint(image: dict, score_thr: float, min_left_px: int) -> list[tuple[np.ndarray, int]]:
    """Remaining mask and class of each prediction that stays."""
    free = np.ones(image['gt_masks'].shape[1:], dtype=bool)
    kept = []
    for i in by_score(image):
        if image['pred_scores'][i] < score_thr:
            continue
        mask = image['pred_masks'][i] & free
        free &= ~image['pred_masks'][i]
        was_cut = mask.sum() < image['pred_masks'][i].sum()
        if mask.sum() == 0 or (was_cut and mask.sum() < min_left_px):
            continue
        kept.append((mask, image['pred_classes'][i]))
    return kept


def pair_up(
    gts: list[np.ndarray], preds: list[np.ndarray], iou_thr: float
) -> list[tuple[int, int, float]]:
    """Pairs with IoU above the threshold, best first, each member once."""
    pairs = []
    for g, gt in enumerate(gts):
        for p, pred in enumerate(preds):
            iou = mask_iou(gt, pred)
            if iou > iou_thr:
                pairs.append((-iou, g, p))
    found = []
    for minus_iou, g, p in sorted(pairs):
        if all(g != other and p != another for other, another, _ in found):
            found.append((g, p, -minus_iou))
    return found


def tally(
    images: list[dict], class_id: int | None, iou_thr: float, score_thr: float, min_left_px: int
) -> dict[str, float]:
    """TP, FP, FN and IoU sum over all images; ``class_id`` None = any class matches any."""
    total = {'tp': 0, 'fp': 0, 'fn': 0, 'iou_sum': 0.0}
    for image in images:
        kept = disjoint(image, score_thr, min_left_px)
        gts = [
            m
            for m, c in zip(image['gt_masks'], image['gt_classes'], strict=True)
            if class_id in (None, c)
        ]
        preds = [m for m, c in kept if class_id in (None, c)]
        pairs = pair_up(gts, preds, iou_thr)
        total['tp'] += len(pairs)
        total['fp'] += len(preds) - len(pairs)
        total['fn'] += len(gts) - len(pairs)
        total['iou_sum'] += sum(iou for _, _, iou in pairs)
    return total


def f1(t: dict[str, float]) -> float:
    if t['tp'] + t['fn'] == 0:
        return math.nan
    return t['tp'] / (t['tp'] + t['fp'] / 2 + t['fn'] / 2)


def pq(t: dict[str, float]) -> float:
    if t['tp'] + t['fn'] == 0:
        return math.nan
    return t['iou_sum'] / (t['tp'] + t['fp'] / 2 + t['fn'] / 2)


def aji_parts(image: dict, score_thr: float, min_left_px: int) -> tuple[int, int]:
    """Kumar's sums: shared and united pixels."""
    preds = [m for m, _ in disjoint(image, score_thr, min_left_px)]
    shared = united = 0
    used = set()
    for gt in image['gt_masks']:
        best, best_iou = None, 0.0
        for p, pred in enumerate(preds):
            if mask_iou(gt, pred) > best_iou:
                best, best_iou = p, mask_iou(gt, pred)
        if best is None:
            united += int(gt.sum())
            continue
        used.add(best)
        shared += int((gt & preds[best]).sum())
        united += int((gt | preds[best]).sum())
    united += sum(int(pred.sum()) for p, pred in enumerate(preds) if p not in used)
    return shared, united


def coco_match(
    image: dict, order: list[int], allowed: list[list[bool]], iou_thr: float
) -> dict[int, int]:
    """Prediction -> instance: by falling score, best free instance, the last among equals."""
    taken: dict[int, int] = {}
    for i in order:
        best, best_iou = None, iou_thr
        for g in range(len(image['gt_masks'])):
            iou = mask_iou(image['pred_masks'][i], image['gt_masks'][g])
            if allowed[i][g] and g not in taken.values() and iou >= best_iou:
                best, best_iou = g, iou
        if best is not None:
            taken[i] = best
    return taken


def confusion(images: list[dict], n_classes: int, score_thr: float) -> list[list[int]]:
    table = [[0] * (n_classes + 1) for _ in range(n_classes + 1)]
    for image in images:
        order = [i for i in by_score(image) if image['pred_scores'][i] >= score_thr]
        n_gt = len(image['gt_masks'])
        matches = coco_match(image, order, [[True] * n_gt] * len(image['pred_masks']), 0.5)
        for i in order:
            row = image['gt_classes'][matches[i]] if i in matches else n_classes
            table[row][image['pred_classes'][i]] += 1
        for g in range(n_gt):
            if g not in matches.values():
                table[image['gt_classes'][g]][n_classes] += 1
    return table


def errors(image: dict, score_thr: float) -> tuple[dict[int, str], list[int]]:
    """Kind of each prediction from the threshold on, and the instances that are missed."""
    order = [i for i in by_score(image) if image['pred_scores'][i] >= score_thr]
    n_gt = len(image['gt_masks'])
    same = [[image['gt_classes'][g] == c for g in range(n_gt)] for c in image['pred_classes']]
    matches = coco_match(image, order, same, 0.5)
    kinds, excused = {}, set(matches.values())
    for i in order:
        ious = [mask_iou(image['pred_masks'][i], gt) for gt in image['gt_masks']]
        best = {}
        for is_same in (True, False):
            chosen = [g for g in range(n_gt) if same[i][g] == is_same]
            best[is_same] = max(chosen, key=lambda g: (ious[g], -g), default=None)
        same_iou = 0.0 if best[True] is None else ious[best[True]]
        other_iou = 0.0 if best[False] is None else ious[best[False]]
        if i in matches:
            kinds[i] = 'correct'
        elif same_iou >= 0.5:
            kinds[i] = 'duplicate'
        elif other_iou >= 0.5:
            kinds[i] = 'class'
            excused.add(best[False])
        elif same_iou >= 0.1:
            kinds[i] = 'localisation'
            excused.add(best[True])
        elif other_iou >= 0.1:
            kinds[i] = 'both'
        else:
            kinds[i] = 'background'
    return kinds, [g for g in range(n_gt) if g not in excused]

"""Which mistakes a set of predictions makes: the confusion matrix and the error breakdown.

In: one compared image. Out: counts that add up over images.
Both look at the detections as they are (overlaps included) from a score threshold on.
Invariant: every such detection and every instance is counted exactly once in each of the two.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.arrays import Float, Int
from cellseg_mm.scores.matching import Compared, greedy_matches

# "gt" and "missed" count instances, the others predictions; "correct" to "background" add up to
# "predicted".
ERROR_NAMES = (
    'gt',
    'predicted',
    'correct',
    'duplicate',
    'class',
    'localisation',
    'both',
    'background',
    'missed',
)
FOREGROUND_IOU = 0.5
BACKGROUND_IOU = 0.1


def match_in_class(compared: Compared) -> tuple[Int, Float]:
    """Match within classes at IoU 0.5 by falling score.

    Leaving out the detections below any threshold changes no other match: one pass serves every
    position of the viewer's slider.

    Returns:
        (D,) int64 matched instance of each detection or -1, and (G,) float64 score of the detection
        that found each instance, or -1.
    """
    same = compared.pred.class_ids[:, None] == compared.gt.class_ids[None, :]
    iou = np.where(same, compared.mask_iou, 0.0)
    matched = greedy_matches(iou, np.array([FOREGROUND_IOU]))[0]
    found = np.full(len(compared.gt), -1.0)
    rows = np.flatnonzero(matched >= 0)
    found[matched[rows]] = compared.pred.scores[rows]
    return matched, found


def confusion_of(compared: Compared, n_classes: int, *, score_thr: float) -> Int:
    """Return (K + 1, K + 1) int64 counts: row = true class, column = predicted class.

    Detections take instances of any class at mask IoU >= 0.5, highest score first. The last row is
    background (detections without instance, duplicates among them), the last column is missed.
    """
    rows = np.flatnonzero(compared.pred.scores >= score_thr)
    matched = greedy_matches(compared.mask_iou[rows], np.array([FOREGROUND_IOU]))[0]
    table = np.zeros((n_classes + 1, n_classes + 1), dtype=np.int64)
    gt_classes = np.append(compared.gt.class_ids, n_classes)  # index -1 = background
    np.add.at(table, (gt_classes[matched], compared.pred.class_ids[rows]), 1)
    missed = np.ones(len(compared.gt), dtype=bool)
    missed[matched[matched >= 0]] = False
    np.add.at(table, (compared.gt.class_ids[missed], n_classes), 1)
    return table


def errors_of(
    compared: Compared,
    n_classes: int,
    *,
    score_thr: float,
    area_edges: tuple[float, ...],
) -> Int:
    """Return (E, K, S) int64 counts per error of ``ERROR_NAMES``, class and size.

    A detection that COCO's matching at IoU 0.5 leaves without instance is, in this order:
    *duplicate* (an instance of its class has IoU >= 0.5, taken by a higher score), *class* (one of
    another class has), *localisation* (one of its class has 0.1 <= IoU < 0.5), *both* (one of
    another class has), or *background*. An instance is *missed* when no detection is matched to it
    and it is not the best instance of a class or localisation error. Predictions are counted under
    their own class and area, instances under theirs.

    Args:
        compared: One image.
        n_classes: K.
        score_thr: Detections below do not take part.
        area_edges: S - 1 rising areas in px; size s holds edges[s - 1] <= area < edges[s].

    Source: the error types of D. Bolya et al., TIDE, ECCV 2020 (foreground 0.5, background 0.1).
    TIDE looks for localisation before class; in dense images a neighbour of the same class often
    touches by 0.1, so we prefer the instance with IoU >= 0.5.
    """
    rows = np.flatnonzero(compared.pred.scores >= score_thr)
    iou = compared.mask_iou[rows]
    same = compared.pred.class_ids[rows][:, None] == compared.gt.class_ids[None, :]
    iou_same, iou_other = np.where(same, iou, 0.0), np.where(same, 0.0, iou)
    matched = greedy_matches(iou_same, np.array([FOREGROUND_IOU]))[0]
    kind, target = _kinds(iou_same, iou_other, matched)
    unseen = np.ones(len(compared.gt), dtype=bool)
    unseen[matched[matched >= 0]] = False
    unseen[target[target >= 0]] = False
    counts = np.zeros((len(ERROR_NAMES), n_classes, len(area_edges) + 1), dtype=np.int64)
    edges = np.asarray(area_edges, dtype=np.float64)
    pred_at = (
        compared.pred.class_ids[rows],
        np.searchsorted(edges, compared.pred_areas[rows], side='right'),
    )
    gt_at = (
        compared.gt.class_ids,
        np.searchsorted(edges, compared.gt_areas, side='right'),
    )
    np.add.at(counts[ERROR_NAMES.index('gt')], gt_at, 1)
    np.add.at(counts[ERROR_NAMES.index('missed')], gt_at, unseen.astype(np.int64))
    np.add.at(counts[ERROR_NAMES.index('predicted')], pred_at, 1)
    np.add.at(counts, (kind, *pred_at), 1)
    return counts


def _kinds(
    iou_same: NDArray[np.float64], iou_other: NDArray[np.float64], matched: Int
) -> tuple[Int, Int]:
    """Return the index of each detection's error, and the instance it hides from *missed* or -1."""
    n = len(matched)
    best_same = iou_same.max(axis=1, initial=0.0)
    best_other = iou_other.max(axis=1, initial=0.0)
    tests = {
        'correct': matched >= 0,
        'duplicate': best_same >= FOREGROUND_IOU,
        'class': best_other >= FOREGROUND_IOU,
        'localisation': best_same >= BACKGROUND_IOU,
        'both': best_other >= BACKGROUND_IOU,
        'background': np.ones(n, dtype=bool),
    }
    kind = np.select(list(tests.values()), [ERROR_NAMES.index(name) for name in tests])
    target = np.full(n, -1, dtype=np.int64)
    for name, table in (('class', iou_other), ('localisation', iou_same)):
        chosen = np.flatnonzero(kind == ERROR_NAMES.index(name))
        if len(chosen):
            target[chosen] = table[chosen].argmax(axis=1)
    return kind.astype(np.int64), target

"""What ``score`` is told and what it answers.

In and out: records. Invariant: validated when made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellseg_mm.core.arrays import Float, Int
from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.scores.average_precision import (
    ApTable,
    mean_defined,
)
from cellseg_mm.scores.mistakes import ERROR_NAMES

RATES = ('f1', 'precision', 'recall', 'sq', 'pq')  # of Counted, written beside its numbers

LARGEST_AREA = 1e5**2  # COCO's "all" ends there

# Names that people know from CocoMetric, for ``save_best`` and curves; the others keep theirs.
COCO_NAMES = {
    f'{kind}_{ours}': f'{kind}_{theirs}'
    for kind in ('segm', 'bbox')
    for ours, theirs in (('AP', 'mAP'), ('AP50', 'mAP_50'), ('AP75', 'mAP_75'))
}


@dataclass(frozen=True, slots=True)
class ScoreParams:
    """Settings of :func:`score`; the defaults define the project's scores.

    Attributes:
        iou_thrs: Thresholds whose mean is AP; 0.5 and 0.75 must be among them.
        cap: Detections per class and image that AP counts; None = the largest number of detections
            of one image, so that AP leaves none out.
        pq_score_thr: Predictions below take no part in PQ, AJI, F1, the confusion matrix, the error
            breakdown and counts. AP needs no threshold.
        min_left_px: A prediction that lost pixels to a higher score is dropped with fewer left.
        f1_iou_thrs: F1's thresholds, each >= 0.5 so that matches are unique; first 0.5.
        coco_area_edges: Areas in px between small, medium and large.
        cell_area_edges: The same for cells: at 40x a third of MoNuSAC's cells is below 16^2 px (all
            but a few of them lymphocytes), an eighth is above 24^2 px (epithelium, macrophages).
        n_bootstrap: Resamples of the images, or of their groups, for 95 % intervals; 0 = none.
        seed: Of the resampling.
        n_calibration_bins: Equal score bins between 0 and 1.
    """

    iou_thrs: tuple[float, ...] = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
    cap: int | None = None
    pq_score_thr: float = 0.5
    min_left_px: int = 10
    f1_iou_thrs: tuple[float, ...] = (0.5, 0.7)
    coco_area_edges: tuple[float, float] = (32.0**2, 96.0**2)
    cell_area_edges: tuple[float, float] = (16.0**2, 24.0**2)
    n_bootstrap: int = 1000
    seed: int = 0
    n_calibration_bins: int = 10

    def __post_init__(self) -> None:
        problems = {
            'iou_thrs must hold 0.5 and 0.75, all in (0, 1]': (
                not {0.5, 0.75} <= set(self.iou_thrs) or not all(0 < t <= 1 for t in self.iou_thrs)
            ),
            'cap must be None or at least 1': self.cap is not None and self.cap < 1,
            'f1_iou_thrs must begin with 0.5, all in [0.5, 1)': (
                self.f1_iou_thrs[:1] != (0.5,) or not all(0.5 <= t < 1 for t in self.f1_iou_thrs)
            ),
            'area edges must rise': any(
                not 0 < low < high < LARGEST_AREA
                for low, high in (self.coco_area_edges, self.cell_area_edges)
            ),
            'n_bootstrap must not be negative': self.n_bootstrap < 0,
            'n_calibration_bins must be at least 1': self.n_calibration_bins < 1,
        }
        for problem, is_there in problems.items():
            if is_there:
                raise ConfigError(f'ScoreParams: {self}; {problem}; change that setting')

    @property
    def area_ranges(self) -> tuple[tuple[str, float, float], ...]:
        """Name, smallest and largest area of all ranges that AP is reported for."""
        ranges = [('all', 0.0, LARGEST_AREA)]
        for prefix, (low, high) in (('', self.coco_area_edges), ('cell_', self.cell_area_edges)):
            ranges += [
                (f'{prefix}small', 0.0, low),
                (f'{prefix}medium', low, high),
                (f'{prefix}large', high, LARGEST_AREA),
            ]
        return tuple(ranges)


@dataclass(frozen=True, slots=True)
class Counted:
    """Matches at IoU > a threshold, pooled over all images; the last axis is the class.

    Attributes:
        iou_thr: Exclusive.
        tp: (K,) int64 pairs.
        fp: (K,) int64 predictions without partner.
        fn: (K,) int64 instances without partner.
        iou_sum: (K,) float64 over the pairs.
    """

    iou_thr: float
    tp: Int
    fp: Int
    fn: Int
    iou_sum: Float

    @property
    def f1(self) -> Float:
        """TP / (TP + FP / 2 + FN / 2), which PQ calls detection quality (DQ)."""
        return ratio(self.tp, self.tp + 0.5 * self.fp + 0.5 * self.fn, self.tp + self.fn)

    @property
    def precision(self) -> Float:
        """TP / (TP + FP); NaN without predictions."""
        return ratio(self.tp, self.tp + self.fp, self.tp + self.fp)

    @property
    def recall(self) -> Float:
        """TP / (TP + FN); NaN without instances."""
        return ratio(self.tp, self.tp + self.fn, self.tp + self.fn)

    @property
    def sq(self) -> Float:
        """Segmentation quality: mean IoU of the pairs; NaN without pairs."""
        return ratio(self.iou_sum, self.tp, self.tp)

    @property
    def pq(self) -> Float:
        """Panoptic quality SQ * DQ; 0 when instances are there but no pair."""
        return ratio(self.iou_sum, self.tp + 0.5 * self.fp + 0.5 * self.fn, self.tp + self.fn)


def ratio(top: ArrayLike, bottom: ArrayLike, evidence: ArrayLike) -> Float:
    """Divide; NaN where ``evidence`` is 0."""
    top, bottom = np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)
    undefined: Float = np.full(top.shape, np.nan)
    quotient: Float = np.divide(top, bottom, out=undefined, where=np.asarray(evidence) > 0)
    return quotient


@dataclass(frozen=True, slots=True)
class PerImage:
    """What each of I images contributes, sorted by image id.

    Attributes:
        names: I case names.
        image_ids: (I,) int64.
        f1_50: (I,) float64, class-aware, the image's classes pooled; NaN without instances.
        pq: (I,) float64, the same pooling.
        aji: (I,) float64; NaN with neither instances nor predictions.
        gt_counts: (I, K) int64.
        pred_counts: (I, K) int64 disjoint predictions from the score threshold on.
        n_detections: (I,) int64 as given.
    """

    names: tuple[str, ...]
    image_ids: Int
    f1_50: Float
    pq: Float
    aji: Float
    gt_counts: Int
    pred_counts: Int
    n_detections: Int


@dataclass(frozen=True, slots=True)
class Calibration:
    """How often detections of a score are right (COCO's matching, mask IoU 0.5, equal class).

    Attributes:
        edges: (B + 1,) float64; bin b holds edges[b] <= score < edges[b + 1], the last its end too.
        n: (B,) int64 detections.
        mean_score: (B,) float64; NaN in an empty bin.
        share_right: (B,) float64; NaN in an empty bin.
        brier: Mean squared distance between score and being right; NaN without detections.
    """

    edges: Float
    n: Int
    mean_score: Float
    share_right: Float
    brier: float

    @classmethod
    def of(cls, scores: Float, is_right: NDArray[np.bool_], n_bins: int = 10) -> Calibration:
        """Count (D,) detections in equal bins of the score."""
        bins = np.clip(np.floor(scores * n_bins), 0, n_bins - 1).astype(np.int64)
        n = np.bincount(bins, minlength=n_bins)
        return cls(
            edges=np.linspace(0.0, 1.0, n_bins + 1, dtype=np.float64),
            n=n,
            mean_score=ratio(np.bincount(bins, weights=scores, minlength=n_bins), n, n),
            share_right=ratio(np.bincount(bins, weights=is_right, minlength=n_bins), n, n),
            brier=float(((scores - is_right) ** 2).mean()) if len(scores) else math.nan,
        )

    @property
    def gap(self) -> float:
        """Mean distance between score and share right, weighted by detections."""
        away = np.abs(self.mean_score - self.share_right) * self.n
        return float(np.nansum(away) / max(1, self.n.sum()))

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Calibration:
        """Read what :func:`as_json` made of one."""
        n = np.array(record['n'], dtype=np.int64)
        return cls(
            edges=np.linspace(0.0, 1.0, len(n) + 1, dtype=np.float64),
            n=n,
            mean_score=np.array(record['mean_score'], dtype=np.float64),
            share_right=np.array(record['share_right'], dtype=np.float64),
            brier=float(record['brier']),
        )


@dataclass(frozen=True, slots=True)
class Overlaps:
    """What making the predictions disjoint did, summed over images.

    Attributes:
        n_detections: As given.
        n_below_score: Under ``pq_score_thr``.
        n_cut: Lost pixels to a higher score.
        n_dropped: Dropped: nothing left, or cut and fewer than ``min_left_px`` left.
    """

    n_detections: int
    n_below_score: int
    n_cut: int
    n_dropped: int


@dataclass(frozen=True, slots=True)
class Scores:
    """All scores of one set of images; K classes, I images.

    Attributes:
        class_names: K names.
        params: The settings.
        cap: AP's cap in ``segm`` and ``bbox``.
        segm: Mask AP at the cap.
        bbox: Box AP at the cap.
        segm_at_100: Mask AP at the conventional cap.
        bbox_at_100: Box AP at the conventional cap.
        counted: One per ``params.f1_iou_thrs``, class-aware.
        detected: One per ``params.f1_iou_thrs``, any class matches any, (1,) arrays.
        aji: Pooled over images, whatever the class.
        aji_image_mean: Mean of the images' own AJI.
        confusion: (K + 1, K + 1) int64, row = true class, last row background, last column missed.
        errors: (E, K, S) int64, see ``mistakes.errors_of``; S = small, medium, large cells.
        error_names: E names.
        per_image: Contributions of each image.
        calibration: Scores against the share of true positives.
        overlaps: What the disjoint view left out.
        intervals: Name of a score to its 95 % bootstrap interval (low, high).
        interval_unit: What was drawn for them: ``images``, or ``groups`` of images (patients).
        n_interval_units: How many of these there are.
    """

    class_names: tuple[str, ...]
    params: ScoreParams
    cap: int
    segm: ApTable
    bbox: ApTable
    segm_at_100: ApTable
    bbox_at_100: ApTable
    counted: tuple[Counted, ...]
    detected: tuple[Counted, ...]
    aji: float
    aji_image_mean: float
    confusion: Int
    errors: Int
    per_image: PerImage
    calibration: Calibration
    overlaps: Overlaps
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    interval_unit: str = 'images'
    n_interval_units: int = 0
    error_names: tuple[str, ...] = ERROR_NAMES

    @property
    def mpq(self) -> float:
        """mPQ+ (CoNIC): PQ pooled over images, per class, then the mean over defined classes."""
        return float(mean_defined(self.counted[0].pq))

    @property
    def n_undefined_classes(self) -> int:
        """Classes without any instance: NaN, and left out of every mean over classes."""
        return int((self.per_image.gt_counts.sum(axis=0) == 0).sum())

    @property
    def n_undefined_images(self) -> int:
        """Images without any instance: their own F1 and PQ are NaN."""
        return int((self.per_image.gt_counts.sum(axis=1) == 0).sum())

    def headline(self) -> dict[str, float]:
        """Return the scores that are logged and compared, by name; NaN where undefined."""
        names = {'ap': 'AP', 'ap50': 'AP50', 'ap75': 'AP75'}
        values: dict[str, float] = {}
        for table in (self.segm, self.bbox):
            values |= {f'{table.kind}_{n}': float(table.mean(a)[0]) for a, n in names.items()}
        values['mPQ'] = self.mpq
        values['mSQ'] = float(mean_defined(self.counted[0].sq))
        values['mDQ'] = float(mean_defined(self.counted[0].f1))
        values['AJI'] = self.aji
        for classes, any_class in zip(self.counted, self.detected, strict=True):
            percent = round(100 * classes.iou_thr)
            values[f'F1_{percent}'] = float(mean_defined(classes.f1))
            values[f'F1_{percent}_detection'] = float(any_class.f1[0])
        for k, name in enumerate(self.class_names):
            values[f'segm_AP_{name}'] = float(self.segm.ap[k, 0])
            values[f'segm_AP50_{name}'] = float(self.segm.ap50[k, 0])
            values[f'PQ_{name}'] = float(self.counted[0].pq[k])
            values[f'F1_50_{name}'] = float(self.counted[0].f1[k])
        return values

    def to_dict(self) -> dict[str, JsonValue]:
        """Return everything as JSON values; NaN becomes null."""
        record = _fields(self)
        for key, counts in (('counted', self.counted), ('detected', self.detected)):
            record[key] = [
                _fields(row) | {rate: as_json(getattr(row, rate)) for rate in RATES}
                for row in counts
            ]
        record['headline'] = as_json(self.headline())
        record['n_undefined_classes'] = self.n_undefined_classes
        record['n_undefined_images'] = self.n_undefined_images
        return record


def _fields(record: Scores | Counted) -> dict[str, JsonValue]:
    return {name: as_json(value) for name, value in dataclasses.asdict(record).items()}


def as_json(value: object) -> JsonValue:
    """Return arrays as lists, records as dicts; NaN becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, np.ndarray):
        return as_json(value.tolist())
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f'{type(value).__name__} is no JSON value')

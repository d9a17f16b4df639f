"""The only definition of every score: validation, out-of-fold pooling, ensembles and the report.

In: ground truth and predictions as InstanceSets, one per image. Out: :class:`Scores`.
``docs/scores.md`` has each definition in a paragraph. Invariant: a score that is not defined (no
instance of a class) is NaN, is left out of means and is counted; it is never 0 or 1.

``matching`` compares one image, ``average_precision`` makes AP, ``mistakes`` the confusion matrix
and the error breakdown; this module pools, resamples and prints.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import ConfigError, PredictionError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.scores.average_precision import (
    CONVENTIONAL_CAP,
    ApTable,
    RankedClass,
    ap_tables,
    mean_defined,
    rank_class,
    weighted_ap,
)
from cellseg_mm.scores.matching import (
    Compared,
    Flat,
    compare,
    flatten,
    jaccard_sums,
    unique_matches,
)
from cellseg_mm.scores.mistakes import ERROR_NAMES, confusion_of, errors_of

Int = NDArray[np.int64]
Float = NDArray[np.float64]

LARGEST_AREA = 1e5**2  # COCO's "all" ends there


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
        return _ratio(self.tp, self.tp + 0.5 * self.fp + 0.5 * self.fn, self.tp + self.fn)

    @property
    def precision(self) -> Float:
        """TP / (TP + FP); NaN without predictions."""
        return _ratio(self.tp, self.tp + self.fp, self.tp + self.fp)

    @property
    def recall(self) -> Float:
        """TP / (TP + FN); NaN without instances."""
        return _ratio(self.tp, self.tp + self.fn, self.tp + self.fn)

    @property
    def sq(self) -> Float:
        """Segmentation quality: mean IoU of the pairs; NaN without pairs."""
        return _ratio(self.iou_sum, self.tp, self.tp)

    @property
    def pq(self) -> Float:
        """Panoptic quality SQ * DQ; 0 when instances are there but no pair."""
        return _ratio(self.iou_sum, self.tp + 0.5 * self.fp + 0.5 * self.fn, self.tp + self.fn)


def _ratio(top: NDArray, bottom: NDArray, evidence: NDArray) -> Float:
    """Divide; NaN where ``evidence`` is 0."""
    top, bottom = np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=np.asarray(evidence) > 0)


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
        share_tp: (B,) float64; NaN in an empty bin.
    """

    edges: Float
    n: Int
    mean_score: Float
    share_tp: Float


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
        record = _json(dataclasses.asdict(self))
        for key, counts in (('counted', self.counted), ('detected', self.detected)):
            for row, entry in zip(counts, record[key], strict=True):
                entry |= {
                    name: _json(getattr(row, name))
                    for name in ('f1', 'precision', 'recall', 'sq', 'pq')
                }
        record['headline'] = _json(self.headline())
        record['n_undefined_classes'] = self.n_undefined_classes
        record['n_undefined_images'] = self.n_undefined_images
        return record

    def table(self) -> str:
        """Return the scores as a compact text table, the same for the same scores."""
        from cellseg_mm.scores.table import score_table

        return score_table(self)


def _json(value: object) -> JsonValue:
    if isinstance(value, np.ndarray):
        return _json(value.tolist())
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def score(
    gt_sets: Sequence[InstanceSet],
    pred_sets: Sequence[InstanceSet],
    class_names: Sequence[str],
    params: ScoreParams | None = None,
    *,
    groups: Mapping[str, str] | None = None,
) -> Scores:
    """Score predictions against ground truth.

    Args:
        gt_sets: One set per image, each image id once, any order.
        pred_sets: One set per image with the same image ids; may be empty sets.
        class_names: K names in order of ``class_id``.
        params: Settings; None = the defaults.
        groups: Group (patient, slide) by image name, as in ``Folds.groups``; images without one
            stand alone. Intervals resample groups where any is known, else images.

    Returns:
        All scores, independent of the order of the images.

    Raises:
        PredictionError: Images are missing, doubled, or of another size in one of the two, or a
            class id or score is out of range.
    """
    params = params or ScoreParams()
    pairs = _paired(gt_sets, pred_sets, n_classes=len(class_names))
    images = [compare(gt, pred) for gt, pred in pairs]
    flats = [
        flatten(c, score_thr=params.pq_score_thr, min_left_px=params.min_left_px) for c in images
    ]
    return _pooled(images, flats, tuple(class_names), params, groups or {})


def _paired(
    gt_sets: Sequence[InstanceSet], pred_sets: Sequence[InstanceSet], *, n_classes: int
) -> list[tuple[InstanceSet, InstanceSet]]:
    """Return (gt, pred) sorted by image id, checked."""
    gt_of, pred_of = {s.image_id: s for s in gt_sets}, {s.image_id: s for s in pred_sets}
    where = 'score'
    if not gt_sets:
        raise PredictionError(f'{where}: no images; expected at least one; give ground truth')
    for name, sets, by_id in (
        ('ground truth', gt_sets, gt_of),
        ('predictions', pred_sets, pred_of),
    ):
        if len(sets) != len(by_id):
            raise PredictionError(
                f'{where}: {name} has {len(sets)} sets of {len(by_id)} different image ids; '
                'each image must be there once; remove the doubled ones'
            )
    missing, extra = sorted(gt_of.keys() - pred_of.keys()), sorted(pred_of.keys() - gt_of.keys())
    if missing or extra:
        raise PredictionError(
            f'{where}: {len(missing)} images without predictions {missing[:5]} and {len(extra)} '
            f'predicted images without ground truth {extra[:5]}; both must have the same image '
            'ids; an image in which nothing was found needs an empty set'
        )
    pairs = [(gt_of[image_id], pred_of[image_id]) for image_id in sorted(gt_of)]
    for gt, pred in pairs:
        _check_pair(gt, pred, n_classes)
    return pairs


def _check_pair(gt: InstanceSet, pred: InstanceSet, n_classes: int) -> None:
    if gt.image_hw != pred.image_hw:
        raise PredictionError(
            f'{gt.name}: predictions are for {pred.image_hw[0]} x {pred.image_hw[1]} px, ground '
            f'truth for {gt.image_hw[0]} x {gt.image_hw[1]}; they must agree; predict again'
        )
    for name, one in (('ground truth', gt), ('prediction', pred)):
        if len(one) and (one.class_ids.min() < 0 or one.class_ids.max() >= n_classes):
            raise PredictionError(
                f'{one.name}: {name} has class ids {one.class_ids.min()} to {one.class_ids.max()}; '
                f'{n_classes} class names were given; give the classes that were trained'
            )
    if not np.isfinite(pred.scores).all():
        raise PredictionError(f'{pred.name}: a score is not finite; expected 0 to 1; predict again')


def _pooled(
    images: list[Compared],
    flats: list[Flat],
    class_names: tuple[str, ...],
    params: ScoreParams,
    groups: Mapping[str, str],
) -> Scores:
    n_classes = len(class_names)
    thrs = np.array(params.iou_thrs)
    n_detections = np.array([len(c.pred) for c in images], dtype=np.int64)
    cap = params.cap or max(1, int(n_detections.max()))
    tables = {
        kind: _tables(images, n_classes, kind=kind, cap=cap, params=params)
        for kind in ('segm', 'bbox')
    }
    ranked = [rank_class(images, k, thrs, cap=cap) for k in range(n_classes)]
    tallies = Tallies.of(images, flats, n_classes, params.f1_iou_thrs)
    unit, unit_of = sampling_units([c.gt.name for c in images], groups)
    aji = _ratio(tallies.aji_shared, tallies.aji_union, tallies.aji_union)
    return Scores(
        class_names=class_names,
        params=params,
        cap=cap,
        segm=tables['segm'][cap],
        bbox=tables['bbox'][cap],
        segm_at_100=tables['segm'][CONVENTIONAL_CAP],
        bbox_at_100=tables['bbox'][CONVENTIONAL_CAP],
        counted=tallies.counted(params.f1_iou_thrs),
        detected=tallies.detected(params.f1_iou_thrs),
        aji=float(_ratio(*[np.sum(v) for v in (tallies.aji_shared, *[tallies.aji_union] * 2)])),
        aji_image_mean=float(mean_defined(aji)),
        confusion=sum(confusion_of(c, n_classes, score_thr=params.pq_score_thr) for c in images),
        errors=sum(
            errors_of(
                c, n_classes, score_thr=params.pq_score_thr, area_edges=params.cell_area_edges
            )
            for c in images
        ),
        per_image=_per_image(images, tallies, aji, n_detections),
        calibration=_calibration(ranked, int(np.argmin(np.abs(thrs - 0.5))), params),
        overlaps=Overlaps(
            int(n_detections.sum()),
            sum(flat.n_below for flat in flats),
            sum(flat.n_cut for flat in flats),
            sum(flat.n_dropped for flat in flats),
        ),
        intervals=_intervals(ranked, tallies, class_names, params, unit_of),
        interval_unit=unit,
        n_interval_units=int(unit_of.max()) + 1,
    )


def _tables(
    images: list[Compared], n_classes: int, *, kind: str, cap: int, params: ScoreParams
) -> dict[int, ApTable]:
    caps = sorted({cap, CONVENTIONAL_CAP})
    tables = ap_tables(
        images,
        n_classes,
        kind=kind,
        caps=caps,
        iou_thrs=np.array(params.iou_thrs),
        area_ranges=params.area_ranges,
    )
    return dict(zip(caps, tables, strict=True))


@dataclass(frozen=True, slots=True)
class Tallies:
    """Sufficient statistics of PQ, F1 and AJI per image; F thresholds, I images, K classes.

    Attributes:
        n_gt: (I, K) int64.
        n_pred: (I, K) int64 disjoint predictions.
        tp: (F, I, K) int64, class-aware.
        iou_sum: (F, I, K) float64 over the class-aware pairs.
        any_tp: (F, I) int64, whatever the class.
        any_iou_sum: (F, I) float64.
        aji_shared: (I,) int64 px.
        aji_union: (I,) int64 px.
    """

    n_gt: Int
    n_pred: Int
    tp: Int
    iou_sum: Float
    any_tp: Int
    any_iou_sum: Float
    aji_shared: Int
    aji_union: Int

    @classmethod
    def of(
        cls,
        images: Sequence[Compared],
        flats: Sequence[Flat],
        n_classes: int,
        iou_thrs: tuple[float, ...],
    ) -> Tallies:
        """Match every image at every threshold."""
        shape = (len(iou_thrs), len(images), n_classes)
        tp, iou_sum = np.zeros(shape, dtype=np.int64), np.zeros(shape)
        any_tp, any_iou_sum = np.zeros(shape[:2], dtype=np.int64), np.zeros(shape[:2])
        aji = np.zeros((len(images), 2), dtype=np.int64)
        for i, (c, flat) in enumerate(zip(images, flats, strict=True)):
            gt_class = c.gt.class_ids[flat.pair_gt]
            same = gt_class == flat.class_ids[flat.pair_pred]
            aji[i] = jaccard_sums(flat, c.gt_areas)
            for f, thr in enumerate(iou_thrs):
                pairs = unique_matches(flat, same, thr)
                np.add.at(tp[f, i], gt_class[pairs], 1)
                np.add.at(iou_sum[f, i], gt_class[pairs], flat.pair_iou[pairs])
                pairs = unique_matches(flat, np.ones_like(same), thr)
                any_tp[f, i], any_iou_sum[f, i] = len(pairs), flat.pair_iou[pairs].sum()
        n_gt = [np.bincount(c.gt.class_ids, minlength=n_classes) for c in images]
        n_pred = [np.bincount(flat.class_ids, minlength=n_classes) for flat in flats]
        return cls(
            np.array(n_gt), np.array(n_pred), tp, iou_sum, any_tp, any_iou_sum, aji[:, 0], aji[:, 1]
        )

    def counted(self, iou_thrs: tuple[float, ...]) -> tuple[Counted, ...]:
        """Pool the images, per class."""
        n_gt, n_pred = self.n_gt.sum(axis=0), self.n_pred.sum(axis=0)
        return tuple(
            Counted(thr, tp, n_pred - tp, n_gt - tp, iou_sum)
            for thr, tp, iou_sum in zip(
                iou_thrs, self.tp.sum(axis=1), self.iou_sum.sum(axis=1), strict=True
            )
        )

    def detected(self, iou_thrs: tuple[float, ...]) -> tuple[Counted, ...]:
        """Pool the images, whatever the class; arrays of length 1."""
        n_gt, n_pred = self.n_gt.sum(keepdims=True)[0], self.n_pred.sum(keepdims=True)[0]
        return tuple(
            Counted(thr, tp, n_pred - tp, n_gt - tp, iou_sum)
            for thr, tp, iou_sum in zip(
                iou_thrs,
                self.any_tp.sum(axis=1, keepdims=True),
                self.any_iou_sum.sum(axis=1, keepdims=True),
                strict=True,
            )
        )


def _per_image(images: list[Compared], tallies: Tallies, aji: Float, n_detections: Int) -> PerImage:
    n_gt, n_pred = tallies.n_gt.sum(axis=1), tallies.n_pred.sum(axis=1)
    tp = tallies.tp[0].sum(axis=1)
    image = Counted(0.5, tp, n_pred - tp, n_gt - tp, tallies.iou_sum[0].sum(axis=1))
    return PerImage(
        names=tuple(c.gt.name for c in images),
        image_ids=np.array([c.gt.image_id for c in images], dtype=np.int64),
        f1_50=image.f1,
        pq=image.pq,
        aji=aji,
        gt_counts=tallies.n_gt,
        pred_counts=tallies.n_pred,
        n_detections=n_detections,
    )


def _calibration(ranked: list[RankedClass], thr_index: int, params: ScoreParams) -> Calibration:
    scores = np.concatenate([r.scores for r in ranked]).astype(np.float64)
    is_tp = np.concatenate([r.is_tp[thr_index] for r in ranked])
    n_bins = params.n_calibration_bins
    bins = np.clip(np.floor(scores * n_bins), 0, n_bins - 1).astype(np.int64)
    n = np.bincount(bins, minlength=n_bins)
    return Calibration(
        edges=np.linspace(0.0, 1.0, n_bins + 1),
        n=n,
        mean_score=_ratio(np.bincount(bins, weights=scores, minlength=n_bins), n, n),
        share_tp=_ratio(np.bincount(bins, weights=is_tp, minlength=n_bins), n, n),
    )


def sampling_units(names: Sequence[str], groups: Mapping[str, str]) -> tuple[str, Int]:
    """Return what a bootstrap draws, ``images`` or ``groups``, and each image's unit, (I,) int64.

    Args:
        names: I image names.
        groups: Group by image name; images without one are units of their own.
    """
    if not any(name in groups for name in names):
        return 'images', np.arange(len(names))
    keys = [(0, groups[name]) if name in groups else (1, name) for name in names]
    number = {key: i for i, key in enumerate(sorted(set(keys)))}
    return 'groups', np.array([number[key] for key in keys], dtype=np.int64)


def resampled_weights(unit_of: Int, n: int, seed: int) -> Int:
    """Return how often each image counts when units are drawn with replacement, (n, I) int64.

    Args:
        unit_of: (I,) int64 in 0..U - 1, each image's unit. Images of one unit are drawn together.
        n: Resamples.
        seed: Of the drawing.
    """
    n_units = int(unit_of.max()) + 1
    drawn = np.random.default_rng(seed).integers(0, n_units, size=(n, n_units))
    counts = [np.bincount(row, minlength=n_units)[unit_of] for row in drawn]
    return np.array(counts, dtype=np.int64).reshape(n, len(unit_of))


def _intervals(
    ranked: list[RankedClass],
    tallies: Tallies,
    class_names: tuple[str, ...],
    params: ScoreParams,
    unit_of: Int,
) -> dict[str, tuple[float, float]]:
    """Return 95 % percentile intervals over resampled units, keyed as in ``Scores.headline``."""
    if not params.n_bootstrap:
        return {}
    weights = resampled_weights(unit_of, params.n_bootstrap, params.seed)  # (B, I)
    ap = np.stack([weighted_ap(r, weights) for r in ranked])  # (K, B, T)
    thr_index = int(np.argmin(np.abs(np.array(params.iou_thrs) - 0.5)))
    per_class = {'segm_AP': ap.mean(axis=2), 'segm_AP50': ap[:, :, thr_index]}  # (K, B)
    n_gt, n_pred = (weights @ n for n in (tallies.n_gt, tallies.n_pred))  # (B, K)
    samples: dict[str, Float] = {}
    for f, thr in enumerate(params.f1_iou_thrs):
        percent = round(100 * thr)
        tp = weights @ tallies.tp[f]
        pooled = Counted(thr, tp, n_pred - tp, n_gt - tp, weights @ tallies.iou_sum[f])
        per_class[f'F1_{percent}'] = pooled.f1.T
        if f == 0:
            per_class['PQ'] = pooled.pq.T
        tp = weights @ tallies.any_tp[f]
        fp, fn = n_pred.sum(axis=1) - tp, n_gt.sum(axis=1) - tp
        samples[f'F1_{percent}_detection'] = Counted(thr, tp, fp, fn, np.zeros(len(tp))).f1
    union = weights @ tallies.aji_union
    samples['AJI'] = _ratio(weights @ tallies.aji_shared, union, union)
    for name, values in per_class.items():
        samples['mPQ' if name == 'PQ' else name] = mean_defined(values)
        samples |= {f'{name}_{c}': v for c, v in zip(class_names, values, strict=True)}
    return {name: _percentiles(values) for name, values in samples.items()}


def _percentiles(samples: Float) -> tuple[float, float]:
    defined = samples[~np.isnan(samples)]
    if not len(defined):
        return math.nan, math.nan
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)

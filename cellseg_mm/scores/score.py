"""The only definition of every score: validation, out-of-fold pooling, ensembles and the report.

In: ground truth and predictions as InstanceSets, one per image. Out: :class:`Scores`.
``docs/scores.md`` has each definition in a paragraph. Invariant: a score that is not defined (no
instance of a class) is NaN, is left out of means and is counted; it is never 0 or 1.

``matching`` compares one image, ``average_precision`` makes AP, ``mistakes`` the confusion matrix
and the error breakdown; this module pools, resamples and prints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cellseg_mm.core.arrays import Float, Int
from cellseg_mm.core.errors import PredictionError
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
from cellseg_mm.scores.bootstrap import resampled_weights, sampling_units
from cellseg_mm.scores.matching import (
    Compared,
    Flat,
    compare,
    flatten,
    jaccard_sums,
    unique_matches,
)
from cellseg_mm.scores.mistakes import confusion_of, errors_of
from cellseg_mm.scores.records import (
    Calibration,
    Counted,
    Overlaps,
    PerImage,
    ScoreParams,
    Scores,
    ratio,
)


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
    aji = ratio(tallies.aji_shared, tallies.aji_union, tallies.aji_union)
    shared, union = tallies.aji_shared.sum(), tallies.aji_union.sum()
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
        aji=float(ratio(shared, union, union)),
        aji_image_mean=float(mean_defined(aji)),
        confusion=np.sum(
            [confusion_of(c, n_classes, score_thr=params.pq_score_thr) for c in images], axis=0
        ),
        errors=np.sum(
            [
                errors_of(
                    c, n_classes, score_thr=params.pq_score_thr, area_edges=params.cell_area_edges
                )
                for c in images
            ],
            axis=0,
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
    return Calibration.of(
        np.concatenate([r.scores for r in ranked]).astype(np.float64),
        np.concatenate([r.is_tp[thr_index] for r in ranked]),
        params.n_calibration_bins,
    )


def resampled_scores(
    gt_sets: Sequence[InstanceSet],
    pred_sets: Sequence[InstanceSet],
    class_names: Sequence[str],
    params: ScoreParams,
    *,
    groups: Mapping[str, str],
) -> dict[str, Float]:
    """Return the scores of each resample, (B,) float64, keyed as in ``Scores.headline``.

    The same images, groups and ``params`` are drawn in the same way for any predictions, so that
    two models' scores can be subtracted resample by resample. Arguments: see :func:`score`.
    """
    pairs = _paired(gt_sets, pred_sets, n_classes=len(class_names))
    images = [compare(gt, pred) for gt, pred in pairs]
    flats = [
        flatten(c, score_thr=params.pq_score_thr, min_left_px=params.min_left_px) for c in images
    ]
    n_classes, cap = len(class_names), params.cap or max(1, *(len(c.pred) for c in images))
    thrs = np.array(params.iou_thrs)
    ranked = [rank_class(images, k, thrs, cap=cap) for k in range(n_classes)]
    tallies = Tallies.of(images, flats, n_classes, params.f1_iou_thrs)
    _, unit_of = sampling_units([c.gt.name for c in images], groups)
    return _samples(ranked, tallies, tuple(class_names), params, unit_of)


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
    samples = _samples(ranked, tallies, class_names, params, unit_of)
    return {name: percentiles(values) for name, values in samples.items()}


def _samples(
    ranked: list[RankedClass],
    tallies: Tallies,
    class_names: tuple[str, ...],
    params: ScoreParams,
    unit_of: Int,
) -> dict[str, Float]:
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
    samples['AJI'] = ratio(weights @ tallies.aji_shared, union, union)
    for name, values in per_class.items():
        samples['mPQ' if name == 'PQ' else name] = mean_defined(values)
        samples |= {f'{name}_{c}': v for c, v in zip(class_names, values, strict=True)}
    return samples


def percentiles(samples: Float) -> tuple[float, float]:
    """Return the 95 % percentile interval of the samples that are defined; NaN without any."""
    defined = samples[~np.isnan(samples)]
    if not len(defined):
        return math.nan, math.nan
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)

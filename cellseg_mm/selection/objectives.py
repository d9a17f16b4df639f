"""What is made as large as possible: AP50 or mPQ, for many thresholds at once.

In: samples of ground truth and predictions. Out: a number a choice. Invariant: equal to ``score``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.arrays import Float, Int
from cellseg_mm.core.errors import PredictionError
from cellseg_mm.core.instances import InstanceSet, canonical_order
from cellseg_mm.fusion.settings import InferenceSettings, apply_settings, cut_masks
from cellseg_mm.scores.average_precision import RankedClass, mean_defined, rank_class, weighted_ap
from cellseg_mm.scores.bootstrap import sampling_units
from cellseg_mm.scores.matching import Compared, compare, flatten
from cellseg_mm.scores.records import Counted
from cellseg_mm.scores.score import Tallies

FoldNumbers = tuple[int, ...]
Weights = NDArray[Any]  # (B, I), how often each image counts

SCORE_THRS = tuple(round(0.05 * i, 2) for i in range(1, 20))

MIN_AREAS_PX = (10, 20, 30, 40, 60, 80, 100, 140, 200)  # beside 0; 200 px is 16 px wide

LEAST_GAIN = 1e-9  # between values of one setting, less is a tie

EVERYTHING = 1 << 31  # no cap on detections

MATCH_THR = 0.5  # of panoptic quality, exclusive


@dataclass(frozen=True, slots=True)
class Samples:
    """Images with their truth and predictions, sorted by image id.

    Attributes:
        gt_sets: Ground truth.
        views: Predictions of the same images in the same order, by TTA and fusion rule.
        fold_of: (I,) int64, fold that held each image out.
        class_names: K names.
        groups: Group (patient, slide) by image name, where one is known; resampling draws the
            images of a group together.

    Raises:
        PredictionError: A view has other images.
    """

    gt_sets: tuple[InstanceSet, ...]
    views: Mapping[tuple[str | None, str], tuple[InstanceSet, ...]]
    fold_of: Int
    class_names: tuple[str, ...]
    groups: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids = [gt.image_id for gt in self.gt_sets]
        for name, sets in self.views.items():
            if [s.image_id for s in sets] != ids:
                raise PredictionError(
                    f'selection: the predictions {name} are of other images than the truth; all '
                    'views must have the same images; test the folds again'
                )
        order = np.argsort(ids, kind='stable').tolist()
        set_ = object.__setattr__
        set_(self, 'gt_sets', tuple(self.gt_sets[i] for i in order))
        set_(self, 'views', {k: tuple(v[i] for i in order) for k, v in self.views.items()})
        set_(self, 'fold_of', np.asarray(self.fold_of, dtype=np.int64)[order])

    @property
    def interval_unit(self) -> str:
        """What resampling draws: ``images``, or ``groups`` of them."""
        return sampling_units([gt.name for gt in self.gt_sets], self.groups)[0]

    @property
    def folds(self) -> FoldNumbers:
        """The folds that have images, rising."""
        return tuple(np.unique(self.fold_of).tolist())

    def sets(self, settings: InferenceSettings) -> tuple[InstanceSet, ...]:
        """Return the predictions that the settings start from, masks cut, best first."""
        chosen = self.views[settings.tta, settings.fusion]
        cut = [cut_masks(s, settings.mask_thr) for s in chosen]
        return tuple(s[canonical_order(s)] for s in cut)

    def has_probs(self, settings: InferenceSettings) -> bool:
        """Tell whether masks can be cut at other thresholds."""
        chosen = [s for s in self.views[settings.tta, settings.fusion] if len(s)]
        return bool(chosen) and all('mask_probs' in s.extra for s in chosen)


class Contributions(Protocol):
    """What each image adds to a score."""

    def values(self, weights: Weights) -> Float:
        """Return the score (B,) when image i is there ``weights[b, i]`` times."""
        ...


Parts = TypeVar('Parts', bound=Contributions)


class Objective(Protocol[Parts]):
    """A score, and how to get it for any settings.

    Attributes:
        name: Of the score.
        samples: What is scored.
    """

    name: str
    samples: Samples

    def measure(self, settings: InferenceSettings) -> Parts:
        """Return what each image adds."""
        ...

    def mixed(self, parts: Sequence[Parts], part_of: Int) -> Parts:
        """Take image i from ``parts[part_of[i]]``."""
        ...

    def on(self, samples: Samples) -> Objective[Parts]:
        """Return the same score of other samples."""
        ...


@dataclass(frozen=True, slots=True)
class ApContributions:
    """Detections in the order of the precision-recall curve, per class."""

    classes: tuple[RankedClass, ...]

    def values(self, weights: Weights) -> Float:
        """Return AP50 (B,), mean over defined classes."""
        return mean_defined(np.stack([weighted_ap(r, weights)[:, 0] for r in self.classes]))


class Ap50:
    """Mask AP50; masks are compared once per view and mask threshold.

    Args:
        samples: What is scored.
        cap: Detections per class and image that count, highest scores first; None for all.
    """

    def __init__(self, samples: Samples, cap: int | None = None) -> None:
        self.samples = samples
        self.cap = cap
        self.name = 'segm_AP50' if cap is None else f'segm_AP50 at cap {cap}'
        self._known: dict[tuple[str | None, str, float], dict[int, ApContributions]] = {}

    def on(self, samples: Samples) -> Ap50:
        """Return the same score of other samples."""
        return Ap50(samples, self.cap)

    def measure(self, settings: InferenceSettings) -> ApContributions:
        """Return what each image adds; score thresholds and overlaps are left alone."""
        key = (settings.tta, settings.fusion, settings.mask_thr)
        if key not in self._known:
            # All least areas at once, because the IoU tables are too large to be kept.
            images = [
                compare(gt, pred)
                for gt, pred in zip(self.samples.gt_sets, self.samples.sets(settings), strict=True)
            ]
            areas = (0, *MIN_AREAS_PX)
            self._known[key] = {area: self._ranked(images, area) for area in areas}
        return self._known[key][settings.min_area_px]

    def _ranked(self, images: Sequence[Compared], min_area_px: int) -> ApContributions:
        kept = [_at_least(c, min_area_px) for c in images]
        thr, cap = np.array([0.5]), EVERYTHING if self.cap is None else self.cap
        return ApContributions(
            tuple(rank_class(kept, k, thr, cap=cap) for k in range(len(self.samples.class_names)))
        )

    def mixed(self, parts: Sequence[ApContributions], part_of: Int) -> ApContributions:
        """Take image i from ``parts[part_of[i]]``."""
        by_class = zip(*(part.classes for part in parts), strict=True)
        return ApContributions(tuple(_mixed_class(rows, part_of) for rows in by_class))


def _at_least(c: Compared, min_area_px: int) -> Compared:
    if not min_area_px:
        return c
    keep = np.flatnonzero(c.pred_areas >= min_area_px)
    return replace(
        c,
        pred=c.pred[keep],
        pred_areas=c.pred_areas[keep],
        mask_iou=c.mask_iou[keep],
        box_iou=c.box_iou[keep],
    )


def _mixed_class(parts: Sequence[RankedClass], part_of: Int) -> RankedClass:
    chosen = [part_of[part.image_index] == i for i, part in enumerate(parts)]
    image_index = np.concatenate([p.image_index[c] for p, c in zip(parts, chosen, strict=True)])
    scores = np.concatenate([p.scores[c] for p, c in zip(parts, chosen, strict=True)])
    is_tp = np.concatenate([p.is_tp[:, c] for p, c in zip(parts, chosen, strict=True)], axis=1)
    order = np.lexsort((image_index, -scores))  # as rank_class: of equal scores the earlier image
    return RankedClass(image_index[order], scores[order], is_tp[:, order], parts[0].n_gt)


@dataclass(frozen=True, slots=True)
class PqContributions:
    """What each of I images adds to the panoptic quality of K classes.

    Attributes:
        tp: (I, K) int64 pairs.
        iou_sum: (I, K) float64 over the pairs.
        n_pred: (I, K) int64.
        n_gt: (I, K) int64.
    """

    tp: Int
    iou_sum: Float
    n_pred: Int
    n_gt: Int

    def pq(self, weights: Weights) -> Float:
        """Return PQ (B, K) when image i is there ``weights[b, i]`` times; NaN if undefined."""
        tp, n_pred, n_gt = (weights @ part for part in (self.tp, self.n_pred, self.n_gt))
        return Counted(MATCH_THR, tp, n_pred - tp, n_gt - tp, weights @ self.iou_sum).pq

    def values(self, weights: Weights) -> Float:
        """Return mPQ+ (B,), the mean of :meth:`pq` over defined classes."""
        return mean_defined(self.pq(weights).T)


class Mpq:
    """mPQ+ of disjoint masks: each settings' predictions are post-processed and counted anew.

    155 real images with 130 detections each take 1.5 s of one core per settings, with 490 2.2 s.
    A search with three augmentations measured 46 settings in 81 s of one core in all (490
    detections: 36 in 113 s).
    """

    name = 'mPQ'

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self._known: dict[InferenceSettings, PqContributions] = {}

    def on(self, samples: Samples) -> Mpq:
        """Return the same score of other samples."""
        return Mpq(samples)

    def measure(self, settings: InferenceSettings) -> PqContributions:
        """Return what each image adds."""
        if settings not in self._known:
            self._known[settings] = self._count(settings)
        return self._known[settings]

    def _count(self, settings: InferenceSettings) -> PqContributions:
        views = self.samples.views[settings.tta, settings.fusion]
        images = [
            compare(gt, apply_settings(pred, settings))
            for gt, pred in zip(self.samples.gt_sets, views, strict=True)
        ]
        # They are disjoint and above their thresholds already.
        flats = [flatten(image, score_thr=0.0, min_left_px=0) for image in images]
        tallies = Tallies.of(images, flats, len(self.samples.class_names), (MATCH_THR,))
        return PqContributions(tallies.tp[0], tallies.iou_sum[0], tallies.n_pred, tallies.n_gt)

    def mixed(self, parts: Sequence[PqContributions], part_of: Int) -> PqContributions:
        """Take image i from ``parts[part_of[i]]``; ``part_of`` is (I,)."""
        at = np.arange(len(part_of))

        def taken(rows: list[NDArray[Any]]) -> NDArray[Any]:
            chosen: NDArray[Any] = np.stack(rows)[part_of, at]
            return chosen

        return PqContributions(
            tp=taken([part.tp for part in parts]),
            iou_sum=taken([part.iou_sum for part in parts]),
            n_pred=taken([part.n_pred for part in parts]),
            n_gt=taken([part.n_gt for part in parts]),
        )

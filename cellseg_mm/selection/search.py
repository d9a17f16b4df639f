"""Chooses the settings of inference out of fold, and says what the choice is honestly worth.

In: each training image's predictions by a member that never saw it, and the truth. Out: settings
per profile with their evidence. Invariant: the gain that is reported was measured on images that
took no part in the choice, neither of a value nor of whether to keep it.

Settings are looked at one after the other, each on top of those kept before. A value is the best
on the images at hand, ties go to the one nearer the default. It is kept when its nested gain
(chosen on all folds but one, measured on that one, pooled) exceeds its standard error and 0.001.
The whole procedure, with these decisions in it, is then repeated without each fold in turn: that
gain is the honest one. If it does not exceed its standard error and 0.001, the defaults stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import PredictionError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.fusion.pool import canonical_order
from cellseg_mm.fusion.settings import InferenceSettings, cut_masks
from cellseg_mm.scores.average_precision import RankedClass, mean_defined, rank_class, weighted_ap
from cellseg_mm.scores.matching import Compared, compare
from cellseg_mm.scores.score import resampled_weights, sampling_units
from cellseg_mm.selection.disjoint_sweep import PqTally, Scene, make_scene

Int = NDArray[np.int64]
Float = NDArray[np.float64]
Folds = tuple[int, ...]

SCORE_THRS = tuple(round(0.05 * i, 2) for i in range(1, 20))
MASK_THRS = (0.45, 0.55, 0.4, 0.6, 0.35, 0.65, 0.3)  # beside 0.5; nearest first
MIN_AREAS_PX = (10, 20, 30, 40, 60, 80, 100, 140, 200)  # beside 0; 200 px is 16 px wide
N_BOOTSTRAP = 1000  # for the interval that is reported
N_FOR_ERROR = 200  # for the standard error of a decision: known to 5 %
LEAST_GAIN = 1e-9  # between values of one setting, less is a tie
WORTH_IT = 0.001  # a setting whose nested gain is less is left at its default, however sure
EVERYTHING = 1 << 31  # no cap on detections


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
    def folds(self) -> Folds:
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

    def values(self, weights: NDArray) -> Float:
        """Return the score (B,) when image i is there ``weights[b, i]`` times."""


class Objective(Protocol):
    """A score, and how to get it for any settings.

    Attributes:
        name: Of the score.
        samples: What is scored.
    """

    name: str
    samples: Samples

    def measure(self, settings: InferenceSettings) -> Contributions:
        """Return what each image adds."""

    def mixed(self, parts: Sequence[Contributions], part_of: Int) -> Contributions:
        """Take image i from ``parts[part_of[i]]``."""


@dataclass(frozen=True, slots=True)
class ApContributions:
    """Detections in the order of the precision-recall curve, per class."""

    classes: tuple[RankedClass, ...]

    def values(self, weights: NDArray) -> Float:
        """Return AP50 (B,), mean over defined classes."""
        return mean_defined(np.stack([weighted_ap(r, weights)[:, 0] for r in self.classes]))


class Ap50:
    """Mask AP50 with all detections; masks are compared once per view and mask threshold."""

    name = 'segm_AP50'

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self._known: dict[tuple, dict[int, ApContributions]] = {}

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
        thr = np.array([0.5])
        return ApContributions(
            tuple(
                rank_class(kept, k, thr, cap=EVERYTHING)
                for k in range(len(self.samples.class_names))
            )
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


class Mpq:
    """mPQ+ of disjoint masks; masks are taken apart once per view and mask threshold."""

    name = 'mPQ'

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self._scene = lru_cache(maxsize=4)(self._make_scene)
        self._known: dict[InferenceSettings, PqTally] = {}

    def _make_scene(self, settings: InferenceSettings) -> Scene:
        return make_scene(
            self.samples.gt_sets,
            self.samples.sets(settings),
            len(self.samples.class_names),
            floor=SCORE_THRS[0],
        )

    def measure(self, settings: InferenceSettings) -> PqTally:
        """Return what each image adds."""
        if settings not in self._known:
            neutral = replace(
                settings, score_thr=(SCORE_THRS[0],) * len(settings.score_thr), min_area_px=0
            )
            scene = self._scene(neutral)
            self._known[settings] = scene.tally(settings.score_thr, settings.min_area_px)
        return self._known[settings]

    def mixed(self, parts: Sequence[PqTally], part_of: Int) -> PqTally:
        """Take image i from ``parts[part_of[i]]``."""
        return PqTally.mixed(parts, part_of)


# ---- what is tried ----

Options = Callable[[InferenceSettings, Objective, NDArray], list[InferenceSettings]]


def _tta_options(now: InferenceSettings, objective: Objective, _: NDArray) -> list:
    names = sorted({tta for tta, _ in objective.samples.views} - {None, now.tta})
    return [replace(now, tta=name) for name in names]


def _mask_options(now: InferenceSettings, objective: Objective, _: NDArray) -> list:
    if not objective.samples.has_probs(now):
        return []
    return [replace(now, mask_thr=thr) for thr in MASK_THRS]


def _score_options(now: InferenceSettings, objective: Objective, _: NDArray) -> list:
    nearest = sorted(SCORE_THRS, key=lambda thr: (abs(thr - now.score_thr[0]), thr))
    return [replace(now, score_thr=(thr,) * len(now.score_thr)) for thr in nearest]


def _class_options(now: InferenceSettings, objective: Objective, weights: NDArray) -> list:
    """Return the one vector of each class's best threshold when all classes have the same.

    A class's PQ depends on the others' thresholds only where detections of two classes contest a
    pixel, so its curve over common thresholds tells its best; the vector is measured exactly.
    """
    options = [now, *_score_options(now, objective, weights)]
    curves = np.stack([objective.measure(option).pq(weights)[0] for option in options])
    curves = np.where(np.isnan(curves), -1.0, curves)
    # A class that these images lack keeps its threshold: the first of equal values is taken.
    best = np.argmax(curves > curves.max(axis=0) - LEAST_GAIN, axis=0)
    vector = tuple(options[row].score_thr[k] for k, row in enumerate(best.tolist()))
    return [replace(now, score_thr=vector)]


def _area_options(now: InferenceSettings, objective: Objective, _: NDArray) -> list:
    return [replace(now, min_area_px=area) for area in MIN_AREAS_PX]


def _fusion_options(now: InferenceSettings, objective: Objective, weights: NDArray) -> list:
    rules = [rule for tta, rule in objective.samples.views if rule != now.fusion]
    options = [replace(now, fusion=rule) for rule in rules]
    if isinstance(objective, Mpq):  # rules differ in the scale of their scores
        every = [replace(now, fusion=rule) for rule in [now.fusion, *rules]]
        options += [one for rule in every for one in _score_options(rule, objective, weights)]
    return options


AP_STEPS: dict[str, Options] = {
    'tta': _tta_options,
    'mask_thr': _mask_options,
    'min_area_px': _area_options,
}
PQ_STEPS: dict[str, Options] = {
    'tta': _tta_options,
    'mask_thr': _mask_options,
    'score_thr': _score_options,
    'score_thr per class': _class_options,
    'min_area_px': _area_options,
}
FUSION_STEPS: dict[str, Options] = {'fusion': _fusion_options}


# ---- how is chosen ----


@dataclass(frozen=True, slots=True)
class StepEvidence:
    """One setting that was looked at.

    Attributes:
        name: Of the setting.
        tried: Text of each value to its score on all images at hand.
        best: Settings with the best value.
        gain: Nested gain, or the naive one where there was one fold only.
        error: Its standard error over images, or over groups where any is known.
        kept: Whether the value is used.
    """

    name: str
    tried: Mapping[str, float]
    best: InferenceSettings
    gain: float
    error: float
    kept: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """Settings and what they are worth.

    Attributes:
        objective: Name of the score.
        settings: To be used.
        default: Score of the defaults.
        naive: Score of the settings that were found, on the images that they were found on.
        found: These settings; ``settings`` are the defaults instead if they were not worth it.
        nested_gain: Honest gain of the procedure over the defaults; NaN with fewer than two folds.
        error: Its standard error over images, or over groups where any is known.
        interval: Its 95 % percentile bootstrap interval, likewise.
        by_fold: Per fold the settings chosen without it and their gain on it.
        steps: The settings looked at, on all folds.
        n_images: Images.
        interval_unit: What resampling draws: ``images``, or ``groups`` of them (patients).
    """

    objective: str
    settings: InferenceSettings
    default: float
    naive: float
    found: InferenceSettings
    nested_gain: float
    error: float
    interval: tuple[float, float]
    by_fold: Mapping[int, tuple[InferenceSettings, float]] = field(default_factory=dict)
    steps: tuple[StepEvidence, ...] = ()
    n_images: int = 0
    interval_unit: str = 'images'


@dataclass(frozen=True, slots=True)
class Search:
    """A score, what is tried, and the seed of the resampling."""

    objective: Objective
    steps: Mapping[str, Options]
    seed: int = 0

    def choose(self, start: InferenceSettings) -> Choice:
        """Choose on all folds, and measure honestly what choosing brings."""
        folds = self.objective.samples.folds
        weights = self._weights(folds)
        default = self._value(start, weights)
        if len(folds) < 2:
            nan = float('nan')
            return Choice(
                objective=self.objective.name,
                settings=start,
                default=default,
                naive=default,
                found=start,
                nested_gain=nan,
                error=nan,
                interval=(nan, nan),
                n_images=len(self.objective.samples.fold_of),
                interval_unit=self.objective.samples.interval_unit,
            )
        found, steps = self._stepwise(start, folds)
        without = {fold: self._stepwise(start, _but(folds, fold))[0] for fold in folds}
        gains = self._gains(start, without, folds, n=N_BOOTSTRAP)
        by_fold = {
            fold: (chosen, self._value(chosen, w) - self._value(start, w))
            for fold, chosen in without.items()
            for w in [self._weights((fold,))]
        }
        is_worth_it = gains[0] > max(_error(gains), WORTH_IT)
        return Choice(
            objective=self.objective.name,
            settings=found if is_worth_it else start,
            default=default,
            naive=self._value(found, weights),
            found=found,
            nested_gain=float(gains[0]),
            error=_error(gains),
            interval=_interval(gains),
            by_fold=by_fold,
            steps=steps,
            n_images=int(weights.sum()),
            interval_unit=self.objective.samples.interval_unit,
        )

    def _stepwise(
        self, start: InferenceSettings, folds: Folds
    ) -> tuple[InferenceSettings, tuple[StepEvidence, ...]]:
        """Look at one setting after the other; keep what nested folds confirm."""
        now, evidence = start, []
        for name, options in self.steps.items():
            best, tried = self._best(options, now, folds)
            gain = error = 0.0
            if best != now:
                inner = {
                    fold: self._best(options, now, _but(folds, fold))[0] if len(folds) > 1 else best
                    for fold in folds
                }
                gains = self._gains(now, inner, folds, n=N_FOR_ERROR)
                gain, error = float(gains[0]), _error(gains)
            kept = best != now and gain > max(error, WORTH_IT)
            evidence.append(StepEvidence(name, tried, best, gain, error, kept))
            now = best if kept else now
        return now, tuple(evidence)

    def _best(
        self, options: Options, now: InferenceSettings, folds: Folds
    ) -> tuple[InferenceSettings, dict[str, float]]:
        """Return the best option, ``now`` and then the earlier one on ties, and all scores."""
        weights = self._weights(folds)
        best, best_value = now, self._value(now, weights)
        tried = {difference(now, now): best_value}
        for option in options(now, self.objective, weights):
            value = self._value(option, weights)
            tried[difference(option, now)] = value
            if value > best_value + LEAST_GAIN:
                best, best_value = option, value
        return best, tried

    def _gains(
        self,
        base: InferenceSettings,
        chosen: Mapping[int, InferenceSettings],
        folds: Folds,
        *,
        n: int,
    ) -> Float:
        """Return the gain of each fold's settings over ``base``, pooled: first as it is, then n
        times with images of ``folds`` (or their groups) drawn with replacement; (n + 1,)."""
        if all(settings == base for settings in chosen.values()):
            return np.zeros(n + 1)
        fold_of = self.objective.samples.fold_of
        distinct = list(dict.fromkeys([base, *chosen.values()]))
        part_of = np.array([distinct.index(chosen.get(f, base)) for f in fold_of.tolist()])
        parts = [self.objective.measure(settings) for settings in distinct]
        weights = np.concatenate([self._weights(folds), self._drawn(folds, n)])
        return self.objective.mixed(parts, part_of).values(weights) - parts[0].values(weights)

    def _weights(self, folds: Folds) -> Int:
        """Return (1, I): 1 for each image of the folds."""
        return np.isin(self.objective.samples.fold_of, folds).astype(np.int64)[None]

    def _drawn(self, folds: Folds, n: int) -> Int:
        """Return (n, I): how often each image of the folds is drawn, groups together."""
        samples = self.objective.samples
        images = np.flatnonzero(np.isin(samples.fold_of, folds))
        names = [samples.gt_sets[i].name for i in images.tolist()]
        _, unit_of = sampling_units(names, samples.groups)
        weights = np.zeros((n, len(samples.fold_of)), dtype=np.int64)
        weights[:, images] = resampled_weights(unit_of, n, self.seed)
        return weights

    def _value(self, settings: InferenceSettings, weights: Int) -> float:
        return float(self.objective.measure(settings).values(weights)[0])


def _but(folds: Folds, fold: int) -> Folds:
    return tuple(f for f in folds if f != fold) or folds


def _error(gains: Float) -> float:
    drawn = gains[1:][~np.isnan(gains[1:])]
    return float(drawn.std()) if len(drawn) else float('nan')


def _interval(gains: Float) -> tuple[float, float]:
    drawn = gains[1:][~np.isnan(gains[1:])]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    return float(low), float(high)


def difference(settings: InferenceSettings, base: InferenceSettings) -> str:
    """Return what differs, as text; 'as before' if nothing."""
    ours, others = settings.to_json(), base.to_json()
    changed = {key: value for key, value in ours.items() if value != others[key]}
    parts = []
    for key, value in changed.items():
        if isinstance(value, dict):
            one = len(set(value.values())) == 1
            value = next(iter(value.values())) if one else '/'.join(map(str, value.values()))
        parts.append(f'{key} {value}')
    return ', '.join(parts) or 'as before'


__all__ = [
    'AP_STEPS',
    'FUSION_STEPS',
    'PQ_STEPS',
    'Ap50',
    'Choice',
    'Mpq',
    'Samples',
    'Search',
    'StepEvidence',
    'difference',
]

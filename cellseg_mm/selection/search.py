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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cellseg_mm.core.arrays import Float, Int
from cellseg_mm.fusion.settings import RESCORING, InferenceSettings
from cellseg_mm.scores.bootstrap import resampled_weights, sampling_units
from cellseg_mm.selection.objectives import (
    LEAST_GAIN,
    MIN_AREAS_PX,
    SCORE_THRS,
    FoldNumbers,
    Mpq,
    Objective,
    Samples,
    Weights,
)

MASK_THRS = (0.45, 0.55, 0.4, 0.6, 0.35, 0.65, 0.3)  # beside 0.5; nearest first
N_BOOTSTRAP = 1000  # for the interval that is reported
N_FOR_ERROR = 200  # for the standard error of a decision: known to 5 %
WORTH_IT = 0.001  # a setting whose nested gain is less is left at its default, however sure


# ---- what is tried ----

Tried = list[InferenceSettings]
Options = Callable[[InferenceSettings, Objective[Any], Weights], Tried]


def _tta_options(now: InferenceSettings, objective: Objective[Any], _: Weights) -> Tried:
    known = {tta for tta, _ in objective.samples.views}
    names = sorted(tta for tta in known if tta is not None and tta != now.tta)
    return [replace(now, tta=name) for name in names]


def _mask_options(now: InferenceSettings, objective: Objective[Any], _: Weights) -> Tried:
    if not objective.samples.has_probs(now):
        return []
    return [replace(now, mask_thr=thr) for thr in MASK_THRS]


def _score_options(now: InferenceSettings, objective: Objective[Any], _: Weights) -> Tried:
    nearest = sorted(SCORE_THRS, key=lambda thr: (abs(thr - now.score_thr[0]), thr))
    return [replace(now, score_thr=(thr,) * len(now.score_thr)) for thr in nearest]


def _class_options(now: InferenceSettings, objective: Objective[Any], weights: Weights) -> Tried:
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


def _area_options(now: InferenceSettings, objective: Objective[Any], _: Weights) -> Tried:
    return [replace(now, min_area_px=area) for area in MIN_AREAS_PX]


def _fusion_options(now: InferenceSettings, objective: Objective[Any], weights: Weights) -> Tried:
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
class SettingsChoice:
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

    objective: Objective[Any]
    steps: Mapping[str, Options]
    seed: int = 0

    def choose(self, start: InferenceSettings) -> SettingsChoice:
        """Choose on all folds, and measure honestly what choosing brings."""
        folds = self.objective.samples.folds
        weights = self._weights(folds)
        default = self._value(start, weights)
        if len(folds) < 2:
            nan = float('nan')
            return SettingsChoice(
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
        without = {fold: self._stepwise(start, _all_but(folds, fold))[0] for fold in folds}
        gains = self._gains(start, without, folds, n=N_BOOTSTRAP)
        by_fold = {
            fold: (chosen, self._value(chosen, w) - self._value(start, w))
            for fold, chosen in without.items()
            for w in [self._weights((fold,))]
        }
        return SettingsChoice(
            objective=self.objective.name,
            settings=found if is_worth_it(gains[0], _error(gains)) else start,
            default=default,
            naive=self._value(found, weights),
            found=found,
            nested_gain=float(gains[0]),
            error=_error(gains),
            interval=interval_of(gains),
            by_fold=by_fold,
            steps=steps,
            n_images=int(weights.sum()),
            interval_unit=self.objective.samples.interval_unit,
        )

    def _stepwise(
        self, start: InferenceSettings, folds: FoldNumbers
    ) -> tuple[InferenceSettings, tuple[StepEvidence, ...]]:
        """Look at one setting after the other; keep what nested folds confirm."""
        now, evidence = start, []
        for name, options in self.steps.items():
            best, tried = self._best(options, now, folds)
            gain = error = 0.0
            if best != now:
                inner = {fold: self._best(options, now, _all_but(folds, fold))[0] for fold in folds}
                gains = self._gains(now, inner, folds, n=N_FOR_ERROR)
                gain, error = float(gains[0]), _error(gains)
            kept = best != now and is_worth_it(gain, error)
            evidence.append(StepEvidence(name, tried, best, gain, error, kept))
            now = best if kept else now
        return now, tuple(evidence)

    def _best(
        self, options: Options, now: InferenceSettings, folds: FoldNumbers
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
        folds: FoldNumbers,
        *,
        n: int,
    ) -> Float:
        """Return the gain of each fold's settings over ``base``, pooled, (n + 1,).

        First as it is, then n times with images of ``folds``, or their groups, drawn with
        replacement.
        """
        if all(settings == base for settings in chosen.values()):
            return np.zeros(n + 1)
        fold_of = self.objective.samples.fold_of
        distinct = list(dict.fromkeys([base, *chosen.values()]))
        part_of = np.array([distinct.index(chosen.get(f, base)) for f in fold_of.tolist()])
        parts = [self.objective.measure(settings) for settings in distinct]
        weights = np.concatenate([self._weights(folds), self._drawn(folds, n)])
        gains: Float = self.objective.mixed(parts, part_of).values(weights)
        before: Float = parts[0].values(weights)
        return gains - before

    def _weights(self, folds: FoldNumbers) -> Int:
        """Return (1, I): 1 for each image of the folds."""
        return np.isin(self.objective.samples.fold_of, folds).astype(np.int64)[None]

    def _drawn(self, folds: FoldNumbers, n: int) -> Int:
        """Return (n, I): how often each image of the folds is drawn, groups together."""
        return drawn_weights(self.objective.samples, n, self.seed, folds=folds)

    def _value(self, settings: InferenceSettings, weights: Int) -> float:
        return float(self.objective.measure(settings).values(weights)[0])


def drawn_weights(samples: Samples, n: int, seed: int, *, folds: FoldNumbers | None = None) -> Int:
    """Return (n, I): how often each image, of ``folds`` only, is drawn, groups together."""
    images = np.flatnonzero(np.isin(samples.fold_of, samples.folds if folds is None else folds))
    names = [samples.gt_sets[i].name for i in images.tolist()]
    _, unit_of = sampling_units(names, samples.groups)
    weights = np.zeros((n, len(samples.fold_of)), dtype=np.int64)
    weights[:, images] = resampled_weights(unit_of, n, seed)
    return weights


def _all_but(folds: FoldNumbers, fold: int) -> FoldNumbers:
    return tuple(f for f in folds if f != fold) or folds


def is_worth_it(gain: float, error: float) -> bool:
    """Tell whether a nested gain exceeds its standard error, and what counts at all."""
    return gain > max(error, WORTH_IT)


def _error(gains: Float) -> float:
    drawn = gains[1:][~np.isnan(gains[1:])]
    return float(drawn.std()) if len(drawn) else float('nan')


def interval_of(gains: Float) -> tuple[float, float]:
    """Return the 95 % percentile interval of all but the first, which was not drawn."""
    drawn = gains[1:][~np.isnan(gains[1:])]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    return float(low), float(high)


def difference(settings: InferenceSettings, base: InferenceSettings) -> str:
    """Return what differs, as text; 'as before' if nothing."""
    ours, others = settings.to_json(), base.to_json()
    anew = ours.pop(RESCORING, None) != others.pop(RESCORING, None)
    changed = {key: value for key, value in ours.items() if value != others[key]}
    parts = ['new scores'] if anew else []
    for key, value in changed.items():
        if isinstance(value, dict):
            one = len(set(value.values())) == 1
            value = next(iter(value.values())) if one else '/'.join(map(str, value.values()))
        parts.append(f'{key} {value}')
    return ', '.join(parts) or 'as before'

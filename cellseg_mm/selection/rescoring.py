"""Fits scores that are probabilities, and says out of fold what they bring.

In: samples and the settings that were chosen on them. Out: those settings with weights for new
scores and, where cells are counted, with thresholds on these; evidence. Invariant: the gain and the
curve that are reported come from images that no weight and no threshold was fitted on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.arrays import Float, Int
from cellseg_mm.core.errors import PredictionError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.fusion.rescoring import FEATURES, SURE, Rescoring, features
from cellseg_mm.fusion.settings import DEFAULT_MASK_THR, InferenceSettings
from cellseg_mm.scores.matching import compare
from cellseg_mm.scores.mistakes import match_in_class
from cellseg_mm.scores.records import Calibration, as_json
from cellseg_mm.selection.objectives import Mpq, Objective
from cellseg_mm.selection.search import N_BOOTSTRAP, drawn_weights, interval_of, is_worth_it

# Of the ridge penalty, on standardised features. 155 real images, AP50: 0.001 0.759, 0.01 0.766,
# 0.1 0.764, 1 0.763.
INVERSE_PENALTY = 0.01
FEWEST = 10  # right, and wrong, detections of a class; with fewer it keeps its scores

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Table:
    """The D detections of I images, and how many cells these have.

    Attributes:
        values: (D, F) features.
        class_ids: (D,) int64.
        image: (D,) int64, position of the image.
        is_right: (D,) whether it is matched within its class at mask IoU 0.5.
        scores: (D,) as predicted.
        n_gt: (I, K) int64 labelled cells.
    """

    values: Float
    class_ids: Int
    image: Int
    is_right: Bools
    scores: Float
    n_gt: Int


@dataclass(frozen=True, slots=True)
class RescoringChoice:
    """What new scores are worth.

    Attributes:
        settings: With weights of new scores.
        gain: Of the score that the settings were chosen by, on images that took no part in the
            fit; over the settings as they came, which were chosen on all images.
        error: Its standard error over images, or over groups where any is known.
        interval: Its 95 % percentile bootstrap interval, likewise.
        before: How often scores are right as predicted.
        after: The same for new scores, on images that took no part.
    """

    settings: InferenceSettings
    gain: float
    error: float
    interval: tuple[float, float]
    before: Calibration
    after: Calibration

    @property
    def is_worth_it(self) -> bool:
        """Whether the gain is greater than its error, and than what counts at all."""
        return is_worth_it(self.gain, self.error)


def choose_rescoring(
    objective: Objective[Any], settings: InferenceSettings, *, seed: int = 0
) -> RescoringChoice:
    """Fit on all folds but one and judge on that one, for each fold; then fit on all.

    Args:
        objective: What the settings were chosen by, of two folds or more.
        settings: Chosen without new scores.
        seed: Of the resampling.
    """
    samples, names = objective.samples, objective.samples.class_names
    sets = samples.sets(settings)
    table = tabulate(samples.gt_sets, sets, len(names))
    fits = fit_without(table, names, samples.fold_of)
    judged = tuple(fits[f].apply(s) for f, s in zip(samples.fold_of.tolist(), sets, strict=True))

    def adjusted(rescoring: Rescoring, taken: Bools) -> InferenceSettings:
        if not isinstance(objective, Mpq):
            return settings
        return replace(settings, score_thr=_best_thresholds(table, rescoring, taken))

    again = objective.on(replace(samples, views={(settings.tta, settings.fusion): judged}))
    parts = [  # these masks are cut already
        again.measure(replace(adjusted(one, samples.fold_of != f), mask_thr=DEFAULT_MASK_THR))
        for f, one in fits.items()
    ]
    part_of = np.searchsorted(np.array(list(fits)), samples.fold_of)
    everyone = np.ones(len(sets), dtype=np.bool_)
    drawn = drawn_weights(samples, N_BOOTSTRAP, seed)
    weights = np.concatenate([everyone[None].astype(np.int64), drawn])
    before = objective.measure(settings).values(weights)
    gains = again.mixed(parts, part_of).values(weights) - before
    rescoring = fit(table, names, everyone)
    return RescoringChoice(
        settings=replace(adjusted(rescoring, everyone), rescoring=rescoring),
        gain=float(gains[0]),
        error=float(np.nanstd(gains[1:])),
        interval=interval_of(gains),
        before=Calibration.of(table.scores, table.is_right),
        after=Calibration.of(np.concatenate([s.scores for s in judged]), table.is_right),
    )


def cross_scored(
    gt_sets: Sequence[InstanceSet],
    pred_sets: Sequence[InstanceSet],
    fold_of: Int,
    class_names: Sequence[str],
) -> tuple[InstanceSet, ...]:
    """Return predictions with new scores, each image's by weights fitted on the other folds.

    Args:
        gt_sets: I images' ground truth.
        pred_sets: Predictions of the same images in the same order.
        fold_of: (I,) int64, fold that held each image out.
        class_names: K names.

    Raises:
        PredictionError: All images are of one fold.
    """
    if len(np.unique(fold_of)) < 2:
        raise PredictionError(
            f'new scores: found predictions of fold {fold_of[0]} only; expected two folds or more, '
            'so that each is scored by weights of the others; test another fold'
        )
    best_first = tuple(pred.by_score() for pred in pred_sets)
    fits = fit_without(tabulate(gt_sets, best_first, len(class_names)), class_names, fold_of)
    return tuple(fits[f].apply(s) for f, s in zip(fold_of.tolist(), best_first, strict=True))


def tabulate(
    gt_sets: Sequence[InstanceSet], pred_sets: Sequence[InstanceSet], n_classes: int
) -> Table:
    """Collect what is fitted on, the images' predictions best first."""
    pairs = zip(gt_sets, pred_sets, strict=True)
    is_right = [match_in_class(compare(gt, pred))[0] >= 0 for gt, pred in pairs]
    sizes = [len(pred) for pred in pred_sets]
    return Table(
        values=np.concatenate([features(pred, n_classes) for pred in pred_sets]),
        class_ids=np.concatenate([pred.class_ids for pred in pred_sets]),
        image=np.repeat(np.arange(len(sizes)), sizes),
        is_right=np.concatenate(is_right),
        scores=np.concatenate([pred.scores for pred in pred_sets]).astype(np.float64),
        n_gt=np.stack([np.bincount(gt.class_ids, minlength=n_classes) for gt in gt_sets]),
    )


def _best_thresholds(table: Table, rescoring: Rescoring, taken: Bools) -> tuple[float, ...]:
    """Return each class's new score from which on F1 is greatest on the images taken, (I,) bool."""
    rows, n_gt = taken[table.image], table.n_gt[taken].sum(axis=0)
    scores = rescoring.scores(table.values, table.class_ids)
    thresholds = []
    for k, n in enumerate(n_gt.tolist()):
        own = rows & (table.class_ids == k)
        thresholds.append(_best_threshold(scores[own], table.is_right[own], n))
    return tuple(thresholds)


def _best_threshold(scores: Float, is_right: Bools, n_gt: int) -> float:
    """Return the score from which on F1 is greatest, to two digits; 0.5 without detections."""
    if not len(scores):
        return 0.5
    order = np.argsort(-scores, kind='stable')
    n = np.arange(1, len(scores) + 1)
    f1 = 2 * np.cumsum(is_right[order]) / (n + n_gt)
    return round(float(scores[order][int(np.argmax(f1))]), 2)


def fit_without(table: Table, class_names: Sequence[str], fold_of: Int) -> dict[int, Rescoring]:
    """Return for each fold, rising, weights fitted on the images of all others."""
    return {fold: fit(table, class_names, fold_of != fold) for fold in np.unique(fold_of).tolist()}


def fit(table: Table, class_names: Sequence[str], taken: Bools) -> Rescoring:
    """Fit one logistic regression per class.

    Args:
        table: All detections.
        class_names: K names.
        taken: (I,) the images to fit on.
    """
    rows = taken[table.image]
    fits = []
    for k in range(len(class_names)):
        own = rows & (table.class_ids == k)
        fits.append(_fit_class(table.values[own], table.is_right[own]))
    weights, low, high = (
        tuple(tuple(row.tolist()) for row in part) for part in zip(*fits, strict=True)
    )
    return Rescoring(tuple(class_names), weights, low, high)


def _fit_class(values: Float, is_right: Bools) -> tuple[Float, Float, Float]:
    """Return weights with the intercept last, and the least and greatest of each feature."""
    if min(is_right.sum(), (~is_right).sum()) < FEWEST:
        end = np.zeros(len(FEATURES))
        end[0] = np.log((1 - SURE) / SURE)
        return np.eye(len(FEATURES) + 1)[0], -end, end
    from sklearn.linear_model import LogisticRegression

    mean, spread = values.mean(axis=0), values.std(axis=0) + 1e-9
    model = LogisticRegression(C=INVERSE_PENALTY, max_iter=1000)
    model.fit((values - mean) / spread, is_right)
    slopes = model.coef_[0] / spread
    weights = np.append(slopes, model.intercept_[0] - slopes @ mean)
    return weights, values.min(axis=0), values.max(axis=0)


def rescoring_record(choice: RescoringChoice) -> dict[str, JsonValue]:
    """Return what ``inference.json`` says about new scores."""
    return {
        'nested_gain': choice.gain,
        'nested_standard_error': choice.error,
        'nested_interval_95': list(choice.interval),
        'is_worth_it': choice.is_worth_it,
        'before': as_json(choice.before),
        'after': as_json(choice.after),
    }


def describe_rescoring(choice: RescoringChoice) -> str:
    """Return what new scores are worth, in one line."""
    low, high = choice.interval
    return (
        f'new scores from what surrounds a cell: honest gain {choice.gain:+.4f} (95 % {low:+.4f} '
        f'to {high:+.4f}), mean squared error of the scores {choice.before.brier:.4f} before, '
        f'{choice.after.brier:.4f} after: {"worth it" if choice.is_worth_it else "not worth it"}'
    )

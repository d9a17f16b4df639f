"""Scores made anew from what surrounds a detection, so that 0.8 is right eight times in ten.

In: one image's instances after fusion, and weights that ``selection`` fitted out of fold. Out: the
same instances with other scores. Invariants: nothing depends on the order of the instances; masks,
boxes and classes stay; it is done once, between fusion and what follows it, never to finished
results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from cellseg_mm.core.arrays import Float, Int
from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.files import JsonValue, text_hash
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.fusion.clusters import box_pairs
from cellseg_mm.fusion.pool import Pool
from cellseg_mm.fusion.rules import Rule, RuleResult

FEATURES = (
    'logit',  # of the score
    'log_area',  # of the mask, px
    'log_area_squared',  # too small and too large are both suspicious
    'fill',  # share of the box that the mask covers
    'elongation',  # log of the box's longer side by its shorter
    'overlap_iou',  # greatest box IoU with a higher score
    'overlap_share',  # greatest share of the smaller box with a higher score
    'at_border',  # the box touches the image's edge
    'class_share',  # log share of the class around, by sum of scores
    'score_around',  # log of the sum of scores around
    'count_around',  # log of the number of detections around
)
RESCORED = 'rescored'  # says in the name of a rule that scores are new
BIN_PX = 64
REACH = 4  # bins to each side: "around" is a square of 9 bins, 576 px, about the place
SURE = 1e-4  # scores are kept this far from 0 and 1, whose logits are infinite


def features(instances: InstanceSet, n_classes: int) -> Float:
    """Return what a detection's score may be judged by, (N, ``len(FEATURES)``) float64.

    Args:
        instances: One image's detections at the resolution that the model works at.
        n_classes: Of the model.
    """
    n = len(instances)
    if not n:
        return np.zeros((0, len(FEATURES)))
    scores = np.clip(instances.scores.astype(np.float64), SURE, 1 - SURE)
    boxes = instances.boxes_xyxy.astype(np.float64)
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 1)
    log_area = np.log(np.maximum(instances.areas, 1))
    iou, share = _overlaps(boxes, scores)
    h, w = instances.image_hw
    at_border = (boxes[:, :2] < 1).any(axis=1) | (boxes[:, 2:] > (w - 1, h - 1)).any(axis=1)
    classes = instances.class_ids
    by_class = np.zeros((n, n_classes + 1))
    by_class[np.arange(n), classes] = scores
    by_class[:, -1] = 1
    around = _sums_around(boxes, by_class)
    total = around[:, :-1].sum(axis=1)
    own = around[np.arange(n), classes]
    columns = {
        'logit': np.log(scores / (1 - scores)),
        'log_area': log_area,
        'log_area_squared': log_area**2 / 10,
        'fill': np.exp(log_area) / sides.prod(axis=1),
        'elongation': np.abs(np.log(sides[:, 0] / sides[:, 1])),
        'overlap_iou': iou,
        'overlap_share': share,
        'at_border': at_border,
        'class_share': np.log((own + 0.5) / (total + 0.5 * n_classes)),
        'score_around': np.log1p(total),
        'count_around': np.log1p(around[:, -1]),
    }
    return np.stack([columns[name] for name in FEATURES], axis=1).astype(np.float64)


def _overlaps(boxes: Float, scores: Float) -> tuple[Float, Float]:
    """Return the greatest IoU, and share of the smaller box, with a box of higher score, (N,)."""
    pairs = box_pairs(boxes, np.zeros(len(boxes), dtype=np.int64))
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    both = area[pairs.first] + area[pairs.second]
    shared = both * pairs.iou / (1 + pairs.iou)
    share = shared / np.maximum(np.minimum(area[pairs.first], area[pairs.second]), 1e-9)
    iou_of, share_of = np.zeros(len(boxes)), np.zeros(len(boxes))
    for one, other in ((pairs.first, pairs.second), (pairs.second, pairs.first)):
        lower = scores[one] < scores[other]
        np.maximum.at(iou_of, one[lower], pairs.iou[lower])
        np.maximum.at(share_of, one[lower], share[lower])
    return iou_of, share_of


def _sums_around(boxes: Float, values: Float) -> Float:
    """Return the sums of (N, C) ``values`` over the square of bins around each box's centre."""
    bins = np.maximum((boxes[:, :2] + boxes[:, 2:]) / 2 // BIN_PX, 0).astype(np.int64)
    x, y = bins.T
    table = np.zeros((y.max() + 2 * REACH + 2, x.max() + 2 * REACH + 2, values.shape[1]))
    np.add.at(table, (y + REACH + 1, x + REACH + 1), values)
    sums = table.cumsum(axis=0).cumsum(axis=1)
    side = 2 * REACH + 1
    around = sums[y + side, x + side] - sums[y, x + side] - sums[y + side, x] + sums[y, x]
    return np.asarray(around, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Rescoring:
    """One logistic model per class: a score is its probability of being right.

    Attributes:
        class_names: K names in order of ``class_id``.
        weights: K rows of ``len(FEATURES)`` + 1 numbers, the intercept last.
        low: K rows of the least value of each feature where the model was fitted.
        high: K rows of the greatest; what lies outside counts as the nearest end.

    Raises:
        ConfigError: The numbers are not as many as they must be, or not finite.
    """

    class_names: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]
    low: tuple[tuple[float, ...], ...]
    high: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        n = len(FEATURES)
        for key, length in (('weights', n + 1), ('low', n), ('high', n)):
            rows = getattr(self, key)
            if [len(row) for row in rows] != [length] * len(self.class_names) or not all(
                isinstance(v, (int, float)) and np.isfinite(v) for row in rows for v in row
            ):
                raise ConfigError(
                    f'settings: rescoring: {key} is not {length} finite numbers for each of '
                    f'{", ".join(self.class_names)}; find the settings again'
                )

    def apply(self, instances: InstanceSet) -> InstanceSet:
        """Return the instances, in their order, with the probability of being right as score."""
        if not len(instances):
            return instances
        values = features(instances, len(self.class_names))
        scores = self.scores(values, instances.class_ids)
        return replace(instances, scores=scores.astype(np.float32))

    def scores(self, values: Float, class_ids: Int) -> Float:
        """Return the scores of (N, F) features and (N,) classes, (N,) float64."""
        inside = np.clip(values, np.array(self.low)[class_ids], np.array(self.high)[class_ids])
        weights = np.array(self.weights)[class_ids]
        logit: Float = (inside * weights[:, :-1]).sum(axis=1) + weights[:, -1]
        return 1 / (1 + np.exp(-logit))

    @property
    def hash(self) -> str:
        """A short name of these weights."""
        return text_hash(json.dumps(self.to_json(), sort_keys=True))[:8]

    def to_json(self) -> dict[str, JsonValue]:
        """Return what ``inference.json`` holds: names of features, and three rows per class."""
        rows = zip(self.class_names, self.weights, self.low, self.high, strict=True)
        return {
            'features': list(FEATURES),
            'classes': {
                name: {'weights': list(w), 'low': list(low), 'high': list(high)}
                for name, w, low, high in rows
            },
        }


def rescoring_from_json(content: object, class_names: Sequence[str]) -> Rescoring:
    """Read what :meth:`Rescoring.to_json` wrote.

    Raises:
        ConfigError: It is of other features or classes, or damaged.
    """
    if not isinstance(content, dict) or content.get('features') != list(FEATURES):
        raise ConfigError(
            f'settings: rescoring was fitted on other features than {", ".join(FEATURES)}; find '
            'the settings again'
        )
    classes: Mapping[str, Any] = content.get('classes') or {}
    if not isinstance(classes, dict) or set(classes) != set(class_names):
        raise ConfigError(
            f'settings: rescoring has the classes {", ".join(map(str, classes)) or "nothing"}; '
            f'expected {", ".join(class_names)}; find the settings again'
        )
    try:
        rows = {
            key: tuple(tuple(classes[name][key]) for name in class_names)
            for key in ('weights', 'low', 'high')
        }
    except (KeyError, TypeError) as problem:
        raise ConfigError(
            f'settings: rescoring is damaged ({problem}); find the settings again'
        ) from problem
    return Rescoring(tuple(class_names), **rows)


@dataclass(frozen=True, slots=True)
class Rescored:
    """A fusion rule whose answer gets new scores.

    Attributes:
        rule: The rule.
        rescoring: Weights of the new scores.
    """

    name: ClassVar[str] = RESCORED
    rule: Rule
    rescoring: Rescoring

    def merge(self, pool: Pool) -> RuleResult:
        """Fuse a pool, and score what comes out anew."""
        merged = self.rule.merge(pool)
        return replace(merged, instances=self.rescoring.apply(merged.instances))

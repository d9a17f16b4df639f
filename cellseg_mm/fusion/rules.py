"""The fusion rules: how instances of several members become one set.

In: a :class:`~cellseg_mm.fusion.pool.Pool`. Out: :class:`RuleResult`. Each rule is a frozen record
of its parameters; ``FUSION_RULES`` maps names to rules, and one more class with ``register`` above
it is one more rule for every tool. Invariant: nothing depends on the order of the members.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core import rle
from cellseg_mm.core.arrays import Int
from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.fusion import clusters as grouping
from cellseg_mm.fusion import masks
from cellseg_mm.fusion.clusters import Clusters, Pairs
from cellseg_mm.fusion.pool import Pool

Extra = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class RuleResult:
    """What a rule made of a pool.

    Attributes:
        instances: In any order; ``extra`` has ``n_votes``, ``agreement``, ``mask_uncertainty``
            and, where the pool has them, ``mask_probs`` and ``mask_boxes``.
        n_skipped: Instances that the rule did not look at because of its ``min_score``.
        n_from_probs: Masks averaged from probabilities.
        n_from_pixels: Masks averaged by pixel votes.
        n_fallbacks: Averages without a pixel, replaced by the mask of the best instance.
    """

    instances: InstanceSet
    n_skipped: int = 0
    n_from_probs: int = 0
    n_from_pixels: int = 0
    n_fallbacks: int = 0


class Rule(Protocol):
    """One way to fuse.

    Attributes:
        name: What the command line calls it.
    """

    name: ClassVar[str]

    def merge(self, pool: Pool) -> RuleResult:
        """Fuse a pool."""


FUSION_RULES: dict[str, type[Rule]] = {}

# Rules that files of earlier versions may name, and why they are gone.
REMOVED_RULES = {
    'proposal_share': 'it is gone, because it brought +0.012 AP50 where soft_mask brings +0.039'
}

RuleType = TypeVar('RuleType', bound=type)


def register(name: str) -> Callable[[RuleType], RuleType]:
    """Make a dataclass a fusion rule that tools and ``fusion.from_spec`` know as ``name``."""

    def add(rule: RuleType) -> RuleType:
        if name in FUSION_RULES:
            raise ValueError(f'fusion rule {name!r} is registered twice')
        FUSION_RULES[name] = cast('type[Rule]', rule)
        FUSION_RULES[name].name = name
        return rule

    return add


def check_ranges(where: str, record: object, **ranges: tuple[float, float]) -> None:
    """Refuse numeric fields outside their range, ends included.

    Raises:
        ConfigError: A field is no number or outside its range.
    """
    for key, (low, high) in ranges.items():
        value = getattr(record, key)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not low <= value <= high
        ):
            raise ConfigError(f'{where}: {key} is {value!r}; it must be a number in {low}..{high}')


def check_choice(where: str, key: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a word that is not among the choices.

    Raises:
        ConfigError: ``value`` is not in ``choices``.
    """
    if value not in choices:
        raise ConfigError(f'{where}: {key} is {value!r}; choose one of {", ".join(choices)}')


SHARE = (0.0, 1.0)
ABOVE_ZERO = (1e-6, 1.0)


@register('nms')
@dataclass(frozen=True, kw_only=True)
class Nms:
    """Keep the best box; drop boxes of its class that overlap it (the original's ensemble).

    Attributes:
        iou_thr: Boxes with a greater IoU are the same cell.
        class_vote: Compare boxes of all classes; the class with the largest sum of scores wins.
    """

    iou_thr: float = 0.5
    class_vote: bool = False

    def __post_init__(self) -> None:
        check_ranges('fusion nms', self, iou_thr=SHARE)

    def merge(self, pool: Pool) -> RuleResult:
        """Fuse a pool."""
        group = _group(pool, self.class_vote)
        pairs = grouping.box_pairs(pool.instances.boxes_xyxy, group)
        clusters = grouping.suppress(pairs.above(self.iou_thr))
        return RuleResult(_keep_leads(pool, clusters, self.class_vote))


@register('mask_nms')
@dataclass(frozen=True, kw_only=True)
class MaskNms:
    """Keep the best mask; drop masks of its class that overlap it.

    Attributes:
        iou_thr: Masks with a greater IoU are the same cell.
        class_vote: Compare masks of all classes; the class with the largest sum of scores wins.
    """

    iou_thr: float = 0.5
    class_vote: bool = False

    def __post_init__(self) -> None:
        check_ranges('fusion mask_nms', self, iou_thr=SHARE)

    def merge(self, pool: Pool) -> RuleResult:
        """Fuse a pool."""
        pairs = _mask_pairs(pool, _group(pool, self.class_vote))
        clusters = grouping.suppress(pairs.above(self.iou_thr))
        return RuleResult(_keep_leads(pool, clusters, self.class_vote, pairs))


@register('soft_nms')
@dataclass(frozen=True, kw_only=True)
class SoftNms:
    """Lower the scores of boxes that overlap a better one of their class, instead of dropping.

    Attributes:
        method: ``gaussian`` multiplies by exp(-IoU**2 / sigma), ``linear`` by 1 - IoU.
        sigma: Of the Gaussian; smaller is harder.
        iou_thr: ``linear`` weakens boxes with a greater IoU only. In both methods, members that
            have a box with a greater IoU voted for the instance.
        min_score: Instances that fall to this or below are dropped.
    """

    method: Literal['gaussian', 'linear'] = 'gaussian'
    sigma: float = 0.5
    iou_thr: float = 0.5
    min_score: float = 0.001

    def __post_init__(self) -> None:
        check_choice('fusion soft_nms', 'method', self.method, ('gaussian', 'linear'))
        check_ranges('fusion soft_nms', self, sigma=(1e-6, 1e6), iou_thr=SHARE, min_score=SHARE)

    def merge(self, pool: Pool) -> RuleResult:
        """Fuse a pool."""
        group = _group(pool, False)
        pairs = grouping.box_pairs(pool.instances.boxes_xyxy, group)
        close = pairs.above(self.iou_thr)
        if self.method == 'linear':
            pairs, weights = close, 1 - close.iou
        else:
            weights = np.exp(-(pairs.iou**2) / self.sigma)
        scores = grouping.decay_scores(pool.instances.scores, pairs, weights, self.min_score)
        kept = np.flatnonzero(scores > self.min_score)
        chosen = replace(pool.instances[kept], scores=scores[kept].astype(np.float32))
        votes = _neighbour_votes(pool, close)[kept]
        disagreement = None if pool.has_probs else _star_disagreement(pool, close)[kept]
        return RuleResult(_annotate(chosen, votes, pool.n_members, disagreement))


SCORE_TYPES = ('avg', 'max', 'box_and_model_avg', 'absent_model_aware_avg')


@register('wbf')
@dataclass(frozen=True, kw_only=True)
class Wbf:
    """Weighted boxes fusion per class; the masks of a cluster are averaged.

    Attributes:
        iou_thr: A box joins the mean box that it fits best if their IoU is greater.
        score_type: As ``conf_type`` of ensemble-boxes: ``avg``, ``max``, ``box_and_model_avg``,
            ``absent_model_aware_avg``. With n boxes of v of M members and mean score s: ``avg`` is
            s min(n, M) / M, ``box_and_model_avg`` s v / M, ``absent_model_aware_avg``
            s n / (n + M - v).
        allow_overflow: ``avg`` becomes s n / M, at most 1.
        min_score: Instances with a lower score are left out before.
        mask_thr: Least probability, or share of the votes, of a mask's pixel.
        class_vote: Compare boxes of all classes; the class with the largest sum of scores wins.
    """

    iou_thr: float = 0.55
    score_type: Literal['avg', 'max', 'box_and_model_avg', 'absent_model_aware_avg'] = 'avg'
    allow_overflow: bool = False
    min_score: float = 0.0
    mask_thr: float = 0.5
    class_vote: bool = False

    def __post_init__(self) -> None:
        check_choice('fusion wbf', 'score_type', self.score_type, SCORE_TYPES)
        check_ranges('fusion wbf', self, iou_thr=SHARE, min_score=SHARE, mask_thr=ABOVE_ZERO)
        if self.allow_overflow and self.score_type != 'avg':
            raise ConfigError(
                f'fusion wbf: allow_overflow has no effect with score_type {self.score_type}; '
                'remove it, or choose avg'
            )

    def merge(self, pool: Pool) -> RuleResult:
        """Fuse a pool."""
        used = pool.take(pool.instances.scores >= np.float32(self.min_score))
        group = _group(used, self.class_vote)
        clusters, boxes = grouping.weighted_boxes(
            used.instances.boxes_xyxy, used.instances.scores, group, self.iou_thr
        )
        merged = _average(
            used, clusters, boxes, self._scores(used, clusters), self.mask_thr, self.class_vote
        )
        return replace(merged, n_skipped=len(pool) - len(used))

    def _scores(self, pool: Pool, clusters: Clusters) -> NDArray[np.float64]:
        n, n_members = clusters.sizes, pool.n_members
        if self.score_type == 'max':
            return pool.instances.scores[clusters.leads].astype(np.float64)
        total = clusters.sums(pool.instances.scores.astype(np.float64))
        votes = clusters.votes(pool.member_of, n_members)
        if self.score_type == 'box_and_model_avg':
            return total / n * votes / n_members
        if self.score_type == 'absent_model_aware_avg':
            return total / (n + n_members - votes)
        if self.allow_overflow:
            return (total / n_members).clip(max=1)
        scores: NDArray[np.float64] = total / n * np.minimum(n, n_members) / n_members
        return scores


@register('soft_mask')
@dataclass(frozen=True, kw_only=True)
class SoftMask:
    """Link masks across members, average their probabilities, and let the score count the votes.

    The best free instance takes each other member's free instance that overlaps it most. Score:
    mean score of those that agree x members that agree / members, i.e. an absent member counts 0.

    Attributes:
        iou_thr: Masks with a greater IoU may be the same cell. At 0.5 or above, and with members
            whose own masks are disjoint, no instance has two choices.
        mask_thr: Least probability, or share of the votes, of a mask's pixel.
        class_vote: Link masks of all classes; the class with the largest sum of scores wins.
    """

    iou_thr: float = 0.5
    mask_thr: float = 0.5
    class_vote: bool = False

    def __post_init__(self) -> None:
        check_ranges('fusion soft_mask', self, iou_thr=SHARE, mask_thr=ABOVE_ZERO)

    def merge(self, pool: Pool) -> RuleResult:
        """Fuse a pool."""
        pairs = _mask_pairs(pool, _group(pool, self.class_vote))
        clusters = grouping.one_per_member(pairs.above(self.iou_thr), pool.member_of)
        weights = masks.vote_weights(pool.instances.scores)
        boxes = np.stack(
            [clusters.sums(weights * pool.instances.boxes_xyxy[:, k]) for k in range(4)], axis=1
        )
        boxes /= clusters.sums(weights)[:, None]
        scores = clusters.sums(pool.instances.scores.astype(np.float64)) / pool.n_members
        return _average(pool, clusters, boxes, scores, self.mask_thr, self.class_vote, pairs)


def _group(pool: Pool, class_vote: bool) -> Int:
    return np.zeros(len(pool), dtype=np.int64) if class_vote else pool.instances.class_ids


def _mask_pairs(pool: Pool, group: Int) -> Pairs:
    return grouping.mask_pairs(pool.runs, group)


def _voted_classes(pool: Pool, clusters: Clusters) -> Int:
    """Return each cluster's class with the largest sum of scores, the lower of equals."""
    if not len(clusters):
        return np.empty(0, dtype=np.int64)
    class_ids = pool.instances.class_ids
    n_classes = int(class_ids.max()) + 1
    inside = clusters.owner >= 0
    votes = np.bincount(
        clusters.owner[inside] * n_classes + class_ids[inside],
        weights=masks.vote_weights(pool.instances.scores)[inside],
        minlength=len(clusters) * n_classes,
    )
    winners: Int = votes.reshape(-1, n_classes).argmax(axis=1)
    return winners


def _keep_leads(
    pool: Pool, clusters: Clusters, class_vote: bool, pairs: Pairs | None = None
) -> InstanceSet:
    """Return the best instance of each cluster as it is, with what the cluster says about it."""
    chosen = pool.instances[clusters.leads]
    if class_vote:
        chosen = replace(chosen, class_ids=_voted_classes(pool, clusters))
    disagreement = None
    if not pool.has_probs:
        pairs = _mask_pairs(pool, _group(pool, class_vote)) if pairs is None else pairs
        disagreement = masks.mask_disagreement(pairs, clusters)
    votes = clusters.votes(pool.member_of, pool.n_members)
    return _annotate(chosen, votes, pool.n_members, disagreement)


def _annotate(
    chosen: InstanceSet, votes: Int, n_members: int, disagreement: NDArray[np.float32] | None
) -> InstanceSet:
    if disagreement is None:
        disagreement = masks.prob_uncertainty(chosen.extra['mask_probs'])
    return replace(
        chosen,
        extra={
            **chosen.extra,
            'n_votes': votes.astype(np.int64),
            'agreement': (votes / n_members).astype(np.float32),
            'mask_uncertainty': disagreement,
        },
    )


def _neighbour_votes(pool: Pool, close: Pairs) -> Int:
    """Return how many members have the instance itself or one that is paired with it."""
    everyone = np.arange(len(pool))
    of = np.concatenate([everyone, close.first, close.second])
    by = np.concatenate([everyone, close.second, close.first])
    seen = np.unique(of * pool.n_members + pool.member_of[by])
    return np.bincount(seen // pool.n_members, minlength=len(pool))


def _star_disagreement(pool: Pool, close: Pairs) -> NDArray[np.float32]:
    """Return 1 - mean mask IoU of each instance with those that it is paired with."""
    n = len(pool)
    overlap = _mask_pairs(pool, _group(pool, False))
    wanted = close.first * n + close.second
    linked = np.isin(overlap.first * n + overlap.second, wanted)
    total = np.zeros(n)
    for side in (overlap.first, overlap.second):
        total += np.bincount(side[linked], weights=overlap.iou[linked], minlength=n)
    n_pairs = np.bincount(np.concatenate([close.first, close.second]), minlength=n)
    return np.where(n_pairs > 0, 1 - total / np.maximum(n_pairs, 1), 0).astype(np.float32)


def _average(
    pool: Pool,
    clusters: Clusters,
    boxes: NDArray[np.float64],
    scores: NDArray[np.float64],
    mask_thr: float,
    class_vote: bool,
    pairs: Pairs | None = None,
) -> RuleResult:
    """Build instances whose masks are averaged over their clusters; a lone mask stays as it is."""
    kept = _keep_leads(pool, clusters, class_vote, pairs)
    kept = replace(kept, boxes_xyxy=boxes.astype(np.float32), scores=scores.astype(np.float32))
    shared = np.flatnonzero(clusters.sizes > 1)
    part = _only(clusters, shared)
    found, hw = pool.instances.extra, pool.instances.image_hw
    new: dict[str, Extra] = {}
    if pool.has_probs:
        new['mask_probs'], new['mask_boxes'] = masks.average_probs(
            found['mask_probs'], found['mask_boxes'], pool.instances.scores, part
        )
        new['mask_uncertainty'] = masks.prob_uncertainty(new['mask_probs'])
        crops, low = masks.paste_probs(new['mask_probs'], new['mask_boxes'], hw, mask_thr)
    else:
        crops, low = masks.vote_pixels(pool.runs, pool.instances.scores, part, mask_thr)
    filled = np.array([crop.any() for crop in crops], dtype=bool)
    n_averaged = int(filled.sum())
    return RuleResult(
        _with_masks(kept, shared[filled], rle.encode_crops(crops, low, hw), new, filled),
        n_from_probs=n_averaged if pool.has_probs else 0,
        n_from_pixels=0 if pool.has_probs else n_averaged,
        n_fallbacks=len(shared) - n_averaged,
    )


def _with_masks(
    kept: InstanceSet,
    index: Int,
    rles: list[bytes],
    new: dict[str, Extra],
    filled: NDArray[np.bool_],
) -> InstanceSet:
    """Put those of the new masks that are ``filled`` in the place of the masks at ``index``."""
    texts = list(kept.rles)
    for i, text in zip(index.tolist(), itertools.compress(rles, filled), strict=True):
        texts[i] = text
    extra = {key: value.copy() for key, value in kept.extra.items()}
    for key, value in new.items():
        extra[key][index] = value[filled]
    return replace(kept, rles=tuple(texts), extra=extra)


def _only(clusters: Clusters, chosen: Int) -> Clusters:
    """Return the chosen clusters, numbered anew; all other instances are in none."""
    number = np.full(len(clusters) + 1, -1, dtype=np.int64)  # the last place serves -1
    number[chosen] = np.arange(len(chosen))
    return Clusters(number[clusters.owner], clusters.leads[chosen])

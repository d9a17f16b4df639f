"""What happens to a set of instances after fusion, or after one model: overlaps, areas, thresholds.

In: one instance set. Out: the instances that stay, and how many went for which reason. Invariant:
everything is off by default, and an instance that is dropped takes no pixel from another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cellseg_mm.core.disjoint import make_disjoint
from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import InstanceSet, canonical_order
from cellseg_mm.fusion.rules import SHARE, check_ranges

WHERE = 'post-processing'


@dataclass(frozen=True, kw_only=True)
class PostProcess:
    """Parameters; the steps happen in the order of the attributes.

    Attributes:
        score_thr: Least score, one number for all classes or one per class.
        min_votes: Fewest members that agree; needs fused instances.
        disjoint: Give each contested pixel to the higher score.
        max_lost_share: With ``disjoint``, drop instances that lose a greater share of their mask,
            and always those that lose all of it.
        min_area_px: Fewest pixels, after overlaps were resolved.
        max_instances: Most instances per image, best first; 0 means no limit.
    """

    score_thr: tuple[float, ...] = (0.0,)
    min_votes: int = 1
    disjoint: bool = False
    max_lost_share: float = 0.5
    min_area_px: int = 0
    max_instances: int = 0

    def __post_init__(self) -> None:
        given = self.score_thr
        object.__setattr__(
            self, 'score_thr', tuple(given) if isinstance(given, (tuple, list)) else (given,)
        )
        if not self.score_thr:
            raise ConfigError(f'{WHERE}: score_thr is empty; give one number, or one per class')
        for value in self.score_thr:
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not 0 <= value <= 1
            ):
                raise ConfigError(f'{WHERE}: score_thr has {value!r}; it must be a number in 0..1')
        whole = (0, 2**31)
        check_ranges(
            WHERE,
            self,
            max_lost_share=SHARE,
            min_votes=(1, 2**31),
            min_area_px=whole,
            max_instances=whole,
        )


@dataclass(frozen=True, slots=True)
class Dropped:
    """How many instances went, by reason.

    Attributes:
        below_score: Score below its class's threshold.
        few_votes: Fewer members than ``min_votes``.
        lost_overlap: Lost too much of the mask to better instances.
        too_small: Fewer pixels than ``min_area_px``.
        over_limit: Beyond ``max_instances``.
    """

    below_score: int = 0
    few_votes: int = 0
    lost_overlap: int = 0
    too_small: int = 0
    over_limit: int = 0


def postprocess(instances: InstanceSet, post: PostProcess) -> tuple[InstanceSet, Dropped]:
    """Apply the steps that ``post`` asks for.

    Returns:
        The instances that stay, by falling score (equal scores by class, box and RLE), and the
        counts of the others. With ``disjoint``, ``extra['uncut_area']`` holds each mask's pixels
        before overlaps were resolved; boxes and ``mask_probs`` stay as they were.

    Raises:
        ConfigError: ``score_thr`` has several values but none for a class that occurs, or
            ``min_votes`` is set and the instances carry no votes.
    """
    instances = instances[canonical_order(instances)]
    scored = _above_scores(instances, post)
    voted = _with_votes(scored, post)
    shaped, n_lost, n_small = _resolve(voted, post)
    limit = post.max_instances or len(shaped)
    return shaped[:limit], Dropped(
        below_score=len(instances) - len(scored),
        few_votes=len(scored) - len(voted),
        lost_overlap=n_lost,
        too_small=n_small,
        over_limit=max(len(shaped) - limit, 0),
    )


def _above_scores(instances: InstanceSet, post: PostProcess) -> InstanceSet:
    # Compared as float32, which scores are: 0.7 means the same number on both sides.
    table = np.array(post.score_thr, dtype=np.float32)
    if len(table) == 1:
        return instances[instances.scores >= table[0]]
    if len(instances) and (top := int(instances.class_ids.max())) >= len(table):
        raise ConfigError(
            f'{WHERE} of {instances.name}: score_thr has {len(table)} values and the instances '
            f'have class {top + 1}; give one value per class, or one for all'
        )
    return instances[instances.scores >= table[instances.class_ids]]


def _with_votes(instances: InstanceSet, post: PostProcess) -> InstanceSet:
    if post.min_votes == 1:
        return instances
    if 'n_votes' not in instances.extra:
        raise ConfigError(
            f'{WHERE} of {instances.name}: min_votes is {post.min_votes} and the instances carry '
            'no votes; it works on fused instances only; remove it'
        )
    return instances[instances.extra['n_votes'] >= post.min_votes]


def _resolve(instances: InstanceSet, post: PostProcess) -> tuple[InstanceSet, int, int]:
    """Cut overlaps, drop what is too small; return the rest, how many lost, how many small."""
    if not post.disjoint:
        if not post.min_area_px:
            return instances, 0, 0
        large = instances[instances.areas >= post.min_area_px]
        return large, 0, len(instances) - len(large)
    found = make_disjoint(
        instances, max_lost_share=post.max_lost_share, min_area_px=post.min_area_px
    )
    extra = {**found.instances.extra, 'uncut_area': found.uncut_areas}
    return replace(found.instances, extra=extra), found.n_lost, found.n_small

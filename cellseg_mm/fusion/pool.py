"""All members' instances of one image in one order that does not depend on the members' order.

In: M instance sets of one image. Out: :class:`Pool`, best instance first.
Invariant: shuffling the members, or the instances within a member, gives the same pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core import rle
from cellseg_mm.core.arrays import Int
from cellseg_mm.core.errors import PredictionError
from cellseg_mm.core.instances import InstanceSet, canonical_order, concatenate


@dataclass(frozen=True)
class Pool:
    """N instances of M members.

    Attributes:
        instances: Sorted by :func:`canonical_order`. ``extra`` holds ``mask_probs`` and
            ``mask_boxes`` where every member that has instances has probabilities of one size,
            and nothing else.
        member_of: (N,) int64, rank of the member in the canonical order of members.
        n_members: M, members without instances included.
    """

    instances: InstanceSet
    member_of: Int
    n_members: int

    def __len__(self) -> int:
        return len(self.instances)

    @property
    def has_probs(self) -> bool:
        """Whether masks can be averaged as probabilities."""
        return 'mask_probs' in self.instances.extra

    @cached_property
    def runs(self) -> rle.Runs:
        """The runs of all masks, decoded once."""
        return rle.decode_runs(self.instances.rles, self.instances.image_hw)

    def take(self, index: NDArray[np.bool_]) -> Pool:
        """Return the pool of the chosen instances, in their order."""
        return Pool(self.instances[index], self.member_of[index], self.n_members)


def pool_members(members: Sequence[InstanceSet]) -> Pool:
    """Join members; the result is the same for any order of ``members``.

    Raises:
        PredictionError: There is no member, members are of different images, or a score or box is
            not a usable number.
    """
    _check_members(members)
    members = sorted(members, key=_content)
    filled = [_with_frames(member) for member in members if len(member)]
    member_of = np.repeat(np.arange(len(members)), [len(member) for member in members])
    if not filled:
        return Pool(replace(members[0], extra={}), member_of, len(members))
    sides = {m.extra['mask_probs'].shape[1:] if 'mask_probs' in m.extra else () for m in filled}
    if len(sides) > 1 or () in sides:
        filled = [replace(member, extra={}) for member in filled]
    joined = concatenate(filled)
    order = canonical_order(joined, member_of)
    return Pool(joined[order], member_of[order], len(members))


def _check_members(members: Sequence[InstanceSet]) -> None:
    if not members:
        raise PredictionError('fusion: there is no member; at least one is needed')
    first = members[0]
    for number, member in enumerate(members):
        where = f'fusion of {first.name}: member {number}'
        identity = (member.name, member.image_id, member.image_hw)
        expected = (first.name, first.image_id, first.image_hw)
        if identity != expected:
            raise PredictionError(
                f'{where} is of image {identity}, member 0 of {expected}; only predictions of one '
                'image can be fused'
            )
        if not np.isfinite(member.boxes_xyxy).all():
            raise PredictionError(f'{where} has a box that is not finite; remove it')
        if not ((member.scores >= 0) & (member.scores <= 1)).all():
            raise PredictionError(f'{where} has a score outside 0..1; scores are probabilities')


def _content(member: InstanceSet) -> tuple[bytes | tuple[bytes, ...], ...]:
    """Return a sort key that differs whenever two members differ in what they predict."""
    order = canonical_order(member)
    extra = [member.extra[key][order].tobytes() for key in sorted(member.extra)]
    return (
        member.scores[order].tobytes(),
        member.class_ids[order].tobytes(),
        member.boxes_xyxy[order].tobytes(),
        tuple(member.rles[i] for i in order.tolist()),
        *extra,
    )


def _with_frames(member: InstanceSet) -> InstanceSet:
    """Reduce ``extra`` to probabilities with their frames, or to nothing."""
    if 'mask_probs' not in member.extra:
        return replace(member, extra={})
    probs = member.extra['mask_probs']
    frames = np.asarray(member.extra.get('mask_boxes', member.boxes_xyxy), dtype=np.float32)
    if probs.ndim != 3 or probs.shape[1] != probs.shape[2] or frames.shape != (len(member), 4):
        raise PredictionError(
            f'fusion of {member.name}: mask_probs have shape {probs.shape} and mask_boxes '
            f'{frames.shape}; expected (N, S, S) and (N, 4)'
        )
    return replace(member, extra={'mask_probs': probs, 'mask_boxes': frames})

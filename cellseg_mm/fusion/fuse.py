"""Several members' instances of one image become one set.

In: one :class:`~cellseg_mm.core.instances.InstanceSet` per member (a fold's model, or a prediction
file), a rule, and what to do afterwards. Out: one set, best first, whose ``extra`` says how many
members agreed and how unsure each mask is, and a report of everything that was merged or dropped.
Invariant: the result does not depend on the order of the members or of their instances.

The rules are in ``rules``, the steps after them in ``post``; see docs/fusion.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.fusion.masks import paste_probs
from cellseg_mm.fusion.pool import pool_members
from cellseg_mm.fusion.post import PostProcess, postprocess
from cellseg_mm.fusion.rescoring import RESCORED, Rescored
from cellseg_mm.fusion.rules import FUSION_RULES, REMOVED_RULES, Rule

__all__ = [
    'FUSION_RULES',
    'FuseReport',
    'PostProcess',
    'Rule',
    'cut_at',
    'from_spec',
    'fuse',
    'fuse_with_report',
    'paste_probs',
    'post_from_spec',
    'postprocess',
    'to_spec',
]

Record = TypeVar('Record')


@dataclass(frozen=True, slots=True)
class FuseReport:
    """What became of the members' instances; reports of several images add up with ``+``.

    ``n_in`` equals the sum of ``n_skipped``, ``n_merged``, the five reasons and ``n_out``.

    Attributes:
        n_images: Images fused.
        n_in: Instances of all members.
        n_skipped: Left out by the rule's ``min_score`` before fusing.
        n_merged: Joined with, or suppressed by, a better instance.
        n_below_score: Dropped: score below the class's threshold.
        n_few_votes: Dropped: fewer members agreed than ``min_votes``.
        n_lost_overlap: Dropped: lost too much of the mask to better instances.
        n_too_small: Dropped: fewer pixels than ``min_area_px``.
        n_over_limit: Dropped: beyond ``max_instances``.
        n_out: Instances returned.
        n_from_probs: Masks averaged from probabilities, before anything was dropped.
        n_from_pixels: Masks averaged by pixel votes, before anything was dropped.
        n_fallbacks: Averages without a pixel, replaced by the best instance's mask.
    """

    n_images: int = 0
    n_in: int = 0
    n_skipped: int = 0
    n_merged: int = 0
    n_below_score: int = 0
    n_few_votes: int = 0
    n_lost_overlap: int = 0
    n_too_small: int = 0
    n_over_limit: int = 0
    n_out: int = 0
    n_from_probs: int = 0
    n_from_pixels: int = 0
    n_fallbacks: int = 0

    def __add__(self, other: FuseReport) -> FuseReport:
        names = [field.name for field in fields(self)]
        return FuseReport(*(getattr(self, name) + getattr(other, name) for name in names))


def fuse(
    members: Sequence[InstanceSet], rule: Rule, post: PostProcess | None = None
) -> InstanceSet:
    """Fuse members of one image; see :func:`fuse_with_report`."""
    return fuse_with_report(members, rule, post)[0]


def fuse_with_report(
    members: Sequence[InstanceSet], rule: Rule, post: PostProcess | None = None
) -> tuple[InstanceSet, FuseReport]:
    """Fuse members of one image.

    Args:
        members: One set per member, in any order; all of the same image. May be empty sets, which
            count as members that saw nothing. ``extra['mask_probs']`` (N, S, S) float16 with
            frames ``extra['mask_boxes']`` (or the boxes) is used where every member that has
            instances has it, in one size S.
        rule: How; see ``FUSION_RULES`` and :func:`from_spec`.
        post: What to do afterwards; None does nothing.

    Returns:
        The fused set by falling score (equal scores by class, box and RLE), and the counts.
        ``extra``: ``n_votes`` (N,) int64, ``agreement`` (N,) float32 = votes / members,
        ``mask_uncertainty`` (N,) float32 in 0..1: with probabilities the mean of 4 p (1 - p) over
        the frame, else 1 - mean IoU between the masks of the cluster; and ``mask_probs``,
        ``mask_boxes`` where the members have them.

    Raises:
        ConfigError: ``post`` does not fit the instances.
        PredictionError: No member, different images, or unusable numbers.
    """
    pool = pool_members(members)
    merged = rule.merge(pool)
    result, dropped = postprocess(merged.instances, PostProcess() if post is None else post)
    return result, FuseReport(
        n_images=1,
        n_in=len(pool),
        n_skipped=merged.n_skipped,
        n_merged=len(pool) - merged.n_skipped - len(merged.instances),
        n_below_score=dropped.below_score,
        n_few_votes=dropped.few_votes,
        n_lost_overlap=dropped.lost_overlap,
        n_too_small=dropped.too_small,
        n_over_limit=dropped.over_limit,
        n_out=len(result),
        n_from_probs=merged.n_from_probs,
        n_from_pixels=merged.n_from_pixels,
        n_fallbacks=merged.n_fallbacks,
    )


def from_spec(text: str) -> Rule:
    """Read a rule from the command line: ``name`` or ``name:key=value,key=value``.

    Raises:
        ConfigError: The name, a key or a value is not known; the message lists what is.
    """
    name, _, settings = text.strip().partition(':')
    if name in REMOVED_RULES:
        raise ConfigError(f'fusion {text!r}: {REMOVED_RULES[name]}; choose soft_mask instead')
    if name not in FUSION_RULES:
        raise ConfigError(
            f'fusion {text!r}: no rule {name!r}; choose one of {_names(FUSION_RULES)}'
        )
    return _read(FUSION_RULES[name], settings, f'fusion {text!r}')


def cut_at(rule: Rule, mask_thr: float | None) -> Rule:
    """Return the rule with averaged masks cut at ``mask_thr``, as the members' own masks are.

    None changes nothing, nor does a rule that averages no masks or has a threshold of its own.
    """
    default = {field.name: field.default for field in fields(cast('type', rule))}.get('mask_thr')
    if mask_thr is None or default is None or getattr(rule, 'mask_thr', None) != default:
        return rule
    return cast('Rule', replace(cast('Any', rule), mask_thr=mask_thr))


def post_from_spec(text: str) -> PostProcess:
    """Read post-processing from the command line: ``key=value,key=value``.

    A key of a switch may stand alone (``disjoint``); per-class numbers are joined by a slash
    (``score_thr=0.3/0.5/0.5/0.4``).

    Raises:
        ConfigError: A key or a value is not known; the message lists what is.
    """
    return _read(PostProcess, text.strip(), f'post-processing {text!r}')


def to_spec(record: Rule | PostProcess) -> str:
    """Write what :func:`from_spec` or :func:`post_from_spec` reads back; defaults are left out.

    New scores, which only a settings file holds, are named by the hash of their weights.
    """
    if isinstance(record, Rescored):
        return f'{to_spec(record.rule)}, {RESCORED} {record.rescoring.hash}'
    settings = ','.join(
        f'{field.name}={_as_text(getattr(record, field.name))}'
        for field in fields(cast('type', record))
        if getattr(record, field.name) != field.default
    )
    if isinstance(record, PostProcess):
        return settings
    return f'{record.name}:{settings}' if settings else record.name


def _as_text(value: object) -> str:
    if isinstance(value, tuple):
        return '/'.join(str(part) for part in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _names(known: Iterable[str]) -> str:
    return ', '.join(known) or 'nothing'


def _read(record: type[Record], settings: str, where: str) -> Record:
    types = get_type_hints(record)
    known = {field.name: types[field.name] for field in fields(cast('type', record))}
    values: dict[str, object] = {}
    for item in settings.split(',') if settings else ():
        key, equals, value = (part.strip() for part in item.partition('='))
        if key not in known:
            raise ConfigError(f'{where}: no setting {key!r}; known are {_names(known)}')
        if key in values:
            raise ConfigError(f'{where}: {key} is given twice; give it once')
        if not equals and known[key] is bool:
            value = 'true'
        values[key] = _value(value, known[key], f'{where}: {key}')
    return record(**values)


def _value(text: str, kind: object, where: str) -> object:
    if kind is bool:
        if text.lower() not in ('true', 'false'):
            raise ConfigError(f'{where} is {text!r}; write true or false')
        return text.lower() == 'true'
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ConfigError(f'{where} is {text!r}; choose one of {_names(get_args(kind))}')
        return text
    if get_origin(kind) is tuple:
        return tuple(_value(part, get_args(kind)[0], where) for part in text.split('/'))
    try:
        return cast('Callable[[str], object]', kind)(text)
    except ValueError:
        word = 'a whole number' if kind is int else 'a number'
        raise ConfigError(f'{where} is {text!r}; it must be {word}') from None

"""The settings of inference: one record, one file, and what they do to an image's instances.

In: ``inference.json``, which tools/find_best.py writes. Out: :class:`InferenceSettings`, which
ensemble and prediction tools apply. Invariant: a setting in the file is one that was measured out
of fold, or the default, and the file says which.

Two profiles, because two questions have two answers: ``submission`` for AP50, which only loses by
a score threshold, and ``instances`` for counts, exports and PQ, where a pixel has one owner.
``selection_search`` chooses; this module needs nothing of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from cellseg_mm.core import rle
from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.fusion.fuse import (
    PostProcess,
    Rule,
    cut_at,
    from_spec,
    paste_probs,
    post_from_spec,
    postprocess,
    to_spec,
)

VERSION = 1
# Measured on a fold that no member saw (README): +0.039 AP50 over the members' mean, where the
# original's nms brings +0.004.
DEFAULT_FUSION = 'soft_mask'
DEFAULT_MASK_THR = 0.5
Profile = Literal['submission', 'instances']
KEYS = ('score_thr', 'min_area_px', 'mask_thr', 'disjoint', 'tta', 'fusion')


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceSettings:
    """What happens between the models' detections and a result.

    Attributes:
        class_names: K names in order of ``class_id``.
        score_thr: Least score, one per class.
        min_area_px: Fewest pixels, after overlaps were resolved.
        mask_thr: Least probability of a mask's pixel.
        disjoint: Give each contested pixel to the higher score.
        tta: Name of the test-time augmentation, None for none.
        fusion: Rule for several members, as ``fusion.from_spec`` reads it.

    Raises:
        ConfigError: A value is out of range, or ``fusion`` is no rule.
    """

    class_names: tuple[str, ...]
    score_thr: tuple[float, ...]
    min_area_px: int = 0
    mask_thr: float = DEFAULT_MASK_THR
    disjoint: bool = False
    tta: str | None = None
    fusion: str = DEFAULT_FUSION

    def __post_init__(self) -> None:
        if len(self.score_thr) != len(self.class_names):
            raise ConfigError(
                f'settings: {len(self.score_thr)} score thresholds for {len(self.class_names)} '
                'classes; expected one per class; find the settings again'
            )
        if not _is_number(self.mask_thr) or not 0 < self.mask_thr <= 1:
            raise ConfigError(
                f'settings: mask_thr is {self.mask_thr!r}; expected a number above 0, at most 1; '
                'find the settings again'
            )
        if not isinstance(self.disjoint, bool):
            raise ConfigError(
                f'settings: disjoint is {self.disjoint!r}; expected true or false; correct it'
            )
        if self.tta is not None and (not isinstance(self.tta, str) or not self.tta):
            raise ConfigError(f'settings: tta is {self.tta!r}; expected a name or null; correct it')
        if not isinstance(self.fusion, str):
            raise ConfigError(f'settings: fusion is {self.fusion!r}; expected a rule; correct it')
        from_spec(self.fusion)
        _ = self.post

    @property
    def post(self) -> PostProcess:
        """The steps after fusion as a record."""
        return PostProcess(
            score_thr=self.score_thr, disjoint=self.disjoint, min_area_px=self.min_area_px
        )

    def to_json(self) -> dict[str, JsonValue]:
        """Return one profile of ``inference.json``."""
        return {
            'score_thr': dict(zip(self.class_names, self.score_thr, strict=True)),
            'min_area_px': self.min_area_px,
            'mask_thr': self.mask_thr,
            'disjoint': self.disjoint,
            'tta': self.tta,
            'fusion': self.fusion,
        }


def default_settings(profile: Profile, class_names: Sequence[str]) -> InferenceSettings:
    """Return what is used where nothing was measured.

    ``instances`` has the score threshold of docs/scores.md, 0.5, and disjoint masks.
    """
    is_submission = profile == 'submission'
    score_thr = 0.0 if is_submission else 0.5
    return InferenceSettings(
        class_names=tuple(class_names),
        score_thr=(score_thr,) * len(class_names),
        disjoint=not is_submission,
    )


def apply_settings(instances: InstanceSet, settings: InferenceSettings) -> InstanceSet:
    """Cut masks at the threshold, then drop and resolve as the settings say.

    Args:
        instances: One image's detections, of one model or fused.
        settings: What to do; ``tta`` and ``fusion`` happen before and are not looked at.

    Returns:
        The instances that stay, by falling score; see ``fusion.postprocess``.

    Raises:
        ConfigError: The masks must be cut at another threshold than 0.5 and carry no probabilities.
    """
    return postprocess(cut_masks(instances, settings.mask_thr), settings.post)[0]


def cut_masks(instances: InstanceSet, mask_thr: float) -> InstanceSet:
    """Paint masks anew from their probabilities; without a pixel left, an instance is dropped.

    Masks are cut at 0.5 as predicted, so that threshold changes nothing.

    Raises:
        ConfigError: ``mask_thr`` is another and the instances carry no probabilities.
    """
    if mask_thr == DEFAULT_MASK_THR or not len(instances):
        return instances
    if 'mask_probs' not in instances.extra:
        raise ConfigError(
            f'image {instances.name}: masks cannot be cut at {mask_thr} without probabilities; '
            'predict with model.test_cfg.rcnn.keep_mask_probs=True, or use mask_thr 0.5'
        )
    frames = instances.extra.get('mask_boxes', instances.boxes_xyxy)
    crops, low = paste_probs(instances.extra['mask_probs'], frames, instances.image_hw, mask_thr)
    rles = tuple(rle.encode_crops(crops, low, instances.image_hw))
    painted = replace(instances, rles=rles)
    return painted[np.array([bool(crop.any()) for crop in crops], dtype=bool)]


def load_settings(
    path: Path | str, profile: Profile, class_names: Sequence[str]
) -> InferenceSettings:
    """Read one profile of ``inference.json``.

    Args:
        path: The file.
        profile: ``submission`` or ``instances``.
        class_names: Classes of the model; the file must have exactly these.

    Raises:
        ConfigError: The file is missing, damaged, of another version or other classes, or has no
            such profile.
    """
    path = Path(path)
    content = _read(path)
    _check_header(path, content, class_names)
    entry = content['profiles'].get(profile)
    if profile not in get_args(Profile) or not isinstance(entry, dict):
        raise ConfigError(
            f'{path}: has no profile {profile!r}; expected one of {_listed(content["profiles"])}; '
            'choose one of these'
        )
    wrong = sorted(set(KEYS) ^ set(entry))
    if wrong:
        raise ConfigError(
            f'{path}: profile {profile} lacks, or has in addition, {", ".join(wrong)}; expected '
            f'{", ".join(KEYS)}; write it again with tools/find_best.py'
        )
    thresholds = entry['score_thr']
    if not isinstance(thresholds, dict) or set(thresholds) != set(class_names):
        raise ConfigError(
            f'{path}: profile {profile} has score thresholds for {_listed(thresholds)}; expected '
            f'one for each of {", ".join(class_names)}; write it again with tools/find_best.py'
        )
    try:
        return InferenceSettings(
            class_names=tuple(class_names),
            score_thr=tuple(thresholds[name] for name in class_names),
            **{key: entry[key] for key in KEYS if key != 'score_thr'},
        )
    except ConfigError as problem:
        raise ConfigError(f'{path}: profile {profile}: {problem}') from problem


def _read(path: Path) -> dict:
    if not path.is_file():
        raise ConfigError(
            f'{path}: there are no settings; make them with: python tools/find_best.py '
            'configs/*.py, or leave --settings out'
        )
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as problem:
        raise ConfigError(
            f'{path}: cannot be read ({str(problem)[:80]}); expected the settings of '
            'tools/find_best.py; write it again'
        ) from problem
    return content if isinstance(content, dict) else {}


def _check_header(path: Path, content: Mapping, class_names: Sequence[str]) -> None:
    if content.get('version') != VERSION or not isinstance(content.get('profiles'), dict):
        raise ConfigError(
            f'{path}: is no settings file of version {VERSION}; write it again with '
            'tools/find_best.py'
        )
    if content.get('class_names') != list(class_names):
        raise ConfigError(
            f'{path}: is for the classes {_listed(content.get("class_names"))}; the model has '
            f'{", ".join(class_names)}; find the settings of this model'
        )


def _listed(value: object) -> str:
    return ', '.join(map(str, value)) if isinstance(value, (list, dict)) and value else 'nothing'


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """How to fuse.

    Attributes:
        rule: Rule, as on the command line.
        post: Post-processing, as on the command line; '' does nothing.
        mask_thr: Least probability of a mask's pixel, of members and of averages (unless the rule
            has its own); None leaves the members' masks.
        tta: Test-time augmentation of the members; None for none.
    """

    rule: str = DEFAULT_FUSION
    post: str = ''
    mask_thr: float | None = None
    tta: str | None = None

    def __post_init__(self) -> None:
        from_spec(self.rule)
        post_from_spec(self.post)

    @property
    def merging(self) -> Rule:
        """The rule as a record, with averaged masks cut at ``mask_thr``."""
        return cut_at(from_spec(self.rule), self.mask_thr)

    @property
    def post_process(self) -> PostProcess:
        """The post-processing as a record."""
        return post_from_spec(self.post)


def read_settings(
    path: Path | str, class_names: Sequence[str], profile: Profile = 'submission'
) -> Fusion:
    """Read one profile of ``inference.json``, which tools/find_best.py writes.

    Raises:
        ConfigError: The file is missing, of another version, or names other classes.
    """
    settings = load_settings(path, profile, class_names)
    return Fusion(
        rule=settings.fusion,
        post=to_spec(settings.post),
        # Masks are predicted at the default: no probabilities need be kept for it.
        mask_thr=None if settings.mask_thr == DEFAULT_MASK_THR else settings.mask_thr,
        tta=settings.tta,
    )


def choose_fusion(
    *,
    rule: str | None,
    post: str | None,
    tta: str | None,
    settings: Path | str | None,
    class_names: Sequence[str],
    profile: Profile = 'submission',
) -> Fusion:
    """Join a profile of the settings file with what the command line says, which wins.

    Raises:
        ConfigError: See :func:`read_settings`.
    """
    fusion = read_settings(settings, class_names, profile) if settings is not None else Fusion()
    if rule is not None:
        fusion = replace(fusion, rule=rule)
    if tta is not None:
        fusion = replace(fusion, tta=tta)
    return replace(fusion, post=post) if post is not None else fusion

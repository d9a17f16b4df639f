"""The settings of inference: one record, one file, and what they do to an image's instances.

In: ``inference.json``, which tools/find_best.py writes, and options. Out:
:class:`InferenceSettings`, which ensemble and prediction tools apply. Invariant: a setting in the
file is one that was measured out of fold, or the default, and the file says which.

Two profiles, because two questions have two answers: ``submission`` for AP50, which only loses by
a score threshold, and ``instances`` for counts, exports and PQ, where a pixel has one owner.
``selection`` chooses; this module needs nothing of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

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
)
from cellseg_mm.fusion.rescoring import Rescored, Rescoring, rescoring_from_json

VERSION = 1
# Measured on a fold that no member saw (README): +0.039 AP50 over the members' mean, where the
# original's nms brings +0.004.
DEFAULT_FUSION = 'soft_mask'
DEFAULT_MASK_THR = 0.5
Profile = Literal['submission', 'instances']
KEYS = ('score_thr', 'min_area_px', 'mask_thr', 'disjoint', 'tta', 'fusion')
RESCORING = 'rescoring'  # a key that profiles without new scores lack


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceSettings:
    """What happens between the models' detections and a result.

    A profile of ``inference.json`` holds the first six and, if they were worth it, ``rescoring``;
    options can set all but that.

    Attributes:
        score_thr: Least score, one per class, or one for all.
        min_area_px: Fewest pixels, after overlaps were resolved.
        mask_thr: Least probability of a mask's pixel, of members and of averages (unless the rule
            has its own). The default leaves masks as they were predicted.
        disjoint: Give each contested pixel to the higher score.
        tta: Test-time augmentation as on the command line, None for none.
        fusion: Rule for several members, as ``fuse.from_spec`` reads it.
        rescoring: Weights of new scores, made after fusion and before thresholds; None keeps the
            scores. Finished results have them already: ``apply_settings`` makes none.
        min_votes: Fewest members that agree.
        max_lost_share: With ``disjoint``, who loses a greater share of the mask is dropped.
        max_instances: Most instances per image, best first; 0 means no limit.
        class_names: K names in order of ``class_id``; empty where nobody asks for them.

    Raises:
        ConfigError: A value is out of range, or ``fusion`` is no rule.
    """

    score_thr: tuple[float, ...] = (0.0,)
    min_area_px: int = 0
    mask_thr: float = DEFAULT_MASK_THR
    disjoint: bool = False
    tta: str | None = None
    fusion: str = DEFAULT_FUSION
    rescoring: Rescoring | None = None
    min_votes: int = 1
    max_lost_share: float = 0.5
    max_instances: int = 0
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.class_names and len(self.score_thr) not in (1, len(self.class_names)):
            raise ConfigError(
                f'settings: {len(self.score_thr)} score thresholds for {len(self.class_names)} '
                'classes; expected one per class, or one for all; correct their number'
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
    def rule(self) -> Rule:
        """The fusion rule as a record, with averaged masks cut at ``mask_thr``, and new scores."""
        rule = cut_at(from_spec(self.fusion), self.mask_cut)
        return rule if self.rescoring is None else Rescored(rule, self.rescoring)

    @property
    def mask_cut(self) -> float | None:
        """Where masks are cut anew; None where they stay as they were predicted."""
        return None if self.mask_thr == DEFAULT_MASK_THR else self.mask_thr

    @property
    def post(self) -> PostProcess:
        """The steps after fusion as a record."""
        is_one = len(set(self.score_thr)) == 1
        return PostProcess(
            score_thr=self.score_thr[:1] if is_one else self.score_thr,
            min_votes=self.min_votes,
            disjoint=self.disjoint,
            max_lost_share=self.max_lost_share,
            min_area_px=self.min_area_px,
            max_instances=self.max_instances,
        )

    def with_post(self, text: str) -> InferenceSettings:
        """Return the settings with all steps after fusion as ``post_from_spec`` reads them."""
        post = post_from_spec(text)
        return replace(self, **{one.name: getattr(post, one.name) for one in fields(post)})

    def to_json(self) -> dict[str, JsonValue]:
        """Return one profile of ``inference.json``."""
        n_classes = len(self.class_names)
        thresholds = self.score_thr * n_classes if len(self.score_thr) == 1 else self.score_thr
        return {
            'score_thr': dict(zip(self.class_names, thresholds, strict=True)),
            'min_area_px': self.min_area_px,
            'mask_thr': self.mask_thr,
            'disjoint': self.disjoint,
            'tta': self.tta,
            'fusion': self.fusion,
            **({} if self.rescoring is None else {RESCORING: self.rescoring.to_json()}),
        }


def default_settings(profile: Profile, class_names: Sequence[str]) -> InferenceSettings:
    """Return what is used where nothing was measured.

    ``instances`` has the score threshold of docs/scores.md, 0.5, and disjoint masks.
    """
    is_submission = profile == 'submission'
    return InferenceSettings(
        class_names=tuple(class_names),
        score_thr=(0.0 if is_submission else 0.5,) * len(class_names),
        disjoint=not is_submission,
    )


def settings_for_people(
    class_names: Sequence[str], *, path: Path | str | None = None, score_thr: float | None = None
) -> InferenceSettings:
    """Return the settings for what people look at and count: exports, overlays, tables.

    They are applied to finished instances, so that views, rule, masks and scores stay as these have
    them.

    Args:
        class_names: Classes of the model.
        path: ``inference.json``, whose profile ``instances`` is taken; None takes the defaults.
        score_thr: Least score of all classes; None leaves the profile's.

    Raises:
        ConfigError: See :func:`load_settings`; or ``score_thr`` is out of range.
    """
    settings = choose_settings(class_names, path=path, profile='instances')
    settings = replace(settings, mask_thr=DEFAULT_MASK_THR, rescoring=None)
    return settings if score_thr is None else replace(settings, score_thr=(score_thr,))


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
    return settings_of(_read(Path(path)), profile, class_names, where=path)


def curve_of_new_scores(path: Path | str) -> Mapping[str, Any] | None:
    """Return how often new scores were right, as ``selection.rescoring`` wrote it; None without.

    Raises:
        ConfigError: The file is missing or damaged.
    """
    evidence = _read(Path(path)).get('rescoring_evidence') or {}
    curve = (evidence.get('instances') or {}).get('after')
    return curve if isinstance(curve, dict) else None


def settings_of(
    content: Mapping[str, Any], profile: Profile, class_names: Sequence[str], *, where: Path | str
) -> InferenceSettings:
    """Return one profile of what a settings file holds; see :func:`load_settings`."""
    path = Path(where)
    _check_header(path, content, class_names)
    entry = content['profiles'].get(profile)
    if profile not in get_args(Profile) or not isinstance(entry, dict):
        raise ConfigError(
            f'{path}: has no profile {profile!r}; expected one of {_listed(content["profiles"])}; '
            'choose one of these'
        )
    wrong = sorted(set(KEYS) ^ (set(entry) - {RESCORING}))
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
        weights = entry.get(RESCORING)
        return InferenceSettings(
            class_names=tuple(class_names),
            rescoring=None if weights is None else rescoring_from_json(weights, class_names),
            score_thr=tuple(thresholds[name] for name in class_names),
            **{key: entry[key] for key in KEYS if key != 'score_thr'},
        )
    except ConfigError as problem:
        raise ConfigError(f'{path}: profile {profile}: {problem}') from problem


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(
            f'{path}: there are no settings; make them with: python tools/find_best.py '
            'configs/*.py, or do without'
        )
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as problem:
        raise ConfigError(
            f'{path}: cannot be read ({str(problem)[:80]}); expected the settings of '
            'tools/find_best.py; write it again'
        ) from problem
    return content if isinstance(content, dict) else {}


def _check_header(path: Path, content: Mapping[str, object], class_names: Sequence[str]) -> None:
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


def choose_settings(
    class_names: Sequence[str],
    *,
    path: Path | str | None = None,
    content: Mapping[str, Any] | None = None,
    profile: Profile = 'submission',
    fusion: str | None = None,
    post: str | None = None,
    tta: str | None = None,
    most_thr: float | None = None,
) -> InferenceSettings:
    """Join a profile of the settings file with single settings, which win.

    Args:
        class_names: Classes of the model.
        path: ``inference.json``; None takes the profile's defaults.
        content: What such a file held that was packed into a model's, which ``path`` then names.
        profile: ``submission`` or ``instances``.
        fusion: Rule; None leaves the file's.
        post: All steps after fusion; None leaves the file's.
        tta: Test-time augmentation; None leaves the file's.
        most_thr: The file's score thresholds are lowered to it, those of ``post`` are not.

    Raises:
        ConfigError: See :func:`load_settings`; or a setting is none.
    """
    if content is not None:
        settings = settings_of(content, profile, class_names, where=path or 'settings')
    elif path is None:
        settings = default_settings(profile, class_names)
    else:
        settings = load_settings(path, profile, class_names)
    if most_thr is not None:
        lowered = tuple(min(thr, most_thr) for thr in settings.score_thr)
        settings = replace(settings, score_thr=lowered)
    if fusion is not None:
        settings = replace(settings, fusion=fusion)
    if tta is not None:
        settings = replace(settings, tta=tta)
    return settings if post is None else settings.with_post(post)

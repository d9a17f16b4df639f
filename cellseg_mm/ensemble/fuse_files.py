"""From trained folds, or prediction files, to one answer for a set of images.

In: configs with their checkpoints, or prediction files of any origin, and how to fuse. Out: a
prediction file, the submission (test images) or the scores (training images that no member saw),
and a summary of what was merged. Invariant: the same members give the same bytes, in whatever
order they are named and on however many processes they run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cellseg_mm.core import files
from cellseg_mm.core.errors import ConfigError, PredictionError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.layout import ID_MAP, predictions_path, scores_beside
from cellseg_mm.core.progress import track
from cellseg_mm.core.provenance import code_commit, versions
from cellseg_mm.core.trainings import say_once
from cellseg_mm.data.folds import load_folds
from cellseg_mm.data.images import Images
from cellseg_mm.data.labels import read_gt, read_id_map
from cellseg_mm.ensemble.members import (
    Member,
    check_classes,
    clean_members,
    in_order,
    trained_member,
)
from cellseg_mm.fusion.fuse import (
    FuseReport,
    fuse_with_report,
    to_spec,
)
from cellseg_mm.fusion.rescoring import RESCORED
from cellseg_mm.fusion.settings import InferenceSettings, cut_masks
from cellseg_mm.results.predictions import (
    Predictions,
    from_coco_results,
    image_refs,
    load_predictions,
    save_predictions,
)
from cellseg_mm.results.whose import refuse_foreign
from cellseg_mm.scores.score import score

SHOWN = 3


@dataclass(frozen=True, slots=True)
class Merged:
    """What came out.

    Attributes:
        predictions_path: The prediction file.
        members: The members, in the order of their content.
        member_counts: Instances of each member by image name; -1 where it was left out.
        report: What was merged.
        settings: How.
        scores: Headline scores of training images; empty for test images.
    """

    predictions_path: Path
    members: tuple[Member, ...]
    member_counts: Mapping[str, tuple[int, ...]]
    report: FuseReport
    settings: InferenceSettings
    scores: Mapping[str, float] = field(default_factory=dict)


def ensemble_files(
    paths: Sequence[Path | str],
    images: Images,
    settings: InferenceSettings,
    out_dir: Path | str,
    *,
    leave_out_seen: bool = False,
) -> Merged:
    """Fuse prediction files; no model is run.

    Args:
        paths: Prediction files (npz), or COCO results (JSON, or a zip of it), in any order.
        images: What must be in them.
        settings: How to fuse, and what is done afterwards.
        out_dir: Gets ``<split>.predictions.npz`` and, with ground truth, ``<split>.scores.json``.
        leave_out_seen: On training images use only the members that never saw them.

    Raises:
        PredictionError: A file cannot be read, lacks images, or is of other classes or images.
        FoldError: A member has seen, or may have seen, images that would be scored.
        ConfigError: Masks cannot be cut at another threshold; a file was made with another
            augmentation than ``settings.tta``, has new scores already, or would be overwritten.
    """
    rule, post = settings.rule, settings.post
    path = predictions_path(out_dir, images.split)
    if path.resolve() in [Path(one).resolve() for one in paths]:
        raise ConfigError(
            f'{path}: is one of the files to merge, and the result would take its place; give '
            'another folder for it'
        )
    members, sets_of = load_files(paths, images, settings)
    by_name = [{s.name: s for s in sets} for sets in sets_of]
    chosen = _clean(members, images, leave_out_seen=leave_out_seen)
    fused, counts, report = [], {}, FuseReport()
    for case in track(images.cases, description='fuse'):
        indices = chosen[case.name]
        sets = [by_name[i][case.name] for i in indices]
        sets = [cut_masks(s, settings.mask_thr) for s in sets]
        result, part = fuse_with_report(sets, rule, post)
        report += part
        sizes = dict(zip(indices, map(len, sets), strict=True))
        counts[case.name] = tuple(sizes.get(i, -1) for i in range(len(members)))
        fused.append(result.without_probs())
    origin = _provenance(members, images, settings)
    save_predictions(path, Predictions(tuple(fused), origin))
    scores = _score(fused, images, path, origin) if images.split != 'test' else {}
    return Merged(path, tuple(members), counts, report, settings, scores)


def load_files(
    paths: Sequence[Path | str], images: Images, settings: InferenceSettings | None = None
) -> tuple[list[Member], list[tuple[InstanceSet, ...]]]:
    """Read members' prediction files.

    Args:
        paths: The files, in any order.
        images: What must be in them.
        settings: What will be done with them: files must have been made with its test-time
            augmentation, and are not scored anew twice; None does not ask. COCO results do not say.

    Returns:
        Members in the order of their content, and each one's sets in the order of the images.

    Raises:
        PredictionError: A file cannot be read, is given twice, lacks images, has other classes, or
            is not of the checkpoint that counts in its work folder.
        ConfigError: A file was made with another augmentation, or has new scores already.
    """
    loaded = [_load_file(Path(path), images, settings) for path in paths]
    order = in_order([member for member, _ in loaded])
    members = [loaded[i][0] for i in order]
    check_classes(members, images.class_names)
    return members, [loaded[i][1] for i in order]


def clean_sets(
    paths: Sequence[Path | str], images: Images
) -> tuple[list[Member], list[tuple[InstanceSet, ...]]]:
    """Read members none of which saw any of the images; see :func:`load_files`.

    Raises:
        FoldError: A member saw one of the images, or may have.
    """
    members, sets_of = load_files(paths, images)
    _clean(members, images, leave_out_seen=False)
    return members, sets_of


def _load_file(
    path: Path, images: Images, settings: InferenceSettings | None
) -> tuple[Member, tuple[InstanceSet, ...]]:
    """Read one member's file; sets in the order of ``images.cases``."""
    if path.suffix.lower() == '.npz':
        predictions = load_predictions(path)
        refuse_foreign(path, predictions.provenance)
        if not predictions.provenance.get('class_names'):
            say_once(path, 'names no classes; they are taken for those of the config, in its order')
        sets, provenance = _matched(path, predictions, images), predictions.provenance
        if settings is not None:
            _refuse_unfit(path, provenance, settings)
    else:
        refs = image_refs(images.cases)
        if images.split == 'test':  # others predict images of the map that are not here
            refs = image_refs(read_id_map(images.data_root / ID_MAP))
        found = from_coco_results(path, refs, n_classes=len(images.class_names))
        sets, provenance = _matched(path, Predictions(found), images), {}
    trained = {**_trained(provenance), 'class_names': provenance.get('class_names')}
    return trained_member(str(path), files.file_hash(path)[:16], trained), sets


def _refuse_unfit(
    path: Path, provenance: Mapping[str, JsonValue], settings: InferenceSettings
) -> None:
    if settings.tta is not None and provenance.get('tta') != settings.tta:
        made = f'augmentation {provenance["tta"]}' if provenance.get('tta') else 'none'
        raise ConfigError(
            f'{path}: the settings ask for test-time augmentation {settings.tta}, the file was '
            f'made with {made}; no model is run on files; predict again with {settings.tta}, or '
            'choose settings without it'
        )
    if settings.rescoring is not None and RESCORED in str(provenance.get('fusion')):
        raise ConfigError(
            f'{path}: its scores were made anew when it was fused ({provenance["fusion"]}), and '
            'the settings would do it again; give the files from which it was fused, or choose '
            'settings without new scores'
        )


def _trained(provenance: Mapping[str, JsonValue]) -> Mapping[str, object]:
    """Return who made a file: ``trained`` is the checkpoint; without it the fold it is for."""
    if 'trained' in provenance:
        trained = provenance['trained']
        return trained if isinstance(trained, dict) else {}
    if provenance.get('split') == 'val':
        return {key: provenance.get(key) for key in ('fold', 'fold_hash')}
    return {}


def _matched(path: Path, predictions: Predictions, images: Images) -> tuple[InstanceSet, ...]:
    by_name = {s.name: s for s in predictions.sets}
    missing = [case.name for case in images.cases if case.name not in by_name]
    if missing:
        raise PredictionError(
            f'{path}: lacks {len(missing)} of {len(images.cases)} images '
            f'({", ".join(missing[:SHOWN])}); an ensemble needs every member for every image; '
            'predict them, or leave the file out'
        )
    for case in images.cases:
        found = by_name[case.name]
        if (found.image_hw, found.image_id) != (case.image_hw, case.image_id):
            raise PredictionError(
                f'{path}: image {case.name} has size {found.image_hw} and id {found.image_id}, the '
                f'data have {case.image_hw} and {case.image_id}; they must match; predict again'
            )
    return tuple(by_name[case.name] for case in images.cases)


def _clean(
    members: Sequence[Member], images: Images, *, leave_out_seen: bool
) -> dict[str, tuple[int, ...]]:
    names = [case.name for case in images.cases]
    if images.split == 'test':
        return dict.fromkeys(names, tuple(range(len(members))))
    return clean_members(
        members,
        names,
        load_folds(images.folds_path),
        leave_out_seen=leave_out_seen,
        folds_path=images.folds_path,
    )


def _provenance(
    members: Sequence[Member], images: Images, settings: InferenceSettings
) -> dict[str, JsonValue]:
    return {
        'split': images.split,
        'fold': images.fold if images.split == 'val' else None,
        'fold_hash': '' if images.split == 'test' else load_folds(images.folds_path).hash,
        'class_names': list(images.class_names),
        'code_commit': code_commit(),
        'versions': {**versions()},
        'trained': {},
        **settings_origin(settings),
        'members': [member.to_json() for member in members],
    }


def settings_origin(settings: InferenceSettings) -> dict[str, JsonValue]:
    """Return what result files say about how members were fused."""
    return {
        'fusion': to_spec(settings.rule),
        'post': to_spec(settings.post),
        'mask_thr': settings.mask_cut,
        'tta': settings.tta,
    }


def _score(
    sets: Sequence[InstanceSet], images: Images, path: Path, origin: dict[str, JsonValue]
) -> dict[str, float]:
    gt = [read_gt(case) for case in track(images.cases, description='ground truth')]
    groups = load_folds(images.folds_path).groups
    scores = score(gt, sets, images.class_names, groups=groups)
    record = {**scores.to_dict(), 'provenance': origin}
    files.write_json(scores_beside(path), record)
    return scores.headline()

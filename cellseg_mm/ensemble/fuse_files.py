"""From trained folds, or prediction files, to one answer for a set of images.

In: configs with their checkpoints, or prediction files of any origin, and how to fuse. Out: a
prediction file, the submission (test images) or the scores (training images that no member saw),
and a summary of what was merged. Invariant: the same members give the same bytes, in whatever
order they are named and on however many processes they run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from cellseg_mm.core import files
from cellseg_mm.core.errors import CheckpointError, ConfigError, PredictionError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.progress import track
from cellseg_mm.core.provenance import code_commit, versions
from cellseg_mm.data.folds import excluded_by, load_folds
from cellseg_mm.data.labels import Case, find_cases, read_gt, read_id_map
from cellseg_mm.ensemble.members import (
    Member,
    check_classes,
    clean_members,
    in_order,
    trained_member,
)
from cellseg_mm.fusion.fuse import (
    FuseReport,
    PostProcess,
    Rule,
    cut_at,
    from_spec,
    fuse_with_report,
    post_from_spec,
    to_spec,
)
from cellseg_mm.fusion.settings import (
    DEFAULT_FUSION,
    DEFAULT_MASK_THR,
    Profile,
    cut_masks,
    load_settings,
)
from cellseg_mm.results.predictions import (
    Predictions,
    from_coco_results,
    image_refs,
    load_predictions,
    save_predictions,
)
from cellseg_mm.results.submission import (
    DEFAULT_ZIP_NAME,
    Finding,
    lint_submission,
    write_submission,
)
from cellseg_mm.scores.score import score

Split = Literal['test', 'val', 'all']
ID_MAP = 'test_image_name_to_ids.json'
SHOWN = 3
PROBS = ('mask_probs', 'mask_boxes')


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


@dataclass(frozen=True, slots=True)
class Images:
    """The images that are predicted.

    Attributes:
        data_root: Data folder.
        split: ``test``, ``val`` (one fold's held-out images) or ``all`` training images.
        class_names: Names of the classes.
        cases: The images, sorted by name.
        folds_path: The folds file.
        fold: The fold of ``val``.
    """

    data_root: Path
    split: Split
    class_names: tuple[str, ...]
    cases: tuple[Case, ...]
    folds_path: Path
    fold: int | None = None


def find_images(
    data_root: Path | str,
    split: Split,
    class_names: Sequence[str],
    *,
    folds_path: Path | str,
    fold: int | None = None,
) -> Images:
    """Find the images of a split.

    Raises:
        DataError: The data folder has errors.
        FoldError: ``val`` is asked for and the folds are missing, or have no such fold.
    """
    root, classes = Path(data_root), tuple(class_names)
    where = 'test' if split == 'test' else 'train'
    excluded = excluded_by(folds_path)
    cases = find_cases(root, where, len(classes), exclude_names=excluded)
    if split == 'val':
        folds = load_folds(folds_path, [case.name for case in cases])
        wanted = set(folds.val_names(0 if fold is None else fold))
        cases = [case for case in cases if case.name in wanted]
    return Images(root, split, classes, tuple(cases), Path(folds_path), fold)


@dataclass(frozen=True, slots=True)
class Merged:
    """What came out.

    Attributes:
        predictions_path: The prediction file.
        members: The members, in the order of their content.
        member_counts: Instances of each member by image name; -1 where it was left out.
        report: What was merged.
        fusion: How.
        scores: Headline scores of training images; empty for test images.
    """

    predictions_path: Path
    members: tuple[Member, ...]
    member_counts: Mapping[str, tuple[int, ...]]
    report: FuseReport
    fusion: Fusion
    scores: Mapping[str, float] = field(default_factory=dict)


def ensemble_files(
    paths: Sequence[Path | str],
    images: Images,
    fusion: Fusion,
    out_dir: Path | str,
    *,
    leave_out_seen: bool = False,
) -> Merged:
    """Fuse prediction files; no model is run.

    Args:
        paths: Prediction files (npz), or COCO results (JSON, or a zip of it), in any order.
        images: What must be in them.
        fusion: How to fuse.
        out_dir: Gets ``<split>.predictions.npz`` and, with ground truth, ``<split>.scores.json``.
        leave_out_seen: On training images use only the members that never saw them.

    Raises:
        PredictionError: A file cannot be read, lacks images, or is of other classes or images.
        FoldError: A member has seen, or may have seen, images that would be scored.
        ConfigError: The rule needs models, masks cannot be cut at another threshold, or a file was
            made with another augmentation than ``fusion.tta``.
    """
    rule, post = fusion.merging, fusion.post_process
    if rule.needs_models:
        raise ConfigError(
            f'fusion {rule.name}: works on models, not on prediction files; leave --predictions '
            'out, or choose another rule'
        )
    members, sets_of = load_files(paths, images, tta=fusion.tta)
    by_name = [{s.name: s for s in sets} for sets in sets_of]
    chosen = _clean(members, images, leave_out_seen=leave_out_seen)
    fused, counts, report = [], {}, FuseReport()
    for case in track(images.cases, description='fuse'):
        indices = chosen[case.name]
        sets = [by_name[i][case.name] for i in indices]
        if fusion.mask_thr is not None:
            sets = [cut_masks(s, fusion.mask_thr) for s in sets]
        result, part = fuse_with_report(sets, rule, post)
        report += part
        sizes = dict(zip(indices, map(len, sets), strict=True))
        counts[case.name] = tuple(sizes.get(i, -1) for i in range(len(members)))
        kept = {key: value for key, value in result.extra.items() if key not in PROBS}
        fused.append(replace(result, extra=kept))
    path = Path(out_dir) / f'{images.split}.predictions.npz'
    origin = _provenance(members, images, fusion)
    save_predictions(path, Predictions(fused, origin))
    scores = _score(fused, images, path, origin) if images.split != 'test' else {}
    return Merged(path, tuple(members), counts, report, fusion, scores)


def load_files(
    paths: Sequence[Path | str], images: Images, *, tta: str | None = None
) -> tuple[list[Member], list[tuple[InstanceSet, ...]]]:
    """Read members' prediction files.

    Args:
        paths: The files, in any order.
        images: What must be in them.
        tta: Test-time augmentation that they must have been made with; None does not ask. COCO
            results do not say.

    Returns:
        Members in the order of their content, and each one's sets in the order of the images.

    Raises:
        PredictionError: A file cannot be read, is given twice, lacks images, or has other classes.
        ConfigError: A file was made with another augmentation.
    """
    loaded = [_load_file(Path(path), images, tta) for path in paths]
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
    path: Path, images: Images, tta: str | None
) -> tuple[Member, tuple[InstanceSet, ...]]:
    """Read one member's file; sets in the order of ``images.cases``."""
    if path.suffix.lower() == '.npz':
        predictions = load_predictions(path)
        sets, provenance = _matched(path, predictions, images), predictions.provenance
        if tta is not None and provenance.get('tta') != tta:
            made = f'augmentation {provenance["tta"]}' if provenance.get('tta') else 'none'
            raise ConfigError(
                f'{path}: the settings ask for test-time augmentation {tta}, the file was made '
                f'with {made}; no model is run on files; predict again with --tta {tta}, or choose '
                'settings without it'
            )
    else:
        refs = image_refs(images.cases)
        if images.split == 'test':  # others predict images of the map that are not here
            refs = image_refs(read_id_map(images.data_root / ID_MAP))
        found = from_coco_results(path, refs, n_classes=len(images.class_names))
        sets, provenance = _matched(path, Predictions(found), images), {}
    names = provenance.get('class_names') or ()
    trained = {**_trained(provenance), 'class_names': names}
    return trained_member(str(path), files.file_hash(path)[:16], trained), sets


def _trained(provenance: Mapping) -> Mapping:
    """Return who made a file: ``trained`` is the checkpoint; without it the fold it is for."""
    if 'trained' in provenance:
        return provenance['trained'] or {}
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


def _provenance(members: Sequence[Member], images: Images, fusion: Fusion) -> dict:
    return {
        'split': images.split,
        'fold': images.fold if images.split == 'val' else None,
        'fold_hash': '' if images.split == 'test' else load_folds(images.folds_path).hash,
        'class_names': list(images.class_names),
        'code_commit': code_commit(),
        'versions': versions(),
        'trained': {},
        'fusion': to_spec(fusion.merging),
        'post': fusion.post,
        'mask_thr': fusion.mask_thr,
        'tta': fusion.tta,
        'members': [member.to_json() for member in members],
    }


def _score(
    sets: Sequence[InstanceSet], images: Images, predictions_path: Path, origin: dict
) -> dict[str, float]:
    gt = [read_gt(case) for case in track(images.cases, description='ground truth')]
    groups = load_folds(images.folds_path).groups
    scores = score(gt, sets, images.class_names, groups=groups)
    name = predictions_path.name.replace('.predictions.npz', '.scores.json')
    record = {**scores.to_dict(), 'provenance': origin}
    files.write_json(predictions_path.with_name(name), record)
    return scores.headline()


# ---- results ----


@dataclass(frozen=True, slots=True)
class Submitted:
    """The submission and what is to be said about it.

    Attributes:
        path: The zip.
        n_instances: Records in it.
        findings: Of the check, errors first.
        n_without_file: Entries of the id map that have no image file here.
        n_empty_masks: Instances left out because no pixel of their mask is above the threshold.
    """

    path: Path
    n_instances: int
    findings: tuple[Finding, ...]
    n_without_file: int
    n_empty_masks: int


def submit(predictions_path: Path | str, images: Images, out_dir: Path | str) -> Submitted:
    """Write and check the submission of the test images.

    Raises:
        PredictionError: The predictions do not fit the id map.
    """
    id_map = read_id_map(images.data_root / ID_MAP)
    here = {case.name for case in images.cases}
    entries = [entry for entry in id_map if Path(entry.file_name).stem in here]
    sets = load_predictions(predictions_path).sets
    written = write_submission(Path(out_dir) / DEFAULT_ZIP_NAME, sets, entries)
    findings = lint_submission(written.path, id_map, n_classes=len(images.class_names))
    n_without = len(id_map) - len(entries)
    return Submitted(
        written.path, written.n_instances, tuple(findings), n_without, written.n_empty_masks
    )


def summary(merged: Merged) -> str:
    """Return what was merged, for a terminal."""
    report = merged.report
    lines = ['merged:']
    by_fold = sorted(enumerate(merged.members), key=lambda p: (p[1].fold is None, p[1].fold or 0))
    for i, member in by_fold:
        counts = [counts[i] for counts in merged.member_counts.values() if counts[i] >= 0]
        left_out = len(merged.member_counts) - len(counts)
        without = f', left out of {left_out} images' if left_out else ''
        lines.append(f'  {sum(counts)} instances{without}; {member.describe()}')
    how = merged.fusion.rule + (f', then {merged.fusion.post}' if merged.fusion.post else '')
    how += f', masks cut at {merged.fusion.mask_thr}' if merged.fusion.mask_thr else ''
    how += f', test-time augmentation {merged.fusion.tta}' if merged.fusion.tta else ''
    lines.append(f'rule: {how}')
    dropped = {
        'merged with a better one': report.n_merged,
        "below the rule's least score": report.n_skipped,
        'below the score threshold': report.n_below_score,
        'seen by too few': report.n_few_votes,
        'lost to overlap': report.n_lost_overlap,
        'too small': report.n_too_small,
        'over the limit': report.n_over_limit,
    }
    gone = ', '.join(f'{n} {why}' for why, n in dropped.items() if n)
    lines.append(
        f'{report.n_images} images: {report.n_in} instances in, {report.n_out} out'
        + (f' ({gone})' if gone else '')
    )
    if merged.scores:
        shown = ('segm_AP50', 'segm_AP', 'mPQ', 'F1_50')
        lines.append('scores: ' + ', '.join(f'{k} {merged.scores[k]:.4f}' for k in shown))
    lines.append(f'instances: {merged.predictions_path}')
    return '\n'.join(lines)


def submission_text(submitted: Submitted) -> str:
    """Return what is to be said about a submission, for a terminal."""
    lines = [f'{f.severity}: {f.code}: {f.message}' for f in submitted.findings]
    if submitted.n_without_file:
        lines.append(
            f'warning: {submitted.n_without_file} images of the id map have no file here and are '
            'not in the submission'
        )
    left_out = (
        f'; {submitted.n_empty_masks} left out, their masks have no pixel'
        if submitted.n_empty_masks
        else ''
    )
    lines.append(f'submission: {submitted.path} ({submitted.n_instances} instances{left_out})')
    return '\n'.join(lines)


def finish(merged: Merged, images: Images, out_dir: Path | str) -> str:
    """Write the submission of test images and return all that is to be said, for a terminal."""
    text = summary(merged)
    if images.split != 'test':
        return text
    submitted = submit(merged.predictions_path, images, out_dir)
    return (
        f'{text}\n{submission_text(submitted)}\n'
        f'next: python tools/check_submission.py {submitted.path} OTHER.zip --id-map '
        f'{images.data_root / ID_MAP}'
    )


# ---- members ----


def work_dirs_of(config_paths: Sequence[str], work_root: Path | str | None) -> list[Path]:
    """Return the work folder of each config, below ``work_root`` or MMDetection's ``work_dirs``."""
    from cellseg_mm.training.load_config import default_work_dir

    below = [default_work_dir(path).relative_to('work_dirs') for path in config_paths]
    return [Path('work_dirs' if work_root is None else work_root) / path for path in below]


def find_checkpoints(work_dirs: Sequence[Path]) -> list[Path]:
    """Return each fold's best checkpoint.

    Raises:
        CheckpointError: Folds have none; names all of them.
    """
    from cellseg_mm.weights.checkpoints import best_checkpoint

    found, problems = [], []
    for work_dir in work_dirs:
        try:
            found.append(best_checkpoint(work_dir))
        except CheckpointError as problem:
            problems.append(str(problem))
    if len(problems) == 1:
        raise CheckpointError(problems[0])
    if problems:
        raise CheckpointError(
            f'{len(problems)} of {len(work_dirs)} members are missing: ' + '; '.join(problems)
        )
    return found


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

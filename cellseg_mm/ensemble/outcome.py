"""What an ensemble leaves beside its prediction file: submission, exports, and what is said.

In: a merged prediction file. Out: files, records of them, and their text. Invariant: the submission
has what AP is measured on; exports have what people look at and count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cellseg_mm.core.layout import ID_MAP
from cellseg_mm.core.progress import track
from cellseg_mm.data.image_reader import open_image
from cellseg_mm.data.images import Images
from cellseg_mm.data.intensity import recorded_range
from cellseg_mm.data.labels import read_id_map
from cellseg_mm.ensemble.fuse_files import Merged
from cellseg_mm.fusion.fuse import to_spec
from cellseg_mm.fusion.settings import InferenceSettings, apply_settings
from cellseg_mm.results.export import describe
from cellseg_mm.results.formats import OVERLAY, Look, check_words, write_formats
from cellseg_mm.results.predictions import load_predictions
from cellseg_mm.results.submission import DEFAULT_ZIP_NAME, write_submission
from cellseg_mm.results.submission_check import Remark, lint_submission


@dataclass(frozen=True, slots=True, kw_only=True)
class Exports:
    """What to export for people.

    Attributes:
        formats: Words of ``formats.FORMATS`` for every image.
        n_overlays: Pictures of the first so many images, besides.
        settings: Which cells are shown; see ``settings.settings_for_people``.
        look: Names, colours and channel order.

    Raises:
        ConfigError: A format is not known.
    """

    formats: tuple[str, ...] = ()
    n_overlays: int = 0
    settings: InferenceSettings
    look: Look

    def __post_init__(self) -> None:
        check_words(self.formats)


@dataclass(frozen=True, slots=True)
class ExportedFolder:
    """What :func:`write_exports` wrote.

    Attributes:
        folder: Where.
        n_files: How many files.
        settings: Which cells are in them.
        notes: What a format could not express, by image.
    """

    folder: Path
    n_files: int
    settings: InferenceSettings
    notes: Mapping[str, str]

    def describe(self) -> str:
        """Return lines for a terminal."""
        lines = [f'{name}: {note}' for name, note in self.notes.items()]
        shown = to_spec(self.settings.post) or 'all cells'
        return '\n'.join([*lines, f'exports: {self.n_files} files in {self.folder} ({shown})'])


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
    findings: tuple[Remark, ...]
    n_without_file: int
    n_empty_masks: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an ensemble left.

    Attributes:
        images: What was predicted.
        merged: The prediction file and how it came about.
        submitted: The submission; None where the images are not the test images.
        exported: Files for people; None where none were asked for.
    """

    images: Images
    merged: Merged
    submitted: Submitted | None
    exported: ExportedFolder | None


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
    settings = merged.settings
    post, cut = to_spec(settings.post), settings.mask_cut
    how = settings.fusion + (', scores made anew' if settings.rescoring is not None else '')
    how += f', then {post}' if post else ''
    how += f', masks cut at {cut}' if cut else ''
    how += f', test-time augmentation {settings.tta}' if settings.tta else ''
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


def outcome_text(outcome: Outcome) -> str:
    """Return all that is to be said, for a terminal."""
    parts = [outcome.exported.describe()] if outcome.exported is not None else []
    parts.append(summary(outcome.merged))
    if outcome.submitted is not None:
        parts.append(submission_text(outcome.submitted))
    return '\n'.join(parts)


def finish(
    merged: Merged, images: Images, out_dir: Path | str, exports: Exports | None = None
) -> Outcome:
    """Write what follows from a merged prediction file: exports, and test images' submission.

    Args:
        merged: What came out.
        images: The images.
        out_dir: Gets everything.
        exports: What to export; None exports nothing.

    Raises:
        ImageError: An image cannot be read.
        PredictionError: The predictions do not fit the id map.
    """
    exported = write_exports(merged, images, out_dir, exports) if exports is not None else None
    submitted = None
    if images.split == 'test':
        submitted = submit(merged.predictions_path, images, out_dir)
    return Outcome(images, merged, submitted, exported)


def write_exports(
    merged: Merged, images: Images, out_dir: Path | str, exports: Exports
) -> ExportedFolder:
    """Write files that people look at, below ``exports``: cells as ``exports.settings`` have them.

    The prediction file and the submission keep what AP gains by, doubtful and overlapping cells;
    pictures and tables do not show them.

    Raises:
        ImageError: An image cannot be read.
    """
    by_name = {s.name: s for s in load_predictions(merged.predictions_path).sets}
    folder = Path(out_dir) / 'exports'
    value_range = recorded_range(images.data_root, images.folds_path)
    notes: dict[str, str] = {}
    n_files = 0
    for i, case in enumerate(track(images.cases, description='export')):
        words = sorted({*exports.formats, *([OVERLAY] if i < exports.n_overlays else [])})
        if not words:
            continue
        shown = apply_settings(by_name[case.name], exports.settings)
        with open_image(case.image_path, value_range=value_range) as reader:
            files = write_formats(folder, words, shown, reader, exports.look)
        notes[case.name] = describe(files)
        n_files += len(files)
    return ExportedFolder(folder, n_files, exports.settings, {k: v for k, v in notes.items() if v})

"""What an ensemble leaves: submission, summary and the sentence at the end.

In: a merged prediction file. Out: files and text. Invariant: files appear whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cellseg_mm.core.layout import ID_MAP
from cellseg_mm.data.images import Images
from cellseg_mm.data.labels import read_id_map
from cellseg_mm.ensemble.fuse_files import Merged
from cellseg_mm.results.predictions import (
    load_predictions,
)
from cellseg_mm.results.submission import DEFAULT_ZIP_NAME, write_submission
from cellseg_mm.results.submission_check import Finding, lint_submission


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

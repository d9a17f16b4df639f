"""One page about a training: ``report.html``, opened from a file, without network or server.

In: configs of folds, or a work folder. Out: one HTML file that holds everything it shows.
Invariant: every number comes from ``score``; nothing is loaded from elsewhere; texts from
files are escaped; what is missing is named where it would be.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path

from cellseg_mm.core import files
from cellseg_mm.core.files import JsonValue
from cellseg_mm.core.progress import track
from cellseg_mm.ensemble.oof import score_pool
from cellseg_mm.report.inputs import ReportInputs, from_configs, from_work_dir
from cellseg_mm.report.numbers import (
    FoldScores,
    calibration_section,
    confusion_section,
    count_section,
    error_section,
    fold_section,
    overview,
    pr_section,
    score_section,
)
from cellseg_mm.report.parts import Section, colour_css, script_json
from cellseg_mm.report.review import doubt_section, doubts_of, label_error_section
from cellseg_mm.report.training import settings_section, training_section
from cellseg_mm.report.viewer import (
    Album,
    Entry,
    Limits,
    Pictures,
    cell_settings,
    viewer_section,
)
from cellseg_mm.scores.matching import Compared, compare
from cellseg_mm.scores.records import ScoreParams, Scores
from cellseg_mm.scores.score import score

__all__ = ['Limits', 'Written', 'from_configs', 'from_work_dir', 'write_report']

REPORT_FILE = 'report.html'
# Shorter names, so that the list of sections fits two lines.
LINKS = {
    'scores': 'Scores', 'folds': 'Folds', 'pr': 'Precision', 'confusion': 'Confusion',
    'errors': 'Errors', 'calibration': 'Calibration', 'images': 'Images', 'labels': 'Label errors',
    'doubt': 'Disagreement', 'settings': 'Settings',
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Written:
    """What was made.

    Attributes:
        path: The page.
        n_bytes: Its size.
        n_images: Images in the viewer.
        scores: Pooled scores; None when no fold is scored.
        notes: What is missing, one sentence each.
    """

    path: Path
    n_bytes: int
    n_images: int
    scores: Scores | None
    notes: tuple[str, ...]


def write_report(
    inputs: ReportInputs,
    out_path: Path | str,
    *,
    limits: Limits | None = None,
    params: ScoreParams | None = None,
) -> Written:
    """Write the page.

    Args:
        inputs: From :func:`from_configs` or :func:`from_work_dir`.
        out_path: The HTML file.
        limits: How much goes into the page.
        params: Settings of the scores; None = the project's.
    """
    limits = limits or Limits()
    params = params or ScoreParams()
    compared = _compared(inputs)
    scores = _pooled(inputs, params)
    pictures = Pictures(inputs)
    doubts = doubts_of(inputs)
    as_cells = cell_settings(inputs)
    album = Album(inputs, scores, compared, doubts, pictures, as_cells)
    entries = album.entries(limits)
    sections = [
        score_section(inputs, scores),
        fold_section(inputs, _by_fold(inputs, scores, params)),
        training_section(inputs),
        pr_section(inputs, scores),
        confusion_section(inputs, scores),
        error_section(inputs, scores),
        calibration_section(inputs, scores, as_cells.new_scores),
        count_section(inputs, scores),
        viewer_section(album, entries),
        label_error_section(inputs, compared, limits, pictures),
        doubt_section(inputs, doubts, limits, pictures),
        settings_section(inputs),
    ]
    html = page(inputs, overview(inputs, scores), sections, entries)
    files.write_text(out_path, html)
    return Written(Path(out_path), len(html.encode()), len(entries), scores, inputs.notes)


def _compared(inputs: ReportInputs) -> list[Compared]:
    """Compare the pool's images in the order of ``Scores.per_image``."""
    if inputs.pool is None:
        return []
    pairs = zip(inputs.pool.gt_sets, inputs.pool.pred_sets, strict=True)
    rows = sorted(pairs, key=lambda pair: pair[0].image_id)
    return [compare(gt, pred) for gt, pred in track(rows, description='comparing')]


def _pooled(inputs: ReportInputs, params: ScoreParams) -> Scores | None:
    return None if inputs.pool is None else score_pool(inputs.pool, params)


def _by_fold(inputs: ReportInputs, pooled: Scores | None, params: ScoreParams) -> FoldScores:
    pool = inputs.pool
    if pool is None or pooled is None:
        return []
    if len(pool.folds) == 1:
        return [(f'fold {pool.folds[0]}', pooled)]
    result = []
    for fold in track(pool.folds, description='scoring folds'):
        rows = [i for i, f in enumerate(pool.fold_of) if f == fold]
        gt, pred = ([sets[i] for i in rows] for sets in (pool.gt_sets, pool.pred_sets))
        scores = score(gt, pred, pool.class_names, params, groups=pool.groups)
        result.append((f'fold {fold}', scores))
    return result


def page(
    inputs: ReportInputs, top: str, sections: Sequence[Section], entries: Sequence[Entry]
) -> str:
    """Put the page together."""
    links = ''.join(
        f'<li><a href="#{s.anchor}">{escape(LINKS.get(s.anchor, s.title))}</a></li>'
        for s in sections
    )
    data: JsonValue = {'classNames': list(inputs.class_names), 'images': list(entries)}
    parts = {
        'title': escape(inputs.title),
        'css': _asset('report.css') + colour_css(inputs.palette),
        'links': links,
        'top': top,
        'sections': ''.join(section.html() for section in sections),
        'data': script_json(data),
        'js': _asset('viewer.js') + _asset('report.js'),
    }
    # One pass, so that text which came from files is never searched for placeholders.
    return re.sub(r'\{\{(\w+)\}\}', lambda found: parts[found[1]], _asset('report.html'))


def _asset(name: str) -> str:
    return (resources.files('cellseg_mm.report') / 'assets' / name).read_text(encoding='utf-8')

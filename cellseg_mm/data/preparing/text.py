"""What people read after preparing: tables, problems, the next command.

In: a report. Out: text. Invariant: nothing is computed here.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cellseg_mm.core.layout import CONFIG_SCHEME, DATA_REPORT, HOME, REPOSITORY, folds_file
from cellseg_mm.core.text_table import text_table
from cellseg_mm.data.pixel_size import um_text
from cellseg_mm.data.preparing.case_checks import Finding
from cellseg_mm.data.preparing.records import PrepareReport

SHOWN = 5  # names of a group of findings on the screen; the report file has all

SIZE_STEPS_PX = (64, 256, 512, 1024, 2048)  # longer side


def next_command(report: PrepareReport, environment: Mapping[str, str]) -> str:
    """Return what to type next, so that the configs find these data and these folds.

    Args:
        report: Of a data folder without errors.
        environment: Variables that are set now; the configs read two of them.
    """
    root, folds = report.data_root, report.folds_path
    exports = []
    if Path(environment.get('CELLSEG_DATA', 'data')).resolve() != root.resolve():
        exports.append(f'CELLSEG_DATA={shlex.quote(str(root.resolve()))}')
    named = environment.get('CELLSEG_FOLDS', 'auto')
    if folds_file(root, named).resolve() != folds.resolve():
        exports.append(f'CELLSEG_FOLDS={shlex.quote(str(folds.resolve()))}')
    config = 'configs/fold0.py' if HOME == REPOSITORY else f'{CONFIG_SCHEME}fold0.py'
    train = f'python tools/train.py {config}'
    return f'export {" ".join(exports)} && {train}' if exports else train


def full_text(report: PrepareReport) -> str:
    """Return everything: tables, all errors and all warnings, one a line."""
    return _text(report, shown=None)


def screen_text(report: PrepareReport) -> str:
    """Return tables, all errors, and of each kind of warning the count and the first few."""
    return _text(report, shown=SHOWN)


def _text(report: PrepareReport, *, shown: int | None) -> str:
    parts = [_head(report), class_table(report), size_table(report)]
    if report.folds is not None:
        parts += [group_line(report), fold_table(report)]
    parts.append(_warning_text(report.warnings, shown))
    if report.errors:
        lines = '\n'.join(f'  {text}' for text in report.errors)
        parts.append(
            f'{len(report.errors)} error(s); no folds were written. Repair what is named, or list '
            f'its case in exclude.txt:\n{lines}'
        )
    return '\n\n'.join(part for part in parts if part) + '\n'


def _head(report: PrepareReport) -> str:
    n_cells = sum(sum(facts.counts) for facts in report.train)
    line = (
        f'{report.data_root}: {len(report.train)} training cases with {n_cells} cells, '
        f'{len(report.test)} test images, {len(report.excluded)} excluded'
    )
    if report.excluded:
        line += f' ({", ".join(report.excluded)})'
    range_text = '' if report.chosen is None else f'\n{report.chosen.text}'
    size_text = ''
    if report.um_per_px is not None:
        um = um_text(report.um_per_px)
        size_text = f'\nsize of pixels: {um}, recorded for models and results.'
    return f'{line}.{range_text}{size_text}'


def class_table(report: PrepareReport) -> str:
    """Return cells, images and mean size of each class as text."""
    rows = []
    for k, name in enumerate(report.class_names):
        counts = [facts.counts[k] for facts in report.train]
        area = sum(facts.area_sums[k] for facts in report.train)
        n = sum(counts)
        mean = f'{area / n:.0f}' if n else '-'
        rows.append(
            [name, str(n), str(sum(c > 0 for c in counts)), str(max(counts, default=0)), mean]
        )
    return text_table(['class', 'cells', 'images', 'most in one', 'mean px'], rows)


def size_table(report: PrepareReport) -> str:
    """Return how many images there are by their longer side, as text."""
    steps = (0, *SIZE_STEPS_PX)
    names = [f'to {high} px' for high in SIZE_STEPS_PX] + [f'above {SIZE_STEPS_PX[-1]} px']
    columns = []
    for all_facts in (report.train, report.test):
        sides = [max(facts.image_hw) for facts in all_facts]
        columns.append(np.bincount(np.searchsorted(steps[1:], sides), minlength=len(names)))
    rows = [[name, str(a), str(b)] for name, a, b in zip(names, *columns, strict=True)]
    return text_table(['longer side', 'train', 'test'], rows)


def group_line(report: PrepareReport) -> str:
    """Say in one line where the groups come from."""
    rule, n_groups = report.rule, len(set(report.groups.values()))
    sources = []
    if rule.csv_path is not None:
        sources.append(f'{rule.csv_path} (columns {rule.name_column} and {rule.group_column})')
    if rule.regex:
        sources.append(f'the expression {rule.regex!r}')
    if rule.alike:
        sources.append('likeness of images')
    if report.folds is not None and report.folds.method == 'original':
        return 'Groups: none, the original split knows none.'
    return f'Groups: {n_groups} of {len(report.groups)} cases, from {", ".join(sources) or "none"}.'


def fold_table(report: PrepareReport) -> str:
    """Return images, groups and cells of each class in each fold, as text."""
    if report.folds is None:
        return ''
    by_name = {facts.name: facts for facts in report.train}
    rows = []
    for fold, names in enumerate(report.folds.names_by_fold):
        counts = np.array([by_name[name].counts for name in names]).sum(axis=0)
        n_groups = len({report.groups.get(name, f'case:{name}') for name in names})
        rows.append([str(fold), str(len(names)), str(n_groups), *map(str, counts.tolist())])
    return text_table(['fold', 'images', 'groups', *report.class_names], rows)


def _warning_text(warnings: Sequence[Finding], shown: int | None) -> str:
    by_kind: dict[str, list[Finding]] = {}
    for warning in warnings:
        by_kind.setdefault(warning.kind, []).append(warning)
    blocks = []
    for kind, found in by_kind.items():
        lines = [f'Warning, {kind}: {sum(w.count for w in found)} in {len(found)} place(s).']
        lines += [f'  {warning.text}' for warning in found[:shown]]
        if shown is not None and len(found) > shown:
            lines.append(f'  ... and {len(found) - shown} more in {DATA_REPORT}')
        blocks.append('\n'.join(lines))
    return '\n'.join(blocks)

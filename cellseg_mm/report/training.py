"""The report's sections of how the models were made: training curves, settings, versions.

In: :class:`ReportInputs`. Out: :class:`Section` each. Invariant: what a log or a file does not tell
is said, not guessed.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from cellseg_mm.core.provenance import code_commit, machine, versions
from cellseg_mm.report.charts import Axes, Series, chart, legend, thinned
from cellseg_mm.report.inputs import FoldRun, ReportInputs
from cellseg_mm.report.parts import Section, details, figure, grid, lead, nothing, table


def training_section(inputs: ReportInputs) -> Section:
    """Return loss, validation and learning-rate curves of each fold."""
    title = 'Training'
    if not inputs.runs:
        return Section('training', title, nothing('An ensemble folder holds no training logs.'))
    runs = [run for run in inputs.runs if run.log.train]
    if not runs:
        sentence = 'No training log (vis_data/scalars.json) was found in the work folders.'
        return Section('training', title, nothing(sentence))
    text = (
        'Losses are means over the logging interval. A ring marks the checkpoint that was chosen '
        'by its validation score. A run that was resumed is one curve.'
    )
    common = [_common_chart(runs, 'loss', is_val=False), _common_chart(runs, 'segm_mAP_50')]
    folds = ''.join(_fold_curves(run) for run in runs)
    body = lead(text) + grid(*common) + details('Each fold by itself: losses, scores, rates', folds)
    return Section('training', title, body + _lr_figures(runs) + _log_notes(inputs, runs))


def _log_notes(inputs: ReportInputs, runs: Sequence[FoldRun]) -> str:
    notes = [
        f'{run.name}: training was started {run.log.n_runs} times.'
        for run in runs
        if run.log.n_runs > 1
    ]
    notes += [
        f'{run.name}: {run.log.n_bad_lines} log lines could not be read.'
        for run in runs
        if run.log.n_bad_lines
    ]
    without = [run.name for run in inputs.runs if not run.log.train]
    notes += [f'No training log: {", ".join(without)}.'] if without else []
    return ''.join(nothing(note) for note in notes)


def _curve(points: dict[int, float], name: str, colour: int, best: int | None = None) -> Series:
    pairs = list(thinned(points))
    marks: tuple[tuple[float, float, str], ...] = ()
    if best is not None and best in points:
        text = f'{name}: chosen checkpoint, step {best}, {points[best]:.4f}'
        marks = ((best, points[best], text),)
    x, y = [p[0] for p in pairs], [p[1] for p in pairs]
    return Series(name, x, y, f'--s{colour % 8}', colour, marks)


def _common_chart(runs: Sequence[FoldRun], key: str, *, is_val: bool = True) -> str:
    caption = 'Validation, mask AP50' if is_val else 'Training loss'
    curves = [
        _curve(source[key], run.name, i, run.best_step)
        for i, run in enumerate(runs)
        if key in (source := run.log.val if is_val else run.log.train)
    ]
    if not curves:
        return figure(caption, nothing(f'The logs hold no {key}.'))
    axes = Axes(f'{caption} of each fold', 'iteration', 'AP50' if is_val else 'loss')
    return figure(caption, chart(axes, curves), legend(curves))


def _fold_curves(run: FoldRun) -> str:
    losses = sorted(k for k in run.log.train if k.startswith('loss'))
    curves = [_curve(run.log.train[k], k, i) for i, k in enumerate(losses)]
    parts = [
        figure(
            f'{run.name}: losses',
            chart(Axes(f'{run.name}: losses', 'iteration', 'loss'), curves),
            legend(curves),
        )
    ]
    names = {'segm_mAP': 'mask AP', 'segm_mAP_50': 'mask AP50', 'mPQ': 'mPQ+', 'F1_50': 'F1 at 0.5'}
    names |= {'AJI': 'AJI'}
    curves = [
        _curve(run.log.val[k], label, i, run.best_step)
        for i, (k, label) in enumerate(names.items())
        if k in run.log.val
    ]
    if curves:
        axes = Axes(f'{run.name}: validation scores', 'iteration', 'score', y=(0.0, 1.0))
        parts.append(figure(f'{run.name}: validation', chart(axes, curves), legend(curves)))
    else:
        sentence = 'No validation has run yet.'
        parts.append(figure(f'{run.name}: validation', nothing(sentence)))
    return grid(*parts)


def _lr_figures(runs: Sequence[FoldRun]) -> str:
    """Return one chart for all folds with equal rates, one for each other group of folds."""
    same: dict[str, tuple[list[str], FoldRun]] = {}
    for run in runs:
        curves = run.log.lr_curves()
        # A fold that is still training has the beginning of the others' curve.
        key = repr([(name, sorted(points.items())[:3]) for name, points in curves.items()])
        names, longest = same.get(key, ([], run))
        n_steps = len(longest.log.train.get('lr', {}))
        if len(run.log.train.get('lr', {})) > n_steps:
            longest = run
        same[key] = ([*names, run.name], longest)
    parts = []
    for names, run in same.values():
        lines = [_curve(p, name, i) for i, (name, p) in enumerate(run.log.lr_curves().items())]
        caption = f'Learning rate of each parameter group: {", ".join(names)}'
        if not lines:
            parts.append(figure(caption, nothing('The logs hold no learning rate.')))
            continue
        axes = Axes(caption, 'iteration', 'learning rate')
        parts.append(figure(caption, chart(axes, lines), legend(lines)))
    return grid(*parts)


# ---- where it comes from ----

PROVENANCE_ROWS = (
    ('config_hash', 'hash of the settings'), ('checkpoint', 'checkpoint'),
    ('checkpoint_hash', 'hash of the checkpoint'), ('fold_hash', 'hash of the folds'),
    ('data_hash', 'hash of the data'), ('data_root', 'data folder'), ('seed', 'seed'),
    ('commit', 'commit of this code'), ('code_commit', 'commit when scored'),
    ('max_per_img', 'most detections per image'),
)  # fmt: skip


def settings_section(inputs: ReportInputs) -> Section:
    """Return settings, hashes, versions and commit."""
    by_name: dict[str, Mapping[str, Any]] = {}
    if inputs.pool is not None:
        by_name |= {f'fold {fold}': p for fold, p in inputs.pool.provenance.items()}
    if inputs.ensemble is not None:
        by_name['ensemble'] = dict(inputs.ensemble.provenance)
    body = ''
    if by_name:
        rows = [
            [label, *(_fact(p.get(key)) for p in by_name.values())]
            for key, label in PROVENANCE_ROWS
            if any(p.get(key) not in (None, '') for p in by_name.values())
        ]
        rows += _version_rows(by_name)
        body += table(['', *by_name], rows, caption='Where the predictions come from', kind='facts')
    else:
        body += nothing('There are no predictions yet, so there is nothing to trace.')
    for name, record in by_name.items():
        if name == 'ensemble':
            facts = {k: v for k, v in record.items() if k not in ('versions', 'class_names')}
            lines = '\n'.join(f'{key} = {value}' for key, value in facts.items())
            body += details('Settings of the ensemble', f'<pre>{escape(lines)}</pre>')
    for run in inputs.runs:
        body += details(f'Settings of {run.name}', f'<pre>{escape(run.config_text)}</pre>')
    now = datetime.datetime.now(datetime.timezone.utc)
    body += lead(
        f'This page was made on {now:%Y-%m-%d %H:%M} UTC by commit {code_commit() or "unknown"} '
        f'with Python {versions()["python"]} on {machine()}.'
    )
    return Section('settings', 'Settings, data and versions', body)


def _version_rows(by_name: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    packages = sorted({key for p in by_name.values() for key in p.get('versions', {})})
    return [
        [escape(package), *(_fact(p.get('versions', {}).get(package)) for p in by_name.values())]
        for package in packages
    ]


def _fact(value: object) -> str:
    return f'<code>{escape(str(value))}</code>' if value not in (None, '') else '–'

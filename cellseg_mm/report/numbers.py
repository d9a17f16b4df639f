"""The report's sections of numbers: scores, folds, precision, errors, calibration, counts.

In: :class:`ReportInputs` and :class:`Scores`. Out: :class:`Section` each. Invariant: every number
is one of ``score``'s, only rounded; a section without data says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.report.charts import (
    Axes,
    Series,
    bars,
    chart,
    interval_chart,
    legend,
    number,
    stacked_bars,
)
from cellseg_mm.report.inputs import FoldRun, ReportInputs
from cellseg_mm.report.parts import Section, details, figure, grid, lead, nothing, swatch, table
from cellseg_mm.scores.average_precision import RECALL_POINTS, mean_defined
from cellseg_mm.scores.records import Calibration, Scores

PREDICTED_KINDS = ('correct', 'localisation', 'class', 'both', 'duplicate', 'background')
FoldScores = Sequence[tuple[str, Scores]]
Interval = tuple[float, float] | None


def overview(inputs: ReportInputs, scores: Scores | None) -> str:
    """Return the tiles under the page's title, and what the reader must know first."""
    notes = ''.join(f'<li>{escape(note)}</li>' for note in inputs.notes)
    notes = f'<ul class="notes" aria-label="What is missing">{notes}</ul>' if notes else ''
    if scores is None:
        return notes
    headline = scores.headline()
    names = {'segm_AP50': 'mask AP50', 'segm_AP': 'mask AP', 'mPQ': 'mPQ+', 'F1_50': 'F1 at 0.5'}
    names['AJI'] = 'AJI'
    tiles = [
        f'<div class="tile"><dt>{escape(label)}</dt><dd>{number(headline[name])}'
        f'<small>{_span(scores.intervals.get(name))}</small></dd></div>'
        for name, label in names.items()
    ]
    return f'<dl class="tiles">{"".join(tiles)}</dl>{notes}'


def _span(interval: Interval) -> str:
    if interval is None or not all(map(math.isfinite, interval)):
        return ''
    return f'{interval[0]:.3f} to {interval[1]:.3f}'


def _with_span(value: float, interval: Interval) -> str:
    span = _span(interval)
    return number(value) + (f'<small>{span}</small>' if span else '')


def score_section(inputs: ReportInputs, scores: Scores | None) -> Section:
    """Return the table of the pooled scores."""
    title = 'Scores out of fold'
    if scores is None or inputs.pool is None:
        return Section('scores', title, nothing(inputs.why_no_scores))
    pool = inputs.pool
    has = f'fold{"s" if len(pool.folds) > 1 else ""} ' + ', '.join(map(str, pool.folds))
    part = (
        f'all {pool.n_folds} folds'
        if len(pool.folds) == pool.n_folds
        else f'only {has} of {pool.n_folds} (scores of all folds may differ)'
    )
    per_image = scores.per_image
    drawn = f'resampled {scores.interval_unit}'
    if scores.interval_unit == 'groups':
        drawn += f' of images ({scores.n_interval_units} patients or the like)'
    text = (
        f'{len(per_image.names)} images, {per_image.gt_counts.sum()} labelled cells, '
        f'{scores.overlaps.n_detections} detections, from {part}. Each image was predicted by the '
        f'one model that never saw it. Small numbers: 95 % interval over {drawn}. AP '
        f'counts up to {scores.cap} detections per class and image. '
        f'{scores.n_undefined_classes} classes and {scores.n_undefined_images} images have no cell '
        'and are left out of means. Definitions: docs/scores.md.'
    )
    head = ['score', 'mean', *scores.class_names]
    lines = [*_ap_rows(scores), *_count_rows(scores)]
    rows = [[name, mean, *cells] for name, mean, cells in lines]
    chart_rows = _class_intervals(scores)
    charts = grid(
        *(
            figure(f'{label} per class', interval_chart(f'{label} per class', one))
            for label, one in chart_rows.items()
        )
    )
    return Section('scores', title, lead(text) + table(head, rows, caption=title) + charts)


def _ap_rows(scores: Scores) -> list[tuple[str, str, list[str]]]:
    rows = []
    names = {'ap': 'AP', 'ap50': 'AP50', 'ap75': 'AP75'}
    for result, is_main in ((scores.segm, True), (scores.bbox, False)):
        kind = 'mask' if is_main else 'box'
        for attribute, name in names.items():
            key = f'{result.kind}_{name}'
            cells = [
                _with_span(v, scores.intervals.get(f'{key}_{c}'))
                for c, v in zip(scores.class_names, getattr(result, attribute)[:, 0], strict=True)
            ]
            mean = _with_span(float(result.mean(attribute)[0]), scores.intervals.get(key))
            rows.append((f'{kind} {name}', mean, cells))
    result = scores.segm_at_100
    cells = [number(v) for v in result.ap[:, 0]]
    rows.append(('mask AP, first 100 only', number(float(result.mean('ap')[0])), cells))
    return rows


def _count_rows(scores: Scores) -> list[tuple[str, str, list[str]]]:
    spans, first, names = scores.intervals, scores.counted[0], scores.class_names

    def cells(key: str, values: NDArray[np.float64]) -> list[str]:
        pairs = zip(names, values, strict=True)
        return [_with_span(v, spans.get(f'{key}_{c}')) for c, v in pairs]

    rows = [('PQ (mean: mPQ+)', _with_span(scores.mpq, spans.get('mPQ')), cells('PQ', first.pq))]
    for counted in scores.counted:
        key = f'F1_{round(100 * counted.iou_thr)}'
        mean = _with_span(float(mean_defined(counted.f1)), spans.get(key))
        rows.append((f'F1 at IoU {counted.iou_thr:g}', mean, cells(key, counted.f1)))
    rows += [
        (label, number(float(mean_defined(values))), [number(v) for v in values])
        for label, values in (
            ('precision at IoU 0.5', first.precision),
            ('recall at IoU 0.5', first.recall),
            ('SQ, mean IoU of found cells', first.sq),
        )
    ]
    blank = [''] * len(names)
    for detected in scores.detected:
        key = f'F1_{round(100 * detected.iou_thr)}_detection'
        label = f'F1 at IoU {detected.iou_thr:g}, any class'
        rows.append((label, _with_span(float(detected.f1[0]), spans.get(key)), blank))
    rows.append(('AJI', _with_span(scores.aji, spans.get('AJI')), blank))
    return rows


def _class_intervals(scores: Scores) -> dict[str, list[tuple[str, float, float, float, str]]]:
    undefined = (math.nan, math.nan)
    sources = {
        'mask AP': ('segm_AP', scores.segm.ap[:, 0]),
        'PQ': ('PQ', scores.counted[0].pq),
        'F1 at IoU 0.5': ('F1_50', scores.counted[0].f1),
    }
    return {
        label: [
            (name, float(v), *scores.intervals.get(f'{key}_{name}', undefined), f'--c{k}')
            for k, (name, v) in enumerate(zip(scores.class_names, values, strict=True))
        ]
        for label, (key, values) in sources.items()
    }


def fold_section(inputs: ReportInputs, fold_scores: FoldScores) -> Section:
    """Return the folds side by side."""
    title = 'Folds side by side'
    if not inputs.runs:
        return Section('folds', title, nothing('This folder holds an ensemble, not single folds.'))
    by_name = dict(fold_scores)
    head = ['fold', 'images', 'cells', 'mask AP', 'AP50', 'mPQ+', 'F1 at 0.5', 'AJI']
    head += [f'PQ {name}' for name in inputs.class_names] + ['chosen checkpoint', 'folder']
    rows = [_fold_row(run, by_name.get(run.name), len(head)) for run in inputs.runs]
    body = lead(
        'One model per fold, each scored on the images it never saw. Folds hold different images, '
        'so differences between folds are mostly differences between images.'
    ) + table(head, rows, caption=title)
    if by_name:
        body += grid(
            *(
                figure(
                    f'{label} by fold',
                    interval_chart(f'{label} by fold', _fold_spans(by_name, key)),
                )
                for key, label in (('segm_AP50', 'mask AP50'), ('mPQ', 'mPQ+'))
            )
        )
    return Section('folds', title, body)


def _fold_row(run: FoldRun, scores: Scores | None, n_columns: int) -> list[str]:
    end = [escape(run.best_name or '–'), f'<code>{escape(str(run.work_dir))}</code>']
    if scores is None:
        return [escape(run.name), *['–'] * (n_columns - 3), *end]
    headline = scores.headline()
    names = ('segm_AP', 'segm_AP50', 'mPQ', 'F1_50', 'AJI')
    return [
        escape(run.name),
        str(len(scores.per_image.names)),
        str(int(scores.per_image.gt_counts.sum())),
        *(_with_span(headline[name], scores.intervals.get(name)) for name in names),
        *(number(v) for v in scores.counted[0].pq),
        *end,
    ]


def _fold_spans(by_name: dict[str, Scores], key: str) -> list[tuple[str, float, float, float, str]]:
    undefined = (math.nan, math.nan)
    return [
        (name, s.headline()[key], *s.intervals.get(key, undefined), f'--s{i % 8}')
        for i, (name, s) in enumerate(by_name.items())
    ]


# ---- what is right and wrong ----


def pr_section(inputs: ReportInputs, scores: Scores | None) -> Section:
    """Return precision over recall at IoU 0.5 per class."""
    title = 'Precision and recall'
    if scores is None:
        return Section('pr', title, nothing(inputs.why_no_scores))
    curves, undefined = [], []
    thr = scores.params.pq_score_thr
    for k, name in enumerate(scores.class_names):
        y = scores.segm.curve50[k]
        if np.isnan(y).all():
            undefined.append(name)
            continue
        reached = np.flatnonzero(scores.segm.curve50_scores[k] >= thr)
        marks: tuple[tuple[float, float, str], ...] = ()
        if len(reached):
            i = int(reached[-1])
            text = f'{name}: recall {RECALL_POINTS[i]:.2f}, precision {y[i]:.3f} at score {thr:g}'
            marks = ((float(RECALL_POINTS[i]), float(y[i]), text),)
        label = f'{name}, AP50 {scores.segm.ap50[k, 0]:.3f}'
        curves.append(Series(label, RECALL_POINTS.tolist(), y.tolist(), f'--c{k}', k, marks))
    text = (
        'Interpolated precision at mask IoU 0.5. The area under a curve is its AP50. A ring marks '
        f'score {thr:g}, from which on predictions are counted as cells.'
    )
    notes = ''.join(nothing(f'{name}: no labelled cell, so no curve.') for name in undefined)
    if not curves:
        return Section('pr', title, lead(text) + notes)
    axes = Axes('Precision over recall per class', 'recall', 'precision', (0, 1), (0, 1))
    body = grid(figure('Mask IoU 0.5', chart(axes, curves), legend(curves)))
    return Section('pr', title, lead(text) + body + notes)


def confusion_section(inputs: ReportInputs, scores: Scores | None) -> Section:
    """Return the confusion matrix with counts and shares of rows."""
    title = 'Confusion matrix'
    if scores is None:
        return Section('confusion', title, nothing(inputs.why_no_scores))
    names = scores.class_names
    rows = []
    for r, counts in enumerate(scores.confusion.tolist()):
        total = sum(counts)
        cells = [
            # bottom right does not exist: nothing that is nothing
            '' if r == c == len(names) else _heat(count, total, is_hit=r == c)
            for c, count in enumerate(counts)
        ]
        label = swatch(r, names[r]) if r < len(names) else 'no cell there'
        rows.append([label, *cells, str(total)])
    text = (
        'Rows: what the label says. Columns: what was predicted there, at mask IoU of at least 0.5 '
        f'and score of at least {scores.params.pq_score_thr:g}. Large: number of cells. Small: '
        'share of the row.'
    )
    head = ['label \\ predicted', *names, 'missed', 'sum']
    return Section('confusion', title, lead(text) + table(head, rows, caption=title))


def _heat(count: int, total: int, *, is_hit: bool) -> str:
    share = count / total if total else 0.0
    kind = 'hit' if is_hit else 'miss'
    return (
        f'<span class="heat {kind}" style="--share:{share:.3f}"><b>{count}</b>'
        f'<small>{100 * share:.0f} %</small></span>'
    )


def error_section(inputs: ReportInputs, scores: Scores | None) -> Section:
    """Return the error breakdown by class and by size."""
    title = 'Errors by class and size'
    if scores is None:
        return Section('errors', title, nothing(inputs.why_no_scores))
    names = scores.error_names
    kinds = [names.index(kind) for kind in PREDICTED_KINDS]
    low, high = scores.params.cell_area_edges
    sizes = (f'< {low:g} px', f'{low:g}–{high:g} px', f'≥ {high:g} px')
    by_class = [
        (name, scores.errors[kinds, k].sum(axis=1).tolist())
        for k, name in enumerate(scores.class_names)
    ]
    by_size = [
        (name, scores.errors[kinds, :, s].sum(axis=1).tolist()) for s, name in enumerate(sizes)
    ]
    key = ''.join(
        f'<li><span class="swatch" style="background:var(--e{e})"></span>{kind}</li>'
        for e, kind in enumerate(PREDICTED_KINDS)
    )
    key = f'<ul class="legend">{key}</ul>'
    charts = grid(
        figure('Predictions by class', stacked_bars('Predictions', by_class, PREDICTED_KINDS), key),
        figure('Predictions by size', stacked_bars('Predictions', by_size, PREDICTED_KINDS), key),
    )
    rows = [
        [
            f'{swatch(k, name)}<small>{escape(size)}</small>',
            *(str(int(v)) for v in scores.errors[:, k, s]),
        ]
        for k, name in enumerate(scores.class_names)
        for s, size in enumerate(sizes)
    ]
    rows += [
        [f'<b>{name}, all sizes</b>', *(str(int(v)) for v in scores.errors[:, k].sum(axis=1))]
        for k, name in enumerate(map(escape, scores.class_names))
    ]
    head = ['class, area', 'labelled', *names[1:]]
    text = (
        f'Predictions with score of at least {scores.params.pq_score_thr:g}. Localisation: right '
        'class, IoU below 0.5. Class: right place, other class. Both: neither quite. Duplicate: '
        'the cell was found already. Background: nothing labelled there. Missed: labels that no '
        'prediction explains. Totals stand right of the bars.'
    )
    return Section('errors', title, lead(text) + charts + table(head, rows, caption=title))


def calibration_section(
    inputs: ReportInputs, scores: Scores | None, new_scores: Calibration | None = None
) -> Section:
    """Return scores against the share that is right.

    Args:
        inputs: Says why there are no scores.
        scores: Pooled out-of-fold scores, of detections as predicted.
        new_scores: Of new scores, on images that took no part in the fit; None draws one line.
    """
    title = 'Do scores mean what they say?'
    if scores is None:
        return Section('calibration', title, nothing(inputs.why_no_scores))
    c = scores.calibration
    if not c.n.sum():
        return Section('calibration', title, nothing('There are no detections.'))
    titles = tuple(
        f'score {a:.1f} to {b:.1f}: {n} detections, {100 * s:.0f} % right'
        for a, b, n, s in zip(c.edges[:-1], c.edges[1:], c.n, c.share_right, strict=True)
    )
    x, y = c.mean_score.tolist(), c.share_right.tolist()
    line = Series('as predicted', x, y, '--s0')
    dots = Series('', x, y, '--s0', as_points=True, titles=titles)
    axes = Axes('Share of right detections by score', 'score', 'share right', (0, 1), (0, 1))
    axes = Axes(axes.title, axes.x_label, axes.y_label, axes.x, axes.y, diagonal=True)
    n_axes = Axes('Number of detections by score', 'score', 'log10(1 + n)', x=(0, 1))
    logs = np.log10(1 + c.n).tolist()
    text = (
        'A detection is right when it is matched at mask IoU 0.5 within its class. On the diagonal '
        f'a score is a probability. Mean distance, weighted by detections: {c.gap:.3f}.'
    )
    lines = [line, dots]
    if new_scores is not None:
        text += (
            ' New scores are what cells and exports carry; here each was made for an image that '
            f'took no part in the fit. Mean distance: {new_scores.gap:.3f}.'
        )
        x, y = new_scores.mean_score.tolist(), new_scores.share_right.tolist()
        lines.append(Series('new scores', x, y, '--s1', dash=1))
    body = grid(
        figure('Share right by score', chart(axes, lines), legend(lines[::2])),
        figure('How many detections have that score', bars(n_axes, c.edges, logs, '--s0')),
    )
    return Section('calibration', title, lead(text) + body)


def count_section(inputs: ReportInputs, scores: Scores | None) -> Section:
    """Return predicted against labelled numbers per image and class."""
    title = 'Counts'
    if scores is None or inputs.pool is None:
        return Section('counts', title, nothing(inputs.why_no_scores))
    p = scores.per_image
    series = [
        Series(
            name,
            p.gt_counts[:, k].tolist(),
            p.pred_counts[:, k].tolist(),
            f'--c{k}',
            as_points=True,
            titles=tuple(
                f'{image}: {g} labelled, {n} predicted'
                for image, g, n in zip(p.names, p.gt_counts[:, k], p.pred_counts[:, k], strict=True)
            ),
        )
        for k, name in enumerate(scores.class_names)
    ]
    charts = []
    for one in series:
        top = 1.15 * max(1, *one.x, *one.y)
        axes = Axes(f'{one.name}: counts per image', 'labelled', 'predicted', (0, top), (0, top))
        axes = Axes(axes.title, axes.x_label, axes.y_label, axes.x, axes.y, log=True, diagonal=True)
        charts.append(figure(f'{one.name}: each image', chart(axes, [one])))
    fold_of = {s.name: f for s, f in zip(inputs.pool.pred_sets, inputs.pool.fold_of, strict=True)}
    text = (
        f'Predictions with score of at least {scores.params.pq_score_thr:g} after overlaps were '
        'resolved, against labels. Axes are logarithmic; on the dashed line both agree.'
    )
    body = lead(text) + _count_summary(scores) + grid(*charts)
    return Section(
        'counts',
        title,
        body + details(f'All {len(p.names)} images', _count_table(scores, fold_of)),
    )


def _count_summary(scores: Scores) -> str:
    p = scores.per_image
    rows = []
    for k, name in enumerate(scores.class_names):
        gt, pred = p.gt_counts[:, k], p.pred_counts[:, k]
        ratio = pred.sum() / gt.sum() if gt.sum() else math.nan
        rows.append(
            [
                swatch(k, name),
                str(gt.sum()),
                str(pred.sum()),
                number(ratio, 2),
                number(float(np.abs(pred - gt).mean()), 1),
            ]
        )
    head = ['class', 'labelled', 'predicted', 'predicted / labelled', 'mean difference per image']
    return table(head, rows, caption='Counts by class')


def _count_table(scores: Scores, fold_of: dict[str, int]) -> str:
    p = scores.per_image
    order = np.argsort(-np.abs(p.pred_counts - p.gt_counts).sum(axis=1), kind='stable')
    rows = []
    for i in order.tolist():
        pairs = zip(p.pred_counts[i].tolist(), p.gt_counts[i].tolist(), strict=True)
        rows.append(
            [
                escape(p.names[i]),
                str(fold_of[p.names[i]]),
                *(f'{pred} / {gt}' for pred, gt in pairs),
                number(p.pq[i]),
                number(p.f1_50[i]),
                number(p.aji[i]),
            ]
        )
    head = ['image', 'fold', *(f'{n}: predicted / labelled' for n in scores.class_names)]
    head += ['PQ', 'F1', 'AJI']
    return table(head, rows, caption='Counts and scores of each image', sortable=True)

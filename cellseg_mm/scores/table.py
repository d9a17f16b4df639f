"""Scores as a compact text table, the same for the same scores.

In: :class:`Scores`. Out: text. Invariant: what was left out of a number is said beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cellseg_mm.core.arrays import Float
from cellseg_mm.core.text_table import text_table
from cellseg_mm.scores.average_precision import ApTable, mean_defined
from cellseg_mm.scores.records import Scores

Row = tuple[str, Sequence[float], str]  # name, mean and a value a class, interval


def score_table(scores: Scores) -> str:
    """Return AP (cap shown, 100 beside it), PQ, F1, AJI, the errors and what was left out."""
    blocks = [_facts(scores), _ap_block(scores), _count_block(scores), _error_block(scores)]
    return '\n\n'.join(blocks)


def _facts(scores: Scores) -> str:
    per_image, overlaps, params = scores.per_image, scores.overlaps, scores.params
    lines = [
        f'{len(per_image.names)} images, {per_image.gt_counts.sum()} cells, '
        f'{overlaps.n_detections} detections (at most {per_image.n_detections.max()} in one image)',
        f'undefined (nan, left out of means): {scores.n_undefined_classes} classes without cells; '
        f'{scores.n_undefined_images} images without cells',
        f'PQ, AJI, F1, errors: score >= {params.pq_score_thr:g} '
        f'({overlaps.n_below_score} below); PQ, AJI, F1 on disjoint masks '
        f'({overlaps.n_cut} cut, {overlaps.n_dropped} dropped with < {params.min_left_px} px left)',
    ]
    if scores.intervals:
        together = ' (the images of a group together)' if scores.interval_unit == 'groups' else ''
        lines.append(
            f'intervals: 95 %, {params.n_bootstrap} resamples of {scores.n_interval_units} '
            f'{scores.interval_unit}{together}'
        )
    return '\n'.join(lines)


def _ap_block(scores: Scores) -> str:
    rows: list[Row] = []
    for table, at_100 in ((scores.segm, scores.segm_at_100), (scores.bbox, scores.bbox_at_100)):
        rows += _ap_rows(scores, table, is_main=True)
        rows += _ap_rows(scores, at_100, is_main=False)
    areas = scores.segm.area_names[1:]
    for a, name in enumerate(areas, start=1):
        values = [scores.segm.mean('ap')[a], *scores.segm.ap[:, a]]
        rows.append((f'segm AP {name} @{scores.cap}', values, ''))
    title = f'AP at cap {scores.cap} detections per class and image'
    return _grid([title, 'mean', *scores.class_names], rows)


def _ap_rows(scores: Scores, table: ApTable, *, is_main: bool) -> list[Row]:
    names = (
        {'ap': 'AP', 'ap50': 'AP50', 'ap75': 'AP75'} if is_main else {'ap': 'AP', 'ap50': 'AP50'}
    )
    rows: list[Row] = []
    for attribute, name in names.items():
        values = getattr(table, attribute)[:, 0]
        interval = scores.intervals.get(f'{table.kind}_{name}') if is_main else None
        label = f'{table.kind} {name} @{table.cap}' + ('' if is_main else ' (conventional)')
        rows.append((label, [table.mean(attribute)[0], *values], _interval(interval)))
    return rows


def _count_block(scores: Scores) -> str:
    first = scores.counted[0]
    rows: list[Row] = [
        ('PQ (mean: mPQ+)', [scores.mpq, *first.pq], _interval(scores.intervals.get('mPQ'))),
        ('SQ', _with_mean(first.sq), ''),
        ('DQ', _with_mean(first.f1), ''),
    ]
    for counted in scores.counted:
        name = f'F1_{round(100 * counted.iou_thr)}'
        rows.append((name, _with_mean(counted.f1), _interval(scores.intervals.get(name))))
    for detected in scores.detected:
        name = f'F1_{round(100 * detected.iou_thr)}_detection'
        label = name.replace('_detection', ' any class')
        rows.append((label, [detected.f1[0]], _interval(scores.intervals.get(name))))
    rows.append(('AJI pooled', [scores.aji], _interval(scores.intervals.get('AJI'))))
    rows.append(('AJI mean of images', [scores.aji_image_mean], ''))
    return _grid(['pooled over images, IoU > threshold', 'mean', *scores.class_names], rows)


def _error_block(scores: Scores) -> str:
    totals = scores.errors.sum(axis=2)  # (E, K)
    rows: list[Row] = [
        (name, [totals[e].sum(), *totals[e]], '') for e, name in enumerate(scores.error_names)
    ]
    return _grid(['errors (counts)', 'sum', *scores.class_names], rows)


def _grid(head: Sequence[str], rows: Sequence[Row]) -> str:
    cells = [[name, *map(_number, values)] for name, values, _ in rows]
    return text_table(head, cells, least_width=10, notes=[note for _, _, note in rows])


def _number(value: float) -> str:
    return str(int(value)) if isinstance(value, int | np.integer) else f'{value:.4f}'


def _with_mean(values: Float) -> list[float]:
    return [float(mean_defined(values)), *values.tolist()]


def _interval(interval: tuple[float, float] | None) -> str:
    return '' if interval is None else f'[{interval[0]:.3f}, {interval[1]:.3f}]'

"""Charts as inline SVG text, without any library.

In: numbers. Out: one ``<svg>`` each, sized by its viewBox, coloured by CSS variables of the page
(``--c0`` ... for classes, ``--s0`` ... for series), so that one chart serves light and dark.
Invariant: every text is escaped, and every value is written with few digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 420, 270  # at 390 px wide screens a 12-unit letter is about 10 px
MOST_POINTS = 400  # of one curve
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 12, 40
FEW_POINTS = 12  # a line through fewer values shows them
DASHES = ('', '7 3', '2 3', '9 3 2 3', '12 4', '4 2 1 2', '1 4', '6 6')


@dataclass(frozen=True, slots=True)
class Series:
    """One line or cloud of points.

    Attributes:
        name: For the legend and for readers who do not see it.
        x: (N,) values.
        y: (N,) values; NaN breaks the line.
        colour: CSS variable, for example ``--c0``.
        dash: Index into ``DASHES``, so that colour is not the only difference.
        marks: (x, y, text) of points that are marked and named.
        as_points: Draw points, not a line.
        titles: (N,) texts shown when a point is pointed at.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    dash: int = 0
    marks: tuple[tuple[float, float, str], ...] = ()
    as_points: bool = False
    titles: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Axes:
    """Data ranges and names of a chart.

    Attributes:
        title: Read out for the chart, and shown above it.
        x_label: Under the chart.
        y_label: Above the axis.
        x: Lowest and highest x; None = from the data.
        y: Lowest and highest y; None = from the data.
        log: Both axes as log(1 + value), for counts.
        diagonal: Draw the line y = x.
    """

    title: str
    x_label: str
    y_label: str
    x: tuple[float, float] | None = None
    y: tuple[float, float] | None = None
    log: bool = False
    diagonal: bool = False


def number(value: float, digits: int = 3) -> str:
    """Return a value for people; an en dash where it is undefined."""
    if value is None or not math.isfinite(value):
        return '–'
    if isinstance(value, int | np.integer):
        return str(int(value))
    return f'{value:.{digits}f}'


def _short(value: float) -> str:
    if value != 0 and abs(value) < 1e-3:
        mantissa, exponent = f'{value:.2e}'.split('e')
        return f'{float(mantissa):g}e{int(exponent)}'
    text = f'{value:.6g}'
    return text.removesuffix('000') + 'k' if text.endswith('000') and len(text) > 4 else text


def ticks(low: float, high: float, n: int = 5) -> list[float]:
    """Return round numbers between ``low`` and ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / n
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


class _Scale:
    """Maps data to drawing units."""

    def __init__(self, axes: Axes, series: Sequence[Series]) -> None:
        self.log = axes.log
        self.x = axes.x or _range([v for s in series for v in s.x])
        self.y = axes.y or _range([v for s in series for v in s.y])

    def at(self, x: float, y: float) -> tuple[float, float]:
        sx, sy = self._share(x, self.x), self._share(y, self.y)
        return LEFT + sx * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - sy * (HEIGHT - TOP - BOTTOM)

    def _share(self, value: float, limits: tuple[float, float]) -> float:
        low, high = limits
        if self.log:
            value, low, high = math.log1p(value), math.log1p(low), math.log1p(high)
        return (value - low) / (high - low) if high > low else 0.5

    def ticks(self, limits: tuple[float, float]) -> list[float]:
        if not self.log:
            return ticks(*limits)
        steps = [0.0, *(m * 10.0**p for p in range(6) for m in (1, 3))]
        return [v for v in steps if limits[0] <= v <= limits[1]]


def _range(values: Sequence[float]) -> tuple[float, float]:
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    pad = 0.05 * (high - low) or max(abs(high) * 0.1, 1e-6)
    return (low if low == 0 else low - pad), high + pad


def chart(axes: Axes, series: Sequence[Series]) -> str:
    """Return lines or points on two axes."""
    scale = _Scale(axes, series)
    parts = [_frame(axes, scale)]
    if axes.diagonal:
        low, high = max(scale.x[0], scale.y[0]), min(scale.x[1], scale.y[1])
        (x1, y1), (x2, y2) = scale.at(low, low), scale.at(high, high)
        parts.append(f'<path class="diagonal" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>')
    for one in series:
        parts.append(_points(one, scale) if one.as_points else _line(one, scale))
    return _svg(axes.title, ''.join(parts))


def _svg(title: str, body: str, height: float = HEIGHT) -> str:
    label = escape(title, quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{label}">'
        f'<title>{label}</title>{body}</svg>'
    )


def _frame(axes: Axes, scale: _Scale) -> str:
    parts = []
    for value in scale.ticks(scale.y):
        _, y = scale.at(scale.x[0], value)
        parts.append(
            f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
            f'<text class="tick" x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">'
            f'{_short(value)}</text>'
        )
    for value in scale.ticks(scale.x):
        x, _ = scale.at(value, scale.y[0])
        parts.append(
            f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">'
            f'{_short(value)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    height = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">'
        f'{escape(axes.x_label)}</text>'
        f'<text class="label" transform="translate(11 {height}) rotate(-90)" '
        f'text-anchor="middle">{escape(axes.y_label)}</text>'
    )
    return ''.join(parts)


def _line(series: Series, scale: _Scale) -> str:
    d, pen_down = [], False
    for x, y in zip(series.x, series.y, strict=True):
        if not math.isfinite(y):
            pen_down = False
            continue
        px, py = scale.at(x, y)
        d.append(f'{"L" if pen_down else "M"}{px:.1f} {py:.1f}')
        pen_down = True
    dash = DASHES[series.dash % len(DASHES)]
    attribute = f' stroke-dasharray="{dash}"' if dash else ''
    name = escape(series.name)
    line = (
        f'<path class="line" style="stroke:var({series.colour})"{attribute} d="{"".join(d)}">'
        f'<title>{name}</title></path>'
    )
    if sum(map(math.isfinite, series.y)) <= FEW_POINTS:
        line += _points(replace(series, titles=()), scale)
    return line + ''.join(_mark(series, scale, *mark) for mark in series.marks)


def _mark(series: Series, scale: _Scale, x: float, y: float, text: str) -> str:
    px, py = scale.at(x, y)
    return (
        f'<circle class="mark" style="stroke:var({series.colour})" cx="{px:.1f}" cy="{py:.1f}" '
        f'r="5"><title>{escape(text)}</title></circle>'
    )


def _points(series: Series, scale: _Scale) -> str:
    titles = series.titles or ('',) * len(series.x)
    parts = []
    for x, y, title in zip(series.x, series.y, titles, strict=True):
        if not math.isfinite(y):
            continue
        px, py = scale.at(x, y)
        note = f'<title>{escape(title)}</title>' if title else ''
        parts.append(
            f'<circle class="point" style="fill:var({series.colour})" cx="{px:.1f}" cy="{py:.1f}" '
            f'r="4">{note}</circle>'
        )
    return ''.join(parts)


def legend(series: Sequence[Series]) -> str:
    """Return the names of the series beside their strokes, as HTML."""
    items = []
    for one in series:
        dash = DASHES[one.dash % len(DASHES)]
        attribute = f' stroke-dasharray="{dash}"' if dash and not one.as_points else ''
        items.append(
            f'<li><svg viewBox="0 0 28 10" aria-hidden="true"><path class="line" d="M1 5H27" '
            f'style="stroke:var({one.colour})"{attribute}/></svg>{escape(one.name)}</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def interval_chart(title: str, rows: Sequence[tuple[str, float, float, float, str]]) -> str:
    """Return one row per value in 0..1: name, value, low, high and colour; NaN where undefined."""
    row_height, left = 26, 150
    height = len(rows) * row_height + 30
    width = WIDTH - left - 46

    def at(value: float) -> float:
        return left + value * width

    parts = [
        f'<path class="grid" d="M{at(v):.1f} 4V{height - 24}"/><text class="tick" x="{at(v):.1f}" '
        f'y="{height - 8}" text-anchor="middle">{v:g}</text>'
        for v in (0, 0.25, 0.5, 0.75, 1)
    ]
    for i, (name, value, low, high, colour) in enumerate(rows):
        y = 17 + i * row_height
        parts.append(
            f'<text class="name" x="{left - 8}" y="{y + 4}" text-anchor="end">'
            f'{escape(name[:22])}<title>{escape(name)}</title></text>'
            f'<text class="value" x="{WIDTH - 2}" y="{y + 4}" text-anchor="end">'
            f'{number(value)}</text>'
        )
        if math.isfinite(low) and math.isfinite(high):
            parts.append(
                f'<path class="interval" style="stroke:var({colour})" '
                f'd="M{at(low):.1f} {y}H{at(high):.1f}M{at(low):.1f} {y - 5}v10'
                f'M{at(high):.1f} {y - 5}v10"/>'
            )
        if math.isfinite(value):
            parts.append(
                f'<circle class="point" style="fill:var({colour})" cx="{at(value):.1f}" cy="{y}" '
                f'r="5"/>'
            )
    return _svg(title, ''.join(parts), height)


def stacked_bars(
    title: str, rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str]
) -> str:
    """Return horizontal bars of shares that add up to one row's total; colours ``--e0`` ..."""
    left, row_height = 118, 26
    height = len(rows) * row_height + 8
    width = WIDTH - left - 44
    parts = []
    for i, (name, values) in enumerate(rows):
        y, x, total = 6 + i * row_height, float(left), float(sum(values))
        parts.append(
            f'<text class="name" x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(name[:18])}'
            f'<title>{escape(name)}</title></text>'
            f'<text class="value" x="{WIDTH - 2}" y="{y + 14}" text-anchor="end">{total:g}</text>'
        )
        for e, value in enumerate(values):
            if not value:
                continue
            w = value / total * width
            parts.append(
                f'<rect class="bar" style="fill:var(--e{e})" x="{x:.1f}" y="{y}" '
                f'width="{max(w, 0.8):.1f}" height="19"><title>'
                f'{escape(names[e])}: {value:g} of {total:g}</title></rect>'
            )
            x += w
    return _svg(title, ''.join(parts), height)


def bars(axes: Axes, edges: NDArray[np.float64], values: Sequence[float], colour: str) -> str:
    """Return a histogram; the bar b reaches from ``edges[b]`` to ``edges[b + 1]``."""
    scale = _Scale(axes, [Series('', list(edges), [0.0, *values], colour)])
    parts = [_frame(axes, scale)]
    for low, high, value in zip(edges[:-1], edges[1:], values, strict=True):
        (x1, y1), (x2, y0) = scale.at(low, value), scale.at(high, scale.y[0])
        parts.append(
            f'<rect class="bar" style="fill:var({colour})" x="{x1 + 0.5:.1f}" y="{y1:.1f}" '
            f'width="{max(x2 - x1 - 1, 0.5):.1f}" height="{max(y0 - y1, 0):.1f}">'
            f'<title>{low:g} to {high:g}: {value:g}</title></rect>'
        )
    return _svg(axes.title, ''.join(parts))


def thinned(points: dict[int, float]) -> Iterator[tuple[int, float]]:
    """Yield at most about ``MOST_POINTS`` points by step, the last one always."""
    steps = sorted(points)
    stride = max(1, math.ceil(len(steps) / MOST_POINTS))
    chosen = steps[::stride]
    if steps and chosen[-1] != steps[-1]:
        chosen.append(steps[-1])
    yield from ((step, points[step]) for step in chosen)

"""Pieces of HTML that every section of the report is built of, and the page's colours.

In: texts and numbers. Out: HTML text. Invariant: every text that comes from outside (case names,
class names, paths, configs) is escaped here or by the caller's :func:`html.escape`; data for the
script goes through :func:`script_json` alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from cellseg_mm.core.files import JsonValue

Rgb = tuple[int, int, int]

LIGHT_PAGE, DARK_PAGE = (255, 255, 255), (22, 27, 34)
TALL_ROWS = 30  # a longer table scrolls by itself
MIN_CONTRAST = 3.0  # WCAG 2.2, 1.4.11: graphics
SERIES = (
    (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233),
    (230, 159, 0), (120, 120, 120), (70, 60, 160),
)  # fmt: skip
# correct, localisation, class, both, duplicate, background, missed
ERROR_COLOURS = (
    (0, 158, 115), (86, 180, 233), (230, 159, 0), (204, 121, 167),
    (130, 130, 130), (213, 94, 0), (60, 60, 60),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the page.

    Attributes:
        anchor: Its id.
        title: Its heading; plain text.
        body: HTML.
    """

    anchor: str
    title: str
    body: str

    def html(self) -> str:
        """Return the section."""
        return (
            f'<section id="{self.anchor}" aria-labelledby="{self.anchor}-title">'
            f'<h2 id="{self.anchor}-title">{escape(self.title)}</h2>{self.body}</section>'
        )


def nothing(sentence: str) -> str:
    """Return why there is nothing to see."""
    return f'<p class="nothing">{escape(sentence)}</p>'


def lead(sentence: str) -> str:
    """Return what a section shows and how to read it."""
    return f'<p class="lead">{escape(sentence)}</p>'


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str,
    sortable: bool = False,
    kind: str = '',
) -> str:
    """Return a table that scrolls sideways by itself; cells are HTML, head and caption text.

    ``kind`` is a class of report.css; ``facts`` are texts, which wrap.
    """
    heads = ''.join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = []
    for first, *rest in rows:
        cells = ''.join(f'<td>{cell}</td>' for cell in rest)
        lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    kind = f' class="{"sortable" if sortable else kind}"'
    height = ' tall' if len(rows) > TALL_ROWS else ''
    return (
        f'<div class="scroll{height}" tabindex="0" role="region" '
        f'aria-label="{escape(caption, quote=True)}">'
        f'<table{kind}><caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead>'
        f'<tbody>{"".join(lines)}</tbody></table></div>'
    )


def details(summary: str, body: str) -> str:
    """Return something that is folded away."""
    return f'<details><summary>{escape(summary)}</summary>{body}</details>'


def figure(caption: str, *parts: str) -> str:
    """Return a chart with its name above."""
    return f'<figure><figcaption>{escape(caption)}</figcaption>{"".join(parts)}</figure>'


def grid(*parts: str) -> str:
    """Return figures side by side where there is room."""
    return f'<div class="grid">{"".join(parts)}</div>'


def script_json(value: JsonValue) -> str:
    """Return JSON that may stand inside a ``<script>`` element, whatever texts are in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(',', ':'))
    for character in '<>&\u2028\u2029':
        text = text.replace(character, f'\\u{ord(character):04x}')
    return text


def swatch(class_id: int, name: str) -> str:
    """Return a class's name beside its colour."""
    return (
        f'<span class="class-name"><span class="swatch" style="background:var(--p{class_id})">'
        f'</span>{escape(name)}</span>'
    )


def colour_css(palette: Sequence[Rgb]) -> str:
    """Return the page's colours: p = palette as is, c/s/e = readable on the light or dark page."""
    groups = (('c', palette), ('s', SERIES), ('e', ERROR_COLOURS))

    def variables(page: Rgb) -> str:
        return ''.join(
            f'--{letter}{i}:{_css(readable(colour, page))};'
            for letter, colours in groups
            for i, colour in enumerate(colours)
        )

    plain = ''.join(f'--p{k}:{_css(colour)};' for k, colour in enumerate(palette))
    strokes = ''.join(f'.k{k}{{--k:{_css(colour)}}}' for k, colour in enumerate(palette))
    dark = variables(DARK_PAGE)
    return (
        f':root{{{plain}{variables(LIGHT_PAGE)}}}'
        f'@media(prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}'
        f':root[data-theme=dark]{{{dark}}}{strokes}'
    )


def _css(colour: Rgb) -> str:
    return '#{:02x}{:02x}{:02x}'.format(*colour)


def contrast(first: Rgb, second: Rgb) -> float:
    """Return the contrast ratio, 1 to 21. Source: WCAG 2.2, relative luminance."""
    low, high = sorted((_luminance(first), _luminance(second)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: Rgb) -> float:
    linear = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
        for v in (c / 255 for c in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def readable(colour: Rgb, page: Rgb) -> Rgb:
    """Return ``colour``, moved towards black or white until it stands out from ``page``."""
    target = 0 if _luminance(page) > 0.18 else 255
    moved = colour
    for percent in range(0, 101, 5):
        r, g, b = (round(c + (target - c) * percent / 100) for c in colour)
        moved = (r, g, b)
        if contrast(moved, page) >= MIN_CONTRAST:
            return moved
    return moved

"""Tables of plain text.

In: rows of words and numbers. Out: aligned lines. Invariant: one helper aligns them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = []
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append('  '.join(cells).rstrip())
    return '\n'.join(lines)


Row = tuple[str, Sequence[float], str]


def _cell(value: float) -> str:
    return str(int(value)) if isinstance(value, int | np.integer) else f'{value:.4f}'


def _grid(head: Sequence[str], rows: Sequence[Row]) -> str:
    label_width = max(len(head[0]), *(len(label) for label, _, _ in rows))
    widths = [max(10, len(name)) for name in head[1:]]
    lines = [
        head[0].ljust(label_width)
        + ''.join('  ' + name.rjust(width) for name, width in zip(head[1:], widths, strict=True))
    ]
    for label, values, note in rows:
        cells = ''.join(
            '  ' + _cell(value).rjust(width) for value, width in zip(values, widths, strict=False)
        )
        lines.append(f'{label.ljust(label_width)}{cells}{note}')
    return '\n'.join(lines)

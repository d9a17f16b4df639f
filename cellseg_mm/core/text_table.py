"""Tables of plain text.

In: rows of words. Out: aligned lines. Invariant: one helper aligns them all.
"""

from __future__ import annotations

from collections.abc import Sequence


def text_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    n_left: int = 1,
    least_width: int = 0,
    notes: Sequence[str] = (),
) -> str:
    """Return a table whose columns are two blanks apart.

    Args:
        head: Names of the columns.
        rows: Cells of each row; a row may end before the last column.
        n_left: So many first columns are aligned to the left, the others to the right.
        least_width: Characters that a column aligned to the right has at least.
        notes: Text after the last cell of each row; none, or one a row.
    """
    table = (head, *rows)
    widths = [
        max(0 if i < n_left else least_width, *(len(row[i]) for row in table if i < len(row)))
        for i in range(len(head))
    ]
    lines = []
    for row, note in zip(table, ('', *(notes or [''] * len(rows))), strict=True):
        cells = [
            cell.ljust(widths[i]) if i < n_left else cell.rjust(widths[i])
            for i, cell in enumerate(row)
        ]
        lines.append('  '.join([*cells, note]).rstrip())
    return '\n'.join(lines)

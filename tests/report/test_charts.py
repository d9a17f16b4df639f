"""Charts are SVG text, and say nothing where nothing is known."""

from __future__ import annotations

import math
import re

from cellseg_mm.report.charts import Axes, Series, chart, number, ticks


def test_chart_breaks_at_nan_and_escapes() -> None:
    svg = chart(
        Axes('<a>', 'x', 'y', (0, 2), (0, 1)), [Series('b&', [0, 1, 2], [0, math.nan, 1], '--s0')]
    )
    assert '&lt;a&gt;' in svg
    assert 'b&amp;' in svg
    line = re.search(r'class="line"[^>]* d="([^"]*)"', svg)[1]
    assert line.count('M') == 2
    assert 'nan' not in svg


def test_numbers_and_ticks() -> None:
    assert [number(v) for v in (0.12345, math.nan, 3)] == ['0.123', '–', '3']
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(3, 3) == [3]

"""core.progress: items pass unchanged, one at a time, with a bar on a terminal only."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from cellseg_mm.core.progress import track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize('stream', [io.StringIO, Terminal])
def test_items_pass_one_at_a_time(
    stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('sys.stderr', screen := stream())
    taken: list[int] = []

    def source() -> Iterator[int]:
        for i in range(3):
            taken.append(i)
            yield i

    seen = [(item, len(taken)) for item in track(source(), description='cells', total=3)]
    assert seen == [(0, 1), (1, 2), (2, 3)]  # never reads ahead
    assert ('3/3' in screen.getvalue()) == screen.isatty()
    assert ('cells' in screen.getvalue()) == screen.isatty()

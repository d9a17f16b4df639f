"""The doctor's words: one finding, and the text of many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from cellseg_mm.core.errors import CellSegError

Level = Literal['ok', 'warn', 'error']
SIGNS = {'ok': 'OK   ', 'warn': 'warn ', 'error': 'ERROR'}


@dataclass(frozen=True, slots=True)
class Line:
    """One finding.

    Attributes:
        level: ``ok``, ``warn`` (a human should look) or ``error`` (results would be wrong).
        what: What was checked, in a word or two.
        text: What was found; for warnings and errors also what was expected and what to do.
            Further lines are a table.
    """

    level: Level
    what: str
    text: str

    def __str__(self) -> str:
        return f'{SIGNS[self.level]} {self.what}: ' + self.text.replace('\n', '\n        ')


def ok(what: str, text: str) -> Line:
    """Return a finding that is as it should be."""
    return Line('ok', what, text)


def warn(what: str, text: str) -> Line:
    """Return a finding that a human should look at."""
    return Line('warn', what, text)


def error(what: str, text: str) -> Line:
    """Return a finding that makes results wrong or stops work."""
    return Line('error', what, text)


def summary(lines: Sequence[Line]) -> str:
    """Return how many of each level there are."""
    counts = {level: sum(line.level == level for line in lines) for level in SIGNS}
    return f'{counts["ok"]} OK, {counts["warn"]} warnings, {counts["error"]} errors'


def guarded(what: str, check: Callable[[], Iterator[Line]]) -> Iterator[Line]:
    """Yield a check's lines; its own failure becomes one line."""
    try:
        yield from check()
    except CellSegError as problem:
        yield error(what, str(problem))
    except Exception as problem:  # foreign configs lack any key; the other checks go on
        yield error(
            what,
            f'the check could not be done ({type(problem).__name__}: {problem}); '
            'if the config is one of MMDetection with other parts, check this by hand',
        )

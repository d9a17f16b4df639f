"""The doctor's words: one finding, and the text of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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

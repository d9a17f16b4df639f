"""One progress bar for every long job: with ETA on a terminal, silent anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar('Item')


def track(items: Iterable[Item], *, description: str, total: int | None = None) -> Iterator[Item]:
    """Yield ``items`` while a bar with count, rate and ETA is drawn on standard error.

    Nothing is drawn when standard error is not a terminal, so log files hold no broken lines.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn('ETA'),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(items, total=total, description=description)

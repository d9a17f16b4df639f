"""One progress bar for every long job: with ETA on a terminal, silent anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar('Item')


def track(
    items: Iterable[Item],
    *,
    description: str,
    total: int | None = None,
    note: Callable[[], str] | None = None,
) -> Iterator[Item]:
    """Yield ``items`` while a bar with count, rate and ETA is drawn on standard error.

    ``note`` is asked after every item for a text at the end of the bar.

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
        TextColumn('{task.fields[note]}'),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total, note='')
        for item in progress.track(items, total=total, task_id=task):
            yield item
            if note is not None:
                progress.update(task, note=note())

"""Reads what mmengine's LoggerHook left in a work folder, for the report's curves.

In: ``<work_dir>/<time stamp>/vis_data/scalars.json`` (or ``<time stamp>.json``) and the text log.
Out: :class:`TrainingLog`. Invariant: a resumed run is one curve; where two runs logged the same
step, the later run's value counts, because the weights that exist come from it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cellseg_mm.core.files import JsonValue

Points = dict[int, float]
Row = dict[str, JsonValue]

GROUPS_HEAD = 'Parameter groups:'
GROUP_LINE = re.compile(
    r'^ {2}(?P<pattern>\S.*?) {2,}\d+ {2,}[\d,]+ {2,}(?P<lr>[\d.e+-]+) {2,}[\d.e+-]+$'
)
ITER_OF_NAME = re.compile(r'_(iter|epoch)_(\d+)')


@dataclass(frozen=True, slots=True)
class TrainingLog:
    """Curves of one fold.

    Attributes:
        train: Name to {step: value}; losses, ``lr``, ``grad_norm``, ``time``, ``memory``.
        val: Name, without prefix such as ``cell/``, to {step: value}; undefined scores left out.
        group_lrs: Parameter group to the rate it started from, first the group whose rate is
            logged; empty when the text log does not tell.
        n_runs: Times that training was started.
        n_bad_lines: Lines that are not JSON, as a killed run may leave one.
    """

    train: dict[str, Points] = field(default_factory=dict)
    val: dict[str, Points] = field(default_factory=dict)
    group_lrs: dict[str, float] = field(default_factory=dict)
    n_runs: int = 0
    n_bad_lines: int = 0

    def lr_curves(self) -> dict[str, Points]:
        """Return the learning rate of each group.

        Logs hold the first group's rate. Schedulers multiply all groups' rates by one factor, so
        the others are that curve times the ratio of the starting rates.
        """
        logged = self.train.get('lr', {})
        first = next(iter(self.group_lrs.values()), 0.0)
        if not logged or len(self.group_lrs) < 2 or not first:
            return {'all parameters': logged} if logged else {}
        return {
            name: {step: value * (lr / first) for step, value in logged.items()}
            for name, lr in self.group_lrs.items()
        }


def read_training_log(work_dir: Path | str, *, val_interval: int | None = None) -> TrainingLog:
    """Join the logs of all runs in a work folder, in the order of their time stamps.

    Args:
        work_dir: Folder of one fold; may hold no logs.
        val_interval: ``train_cfg.val_interval``. mmengine's default writes validation scores of
            iteration-based training with step 0; they are then placed at the validation that
            follows (or, first in a resumed run, precedes) the neighbouring training step.
    """
    train: dict[str, Points] = {}
    val: dict[str, Points] = {}
    group_lrs: dict[str, float] = {}
    n_runs = n_bad = 0
    for run_dir in sorted(p for p in Path(work_dir).glob('*') if p.is_dir()):
        path = _scalars_path(run_dir)
        if path is None:
            continue
        rows, bad = _json_lines(path)
        n_bad += bad
        if not any('loss' in row for row in rows):
            continue  # a test run
        n_runs += 1
        _join(rows, train, val, val_interval)
        group_lrs = _group_lrs(run_dir / f'{run_dir.name}.log') or group_lrs
    return TrainingLog(train, val, group_lrs, n_runs, n_bad)


def _scalars_path(run_dir: Path) -> Path | None:
    names = ('vis_data/scalars.json', f'vis_data/{run_dir.name}.json', f'{run_dir.name}.json')
    return next((run_dir / name for name in names if (run_dir / name).is_file()), None)


def _json_lines(path: Path) -> tuple[list[Row], int]:
    rows, n_bad = [], 0
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            n_bad += 1
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            n_bad += 1
    return rows, n_bad


def _join(
    rows: Sequence[Row],
    train: dict[str, Points],
    val: dict[str, Points],
    val_interval: int | None,
) -> None:
    """Add one run's rows; steps that an earlier run had from there on are forgotten."""
    steps = [_train_step(row) for row in rows]
    first = min((s for s in steps if s is not None), default=None)
    if first is not None:
        for points in train.values():
            for late in [s for s in points if s >= first]:
                del points[late]
    for i, row in enumerate(rows):
        at = steps[i]
        if at is not None:
            _add(row, train, at)
            continue
        step = _val_step(row, steps[:i], steps[i + 1 :], val_interval)
        if step is not None:
            _add({k.rsplit('/', 1)[-1]: v for k, v in row.items()}, val, step)


def _train_step(row: Row) -> int | None:
    step = row.get('step')
    return step if 'loss' in row and isinstance(step, int) else None


def _val_step(
    row: Row, before: Sequence[int | None], after: Sequence[int | None], interval: int | None
) -> int | None:
    step = row.get('step')
    if isinstance(step, int) and step > 0:
        return step
    last = next((s for s in reversed(before) if s is not None), None)
    if last is not None:
        return math.ceil(last / interval) * interval if interval else last
    following = next((s for s in after if s is not None), None)
    if following is None:
        return None
    return (following - 1) // interval * interval if interval else following


def _add(row: Row, curves: dict[str, Points], step: int) -> None:
    for name, value in row.items():
        if name in ('step', 'iter', 'epoch') or isinstance(value, bool):
            continue
        if isinstance(value, int | float) and math.isfinite(value):
            curves.setdefault(name, {})[step] = float(value)


def _group_lrs(path: Path) -> dict[str, float]:
    """Return the groups that CellOptimWrapperConstructor logged, in their order."""
    if not path.is_file():
        return {}
    lines = iter(path.read_text(encoding='utf-8', errors='replace').splitlines())
    if not any(line.endswith(GROUPS_HEAD) for line in lines):
        return {}
    next(lines, None)  # the table's head
    found: dict[str, float] = {}
    for line in lines:
        match = GROUP_LINE.match(line)
        if match is None:
            break
        name = match['pattern']
        if name in found and found[name] != float(match['lr']):
            name = f'{name}, lr {match["lr"]}'
        found.setdefault(name, float(match['lr']))
    return found


def step_of_checkpoint(name: str) -> int | None:
    """Return the iteration (or epoch) in a checkpoint's name, or None."""
    found = ITER_OF_NAME.findall(name)
    return int(found[-1][1]) if found else None

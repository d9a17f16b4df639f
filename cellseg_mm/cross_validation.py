"""All folds, from nothing to one answer, and safe to start again at any moment.

In: the configs of the folds. Out: trained folds, their out-of-fold score, the ensemble's
predictions and the report, each made by the same tools that a user would type. Invariant: a step
that is done is never done again, and counts as done only when its last file is there and belongs to
this data, these folds and these settings.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue

from mmengine.config import Config

from cellseg_mm.errors import CellSegError, ConfigError, PredictionError
from cellseg_mm.launch import default_work_dir
from cellseg_mm.predictions import load_predictions
from cellseg_mm.training import FINISHED, dataset_settings, finished_state

# what mmengine's logger writes, for example: Iter(train) [ 50/300]  lr: 1e-3  eta: 0:03:20
PROGRESS = re.compile(r'(?:Iter|Epoch)\((\w+)\)\s*\[\s*(\d+)/(\d+)\].*?eta: (\S+)')
TOOLS = Path(__file__).resolve().parents[1] / 'tools'


@dataclass(frozen=True, slots=True)
class Step:
    """One command of the plan.

    Attributes:
        name: What it does, for the plan and the log.
        command: Words of the command line.
        done: Whether its result is there already.
        reason: Why it is done, or what is missing.
        log_path: Where its output goes.
    """

    name: str
    command: tuple[str, ...]
    done: bool
    reason: str
    log_path: Path


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done, in order.

    Attributes:
        fold_steps: Per config, the steps that need each other, in order; configs are independent.
        final_steps: Steps that need all folds, in order.
    """

    fold_steps: tuple[tuple[Step, ...], ...]
    final_steps: tuple[Step, ...] = field(default=())

    def text(self) -> str:
        """Return the plan, one line a step."""
        steps = [step for steps in self.fold_steps for step in steps] + list(self.final_steps)
        width = max((len(step.name) for step in steps), default=0)
        lines = [
            f'{"done" if step.done else "to do":5}  {step.name.ljust(width)}  {step.reason}\n'
            f'       {shlex.join(step.command)}'
            for step in steps
        ]
        return '\n'.join(lines)


def make_plan(
    config_paths: Sequence[str | Path],
    *,
    work_root: Path | str | None = None,
    options: Sequence[str] = (),
) -> Plan:
    """Look at what is there and plan the rest.

    Args:
        config_paths: One config per fold.
        work_root: Folder for the work folders; None for MMDetection's ``work_dirs``.
        options: Words after ``--cfg-options`` for every training and test.

    Raises:
        ConfigError: No configs, or two configs of one fold or work folder.
    """
    if not config_paths:
        raise ConfigError('cross-validation: no configs given; expected for example configs/*.py')
    folds = [_fold(path, work_root) for path in sorted(map(str, config_paths))]
    for what in ('fold', 'work_dir'):
        values = [getattr(f, what) for f in folds]
        if len(set(values)) < len(values):
            raise ConfigError(f'cross-validation: two configs share a {what}: {values}')
    fold_steps = tuple(_fold_steps(f, options) for f in folds)
    return Plan(fold_steps, _final_steps(folds, fold_steps, work_root))


@dataclass(frozen=True, slots=True)
class _Fold:
    config: str
    cfg: Config
    fold: int
    work_dir: Path


def _fold(path: str, work_root: Path | str | None) -> _Fold:
    if not Path(path).is_file():
        raise ConfigError(f'{path}: no such config file')
    cfg = Config.fromfile(path)
    work_dir = default_work_dir(path)
    if work_root is not None:
        work_dir = Path(work_root) / work_dir.relative_to('work_dirs')
    return _Fold(path, cfg, int(dataset_settings(cfg).fold), work_dir)


def _tool(name: str, *words: str | Path) -> tuple[str, ...]:
    return (sys.executable, str(TOOLS / name), *map(str, words))


def _fold_steps(fold: _Fold, options: Sequence[str]) -> tuple[Step, ...]:
    extra = ['--work-dir', fold.work_dir]
    extra += ['--cfg-options', *options] if options else []
    state, reason = finished_state(fold.cfg, fold.work_dir)
    log = fold.work_dir / 'cross_validation'
    train = Step(
        f'train fold {fold.fold}',
        _tool('train.py', fold.config, '--resume', *extra),
        state,
        reason,
        log / 'train.log',
    )
    tested, why = _is_tested(fold, train.done)
    test = Step(
        f'test fold {fold.fold}',
        _tool('test.py', fold.config, *extra),
        tested,
        why,
        log / 'test.log',
    )
    return train, test


def _is_tested(fold: _Fold, is_trained: bool) -> tuple[bool, str]:
    path = fold.work_dir / 'val.predictions.npz'
    if not is_trained:
        return False, 'needs the trained fold'
    if not path.is_file():
        return False, f'{path} is not there'
    try:
        provenance = load_predictions(path).provenance
    except PredictionError as error:
        return False, str(error)
    finished = json.loads((fold.work_dir / FINISHED).read_text())
    if provenance.get('checkpoint_hash') != finished['best_hash']:
        return False, f'{path} is of another checkpoint'
    return True, f'{path}'


def _final_steps(
    folds: Sequence[_Fold], fold_steps: Sequence[Sequence[Step]], work_root: Path | str | None
) -> tuple[Step, ...]:
    # The steps after the folds rewrite their results from the folds' files each time; they take
    # minutes, and a stale ensemble would be worse than a repeated one.
    out = ensemble_dir([f.work_dir for f in folds])
    configs = [f.config for f in folds]
    root = ['--work-root', work_root] if work_root is not None else []
    all_done = all(step.done for steps in fold_steps for step in steps)
    why = 'uses the folds as they are' if all_done else 'needs all folds'
    names = [
        ('score out of fold', 'score_oof.py', []),
        ('find the best settings', 'find_best.py', []),
        ('ensemble on the test images', 'ensemble.py', ['--settings', out / 'inference.json']),
        ('report', 'report.py', []),
    ]
    return tuple(
        Step(
            name,
            _tool(tool, *configs, *root, '--out', out, *words),
            False,
            why,
            out / f'{tool}.log',
        )
        for name, tool, words in names
        if (TOOLS / tool).is_file()
    )


def ensemble_dir(work_dirs: Sequence[Path]) -> Path:
    """Return where what belongs to all folds goes: ``ensemble`` beside their work folders."""
    return Path(os.path.commonpath([str(path.parent) for path in work_dirs])) / 'ensemble'


def run_plan(plan: Plan, devices: Sequence[str]) -> None:
    """Run what is not done; independent folds share the devices.

    Args:
        plan: From :func:`make_plan`.
        devices: CUDA device numbers, one fold at a time on each; ``['']`` for one CPU job.

    Raises:
        CellSegError: A step failed; names its log.
    """
    free: Queue[str] = Queue()
    for device in devices:
        free.put(device)

    def run_fold(steps: Sequence[Step]) -> None:
        device = free.get()
        try:
            for step in steps:
                _run_step(step, device)
        finally:
            free.put(device)

    with ThreadPoolExecutor(max_workers=len(devices)) as pool:
        jobs = [pool.submit(run_fold, steps) for steps in plan.fold_steps]
        problems = [error for job in jobs if (error := job.exception()) is not None]
    if problems:
        raise problems[0] if len(problems) == 1 else CellSegError('; '.join(map(str, problems)))
    for step in plan.final_steps:
        _run_step(step, devices[0])


def _run_step(step: Step, device: str) -> None:
    if step.done:
        print(f'{step.name}: done already ({step.reason})', flush=True)
        return
    print(f'{step.name} ... (log: {step.log_path})', flush=True)
    step.log_path.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': device} if device else None
    with step.log_path.open('ab') as log:
        start = log.tell()
        process = subprocess.Popen(
            step.command, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            code = _wait_and_show(process, step, start)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code:
        tail = step.log_path.read_text(errors='replace').strip().splitlines()[-1:]
        raise CellSegError(
            f'{step.name}: stopped with status {code}: {"".join(tail)}; see {step.log_path}; '
            'repair it and start the same command again'
        )


def _wait_and_show(process: subprocess.Popen, step: Step, start: int) -> int:
    """Wait for a step; on a terminal, show the newest progress that its log tells of."""
    is_terminal = sys.stderr.isatty()
    while True:
        try:
            code = process.wait(timeout=1)
            break
        except subprocess.TimeoutExpired:
            if is_terminal:
                print(
                    f'\r\x1b[K  {step.name}: {progress_of(step.log_path, start)}',
                    end='',
                    file=sys.stderr,
                )
    if is_terminal:
        print('\r\x1b[K', end='', file=sys.stderr)
    return code


def progress_of(log_path: Path, start: int = 0) -> str:
    """Return the last progress that mmengine wrote to a log after byte ``start``."""
    with log_path.open('rb') as log:
        log.seek(max(start, log.seek(0, os.SEEK_END) - 20_000))
        text = log.read().decode(errors='replace')
    found = PROGRESS.findall(text)
    if not found:
        return 'starting'
    phase, now, last, eta = found[-1]
    return f'{phase} {now}/{last}, ETA {eta}'


def slurm_script(config_paths: Sequence[str | Path], options: Sequence[str] = ()) -> str:
    """Return a Slurm job array with one fold a task, and the command for afterwards."""
    configs = [str(path) for path in sorted(map(str, config_paths))]
    extra = shlex.join(['--cfg-options', *options]) if options else ''
    lines = [
        '#!/usr/bin/env bash',
        f'#SBATCH --array=0-{len(configs) - 1}',
        '#SBATCH --gres=gpu:1',
        '#SBATCH --cpus-per-task=8',
        '#SBATCH --time=24:00:00',
        '#SBATCH --output=work_dirs/slurm-%A_%a.log',
        'set -euo pipefail',
        f'CONFIGS=({shlex.join(configs)})',
        'CONFIG=${CONFIGS[$SLURM_ARRAY_TASK_ID]}',
        f'python tools/train.py "$CONFIG" --resume {extra}'.rstrip(),
        f'python tools/test.py "$CONFIG" {extra}'.rstrip(),
        '# when all tasks are done:',
        f'#   python tools/cross_validate.py {shlex.join(configs)}',
    ]
    return '\n'.join(lines) + '\n'


def visible_devices() -> list[str]:
    """Return the numbers of the CUDA devices, or one empty name for the CPU."""
    import torch

    return [str(i) for i in range(torch.cuda.device_count())] or ['']

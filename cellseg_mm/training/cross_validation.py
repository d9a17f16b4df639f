"""All folds, from nothing to one answer, and safe to start again at any moment.

In: the configs of the folds. Out: trained folds, their out-of-fold score, the best settings, the
ensemble's predictions and the report, each made by the same tools that a user would type.
Invariant: training and testing that is done is never done again, and counts as done only when its
last file is there and belongs to these folds, these settings and this checkpoint; and at most one
run works in a place at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mmengine.config import Config

from cellseg_mm.cli import add_config_arguments
from cellseg_mm.core import files
from cellseg_mm.core.errors import ConfigError, PredictionError
from cellseg_mm.core.layout import (
    FINISHED,
    INFERENCE,
    TEST,
    TOOLS,
    as_typed,
    ensemble_dir,
    mark_of_test,
    predictions_path,
    result_name,
    work_dir_of,
)
from cellseg_mm.core.trainings import read_mark
from cellseg_mm.data.config import DataSettings
from cellseg_mm.fusion.views import file_name
from cellseg_mm.results.predictions import load_predictions
from cellseg_mm.results.whose import why_foreign
from cellseg_mm.training.config_faults import refuse_faults
from cellseg_mm.training.load_config import refuse_unknown_keys
from cellseg_mm.training.marks import finished_state, fold_hash_of
from cellseg_mm.training.step_runner import StepRunner, locked

# What decides a fold's predictions, given its checkpoint.
TEST_KEYS = ('model', 'test_dataloader', 'test_cfg')


@dataclass(frozen=True, slots=True)
class Step:
    """One command of the plan.

    Attributes:
        name: What it does, for the plan and the log.
        command: Words of the command line.
        done: Whether its result is there already, or nothing is to be done.
        reason: Why it is done, or what is missing.
        log_path: Where its output goes.
        after: Called when it has succeeded.
    """

    name: str
    command: tuple[str, ...]
    done: bool
    reason: str
    log_path: Path
    after: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done, in order.

    Attributes:
        fold_steps: Per config, the steps that need each other, in order; configs are independent.
        final_stages: What needs all folds, as stages that need the stage before; each has steps
            that need each other, in order, and independent of the stage's others.
        out_dir: Where their results go, and the lock.
    """

    fold_steps: tuple[tuple[Step, ...], ...]
    final_stages: tuple[tuple[tuple[Step, ...], ...], ...]
    out_dir: Path

    def text(self) -> str:
        """Return the plan, one line a step."""
        stages = (self.fold_steps, *self.final_stages)
        steps = [step for stage in stages for steps in stage for step in steps]
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
    ttas: Sequence[str] = (),
) -> Plan:
    """Look at what is there and plan the rest.

    Args:
        config_paths: One config per fold.
        work_root: Folder for the work folders; None for MMDetection's ``work_dirs``.
        options: Words after ``--cfg-options`` for every training and test.
        ttas: Test-time augmentations to test each fold with too, for the choice of the best.

    Raises:
        ConfigError: No configs, two configs of one fold or work folder, an option that nothing
            reads, an unknown augmentation, or a fold that was trained with other settings or folds
            than those in force.
    """
    if not config_paths:
        raise ConfigError('cross-validation: no configs given; expected for example configs/*.py')
    changes = _parsed(options)
    folds = [_fold(path, work_root, changes) for path in sorted(map(str, config_paths))]
    for what in ('fold', 'work_dir'):
        values = [getattr(f, what) for f in folds]
        if len(set(values)) < len(values):
            raise ConfigError(f'cross-validation: two configs share a {what}: {values}')
    fold_steps = tuple(_fold_steps(f, options, ttas) for f in folds)
    out = ensemble_dir([f.work_dir for f in folds])
    return Plan(fold_steps, _final_stages(folds, out, work_root, options), out)


def _parsed(options: Sequence[str]) -> dict:
    """Read options as the tools that will get them do."""
    if not options:
        return {}
    parser = argparse.ArgumentParser(prog='--cfg-options', add_help=False)
    add_config_arguments(parser)
    changes = parser.parse_args(['--cfg-options', *options]).cfg_options
    moved = [key for key in changes if key.split('.')[-1] in ('data_root', 'folds_file')]
    if moved:
        raise ConfigError(
            f'--cfg-options: {", ".join(moved)}: where the data and folds are must be the same for '
            'every step; set CELLSEG_DATA and CELLSEG_FOLDS instead'
        )
    return changes


@dataclass(frozen=True, slots=True)
class _Fold:
    config: str
    cfg: Config
    fold: int | None
    work_dir: Path


def _fold(path: str, work_root: Path | str | None, changes: dict) -> _Fold:
    if not Path(path).is_file():
        raise ConfigError(f'{path}: no such config file; see configs/ for those there are')
    cfg = Config.fromfile(path)
    refuse_unknown_keys(cfg, changes)
    cfg.merge_from_dict(changes)
    refuse_faults(cfg, path)
    return _Fold(path, cfg, DataSettings.from_config(cfg).fold, work_dir_of(path, work_root))


def _tool(name: str, *words: str | Path) -> tuple[str, ...]:
    return (sys.executable, str(TOOLS / name), *map(str, words))


def _fold_steps(fold: _Fold, options: Sequence[str], ttas: Sequence[str]) -> tuple[Step, ...]:
    extra = ['--work-dir', fold.work_dir]
    extra += ['--cfg-options', *options] if options else []
    is_trained, reason = finished_state(fold.cfg, fold.work_dir)
    log = fold.work_dir / 'cross_validation'
    train = Step(
        f'train fold {fold.fold}',
        _tool('train.py', fold.config, '--resume', *extra),
        is_trained,
        reason,
        log / 'train.log',
    )
    return train, *(_test_step(fold, tta, extra, is_trained=is_trained) for tta in ('', *ttas))


def _test_step(fold: _Fold, tta: str, extra: Sequence[str | Path], *, is_trained: bool) -> Step:
    name = file_name(tta) if tta else ''
    is_tested, why = _is_tested(fold, name, is_trained=is_trained)
    return Step(
        f'test fold {fold.fold}' + (f' with {tta}' if tta else ''),
        _tool('test.py', fold.config, *(['--tta', tta] if tta else []), *extra),
        is_tested,
        why,
        fold.work_dir / 'cross_validation' / f'{result_name("test", name)}.log',
        partial(_mark_tested, fold, name),
    )


def _is_tested(fold: _Fold, name: str, *, is_trained: bool) -> tuple[bool, str]:
    path = predictions_path(fold.work_dir, 'val', name)
    if not is_trained:
        return False, 'needs the trained fold'
    if not path.is_file():
        return False, f'{path} is not there'
    try:
        provenance = load_predictions(path).provenance
    except PredictionError as error:
        return False, str(error)
    if provenance.get('checkpoint_hash') != read_mark(fold.work_dir / FINISHED)['best_hash']:
        return False, f'{path} is of another checkpoint'
    if provenance.get('fold_hash') != fold_hash_of(fold.cfg):
        return False, f'{path} is of other folds'
    if why := why_foreign(path, provenance):
        return False, f'{path} {why}'
    names = provenance.get('class_names')
    if names and tuple(map(str, names)) != DataSettings.from_config(fold.cfg).class_names:
        return False, f'{path} is of other classes'
    mark = mark_of_test(fold.work_dir, name)
    # Without the mark the user has tested by hand; the checkpoint and the folds are right.
    if mark.is_file() and _read_tested(mark) != _test_hash(fold.cfg):
        return False, f'{path} was made with other settings'
    return True, f'{path}'


def _test_hash(cfg: Config) -> str:
    settings = cfg.to_dict()
    parts = {key: settings.get(key) for key in TEST_KEYS}
    return files.text_hash(json.dumps(parts, sort_keys=True, default=str))


def _mark_tested(fold: _Fold, name: str) -> None:
    files.write_json(mark_of_test(fold.work_dir, name), {'settings': _test_hash(fold.cfg)})


def _read_tested(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding='utf-8'))['settings'])
    except (OSError, ValueError, KeyError, TypeError):
        return ''


def _final_stages(
    folds: Sequence[_Fold], out: Path, work_root: Path | str | None, options: Sequence[str]
) -> tuple[tuple[tuple[Step, ...], ...], ...]:
    # The steps after the folds rewrite their results from the folds' files each time; they take
    # minutes, and a stale ensemble would be worse than a repeated one.
    configs = [f.config for f in folds]
    root = ['--work-root', work_root] if work_root is not None else []
    changes = ['--cfg-options', *options] if options else []
    test_dir = DataSettings.from_config(folds[0].cfg).data_root / TEST
    missing = '' if os.path.lexists(test_dir) else f'{test_dir} is not there'

    def step(name: str, tool: str, *words: str | Path, needless: str = '') -> Step:
        return Step(
            name,
            _tool(tool, *configs, *root, '--out', out, *words),
            bool(needless),
            needless or 'made from the folds each time',
            out / f'{Path(tool).stem}.log',
        )

    scores = step('score out of fold', 'score_oof.py')
    settings = step('find the best settings', 'find_best.py')
    answer = step(
        'ensemble on the test images',
        'ensemble.py',
        f'--settings={out / INFERENCE}',
        '--overlays=8',
        *changes,
        needless=missing,
    )
    report = step('report', 'report.py')
    return ((scores,), (settings, answer)), ((report,),)


def run_plan(plan: Plan, devices: Sequence[str]) -> None:
    """Run what is not done; independent folds share the devices.

    Interrupted by SIGINT, SIGTERM or SIGHUP it ends the running steps and raises.

    Args:
        plan: From :func:`make_plan`, made just now.
        devices: CUDA device numbers, one fold at a time on each; ``['']`` for one CPU job.

    Raises:
        CellSegError: Another run is at work here, or steps failed; names their logs. The other
            folds are finished first.
        KeyboardInterrupt: Interrupted by SIGINT.
        SystemExit: Ended by another signal.
    """
    with locked(plan.out_dir / 'cross_validation.lock') as lock, StepRunner(lock) as runner:
        for chains in (plan.fold_steps, *plan.final_stages):
            runner.run(chains, devices)


def slurm_script(
    config_paths: Sequence[str | Path],
    options: Sequence[str] = (),
    *,
    work_root: Path | str | None = None,
    ttas: Sequence[str] = (),
) -> str:
    """Return a Slurm job array with one fold a task, and the command for afterwards.

    A task that was cut goes on when the same array is submitted again.
    """
    configs = sorted(map(str, config_paths))
    if not configs:
        raise ConfigError('cross-validation: no configs given; expected for example configs/*.py')
    folds = [_fold(path, work_root, _parsed(options)) for path in configs]
    dirs = [str(fold.work_dir) for fold in folds]
    changes = ['--cfg-options', *options] if options else []
    extra = f' {shlex.join(changes)}' if changes else ''
    root = ['--work-root', str(work_root)] if work_root is not None else []
    views = ['--tta', *ttas] if ttas else []
    after = ['python', 'tools/cross_validate.py', *configs, *root, *views, *changes]
    lines = [
        '#!/usr/bin/env bash',
        '# sbatch THIS_FILE, in the folder of the project; set CELLSEG_DATA before if data are',
        '# elsewhere. Adapt the next lines to your cluster.',
        f'#SBATCH --array=0-{len(configs) - 1}',
        '#SBATCH --gres=gpu:1',
        '#SBATCH --cpus-per-task=8',
        '#SBATCH --time=24:00:00',
        '#SBATCH --output=slurm-%A_%a.log',
        'set -euo pipefail',
        f'CONFIGS=({shlex.join(configs)})',
        f'WORK_DIRS=({shlex.join(dirs)})',
        'CONFIG=${CONFIGS[$SLURM_ARRAY_TASK_ID]}',
        'WORK_DIR=${WORK_DIRS[$SLURM_ARRAY_TASK_ID]}',
        f'python tools/train.py "$CONFIG" --resume --work-dir "$WORK_DIR"{extra}',
        *(
            f'python tools/test.py "$CONFIG"{words} --work-dir "$WORK_DIR"{extra}'
            for words in ('', *(f' --tta {shlex.quote(tta)}' for tta in ttas))
        ),
        '# when all tasks are done:',
        f'#   {shlex.join(after)}',
    ]
    return as_typed('\n'.join(lines)) + '\n'


def visible_devices() -> list[str]:
    """Return the names of the CUDA devices that this process may use, or '' for the CPU."""
    import torch

    n = torch.cuda.device_count()
    given = [name for name in os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',') if name.strip()]
    # A number that torch gives counts within what is visible; the children need the outer name.
    return (given[:n] if given else [str(i) for i in range(n)]) or ['']

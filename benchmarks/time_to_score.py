"""Minutes of training until a fold's validation reaches a mask AP50.

    export CELLSEG_DATA=... CELLSEG_FOLDS=...
    python benchmarks/time_to_score.py configs/laptop-quick/fold0.py configs/scratch/fold0.py

Trains each config with a validation every 25 iterations until the score is reached or the recipe
ends; the peer is the recipe of the other config in the same run. What counts is the time of the
training steps, waiting for data included, and not the validations between them, since a recipe
has far fewer; both are printed. Nothing else may run beside it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from cellseg_mm.core.provenance import code_commit, machine
from cellseg_mm.report.logs import TrainingLog, read_training_log

ROOT = Path(__file__).resolve().parents[1]
SCORE = 'segm_mAP_50'


def start(config: str, folder: Path, interval: int) -> subprocess.Popen:
    """Start a training whose validations and log lines come every ``interval`` iterations."""
    folder.mkdir(parents=True)
    words = [sys.executable, 'tools/train.py', config, '--work-dir', str(folder), '--cfg-options']
    words += [f'train_cfg.val_interval={interval}', f'default_hooks.logger.interval={interval}']
    words.append(f'log_processor.window_size={interval}')
    with (folder / 'output.log').open('w') as log:
        return subprocess.Popen(words, stdout=log, stderr=log, cwd=ROOT)


def reached(log: TrainingLog, wanted: float) -> int | None:
    """Return the first iteration whose validation has the score."""
    return min(
        (it for it, value in log.val.get(SCORE, {}).items() if value >= wanted), default=None
    )


def measure(config: str, folder: Path, *, wanted: float, interval: int) -> str:
    """Train until the score is there and return a row of the table."""
    began = time.monotonic()
    training = start(config, folder, interval)
    log = read_training_log(folder)
    while training.poll() is None and reached(log, wanted) is None:
        time.sleep(1)
        log = read_training_log(folder)
    wall = time.monotonic() - began
    if training.poll() is None:
        training.send_signal(signal.SIGINT)
        training.wait()
    elif training.returncode:
        sys.exit(f'{folder / "output.log"}: the training failed, see there')
    log = read_training_log(folder)
    found = reached(log, wanted)
    last = found or max(log.val[SCORE])
    steps = sum(value * interval for it, value in log.train['time'].items() if it <= last)
    score = log.val[SCORE][last]
    said = f'{steps / 60:.1f}' if found else f'never ({steps / 60:.1f})'
    return f'| {config} | {last} | {score:.3f} | {said} | {wall / 60:.1f} |'


def main() -> None:
    """Measure each config and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='+')
    parser.add_argument('--wanted', type=float, default=0.70, help='mask AP50')
    parser.add_argument('--interval', type=int, default=25, help='iterations')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/time_to_score'))
    args = parser.parse_args()
    load = os.getloadavg()[0]
    print(f'{machine()}; load {load:.1f}; commit {code_commit()}; wanted {args.wanted}')
    print('| config | iterations | mask AP50 | minutes of steps | with validations |')
    print('| --- | --- | --- | --- | --- |')
    for config in args.configs:
        folder = args.out / Path(config).parent.name / Path(config).stem
        print(measure(config, folder, wanted=args.wanted, interval=args.interval), flush=True)


if __name__ == '__main__':
    main()

"""What --deterministic costs: CPU time of training with and without, interleaved.

    python benchmarks/deterministic.py --repeats 3 --iters 10

The peer is the same command without the option. CPU time (user + system) is compared, since other
processes on the machine change wall time. On a GPU the cost differs; see docs/robustness.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cellseg_mm.core.provenance import code_commit, machine
from tests.faults.kill import import_all, start
from tests.support.micro import MICRO


def cpu_seconds(words: list[str], log_path: Path) -> float:
    """Run a training and return its CPU time."""
    pid = start(words, log_path)
    _, status, usage = os.wait4(pid, 0)
    if status:
        sys.exit(f'{log_path}: the training failed:\n{log_path.read_text()[-2000:]}')
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--iters', type=int, default=10)
    args = parser.parse_args()
    from cellseg_mm.data.drawing.sample import make_sample
    from cellseg_mm.data.preparing import prepare
    from cellseg_mm.data.preparing.records import PrepareParams

    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        make_sample(folder / 'data', n_train=6, n_test=2, seed=3)
        prepare.prepare(folder / 'data', PrepareParams(n_folds=2, n_workers=1))
        os.environ['CELLSEG_DATA'] = str(folder / 'data')
        import_all()
        settings = {**MICRO, 'train_cfg.max_iters': args.iters, 'train_cfg.val_interval': 1000}
        settings |= {'val_dataloader.dataset.pipeline.1.scale_factor': 0.1}
        options = ['--cfg-options', *(f'{k}={json.dumps(v)}' for k, v in settings.items())]
        times: dict[str, list[float]] = {'plain': [], 'deterministic': []}
        for repeat in range(args.repeats):
            for name, seconds in times.items():
                words = ['tools/train.py', 'configs/sample/fold0.py']
                words += ['--work-dir', str(folder / f'{name}{repeat}')]
                words += ['--deterministic'] if name == 'deterministic' else []
                seconds.append(cpu_seconds([*words, *options], folder / f'{name}.log'))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f'{machine()}; commit {code_commit()}; {args.iters} iterations x {args.repeats}')
    for name, seconds in times.items():
        extent = f'{min(seconds):.2f} to {max(seconds):.2f}'
        print(f'{name:<14} median {medians[name]:.2f} s CPU ({extent})')
    print(f'ratio {medians["deterministic"] / medians["plain"]:.3f}')


if __name__ == '__main__':
    main()

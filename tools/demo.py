"""The main job on generated data: sample images, two folds, ensemble, scores, pictures.

Takes minutes on two CPU cores. Everything lands in work_dirs/sample; start it again after an
interruption and it goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from cellseg_mm.cli import run_tool
from cellseg_mm.core.layout import CONFIGS, ensemble_dir, scores_path, work_dir_of

LEARNED_AP50 = 0.75


def main() -> int:
    """Run the demo; status 1 when what was learned is less than it must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=Path('work_dirs/sample'), help='result folder')
    parser.add_argument('--again', action='store_true', help='delete earlier results first')
    args = parser.parse_args()

    from cellseg_mm.data.drawing.sample import make_sample
    from cellseg_mm.data.preparing import prepare
    from cellseg_mm.data.preparing.groups import GroupRule
    from cellseg_mm.data.preparing.records import PrepareParams
    from cellseg_mm.data.preparing.text import screen_text
    from cellseg_mm.training import cross_validation

    if args.again and args.out.exists():
        shutil.rmtree(args.out)
    data = args.out / 'data'
    if not data.is_dir():
        print('drawing the sample images ...', flush=True)
        make_sample(data)
    groups = GroupRule(csv_path=data / 'manifest.csv')
    report = prepare.prepare(data, PrepareParams(n_folds=2, groups=groups))
    report.raise_for_errors()
    print(screen_text(report), flush=True)
    # The configs read where the data are from here, in this process and in the steps' processes.
    os.environ['CELLSEG_DATA'] = str(data)
    configs = sorted((CONFIGS / 'sample').glob('fold*.py'))
    devices = cross_validation.visible_devices()
    if devices == ['']:
        # Without a GPU the folds train side by side: a small model gains next to nothing from a
        # second thread.
        devices = [''] * min(len(configs), os.cpu_count() or 1)
        os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // len(devices))))
    cross_validation.run_plan(cross_validation.make_plan(configs, work_root=args.out), devices)
    work_dirs = [work_dir_of(path, args.out) for path in configs]
    path = scores_path(ensemble_dir(work_dirs), 'oof')
    ap50 = json.loads(path.read_text())['headline']['segm_AP50']
    print(f'out-of-fold mask AP50 {ap50:.3f} ({path})')
    print(f'pictures and submission: {path.parent}')
    if ap50 < LEARNED_AP50:
        print(f'error: expected at least {LEARNED_AP50}', file=sys.stderr)
    return int(ap50 < LEARNED_AP50)


if __name__ == '__main__':
    run_tool(main)

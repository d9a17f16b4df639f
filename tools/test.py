"""Score a fold on its own validation images.

Example: python tools/test.py configs/fold0.py [CHECKPOINT]
"""

from __future__ import annotations

import argparse
import shlex

from cellseg_mm.cli import add_config_arguments, run_tool


def main() -> None:
    """Parse MMDetection's test options and score."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file, for example configs/fold0.py')
    parser.add_argument(
        'checkpoint', nargs='?', default='best', help='file, or the best of the work folder'
    )
    parser.add_argument('--out', help='folder for instances and scores (default: work folder)')
    parser.add_argument('--amp', action='store_true', help='use automatic mixed precision')
    parser.add_argument(
        '--tta',
        help='hflip, flips or d4, and scales: flips,scales=0.8/1.25; results are named after it',
    )
    add_config_arguments(parser)
    args = parser.parse_args()

    from cellseg_mm.training.load_config import load_config
    from cellseg_mm.training.train import score_checkpoint

    cfg = load_config(
        args.config,
        cfg_options=args.cfg_options,
        work_dir=args.work_dir,
        launcher=args.launcher,
        local_rank=args.local_rank,
    )
    score_checkpoint(
        cfg, checkpoint=args.checkpoint, out_dir=args.out, amp=args.amp, tta_spec=args.tta
    )
    print(f'instances and scores: {args.out or cfg.work_dir}')
    if not args.out:
        print(f'next: python tools/report.py --work-dir {shlex.quote(cfg.work_dir)}')


if __name__ == '__main__':
    run_tool(main)

"""Train one fold.

Example: python tools/train.py configs/fold0.py

With --start-from, training goes on from a model's weights, and the end says what has changed on
held-out images that nobody corrected: docs/corrections.md.
"""

from __future__ import annotations

import argparse
import functools
import sys

from cellseg_mm.cli import add_config_arguments, run_tool, same_run


def main() -> None:
    """Parse MMDetection's training options and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file, for example configs/fold0.py')
    parser.add_argument('--amp', action='store_true', help='train with automatic mixed precision')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate with the batch size'
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='go on from this checkpoint, or from the newest intact one in the work folder',
    )
    parser.add_argument(
        '--start-from',
        metavar='CHECKPOINT',
        help='begin with these weights in a new --work-dir, and compare with them at the end',
    )
    parser.add_argument(
        '--deterministic', action='store_true', help='same weights twice; see docs for its cost'
    )
    parser.add_argument(
        '--all-folds',
        action='store_true',
        help='train one more member on all images, for as long as the finished folds chose; it is '
        'never scored on them',
    )
    add_config_arguments(parser)
    args = parser.parse_args()

    from cellseg_mm.training.all_folds import train_on_all_folds
    from cellseg_mm.training.comparison import begin_with, compare_with_start
    from cellseg_mm.training.load_config import load_config
    from cellseg_mm.training.train import train

    read = functools.partial(
        load_config,
        args.config,
        cfg_options=args.cfg_options,
        work_dir=None if args.all_folds else args.work_dir,
        launcher=args.launcher,
        local_rank=args.local_rank,
    )
    cfg = read()
    if args.start_from:
        begin_with(cfg, args.start_from)
    if args.all_folds:
        print(train_on_all_folds(cfg, work_dir=args.work_dir))
    checkpoint = train(
        cfg,
        resume=args.resume,
        amp=args.amp,
        auto_scale_lr=args.auto_scale_lr,
        deterministic=args.deterministic,
    )
    if args.all_folds:
        print(f'trained on all images: {checkpoint}')
        print(f'next: python tools/predict.py {args.config} {checkpoint} IMAGES --out OUT')
        return
    print(f'best checkpoint: {checkpoint}')
    if args.start_from and (said := compare_with_start(read, args.start_from, checkpoint)):
        print(said)
    print(f'next: python tools/test.py {args.config}{same_run(sys.argv)}')


if __name__ == '__main__':
    run_tool(main, go_on='the same command with --resume goes on from the newest checkpoint')

"""Look at the data as the model gets it.

Example: python tools/browse.py configs/fold0.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cellseg_mm.cli import add_config_arguments, run_tool


def main() -> None:
    """Parse, draw, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file, for example configs/fold0.py')
    parser.add_argument('--split', choices=['train', 'val'], default='train')
    parser.add_argument('--n', type=int, help='pictures (16), or draws of --augmentations (3)')
    parser.add_argument('--out', help='PNG file (default: in the work folder)')
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        '--dataset', action='store_true', help='the files as they are, and their statistics'
    )
    what.add_argument(
        '--augmentations', action='store_true', help='before and after each transform'
    )
    add_config_arguments(parser)
    args = parser.parse_args()

    from mmengine.registry import init_default_scope

    from cellseg_mm.checks import browse
    from cellseg_mm.results import overlay
    from cellseg_mm.training.load_config import load_config

    cfg = load_config(
        args.config,
        cfg_options=args.cfg_options,
        work_dir=args.work_dir,
        launcher=args.launcher,
        local_rank=args.local_rank,
    )
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    if args.augmentations:
        name, browsed = 'augmentations', browse.browse_augmentations(cfg, n=args.n or 3)
    elif args.dataset:
        name = 'dataset'
        browsed = browse.browse_dataset(cfg, split=args.split, n=args.n or 16)
    else:
        name = 'samples'
        browsed = browse.browse_samples(cfg, split=args.split, n=args.n or 16)
    out = Path(args.out or Path(cfg.work_dir) / f'{name}_{args.split}.png')
    overlay.write_png(out, browsed.picture)
    print(browsed.text)
    print(f'picture: {out}')


if __name__ == '__main__':
    run_tool(main)

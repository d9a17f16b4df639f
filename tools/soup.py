"""Average the weights of folds, or of checkpoints of one fold, into one model.

python tools/soup.py configs/*.py                                   # best of each fold
python tools/soup.py configs/fold0.py --checkpoints work_dirs/fold0/iter_*.pth --greedy
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cellseg_mm.cli import add_config_arguments, run_tool
from cellseg_mm.training.load_config import load_config


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='+', help='one per fold, of one architecture')
    parser.add_argument('--checkpoints', nargs='+', help='instead of the best of each work folder')
    parser.add_argument(
        '--greedy', action='store_true', help='choose on images that no candidate saw'
    )
    parser.add_argument(
        '--batches', type=int, default=50, help='training batches for norm statistics'
    )
    parser.add_argument('--work-root', help='folder of the work folders (default: work_dirs)')
    parser.add_argument('--out', help='checkpoint to write (default: soup.pth beside the folds)')
    add_config_arguments(parser)
    return parser.parse_args(words)


def main() -> None:
    """Cook, write, and say what is in it."""
    args = parse_args()
    import torch

    from cellseg_mm.core.layout import ensemble_dir, work_dirs_of
    from cellseg_mm.data.config import dataset_settings
    from cellseg_mm.detectors import soup
    from cellseg_mm.weights.find import find_checkpoints

    work_dirs = work_dirs_of(args.configs, args.work_root)
    args.config = args.configs[0]
    cfg = load_config(args)
    paths = args.checkpoints or find_checkpoints(work_dirs)
    classes = tuple(dataset_settings(cfg).metainfo.classes)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    kitchen = soup.SoupKitchen(cfg, n_batches=args.batches, device=device)
    ingredients = soup.load_ingredients(paths, classes)
    out = Path(args.out or ensemble_dir(work_dirs) / 'soup.pth')
    made = kitchen.greedy(ingredients, out) if args.greedy else kitchen.uniform(ingredients, out)
    print(soup.describe(made))


if __name__ == '__main__':
    run_tool(main)

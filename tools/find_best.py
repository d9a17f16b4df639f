"""Choose score thresholds, least area, masks, augmentation and fusion out of fold.

    python tools/find_best.py configs/*.py

Writes inference.json for tools/ensemble.py and tools/predict.py (--settings).
"""

from __future__ import annotations

import argparse

from cellseg_mm.cli import run_tool


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='+', help='one config per fold, all tested')
    parser.add_argument('--work-root', help='folder of the work folders (default: work_dirs)')
    parser.add_argument('--out', help='folder for the result (default: ensemble beside the folds)')
    return parser.parse_args(words)


def main() -> None:
    """Choose, write, and say what was chosen."""
    args = parse_args()
    from mmengine.config import Config

    from cellseg_mm.core.layout import ensemble_dir, work_dir_of
    from cellseg_mm.data.config import DataSettings
    from cellseg_mm.selection.find_best import Inputs, find_best

    work_dirs = [work_dir_of(path, args.work_root) for path in args.configs]
    data = DataSettings.from_config(Config.fromfile(args.configs[0]), 'test_dataloader')
    inputs = Inputs(
        configs=tuple(args.configs),
        work_dirs=tuple(work_dirs),
        data_root=data.data_root,
        folds_path=data.folds_path,
        class_names=data.class_names,
        work_root=args.work_root,
    )
    print(find_best(inputs, args.out or ensemble_dir(work_dirs)))


if __name__ == '__main__':
    run_tool(main)

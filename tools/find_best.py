"""Choose score thresholds, least area, masks, augmentation and fusion out of fold.

    python tools/find_best.py configs/*.py

Writes inference.json for tools/ensemble.py and tools/predict.py (--settings).
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from cellseg_mm.cli import run_tool


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='+', help='one config per fold, all tested')
    parser.add_argument('--work-root', help='folder of the work folders (default: work_dirs)')
    parser.add_argument('--out', help='folder for the result (default: ensemble beside the folds)')
    parser.add_argument(
        '--cap',
        type=int,
        help='detections per class and image that the board counts, as COCO 100 (default: all)',
    )
    return parser.parse_args(words)


def main() -> None:
    """Choose, write, and say what was chosen."""
    args = parse_args()
    from mmengine.config import Config

    from cellseg_mm.core.layout import INFERENCE, ensemble_dir, work_dir_of
    from cellseg_mm.data.config import DataSettings
    from cellseg_mm.selection.find_best import Inputs, describe, find_best

    work_dirs = [work_dir_of(path, args.work_root) for path in args.configs]
    configs = [Config.fromfile(path) for path in args.configs]
    data = DataSettings.from_config(configs[0], 'test_dataloader')
    inputs = Inputs(
        configs=tuple(args.configs),
        work_dirs=tuple(work_dirs),
        data_root=data.data_root,
        folds_path=data.folds_path,
        class_names=data.class_names,
        settings={DataSettings.from_config(cfg).fold: cfg.to_dict() for cfg in configs},
    )
    out_dir = Path(args.out or ensemble_dir(work_dirs))
    commands = next_commands(args.configs, args.work_root, out_dir / INFERENCE)
    found = find_best(inputs, out_dir, commands=commands, cap=args.cap)
    print(f'{describe(found)}\nwritten: {found.path}\nnext:')
    print('\n'.join(f'  {command}' for command in commands))


def next_commands(configs: list[str], work_root: str | None, path: Path) -> list[str]:
    """Return what uses the settings."""
    root = ['--work-root', work_root] if work_root else []
    words = ['python', 'tools/ensemble.py', *configs, *root, '--settings', str(path)]
    predict = ['python', 'tools/predict.py', *configs, 'IMAGES', '--out', 'OUT', *root]
    return [shlex.join(words), shlex.join([*predict, '--settings', str(path)])]


if __name__ == '__main__':
    run_tool(main)

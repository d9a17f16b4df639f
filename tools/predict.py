"""Find the cells in images, folders or whole slides.

python tools/predict.py configs/fold0.py best slides/ --out out --format geojson csv
python tools/predict.py configs/fold?.py data/test_release --out out     (an ensemble of all folds)

First the config (several make an ensemble), then perhaps checkpoints (.pth, or best), then images,
folders or patterns. Start it again after an interruption: what is done is skipped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cellseg_mm.cli import add_config_arguments, run_tool
from cellseg_mm.training.load_config import load_config


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and sort the words into configs, checkpoints and inputs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('words', nargs='+', metavar='CONFIG... [CHECKPOINT...|best] INPUT...')
    parser.add_argument('--out', type=Path, required=True, help='folder for the results')
    parser.add_argument(
        '--format',
        nargs='+',
        default=['overlay'],
        help='label-map, geojson, imagej, csv, coco, overlay; joined by commas or spaces',
    )
    parser.add_argument(
        '--score-thr', type=float, help='least score in the formats (0.5; with --settings 0)'
    )
    parser.add_argument('--tile', type=int, help='cut larger images into tiles of so many px')
    parser.add_argument('--overlap', type=int, default=128, help='px; more than the largest cell')
    parser.add_argument('--level', type=int, default=0, help='level of image pyramids')
    parser.add_argument('--tta', help='hflip, flips or d4, and scales: d4,scales=0.8/1.25')
    parser.add_argument('--fusion', help='rule of an ensemble, for example soft_mask')
    parser.add_argument('--post', help='afterwards, for example disjoint,min_area_px=20')
    parser.add_argument('--settings', help='inference.json of tools/find_best.py')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:1')
    parser.add_argument('--batch-size', type=int, help='tiles at once (1 on a CPU, 4 on a GPU)')
    parser.add_argument('--placement', choices=['auto', 'device', 'turns'], default='auto')
    parser.add_argument('--workers', type=int, default=1, help='threads that read ahead')
    parser.add_argument(
        '--red-blue',
        choices=['config', 'normal', 'swapped'],
        default='config',
        help='whether the files have red and blue swapped, as the training images of the config',
    )
    parser.add_argument('--work-root', help='folder of the work folders (default: work_dirs)')
    parser.add_argument('--again', action='store_true', help='predict what is done, too')
    add_config_arguments(parser)
    args = parser.parse_args(words)
    rest = list(args.words)
    args.configs = _take(rest, lambda word: word.endswith('.py'))
    args.checkpoints = _take(rest, lambda word: word == 'best' or word.endswith(('.pth', '.pkl')))
    args.inputs = rest
    if not args.configs or not args.inputs:
        parser.error('give a config (.py), perhaps checkpoints, and at least one image or folder')
    return args


def _take(words: list[str], fits) -> list[str]:
    taken = []
    while words and fits(words[0]):
        taken.append(words.pop(0))
    return taken


def main() -> int:
    """Load, predict, and say where the results are."""
    args = parse_args()
    from cellseg_mm.detectors.detector import from_command_line
    from cellseg_mm.predict import predict
    from cellseg_mm.predict.items import find_items

    args.work_dir = args.work_dir or str(args.out)
    configs = {}
    for path in args.configs:
        args.config = path
        configs[path] = load_config(args)
    items = find_items(args.inputs, out_dir=args.out)
    detector, params = from_command_line(configs, args)
    summary = predict.predict(items, detector, params)
    print(summary.describe())
    print(f'results: {args.out}')
    return summary.exit_code


if __name__ == '__main__':
    run_tool(main)

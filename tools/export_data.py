"""Write a data folder as a data set of other tools: COCO, or YOLO's outlines.

python tools/export_data.py coco data out            out/images/, out/train.json
python tools/export_data.py yolo data out --val-fold 0    with a validation set
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cellseg_mm.cli import run_tool
from cellseg_mm.core.layout import folds_file
from cellseg_mm.data.config import CLASS_NAMES


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('kind', choices=['coco', 'yolo'])
    add('data_root', type=Path, help='the data folder')
    add('out_dir', type=Path, help='folder to make')
    add(
        '--classes',
        nargs='+',
        metavar='NAME',
        help=f'names of class 1, 2, ... (default: of import.json, or {" ".join(CLASS_NAMES)})',
    )
    add('--val-fold', type=int, metavar='K', help='this fold becomes the validation set')
    add('--swap-red-blue', action='store_true', help='where the data are stored as BGR')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Write the data set and say what is in it."""
    args = parse_args(argv)
    from cellseg_mm.data.importing.folder_notes import imported_classes
    from cellseg_mm.results.data_sets import DataSetParams, write_data_set

    names = tuple(args.classes or imported_classes(args.data_root) or CLASS_NAMES)
    # the configs read the same variable
    folds = folds_file(args.data_root, os.environ.get('CELLSEG_FOLDS'))
    params = DataSetParams(names, folds, args.val_fold, args.swap_red_blue)
    print(write_data_set(args.kind, args.data_root, args.out_dir, params).text())
    print(f'data set: {args.out_dir}')


if __name__ == '__main__':
    run_tool(main)

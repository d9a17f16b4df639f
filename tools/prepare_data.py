"""Check a data folder and write its folds.

Reads every image and label map, lists all problems at once, prints tables by class, size and fold,
and writes folds.json, index.json and data_report.txt. Exit status 1 means:
errors in the data.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import get_args

from cellseg_mm.cli import run_tool
from cellseg_mm.data.config import CLASS_NAMES
from cellseg_mm.data.folds import ORIGINAL_SEED, Method
from cellseg_mm.data.preparing import prepare
from cellseg_mm.data.preparing.groups import GroupRule
from cellseg_mm.data.preparing.records import PrepareParams
from cellseg_mm.data.preparing.text import next_command, screen_text
from cellseg_mm.data.tiff import DEFAULT_MAX_PIXELS


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    # The configs read the same two variables.
    data_root = Path(os.environ.get('CELLSEG_DATA', 'data'))
    add('data_root', type=Path, nargs='?', help=f'the data folder (default: {data_root})')
    add('--out', type=Path, metavar='DIR', help='folder for the results (default: data folder)')
    add('--classes', nargs='+', default=CLASS_NAMES, metavar='NAME')
    add('--exclude', type=Path, metavar='FILE', help='case names to leave out, one a line')
    add(
        '--groups-csv',
        type=Path,
        metavar='FILE',
        help='table of cases and groups (default: manifest.csv of the data folder)',
    )
    add('--no-manifest', action='store_true', help='do not take manifest.csv of the data folder')
    add('--name-column', default='uuid', help='its column of case names')
    add('--group-column', default='patient', help='its column of groups')
    add('--groups-regex', default='', metavar='RE', help="such as '(TCGA-..-....)'")
    add('--split-alike', action='store_true', help='do not keep images that look alike together')
    add('--folds', type=int, default=5, help='number of folds')
    add('--seed', type=int, default=ORIGINAL_SEED)
    add('--method', choices=get_args(Method), default='grouped')
    add('--new-folds', action='store_true', help='replace a folds file that differs')
    add(
        '--extend-folds',
        action='store_true',
        help='add new cases to the folds that are there; no old case changes its fold',
    )
    add('--workers', type=int, default=0, help='processes (default: one per core, at most 8)')
    add('--max-pixels', type=int, default=DEFAULT_MAX_PIXELS, help='largest image accepted, in px')
    add(
        '--range',
        default='keep',
        metavar='keep|auto|LOW,HIGH',
        help='values of more than 8 bits that become 0..255 (default: as recorded, else auto)',
    )
    add(
        '--um-per-px',
        type=float,
        metavar='UM',
        help='side of a pixel in micrometres (default: what the files say), such as 0.25 for 40x',
    )
    add('--no-index', action='store_true', help='read every file again')
    args = parser.parse_args()
    if args.data_root is None:
        args.data_root = data_root
        if args.out is None and os.environ.get('CELLSEG_FOLDS', 'auto') != 'auto':
            args.out = Path(os.environ['CELLSEG_FOLDS']).parent
    return args


def main() -> int:
    """Run the check; return the exit status."""
    args = parse_args()
    params = PrepareParams(
        class_names=tuple(args.classes),
        out_dir=args.out,
        exclude_file=args.exclude,
        groups=GroupRule(
            csv_path=args.groups_csv,
            name_column=args.name_column,
            group_column=args.group_column,
            regex=args.groups_regex,
            alike=not args.split_alike,
            manifest=not args.no_manifest,
        ),
        n_folds=args.folds,
        seed=args.seed,
        method=args.method,
        new_folds=args.new_folds,
        extend_folds=args.extend_folds,
        n_workers=args.workers,
        max_pixels=args.max_pixels,
        use_index=not args.no_index,
        value_range=args.range,
        um_per_px=args.um_per_px,
    )
    report = prepare.prepare(args.data_root, params)
    print(screen_text(report))
    if report.errors:
        print(f'error: {len(report.errors)} problem(s), see above', file=sys.stderr)
        return 1
    added = len(report.folds.added)
    kept = f' ({added} case(s) were added, the others kept their folds)' if added else ''
    kept = kept or (' (kept as it was)' if report.is_folds_kept else '')
    print(f'folds {report.folds.hash} in {report.folds_path}{kept}')
    print(f'next: {next_command(report, os.environ)}')
    return 0


if __name__ == '__main__':
    run_tool(main)

"""Make one page about a training.

python tools/report.py configs/*.py
python tools/report.py --work-dir work_dirs/fold0    # one fold, or an ensemble folder
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cellseg_mm.cli import run_tool
from cellseg_mm.core.errors import ConfigError


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='*', help='one config per fold')
    parser.add_argument('--work-root', help='folder of all work folders (default: work_dirs)')
    parser.add_argument('--work-dir', help='one work folder instead of configs')
    parser.add_argument(
        '--out', help='folder for report.html, and of the ensemble (default: where that goes)'
    )
    parser.add_argument('--n-worst', type=int, default=16, help='images with the lowest PQ')
    parser.add_argument('--n-best', type=int, default=6, help='images with the highest PQ')
    args = parser.parse_args()
    if bool(args.configs) == bool(args.work_dir):
        raise ConfigError('report: expected either configs or --work-dir; give one of them')

    from cellseg_mm.report import report

    if args.work_dir:
        inputs = report.from_work_dir(args.work_dir)
    else:
        inputs = report.from_configs(args.configs, work_root=args.work_root, out_dir=args.out)
    out_dir = Path(args.out) if args.out else inputs.ensemble_path.parent
    limits = report.Limits(n_worst=args.n_worst, n_best=args.n_best)
    written = report.write_report(inputs, out_dir / report.REPORT_FILE, limits=limits)
    for note in written.notes:
        print(f'missing: {note}')
    print(f'report: {written.path} ({written.n_bytes / 1e6:.1f} MB, {written.n_images} images)')


if __name__ == '__main__':
    run_tool(main)

"""Train, test, pool, choose, ensemble and report.

    python tools/cross_validate.py configs/*.py

Start the same command again after any interruption: what is done is not done again.
Status: 0 all done; 2 something is wrong, or a step failed (its log is named); 130 and 143 ended by
Ctrl-C and by SIGTERM.
"""

from __future__ import annotations

import argparse

from cellseg_mm.cli import run_tool


def main() -> None:
    """Plan and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='+', help='one config per fold')
    parser.add_argument('--work-root', help='folder for all work folders (default: work_dirs)')
    parser.add_argument(
        '--gpus', help='devices as CUDA_VISIBLE_DEVICES names them: 0,1,3 (default: all)'
    )
    parser.add_argument(
        '--tta',
        nargs='+',
        default=[],
        help='test each fold with these too and choose the best: hflip flips d4',
    )
    parser.add_argument('--dry-run', action='store_true', help='print the plan only')
    parser.add_argument('--slurm', action='store_true', help='print a Slurm job array instead')
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], help='key=value settings for every fold'
    )
    args = parser.parse_args()

    from cellseg_mm.training import cross_validation

    if args.slurm:
        text = cross_validation.slurm_script(
            args.configs, args.cfg_options, work_root=args.work_root, ttas=args.tta
        )
        print(text, end='')
        return
    plan = cross_validation.make_plan(
        args.configs, work_root=args.work_root, options=args.cfg_options, ttas=args.tta
    )
    if args.dry_run:
        print(plan.text())
        return
    cross_validation.run_plan(
        plan, args.gpus.split(',') if args.gpus else cross_validation.visible_devices()
    )


if __name__ == '__main__':
    run_tool(main)

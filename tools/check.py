"""Check environment, data, folds, results and configs.

    python tools/check.py configs/fold0.py

Prints one line per finding: OK, warn (look at it) or ERROR (results would be wrong), with what to
do. Exit status 1 means that there are errors. Writes nothing.
"""

from __future__ import annotations

import argparse

from cellseg_mm.cli import run_tool


def main() -> int:
    """Run all checks and print them as they come."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='+', help='config files')
    parser.add_argument('--work-root', help='folder of the work folders (default: work_dirs)')
    parser.add_argument('--quiet', action='store_true', help='print warnings and errors only')
    args = parser.parse_args()

    from mmengine.logging import MMLogger

    import cellseg_mm.components  # noqa: F401 - registers what configs name
    from cellseg_mm.checks.lines import summary
    from cellseg_mm.checks.run import run_checks

    MMLogger.get_instance('check', log_level='WARNING')  # findings are printed, not logged
    lines = []
    for line in run_checks(args.configs, work_root=args.work_root):
        lines.append(line)
        if not args.quiet or line.level != 'ok':
            print(line, flush=True)
    print(summary(lines))
    return int(any(line.level == 'error' for line in lines))


if __name__ == '__main__':
    run_tool(main)

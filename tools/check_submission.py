"""Check a submission of any origin, or show how two differ.

    python tools/check_submission.py test-results.json.zip --id-map test_image_name_to_ids.json
    python tools/check_submission.py mine.zip yours.zip --id-map test_image_name_to_ids.json

Exit code: 0 no error found (warnings may be shown), 1 errors found, 2 a file cannot be read or
compared.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cellseg_mm.cli import run_tool
from cellseg_mm.data.config import N_CLASSES
from cellseg_mm.data.labels import read_id_map
from cellseg_mm.results.submission_check import diff_submissions, format_diff, lint_submission


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('file', type=Path, help='submission: a zip, or its JSON')
    parser.add_argument('other', type=Path, nargs='?', help='second submission to compare with')
    parser.add_argument('--id-map', type=Path, required=True, help='test_image_name_to_ids.json')
    parser.add_argument('--n-classes', type=int, default=N_CLASSES)
    parser.add_argument('--class-names', nargs='*', default=[], help='for the table, in order')
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Print remarks and, for two files, the table of differences; 1 if a remark is an error."""
    args = parse_args(words)
    id_map = read_id_map(args.id_map)
    has_errors = False
    for path in filter(None, (args.file, args.other)):
        remarks = lint_submission(path, id_map, n_classes=args.n_classes)
        has_errors |= any(remark.severity == 'error' for remark in remarks)
        for remark in remarks:
            print(f'{path}: {remark.severity}: {remark.code}: {remark.message}')
        print(f'{path}: {"no finding" if not remarks else f"{len(remarks)} finding(s)"}')
    if args.other:
        print(format_diff(diff_submissions(args.file, args.other, id_map), args.class_names))
    return int(has_errors)


if __name__ == '__main__':
    run_tool(main)

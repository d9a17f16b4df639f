"""Import annotated images from another format into a data folder that prepare_data.py accepts.

Cases that cannot be imported are listed; the others are written. Exit status 1 means that there
were problems.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cellseg_mm.core.errors import CellSegError
from cellseg_mm.data.importing.import_data import FINDERS, import_data
from cellseg_mm.data.importing.sources import ImportParams
from cellseg_mm.data.tiff import DEFAULT_MAX_PIXELS


def _pair(text: str) -> tuple[str, str]:
    source, separator, target = text.partition('=')
    if not (source and separator and target):
        raise argparse.ArgumentTypeError(f'{text!r} is not SOURCE=CLASS')
    return source, target


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog='monusac: folders of patients with .tif/.svs and .xml; coco: a JSON file; '
        'label-map: images with <name>_masks, <name>_cp_masks or masks/<name> (Cellpose, '
        'StarDist); '
        'mask-folders: <name>/images/* and <name>/masks/* (DSB2018).',
    )
    add = parser.add_argument
    add('source_format', choices=sorted(FINDERS))
    add('source', type=Path, help='folder, or the JSON file of COCO')
    add('out_dir', type=Path, help='data folder to write into')
    add('--classes', nargs='+', default=[], metavar='NAME', help='names of class 1, 2, ...')
    add('--map', nargs='+', default=[], type=_pair, metavar='SOURCE=CLASS', help='rename classes')
    add('--skip', nargs='+', default=[], metavar='NAME', help='classes of the source to leave out')
    add('--class', dest='single_class', default='', metavar='NAME', help='class of all cells')
    add('--images', type=Path, metavar='DIR', help='folder of the images of a COCO file')
    add('--swap-red-blue', action='store_true', help='store BGR, as the course collection does')
    add('--replace', action='store_true', help='write cases again that are already there')
    add('--max-pixels', type=int, default=DEFAULT_MAX_PIXELS, help='largest image accepted, in px')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the import; return the exit status."""
    args = parse_args(argv)
    params = ImportParams(
        class_names=tuple(args.classes),
        class_map=dict(args.map),
        skipped=frozenset(args.skip),
        single_class=args.single_class,
        image_dir=args.images,
        swap_red_blue=args.swap_red_blue,
        replace=args.replace,
        max_pixels=args.max_pixels,
    )
    try:
        report = import_data(args.source_format, args.source, args.out_dir, params)
    except CellSegError as problem:
        print(f'error: {problem}', file=sys.stderr)
        return 1
    print(report.text())
    if report.problems:
        print(f'error: {len(report.problems)} case(s) not imported, see above', file=sys.stderr)
        return 1
    print(f'table of cases: {report.manifest_path}')
    return 0


if __name__ == '__main__':
    sys.exit(main())

"""Import annotated images from another format into a data folder that prepare_data.py accepts.

What cannot be used is left out, counted by reason and listed; the rest is written. Exit status: 0
done, 1 some cases were not imported, 2 the command or the source as a whole is wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cellseg_mm.cli import run_tool
from cellseg_mm.data.importing.import_data import FINDERS, import_data
from cellseg_mm.data.importing.sources import ImportParams
from cellseg_mm.data.tiff import DEFAULT_MAX_PIXELS


def _pair(text: str) -> tuple[str, str]:
    source, separator, target = text.rpartition('=')
    if not (separator and target.strip()):
        raise argparse.ArgumentTypeError(
            f'{text!r} is not SOURCE=CLASS; expected such as Lymphocyte=immune (=CLASS for cells '
            f'without a name)'
        )
    return source, target


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog='monusac: .tif/.svs and .xml of one name, in folders of patients (MoNuSAC) or in a '
        'folder each (MoNuSeg: name its class with --class); coco: a JSON file; '
        'label-map: images with <name>_masks, <name>_cp_masks or masks/<name> (Cellpose, '
        'StarDist); '
        'mask-folders: <name>/images/* and <name>/masks/* (DSB2018); '
        'geojson: <name>.geojson beside the image (QuPath); imagej: <name>.rois.zip or .zip (ROI '
        'Manager); cellpose: <name>_seg.npy; labelme: <name>.json; yolo: images/, labels/ and '
        'data.yaml; cvat: annotations.xml (for images 1.1); label-table: label maps with '
        '<name>_classes.csv or .json (id, class); colour-mask: as label-map, but colours are '
        'classes (--colour); '
        'pannuke: images.npy, masks.npy; consep: <name>.mat; hovernet: <name>.json (CellViT too); '
        'nnunet: imagesTr, labelsTr, dataset.json; run-lengths: a CSV file (DSB2018). '
        'What cannot be used is left '
        'out, counted and listed. Exit status: 0 done, 1 some cases were not imported, 2 wrong '
        'options or source.',
    )
    add = parser.add_argument
    add('source_format', choices=sorted(FINDERS))
    add('source', type=Path, help='folder, or one file of annotations')
    add('out_dir', type=Path, help='data folder to write into')
    add('--classes', nargs='+', default=[], metavar='NAME', help='names of class 1, 2, ...')
    add('--map', nargs='+', default=[], type=_pair, metavar='SOURCE=CLASS', help='rename classes')
    add('--skip', nargs='+', default=[], metavar='NAME', help='classes of the source to leave out')
    add(
        '--class',
        dest='single_class',
        default='',
        metavar='NAME',
        help='class of all cells that have no class name in the source',
    )
    add('--images', type=Path, metavar='DIR', help='folder of the images, if they lie elsewhere')
    add('--nuclei', action='store_true', help="QuPath's cells: take their nuclei")
    add(
        '--colour',
        nargs='+',
        action='extend',
        default=[],
        type=_pair,
        metavar='COLOUR=CLASS',
        help="what a mask's colours mean: '#ff0000=tumor'; grey values too: 1=tumor",
    )
    add(
        '--binary',
        choices=['components', 'ids'],
        default='',
        help='masks of two values: components makes each connected part a cell, ids takes each '
        'value as one cell; without it they are refused',
    )
    add(
        '--strict',
        action='store_true',
        help='do not write a case of which something cannot be used',
    )
    add('--swap-red-blue', action='store_true', help='store BGR, as the course collection does')
    add('--replace', action='store_true', help='write cases again that are already there')
    add(
        '--add',
        action='store_true',
        help='correct cases of a data folder, or add new ones: pictures stay, old cells are kept '
        'in its folder "replaced", origins are noted in origins.json',
    )
    add('--max-pixels', type=int, default=DEFAULT_MAX_PIXELS, help='largest image accepted, in px')
    args = parser.parse_args(argv)
    for source in dict(args.map):
        targets = sorted({target for name, target in args.map if name == source})
        if len(targets) > 1:
            parser.error(f'--map: {source!r} goes to {targets}; expected one; remove the others')
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the import; return the exit status."""
    args = parse_args(argv)
    params = ImportParams(
        class_names=tuple(args.classes),
        class_map=dict(args.map),
        skipped=frozenset(args.skip),
        single_class=args.single_class,
        image_dir=args.images,
        colours=dict(args.colour),
        nuclei=args.nuclei,
        binary=args.binary,
        strict=args.strict,
        swap_red_blue=args.swap_red_blue,
        replace=args.replace,
        add=args.add,
        max_pixels=args.max_pixels,
    )
    report = import_data(args.source_format, args.source, args.out_dir, params)
    print(report.text())
    if report.problems:
        print(f'error: {len(report.problems)} case(s) not imported, see above', file=sys.stderr)
        return 1
    print(f'table of cases: {report.manifest_path}')
    return 0


if __name__ == '__main__':
    run_tool(main)

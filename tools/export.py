"""Write trained models into one file that needs no torch.

    python tools/export.py configs/fold0.py --out model.onnx
    python tools/export.py configs/fold?.py --settings inference.json --out model.cellseg
    python tools/export.py configs/fold0.py --card card.json --out package.zip       (BioImage.IO)
    python tools/export.py he4 --out he4.html                (a page that finds cells)

The file is checked before it is written: it must find the same cells as the model. Then:

    python tools/predict.py model.cellseg images/ --out out
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cellseg_mm.cli import add_config_arguments, run_tool


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'configs',
        nargs='+',
        help='one config per member, or one for all; for a page also a model file or its name',
    )
    parser.add_argument('--out', type=Path, required=True, help='.onnx, .cellseg, .zip or .html')
    parser.add_argument(
        '--checkpoint',
        nargs='+',
        default=['best'],
        help='.pth files, or best: that of each work folder',
    )
    parser.add_argument(
        '--format',
        choices=['onnx', 'cellseg', 'bioimageio', 'html'],
        help="as --out's suffix says; bioimageio is a .zip of one member for bioimage.io",
    )
    parser.add_argument('--settings', help='inference.json of tools/find_best.py, for .cellseg')
    parser.add_argument('--half', action='store_true', help='weights in 16 bits: half the size')
    parser.add_argument('--image', type=Path, help='picture to check with (a validation image)')
    parser.add_argument(
        '--card',
        type=Path,
        help='JSON file with licence, data and more, for .cellseg: docs/export.md',
    )
    parser.add_argument(
        '--scores',
        type=Path,
        help='out-of-fold scores for the card (those beside the work folders)',
    )
    parser.add_argument(
        '--red-blue',
        choices=['config', 'normal', 'swapped'],
        default='config',
        help='whether the pictures that the file will be given have red and blue swapped',
    )
    parser.add_argument(
        '--ort-web', type=Path, help='onnxruntime-web for a page, folder or .tgz (default: by npm)'
    )
    parser.add_argument('--work-root', help='folder of the work folders (default: work_dirs)')
    add_config_arguments(parser, launcher=False)
    args = parser.parse_args(words)
    suffix = '.zip' if args.format == 'bioimageio' else f'.{args.format}'
    if args.format is not None and args.out.suffix.lower() != suffix:
        parser.error(f'--format {args.format}: expected --out to end in {suffix}')
    return args


def main() -> None:
    """Export, check, and say how well the file agrees with the model."""
    args = parse_args()
    from cellseg_mm.light.model_file import is_model, read_model_file

    if args.out.suffix.lower() == '.html' and is_model(args.configs[0]):
        from cellseg_mm.exporting.html_page import check_one, write_page

        check_one(len(args.configs), str(args.out))
        file = read_model_file(args.configs[0])
        print(write_page(args.out, file, ort_web=args.ort_web).describe())
        return
    import cellseg_mm.components  # noqa: F401 - registers what a config may name
    from cellseg_mm.exporting.export import ExportOptions, export
    from cellseg_mm.predict.options import MemberOptions
    from cellseg_mm.training.load_config import load_config

    configs = {
        path: load_config(path, cfg_options=args.cfg_options, work_dir=args.work_dir)
        for path in args.configs
    }
    members = MemberOptions(
        checkpoints=() if args.checkpoint == ['best'] else tuple(args.checkpoint),
        work_root=args.work_root,
        settings_path=args.settings,
    )
    options = ExportOptions(
        out=args.out,
        half=args.half,
        image=args.image,
        card=args.card,
        scores=args.scores,
        red_blue_swapped={'normal': False, 'swapped': True}.get(args.red_blue),
        ort_web=args.ort_web,
    )
    print(export(configs, members, options).describe())


if __name__ == '__main__':
    run_tool(main)

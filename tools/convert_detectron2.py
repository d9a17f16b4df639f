"""Convert published Mask R-CNN weights into a checkpoint of our model, strictly.

    python tools/convert_detectron2.py model_final_14d201.pkl lsj400.pth
    python tools/convert_detectron2.py maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth v2.pth

Takes detectron2's new_baselines (R50, R101, RegNetX-4GF), torchvision's maskrcnn_resnet50_fpn_v2
and MMDetection's strong_baselines and simple_copy_paste, as a file or as the published URL. Every
tensor is mapped or the tool fails and says which is not. Beside OUT.pth it writes OUT.json with the
preprocessing the weights need; docs/weights.md has the config lines.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cellseg_mm.cli import run_tool


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('file', help='published file or URL')
    parser.add_argument('out', type=Path, metavar='OUT.pth')
    parser.add_argument(
        '--from',
        dest='source',
        default='auto',
        choices=('auto', 'detectron2', 'torchvision', 'mmdet'),
        help='whose names the file uses (default: told by the names)',
    )
    parser.add_argument(
        '--keep-classes',
        type=int,
        nargs='*',
        metavar='K',
        help='keep the class-wise rows too, for a warm start: all of them, or, for each class of '
        'your model, those of the COCO class with this number (0..79)',
    )
    return parser.parse_args(argv)


def main() -> None:
    """Convert one file."""
    args = parse_args()
    from cellseg_mm.weights.published import convert_file, locate

    conversion = convert_file(
        locate(args.file),
        args.out,
        source=args.source,
        keep_classes=args.keep_classes or None,
        keep_all_classes=args.keep_classes == [],
    )
    print(f'{conversion.summary()}: {args.out}, {args.out.with_suffix(".json")}')


if __name__ == '__main__':
    run_tool(main)

"""Find the cells in images, folders or whole slides.

python tools/predict.py he4 image.png --out out     (a model that comes with the package: H&E)
python tools/predict.py configs/fold0.py best slides/ --out out --format geojson csv
python tools/predict.py configs/fold?.py data/test_release --out out     (an ensemble of all folds)
python tools/predict.py model.cellseg slides/ --out out     (a file of tools/export.py, no torch)

First the config (several make an ensemble), then perhaps checkpoints (.pth, or best); or a model's
name or file (.cellseg, .onnx) in their place; then images, folders or patterns. Start it again
after an interruption: what is done is skipped. What a model is and who may use it:
python tools/predict.py he4 --card
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cellseg_mm.cli import add_config_arguments, add_member_arguments, run_tool

if TYPE_CHECKING:
    from cellseg_mm.predict.options import MemberOptions, PredictOptions
    from cellseg_mm.predict.summary import Summary


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and sort the words into configs, checkpoints and inputs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'words', nargs='+', metavar='CONFIG... [CHECKPOINT...|best] | MODEL, then INPUT...'
    )
    parser.add_argument('--out', type=Path, help='folder for the results')
    parser.add_argument(
        '--card', action='store_true', help='show what a model is, and do nothing else'
    )
    parser.add_argument(
        '--format',
        nargs='+',
        default=['overlay'],
        help='label-map, geojson, review, imagej, csv, coco, overlay; joined by commas or spaces',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        help='least score in the formats (0.5, or what --settings chose)',
    )
    parser.add_argument(
        '--tile',
        type=int,
        help='cut larger images into tiles of so many px (1024 for sides above 2048, or as a model '
        'file says: he4 512)',
    )
    parser.add_argument('--overlap', type=int, default=128, help='px; more than the largest cell')
    add_slide_arguments(parser)
    add_choice_arguments(parser)
    parser.add_argument('--tta', help='hflip, flips or d4, and scales: d4,scales=0.8/1.25')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:1')
    parser.add_argument('--batch-size', type=int, help='tiles at once (1 on a CPU, 4 on a GPU)')
    parser.add_argument('--workers', type=int, default=1, help='threads that read ahead')
    parser.add_argument(
        '--red-blue',
        choices=['config', 'normal', 'swapped'],
        default='config',
        help='whether the files have red and blue swapped; as the training images of the config, '
        'or as a model file says (he4: normal)',
    )
    parser.add_argument(
        '--range',
        default='config',
        metavar='auto|LOW,HIGH|config',
        help='values of more than 8 bits that become 0..255: by each file, as said, or as recorded '
        'with the model or its data (default)',
    )
    parser.add_argument('--again', action='store_true', help='predict what is done, too')
    add_sharing_arguments(parser)
    add_member_arguments(parser)
    add_config_arguments(parser, launcher=False)
    args = parser.parse_args(words)
    rest = list(args.words)
    args.models = _take_models(rest)
    args.configs = [] if args.models else _take(rest, lambda word: word.endswith('.py'))
    args.checkpoints = _take(rest, lambda word: word == 'best' or word.endswith(('.pth', '.pkl')))
    args.inputs = rest
    if args.card:
        if not args.models or rest:
            parser.error('--card: give names or files of models (.cellseg), and nothing else')
        return args
    if not (args.configs or args.models) or not args.inputs:
        parser.error(
            'give a model (a name such as he4, or a file .cellseg or .onnx) or a config (.py), '
            'perhaps with checkpoints; and at least one image or folder'
        )
    if args.out is None:
        parser.error('--out: expected a folder for the results')
    if args.models and (args.cfg_options or args.work_root or args.checkpoints):
        parser.error(
            'a model file has its own weights and settings: leave out checkpoints, --cfg-options '
            'and --work-root'
        )
    return args


def add_slide_arguments(parser: argparse.ArgumentParser) -> None:
    """Add at which size, and where, images are looked at."""
    parser.add_argument(
        '--level',
        type=int,
        help='level of image pyramids that is read as it is, 0 the largest; else the sizes of '
        'pixels decide',
    )
    parser.add_argument(
        '--um-per-px',
        type=float,
        metavar='UM',
        help="side of the images' pixels, if not as the files say",
    )
    parser.add_argument(
        '--tissue',
        default='slides',
        metavar='slides|auto|off|GEOJSON',
        help='look for cells in tissue only: in pyramids (default), in all images that are cut, '
        'in none; or only in the regions of a GeoJSON file, or of <name>.geojson in a folder',
    )


def add_sharing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how several processes share the work."""
    parser.add_argument(
        '--part',
        type=_part,
        metavar='I/N',
        help='do only the I-th of N shares; the command without it puts the images together',
    )
    parser.add_argument(
        '--slurm', type=int, metavar='N', help='print a Slurm job array of N parts instead'
    )
    parser.add_argument(
        '--dask',
        default='',
        metavar='ADDRESS|N',
        help='work with a Dask cluster (tcp://node:8786), or with N processes here',
    )


def _part(word: str) -> tuple[int, int]:
    i, slash, n = word.partition('/')
    if not (slash and i.isdigit() and n.isdigit()):
        raise argparse.ArgumentTypeError(f'found {word!r}; expected for example 3/100')
    return int(i), int(n)


def add_choice_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is read of files that hold several pictures; all of these count from 0."""
    parser.add_argument('--image', type=int, help='which image, where a file holds several; from 0')
    parser.add_argument(
        '--channels',
        type=lambda word: tuple(int(number) for number in word.split(',')),
        default=(),
        metavar='N or R,G,B',
        help='one channel as grey, or those to take as red, green and blue; from 0',
    )
    parser.add_argument('--z', type=int, help='which plane of a stack in depth; from 0')
    parser.add_argument('--t', type=int, help='which moment of a stack in time; from 0')


def _take_models(words: list[str]) -> list[str]:
    """Take the names and files of models that stand first; a name is the first word only."""
    from cellseg_mm.light.model_file import SUFFIXES, is_name

    named = [words.pop(0)] if is_name(words[0]) else []
    return named + _take(words, lambda word: word.lower().endswith(SUFFIXES))


def _take(words: list[str], fits: Callable[[str], bool]) -> list[str]:
    taken = []
    while words and fits(words[0]):
        taken.append(words.pop(0))
    return taken


def main() -> int:
    """Load, predict, and say where the results are."""
    args = parse_args()
    if args.card:
        from cellseg_mm.light.card import describe
        from cellseg_mm.light.model_file import read_model_file

        print('\n\n'.join(describe(read_model_file(model)) for model in args.models))
        return 0
    if args.slurm:
        print(_slurm_script(args.slurm), end='')
        return 0
    from cellseg_mm.data.contents import Choice
    from cellseg_mm.predict.options import MemberOptions, PredictOptions

    members = MemberOptions(
        checkpoints=tuple(path for path in args.checkpoints if path != 'best'),
        work_root=args.work_root,
        settings_path=args.settings,
        fusion=args.fusion,
        post=args.post,
        tta=args.tta,
        placement=args.placement,
    )
    options = PredictOptions(
        inputs=tuple(args.inputs),
        out_dir=args.out,
        formats=tuple(args.format),
        score_thr=args.score_thr,
        tile_px=args.tile,
        overlap_px=args.overlap,
        level=args.level,
        um_per_px=args.um_per_px,
        tissue=args.tissue,
        part=args.part,
        dask=args.dask,
        choice=Choice(image=args.image, channels=args.channels, z=args.z, t=args.t),
        n_workers=args.workers,
        again=args.again,
        device=args.device,
        batch_size=args.batch_size,
        value_range=args.range,
        red_blue_swapped={'normal': False, 'swapped': True}.get(args.red_blue),
    )
    if args.models:
        from cellseg_mm.light.from_options import predict_images

        summary = predict_images(args.models, members, options)
    else:
        summary = _predict_with_torch(args, members, options)
    print(summary.describe())
    print(f'results: {args.out}')
    return summary.exit_code


def _slurm_script(n_parts: int) -> str:
    from cellseg_mm.predict.many import slurm_script

    words = sys.argv[1:]
    for k, word in enumerate(words):
        if word.split('=')[0] == '--slurm':
            del words[k : k + (1 if '=' in word else 2)]
            break
    return slurm_script(words, n_parts)


def _predict_with_torch(
    args: argparse.Namespace, members: MemberOptions, options: PredictOptions
) -> Summary:
    import cellseg_mm.components  # noqa: F401 - registers what a config may name
    from cellseg_mm.detectors.from_options import predict_images
    from cellseg_mm.training.load_config import load_config

    work_dir = args.work_dir or args.out
    configs = {
        path: load_config(path, cfg_options=args.cfg_options, work_dir=work_dir)
        for path in args.configs
    }
    return predict_images(configs, members, options)


if __name__ == '__main__':
    run_tool(main)

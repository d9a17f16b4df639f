"""Merge folds, or prediction files, into one answer.

    python tools/ensemble.py configs/*.py                      # best checkpoint of each fold
    python tools/ensemble.py configs/fold0.py --checkpoints a.pth b.pth c.pth
    python tools/ensemble.py configs/fold0.py --predictions a.npz test-results.json.zip

On many GPUs: tools/dist_ensemble.sh GPUS configs/*.py [options].
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cellseg_mm.cli import add_config_arguments, run_tool
from cellseg_mm.training.load_config import load_config


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='+', help='one config per fold')
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--checkpoints', nargs='+', help='instead of the best of each work folder')
    what.add_argument(
        '--predictions', nargs='+', help='merge these files (npz, COCO JSON or zip); run no model'
    )
    parser.add_argument(
        '--fusion', help='rule, for example soft_mask:iou_thr=0.4 (default: soft_mask)'
    )
    parser.add_argument('--post', help='afterwards, for example disjoint,min_area_px=20')
    parser.add_argument('--settings', help='inference.json of tools/find_best.py')
    parser.add_argument(
        '--profile',
        choices=['submission', 'instances'],
        default='submission',
        help='which settings of the file: best AP, or best cells to count and look at',
    )
    parser.add_argument(
        '--tta', nargs='?', const='flips', help='hflip, flips or d4, with scales=0.8/1.25'
    )
    parser.add_argument('--split', choices=['test', 'val', 'all'], default='test')
    parser.add_argument('--fold', type=int, help="fold of --split val (default: first config's)")
    parser.add_argument(
        '--leave-out-seen',
        action='store_true',
        help='on training images use only the members that never saw them',
    )
    parser.add_argument(
        '--export', nargs='+', default=[], help='formats of tools/predict.py, for example geojson'
    )
    parser.add_argument('--overlays', type=int, default=0, help='pictures of the first N images')
    parser.add_argument('--show-thr', type=float, default=0.5, help='least score in both')
    parser.add_argument('--placement', choices=['auto', 'device', 'turns'], default='auto')
    parser.add_argument('--amp', action='store_true', help='use automatic mixed precision')
    parser.add_argument('--work-root', help='folder of the work folders (default: work_dirs)')
    parser.add_argument('--out', help='folder for the results (default: ensemble beside the folds)')
    add_config_arguments(parser)
    return parser.parse_args(words)


def main() -> None:
    """Merge, write, and say what was merged."""
    args = parse_args()
    from mmengine.dist import is_main_process

    from cellseg_mm.core.layout import ensemble_dir, work_dirs_of
    from cellseg_mm.data.config import dataset_settings, folds_path
    from cellseg_mm.data.images import find_images
    from cellseg_mm.ensemble import fuse_files as ensemble
    from cellseg_mm.ensemble.outcome import finish
    from cellseg_mm.fusion.settings import choose_fusion
    from cellseg_mm.weights.find import find_checkpoints

    work_dirs = work_dirs_of(args.configs, args.work_root)
    args.work_dir = out = Path(args.out or ensemble_dir(work_dirs))
    configs = {}
    for path in args.configs:
        args.config = path
        configs[path] = load_config(args)
    cfg = configs[args.configs[0]]
    data = dataset_settings(cfg, 'test_dataloader')
    classes = tuple(data.metainfo.classes)
    fusion = choose_fusion(
        rule=args.fusion,
        post=args.post,
        tta=args.tta,
        settings=args.settings,
        class_names=classes,
        profile=args.profile,
    )
    fold = None if args.split != 'val' else data.fold if args.fold is None else args.fold
    images = find_images(
        data.data_root, args.split, classes, folds_path=folds_path(data), fold=fold
    )
    if args.predictions:
        merged = ensemble.ensemble_files(
            args.predictions, images, fusion, out, leave_out_seen=args.leave_out_seen
        )
    else:
        from cellseg_mm.detectors.run_ensemble import ensemble_models, pair_sources

        checkpoints = args.checkpoints or find_checkpoints(work_dirs)
        merged = ensemble_models(
            cfg,
            pair_sources(configs, checkpoints),
            images,
            fusion,
            out,
            placement=args.placement,
            amp=args.amp,
            leave_out_seen=args.leave_out_seen,
        )
    if is_main_process():
        if args.export or args.overlays:
            print(_write_outputs(args, cfg, merged, images, out))
        print(finish(merged, images, out))


def _write_outputs(args: argparse.Namespace, cfg, merged, images, out: Path) -> str:
    from cellseg_mm.results.formats import Outputs, write_outputs

    outputs = Outputs(
        formats=tuple(args.export),
        n_overlays=args.overlays,
        score_thr=args.show_thr,
        class_colours=tuple(tuple(colour) for colour in cfg.metainfo.palette),
        red_blue_swapped=bool(cfg.get('red_blue_swapped', False)),
    )
    return write_outputs(merged.predictions_path, images, out, outputs)


if __name__ == '__main__':
    run_tool(main)

"""Merge folds, or prediction files, into one answer.

    python tools/ensemble.py configs/*.py                      # best checkpoint of each fold
    python tools/ensemble.py configs/fold0.py --checkpoints a.pth b.pth c.pth
    python tools/ensemble.py configs/fold0.py --predictions a.npz test-results.json.zip

On many GPUs: tools/dist_ensemble.sh GPUS configs/*.py [options].
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cellseg_mm.cli import add_config_arguments, add_member_arguments, run_tool


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
    add_member_arguments(parser)
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
        '--export',
        nargs='+',
        default=[],
        help='formats of tools/predict.py, for example geojson; of cells to count and look at',
    )
    parser.add_argument('--overlays', type=int, default=0, help='pictures of the first N images')
    parser.add_argument(
        '--show-thr',
        type=float,
        help='least score in both (0.5, or what --settings chose for counting)',
    )
    parser.add_argument('--amp', action='store_true', help='use automatic mixed precision')
    parser.add_argument('--out', help='folder for the results (default: ensemble beside the folds)')
    add_config_arguments(parser)
    return parser.parse_args(words)


def main() -> None:
    """Merge, write, and say what was merged."""
    args = parse_args()
    from cellseg_mm.core.layout import ID_MAP, ensemble_dir, work_dir_of
    from cellseg_mm.detectors.from_options import EnsembleOptions, ensemble
    from cellseg_mm.ensemble.outcome import outcome_text
    from cellseg_mm.predict.options import MemberOptions
    from cellseg_mm.training.load_config import load_config

    out_dir = Path(args.out or ensemble_dir([work_dir_of(c, args.work_root) for c in args.configs]))
    configs = {
        path: load_config(
            path,
            cfg_options=args.cfg_options,
            work_dir=out_dir,
            launcher=args.launcher,
            local_rank=args.local_rank,
        )
        for path in args.configs
    }
    members = MemberOptions(
        checkpoints=tuple(args.checkpoints or ()),
        work_root=args.work_root,
        settings_path=args.settings,
        fusion=args.fusion,
        post=args.post,
        tta=args.tta,
        placement=args.placement,
    )
    options = EnsembleOptions(
        out_dir=out_dir,
        prediction_files=tuple(args.predictions or ()),
        profile=args.profile,
        split=args.split,
        fold=args.fold,
        leave_out_seen=args.leave_out_seen,
        formats=tuple(args.export),
        n_overlays=args.overlays,
        score_thr=args.show_thr,
        amp=args.amp,
    )
    outcome = ensemble(configs, members, options)
    if outcome is None:  # another process speaks
        return
    print(outcome_text(outcome))
    if outcome.submitted is not None:
        command = f'next: python tools/check_submission.py {outcome.submitted.path} OTHER.zip'
        print(f'{command} --id-map {outcome.images.data_root / ID_MAP}')


if __name__ == '__main__':
    run_tool(main)

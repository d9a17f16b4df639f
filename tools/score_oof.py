"""Score all folds on the images that each of them never saw.

    python tools/score_oof.py configs/*.py
    python tools/score_oof.py configs/*.py --tta flips                      # folds tested so
    python tools/score_oof.py configs/*.py --tta flips --new-scores         # docs/recipes.md
    python tools/score_oof.py configs/*.py --by organs.csv organ            # and each organ's
    python tools/score_oof.py configs/laptop/*.py configs/laptop-quick/*.py # recipes, fused
    python tools/score_oof.py configs/*.py --held-out 4 --fusion nms soft_mask   # fusion's gain

Each folder of configs is a recipe. With --held-out, the members must have been trained without
that fold (docs/fusion.md says how).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from cellseg_mm.cli import run_tool


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='+', help='one config per fold, of one recipe or several')
    parser.add_argument('--work-root', help='folder of the work folders (default: work_dirs)')
    parser.add_argument('--out', help='folder for the results (default: ensemble beside the folds)')
    parser.add_argument('--tta', default='', help='score what tools/test.py --tta of this left')
    parser.add_argument(
        '--new-scores',
        action='store_true',
        help='score anew, as tools/find_best.py would: each fold by weights of the others',
    )
    parser.add_argument(
        '--cap',
        type=int,
        help='detections per class and image that count (default: all)',
    )
    parser.add_argument(
        '--by',
        nargs=2,
        metavar=('TABLE.csv', 'COLUMN'),
        help='scores of each part of the images too: of organs, scanners; names stand in "uuid"',
    )
    parser.add_argument(
        '--review',
        type=Path,
        help='folder for suspected label errors, a GeoJSON for QuPath of each image that has some',
    )
    parser.add_argument('--held-out', type=int, help='measure what fusion brings on this fold')
    parser.add_argument(
        '--fusion',
        nargs='+',
        help='rule for several recipes (soft_mask); with --held-out those to measure '
        '(nms soft_mask)',
    )
    parser.add_argument('--post', default='', help='with --held-out: what follows each rule')
    args = parser.parse_args(words)
    if args.held_out is None:
        n_recipes = len(recipes_of(args.configs))
        if args.post:
            parser.error('--post is for --held-out; without it nothing follows')
        if args.fusion and (n_recipes == 1 or len(args.fusion) > 1):
            parser.error(
                f'--fusion: found {len(args.fusion)} rule(s) for {n_recipes} recipe(s); expected '
                'one rule for several recipes, or --held-out'
            )
    return args


def recipes_of(configs: list[str]) -> dict[Path, list[str]]:
    """Return the configs by recipe, which is the folder that they are in."""
    recipes: dict[Path, list[str]] = {}
    for path in configs:
        recipes.setdefault(Path(path).parent, []).append(path)
    return recipes


def main() -> None:
    """Score, write, and print the headline."""
    args = parse_args()
    import numpy as np
    from mmengine.config import Config

    from cellseg_mm.core import files
    from cellseg_mm.core.layout import (
        OOF,
        OOF_NEW_SCORES,
        ensemble_dir,
        predictions_path,
        scores_path,
        work_dir_of,
    )
    from cellseg_mm.data import folds
    from cellseg_mm.data.config import DataSettings
    from cellseg_mm.data.images import find_images
    from cellseg_mm.data.preparing.groups import GroupRule, known_groups
    from cellseg_mm.ensemble import oof
    from cellseg_mm.ensemble.fusion_gain import fusion_gain
    from cellseg_mm.fusion.views import DEFAULT_RULE
    from cellseg_mm.report.suspects import write_suspects
    from cellseg_mm.scores.matching import compare
    from cellseg_mm.scores.records import ScoreParams
    from cellseg_mm.scores.table import score_table
    from cellseg_mm.selection.rescoring import cross_scored

    work_dirs = {path: work_dir_of(path, args.work_root) for path in args.configs}
    configs = {path: Config.fromfile(path) for path in args.configs}
    recipes = recipes_of(args.configs)
    out = Path(args.out or ensemble_dir(list(work_dirs.values())))
    if len(recipes) > 1 and not args.out:  # the folder itself may hold what belongs to one recipe
        out /= '+'.join(folder.name for folder in recipes)
    data = DataSettings.from_config(configs[args.configs[0]], 'test_dataloader')
    if args.held_out is not None:
        images = find_images(
            data.data_root,
            'val',
            data.class_names,
            folds_path=data.folds_path,
            fold=args.held_out,
        )
        paths = oof.held_out_files(args.configs, list(work_dirs.values()), args.held_out)
        gain = fusion_gain(paths, images, args.fusion or ['nms', 'soft_mask'], post=args.post)
        path = out / f'fusion_gain_fold{args.held_out}.json'
        files.write_json(path, dataclasses.asdict(gain))
        print(f'{gain.table()}\nwritten: {path}')
        return
    in_force = folds.load_folds(data.folds_path)
    pools = {}
    for folder, names in recipes.items():
        paths = oof.validation_files(names, [work_dirs[name] for name in names], tta=args.tta)
        pool = oof.pool_predictions(paths, in_force, data.data_root, folds_path=data.folds_path)
        oof.refuse_other_classes(pool, data.class_names)
        cfgs = [configs[name] for name in names]
        oof.refuse_other_recipes(
            pool, {DataSettings.from_config(cfg).fold: cfg.to_dict() for cfg in cfgs}
        )
        pools[str(folder)] = pool
    pool = oof.fuse_pools(pools, *(args.fusion or [DEFAULT_RULE]))
    if args.new_scores:
        sets = cross_scored(pool.gt_sets, pool.pred_sets, np.array(pool.fold_of), pool.class_names)
        pool = dataclasses.replace(pool, pred_sets=sets)
    scores = oof.score_pool(pool, ScoreParams(cap=args.cap))
    name = OOF_NEW_SCORES if args.new_scores else OOF
    paths = predictions_path(out, name, args.tta), scores_path(out, name, args.tta)
    oof.save_pool(paths[0], pool)
    record = {**scores.to_dict(), 'provenance': oof.pool_origin(pool)}
    files.write_json(paths[1], record)
    print(f'{score_table(scores)}\n\n{oof.describe(pool, scores, data.data_root)}')
    if args.new_scores:
        print('detections are scored anew, each fold by weights that were fitted on the others')
    if args.by:
        rule = GroupRule(csv_path=Path(args.by[0]), group_column=args.by[1])
        part_of, findings = known_groups([gt.name for gt in pool.gt_sets], rule)
        print(f'\nAP50 of each class by {args.by[1]}:\n{oof.table_of_parts(pool, part_of)}')
        print(*(finding.text for finding in findings), sep='\n')
    if args.review is not None:
        images = [compare(gt, pred) for gt, pred in zip(pool.gt_sets, pool.pred_sets, strict=True)]
        counts = write_suspects(args.review, images, pool.class_names, data.palette)
        print('to look at: ' + ', '.join(f'{n} {kind}' for kind, n in counts.items()))
        print(f'written: {args.review}/<case>.review.geojson (docs/corrections.md)')
    print(f'written: {paths[1]}, {paths[0]}')


if __name__ == '__main__':
    run_tool(main)

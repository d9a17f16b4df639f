"""Time and peak memory of every stage on very dense and on very many images.

    python benchmarks/load.py --scene dense --out /tmp/load
    python benchmarks/load.py --scene many --out /tmp/load --n-images 10000 --n-tested 1000

``dense``: images of 4096 x 4096 px with 5,000 cells each (one per fold). ``many``: 10,000 images of
256 x 256 px. Each stage is a process of its own with one worker, and its peak memory is the
kernel's number (ru_maxrss). The claim: every stage stays below 8 GB. Prediction files for scoring
and report are the ground truth with every cell moved by a px or two and a few left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import cv2
import numpy as np
import tifffile

from cellseg_mm.core.files import write_json
from cellseg_mm.core.provenance import code_commit, machine, versions

ROOT = Path(__file__).resolve().parents[1]
LIMIT_GB = 8.0
N_CLASSES = 4
CLASS_NAMES = ('epithelial', 'lymphocyte', 'neutrophil', 'macrophage')
PITCH_PX = 56  # a grid of 73 x 73 places on 4096 px
SMALL = {
    'train_dataloader.batch_size': 2,
    'train_cfg.max_iters': 4,
    'train_cfg.val_interval': 1000,
    'default_hooks.checkpoint.interval': 4,
    'default_hooks.logger.interval': 1,
    **{f'{name}_dataloader.num_workers': 0 for name in ('train', 'val', 'test')},
    **{f'{name}_dataloader.persistent_workers': False for name in ('train', 'val', 'test')},
}


@dataclass(frozen=True)
class Stage:
    """One measured process.

    Attributes:
        name: What it does.
        seconds: Wall time.
        peak_gb: Largest resident memory of the process or of any it started.
        code: Exit status.
    """

    name: str
    seconds: float
    peak_gb: float
    code: int


def measure(name: str, words: list[str], out: Path, data: Path) -> Stage:
    """Run one command and measure it."""
    environment = {**os.environ, 'CELLSEG_DATA': str(data), 'PYTHONPATH': str(ROOT)}
    begun = time.perf_counter()
    with (out / f'{name.split()[0]}.log').open('w') as log:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    stage = Stage(name, time.perf_counter() - begun, usage.ru_maxrss / 2**20, process.returncode)
    print(
        f'{stage.name:<28} {stage.seconds:>8.1f} s  {stage.peak_gb:>6.2f} GB  {stage.code}',
        flush=True,
    )
    return stage


# ---- data


def cells(hw: tuple[int, int], n_cells: int, pitch: int, rng: np.random.Generator) -> np.ndarray:
    """Draw up to ``n_cells`` ellipses on a jittered grid; return their ids, (H, W) uint16."""
    ids = np.zeros(hw, dtype=np.uint16)
    places = [
        (y, x)
        for y in range(pitch // 2, hw[0] - pitch // 3, pitch)
        for x in range(pitch // 2, hw[1] - pitch // 3, pitch)
    ]
    order = rng.permutation(len(places))[:n_cells]
    for i, place in enumerate(order.tolist()):
        y, x = places[place]
        dy, dx = rng.integers(-pitch // 10, pitch // 10 + 1, 2).tolist()
        axes = rng.integers(pitch // 6, pitch // 3, 2).tolist()
        cv2.ellipse(ids, (x + dx, y + dy), axes, float(rng.uniform(0, 180)), 0, 360, i + 1, -1)
    return ids


def write_case(folder: Path, ids: np.ndarray, rng: np.random.Generator) -> None:
    """Write an image and its label maps."""
    folder.mkdir(parents=True)
    n_cells = int(ids.max())
    class_of = rng.choice(N_CLASSES, n_cells + 1, p=(0.5, 0.4, 0.05, 0.05))
    noise = rng.integers(0, 30, (*ids.shape, 1), dtype=np.uint8)
    colour = np.where(ids[..., None] > 0, np.uint8([60, 50, 120]), np.uint8([200, 160, 220]))
    options = {'compression': 'zlib', 'compressionargs': {'level': 1}}
    tifffile.imwrite(
        folder / 'image.tif', (colour + noise).astype(np.uint8), photometric='rgb', **options
    )
    for k in range(N_CLASSES):
        of_class = np.where(class_of[ids] == k, ids, 0).astype(np.uint16)
        if of_class.any():
            tifffile.imwrite(folder / f'class{k + 1}.tif', of_class, **options)


def make_data(scene: str, data: Path, n_images: int) -> None:
    """Write the data folder, unless it is there."""
    if data.is_dir():
        return
    unfinished = data.with_name(data.name + '.part')
    shutil.rmtree(unfinished, ignore_errors=True)
    for number in range(n_images):
        rng = np.random.default_rng([number, 9])
        if scene == 'dense':
            ids = cells((4096, 4096), 5000, PITCH_PX, rng)
        else:
            ids = cells((256, 256), 25, 40, rng)
        write_case(unfinished / 'train' / f'{number:05d}', ids, rng)
    write_test(unfinished)
    unfinished.rename(data)


def write_test(data: Path) -> None:
    """Add one test image; the layout asks for a map of ids."""
    (data / 'test_release').mkdir()
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    tifffile.imwrite(data / 'test_release/t.tif', image, photometric='rgb')
    entry = {'file_name': 't.tif', 'id': 1, 'height': 64, 'width': 64}
    write_json(data / 'test_image_name_to_ids.json', [entry])


# ---- stages that are no tool


def make_predictions(data: Path, work_root: Path) -> None:
    """Write both folds' validation predictions: the truth, moved and thinned."""
    from cellseg_mm.core.instances import InstanceSet
    from cellseg_mm.data.folds import load_folds
    from cellseg_mm.data.labels import find_cases, read_gt
    from cellseg_mm.results.predictions import Predictions, save_predictions

    folds = load_folds(data / 'folds.json')
    cases = {case.name: case for case in find_cases(data, 'train', N_CLASSES)}
    for fold in range(folds.n_folds):
        sets = []
        for name in folds.val_names(fold):
            gt = read_gt(cases[name])
            rng = np.random.default_rng([gt.image_id, 3])
            kept = gt[rng.random(len(gt)) > 0.05]
            crops, offsets = kept.crops()
            room = np.array([(*gt.image_hw,)]) - np.array([c.shape for c in crops]).reshape(-1, 2)
            moved = np.clip(offsets + rng.integers(-2, 3, offsets.shape), 0, room)
            scores = rng.random(len(kept)).astype(np.float32)
            sets.append(
                InstanceSet.from_crops(
                    gt.name,
                    gt.image_id,
                    gt.image_hw,
                    crops=crops,
                    offsets_yx=moved,
                    class_ids=kept.class_ids,
                    scores=scores,
                )
            )
        known = {'fold': fold, 'fold_hash': folds.hash, 'split': 'val', 'class_names': CLASS_NAMES}
        target = work_root / 'sample' / f'fold{fold}' / 'val.predictions.npz'
        save_predictions(target, Predictions(tuple(sets), known))


def score_files(data: Path, work_root: Path) -> None:
    """Score the pool of both folds, as the report does."""
    from cellseg_mm.data.folds import load_folds
    from cellseg_mm.ensemble.oof import pool_predictions
    from cellseg_mm.scores.score import score
    from cellseg_mm.scores.table import score_table

    paths = sorted((work_root / 'sample').glob('fold*/val.predictions.npz'))
    pool = pool_predictions(paths, load_folds(data / 'folds.json'), data)
    scores = score(pool.gt_sets, pool.pred_sets, pool.class_names)
    print(score_table(scores))


def run_scene(args: argparse.Namespace) -> list[Stage]:
    """Run all stages of a scene."""
    out = args.out / args.scene
    out.mkdir(parents=True, exist_ok=True)
    data, work_root = out / 'data', out / 'work_dirs'
    n_images = 2 if args.scene == 'dense' else args.n_images
    make_data(args.scene, data, n_images)
    work_dir = work_root / 'trained'
    options = ['--cfg-options', *(f'{k}={json.dumps(v)}' for k, v in SMALL.items())]
    if args.scene == 'dense':
        caps = {
            'model.test_cfg.rpn.nms_pre': 8000,
            'model.test_cfg.rpn.max_per_img': 6000,
            'model.test_cfg.rcnn.max_per_img': 6000,
            'test_evaluator.max_per_img': 6000,
            'model.test_cfg.rcnn.score_thr': 0.0,
        }
        options += [f'{k}={v}' for k, v in caps.items()]
    else:
        # The untrained model finds as many cells as it may; 100 is four times what is there.
        few = {
            'test_dataloader.dataset.indices': args.n_tested or None,
            'val_dataloader.dataset.indices': 100,
            'model.test_cfg.rpn.max_per_img': 300,
            'model.test_cfg.rcnn.max_per_img': 100,
        }
        options += [f'{k}={v}' for k, v in few.items()]
    config = ['configs/sample/fold0.py', '--work-dir', str(work_dir)]
    me = [str(Path(__file__).resolve()), '--scene', args.scene, '--out', str(args.out)]
    report = ['configs/sample/fold0.py', 'configs/sample/fold1.py', '--work-root', str(work_root)]
    plan = {
        'prepare': [
            'tools/prepare_data.py',
            str(data),
            '--folds',
            '2',
            '--workers',
            '1',
            '--no-index',
        ],
        'train (4 iterations)': ['tools/train.py', *config, *options],
        'test': ['tools/test.py', *config, '--out', str(out / 'tested'), *options],
        'predictions (not claimed)': [*me, '--stage', 'predictions'],
        'score': [*me, '--stage', 'score'],
        'report': ['tools/report.py', *report, '--out', str(out / 'report')],
    }
    chosen = args.only.split(',') if args.only else [name.split()[0] for name in plan]
    return [
        measure(name, words, out, data) for name, words in plan.items() if name.split()[0] in chosen
    ]


def main() -> int:
    """Measure, print a table and keep it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--scene', choices=['dense', 'many'], required=True)
    parser.add_argument('--out', type=Path, default=Path('/tmp/load'))
    parser.add_argument('--n-images', type=int, default=10000)
    parser.add_argument(
        '--n-tested',
        type=int,
        default=1000,
        help='images that the trained model is tested on in the scene many; 0: its whole fold',
    )
    parser.add_argument('--only', help='stages with commas')
    parser.add_argument('--stage', choices=['predictions', 'score'], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.absolute()
    if args.stage:
        out = args.out / args.scene
        work = make_predictions if args.stage == 'predictions' else score_files
        work(out / 'data', out / 'work_dirs')
        return 0
    print(f'{machine()}; commit {code_commit()}; scene {args.scene}')
    stages = run_scene(args)
    content = {
        'machine': machine(),
        'commit': code_commit(),
        'versions': versions(),
        'stages': [asdict(stage) for stage in stages],
    }
    write_json(args.out / args.scene / f'load.{int(time.time())}.json', content)
    return int(any(stage.code or stage.peak_gb > LIMIT_GB for stage in stages))


if __name__ == '__main__':
    sys.exit(main())

"""Time and memory of one training sample: the floor, label-map masks, and the stock pipeline.

For real images with about 7, 20, 150, 335 and 500 cells it prints, from one interleaved run with
the same random draws for all:

- floor: decode the image and its largest class file, resize and crop both; nothing can do less;
- ours: the LSJ pipeline at 1024 with LoadCellImage, LoadLabelMaps, which remembers label maps, and
  PackCellInputs; and the same when every file is read again (``cache_mb=0``), as in a first epoch;
- stock: MMDetection's LSJ pipeline with COCO annotations (RLE, ready in memory) and BitmapMasks;
- peak memory: growth of the resident set's high-water mark over three samples in a fresh process;
- mask targets of 128 positive RoIs at 28 x 28, ours and BitmapMasks'.

Every sample of ours is compared with the stock one: same pixels, boxes, labels and masks.

    python benchmarks/train_pipeline.py --data ../shared/data
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import tifffile
import torch

import cellseg_mm  # isort: skip  (before mmdet: gives BitmapMasks its RoIAlign)
import mmdet
import mmdet.datasets.transforms
from mmdet.registry import TRANSFORMS
from mmdet.structures.mask import BitmapMasks
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

import cellseg_mm.pipeline.geometry  # noqa: F401  (registers the loading transforms)
from cellseg_mm.data.labels import Case, find_cases, read_gt
from cellseg_mm.runtime import ops_backend

SIDE = 1024
RATIOS = (0.1, 2.0)
N_ROIS = 128
LSJ = (
    {'type': 'RandomResize', 'scale': (SIDE, SIDE), 'ratio_range': RATIOS, 'keep_ratio': True},
    {
        'type': 'RandomCrop',
        'crop_type': 'absolute_range',
        'crop_size': (SIDE, SIDE),
        'recompute_bbox': True,
        'allow_negative_crop': True,
    },
    {'type': 'FilterAnnotations', 'min_gt_bbox_wh': (1e-2, 1e-2)},
    {'type': 'RandomFlip', 'prob': 0.5},
)
VARIANTS = ('floor', 'ours', 'ours, files read', 'stock')

Sample = Callable[[], object]


def sample_of(variant: str, case: Case) -> Sample:
    """Return a function that makes one training sample from the case."""
    if variant == 'floor':
        return lambda: floor(case)
    if variant == 'stock':
        info = stock_info(case)
        loading = [
            {'type': 'LoadImageFromFile'},
            {'type': 'LoadAnnotations', 'with_bbox': True, 'with_mask': True},
        ]
        packing = {'type': 'PackDetInputs'}
    else:
        info = {
            'img_path': str(case.image_path),
            'label_paths': {k: str(path) for k, path in case.label_paths.items()},
            'img_id': case.image_id,
        }
        cache = {'cache_mb': 0} if variant == 'ours, files read' else {}
        loading = [{'type': 'LoadCellImage'}, {'type': 'LoadLabelMaps', **cache}]
        packing = {'type': 'PackCellInputs'}
    steps = Compose([TRANSFORMS.build(step) for step in (*loading, *LSJ, packing)])
    return lambda: steps({**info})


def stock_info(case: Case) -> dict:
    """Return what CocoDataset would hold for the case."""
    gt = read_gt(case)
    instances = [
        {
            'bbox': box.tolist(),
            'bbox_label': int(class_id),
            'mask': {'size': list(gt.image_hw), 'counts': rle.decode()},
            'ignore_flag': 0,
        }
        for box, class_id, rle in zip(gt.boxes_xyxy, gt.class_ids, gt.rles, strict=True)
    ]
    height, width = case.image_hw
    return {
        'img_path': str(case.image_path),
        'img_id': case.image_id,
        'height': height,
        'width': width,
        'instances': instances,
    }


def floor(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Decode, resize and crop the image and one label map, with the draws of the LSJ pipeline."""
    img = tifffile.imread(case.image_path)[..., :3]
    cells = tifffile.imread(max(case.label_paths.values(), key=lambda p: p.stat().st_size))
    low, high = RATIOS
    side = int(SIDE * (np.random.random_sample() * (high - low) + low))  # noqa: NPY002
    height, width = img.shape[:2]
    factor = side / max(height, width)
    wh = int(width * factor + 0.5), int(height * factor + 0.5)
    img = cv2.resize(img, wh)
    cells = cv2.resize(cells, wh, interpolation=cv2.INTER_NEAREST)
    crop_h, crop_w = (min(SIDE, n) for n in cells.shape)
    np.random.randint(0, 1, 2)  # noqa: NPY002 (RandomCrop draws a size of one choice)
    top = np.random.randint(0, cells.shape[0] - crop_h + 1)  # noqa: NPY002
    left = np.random.randint(0, cells.shape[1] - crop_w + 1)  # noqa: NPY002
    window = np.s_[top : top + crop_h, left : left + crop_w]
    return img[window].copy(), cells[window].copy()


def seed_all(seed: int) -> None:
    """Seed everything that transforms draw from."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (what mmdet's transforms draw from)


def check_same(made: dict[str, object]) -> None:
    """Stop unless all variants made the same sample."""
    stock = made['stock']
    img = np.ascontiguousarray(made['floor'][0][..., ::-1].transpose(2, 0, 1))
    ours = [made['ours'], made['ours, files read']]
    wanted = stock['data_samples'].gt_instances
    bitmaps = wanted.masks.to_ndarray()
    for packed in ours:
        got = packed['data_samples'].gt_instances
        same = (
            torch.equal(packed['inputs'], stock['inputs'])
            and torch.equal(got.bboxes.tensor, wanted.bboxes.tensor)
            and torch.equal(got.labels, wanted.labels)
            and np.array_equal(got.masks.to_ndarray(), bitmaps)
        )
        if not same:
            raise SystemExit('ours and the stock pipeline made different samples')
    pixels = stock['inputs'].numpy()
    if not any(np.array_equal(img, p) for p in (pixels, pixels[:, :, ::-1])):
        raise SystemExit('the floor had other draws than the pipelines')


def time_samples(case: Case, repeats: int, clock: Callable[[], float]) -> tuple[dict, dict]:
    """Return the median seconds of each variant, and the sample with the most cells of each."""
    makers = {variant: sample_of(variant, case) for variant in VARIANTS}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    most: dict[str, object] = {}
    for seed in range(repeats + 1):  # the first round warms up
        made = {}
        for variant, make in makers.items():
            seed_all(seed)
            started = clock()
            made[variant] = make()
            if seed:
                seconds[variant].append(clock() - started)
        check_same(made)
        if not most or n_cells(made) > n_cells(most):
            most = made
    return {variant: float(np.median(values)) for variant, values in seconds.items()}, most


def n_cells(made: dict) -> int:
    """Return how many cells the stock sample has."""
    return len(made['stock']['data_samples'].gt_instances)


def time_targets(made: dict, repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Time the mask targets of 128 RoIs around the cells of one sample padded to 1024."""
    rng = np.random.default_rng(0)
    ours: InstanceData = made['ours']['data_samples'].gt_instances
    masks = {
        'ours': ours.masks.pad((SIDE, SIDE)),
        'stock': made['stock']['data_samples'].gt_instances.masks.pad((SIDE, SIDE)),
    }
    inds = rng.integers(0, len(ours), N_ROIS)
    boxes = ours.bboxes.tensor.numpy()[inds]
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    boxes = boxes + rng.uniform(-0.15, 0.15, boxes.shape) * sides
    boxes = np.clip(boxes, 0, SIDE).astype(np.float32)
    seconds: dict[str, list[float]] = {key: [] for key in masks}
    targets: dict[str, BitmapMasks] = {}
    for repeat in range(repeats + 1):
        for key, value in masks.items():
            started = clock()
            targets[key] = value.crop_and_resize(boxes, (28, 28), inds, 'cpu')
            if repeat:
                seconds[key].append(clock() - started)
    medians = {key: float(np.median(values)) for key, values in seconds.items()}
    different = int((targets['ours'].masks != targets['stock'].masks).sum())
    return {**medians, 'n_different': different, 'n_cells': len(ours)}


def peak_memory_mib(variant: str, case_dir: Path, data: Path) -> float:
    """Return the growth of the resident set's peak over three samples in a fresh process."""
    command = [sys.executable, __file__, '--data', str(data), '--peak', variant, str(case_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def print_peak(variant: str, case: Case) -> None:
    """Print how much the peak memory grows while samples are made."""
    make = sample_of(variant, case)
    before = peak_kib()
    for seed in range(1, 4):
        seed_all(seed)
        make()
    print(json.dumps((peak_kib() - before) / 1024))


def peak_kib() -> int:
    """Return the high-water mark of this process's resident set (ru_maxrss has the parent's)."""
    status = Path('/proc/self/status')
    if not status.is_file():
        raise SystemExit('peak memory is read from /proc/self/status, which Linux alone has')
    line = next(line for line in status.read_text().splitlines() if line.startswith('VmHWM'))
    return int(line.split()[1])


def cases_of(data: Path) -> list[Case]:
    """Return the cases of the real data, or exit."""
    roots = [data / name for name in ('hw3_train155', 'hw3_raw25')]
    found = [case for root in roots if root.is_dir() for case in find_cases(root, 'train', 4)]
    if not found:
        raise SystemExit(f'{data}: found neither hw3_train155 nor hw3_raw25; check --data')
    return found


def environment() -> str:
    """Return machine, versions and commit in one line."""
    git = ['git', '-C', str(Path(__file__).parent), 'describe', '--always', '--dirty']
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cpu = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').is_file():
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        cpu = next((line.split(':')[1].strip() for line in lines if 'model name' in line), cpu)
    load = ', '.join(f'{value:.1f}' for value in os.getloadavg())
    return (
        f'{cpu}, {os.cpu_count()} cores, one thread used, load {load}; '
        f'Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, '
        f'OpenCV {cv2.__version__}, mmdet {mmdet.__version__}, RoIAlign of {ops_backend()}; '
        f'commit {commit or "unknown"}'
    )


def print_table(rows: list[dict], clock_name: str, repeats: int) -> None:
    """Print the table as Markdown."""
    print(environment())
    print(f'Median {clock_name} of {repeats} samples, ms; (x) = times the floor. Peak in MiB.\n')
    head = ['cells', 'image', *VARIANTS, 'peak floor / ours / stock', '128 targets ours / stock']
    print('| ' + ' | '.join(head) + ' |')
    print('| ' + ' | '.join(['---'] * len(head)) + ' |')
    for row in rows:
        times = row['seconds']
        floor_ms = 1e3 * times['floor']
        cells = [f'{1e3 * times[v]:.1f} ({1e3 * times[v] / floor_ms:.2f}x)' for v in VARIANTS]
        targets = row['targets']
        peak = ' / '.join(f'{value:.0f}' for value in row['peak'].values())
        ratio = targets['stock'] / targets['ours']
        last = f'{1e3 * targets["ours"]:.1f} / {1e3 * targets["stock"]:.0f} ({ratio:.0f}x less)'
        height, width = row['image_hw']
        print(f'| {row["n"]} | {height}x{width} | ' + ' | '.join([*cells, peak, last]) + ' |')
    n_different = sum(row['targets']['n_different'] for row in rows)
    n_pixels = len(rows) * N_ROIS * 28 * 28
    print(f'\nSamples: equal to the stock ones. Mask targets: {n_different} of {n_pixels} differ.')


def main() -> None:
    """Time all variants on the same images, in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default_data = Path(__file__).resolve().parents[2] / 'shared' / 'data'
    parser.add_argument('--data', type=Path, default=default_data)
    parser.add_argument('--cells', type=int, nargs='+', default=[7, 20, 150, 335, 500])
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--cpu-time', action='store_true', help='CPU time instead of wall time')
    parser.add_argument('--peak', nargs=2, metavar=('VARIANT', 'CASE_DIR'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    cv2.setNumThreads(1)  # as in a data loader's worker
    torch.set_num_threads(1)
    init_default_scope('mmdet')
    cases = cases_of(args.data)
    if args.peak:
        variant, folder = args.peak
        print_peak(variant, next(c for c in cases if c.image_path.parent == Path(folder)))
        return
    clock = time.process_time if args.cpu_time else time.perf_counter
    counts = np.array([len(read_gt(case)) for case in cases])
    rows = []
    for wanted in args.cells:
        index = int(np.argmin(np.abs(counts - wanted)))
        case = cases[index]
        seconds, made = time_samples(case, args.repeats, clock)
        folder = case.image_path.parent
        rows.append(
            {
                'n': int(counts[index]),
                'image_hw': case.image_hw,
                'seconds': seconds,
                'targets': time_targets(made, min(args.repeats, 5), clock),
                'peak': {
                    variant: peak_memory_mib(variant, folder, args.data)
                    for variant in ('floor', 'ours', 'stock')
                },
            }
        )
    print_table(rows, 'CPU time' if args.cpu_time else 'wall time', args.repeats)


if __name__ == '__main__':
    main()

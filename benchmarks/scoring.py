"""Times our scores against pycocotools and against a dense-mask PQ, on jittered real label maps.

Usage: python benchmarks/scoring.py [--data-root DIR] [--images 209] [--rounds 3]

The ground truth is read from ``DIR/train``; dense images are repeated under new ids, which brings
155 images with 14,653 cells to the full collection's 209 with 31,000. Predictions are copies
that were shifted, dropped, doubled, swapped in class and invented. All contestants get the same
InstanceSets, are timed in turn in every round, and must agree in the numbers that they share.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tifffile
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.scores.records import ScoreParams, Scores
from cellseg_mm.scores.score import score
from cellseg_mm.scores.table import score_table

CLASS_NAMES = ('epithelial', 'lymphocyte', 'neutrophil', 'macrophage')


def read_sets(data_root: Path) -> list[InstanceSet]:
    """Read ground truth straight from the label maps, one layer per class."""
    sets = []
    for image_id, folder in enumerate(sorted((data_root / 'train').iterdir()), start=1):
        layers, layer_of, class_ids = [], [], []
        for class_id in range(len(CLASS_NAMES)):
            path = folder / f'class{class_id + 1}.tif'
            if not path.exists():
                continue
            label_map = tifffile.imread(path).astype(np.int64)
            values, layer = np.unique(label_map, return_inverse=True)
            layer = layer.reshape(label_map.shape)
            layers.append(np.where(layer > 0, layer + len(class_ids), 0))
            layer_of += [len(layers) - 1] * (len(values) - 1)
            class_ids += [class_id] * (len(values) - 1)
        sets.append(
            InstanceSet.from_label_layers(
                folder.name, image_id, np.stack(layers), np.array(layer_of), np.array(class_ids)
            )
        )
    return sets


def repeat_to(sets: Sequence[InstanceSet], n_images: int, n_cells: int) -> list[InstanceSet]:
    """Add copies under new ids until there are ``n_images`` with nearly ``n_cells`` instances."""
    result = list(sets[:n_images])
    while len(result) < n_images:
        wanted = (n_cells - sum(map(len, result))) / (n_images - len(result))
        # The five closest in turn, so that not one image is repeated throughout.
        close = sorted(sets, key=lambda s: (abs(len(s) - wanted), s.image_id))[:5]
        source = close[len(result) % 5]
        image_id = len(result) + 1
        result.append(dataclasses.replace(source, name=f'copy{image_id}', image_id=image_id))
    return result


def jitter(gt: InstanceSet, generator: np.random.Generator) -> InstanceSet:
    """Return a detector's view: moved, missed, doubled, invented and misnamed cells."""
    crops, offsets = gt.crops()
    n = len(gt)
    source = np.flatnonzero(generator.random(n) < 0.9)  # a tenth is missed
    source = np.concatenate([source, source[generator.random(len(source)) < 0.15]])  # doubled
    moves = np.round(generator.normal(0, 2, size=(len(source), 2))).astype(np.int64)
    invented = generator.integers(0, n, size=n // 3) if n else np.empty(0, dtype=np.int64)
    far = generator.integers(-200, 201, size=(len(invented), 2))
    source, moves = np.concatenate([source, invented]), np.concatenate([moves, far])
    class_ids = gt.class_ids[source].copy()
    swapped = generator.random(len(source)) < 0.1
    class_ids[swapped] = generator.integers(0, len(CLASS_NAMES), size=int(swapped.sum()))
    # Two decimals make ties, as half precision does.
    scores = np.round(generator.beta(5, 2, size=len(source)), 2).astype(np.float32)
    top = np.array(gt.image_hw)
    placed = [
        (crops[i], np.clip(offsets[i] + move, 0, top - crops[i].shape))
        for i, move in zip(source.tolist(), moves, strict=True)
    ]
    return InstanceSet.from_crops(
        gt.name,
        gt.image_id,
        gt.image_hw,
        crops=[crop for crop, _ in placed],
        offsets_yx=np.array([at for _, at in placed], dtype=np.int64).reshape(-1, 2),
        class_ids=class_ids,
        scores=scores,
    )


def coco_peer(
    gt_sets: Sequence[InstanceSet], pred_sets: Sequence[InstanceSet], cap: int
) -> dict[str, float]:
    """Return mask and box AP and AP50 at ``cap`` by pycocotools."""
    annotations = {}
    for key, sets in (('gt', gt_sets), ('pred', pred_sets)):
        rows = []
        for s in sets:
            for i, counts in enumerate(s.rles):
                rle = {'size': list(s.image_hw), 'counts': counts}
                x1, y1, x2, y2 = s.boxes_xyxy[i].astype(float).tolist()
                rows.append(
                    {
                        'id': len(rows) + 1,
                        'image_id': s.image_id,
                        'category_id': int(s.class_ids[i]) + 1,
                        'segmentation': rle,
                        'bbox': [x1, y1, x2 - x1, y2 - y1],
                        'area': float(coco_mask.area(rle)),
                        'iscrowd': 0,
                        'score': float(s.scores[i]),
                    }
                )
        coco = COCO()
        coco.dataset = {
            'images': [
                {'id': s.image_id, 'height': s.image_hw[0], 'width': s.image_hw[1]} for s in gt_sets
            ],
            'categories': [{'id': k + 1} for k in range(len(CLASS_NAMES))],
            'annotations': rows,
        }
        coco.createIndex()
        annotations[key] = coco
    result = {}
    for kind in ('segm', 'bbox'):
        evaluator = COCOeval(annotations['gt'], annotations['pred'], kind)
        evaluator.params.maxDets = [100, cap]
        evaluator.evaluate()
        evaluator.accumulate()
        precision = evaluator.eval['precision'][:, :, :, 0, -1]
        result[f'{kind}_AP'] = float(precision[precision > -1].mean())
        result[f'{kind}_AP50'] = float(precision[0][precision[0] > -1].mean())
    return result


def dense_pq_peer(
    gt_sets: Sequence[InstanceSet], pred_sets: Sequence[InstanceSet], params: ScoreParams
) -> dict[str, float]:
    """Return mPQ+ by full-size masks, two at a time, as the public PQ scripts do it."""
    n_classes = len(CLASS_NAMES)
    tp, n_gt, n_pred, iou_sum = (np.zeros(n_classes) for _ in range(4))
    for gt, pred in zip(gt_sets, pred_sets, strict=True):
        gt_masks, label_map, classes = gt.masks(), *_painted(pred, params)
        pred_masks = [label_map == i + 1 for i in range(len(classes))]
        n_gt += np.bincount(gt.class_ids, minlength=n_classes)
        n_pred += np.bincount(classes, minlength=n_classes)
        for i, gt_mask in enumerate(gt_masks):
            for j in np.unique(label_map[gt_mask]).tolist():
                if j == 0 or classes[j - 1] != gt.class_ids[i]:
                    continue
                both = np.logical_and(gt_mask, pred_masks[j - 1]).sum()
                iou = both / np.logical_or(gt_mask, pred_masks[j - 1]).sum()
                if iou > 0.5:
                    tp[gt.class_ids[i]] += 1
                    iou_sum[gt.class_ids[i]] += iou
    return {'mPQ': float(np.mean(iou_sum / (0.5 * n_gt + 0.5 * n_pred)))}


def _painted(pred: InstanceSet, params: ScoreParams) -> tuple[np.ndarray, np.ndarray]:
    """Paint full masks, lowest score first; drop what the parameters drop; number from 1."""
    order = np.argsort(-pred.scores, kind='stable')
    order = order[pred.scores[order] >= params.pq_score_thr]
    masks = pred[order].masks()
    label_map = np.zeros(pred.image_hw, dtype=np.int32)
    for i in range(len(order) - 1, -1, -1):
        label_map[masks[i]] = i + 1
    kept = []
    for i, mask in enumerate(masks):
        left = int((label_map == i + 1).sum())
        if left == 0 or (left < mask.sum() and left < params.min_left_px):
            label_map[label_map == i + 1] = 0
            continue
        kept.append(i)
        label_map[label_map == i + 1] = len(kept)
    return label_map, pred.class_ids[order][kept]


def timed(function: Callable[[], object]) -> tuple[object, float]:
    """Run quietly; return the result and the seconds."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        result = function()
    return result, time.perf_counter() - start


def environment() -> str:
    """Return machine, versions and commit in a line."""
    here = Path(__file__).resolve().parent
    commit = subprocess.run(
        ['git', 'rev-parse', '--short', 'HEAD'], cwd=here, capture_output=True, text=True
    ).stdout.strip()
    names = ('numpy', 'pycocotools', 'faster-coco-eval')
    versions = ', '.join(f'{name} {version(name)}' for name in names)
    cpu = next(
        (
            line.split(':', 1)[1].strip()
            for line in Path('/proc/cpuinfo').read_text().splitlines()
            if line.startswith('model name')
        ),
        platform.processor(),
    )
    load = os.getloadavg()[0]
    return (
        f'{cpu}, {os.cpu_count()} CPUs (load {load:.1f}); Python {platform.python_version()}, '
        f'{versions}; commit {commit or "unknown"}'
    )


def check_equal(ours: Scores, coco: dict[str, float], dense: dict[str, float]) -> None:
    """Stop when a shared number differs."""
    mine = ours.headline()
    for name, value in (coco | dense).items():
        if not abs(mine[name] - value) < 1e-10:
            raise SystemExit(f'{name}: ours {mine[name]!r}, peer {value!r}')


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--data-root', type=Path, default=Path('data'))
    parser.add_argument('--images', type=int, default=209)
    parser.add_argument('--cells', type=int, default=31_000)
    parser.add_argument('--rounds', type=int, default=3)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    gt_sets = repeat_to(read_sets(options.data_root), options.images, options.cells)
    pred_sets = [jitter(gt, generator) for gt in gt_sets]
    params, quick = ScoreParams(), ScoreParams(n_bootstrap=0)
    cap = max(map(len, pred_sets))
    runs: dict[str, Callable[[], object]] = {
        'ours, 1000 resamples': lambda: score(gt_sets, pred_sets, CLASS_NAMES, params),
        'ours, no intervals': lambda: score(gt_sets, pred_sets, CLASS_NAMES, quick),
        'pycocotools, mask and box AP': lambda: coco_peer(gt_sets, pred_sets, cap),
        'dense masks, PQ alone': lambda: dense_pq_peer(gt_sets, pred_sets, params),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, object] = {}
    for _ in range(options.rounds):
        for name, run in runs.items():
            results[name], elapsed = timed(run)
            seconds[name].append(elapsed)
    ours = results['ours, 1000 resamples']
    check_equal(ours, *list(results.values())[2:])
    print(environment())
    print(
        f'{len(gt_sets)} images, {sum(map(len, gt_sets))} cells, {sum(map(len, pred_sets))} '
        f'predictions, at most {cap} in one image; median of {options.rounds} rounds'
    )
    base = statistics.median(seconds['ours, no intervals'])
    print(f'{"":32}{"seconds":>10}{"min":>10}{"max":>10}{"x ours, no intervals":>24}')
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f'{name:32}{middle:10.2f}{min(values):10.2f}{max(values):10.2f}{middle / base:24.2f}')
    print(
        'shared numbers agree to 1e-10:',
        ', '.join(sorted(results['pycocotools, mask and box AP'])),
        'mPQ',
    )
    print()
    print(score_table(ours))


if __name__ == '__main__':
    main()

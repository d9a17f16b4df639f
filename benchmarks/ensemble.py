"""Five members and one answer: our ensemble against the original's procedure on the same models.

    python benchmarks/ensemble.py configs/sample/fold0.py --data-root data --images 6

The original (one image at a time): every member pastes N x H x W masks; boxes, scores, classes and
full-size masks are concatenated; NMS per class at box IoU 0.5; each mask that is left is encoded.
Ours: members give RLE, ``fuse`` with the rule ``nms``. Both run on the same weights (random ones
with a shift that makes them find ``--detections`` per image, or ``--checkpoints``), interleaved in
one process; the results are compared instance by instance.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import cellseg_mm  # noqa: F401  isort: skip  (before mmcv: gives it NMS and RoIAlign)
from mmcv.ops import batched_nms
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cellseg_mm.core import provenance
from cellseg_mm.core.instances import InstanceSet, canonical_order
from cellseg_mm.data.config import dataset_settings
from cellseg_mm.detectors.member_models import MemberSource, load_member
from cellseg_mm.fusion.fuse import from_spec, fuse
from cellseg_mm.model.detections import to_instance_set

RULES = ('nms', 'soft_nms', 'mask_nms', 'wbf', 'soft_mask')


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('--data-root', type=Path, required=True)
    parser.add_argument('--checkpoints', nargs='+', default=[])
    parser.add_argument('--members', type=int, default=5, help='random models without checkpoints')
    parser.add_argument('--images', type=int, default=6)
    parser.add_argument('--detections', type=int, default=500, help='cap per member and image')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    return parser.parse_args(words)


def build_models(cfg: Config, args: argparse.Namespace) -> list[nn.Module]:
    """Return the members, each able to find ``args.detections`` instances."""
    cfg = copy.deepcopy(cfg)
    rcnn = cfg.model.test_cfg.rcnn
    rcnn.max_per_img, rcnn.keep_mask_probs = args.detections, False
    if args.checkpoints:
        sources = [MemberSource(cfg, args.config, Path(path)) for path in args.checkpoints]
        return [load_member(source).model.to(args.device) for source in sources]
    rcnn.score_thr = 1e-3
    models = []
    for seed in range(args.members):
        torch.manual_seed(seed)
        model = MODELS.build(cfg.model)
        # Random heads see no cell anywhere; wider weights give detections everywhere, but not so
        # wide that scores saturate at 1: among equal scores the two procedures differ in order.
        nn.init.normal_(model.rpn_head.rpn_cls.weight, std=1.0)
        nn.init.normal_(model.roi_head.bbox_head.fc_cls.weight, std=0.02)
        nn.init.normal_(model.roi_head.mask_head.conv_logits.weight, std=1.0)
        models.append(model.to(args.device).eval())
    return models


def make_loader(cfg: Config, data_root: Path) -> DataLoader:
    """Return a loader of the data folder's test images."""
    settings = dataset_settings(cfg, 'test_dataloader')
    settings.split, settings.data_root = 'test', str(data_root)
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    return Runner.build_dataloader(cfg.test_dataloader)


def predict(models: Sequence[nn.Module], data: dict, *, rle_masks: bool) -> list[DetDataSample]:
    """Run all members; masks as RLE, or as MMDetection's full-size Boolean tensor."""
    found = []
    for model in models:
        model.roi_head.mask_head.rle_masks = rle_masks
        found += model.test_step(data)
    return found


def fuse_as_original(samples: Sequence[DetDataSample]) -> list[dict]:
    """Concatenate, NMS per class, encode what is left."""
    parts = [sample.pred_instances for sample in samples]
    boxes, scores, labels, masks = (
        torch.cat([part[key] for part in parts]) for key in ('bboxes', 'scores', 'labels', 'masks')
    )
    kept = batched_nms(boxes, scores, labels, {'type': 'nms', 'iou_threshold': 0.5})[1]
    return [_record(boxes[i], scores[i], labels[i], masks[i]) for i in kept.tolist()]


def _record(box: Tensor, score: Tensor, label: Tensor, mask: Tensor) -> dict:
    encoded = coco_mask.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
    return {
        'box': box.cpu().numpy(),
        'score': float(score),
        'class_id': int(label),
        'counts': encoded['counts'],
    }


def timed(device: str, work: Callable[[], object]) -> tuple[object, float]:
    """Return a result and its seconds."""
    if device.startswith('cuda'):
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if device.startswith('cuda'):
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def as_set(records: Sequence[dict], like: InstanceSet) -> InstanceSet:
    """Return the original's records as instances, in canonical order."""
    made = replace(
        like,
        class_ids=np.array([r['class_id'] for r in records], dtype=np.int64),
        scores=np.array([r['score'] for r in records], dtype=np.float32),
        boxes_xyxy=np.array([r['box'] for r in records], dtype=np.float32).reshape(-1, 4),
        rles=tuple(r['counts'] for r in records),
        extra={},
    )
    return made[canonical_order(made)]


def keys_of(s: InstanceSet) -> list[tuple]:
    """Return each instance as something to compare to the last bit."""
    boxes = map(tuple, s.boxes_xyxy.tolist())
    return list(zip(s.class_ids.tolist(), s.scores.tolist(), boxes, s.rles, strict=True))


def differing(a: InstanceSet, b: InstanceSet, pool: Sequence[InstanceSet]) -> list[float]:
    """Return how near to a tie each instance is that is in one of two results only.

    MMCV's NMS moves the boxes of each class aside before it compares them, which rounds: a box IoU
    within a rounding error of the threshold may fall on either side. Nearness is the least
    |IoU - 0.5| with another detection of the class, in float64.
    """
    only = set(keys_of(a)) ^ set(keys_of(b))
    distances = []
    for class_id, _, box, _ in sorted(only):
        others = np.concatenate([s.boxes_xyxy[s.class_ids == class_id] for s in pool]).astype(float)
        corners = np.array(box, dtype=float)
        sides = np.minimum(others[:, 2:], corners[2:]) - np.maximum(others[:, :2], corners[:2])
        shared = np.clip(sides, 0, None).prod(1)
        areas = (others[:, 2:] - others[:, :2]).prod(1)
        union = areas + (corners[2:] - corners[:2]).prod() - shared
        distances.append(float(np.abs(shared / union - 0.5).min()))
    return distances


def main() -> None:
    """Measure and print the table."""
    args = parse_args()
    init_default_scope('mmdet')
    cfg = Config.fromfile(args.config)
    models, loader = build_models(cfg, args), make_loader(cfg, args.data_root)
    seconds: dict[str, list[float]] = {
        key: [] for key in ('forward', 'original forward', 'original', *RULES)
    }
    n_in, n_out, sizes = [], 0, []
    nearness: list[list[float]] = []  # of each image's differing instances
    rules = {name: from_spec(name) for name in RULES}
    with torch.no_grad():
        for i, data in enumerate(loader):
            if i > args.images:
                break
            ours, t_ours = timed(args.device, lambda d=data: predict(models, d, rle_masks=True))
            theirs, t_theirs = timed(
                args.device, lambda d=data: predict(models, d, rle_masks=False)
            )
            records, t_original = timed(args.device, lambda t=theirs: fuse_as_original(t))
            sets = [to_instance_set(sample) for sample in ours]
            fused, times = {}, {}
            for name, rule in rules.items():
                fused[name], times[name] = timed('cpu', lambda s=sets, r=rule: fuse(s, r))
            if i == 0:  # warms up
                continue
            n_in += [len(s) for s in sets]
            sizes.append(sets[0].image_hw)
            nearness.append(differing(as_set(records, sets[0]), fused['nms'], sets))
            n_out += len(fused['nms'])
            times |= {'forward': t_ours, 'original forward': t_theirs, 'original': t_original}
            for name, value in times.items():
                seconds[name].append(value)
    report(args, seconds, n_in=n_in, sizes=sizes)
    ties = [distance for distances in nearness for distance in distances]
    print(
        f'identical results: {nearness.count([])} of {len(sizes)} images; {len(ties)} '
        f'instances of {n_out} are in one result only'
    )
    if ties:
        print(f'their box IoU with another detection is within {max(ties):.1e} of the threshold')


def report(
    args: argparse.Namespace,
    seconds: dict[str, list[float]],
    *,
    n_in: list[int],
    sizes: list[tuple[int, int]],
) -> None:
    """Print the table."""
    total = {name: sum(values) for name, values in seconds.items()}
    n = len(sizes)
    print(f'{provenance.machine()}, {torch.get_num_threads()} threads, {args.device}')
    versions = provenance.versions()
    print(f'torch {versions["torch"]}, commit {provenance.code_commit()}, config {args.config}')
    n_members = len(n_in) // n
    print(
        f'{n} images up to {max(sizes)} px, {n_members} members, {np.mean(n_in):.0f} detections '
        f'per member and image (at most {max(n_in)})'
    )
    print(f'{"":34}{"s per image":>12}{"share of forward":>18}')
    forward = total['forward']
    print(f'{"ours: forward, masks as RLE":34}{forward / n:12.3f}')
    for name in RULES:
        share = total[name] / forward
        print(f'{"ours: fuse, " + name:34}{total[name] / n:12.4f}{share:18.2%}')
    before = total['original forward']
    print(f'{"original: forward, full masks":34}{before / n:12.3f}')
    share = total['original'] / before
    print(f'{"original: concatenate, NMS, encode":34}{total["original"] / n:12.4f}{share:18.2%}')
    print(f'fusion alone: {total["original"] / total["nms"]:.0f} times as fast (rule nms)')
    ratio = (before + total['original']) / (forward + total['nms'])
    print(f'all together: {ratio:.2f} times as fast')


if __name__ == '__main__':
    main()

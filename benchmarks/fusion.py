"""Times every fusion rule against the original's procedure on members made of real label maps.

    python benchmarks/fusion.py --data-root data/raw [--members 5] [--per-member 500] [--cases 4]

A member is the ground truth of a case seen badly: cells are lost, moved, grown or shrunk, scored,
sometimes doubled, and given 28 x 28 mask probabilities in a frame of their own. The fullest cases
are used; where a case has fewer cells than wanted, places are used again with another jitter.

The peer does what the original's ensemble does, once the models have answered: concatenate the
full-size masks, NMS per class on boxes (the compiled one of ensemble-boxes), encode the masks that
stay. Its masks are given to it decoded, ours as RLE; ours pay for decoding. The peer and the rules
take turns in every round; the ratio is the median of the rounds' ratios. Times are of the
processor, not of the clock, so that a busy machine changes them little; everything runs on one
thread with ``OMP_NUM_THREADS=1``. The last column is the time as a share of as many forward passes
as there are members, of ``--forward-ms`` each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ensemble_boxes
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from scipy import ndimage

from cellseg_mm.core import provenance
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data.cases import find_cases
from cellseg_mm.data.labels import read_gt
from cellseg_mm.fusion import fuse

SIDE = 28
MAX_PEER_BYTES = 6 << 30
RULES = ('nms', 'mask_nms', 'soft_nms', 'wbf', 'soft_mask')


def read_arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data-root', type=Path, required=True, help='folder with train/')
    parser.add_argument('--members', type=int, default=5)
    parser.add_argument('--per-member', type=int, default=500, help='instances of each member')
    parser.add_argument('--cases', type=int, default=4, help='how many of the fullest cases')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--forward-ms', type=float, default=1000.0, help='one forward pass')
    parser.add_argument('--seed', type=int, default=0)
    return parser.parse_args()


def make_member(gt: InstanceSet, n: int, rng: np.random.Generator) -> InstanceSet:
    """Return ``n`` predictions that resemble the ground truth, with probabilities."""
    picked = rng.permutation(len(gt))[: max(int(len(gt) * 0.9), 1)]  # a tenth is missed
    picked = np.resize(picked, n)
    crops, offsets = gt.crops()
    probs = np.zeros((n, SIDE, SIDE), dtype=np.float16)
    frames = np.zeros((n, 4), dtype=np.float32)
    for k, i in enumerate(picked.tolist()):
        probs[k], frames[k] = _blurred(crops[i], offsets[i], rng)
    pasted, low = fuse.paste_probs(probs, frames, gt.image_hw)
    classes = np.where(rng.random(n) < 0.95, gt.class_ids[picked], rng.integers(0, 4, n))
    made = InstanceSet.from_crops(
        gt.name,
        gt.image_id,
        gt.image_hw,
        crops=pasted,
        offsets_yx=low,
        class_ids=classes,
        scores=rng.beta(3, 1, n),
    )
    extra = {'mask_probs': probs, 'mask_boxes': frames}
    return replace(made, boxes_xyxy=frames, extra=extra)


def _blurred(
    crop: NDArray[np.bool_], offset_yx: NDArray[np.int64], rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a cell's mask as a mask head would see it, and its frame moved by up to a tenth."""
    margin = 1 + max(crop.shape) // 12
    padded = np.pad(crop, margin).astype(np.float64)
    zoomed = ndimage.zoom(padded, (SIDE / padded.shape[0], SIDE / padded.shape[1]), order=1)
    noise = ndimage.gaussian_filter(rng.normal(size=(SIDE, SIDE)), 4) * 2
    probs = np.clip(ndimage.gaussian_filter(zoomed[:SIDE, :SIDE], 1.5) + noise * 0.2, 0, 1)
    y, x = offset_yx - margin + rng.normal(size=2) * 0.05 * np.array(padded.shape)
    return probs, np.array([x, y, x + padded.shape[1], y + padded.shape[0]])


def peer_masks(members: list[InstanceSet]) -> list[NDArray[np.bool_]] | None:
    """Return the members' full-size masks, or None where they are too many to hold."""
    size = sum(len(m) for m in members) * int(np.prod(members[0].image_hw))
    return None if 2 * size > MAX_PEER_BYTES else [m.masks() for m in members]


def run_peer(members: list[InstanceSet], masks: list[NDArray[np.bool_]]) -> list[dict]:
    """Concatenate, box NMS per class, encode: the original's ensemble, re-created."""
    joined = np.concatenate(masks)
    height, width = members[0].image_hw
    scale = np.array([width, height, width, height])
    boxes = np.clip(np.concatenate([m.boxes_xyxy for m in members]) / scale, 0, 1)
    scores = np.concatenate([m.scores for m in members])
    labels = np.concatenate([m.class_ids for m in members])
    kept = []
    for label in np.unique(labels):
        here = np.flatnonzero(labels == label)
        kept += here[ensemble_boxes_nms(boxes[here], scores[here])].tolist()
    return [coco_mask.encode(np.asfortranarray(joined[i].view(np.uint8))) for i in kept]


def ensemble_boxes_nms(boxes: NDArray, scores: NDArray) -> list[int]:
    """Return what NMS keeps, by the compiled loop of ensemble-boxes."""
    return ensemble_boxes.ensemble_boxes_nms.nms_float_fast(boxes, scores, thresh=0.5)


def run_box_wbf(members: list[InstanceSet]) -> object:
    """Fuse the boxes alone with ensemble-boxes: no masks at all."""
    height, width = members[0].image_hw
    scale = np.array([width, height, width, height])
    boxes = [np.clip(m.boxes_xyxy / scale, 0, 1) for m in members]
    return ensemble_boxes.weighted_boxes_fusion(
        boxes, [m.scores for m in members], [m.class_ids for m in members]
    )


def jobs_of(members: list[InstanceSet]) -> dict[str, Callable[[], object]]:
    """Return everything that is timed on one image, the peer first where it can run."""
    bare = [replace(m, extra={}) for m in members]
    jobs: dict[str, Callable[[], object]] = {}
    masks = peer_masks(members)
    if masks is not None:
        jobs['original: full masks, box NMS'] = lambda: run_peer(members, masks)
    jobs['ensemble-boxes WBF, boxes only'] = lambda: run_box_wbf(members)
    for name in RULES:
        rule = fuse.from_spec(name)
        jobs[f'{name}, masks'] = lambda rule=rule: fuse.fuse(bare, rule)
        jobs[f'{name}, probabilities'] = lambda rule=rule: fuse.fuse(members, rule)
    fused, post = fuse.fuse(bare, fuse.from_spec('nms')), fuse.PostProcess(disjoint=True)
    jobs['overlaps resolved'] = lambda: fuse.postprocess(fused, post)
    return jobs


def time_jobs(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the processor's milliseconds of each job in each round, after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(rounds + 1):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            if round_:
                times[name].append((time.process_time() - start) * 1e3)
    return times


def print_table(times: dict[str, list[float]], n_members: int, forward_ms: float) -> None:
    """Print the median times and how they compare."""
    peer = next(iter(times.values())) if next(iter(times)).startswith('original') else None
    print(f'{"":<32} {"ms/image":>9} {"peer/ours":>10} {"% of forwards":>14}')
    for name, found in times.items():
        ms = statistics.median(found)
        ratios = [a / b for a, b in zip(peer, found, strict=True)] if peer else []
        ratio = f'{statistics.median(ratios):.1f}' if ratios else '-'
        share = 100 * ms / (n_members * forward_ms)
        print(f'{name:<32} {ms:>9.1f} {ratio:>10} {share:>14.2f}')


def main() -> None:
    """Time every rule on the same images, in turns."""
    args = read_arguments()
    rng = np.random.default_rng(args.seed)
    cases = find_cases(args.data_root, 'train', 4)
    gts = sorted((read_gt(case) for case in cases), key=lambda gt: (-len(gt), gt.name))
    print(f'{provenance.machine()}; commit {provenance.code_commit()}')
    for gt in gts[: args.cases]:
        members = [make_member(gt, args.per_member, rng) for _ in range(args.members)]
        print(f'\n{gt.name}: {gt.image_hw[0]} x {gt.image_hw[1]} px, {len(gt)} cells')
        jobs = jobs_of(members)
        if not next(iter(jobs)).startswith('original'):
            print("(the original's full-size masks would not fit in memory: not run)")
        print_table(time_jobs(jobs, args.rounds), args.members, args.forward_ms)


if __name__ == '__main__':
    main()

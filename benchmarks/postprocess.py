"""Times our mask post-processing against MMDetection's paste and encode, and checks equality.

    python benchmarks/postprocess.py [--rounds 5] [--threads 2] [--id-map FILE]

Both get the same mask logits and boxes of cell size (10 to 50 px) and end in the same COCO RLE:
``FCNMaskHead.predict_by_feat`` plus ``encode_mask_results`` against ``CellMaskHead``. They are
timed in turn in every round; the ratio is the median of the rounds' ratios. With ``--id-map`` a
scene has all test images in their real sizes, one detection per 1,500 px, 10 to 1,000 an image.

Memory is the growth of the peak resident set (VmHWM of Linux) in a fresh process that has first
run a small scene, so that libraries and pools are not counted. The last row is ours alone on an
image two hundred times larger: its memory must not grow.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import cellseg_mm  # noqa: F401  (first: makes mmdet importable where mmcv has no compiled ops)

# isort: split

import numpy as np
import torch
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.structures.mask import encode_mask_results
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor

from cellseg_mm.core import provenance
from cellseg_mm.data.labels import read_id_map
from cellseg_mm.model.mask_head import CellMaskHead

HEAD = {'num_convs': 0, 'in_channels': 4, 'conv_out_channels': 4, 'num_classes': 4}
TEST_CFG = ConfigDict(mask_thr_binary=0.5)
PX_PER_DETECTION = 1500


@dataclass(frozen=True, slots=True)
class Image:
    """One image as the mask head sees it: logits (N, 4, 28, 28), boxes (N, 4), labels (N,)."""

    image_hw: tuple[int, int]
    logits: Tensor
    boxes: Tensor
    labels: Tensor


def make_image(n: int, image_hw: tuple[int, int], seed: int = 0) -> Image:
    """Make N blobs with smooth edges in boxes of 10 to 50 px, clipped to the image."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 4, 5, 5, generator=generator) * 3
    coarse[:, :, 1:4, 1:4] += 3  # filled within, mixed at the edge
    logits = torch.nn.functional.interpolate(coarse, size=28, mode='bicubic')
    size_wh = torch.tensor([image_hw[1], image_hw[0]])
    wh = torch.rand(n, 2, generator=generator) * 40 + 10
    centre = torch.rand(n, 2, generator=generator) * size_wh
    low, high = (centre - wh / 2).clamp(min=0), torch.minimum(centre + wh / 2, size_wh)
    labels = torch.randint(0, 4, (n,), generator=generator)
    return Image(image_hw, logits, torch.cat([low, high], dim=1), labels)


def scenes(id_map: Path | None) -> dict[str, list[Image]]:
    """Return the scenes by their name, in the order of the table."""
    named = {
        f'{n} on {hw[0]} x {hw[1]}': [make_image(n, hw)]
        for n, hw in ((100, (500, 600)), (500, (1000, 1000)), (1000, (1400, 1872)))
    }
    if id_map:
        images = []
        for i, entry in enumerate(read_id_map(id_map)):
            n = int(np.clip(np.prod(entry.image_hw) // PX_PER_DETECTION, 10, 1000))
            images.append(make_image(n, entry.image_hw, seed=i))
        n = sum(len(image.boxes) for image in images)
        named[f'{n} on {len(images)} test images'] = images
    return named


def run(head: FCNMaskHead, images: list[Image]) -> list[list[dict]]:
    """Predict and encode the masks of all images."""
    encoded = []
    for image in images:
        result = InstanceData(bboxes=image.boxes.clone(), labels=image.labels)
        meta = {'ori_shape': image.image_hw, 'scale_factor': (1.0, 1.0)}
        head.predict_by_feat([image.logits], [result], [meta], TEST_CFG, rescale=True)
        masks = result.masks
        if isinstance(masks, Tensor):
            masks = encode_mask_results(masks.numpy())
        encoded.append(masks)
    return encoded


def compare(images: list[Image], rounds: int) -> tuple[float, float, float]:
    """Return median seconds of stock and ours, and the median ratio; raise if they differ."""
    heads = {'stock': FCNMaskHead(**HEAD), 'ours': CellMaskHead(**HEAD)}
    seconds: dict[str, list[float]] = {'stock': [], 'ours': []}
    for head in heads.values():
        run(head, [make_image(20, (200, 300))])  # warm-up
    for _ in range(rounds):
        results = []
        for name, head in heads.items():
            start = time.perf_counter()
            results.append(run(head, images))
            seconds[name].append(time.perf_counter() - start)
        if results[0] != results[1]:
            sys.exit('benchmarks/postprocess.py: the results differ; no time is worth printing')
    ratios = [a / b for a, b in zip(seconds['stock'], seconds['ours'], strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return medians['stock'], medians['ours'], statistics.median(ratios)


def peak_growth_mb(head: FCNMaskHead, images: list[Image]) -> float:
    """Return by how much the peak resident set grows beyond the present one, in MB."""
    run(head, [make_image(20, (200, 300))])
    Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM
    before = _status_kb('VmRSS')
    run(head, images)
    return (_status_kb('VmHWM') - before) / 1024


def _status_kb(key: str) -> int:
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def memory_in_fresh_process(args: argparse.Namespace, head: str, scene: str) -> str:
    """Return the peak growth as text, '-' where the system does not tell."""
    words = [sys.executable, __file__, '--memory-of', head, scene, '--threads', str(args.threads)]
    if args.id_map:
        words += ['--id-map', str(args.id_map)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return f'{float(done.stdout):.0f} MB' if done.returncode == 0 else '-'


def print_memory(args: argparse.Namespace) -> None:
    """Serve a child process: print one number."""
    name, scene = args.memory_of
    head = FCNMaskHead(**HEAD) if name == 'stock' else CellMaskHead(**HEAD)
    images = [huge_image()] if scene == 'huge' else scenes(args.id_map)[scene]
    print(peak_growth_mb(head, images))


def huge_image() -> Image:
    """As many cells as the largest scene, on 20,000 x 26,000 px."""
    return make_image(1000, (20_000, 26_000))


def print_table(args: argparse.Namespace) -> None:
    """Time all scenes and print the table."""
    row = '{:<28} {:>10} {:>10} {:>7} {:>12} {:>12}'.format
    print(row('detections', 'stock', 'ours', 'ratio', 'stock memory', 'ours memory'))
    for name, images in scenes(args.id_map).items():
        stock, ours, ratio = compare(images, args.rounds)
        memory = [memory_in_fresh_process(args, head, name) for head in ('stock', 'ours')]
        print(row(name, f'{stock:.3f} s', f'{ours:.4f} s', f'{ratio:.0f}x', *memory), flush=True)
    image, head = huge_image(), CellMaskHead(**HEAD)
    run(head, [image])
    start = time.perf_counter()
    run(head, [image])
    ours = time.perf_counter() - start
    memory = memory_in_fresh_process(args, 'ours', 'huge')
    print(row('1000 on 20000 x 26000', '-', f'{ours:.4f} s', '-', '-', memory))
    print('results identical in every scene')
    versions = provenance.versions()
    shown = ('python', 'torch', 'numpy', 'onedl-mmdetection', 'pycocotools')
    print(
        f'{provenance.machine()}, {args.threads} thread(s), {args.rounds} rounds; '
        f'{", ".join(f"{key} {versions[key]}" for key in shown)}; '
        f'commit {provenance.code_commit()}'
    )


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    parser.add_argument('--id-map', type=Path, help='test_image_name_to_ids.json, for real sizes')
    parser.add_argument('--memory-of', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print_memory(args)
    else:
        print_table(args)


if __name__ == '__main__':
    main()

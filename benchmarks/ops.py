"""Compare the pure-torch NMS and RoIAlign with mmcv's compiled ops, in one process, interleaved.

Needs an environment with compiled mmcv (see README) and this repository on PYTHONPATH:

    PYTHONPATH=. python benchmarks/ops.py [--repeats 9] [--image-size 512] [--threads 2]

Prints the largest differences between the results, the time of each op alone, and the time of
whole training and test steps of MMDetection's LSJ Mask R-CNN (random weights, 4 classes) with
either set of ops: medians, and the median of the ratios of neighbouring runs. torchvision's ops are
compared too, where torchvision works.

Since torch 2.6 the sort inside mmcv's NMS is not stable, so boxes of equal score come in an order
that depends on the processor. Results are compared with mmcv given distinct ranks instead of the
scores (ties by input order, as torchvision and we do); times are of mmcv as it is.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cellseg_mm import runtime

CONFIG = 'strong_baselines/mask-rcnn_r50-caffe_fpn_rpn-2conv_4conv1fc_syncbn-all_lsj-400e_coco.py'
N_CLASSES = 4
Ops = dict[str, Callable]


def read_arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repeats', type=int, default=9, help='runs of each step and backend')
    parser.add_argument('--image-size', type=int, default=512, help='px of the square images')
    parser.add_argument('--batch', type=int, default=2, help='images per training step')
    parser.add_argument('--cells', type=int, default=200, help='ground-truth cells per image')
    parser.add_argument('--threads', type=int, default=os.cpu_count(), help='torch threads')
    return parser.parse_args()


def load_backends() -> dict[str, Ops]:
    """Return the ops of every backend that works here, compiled mmcv first."""
    if runtime.ops_backend() != 'mmcv':
        sys.exit(f'benchmarks/ops.py: no compiled mmcv ops to compare with; {runtime.FULL_MMCV}')
    import mmcv._ext as compiled

    names = ('nms', 'softnms', 'roi_align_forward', 'roi_align_backward')
    backends = {'mmcv': {name: getattr(compiled, name) for name in names}}
    if runtime.torchvision_problem() is None:
        backends['torchvision'] = runtime.ops_of('torchvision')
    backends['torch'] = runtime.ops_of('torch')
    return backends


def with_stable_ties(compiled: Ops) -> Ops:
    """Return mmcv's ops with an NMS whose ties go to the earlier box."""

    def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
        order = torch.sort(scores, descending=True, stable=True).indices
        ranks = torch.empty(len(scores))
        ranks[order] = -torch.arange(len(scores), dtype=torch.float32)
        return compiled['nms'](boxes, ranks, iou_threshold=iou_threshold, offset=offset)

    return {**compiled, 'nms': nms}


class Swap:
    """Makes ``mmcv.ops`` call one backend or another."""

    def __init__(self, backends: dict[str, Ops]) -> None:
        importlib.import_module('mmcv.ops')
        self.backends = backends
        # mmcv.ops.nms is the function; its module is only in sys.modules.
        self.modules = [sys.modules['mmcv.ops.nms'], sys.modules['mmcv.ops.roi_align']]

    def use(self, backend: str) -> None:
        """Make every module use the ops of one backend."""
        for module in self.modules:
            module.ext_module = argparse.Namespace(**self.backends[backend])


def compare(title: str, swap: Swap, run: Callable[[], object], repeats: int) -> None:
    """Time ``run`` with each backend in turn and print one line per backend."""
    seconds: dict[str, list[float]] = {name: [] for name in swap.backends}
    for repeat in range(repeats + 1):
        for name in swap.backends:
            swap.use(name)
            start = time.perf_counter()
            run()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    peer = seconds['mmcv']
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, peer, strict=True))
        median = statistics.median(values)
        print(f'{title:34} {name:12} {median * 1e3:9.1f} ms   {ratio:5.2f}x', flush=True)


def random_boxes(rng: np.random.Generator, n: int, size: float, *, clustered: bool) -> Tensor:
    """Return (n, 4) float32 xyxy boxes of 6 to 90 px, around cells like real proposals or not."""
    centres = rng.uniform(0, size, (n, 2))
    if clustered:
        cells = rng.uniform(0, size, (150, 2))
        centres = cells[rng.integers(0, len(cells), n)] + rng.normal(0, 4, (n, 2))
    half = np.exp(rng.uniform(np.log(3), np.log(45), (n, 2)))
    boxes = np.concatenate((centres - half, centres + half), axis=1)
    return torch.tensor(boxes.clip(0, size), dtype=torch.float32)


def compare_results(swap: Swap) -> None:
    """Print the largest difference of every backend from compiled mmcv over random inputs."""
    rng = np.random.default_rng(0)
    others = [name for name in swap.backends if name != 'mmcv']
    nms_runs, nms_differ = 0, dict.fromkeys(others, 0)
    soft_differ = dict.fromkeys(others, 0.0)
    for n in (0, 1, 5, 60, 300, 1000, 3000, 7000):
        for threshold in (0.0, 0.3, 0.5, 0.7, 0.95):
            for offset in (0, 1):
                boxes = random_boxes(rng, n, 400, clustered=bool(rng.integers(2)))
                # Two decimals give ties; whole pixels give IoUs that equal the threshold.
                scores = torch.tensor(rng.random(n).round(2), dtype=torch.float32)
                boxes = boxes.round() if rng.integers(2) else boxes
                kept = {
                    name: ops['nms'](boxes, scores, threshold, offset)
                    for name, ops in swap.backends.items()
                }
                nms_runs += 1
                for name in others:
                    nms_differ[name] += not torch.equal(kept[name], kept['mmcv'])
    for method in (0, 1, 2):
        boxes, scores = random_boxes(rng, 400, 200, clustered=True), torch.rand(400)
        soft = {}
        for name, ops in swap.backends.items():
            dets = torch.zeros(400, 5)
            picked = ops['softnms'](boxes, scores, dets, 0.3, 0.5, 0.01, method, 0)
            soft[name] = (picked, dets[: len(picked)])
        for name in others:
            same = torch.equal(soft[name][0], soft['mmcv'][0])
            gap = (soft[name][1] - soft['mmcv'][1]).abs().max().item() if same else float('inf')
            soft_differ[name] = max(soft_differ[name], gap)
    roi_differ = roi_differences(rng, swap, others)
    for name in others:
        print(
            f'{name} against mmcv: NMS differs in {nms_differ[name]} of {nms_runs} runs; '
            f'Soft-NMS by {soft_differ[name]:.2g}; RoIAlign by {roi_differ[name][0]:.2g} '
            f'(forward), {roi_differ[name][1]:.2g} (gradient)'
        )


def roi_differences(
    rng: np.random.Generator, swap: Swap, others: list[str]
) -> dict[str, tuple[float, float]]:
    """Return the largest absolute difference of values and gradients over every mode."""
    from mmcv.ops import roi_align

    worst = dict.fromkeys(others, (0.0, 0.0))
    for mode in ('avg', 'max'):
        for ratio in (0, 1, 2, 3):
            for aligned in (True, False):
                for n in (0, 1, 40):
                    boxes = random_boxes(rng, n, 300, clustered=False) * 1.3 - 40
                    boxes[:1, 2:] = boxes[:1, :2]  # a RoI of size zero
                    rois = torch.cat((torch.randint(0, 2, (n, 1)).float(), boxes), dim=1)
                    features = torch.tensor(rng.normal(size=(2, 5, 61, 47)), dtype=torch.float32)
                    weights = torch.tensor(rng.normal(size=(n, 5, 7, 6)), dtype=torch.float32)
                    found = {}
                    for name in swap.backends:
                        swap.use(name)
                        leaf = features.clone().requires_grad_()
                        pooled = roi_align(leaf, rois, (7, 6), 0.25, ratio, mode, aligned)
                        (pooled * weights).sum().backward()
                        found[name] = (pooled.detach(), leaf.grad)
                    for name in others:
                        gaps = [
                            (a - b).abs().max().item() if a.numel() else 0.0
                            for a, b in zip(found[name], found['mmcv'], strict=True)
                        ]
                        worst[name] = tuple(map(max, worst[name], gaps))
    return worst


def compare_ops(swap: Swap, repeats: int) -> None:
    """Time single ops at the sizes of a training step with two 512 px images."""
    from mmcv.ops import nms, roi_align

    rng = np.random.default_rng(1)
    for clustered in (False, True):
        boxes = random_boxes(rng, 7000, 512, clustered=clustered)
        scores = torch.tensor(rng.random(7000), dtype=torch.float32)
        boxes += 600.0 * torch.arange(7000)[:, None].remainder(5)  # the offsets of batched_nms
        title = f'nms 7000 {"clustered" if clustered else "spread"}'
        compare(title, swap, lambda b=boxes, s=scores: nms(b, s, 0.7), repeats)
    features = torch.randn(2, 256, 128, 128)
    for size, n in ((7, 1024), (14, 256)):
        boxes = random_boxes(rng, n, 512, clustered=True)
        rois = torch.cat((torch.randint(0, 2, (n, 1)).float(), boxes), dim=1)

        def forward_backward(rois: Tensor = rois, size: int = size) -> None:
            leaf = features.clone().requires_grad_()
            roi_align(leaf, rois, size, 0.25, 0).sum().backward()

        with torch.no_grad():
            compare(
                f'roi_align {n} RoIs {size}x{size}',
                swap,
                lambda r=rois, s=size: roi_align(features, r, s, 0.25, 0),
                repeats,
            )
        compare(f'roi_align {n} RoIs {size}x{size} + grad', swap, forward_backward, repeats)


def build_model() -> torch.nn.Module:
    """Build MMDetection's LSJ Mask R-CNN for four classes, with a norm that works on one device."""
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.model import revert_sync_batchnorm

    register_all_modules(init_default_scope=True)
    model = Config.fromfile(Path(mmdet.__file__).parent / '.mim/configs' / CONFIG).model
    model.data_preprocessor.batch_augments = None
    for head in (model.roi_head.bbox_head, model.roi_head.mask_head):
        head.num_classes = N_CLASSES
        head.norm_cfg = {'type': 'SyncBN', 'requires_grad': True}
    model.test_cfg.rcnn.score_thr = 1e-3  # as the original recipe: random scores pass, too
    torch.manual_seed(0)
    logging.disable(logging.INFO)  # init_weights reports every tensor
    built = MODELS.build(model)
    built.init_weights()
    return revert_sync_batchnorm(built)


def make_batch(n_images: int, size: int, n_cells: int) -> dict[str, list]:
    """Return images with disc-shaped cells as mmdet's data loader would."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    rng = np.random.default_rng(2)
    row, column = np.mgrid[:size, :size]
    batch: dict[str, list] = {'inputs': [], 'data_samples': []}
    for number in range(n_images):
        radius = rng.uniform(4, 30, n_cells)
        centre = rng.uniform(30, size - 30, (n_cells, 2))
        masks = np.stack(
            [
                (row - y) ** 2 + (column - x) ** 2 < r * r
                for (y, x), r in zip(centre, radius, strict=True)
            ]
        )
        boxes = np.concatenate(
            (centre[:, ::-1] - radius[:, None], centre[:, ::-1] + radius[:, None]), 1
        )
        image = rng.normal(0, 20, (3, size, size)) + 150 - 60 * masks.any(0)
        sample = DetDataSample(
            metainfo={
                'img_shape': (size, size),
                'ori_shape': (size, size),
                'scale_factor': (1.0, 1.0),
                'img_id': number,
            }
        )
        sample.gt_instances = InstanceData(
            bboxes=HorizontalBoxes(torch.tensor(boxes, dtype=torch.float32)),
            labels=torch.tensor(rng.integers(0, N_CLASSES, n_cells)),
            masks=BitmapMasks(masks.astype(np.uint8), size, size),
        )
        batch['inputs'].append(torch.tensor(image.clip(0, 255), dtype=torch.uint8))
        batch['data_samples'].append(sample)
    return batch


def train_step(model: torch.nn.Module, batch: dict[str, list]) -> dict[str, Tensor]:
    """Run one whole training step but for the optimiser's update, and return the losses."""
    model.train()
    model.zero_grad()
    torch.manual_seed(3)  # the same samples for every backend
    data = model.data_preprocessor(copy.deepcopy(batch), training=True)
    losses = model(**data, mode='loss')
    total, parsed = model.parse_losses(losses)
    total.backward()
    return parsed


@torch.no_grad()
def test_step(model: torch.nn.Module, batch: dict[str, list]) -> list:
    """Run one whole test step on one image."""
    model.eval()
    one = {key: value[:1] for key, value in batch.items()}
    return model.test_step(one)


def compare_steps(swap: Swap, stable: Swap, options: argparse.Namespace) -> None:
    """Time whole steps, after printing how far their results are apart."""
    model = build_model()
    batch = make_batch(options.batch, options.image_size, options.cells)
    results = {}
    for name in stable.backends:
        stable.use(name)
        losses = train_step(model, batch)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results[name] = (losses['loss'].item(), gradient)
    gradient = results['mmcv'][1]
    for name, (other_loss, other_gradient) in results.items():
        apart = ((other_gradient - gradient).norm() / gradient.norm()).item()
        print(
            f'training step, {name}: loss {other_loss:.7g}, gradient off by {apart:.2g} (relative)'
        )
    shape = f'{options.image_size} px, {options.cells} cells'
    compare(
        f'train step, {options.batch} x {shape}',
        swap,
        lambda: train_step(model, batch),
        options.repeats,
    )
    for n_detections in (100, 1000):
        model.roi_head.test_cfg.max_per_img = n_detections
        title = f'test step, {options.image_size} px, {n_detections} detections'
        compare(title, swap, lambda: test_step(model, batch), options.repeats)


def describe_machine() -> str:
    """Return machine, versions and commit in one line."""
    import mmcv
    import mmdet

    commit = subprocess.run(
        ['git', 'describe', '--always', '--dirty'],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return (
        f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, '
        f'load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, '
        f'torch {torch.__version__}, mmcv {mmcv.__version__}, mmdet {mmdet.__version__}, '
        f'commit {commit}'
    )


def main() -> None:
    """Time each step with each backend, in turns."""
    options = read_arguments()
    torch.set_num_threads(options.threads)
    print(describe_machine())
    backends = load_backends()
    swap = Swap(backends)
    stable = Swap({**backends, 'mmcv': with_stable_ties(backends['mmcv'])})
    compare_results(stable)
    compare_ops(swap, options.repeats)
    compare_steps(swap, stable, options)


if __name__ == '__main__':
    main()

"""Times a training step against stock MMDetection's, on the same model, images and batch.

    python benchmarks/train_step.py [--configs FILE ...] [--size 256] [--batch 2] [--amp bf16]

Both sides take turns step by step, on real images with 200 to 500 cells. A step is: make the
samples, send them to the device, forward with losses, backward, optimizer; the first of each side
warms up. The two sides' samples are compared before anything is timed. See ``peers.py`` for what is
stock and what is ours; with ``--amp bf16`` stock gets the recipe's RPN and RoI extractors.
``--size 0`` takes the recipe's own pipeline instead of crops.

On a GPU the throughput comes from steps without any waiting inside; where the time goes, from
further steps in which every section is waited for. With ``--workers`` the row 'data' is how long
the step waited for its samples.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peers
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

SECTIONS = (
    'data', 'transfer', 'backbone and neck', 'RPN', 'RoI heads', 'mask targets', 'backward',
    'optimizer', peers.REST,
)  # fmt: skip


class Side:
    """One side's loader, model and optimizer, ready to step."""

    def __init__(self, name: str, cfg: Config, args: argparse.Namespace, folder: Path) -> None:
        self.name, self.args, self.n_steps = name, args, 0
        self.watch = peers.Stopwatch(args.device)
        self.batches = iter(_loader(name, cfg, args, folder))
        self.model = peers.build_model(name, cfg, args, exact_boxes=args.amp == 'bf16').train()
        settings = cfg.optim_wrapper.copy()
        settings['type'] = 'OptimWrapper'
        if name == 'stock':
            settings.pop('constructor', None)
        wrapper = build_optim_wrapper(self.model, settings)
        self.optimizer, self.clip = wrapper.optimizer, wrapper.clip_grad_kwargs
        self.scaler = torch.amp.GradScaler(args.device, enabled=args.amp == 'fp16')
        for owner, attribute, section in (
            (self.model, 'extract_feat', 'backbone and neck'),
            (self.model.rpn_head, 'loss_and_predict', 'RPN'),
            (self.model.roi_head, 'loss', 'RoI heads'),
            (self.model.roi_head.mask_head, 'get_targets', 'mask targets'),
        ):
            self.watch.wrap(owner, attribute, section)

    def step(self) -> float:
        """Make one step and return its loss."""
        section = self.watch.section
        with section(peers.REST):
            with section('data'):
                batch = next(self.batches)
            with section('transfer'):
                data = peers.prepared(self.model, batch, self.args, training=True)
            torch.manual_seed(self.n_steps)  # both sides sample the same RoIs
            self.n_steps += 1
            with peers.autocast(self.args):
                loss, _ = self.model.parse_losses(self.model(**data, mode='loss'))
            with section('backward'):
                self.scaler.scale(loss).backward()
            with section('optimizer'):
                self._update()
        return float(loss.detach())

    def _update(self) -> None:
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), **self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def _loader(
    name: str, cfg: Config, args: argparse.Namespace, folder: Path
) -> torch.utils.data.DataLoader:
    cases = peers.dense_cases(args.data, args.cells, args.images)
    json_path = folder / 'train.json'
    if name == 'stock':
        peers.write_coco_json(json_path, [case for _, case in cases], tuple(cfg.metainfo.classes))
    dataset = peers.dataset_settings(name, cfg, args, cases, _pipeline(cfg, args), json_path)
    sampler = {'type': 'SeededInfiniteSampler', 'shuffle': True, 'seed': 0}
    dataset = {'type': 'SeededDataset', 'dataset': dataset}
    return peers.build_loader(args, dataset, sampler, args.batch)


def _pipeline(cfg: Config, args: argparse.Namespace) -> list[dict]:
    if not args.size:
        return [step.to_dict() for step in cfg.train_pipeline]
    return [
        {'type': 'LoadCellImage'},
        {'type': 'LoadLabelMaps'},
        {'type': 'Resize', 'scale_factor': args.scale, 'keep_ratio': True},
        {
            'type': 'RandomCrop',
            'crop_size': (args.size, args.size),
            'recompute_bbox': True,
            'allow_negative_crop': True,
        },
        {'type': 'RandomFlip', 'prob': 0.5},
        {'type': 'FilterAnnotations', 'min_gt_bbox_wh': (1e-2, 1e-2), 'keep_empty': False},
        {'type': 'PackDetInputs', 'meta_keys': cfg.meta_keys},
    ]


def check_same_samples(sides: dict[str, Side]) -> float:
    """Stop unless the next batches are equal; return the mean number of cells of a sample."""
    stock, ours = (next(sides[name].batches) for name in peers.SIDES)
    counts = []
    for image, other, sample, wanted in zip(
        ours['inputs'], stock['inputs'], ours['data_samples'], stock['data_samples'], strict=True
    ):
        got, wanted = sample.gt_instances, wanted.gt_instances
        same = torch.equal(image, other) and torch.equal(got.bboxes.tensor, wanted.bboxes.tensor)
        same = same and torch.equal(got.labels, wanted.labels)
        if not (same and np.array_equal(got.masks.to_ndarray(), wanted.masks.to_ndarray())):
            raise SystemExit('ours and the stock pipeline made different samples')
        counts.append(len(got))
    return float(np.mean(counts))


def measure(sides: dict[str, Side], args: argparse.Namespace) -> tuple[dict, dict, dict]:
    """Return seconds per step, seconds per section and the losses of both sides."""
    on_gpu = args.device == 'cuda'
    seconds: dict[str, list[float]] = defaultdict(list)
    losses: dict[str, list[float]] = defaultdict(list)
    for name, side in sides.items():
        for _ in range(args.warm_up):
            losses[name].append(side.step())
        side.watch.seconds.clear()
        side.watch.is_on = not on_gpu
    for _ in range(args.repeats):
        for name, side in sides.items():
            start = side.watch.now()
            losses[name].append(side.step())
            seconds[name].append(side.watch.now() - start)
    for _ in range(args.repeats if on_gpu else 0):
        for side in sides.values():
            side.watch.is_on = True
            side.step()
    sections = {name: dict(side.watch.seconds) for name, side in sides.items()}
    return seconds, sections, losses


def run(config: str, args: argparse.Namespace) -> None:
    """Measure one config and print its tables."""
    with peers.both_sides(Side, config, args) as sides:
        n_cells = check_same_samples(sides)
        seconds, sections, losses = measure(sides, args)
        del sides
    size = f'{args.size} px crops at scale {args.scale:g}' if args.size else "the recipe's pipeline"
    print(f'\n## {config}: {args.batch} images a step, {size}, {n_cells:.0f} cells a sample\n')
    peers.print_rates(config, args, seconds, args.batch)
    for name in peers.SIDES:
        first, last = losses[name][0], losses[name][-1]
        print(f'| loss, {name}, first and last step | {first:.3f} | {last:.3f} | |')
    print()
    peers.print_sections(SECTIONS, sections, args.repeats, 'step')
    waits = [f'{sections[s].get("data", 0) / sum(sections[s].values()):.1%}' for s in peers.SIDES]
    print(
        f'\nSamples of both sides are equal. Share of the step spent on data: {", ".join(waits)}.'
    )
    if not all(np.isfinite(value) for name in peers.SIDES for value in losses[name]):
        raise SystemExit('a loss is not finite')


def one_step(cfg: Config, args: argparse.Namespace, folder: Path) -> Callable[[], float]:
    """Build one side and return its step, for measuring its memory."""
    side = Side(args.peak, cfg, args, folder)
    side.watch.is_on = False
    return side.step


def main() -> None:
    """Parse the command line and run."""
    parser = peers.parser_of(__doc__.splitlines()[0])
    parser.add_argument('--size', type=int, default=256, help='crop in px; 0: the recipe')
    parser.add_argument('--scale', type=float, default=1.0, help='factor before the crop')
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--images', type=int, default=6, help='images to draw from')
    parser.add_argument('--repeats', type=int, default=2)
    parser.add_argument('--warm-up', type=int, default=1)
    peers.main(parser, run, one_step)


if __name__ == '__main__':
    main()

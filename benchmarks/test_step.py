"""Times a test step against stock MMDetection's, on the same model and images, and compares both.

    python benchmarks/test_step.py [--configs FILE ...] [--checkpoint FILE] [--size 512]

A test step is: read the image, send it, predict, post-process masks to RLE in the image's own
pixels, hand all to the evaluator; at the end of a round the evaluator computes its scores. Both
sides take turns image by image. Stock is FCNMaskHead with CocoMetric, ours CellMaskHead with
CellMetric; the latter also computes PQ, Dice and counts, so it does more. Every detection of both
sides is compared: class, score, box and RLE; the run fails if one differs.

With ``--amp`` stock gets the recipe's RPN and RoI extractors, because its own round boxes: without
them the sides could not be compared. Without ``--checkpoint`` the weights are random, boxes are as
large as the anchors and masks ragged: more pixels and runs per mask than cells have. ``--size 0``
takes the recipe's own test pipeline.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peers
import torch
from mmdet.evaluation.metrics import coco_metric
from mmdet.registry import METRICS
from mmengine.config import Config
from torch import nn

from cellseg_mm.model import mask_head

SECTIONS = (
    'data', 'transfer', 'backbone and neck', 'RPN', 'RoI heads', 'mask pasting', 'RLE',
    'evaluator, per image', 'evaluator, scores', 'start of a round', peers.REST,
)  # fmt: skip


class Side:
    """One side's loader, model and evaluator."""

    def __init__(self, name: str, cfg: Config, args: argparse.Namespace, folder: Path) -> None:
        self.name, self.args = name, args
        self.watch = peers.Stopwatch(args.device)
        cases = peers.dense_cases(args.data, args.cells, args.images)
        self.json_path = peers.write_coco_json(
            folder / f'{name}.json', [case for _, case in cases], tuple(cfg.metainfo.classes)
        )
        steps = _pipeline(cfg, args)
        dataset = peers.dataset_settings(name, cfg, args, cases, steps, self.json_path)
        self.loader = peers.build_loader(
            args, dataset, {'type': 'DefaultSampler', 'shuffle': False}, batch_size=1
        )
        cfg = copy.deepcopy(cfg)
        if not args.checkpoint:  # random scores are low: take the best of all
            cfg.model.test_cfg.rcnn.score_thr = 0.0
        self.model = peers.build_model(name, cfg, args, exact_boxes=args.amp != 'off')
        self._wrap_model()

    def _wrap_model(self) -> None:
        head = self.model.roi_head
        paste = 'mask pasting'
        for owner, attribute, section in (
            (self.model, 'extract_feat', 'backbone and neck'),
            (self.model.rpn_head, 'predict', 'RPN'),
            (head, 'predict', 'RoI heads'),
            (head.mask_head, 'predict_by_feat', paste if self.name == 'stock' else 'RLE'),
        ):
            self.watch.wrap(owner, attribute, section)

    def begin(self) -> None:
        """Start a round: a new evaluator, which reads its ground truth again."""
        if self.name == 'stock':
            with contextlib.redirect_stdout(io.StringIO()):
                self.metric = METRICS.build(
                    {
                        'type': 'CocoMetric',
                        'ann_file': str(self.json_path),
                        'metric': ['bbox', 'segm'],
                    }
                )
        else:
            self.metric = METRICS.build({'type': 'CellMetric', 'n_bootstrap': 0})
        self.metric.dataset_meta = self.loader.dataset.metainfo
        self.batches = iter(self.loader)

    @torch.no_grad()
    def step(self) -> None:
        """Predict one image and hand it to the evaluator."""
        section = self.watch.section
        with section(peers.REST):
            with section('data'):
                batch = next(self.batches)
            with section('transfer'):
                data = peers.prepared(self.model, batch, self.args, training=False)
            with peers.autocast(self.args):
                samples = self.model(**data, mode='predict')
            with section('evaluator, per image'):
                self.metric.process(None, [sample.to_dict() for sample in samples])

    def finish(self) -> None:
        """Compute the scores of the round."""
        self.results = list(self.metric.results)
        quiet = contextlib.redirect_stdout(io.StringIO())  # pycocotools prints its tables
        with quiet, self.watch.section('evaluator, scores'):
            self.metric.evaluate(len(self.loader.dataset))


def _pipeline(cfg: Config, args: argparse.Namespace) -> list[dict]:
    steps = [step.to_dict() for step in cfg.test_pipeline]
    if args.size:
        resize = {'type': 'Resize', 'scale': (args.size, args.size), 'keep_ratio': True}
        steps = [steps[0], resize, steps[-1]]
    # CellDataset's sample must name its label maps: the evaluator reads them.
    assert 'label_paths' in cfg.meta_keys
    return steps


def time_encoding(sides: dict[str, Side]) -> None:
    """Count the functions that are not methods of a model, for whichever side is calling."""
    stock, ours = sides['stock'].watch, sides['ours'].watch
    stock.wrap(coco_metric, 'encode_mask_results', 'RLE')
    ours.wrap(mask_head, 'paste_runs', 'mask pasting')


def fill_norm_statistics(model: nn.Module, inputs: dict) -> None:
    """Give norm layers of random weights the statistics of one image, or nothing is finite."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.train()
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
        model(**inputs, mode='predict')
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    model.eval()


def spread_scores(model: nn.Module) -> None:
    """Make random heads find something: give their scores a spread."""
    generator = torch.Generator().manual_seed(1)
    for layer, std in ((model.rpn_head.rpn_cls, 0.1), (model.roi_head.bbox_head.fc_cls, 0.3)):
        noise = torch.randn(layer.weight.shape, generator=generator) * std
        layer.weight.data.copy_(noise)


def make_equal(sides: dict[str, Side], args: argparse.Namespace) -> None:
    """Give both models the same weights; random ones get what a trained model has."""
    if not args.checkpoint:
        model = sides['ours'].model
        spread_scores(model)
        batch = next(iter(sides['ours'].loader))
        fill_norm_statistics(model, peers.prepared(model, batch, args, training=False))
    sides['stock'].model.load_state_dict(sides['ours'].model.state_dict())
    for side in sides.values():
        side.model.eval()


def measure(sides: dict[str, Side], args: argparse.Namespace) -> dict[str, list[float]]:
    """Run the rounds; return each round's seconds of both sides."""
    seconds: dict[str, list[float]] = defaultdict(list)
    n_rounds = args.repeats + args.warm_up
    exact = n_rounds if args.device == 'cuda' else 0  # where the time goes, waiting at every edge
    for side in sides.values():
        side.watch.seconds.clear()  # of what made the weights
    for number in range(n_rounds + exact):
        is_timed = args.warm_up <= number < n_rounds
        totals = dict.fromkeys(peers.SIDES, 0.0)
        for name, side in sides.items():
            side.watch.is_on = number >= n_rounds if exact else is_timed
            start = side.watch.now()
            with side.watch.section('start of a round'):
                side.begin()
            totals[name] += side.watch.now() - start
        for _ in range(len(sides['ours'].loader)):
            _turn(sides, totals, 'step')
        _turn(sides, totals, 'finish')
        if is_timed:
            for name in peers.SIDES:
                seconds[name].append(totals[name])
    return seconds


def _turn(sides: dict[str, Side], totals: dict[str, float], method: str) -> None:
    for name, side in sides.items():
        start = side.watch.now()
        getattr(side, method)()
        totals[name] += side.watch.now() - start


def compare(sides: dict[str, Side]) -> tuple[int, int]:
    """Return the number of detections and of those that differ between the sides."""
    stock = {result['img_id']: result for _, result in sides['stock'].results}
    n, n_different = 0, 0
    for pred, _ in sides['ours'].results:
        wanted = stock[pred.image_id]
        if len(pred) != len(wanted['labels']):
            raise SystemExit(f'{pred.name}: {len(pred)} detections, stock has another number')
        masks = wanted.get('masks', [])
        for k, rle in enumerate(pred.rles):
            counts = masks[k]['counts']
            counts = counts if isinstance(counts, bytes) else counts.encode()
            same = rle == counts and pred.class_ids[k] == wanted['labels'][k]
            same = same and pred.scores[k] == wanted['scores'][k]
            n_different += not (same and np.array_equal(pred.boxes_xyxy[k], wanted['bboxes'][k]))
            n += 1
    return n, n_different


def run(config: str, args: argparse.Namespace) -> None:
    """Measure one config and print its tables."""
    with peers.both_sides(Side, config, args) as sides:
        time_encoding(sides)
        make_equal(sides, args)
        seconds = measure(sides, args)
        n, n_different = compare(sides)
        sections = {name: dict(side.watch.seconds) for name, side in sides.items()}
        del sides
    size = f'longest side {args.size} px' if args.size else "the recipe's pipeline"
    weights = args.checkpoint or 'random weights'
    print(f'\n## {config}: {args.images} images, {size}, {weights}\n')
    peers.print_rates(config, args, seconds, args.images)
    print()
    n_rounds = args.repeats + (args.warm_up if args.device == 'cuda' else 0)
    peers.print_sections(SECTIONS, sections, n_rounds * args.images, 'image')
    print(f'\n{n} detections, {n / args.images:.0f} an image; {n_different} differ.')
    if n_different or not n:
        raise SystemExit('the sides do not agree: no time is worth printing')


def one_round(cfg: Config, args: argparse.Namespace, folder: Path) -> Callable[[], None]:
    """Build one side and return a round over its images, for measuring its memory."""
    side = Side(args.peak, cfg, args, folder)
    make_equal({'ours': side, 'stock': side}, args)
    side.watch.is_on = False

    def go() -> None:
        side.begin()
        for _ in range(len(side.loader)):
            side.step()
        side.finish()

    return go


def main() -> None:
    """Parse the command line and run."""
    parser = peers.parser_of(__doc__.splitlines()[0])
    parser.add_argument('--size', type=int, default=320, help='longest side in px; 0: the recipe')
    parser.add_argument('--images', type=int, default=1)
    parser.add_argument('--repeats', type=int, default=2)
    parser.add_argument('--warm-up', type=int, default=1, help='rounds that are not counted')
    peers.main(parser, run, one_round)


if __name__ == '__main__':
    main()

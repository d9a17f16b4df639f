"""Our side and stock MMDetection's of one model, for ``train_step.py`` and ``test_step.py``.

Stock is what MMDetection's users run: CocoDataset with RLE annotations, BitmapMasks, RPNHead,
SingleRoIExtractor, FCNMaskHead, CocoMetric and, where a recipe has rates per part, an optimizer
group per tensor. Ours is CellDataset, LabelMapMasks, Fp32RPNHead, Fp32RoIExtractor, CellMaskHead,
CellMetric and one group per rule. Images, cells, seeds, weights, batch and precision are the same;
the ops (NMS, RoIAlign) are those of the environment on both sides. SeededDataset draws for both, so
that the samples are equal whatever the workers do.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import cellseg_mm  # isort: skip  (before mmdet: gives it NMS and RoIAlign)
import cv2
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import nn

import cellseg_mm.components  # noqa: F401
from cellseg_mm.core import provenance
from cellseg_mm.data.labels import Case, find_cases, read_gt
from cellseg_mm.detectors.member_models import fill_strictly
from cellseg_mm.runtime import ops_backend
from cellseg_mm.weights.checkpoints import load_checkpoint_file

ROOT = Path(__file__).resolve().parents[1]
SIDES = ('stock', 'ours')
DTYPES = {'off': None, 'fp16': torch.float16, 'bf16': torch.bfloat16}
REST = 'everything else'


class Stopwatch:
    """Seconds per named section, not counting the sections inside it.

    Attributes:
        seconds: Section -> seconds.
        is_on: Off, sections cost nothing; a GPU is waited for at their edges only when on.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.is_on = True
        self._open: list[str] = []
        self._last = 0.0

    def now(self) -> float:
        """Return the time after all work that was sent to the device is done."""
        if self.device == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count what runs inside for ``name``."""
        if not self.is_on:
            yield
            return
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def _count(self) -> None:
        now = self.now()
        if self._open:
            self.seconds[self._open[-1]] += now - self._last
        self._last = now

    def wrap(self, owner: object, attribute: str, name: str) -> None:
        """Count the calls of ``owner.attribute`` for ``name`` from now on."""
        function = getattr(owner, attribute)

        @wraps(function)
        def timed(*args: object, **kwargs: object) -> object:
            with self.section(name):
                return function(*args, **kwargs)

        setattr(owner, attribute, timed)


# ---- options


def parser_of(description: str) -> argparse.ArgumentParser:
    """Return the options that both benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('--data', type=Path, default=ROOT.parent / 'shared/data/hw3_train155')
    parser.add_argument(
        '--configs',
        nargs='+',
        default=[str(ROOT / 'configs/laptop/fold0.py'), str(ROOT / 'configs/fold0.py')],
    )
    parser.add_argument('--checkpoint', type=Path, help='weights (default: random, the same twice)')
    parser.add_argument(
        '--device', choices=['cpu', 'cuda'], help='default: cuda where there is one'
    )
    parser.add_argument('--amp', choices=list(DTYPES), default='off')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--compile', action='store_true', help='torch.compile backbone and neck')
    parser.add_argument('--workers', type=int, default=0, help='0: load in the step itself')
    parser.add_argument('--cells', type=int, nargs=2, default=(200, 500), help='cells per image')
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    parser.add_argument('--no-peak', action='store_true', help='leave out memory (two processes)')
    parser.add_argument('--peak', choices=SIDES, help=argparse.SUPPRESS)
    return parser


def main(
    parser: argparse.ArgumentParser,
    run: Callable[[str, argparse.Namespace], None],
    ready: Callable[[Config, argparse.Namespace, Path], Callable[[], object]],
) -> None:
    """Parse the command line and run; in a child process, print one side's peak of memory.

    Args:
        parser: From ``parser_of``, with the benchmark's own options.
        run: Measures one config and prints its tables.
        ready: Builds the side ``args.peak`` in a folder; returns what to do once.
    """
    args = parser.parse_args()
    prepare(args)
    if args.peak:
        print(_peak_mib(args, ready))
        return
    print(conditions(args))
    for config in args.configs:
        run(config, args)


def prepare(args: argparse.Namespace) -> None:
    """Fill in the device and make the libraries ready."""
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if args.compile and args.warm_up < 1:
        raise SystemExit(
            '--warm-up 0: with --compile the side that is first would be timed compiling for both; '
            'use 1 or more'
        )
    compiler = os.environ.get('CXX', 'g++')
    if args.compile and args.device == 'cpu' and not shutil.which(compiler):
        raise SystemExit(
            f'--compile: no C++ compiler {compiler}; torch.compile needs one on a CPU; install g++ '
            'or name yours in the environment variable CXX'
        )
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)  # as in a data loader's worker
    init_default_scope('mmdet')
    MMLogger.get_instance('benchmark', log_level='ERROR')


def words(args: argparse.Namespace, config: str, side: str) -> list[str]:
    """Return the command that measures one side's memory in a process of its own."""
    command = [sys.executable, sys.argv[0], '--peak', side, '--configs', config]
    for key, value in vars(args).items():
        flag = '--' + key.replace('_', '-')
        if key in ('configs', 'peak', 'no_peak') or value in (None, False):
            continue
        if value is True:
            command.append(flag)
        else:
            values = value if isinstance(value, (list, tuple)) else [value]
            command += [flag, *map(str, values)]
    return command


# ---- data


def dense_cases(data: Path, bounds: tuple[int, int], n: int) -> list[tuple[int, Case]]:
    """Return the first ``n`` training cases with a number of cells within bounds, with their index.

    The index is the one among all training cases, which CellDataset's ``indices`` takes.
    """
    found = []
    for index, case in enumerate(find_cases(data, 'train', 4)):
        if bounds[0] <= len(read_gt(case)) <= bounds[1]:
            found.append((index, case))
        if len(found) == n:
            return found
    raise SystemExit(
        f'{data}: {len(found)} images have {bounds[0]} to {bounds[1]} cells, {n} are needed; '
        'choose other --cells'
    )


def write_coco_json(path: Path, cases: list[Case], class_names: tuple[str, ...]) -> Path:
    """Write the cases as MMDetection's CocoDataset wants them, with RLE masks."""
    images, annotations = [], []
    for case in cases:
        height, width = case.image_hw
        images.append(
            {
                'id': case.image_id,
                'file_name': str(case.image_path),
                'height': height,
                'width': width,
            }
        )
        gt = read_gt(case)
        for box, class_id, rle in zip(gt.boxes_xyxy, gt.class_ids, gt.rles, strict=True):
            x1, y1, x2, y2 = map(float, box)
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': case.image_id,
                    'category_id': int(class_id) + 1,
                    'bbox': [x1, y1, x2 - x1, y2 - y1],
                    'area': (x2 - x1) * (y2 - y1),
                    'iscrowd': 0,
                    'segmentation': {'size': [height, width], 'counts': rle.decode()},
                }
            )
    categories = [{'id': k + 1, 'name': name} for k, name in enumerate(class_names)]
    path.write_text(
        json.dumps({'images': images, 'annotations': annotations, 'categories': categories})
    )
    return path


def dataset_settings(
    side: str,
    cfg: Config,
    args: argparse.Namespace,
    cases: list[tuple[int, Case]],
    steps: list[dict],
    json_path: Path,
) -> dict:
    """Return one side's data set: the same images through the same steps after loading."""
    steps = copy.deepcopy(steps)
    is_training = any(step['type'] == 'LoadLabelMaps' for step in steps)
    steps = [step for step in steps if step['type'] not in ('LoadCellImage', 'LoadLabelMaps')]
    metainfo = cfg.metainfo.to_dict()
    if side == 'stock':
        loading = [{'type': 'LoadImageFromFile'}]
        if is_training:
            loading += [{'type': 'LoadAnnotations', 'with_bbox': True, 'with_mask': True}]
        keys = [key for key in cfg.meta_keys if key not in ('name', 'label_paths')]
        steps[-1]['meta_keys'] = keys
        return {
            'type': 'CocoDataset',
            'ann_file': str(json_path),
            'data_prefix': {'img': ''},
            'metainfo': metainfo,
            'test_mode': not is_training,
            'pipeline': loading + steps,
        }
    # The stock reader knows nothing of swapped channels; the same pixels go into both.
    loading = [{'type': 'LoadCellImage', 'red_blue_swapped': False}]
    if is_training:
        loading += [{'type': 'LoadLabelMaps'}]
        steps[-1]['type'] = 'PackCellInputs'
    return {
        'type': 'CellDataset',
        'data_root': str(args.data),
        'split': 'all',
        'metainfo': metainfo,
        'indices': [index for index, _ in cases],
        'test_mode': not is_training,
        'pipeline': loading + steps,
    }


def build_loader(
    args: argparse.Namespace, dataset: dict, sampler: dict, batch_size: int
) -> torch.utils.data.DataLoader:
    """Build a loader with the workers that were asked for."""
    return Runner.build_dataloader(
        {
            'batch_size': batch_size,
            'num_workers': args.workers,
            'persistent_workers': args.workers > 0,
            'pin_memory': args.device == 'cuda',
            'sampler': sampler,
            'dataset': dataset,
        }
    )


# ---- models


@contextmanager
def both_sides(make: Callable, config: str, args: argparse.Namespace) -> Iterator[dict]:
    """Give ``make(side, cfg, args, folder)`` of both sides by name; the folder lasts as long."""
    cfg = Config.fromfile(config)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells of its index
            sides = {name: make(name, cfg, args, Path(folder)) for name in SIDES}
        yield sides


def build_model(
    side: str, cfg: Config, args: argparse.Namespace, *, exact_boxes: bool = False
) -> nn.Module:
    """Build one side's model; random weights are the same on both sides.

    Args:
        side: ``'stock'`` or ``'ours'``.
        cfg: The recipe.
        args: The options.
        exact_boxes: Leave the recipe's RPN and RoI extractors to stock too. MMDetection's own round
            boxes to half precision, and compiled mmcv has no bfloat16 RoIAlign to run them with.
    """
    settings = copy.deepcopy(cfg.model)
    settings.backbone.pop('init_cfg', None)
    # Random weights have no statistics to freeze: activations would grow without bounds.
    settings.backbone.norm_eval = bool(args.checkpoint)
    settings.test_cfg.rcnn.pop('box_passes', None)  # stock looks at boxes once
    if side == 'stock':
        settings.roi_head.type = 'StandardRoIHead'
        settings.roi_head.mask_head.type = 'FCNMaskHead'
        if not exact_boxes:
            settings.rpn_head.type = 'RPNHead'
            settings.roi_head.bbox_roi_extractor.type = 'SingleRoIExtractor'
            settings.roi_head.mask_roi_extractor.type = 'SingleRoIExtractor'
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(settings))
    if args.checkpoint:
        state = load_checkpoint_file(args.checkpoint)['state_dict']
        fill_strictly(model, state, str(args.checkpoint))
    else:
        model.init_weights()
    model.to(args.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.compile:
        model.backbone.compile()
        model.neck.compile()
    return model


def prepared(model: nn.Module, batch: dict, args: argparse.Namespace, *, training: bool) -> dict:
    """Send a batch to the device, normalise and pad it, and order its memory."""
    data = model.data_preprocessor(batch, training)
    if args.channels_last:
        data['inputs'] = data['inputs'].contiguous(memory_format=torch.channels_last)
    return data


def autocast(args: argparse.Namespace) -> torch.autocast:
    """Return the context of the precision that was asked for."""
    dtype = DTYPES[args.amp]
    return torch.autocast(args.device, dtype=dtype, enabled=dtype is not None)


# ---- memory and tables


def _peak_mib(args: argparse.Namespace, ready: Callable) -> float:
    """Return the peak of the device's memory while one thing is done, all of it on a GPU.

    On a CPU it is the growth of the resident set's high-water mark beyond what the imports took.
    What compiling takes is left out.
    """
    before = _status_kib('VmRSS')
    cfg = Config.fromfile(args.configs[0])
    with tempfile.TemporaryDirectory() as folder:
        go = ready(cfg, args, Path(folder))
        if args.compile:
            go()
        if args.device == 'cuda':
            torch.cuda.reset_peak_memory_stats()
        else:
            Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM
        go()
    if args.device == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**20
    return (_status_kib('VmHWM') - before) / 1024


def _status_kib(key: str) -> int:
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def print_rates(
    config: str,
    args: argparse.Namespace,
    seconds: Mapping[str, Sequence[float]],
    n_images: int,
) -> None:
    """Print the table of speed and memory: a turn of both sides took ``seconds``."""
    rates = {name: n_images / statistics.median(seconds[name]) for name in SIDES}
    ratio = statistics.median(a / b for a, b in zip(seconds['stock'], seconds['ours'], strict=True))
    peaks = {name: peak_in_fresh_process(args, config, name) for name in SIDES}
    print('| | stock | ours | ratio |\n| --- | ---: | ---: | ---: |')
    print(f'| images / s | {rates["stock"]:.3f} | {rates["ours"]:.3f} | {ratio:.2f} |')
    print(f'| peak memory | {peaks["stock"]} | {peaks["ours"]} | |')


def peak_in_fresh_process(args: argparse.Namespace, config: str, side: str) -> str:
    """Return one side's peak as text; '-' where it was not asked for or cannot be told."""
    if args.no_peak or not (args.device == 'cuda' or sys.platform == 'linux'):
        return '-'
    done = subprocess.run(words(args, config, side), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f'measuring the memory of {side} failed:\n{done.stderr[-2000:]}')
    return f'{float(done.stdout.strip().splitlines()[-1]):.0f} MiB'


def print_sections(
    sections: tuple[str, ...], seconds: dict[str, dict[str, float]], n: int, unit: str
) -> None:
    """Print ms per ``unit`` and share of each section, both sides."""
    totals = {side: sum(seconds[side].values()) for side in SIDES}
    print(f'| ms per {unit} | stock | share | ours | share | stock / ours |')
    print('| --- | ---: | ---: | ---: | ---: | ---: |')
    for name in sections:
        values = [seconds[side].get(name, 0.0) for side in SIDES]
        if any(values):
            shares = [v / totals[side] for v, side in zip(values, SIDES, strict=True)]
            ratio = f'{values[0] / values[1]:.2f}' if values[1] > 1e-6 else '-'
            print(
                f'| {name} | {1e3 * values[0] / n:.1f} | {shares[0]:.0%} '
                f'| {1e3 * values[1] / n:.1f} | {shares[1]:.0%} | {ratio} |'
            )
    print(
        f'| sum | {1e3 * totals["stock"] / n:.1f} | | {1e3 * totals["ours"] / n:.1f} | '
        f'| {totals["stock"] / totals["ours"]:.2f} |'
    )


def conditions(args: argparse.Namespace) -> str:
    """Return machine, versions, commit and switches in two lines."""
    versions = provenance.versions()
    shown = ('python', 'torch', 'numpy', 'onedl-mmdetection', 'onedl-mmcv', 'pycocotools')
    device = torch.cuda.get_device_name() if args.device == 'cuda' else f'{args.threads} thread(s)'
    load = ', '.join(f'{value:.1f}' for value in os.getloadavg())
    switches = [f'amp {args.amp}', f'{args.workers} workers']
    switches += [key for key in ('channels_last', 'compile') if getattr(args, key)]
    return (
        f'{provenance.machine()}, load {load}; {args.device}: {device}; {", ".join(switches)}; '
        f'NMS and RoIAlign of both sides: {ops_backend()}\n'
        f'{", ".join(f"{key} {versions[key]}" for key in shown)}; '
        f'commit {provenance.code_commit() or "unknown"}'
    )

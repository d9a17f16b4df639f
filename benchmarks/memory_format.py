"""Times a recipe's training step with each memory format, per backbone.

    python benchmarks/memory_format.py [--configs FILE ...] [--archs lite0 lite1] [--repeats 5]

The two formats take turns step by step on the same crops and the same random weights. What is
counted is the time of the process's own CPU threads, so that another program matters little.
``--archs`` puts other EfficientNet-Lites under configs that have one.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import peers
import train_step
from mmengine.config import Config

from cellseg_mm.model.efficientnet_lite import EfficientNetLite

FORMATS = ('contiguous', 'channels_last')


def recipes(args: Namespace) -> Iterator[tuple[str, Config]]:
    """Yield what a row is called, and its config."""
    for path in args.configs:
        backbone = Config.fromfile(path).model.backbone
        for arch in args.archs if backbone.type == 'EfficientNetLite' else [None]:
            cfg = Config.fromfile(path)
            cfg.model.type = 'MaskRCNN'  # the format is put on by peers.py
            cfg.model.pop('memory_format', None)
            if arch:
                cfg.model.backbone.arch = arch
                cfg.model.neck.in_channels = EfficientNetLite(arch).out_channels
            yield f'{path}, {arch or backbone.type}', cfg


def cpu_seconds(cfg: Config, args: Namespace, folder: Path) -> dict[str, float]:
    """Return the median CPU seconds of a step in each format."""
    sides = {}
    for name in FORMATS:
        options = Namespace(**vars(args) | {'channels_last': name == 'channels_last'})
        sides[name] = train_step.Side('ours', cfg, options, folder)
        sides[name].watch.is_on = False
    losses = {name: side.step() for name, side in sides.items()}  # this warms up, too
    # Rounding lets another region proposal pass here and there.
    if not np.isclose(*losses.values(), rtol=1e-2):
        raise SystemExit(f'the formats disagree: {losses}')
    seconds: dict[str, list[float]] = {name: [] for name in FORMATS}
    for _ in range(args.repeats):
        for name, side in sides.items():
            start = time.process_time()
            side.step()
            seconds[name].append(time.process_time() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def main() -> None:
    """Parse the command line and print one row a backbone."""
    parser = peers.parser_of(__doc__.splitlines()[0])
    parser.add_argument('--archs', nargs='+', default=['lite0', 'lite1', 'lite2'])
    parser.add_argument('--size', type=int, default=256, help='crop in px; 0: the recipe')
    parser.add_argument('--scale', type=float, default=1.0, help='factor before the crop')
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--images', type=int, default=6, help='images to draw from')
    parser.add_argument('--repeats', type=int, default=5)
    args = parser.parse_args()
    peers.prepare(args)
    print(peers.conditions(args))
    print('\n| backbone | contiguous, CPU s a step | channels_last | ratio |')
    print('| --- | --- | --- | --- |')
    with tempfile.TemporaryDirectory() as folder:
        for name, cfg in recipes(args):
            found = cpu_seconds(cfg, args, Path(folder))
            ratio = found['contiguous'] / found['channels_last']
            values = ' | '.join(f'{found[name]:.2f}' for name in FORMATS)
            print(f'| {name} | {values} | {ratio:.2f} |', flush=True)


if __name__ == '__main__':
    main()

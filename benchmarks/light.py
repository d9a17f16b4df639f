"""A model in a file against the same model in torch, and stock MMDetection, in one interleaved run.

    python benchmarks/light.py configs/laptop-quick/fold0.py model.onnx image.tif

For each side and number of threads, in a fresh process each round: seconds until the first cells
(interpreter, imports, loading, one picture), seconds a megapixel when warm, peak memory; and what
must be installed. Sides take turns within a round, and ratios are of the same round. Stock is
MMDetection's own parts with the same weights: its mask head, RPN and memory layout.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SIDES = ('light', 'torch', 'stock')
MEASURES = {'first_s': 's to first cells', 'mp_s': 's a megapixel', 'peak_mib': 'peak MiB'}
STOCK_TYPES = {
    'CellMaskRCNN': 'MaskRCNN',
    'Fp32RPNHead': 'RPNHead',
    'Fp32RoIExtractor': 'SingleRoIExtractor',
    'CellMaskHead': 'FCNMaskHead',
    'CellRoIHead': 'StandardRoIHead',
}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('model', help='file of tools/export.py, of the same checkpoint')
    parser.add_argument('image')
    parser.add_argument('--checkpoint', default='best')
    parser.add_argument('--work-root')
    parser.add_argument('--sides', nargs='+', choices=SIDES, default=list(SIDES))
    parser.add_argument('--threads', nargs='+', type=int, default=[1, 2])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--repeats', type=int, default=3, help='warm pictures a round')
    parser.add_argument('--worker', choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    print_sizes()
    for n_threads in args.threads:
        rounds = [
            {side: run_worker(side, n_threads) for side in args.sides} for _ in range(args.rounds)
        ]
        print_table(n_threads, args.sides, rounds)


def run_worker(side: str, n_threads: int) -> dict[str, float]:
    """Run this script again as one side; returns its measures."""
    names = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS')
    env = {**os.environ, **dict.fromkeys(names, str(n_threads)), 'OMP_WAIT_POLICY': 'passive'}
    env['CELLSEG_STARTED'] = str(time.time())
    command = [sys.executable, *sys.argv, '--worker', side]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f'{side}: {done.stderr[-2000:]}')
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def work(args: argparse.Namespace) -> None:
    """Load one side, find the cells of the picture again and again, print JSON."""
    from cellseg_mm.data.image_reader import open_image

    detector = load_light(args) if args.worker == 'light' else load_torch(args)
    with open_image(args.image) as reader:
        picture = reader.read(0, 0, *reader.image_hw)
    n_cells = len(detector.detect([picture], 'a')[0])
    first = time.time() - float(os.environ['CELLSEG_STARTED'])
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        detector.detect([picture], 'a')
        seconds.append(time.perf_counter() - start)
    megapixels = float(np.prod(picture.shape[:2])) / 1e6
    found = {
        'first_s': first,
        'mp_s': statistics.median(seconds) / megapixels,
        'peak_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        'n_cells': n_cells,
    }
    print(json.dumps(found))


def load_light(args: argparse.Namespace) -> Any:  # noqa: ANN401 - any detector
    """Load the model's file."""
    from cellseg_mm.light.detector import LightDetector, OnnxModel
    from cellseg_mm.light.model_file import read_model_file

    return LightDetector([OnnxModel(one) for one in read_model_file(args.model).members[:1]])


def load_torch(args: argparse.Namespace) -> Any:  # noqa: ANN401 - any detector
    """Load the model in torch; as MMDetection has it for the side ``stock``."""
    import cellseg_mm.components  # noqa: F401
    from cellseg_mm.detectors.detector import build_detector
    from cellseg_mm.detectors.from_options import sources_of
    from cellseg_mm.predict.options import MemberOptions
    from cellseg_mm.training.load_config import load_config

    cfg = load_config(args.config)
    checkpoints = () if args.checkpoint == 'best' else (args.checkpoint,)
    (source,) = sources_of(
        {args.config: cfg}, MemberOptions(checkpoints=checkpoints, work_root=args.work_root)
    )
    if args.worker == 'stock':
        cfg.model.pop('memory_format', None)  # nor does it know box_passes: it looks at boxes once
        _replace_types(cfg.model)
    return build_detector([source])


def _replace_types(node: Any) -> None:  # noqa: ANN401 - a config's node
    if isinstance(node, dict):
        if node.get('type') in STOCK_TYPES:
            node['type'] = STOCK_TYPES[node['type']]
        for value in node.values():
            _replace_types(value)


def print_sizes() -> None:
    """Print what each side has installed: the closure of its requirements, in this environment."""
    light = (ROOT / 'requirements/predict.txt').read_text().splitlines()
    full = [str(line) for line in metadata.requires('cellseg-mm') or () if 'extra ==' not in line]
    for side, lines in (('light', light), ('torch', full)):
        packages = closure([line for line in lines if line and not line.startswith('#')])
        size = sum(map(size_of, packages)) / 1e6
        print(f'installed, {side}: {size:.0f} MB, {len(packages)} packages')


def closure(lines: list[str]) -> set[str]:
    """Return the installed distributions that requirements need, by name."""
    found: set[str] = set()
    waiting = list(lines)
    while waiting:
        line = waiting.pop()
        name = re.split(r'[^A-Za-z0-9._-]', line.strip())[0].lower().replace('_', '-')
        if 'extra ==' in line or name in found:
            continue
        try:
            waiting += metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another system
        found.add(name)
    return found


def size_of(name: str) -> int:
    """Return the bytes of a distribution's files."""
    paths = {Path(str(file.locate())) for file in metadata.files(name) or ()}
    return sum(path.stat().st_size for path in paths if path.is_file())


def print_table(
    n_threads: int, sides: list[str], rounds: list[dict[str, dict[str, float]]]
) -> None:
    """Print medians, and ratios of the same round."""
    from cellseg_mm.core.provenance import code_commit, machine

    print(f'{n_threads} threads, {len(rounds)} rounds, {machine()}, commit {code_commit()}')
    for side in sides:
        n_cells = int(rounds[0][side]['n_cells'])
        parts = []
        for key, what in MEASURES.items():
            median = statistics.median(one[side][key] for one in rounds)
            text = f'{median:.3g} {what}'
            if side != sides[0]:
                ratio = statistics.median(one[side][key] / one[sides[0]][key] for one in rounds)
                text += f' ({ratio:.2f} times)'
            parts.append(text)
        print(f'  {side}: {", ".join(parts)}, {n_cells} cells')


if __name__ == '__main__':
    main()

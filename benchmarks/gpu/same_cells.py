"""Compare the cells that a trained model finds on a device with those it finds on the CPU.

    python benchmarks/gpu/same_cells.py CONFIG CHECKPOINT DATA [--device cuda] [--images 5]

Cells are paired by class and mask, never by rank: scores that nearly tie swap places. Exit status
1 when a cell of score 0.1 or more has no partner with an IoU of 0.95, or a pair's scores differ by
more than 0.01.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from cellseg_mm.cli import run_tool
from cellseg_mm.core import rle
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.results.predictions import load_predictions

PREDICT = Path(__file__).resolve().parents[2] / 'tools' / 'predict.py'
SCORE_THR, IOU_THR, SCORE_TOLERANCE = 0.1, 0.95, 0.01


def main() -> int:
    """Predict on both, pair, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('data', type=Path)
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--images', type=int, default=5)
    args = parser.parse_args()
    paths = sorted(args.data.glob('train/*/image.tif'))[: args.images]
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder, name) for name in ('cpu', 'device')]
        for device, out in zip(('cpu', args.device), outs, strict=True):
            words = [args.config, args.checkpoint, *paths, '--out', out, '--device', device]
            command = [sys.executable, PREDICT, *words, '--format', 'csv', '--batch-size', '1']
            subprocess.run([str(word) for word in command], check=True)
        names = sorted(path.name for path in outs[0].glob('*.npz'))
        n_wrong = 0
        for name in names:
            cpu, other = (load_predictions(out / name).sets[0] for out in outs)
            n_lonely, worst = compare(cpu, other)
            is_wrong = n_lonely > 0 or worst > SCORE_TOLERANCE
            n_wrong += is_wrong
            n_seen = [int((found.scores >= SCORE_THR).sum()) for found in (cpu, other)]
            print(
                f'{name}: {n_seen[0]} and {n_seen[1]} cells of score {SCORE_THR} or more, '
                f'{n_lonely} without a partner, scores differ by at most {worst:.2g}'
                f'{"   <-- DIFFERENT" if is_wrong else ""}'
            )
    print(f'{n_wrong} of {len(names)} images differ between cpu and {args.device}')
    return int(n_wrong > 0 or not names)


def compare(cpu: InstanceSet, other: InstanceSet) -> tuple[int, float]:
    """Return how many cells have no partner, and the largest difference of scores in a pair."""
    n_lonely, worst = 0, 0.0
    for one, two in ((cpu, other), (other, cpu)):
        ious = np.zeros((len(one), max(len(two), 1)))
        if len(two):
            overlaps = rle.iou_matrix(one.rles, two.rles, one.image_hw)
            ious = np.where(one.class_ids[:, None] == two.class_ids[None], overlaps, 0)
        partner = ious.argmax(axis=1)
        is_seen = one.scores >= SCORE_THR
        is_paired = ious.max(axis=1) >= IOU_THR
        n_lonely += int((is_seen & ~is_paired).sum())
        if (both := is_seen & is_paired).any():
            worst = max(worst, float(np.abs(one.scores[both] - two.scores[partner[both]]).max()))
    return n_lonely, worst


if __name__ == '__main__':
    run_tool(main)

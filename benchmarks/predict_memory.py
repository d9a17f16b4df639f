"""Peak memory of a tiled prediction.

Example: python benchmarks/predict_memory.py --side 20000

Writes a tiled TIFF with dark cells on a pale background, reads it by region, finds the cells in
each tile by threshold (a detector that costs no memory of its own), stitches them, and writes all
formats. Every cell must come back whole and once. The whole image would take 3 side^2 bytes.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import tifffile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cellseg_mm.core.provenance import code_commit, machine
from cellseg_mm.predict import predict
from cellseg_mm.predict.items import look_for
from cellseg_mm.predict.params import PredictParams
from cellseg_mm.results.formats import FORMATS
from cellseg_mm.results.predictions import load_predictions
from tests.support.drawn_slide import DarkCells

TILE = 256
STEP = 80  # one cell per STEP x STEP px, jittered
BACKGROUND = 235


def main() -> None:
    """Write the image, predict it, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--side', type=int, default=20_000, help='px')
    parser.add_argument('--formats', nargs='*', default=sorted(FORMATS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'slide.tif'
        n_cells, area = write_slide(path, args.side)
        params = PredictParams(
            out_dir=Path(folder) / 'out',
            class_names=('cell',),
            class_colours=((213, 94, 0),),
            formats=tuple(args.formats),
        )
        before = peak_mib()
        start = time.perf_counter()
        summary = predict.predict(look_for([str(path)]).items, DarkCells(), params)
        seconds = time.perf_counter() - start
        peak = peak_mib()  # the check below is not part of predicting
        print(summary.describe())
        (found,) = load_predictions(params.out_dir / 'slide.npz').sets
        assert (len(found), int(found.areas.sum())) == (n_cells, area), 'cells were cut or doubled'
        whole = 3 * args.side**2 / 2**20
        print(f'{machine()}, commit {code_commit()}')
        print(
            f'{args.side} x {args.side} px, {n_cells} cells, {path.stat().st_size >> 20} MiB file: '
            f'peak {peak:.0f} MiB ({before:.0f} before predicting), the image alone would be '
            f'{whole:.0f} MiB; {seconds:.0f} s'
        )


def peak_mib() -> float:
    """Return the highest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_slide(path: Path, side: int) -> tuple[int, int]:
    """Write the image tile by tile; return the number of cells and their pixels."""
    totals = [0, 0]
    tifffile.imwrite(
        path,
        _tiles(side, totals),
        shape=(side, side, 3),
        dtype=np.uint8,
        tile=(TILE, TILE),
        photometric='rgb',
        compression='zlib',
        bigtiff=True,
    )
    return totals[0], totals[1]


def _tiles(side: int, totals: list[int]) -> Iterator[np.ndarray]:
    n = -(-side // TILE)
    band = np.full((TILE + 2 * STEP, n * TILE, 3), BACKGROUND, dtype=np.uint8)
    for row in range(n):
        top = row * TILE - STEP
        band[:] = BACKGROUND
        for k in range(max(top // STEP - 1, 0), (top + len(band)) // STEP + 1):
            _draw_row(band, top, k, side, totals if _is_new(k, row) else [0, 0])
        for column in range(n):
            yield np.ascontiguousarray(
                band[STEP : STEP + TILE, column * TILE : (column + 1) * TILE]
            )


def _is_new(k: int, row: int) -> bool:
    """Count each row of cells once: with the tiles that its middle lies in."""
    return (k * STEP + STEP // 2) // TILE == row


def _draw_row(band: np.ndarray, top: int, k: int, side: int, totals: list[int]) -> None:
    rng = np.random.default_rng(k)
    for j in range(side // STEP):
        dy, dx = rng.integers(-15, 16, 2).tolist()
        axes = rng.integers(4, 22, 2).tolist()
        if (k + 1) * STEP > side:
            continue
        centre = (j * STEP + STEP // 2 + dx, k * STEP + STEP // 2 + dy - top)
        cv2.ellipse(band, centre, axes, 0, 0, 360, (90, 60, 130), cv2.FILLED)
        alone = np.zeros((STEP, STEP), dtype=np.uint8)
        cv2.ellipse(alone, (STEP // 2, STEP // 2), axes, 0, 0, 360, 1, cv2.FILLED)
        totals[0] += 1
        totals[1] += int(alone.sum())


if __name__ == '__main__':
    main()

"""Whole slides with known cells: memory, throughput, and the same bytes from several processes.

    python benchmarks/slides.py million                  1,000,000 cells of 90,000 x 90,000 px
    python benchmarks/slides.py pyramid --side 60000     three pixel sizes, alone and with workers

The slides are drawn (tests/support/drawn_slide.py); cells are found by threshold, which takes
milliseconds a tile and no memory of its own, so what is measured is everything but the model.
``million`` draws what is read on the fly; ``pyramid`` writes TIFF pyramids of 0.25, 0.5 and 1 um a
px, predicts them at 0.5 um in this process, and with two Dask workers, one of which is killed.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.provenance import code_commit, machine
from cellseg_mm.data.regions import ImageReader
from cellseg_mm.predict import slide as slides
from cellseg_mm.predict.items import look_for
from cellseg_mm.predict.many import predict_with_dask
from cellseg_mm.predict.params import PredictParams
from cellseg_mm.predict.predict import predict
from cellseg_mm.results.predictions import load_predictions
from tests.support.drawn_slide import DarkCells, DrawnSlide, recipe, results_of, slide_params

UM_PER_PX = 0.5


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=['million', 'pyramid'])
    parser.add_argument('--side', type=int, help='px (90,000 or 60,000)')
    parser.add_argument('--um-per-px', nargs='*', type=float, default=[0.25, 0.5, 1.0])
    parser.add_argument('--formats', nargs='*', default=['csv', 'geojson', 'overlay', 'label-map'])
    parser.add_argument('--folder', type=Path, help='for files of some GB (a temporary one)')
    args = parser.parse_args()
    print(f'{machine()}, commit {code_commit()}')
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        if args.what == 'million':
            million(Path(name), args.side or 90_000, tuple(args.formats))
        else:
            for um_per_px in args.um_per_px:
                pyramid(Path(name), args.side or 60_000, um_per_px, tuple(args.formats))


def peak_mib() -> float:
    """Return the highest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class DrawnReader(ImageReader):
    """Draws what is read."""

    def __init__(self, path: Path, drawn: DrawnSlide, level: int) -> None:
        hws = [(drawn.side // shrink,) * 2 for shrink in (1, 4, 16)]
        super().__init__(path, hws, level)
        self.full_um_per_px = (drawn.um_per_px,) * 2
        self._drawn, self._shrink = drawn, (1, 4, 16)[level]

    def _read(self, y0: int, x0: int, y1: int, x1: int) -> np.ndarray:
        return self._drawn.draw(y0, x0, (y1 - y0, x1 - x0), self._shrink)


def million(folder: Path, side: int, formats: Sequence[str]) -> None:
    """Predict a slide that is full of cells."""
    drawn = DrawnSlide(side, 0.25, ((0.5, 0.5, 0.5),), step_um=19.8)

    @contextmanager
    def open_drawn(path: Path, *, level: int = 0, **_: object) -> Iterator[ImageReader]:
        yield DrawnReader(path, drawn, level)

    slides.open_image = open_drawn
    (folder / 'slide.tif').write_bytes(b'drawn')
    n_cells = len(drawn.cells)
    params = slide_params(folder / 'out', formats=tuple(formats), n_workers=1)
    before, start = peak_mib(), time.perf_counter()
    summary = predict(look_for([str(folder / 'slide.tif')]).items, DarkCells(), params)
    seconds = time.perf_counter() - start
    print(summary.describe())
    print(
        f'{side} x {side} px, {n_cells:,} cells drawn, {summary.n_cells:,} found: peak '
        f'{peak_mib():.0f} MiB ({before:.0f} before), {seconds:.0f} s, '
        f'{side**2 / 1e6 / seconds:.0f} megapixels a second; files '
        f'{sum(p.stat().st_size for p in (folder / "out").iterdir()) >> 20} MiB'
    )
    assert summary.n_cells == n_cells, 'cells were lost or doubled'


class Dying(DarkCells):
    """Kills its process once, at the tenth tile."""

    def __init__(self, mark: Path) -> None:
        super().__init__(UM_PER_PX)
        self.mark = mark

    def detect(self, pictures: Sequence[np.ndarray], name: str) -> list[InstanceSet]:
        """Find cells, or die."""
        if self.n_calls > 10 and self.mark.exists():
            self.mark.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().detect(pictures, name)


def dying_recipe(out_dir: Path, mark: Path, more: dict) -> tuple[DarkCells, PredictParams]:
    """Make a detector that kills its process once."""
    return Dying(mark), recipe(out_dir, UM_PER_PX, more)[1]


def pyramid(folder: Path, side: int, um_per_px: float, formats: Sequence[str]) -> None:
    """Write a pyramid, and predict it alone and with two workers, one of which is killed."""
    drawn = DrawnSlide(side, um_per_px)
    path = folder / f'slide{um_per_px:g}.tif'
    start = time.perf_counter()
    drawn.write(path)
    said = f'{side} x {side} px of {um_per_px:g} um, {len(drawn.cells):,} cells'
    print(f'{said}: {path.stat().st_size >> 20} MiB written in {time.perf_counter() - start:.0f} s')
    items, more = look_for([str(path)]).items, {'formats': tuple(formats), 'n_workers': 1}
    start = time.perf_counter()
    alone = predict(items, *recipe(folder / 'alone', UM_PER_PX, more))
    seconds = time.perf_counter() - start
    print(alone.describe())
    print(f'alone: {seconds:.0f} s, peak {peak_mib():.0f} MiB')
    mark = folder / 'to-be-killed'
    mark.touch()
    start = time.perf_counter()
    shared = predict_with_dask(items, partial(dying_recipe, folder / 'shared', mark, more), '2')
    print(f'two workers, one killed: {time.perf_counter() - start:.0f} s')
    assert not mark.exists(), 'nobody was killed'
    assert not alone.failed, alone.failed
    assert results_of(folder / 'alone') == results_of(folder / 'shared'), 'other bytes'
    (found,) = load_predictions(folder / f'alone/{path.stem}.npz').sets
    assert len(found) == len(drawn.cells) == shared.n_cells, 'cells were lost or doubled'
    print(f'the same bytes, {len(found):,} cells of {len(drawn.cells):,}')
    path.unlink()


if __name__ == '__main__':
    main()

"""Slides as streams: finished tiles are kept, a kill costs one tile, parts share tiles."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data.intensity import ValueRange
from cellseg_mm.predict.items import look_for
from cellseg_mm.predict.params import share_of, takes_whole_images
from cellseg_mm.predict.predict import predict
from cellseg_mm.predict.tile_store import TileResult, TileStore
from cellseg_mm.predict.tiling import Tile
from cellseg_mm.results.formats import FORMATS
from tests.support.drawn_slide import DarkCells, DrawnSlide, results_of, slide_params

ROOT = Path(__file__).resolve().parents[2]
CUT = {'tile_px': 128, 'overlap_px': 32, 'whole_px': 128, 'formats': tuple(FORMATS)}
TILE = Tile((5, 9, 31, 44), (5, 9, 31, 44))


@pytest.fixture
def slide(tmp_path: Path) -> DrawnSlide:
    drawn = DrawnSlide(1000, 0.5, ((0.4, 0.5, 0.3),))
    (tmp_path / 'in').mkdir()
    drawn.write(tmp_path / 'in/a.tif', tile=128, shrinks=(4,))
    return drawn


def run(tmp_path: Path, out: str, detector: DarkCells | None = None, **more) -> DarkCells:
    detector = detector or DarkCells(0.5)
    params = slide_params(tmp_path / out, **{**CUT, 'model_um_per_px': (0.5, 0.5), **more})
    summary = predict(look_for([str(tmp_path / 'in')]).items, detector, params)
    assert not summary.failed
    return detector


def a_result(n: int = 2) -> TileResult:
    crops = [np.ones((2, 3), dtype=bool)] * n
    cells = InstanceSet.from_crops(
        'a',
        0,
        (26, 35),
        crops=crops,
        offsets_yx=np.arange(2 * n).reshape(n, 2) * 4,
        class_ids=np.arange(n),
        scores=np.full(n, 0.25),
    )
    return TileResult(cells, 910, 17, ('blurred',), ValueRange(0, 4095))


def test_a_tile_comes_back_as_it_was(tmp_path: Path) -> None:
    store = TileStore.of(tmp_path, 'a', 'k')
    assert not store.has(TILE)
    assert store.load(TILE) is None
    for n in (2, 0):
        store.save(TILE, a_result(n))
        found, expected = store.load(TILE), a_result(n)
        assert found is not None
        assert found.instances.rles == expected.instances.rles
        assert np.array_equal(found.instances.boxes_xyxy, expected.instances.boxes_xyxy)
        assert (found.n_pixels, found.n_lit, found.notes) == (910, 17, ('blurred',))
        assert found.value_range == ValueRange(0, 4095)
    assert not TileStore.of(tmp_path, 'a', 'other settings').has(TILE)
    store.remove()
    assert list(tmp_path.iterdir()) == []
    store.remove()  # again is nothing


def test_a_damaged_tile_is_none(tmp_path: Path) -> None:
    store = TileStore.of(tmp_path, 'a', 'k')
    store.save(TILE, a_result())
    (path,) = (tmp_path / 'a.tiles/k').glob('*.npz')
    for content in (b'', path.read_bytes()[:200]):
        path.write_bytes(content)
        assert store.load(TILE) is None


class Dying(DarkCells):
    """Fails for good after some tiles, like a process that is killed."""

    def __init__(self, n_tiles: int) -> None:
        super().__init__(0.5)
        self.left = n_tiles

    def detect(self, pictures: Sequence[np.ndarray], name: str) -> list[InstanceSet]:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().detect(pictures, name)


def test_finished_tiles_are_not_looked_at_again_and_bytes_are_the_same(
    slide: DrawnSlide, tmp_path: Path
) -> None:
    n_tiles = run(tmp_path, 'whole').n_calls
    assert 30 < n_tiles < 110
    for n_done in (3, 0, 20):  # interrupted again and again
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, 'cut', Dying(n_done))
    assert not (tmp_path / 'cut/a.state.json').exists()
    (key,) = (tmp_path / 'cut/a.tiles').iterdir()
    damaged = sorted(key.glob('*.npz'))[4]
    damaged.write_bytes(b'x')
    assert run(tmp_path, 'cut').n_calls == n_tiles - 23 + 1
    assert results_of(tmp_path / 'cut') == results_of(tmp_path / 'whole')
    assert not (tmp_path / 'cut/a.tiles').exists()
    assert run(tmp_path, 'cut').n_calls == 0


def test_tiles_of_other_settings_are_not_taken(slide: DrawnSlide, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 'out', Dying(5))
    n_tiles = run(tmp_path, 'other', overlap_px=30).n_calls
    assert run(tmp_path, 'out', overlap_px=30).n_calls == n_tiles
    assert not (tmp_path / 'out/a.tiles').exists()


def test_a_full_disk_is_the_failure_of_the_image_and_what_is_there_stays(
    slide: DrawnSlide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = TileStore.save
    n_left = [5]

    def full(store: TileStore, tile: Tile, result: TileResult) -> None:
        n_left[0] -= 1
        if n_left[0] < 0:
            raise OSError(28, 'No space left on device')
        saved(store, tile, result)

    n_tiles = run(tmp_path, 'whole').n_calls
    with monkeypatch.context() as patch:
        patch.setattr(TileStore, 'save', full)
        params = slide_params(tmp_path / 'full', **CUT, model_um_per_px=(0.5, 0.5))
        summary = predict(look_for([str(tmp_path / 'in')]).items, DarkCells(0.5), params)
    assert 'No space left on device' in summary.failed['a']
    assert run(tmp_path, 'full').n_calls == n_tiles - 5
    assert results_of(tmp_path / 'full') == results_of(tmp_path / 'whole')


def test_again_looks_at_every_tile_again(slide: DrawnSlide, tmp_path: Path) -> None:
    n_tiles = run(tmp_path, 'whole').n_calls
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 'out', Dying(5))
    assert run(tmp_path, 'out', again=True).n_calls == n_tiles


@pytest.mark.parametrize('n_parts', [1, 3])
def test_parts_share_out_the_tiles_and_whoever_comes_last_puts_them_together(
    n_parts: int, slide: DrawnSlide, tmp_path: Path
) -> None:
    DrawnSlide(90, 0.5, ((0.5, 0.5, 0.4),)).write(tmp_path / 'in/small.tif', tile=16, shrinks=())
    n_tiles = run(tmp_path, 'whole').n_calls
    calls = []
    for i in range(1, n_parts + 1):
        calls.append(run(tmp_path, 'parts', part=(i, n_parts)).n_calls)
        assert run(tmp_path, 'parts', part=(i, n_parts)).n_calls == 0  # a task that starts again
    assert sum(calls) == n_tiles
    assert max(calls) - min(calls) <= 2  # one for each image
    assert results_of(tmp_path / 'parts') == {}
    assert run(tmp_path, 'parts').n_calls == 0
    assert results_of(tmp_path / 'parts') == results_of(tmp_path / 'whole')
    assert run(tmp_path, 'parts', part=(1, n_parts)).n_calls == 0  # all is done


def test_a_part_that_never_ran_is_done_by_the_last(slide: DrawnSlide, tmp_path: Path) -> None:
    n_tiles = run(tmp_path, 'whole').n_calls
    n_first = run(tmp_path, 'parts', part=(1, 2)).n_calls
    assert run(tmp_path, 'parts').n_calls == n_tiles - n_first
    assert results_of(tmp_path / 'parts') == results_of(tmp_path / 'whole')


def test_many_images_are_shared_out_whole(tmp_path: Path) -> None:
    (tmp_path / 'in').mkdir()
    for k in range(8):
        DrawnSlide(60, 0.5, ((0.5, 0.5, 0.4),)).write(tmp_path / f'in/{k}.tif', tile=16, shrinks=())
    for i in (1, 2):
        run(tmp_path, 'parts', part=(i, 2), formats=('csv',))
        assert len(list((tmp_path / 'parts').glob('*.state.json'))) == 4 * i
    run(tmp_path, 'whole', formats=('csv',))
    assert results_of(tmp_path / 'parts') == results_of(tmp_path / 'whole')


@pytest.mark.parametrize(('n', 'parts', 'expected'), [(8, 2, True), (7, 2, False), (4, 1, True)])
def test_when_images_are_shared_out_whole(n: int, parts: int, expected: bool) -> None:
    assert takes_whole_images(n, (1, parts)) == expected


def test_shares_cover_everything_once() -> None:
    shares = [share_of(range(10), (i, 3), first=2) for i in (1, 2, 3)]
    assert shares == [[1, 4, 7], [2, 5, 8], [0, 3, 6, 9]]


@pytest.mark.parametrize(
    'more', [{'part': (0, 2)}, {'part': (3, 2)}, {'part': (1, 2), 'again': True}]
)
def test_parts_that_make_no_sense(more: dict, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'--part \d/2: expected 1/n to n/n, and not --again'):
        slide_params(tmp_path, **more)


SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.support.drawn_slide import DarkCells, slide_params
from tests.predict.test_tile_store import CUT
from cellseg_mm.predict.items import look_for
from cellseg_mm.predict.predict import predict

class Slow(DarkCells):
    def detect(self, pictures, name):
        time.sleep(0.02)
        return super().detect(pictures, name)

folder = Path({folder!r})
params = slide_params(folder / 'killed', **CUT, model_um_per_px=(0.5, 0.5))
predict(look_for([str(folder / 'in')]).items, Slow(0.5), params)
"""


@pytest.mark.skipif(os.name == 'nt', reason='kills with a signal')
def test_a_killed_process_costs_the_tile_in_flight(slide: DrawnSlide, tmp_path: Path) -> None:
    n_tiles = run(tmp_path, 'whole').n_calls
    code = SLOW.format(root=str(ROOT), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT)
    tiles = tmp_path / 'killed/a.tiles'
    # names that begin with a digit: temporary files begin with a dot
    while len(list(tiles.glob('*/[0-9]*.npz'))) < 5 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    n_kept = len(list(tiles.glob('*/[0-9]*.npz')))
    assert n_kept >= 5
    assert run(tmp_path, 'killed').n_calls == n_tiles - n_kept
    assert results_of(tmp_path / 'killed') == results_of(tmp_path / 'whole')

"""Two Dask workers on one run: the bytes of one process, also when workers are killed."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from functools import partial
from pathlib import Path

import pytest

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.predict import many
from cellseg_mm.predict.items import look_for
from cellseg_mm.predict.many import predict_with_dask, slurm_script
from cellseg_mm.predict.params import PredictParams
from cellseg_mm.predict.predict import predict
from tests.support.drawn_slide import DarkCells, DrawnSlide, recipe, results_of

pytest.importorskip('distributed')

CUT = {'tile_px': 128, 'overlap_px': 32, 'whole_px': 128, 'formats': ('csv', 'geojson')}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / 'in').mkdir()
    DrawnSlide(900, 0.5, ((0.4, 0.5, 0.3),)).write(tmp_path / 'in/a.tif', tile=128, shrinks=(4,))
    DrawnSlide(700, 1.0, ((0.4, 0.5, 0.3),)).write(tmp_path / 'in/b.tif', tile=128, shrinks=())
    DrawnSlide(100, 0.5, ((0.5, 0.5, 0.4),)).write(tmp_path / 'in/c.tif', tile=16, shrinks=())
    (tmp_path / 'in/bad.tif').write_bytes(b'II*\0nothing')
    return tmp_path / 'in'


class Killing(DarkCells):
    """Kills its own process at some tiles, once each."""

    def __init__(self, folder: Path) -> None:
        super().__init__(0.5)
        self.folder = folder

    def detect(self, pictures, name: str):
        self.n_calls += 1
        for mark in sorted(self.folder.glob('kill*')):
            if self.n_calls == 4:
                mark.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return [self._find(picture[..., 1] < 120, name) for picture in pictures]


def killing_recipe(out_dir: Path, marks: Path) -> tuple[DarkCells, PredictParams]:
    """Make a detector that kills its process."""
    return Killing(marks), recipe(out_dir, 0.5, CUT)[1]


@pytest.mark.skipif(os.name == 'nt', reason='kills with a signal')
def test_two_workers_write_what_one_process_writes_also_when_they_are_killed(
    images: Path, tmp_path: Path
) -> None:
    items = look_for([str(images)]).items
    alone = predict(items, *recipe(tmp_path / 'alone', 0.5, CUT))
    (tmp_path / 'marks').mkdir()
    for k in (1, 2):
        (tmp_path / f'marks/kill{k}').touch()
    make = partial(killing_recipe, tmp_path / 'shared', tmp_path / 'marks')
    shared = predict_with_dask(items, make, '2')
    assert list((tmp_path / 'marks').iterdir()) == []  # both kills happened
    assert results_of(tmp_path / 'shared') == results_of(tmp_path / 'alone')
    assert sorted(p.name for p in (tmp_path / 'shared').iterdir() if p.is_dir()) == []
    assert shared.predicted == alone.predicted == ['a', 'b', 'c']
    assert list(shared.failed) == list(alone.failed) == ['bad']
    assert shared.failed == alone.failed
    assert (shared.n_cells, shared.n_shown) == (alone.n_cells, alone.n_shown)
    assert shared.notes == alone.notes
    assert shared.exit_code == 1
    # tiles that killed workers finished are found, and nobody reported them
    assert shared.n_tiles + shared.n_kept == alone.n_tiles
    said, expected = (s.describe().splitlines()[0] for s in (shared, alone))
    assert said == expected


def failing_recipe() -> tuple[DarkCells, PredictParams]:
    """Fail as a model that is not there."""
    raise ConfigError('model.onnx: is not there; expected a model')


def test_a_recipe_that_fails_is_the_failure_of_the_image(images: Path) -> None:
    (item,) = look_for([str(images / 'c.tif')]).items
    found = many._in_worker('plan', pickle.dumps(failing_recipe), item, ())
    assert found == many._Problem('model.onnx: is not there; expected a model')


def test_nobody_answers() -> None:
    with pytest.raises(ConfigError, match='no scheduler answers'):
        predict_with_dask([], failing_recipe, 'nonsense')


def test_the_script_of_a_job_array() -> None:
    words = ['he4', 'slides of may/', '--out', 'out']
    text = slurm_script(words, 8)
    assert '#SBATCH --array=1-8' in text
    command = "python tools/predict.py he4 'slides of may/' --out out"
    assert f'{command} --part "$SLURM_ARRAY_TASK_ID/8"\n' in text
    assert f'#   {command}\n' in text


def test_a_detector_is_made_once_in_a_process(tmp_path: Path, images: Path) -> None:
    made = pickle.dumps(partial(recipe, tmp_path / 'out', 0.5, CUT))
    (item,) = look_for([str(images / 'c.tif')]).items
    many._in_worker('finish', made, item, ())
    first = many._prepared(made)[0]
    many._in_worker('plan', made, item, ())
    assert many._prepared(made)[0] is first
    assert isinstance(many._one_at_a_time, type(threading.Lock()))

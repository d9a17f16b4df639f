"""Models that come with the package, their sentence and card, and pictures with odd colours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

pytest.importorskip('onnxruntime')

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.light import from_options, model_file
from cellseg_mm.light.card import describe, notice
from cellseg_mm.light.from_options import predict_images
from cellseg_mm.light.model_file import read_model_file, write_model_file
from cellseg_mm.predict.options import MemberOptions, PredictOptions
from cellseg_mm.predict.summary import Summary
from cellseg_mm.results.predictions import load_predictions

ROOT = Path(__file__).resolve().parents[2]
N_CELLS = 20
PINK, PURPLE = (228, 178, 208), (88, 50, 128)


def tissue(hw: tuple[int, int] = (200, 240)) -> np.ndarray:
    """Return N_CELLS dark purple ellipses on uneven pink."""
    rng = np.random.default_rng(0)
    clouds = cv2.GaussianBlur(rng.normal(0, 60, (*hw, 3)).astype(np.float32), (0, 0), 3)
    picture = np.float32(PINK) + clouds
    for y in range(24, hw[0] - 20, 40):
        for x in range(24, hw[1] - 20, 40):
            cell = np.zeros(hw, np.uint8)
            centre = tuple(int(v) for v in np.add((x, y), rng.integers(-5, 6, 2)))
            axes = tuple(int(v) for v in rng.integers(8, 11, 2))
            cv2.ellipse(cell, centre, axes, 0, 0, 360, 1, -1)
            picture[cell > 0] = np.float32(PURPLE) + rng.normal(0, 14, (int(cell.sum()), 1))
    return np.clip(cv2.GaussianBlur(picture, (0, 0), 0.8), 0, 255).astype(np.uint8)


def run(model: str, folder: Path, picture: np.ndarray, **options: object) -> tuple[Summary, str]:
    """Predict a picture that is saved as a PNG; return also all that is said."""
    Image.fromarray(picture).save(folder / 'a.png')
    wanted = {'inputs': (str(folder / 'a.png'),), 'out_dir': folder / 'out', 'device': 'cpu'}
    summary = predict_images(
        [model], MemberOptions(tta='none'), PredictOptions(**{**wanted, **options})
    )
    return summary, summary.describe()


# ------------------------------------------------------------------------- the shipped model


@pytest.fixture
def box() -> Path:
    path = model_file.MODELS / 'he4.cellseg'
    assert path.is_file(), f'{path} is missing: "How he4 was made" in docs/export.md makes it'
    return path


def test_the_shipped_model_is_small_and_says_all(box: Path) -> None:
    assert box.stat().st_size < 10e6
    file = read_model_file('he4')
    card = file.card
    assert card['licence'] == 'CC BY-NC-SA 4.0'
    for part in ('MoNuSAC 2020', 'R. Verma et al.', '10.1109/TMI.2021.3085712'):
        assert part in card['attribution']
        assert part in notice(file)
    assert (card['stain'], card['um_per_px'], card['red_blue_swapped']) == ('H&E', 0.25, False)
    assert card['training'][0]['red_blue_swapped'] is True  # the files, which were put right
    assert card['training'][0]['n_images'] > 100
    for name in file.card['class_names']:
        low, high = card['scores']['intervals'][f'segm_AP50_{name}']
        assert low < card['scores']['headline'][f'segm_AP50_{name}'] < high
    assert '/' not in card['members'][0]['source']
    assert set(file.settings['profiles']['instances']['score_thr']) == set(card['class_names'])
    text = describe(file)
    assert 'not said' not in text
    assert 'no medical device' in text


@pytest.mark.usefixtures('box')
def test_the_shipped_model_finds_cells_in_an_ordinary_picture(tmp_path: Path) -> None:
    picture = tissue()
    summary, said = run('he4', tmp_path, picture)
    assert summary.n_shown == N_CELLS
    assert 'licence of the weights: CC BY-NC-SA 4.0' in said
    assert '--red-blue' not in said
    assert (tmp_path / 'out' / 'a.overlay.png').is_file()
    first = cells_of(tmp_path)
    run('he4', tmp_path, np.ascontiguousarray(picture[..., ::-1]), red_blue_swapped=True)
    assert cells_of(tmp_path).rles == first.rles


def cells_of(folder: Path) -> InstanceSet:
    (found,) = load_predictions(folder / 'out' / 'a.npz').sets
    return found


# ------------------------------------------------------------------- any model, without torch


@pytest.fixture
def markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model called ``dots`` in the box; it finds pixels whose red is 255."""
    pytest.importorskip('onnx')
    from tests.support.marker_model import marker_model

    monkeypatch.setattr(model_file, 'MODELS', tmp_path)
    card = {'stain': 'H&E', 'licence': 'CC0', 'class_names': ['round', 'square']}
    path = tmp_path / 'dots.cellseg'
    write_model_file(path, [marker_model()], settings=None, card=card)
    return path


def dots(colour: tuple[int, int, int]) -> np.ndarray:
    """Return cells of a colour, with the marker of the model in the middle of each."""
    picture = np.full((60, 60, 3), PINK, np.uint8)
    for y in range(8, 60, 16):
        for x in range(8, 60, 16):
            picture[y - 4 : y + 5, x - 4 : x + 5] = colour
            picture[y, x] = (255, 0, 255)
    return picture


@pytest.mark.usefixtures('markers')
def test_cells_that_cannot_be_haematoxylin_are_said(tmp_path: Path) -> None:
    _, said = run('dots', tmp_path, dots(PURPLE))
    assert '--red-blue' not in said
    summary, said = run('dots', tmp_path, dots(PURPLE[::-1]))
    assert summary.n_shown == 16
    assert 'predict it again with --red-blue swapped' in said
    _, said = run('dots', tmp_path, dots(PURPLE)[..., ::-1], red_blue_swapped=True)
    assert '--red-blue' not in said
    _, said = run('dots', tmp_path, dots(PURPLE[::-1])[..., ::-1], red_blue_swapped=True)
    assert 'predict it again with --red-blue normal' in said


def test_other_stains_may_have_any_colour(
    markers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_options, 'HAEMATOXYLIN', 'another')
    _, said = run(str(markers), tmp_path, dots(PURPLE[::-1]))
    assert '--red-blue' not in said


@pytest.mark.usefixtures('box')
def test_the_tool_takes_names_and_shows_cards(tmp_path: Path) -> None:
    def tool(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / 'tools/predict.py'), *words]
        env = {**os.environ, 'PYTHONPATH': str(ROOT)}
        return subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )

    done = tool('he44', 'a.png', '--out', 'out')
    assert done.returncode == 2
    assert 'error: he44: no model has this name; the nearest is he4; expected one of' in done.stderr
    assert '--out: expected a folder' in tool('he4', 'a.png').stderr
    assert '--card: give names or files' in tool('he4', 'a.png', '--card').stderr
    shown = tool('he4', '--card')
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith('# he4\n')

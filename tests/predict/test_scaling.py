"""Looking at images at the model's pixel size, and cells back in the images' own pixels."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_mm.core.errors import ConfigError, ImageError
from cellseg_mm.data.image_reader import open_image
from cellseg_mm.predict.items import look_for
from cellseg_mm.predict.predict import predict
from cellseg_mm.predict.scaling import (
    ScaledReader,
    choose_grid,
    scale_text,
    um_of_members,
)
from cellseg_mm.results.predictions import load_predictions
from tests.support.drawn_slide import DarkCells, DrawnSlide, slide_params

LEVELS = [(1000, 800), (500, 400), (250, 200), (125, 100)]


@pytest.mark.parametrize(
    ('full_um', 'model_um', 'level', 'hw'),
    [
        (0.25, 0.25, 0, (1000, 800)),
        (0.25, 0.5, 1, (500, 400)),
        (0.25, 0.26, 0, (1000, 800)),  # within a tenth: as it is
        (0.25, 0.27, 0, (1000, 800)),
        (0.25, 0.46, 1, (500, 400)),  # the second level is 0.5, within a tenth of 0.46
        (0.25, 0.4, 0, (625, 500)),  # 0.5 would be too coarse: the first is resized
        (0.25, 0.8, 1, (312, 250)),  # 1000 * 0.25 / 0.8 = 312.5, to even
        (0.5, 0.25, 0, (2000, 1600)),  # coarser than the model: enlarged
        (0.25, 4.0, 3, (62, 50)),  # beyond the last level
    ],
)
def test_which_level_is_read_and_how_it_is_resized(
    full_um: float, model_um: float, level: int, hw: tuple[int, int]
) -> None:
    grid = choose_grid(LEVELS, (full_um, full_um), (model_um, model_um))
    assert (grid.level, grid.hw, grid.full_hw) == (level, hw, LEVELS[0])


def test_pixels_that_are_not_square_are_resized_to_square_ones() -> None:
    grid = choose_grid(LEVELS[:1], (0.25, 0.5), (0.5, 0.5))
    assert grid.hw == (500, 800)


@pytest.mark.parametrize(
    ('full_um', 'model_um', 'says'),
    [
        (None, (0.5, 0.5), '3 images do not say how large their pixels are'),
        ((0.5, 0.5), None, 'the model does not say'),
        (None, None, 'the model does not say'),
    ],
)
def test_what_is_not_known_is_not_scaled_and_said_once(full_um, model_um, says: str) -> None:
    grid = choose_grid(LEVELS, full_um, model_um)
    assert (grid.level, grid.hw, grid.full_hw) == (0, LEVELS[0], LEVELS[0])
    text = scale_text([grid.says] * 3, 0)
    assert says in text
    assert text.endswith('nothing was scaled.')


def test_a_level_that_is_named_is_read_as_it_is() -> None:
    grid = choose_grid(LEVELS, (0.25, 0.25), (0.25, 0.25), level=2)
    assert (grid.level, grid.hw, grid.full_hw) == (2, LEVELS[2], LEVELS[2])
    assert scale_text([grid.says], 0) == ''


def test_sizes_that_cannot_both_be_true() -> None:
    with pytest.raises(ImageError, match=r'a\.tif: its pixels are 5 um, those of the model 0\.25'):
        choose_grid(LEVELS, (5, 5), (0.25, 0.25), where='a.tif')


def test_pixel_size_of_members() -> None:
    assert um_of_members([{'um_per_px': 0.5}, {'um_per_px': [0.5, 0.5]}, {}]) == (0.5, 0.5)
    assert um_of_members([{}]) is None
    with pytest.raises(ConfigError, match=r'pixels of 0\.25 um and 0\.5 um; expected one size'):
        um_of_members([{'um_per_px': 0.5}, {'um_per_px': 0.25}])


@pytest.mark.parametrize('hw', [(60, 45), (200, 150), (61, 150)])
def test_regions_are_those_of_the_whole_resized_image(hw, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (120, 90, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / 'a.tif', pixels, photometric='rgb')
    with open_image(tmp_path / 'a.tif') as source:
        reader = ScaledReader(source, hw)
        whole = reader.read(0, 0, *hw)
        assert whole.shape == (*hw, 3)
        for y0, x0 in ((0, 0), (7, 20), (hw[0] - 30, hw[1] - 21)):
            part = reader.read(y0, x0, y0 + 30, x0 + 21)
            expected = whole[y0 : y0 + 30, x0 : x0 + 21].astype(int)
            assert np.abs(part.astype(int) - expected).max() <= 1  # Pillow's fixed point
        assert abs(whole.mean() - pixels.mean()) < 1


@pytest.mark.parametrize('um_per_px', [0.25, 0.5, 1.0])
def test_cells_are_found_at_any_pixel_size_and_measured_in_micrometres(
    um_per_px: float, tmp_path: Path
) -> None:
    slide = DrawnSlide(round(500 / um_per_px), um_per_px, ((0.45, 0.6, 0.3),))
    (tmp_path / 'in').mkdir()
    slide.write(tmp_path / 'in/a.tif', tile=256, shrinks=(4,))
    params = slide_params(
        tmp_path / 'out', model_um_per_px=(0.5, 0.5), tile_px=256, overlap_px=32, whole_px=256
    )
    summary = predict(look_for([str(tmp_path / 'in')]).items, DarkCells(0.5), params)
    assert not summary.failed
    (found,) = load_predictions(tmp_path / 'out/a.npz').sets
    assert found.image_hw == (slide.side, slide.side)
    assert len(found) == len(slide.cells)
    table = (tmp_path / 'out/a.cells.csv').read_text()
    rows = list(csv.DictReader(table.splitlines()))
    areas = np.array([float(row['area_um2']) for row in rows])
    truth = np.pi * slide.cells[:, 2] * slide.cells[:, 3] * um_per_px**2
    # drawn shapes and resized pixels: some hundredths
    assert abs(areas.sum() / truth.sum() - 1) < 0.06
    centres = np.array([[float(r['centroid_y_um']), float(r['centroid_x_um'])] for r in rows])
    near = np.abs(centres[:, None] - slide.cells[None, :, :2] * um_per_px).max(axis=2).min(axis=1)
    assert near.max() < 1.0
    said = summary.describe()
    assert ('1 images were looked at with the 0.5 um per px of the model' in said) == (
        um_per_px != 0.5
    )


def test_the_size_that_is_stated_holds_instead_of_the_files(tmp_path: Path) -> None:
    (tmp_path / 'in').mkdir()
    DrawnSlide(600, 0.25, ((0.5, 0.5, 0.4),)).write(tmp_path / 'in/a.tif', tile=64, shrinks=())
    sizes = {}
    for name, more in {'file': {}, 'stated': {'um_per_px': (0.5, 0.5)}}.items():
        params = slide_params(tmp_path / name, model_um_per_px=(0.5, 0.5), **more)
        predict(look_for([str(tmp_path / 'in')]).items, DarkCells(0.5), params)
        provenance = load_predictions(tmp_path / name / 'a.npz').provenance
        sizes[name] = (provenance['um_per_px'], provenance['looked_at']['hw'])
    assert sizes == {'file': ([0.25, 0.25], [300, 300]), 'stated': ([0.5, 0.5], [600, 600])}

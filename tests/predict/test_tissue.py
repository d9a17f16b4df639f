"""Glass and pen are left out, tissue never is; regions that a person drew."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from cellseg_mm.core.errors import ConfigError, ImageError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.predict import tissue
from cellseg_mm.predict.items import look_for
from cellseg_mm.predict.predict import predict
from cellseg_mm.predict.tissue import GLASS, PEN, TISSUE, TissueMap, find_tissue, read_regions
from cellseg_mm.results.predictions import load_predictions
from tests.support.drawn_slide import DarkCells, DrawnSlide, slide_params


def painted(glass: int = 243) -> np.ndarray:
    """Return glass with noise, pink tissue with a hole and a lone pale cell."""
    picture = np.full((300, 400, 3), glass, dtype=np.int16)
    picture += np.random.default_rng(0).integers(-3, 4, picture.shape)
    picture[50:150, 60:200] = (226, 186, 208)
    picture[90:93, 100:103] = glass  # a hole: 9 of 120,000 px
    picture[100:140, 150:190] = glass  # a lumen: larger than a hole
    picture[250:252, 300:302] = (215, 195, 210)  # a cell of two px, pale by what is around it
    return picture.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize('glass', [250, 243, 215])
def test_tissue_is_kept_and_glass_is_not(glass: int) -> None:
    kinds = find_tissue(painted(glass)).kinds
    assert (kinds[50:150, 60:150] == TISSUE).all()  # the hole is closed
    assert (kinds[250:252, 300:302] == TISSUE).all()
    assert (kinds[110:130, 160:180] == GLASS).all()
    expected = 140 * 100 - 40 * 40 + 4  # without what tissue grows by
    assert expected < (kinds == TISSUE).sum() < expected * 1.2


def test_pen_is_left_out_but_not_where_it_grows_over_tissue() -> None:
    picture = painted()
    cv2.line(picture, (250, 20), (380, 120), (30, 150, 90), 5)  # a green marker
    cv2.line(picture, (250, 150), (380, 220), (40, 120, 210), 5)  # a blue one
    found = find_tissue(picture)
    assert found.kinds[70, 315] == PEN
    assert found.kinds[185, 315] == PEN
    assert (found.kinds[50:150, 60:150] == TISSUE).all()
    assert '% pen' in found.describe(3, 9)


@pytest.mark.parametrize(
    'colour',
    [
        pytest.param((92, 60, 130), id='haematoxylin'),
        pytest.param((160, 150, 185), id='pale haematoxylin of immunohistochemistry'),
        pytest.param((150, 95, 60), id='brown'),
        pytest.param((235, 205, 222), id='pale eosin'),
        pytest.param((230, 90, 110), id='blood'),
        pytest.param((20, 20, 20), id='black'),
    ],
)
def test_stains_are_tissue(colour: tuple[int, int, int]) -> None:
    picture = painted()
    picture[180:240, 50:120] = colour
    assert (find_tissue(picture).kinds[180:240, 50:120] == TISSUE).all()


@pytest.mark.parametrize(
    'picture',
    [
        pytest.param(np.zeros((40, 50, 3), np.uint8), id='fluorescence'),
        pytest.param(np.full((40, 50, 3), (10, 200, 40), np.uint8), id='green on black'),
        pytest.param(np.full((40, 50, 3), (226, 186, 208), np.uint8), id='tissue all over'),
    ],
)
def test_without_glass_everything_is_tissue(picture: np.ndarray) -> None:
    assert (find_tissue(picture).kinds == TISSUE).all()


def test_a_stain_that_looks_like_pen_is_tissue() -> None:
    picture = painted()
    picture[50:150, 60:120] = (70, 150, 180)  # trichrome: two fifths of the tissue
    assert (find_tissue(picture).kinds[50:150, 60:120] == TISSUE).all()


def test_a_tile_is_looked_at_when_any_of_it_is_tissue() -> None:
    kinds = np.zeros((10, 20), dtype=np.uint8)
    kinds[3, 7] = TISSUE  # rows 30 to 40, columns 70 to 80 of 100 x 200 px
    found = TissueMap(kinds)
    assert found.touches((0, 0, 31, 71), (100, 200))
    assert not found.touches((0, 0, 30, 200), (100, 200))
    assert found.touches((39, 79, 100, 200), (100, 200))
    assert not found.touches((40, 0, 100, 200), (100, 200))


def test_an_overview_is_the_mean_of_squares_and_in_true_colours(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(tissue, 'MAP_PX', 50)
    monkeypatch.setattr(tissue, 'BLOCK_PX', 64)
    pixels = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / 'a.png'), pixels)  # blue first: red and blue are swapped
    from cellseg_mm.data.image_reader import open_image

    with open_image(tmp_path / 'a.png') as reader:
        small = tissue.overview(reader, red_blue_swapped=True)
    expected = pixels.reshape(30, 4, 50, 4, 3).mean(axis=(1, 3))
    assert np.abs(small - expected).max() <= 0.5


def write_regions(path: Path, *rings: list[list[list[float]]]) -> Path:
    features = [
        {'type': 'Feature', 'geometry': {'type': 'Polygon', 'coordinates': one}} for one in rings
    ]
    path.write_text(json.dumps({'type': 'FeatureCollection', 'features': features}))
    return path


def square(y0: float, x0: float, y1: float, x1: float) -> list[list[float]]:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def test_regions_with_holes(tmp_path: Path) -> None:
    path = write_regions(
        tmp_path / 'a.geojson',
        [square(10, 20, 40, 60), square(20, 30, 30, 40)],
        [square(70, 70, 80, 90)],
    )
    found = read_regions(path, (100, 120))
    assert found.kinds.shape == (100, 120)
    assert (found.kinds[11:19, 21:59] == TISSUE).all()
    assert (found.kinds[22:28, 32:38] == GLASS).all()
    assert (found.kinds[71:79, 71:89] == TISSUE).all()
    assert abs(int((found.kinds == TISSUE).sum()) - (30 * 40 - 10 * 10 + 10 * 20)) < 150


def test_cells_outside_of_regions_are_left_out_and_counted(tmp_path: Path) -> None:
    kinds = np.zeros((10, 10), dtype=np.uint8)
    kinds[2:5, 2:5] = TISSUE
    crops = [np.ones((3, 3), dtype=bool)] * 3
    cells = InstanceSet.from_crops(
        'a',
        0,
        (20, 20),
        crops=crops,
        offsets_yx=np.array([[5, 5], [9, 9], [15, 15]]),
        class_ids=np.zeros(3),
        scores=np.ones(3),
    )
    # middles at 6.5, 10.5 and 16.5 of 20 px: 3.25, 5.25 and 8.25 of the map's 10
    assert TissueMap(kinds, is_drawn=True).holds(cells).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{', 'cannot be read'),
        ('{"type": "Feature", "geometry": null}', 'cannot be read'),
        ('{"type": "Point", "coordinates": [1, 2]}', '0 polygons, none within the image'),
        (
            '{"type": "Polygon", "coordinates": [[[500, 500], [600, 500], [600, 600]]]}',
            '1 polygons, none within the image of 100 x 120 px',
        ),
    ],
)
def test_regions_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / 'a.geojson').write_text(text)
    with pytest.raises(ImageError, match=message):
        read_regions(tmp_path / 'a.geojson', (100, 120))


def test_a_word_that_is_none_of_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='expected slides, auto, off, a GeoJSON file'):
        slide_params(tmp_path, tissue='on')


# ------------------------------------------------------------------------------- whole runs

CUT = {'tile_px': 128, 'overlap_px': 32, 'whole_px': 128}


@pytest.fixture
def slide(tmp_path: Path) -> DrawnSlide:
    drawn = DrawnSlide(1600, 0.5, ((0.3, 0.4, 0.15), (0.8, 0.8, 0.06)))
    (tmp_path / 'in').mkdir()
    drawn.write(tmp_path / 'in/a.tif', tile=128, shrinks=(4,))
    return drawn


def look(tmp_path: Path, name: str, **more) -> tuple[str, int, int]:
    """Return what is said, tiles that were looked at, and cells that were found."""
    detector, params = DarkCells(), slide_params(tmp_path / name, **CUT, **more)
    summary = predict(look_for([str(tmp_path / 'in')]).items, detector, params)
    assert not summary.failed
    (found,) = load_predictions(tmp_path / name / 'a.npz').sets
    return summary.describe(), detector.n_calls, len(found)


def test_of_a_slide_only_tissue_is_looked_at_and_nothing_is_lost(
    slide: DrawnSlide, tmp_path: Path
) -> None:
    said, n_off, n_cells = look(tmp_path, 'off', tissue='off')
    assert (n_off, n_cells) == (17 * 17, len(slide.cells))  # 1600 px in steps of 96
    assert 'tissue' not in said
    said, n_auto, n_cells = look(tmp_path, 'default')
    assert n_cells == len(slide.cells)
    assert n_auto < n_off / 3
    assert f'{n_auto} of {n_off} tiles were looked at' in said
    kinds = cv2.imread(str(tmp_path / 'default/a.tissue.png'), cv2.IMREAD_GRAYSCALE)
    share = np.pi * (0.15**2 + 0.06**2)
    assert share < (kinds == TISSUE).mean() < share + 0.03
    tables = [(tmp_path / name / 'a.cells.csv').read_bytes() for name in ('off', 'default')]
    assert tables[0] == tables[1]


def test_an_ordinary_image_is_looked_at_whole(tmp_path: Path) -> None:
    (tmp_path / 'in').mkdir()
    drawn = DrawnSlide(600, 0.5, ((0.5, 0.5, 0.2),))
    drawn.write(tmp_path / 'in/a.tif', tile=128, shrinks=())
    assert look(tmp_path, 'default')[1:] == (36, len(drawn.cells))
    assert not (tmp_path / 'default/a.tissue.png').exists()
    _, n_auto, n_cells = look(tmp_path, 'auto', tissue='auto')
    assert n_auto < 36
    assert n_cells == len(drawn.cells)


def test_regions_limit_the_work(slide: DrawnSlide, tmp_path: Path) -> None:
    (tmp_path / 'regions').mkdir()
    region = write_regions(tmp_path / 'regions/a.geojson', [square(1100, 1100, 1500, 1500)])
    inside = slide.cells[(slide.cells[:, :2] > 1100).all(axis=1)]
    for word in (region, region.parent):
        said, n_calls, n_cells = look(tmp_path, f'out-{word.name}', tissue=str(word))
        assert n_cells == len(inside)
        assert n_calls == 36  # tiles that meet 400 px in steps of 96
        assert 'regions: 6.' in said  # 400^2 of 1600^2 is 6.25 %


def test_cells_at_the_edge_of_a_region_are_counted(slide: DrawnSlide, tmp_path: Path) -> None:
    region = write_regions(tmp_path / 'half.geojson', [square(0, 0, 480, 1600)])
    said, _, n_cells = look(tmp_path, 'out', tissue=str(region))
    upper = (slide.cells[:, 0] < 480).sum()
    assert abs(n_cells - upper) <= 2  # middles of masks and of drawn cells
    assert 'cells outside of the regions were left out' in said


def test_an_overview_picture_is_drawn_from_a_smaller_level(
    slide: DrawnSlide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look(tmp_path, 'full', formats=('overlay',))
    monkeypatch.setattr('cellseg_mm.predict.predict.MAX_PICTURE_PX', 400 * 400)
    look(tmp_path, 'small', formats=('overlay',))
    full, small = (cv2.imread(str(tmp_path / n / 'a.overlay.png')) for n in ('full', 'small'))
    assert full.shape[1] == 1600
    assert small.shape[1] == 400  # the second level, as it is
    y, x = (slide.cells[0, :2] / 4).astype(int).tolist()
    outlined = (small == (0, 94, 213)).all(axis=2)  # blue first
    assert outlined[y - 4 : y + 5, x - 4 : x + 5].any()

"""Pictures: what is drawn is inside the cells, in the right colour, and quick."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from scipy import ndimage

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data.config import default_colours
from cellseg_mm.results import overlay

NAMES = ('epithelial', 'lymphocyte')
COLOURS = [(0, 114, 178), (213, 94, 0)]
IMAGE = np.full((40, 51, 3), 200, dtype=np.uint8)


def make_set(crops, offsets, class_ids, scores, image_hw=(40, 51)) -> InstanceSet:
    return InstanceSet.from_crops(
        'a',
        1,
        image_hw,
        crops=crops,
        offsets_yx=np.array(offsets),
        class_ids=np.array(class_ids),
        scores=np.array(scores),
    )


def disc(radius: int) -> np.ndarray:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return y * y + x * x <= radius * radius


def two_cells() -> InstanceSet:
    ring = disc(8)
    ring[6:11, 6:11] = False  # a hole has an outline too
    return make_set([disc(6), ring], [(2, 3), (15, 30)], [0, 1], [0.9, 0.4])


@pytest.mark.parametrize('line_px', [1, 2, 3])
def test_outlines_are_the_rim_of_the_masks(line_px: int) -> None:
    drawn = overlay.draw_overlay(IMAGE, two_cells(), COLOURS, line_px=line_px)
    expected = IMAGE.copy()
    for mask, colour in zip(two_cells().masks(), COLOURS, strict=True):
        inside = ndimage.binary_erosion(mask, iterations=line_px)
        expected[mask & ~inside] = colour
    assert np.array_equal(drawn, expected)
    assert (IMAGE == 200).all()  # the input is left alone


def test_a_cell_at_the_edge_gets_a_closed_line() -> None:
    instances = make_set([np.ones((5, 5), bool)], [(0, 0)], [0], [1.0])
    drawn = overlay.draw_overlay(IMAGE, instances, COLOURS, line_px=1)
    outlined = (drawn[:5, :5] == COLOURS[0]).all(axis=2)
    assert outlined.sum() == 16  # 5 x 5 without the inner 3 x 3
    assert not outlined[1:4, 1:4].any()


def test_the_higher_score_is_drawn_last() -> None:
    square = np.ones((6, 6), bool)
    instances = make_set([square, square], [(4, 4)] * 2, [0, 1], [0.3, 0.6])
    drawn = overlay.draw_overlay(IMAGE, instances, COLOURS)
    assert (drawn[4, 4] == COLOURS[1]).all()
    drawn = overlay.draw_overlay(IMAGE, instances[[1, 0]], COLOURS)
    assert (drawn[4, 4] == COLOURS[1]).all()


def test_no_cells_and_cells_without_pixels() -> None:
    empty = InstanceSet.empty('a', 1, (40, 51))
    assert np.array_equal(overlay.draw_overlay(IMAGE, empty, COLOURS), IMAGE)
    hollow = make_set([np.zeros((0, 0), bool)], [(0, 0)], [0], [1.0])
    assert np.array_equal(overlay.draw_overlay(IMAGE, hollow, COLOURS), IMAGE)


@pytest.mark.parametrize('block_px', [16, 30, 4096])
def test_large_images_are_drawn_block_by_block(
    block_px: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shrunk blocks equal the whole picture shrunk; cells that cross blocks get no extra line."""
    monkeypatch.setattr(overlay, 'BLOCK_PX', block_px)
    image = np.random.default_rng(0).integers(0, 256, (40, 51, 3)).astype(np.uint8)
    regions = []

    def read(y0: int, x0: int, y1: int, x1: int) -> np.ndarray:
        regions.append((y1 - y0) * (x1 - x0))
        return image[y0:y1, x0:x1]

    found = overlay.draw_large(read, two_cells(), COLOURS, max_pixels=600, line_px=1)
    whole = overlay.draw_overlay(image, two_cells(), COLOURS, line_px=2)  # 40 * 51 / 600 -> 2
    shrunk = cv2.resize(whole[:, :50], (25, 20), interpolation=cv2.INTER_AREA)
    assert found.shape == (20, 26, 3)
    assert np.array_equal(found[:, :25], shrunk)
    last = whole[:, 50].reshape(20, 2, 3).mean(axis=1)  # one column is left over
    assert np.abs(found[:, 25] - last).max() <= 0.5
    assert max(regions) <= (block_px + 4) ** 2
    small = overlay.draw_large(read, two_cells(), COLOURS, class_names=NAMES)
    assert np.array_equal(small[:40], overlay.draw_overlay(image, two_cells(), COLOURS))
    # the legend: two names do not fit beside each other in 51 px
    assert np.array_equal(small[40:], overlay.draw_legend(51, COLOURS, NAMES, counts=[1, 1]))
    assert small.shape == (40 + 2 * 28, 51, 3)


@pytest.mark.parametrize('width', [60, 150, 200, 296, 600])
def test_legend_of_a_narrow_picture_is_not_cut(width: int) -> None:
    colours = [(0, 114, 178), (213, 94, 0), (240, 228, 66), (0, 158, 115)]
    names = ('epithelial', 'lymphocyte', 'neutrophil', 'macrophage')
    legend = overlay.draw_legend(width, colours, names, counts=[0, 88, 2, 1234])
    assert legend.shape[1] == width
    swatches = [(legend == colour).all(axis=2) for colour in colours]
    assert [int(swatch.sum()) for swatch in swatches] == [13 * 13] * 4
    if width >= 150:  # wider than the longest name: no text reaches the right edge
        assert (legend[:, -1] == 255).all()
    free = np.full_like(legend, 255)
    n_rows = {60: 4, 150: 4, 200: 4, 296: 2, 600: 1}[width]
    assert len(legend) == 28 * n_rows
    assert (legend[-28:] != free[-28:]).any()  # the last strip is used


def test_pair() -> None:
    gt = two_cells()
    pair = overlay.draw_pair(IMAGE, gt, gt, COLOURS, class_names=NAMES, score_thr=0.5)
    assert pair.shape == (28 + 40 + 2 * 28, 51 + 8 + 51, 3)
    left, right = pair[28:68, :51], pair[28:68, 59:]
    assert np.array_equal(left, overlay.draw_overlay(IMAGE, gt, COLOURS))
    assert np.array_equal(right, overlay.draw_overlay(IMAGE, gt[:1], COLOURS))  # 0.4 < 0.5


def test_contact_sheet() -> None:
    pictures = [np.full((40, 60, 3), 10, np.uint8), np.full((100, 50, 3), 20, np.uint8)] * 2
    params = overlay.SheetParams(n_columns=3, cell_px=50)
    sheet = overlay.draw_contact_sheet(pictures, ['a', 'b', 'c', 'd'], params)
    # shrunk to 33 x 50 and 50 x 25; titles 28, gaps 8; rows of 3 and 1
    assert sheet.shape == (2 * (28 + 50 + 8), 3 * (50 + 8), 3)
    assert (sheet[28:61, :50] == 10).all()
    assert (sheet[28:78, 58 : 58 + 25] == 20).all()
    with pytest.raises(ValueError, match='4 pictures with 1 titles'):
        overlay.draw_contact_sheet(pictures, ['a'])


def test_true_colours_of_swapped_files(tmp_path: Path) -> None:
    stored = np.zeros((4, 5, 3), np.uint8)
    stored[..., 2] = 250  # red, where blue belongs
    tifffile.imwrite(tmp_path / 'a.tif', stored, photometric='rgb')
    plain = overlay.read_rgb(tmp_path / 'a.tif')
    true = overlay.read_rgb(tmp_path / 'a.tif', red_blue_swapped=True)
    assert plain[0, 0].tolist() == [0, 0, 250]
    assert true[0, 0].tolist() == [250, 0, 0]


def test_png_is_read_back_in_rgb(tmp_path: Path) -> None:
    picture = overlay.draw_overlay(IMAGE, two_cells(), COLOURS)
    overlay.write_png(tmp_path / 'a.png', picture)
    found = cv2.cvtColor(cv2.imread(str(tmp_path / 'a.png')), cv2.COLOR_BGR2RGB)
    assert np.array_equal(found, picture)
    assert [p.name for p in tmp_path.iterdir()] == ['a.png']


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r'shape \(40, 50, 3\)'):
        overlay.draw_overlay(IMAGE[:, :50], two_cells(), COLOURS)
    with pytest.raises(ValueError, match='class 1 has no colour'):
        overlay.draw_overlay(IMAGE, two_cells(), COLOURS[:1])


def test_cost_follows_the_cells_not_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand cells on a large picture: painting full-size masks would take minutes."""
    rng = np.random.default_rng(0)
    crops = [disc(int(r)) for r in rng.integers(4, 20, 1000)]
    offsets = rng.integers(0, 3900, (1000, 2))
    instances = make_set(crops, offsets, rng.integers(0, 2, 1000), rng.random(1000), (4000, 4000))
    image = np.zeros((4000, 4000, 3), np.uint8)
    looked_at, erode = [], cv2.erode
    monkeypatch.setattr(
        cv2, 'erode', lambda mask, *a, **k: looked_at.append(mask.size) or erode(mask, *a, **k)
    )
    overlay.draw_overlay(image, instances, COLOURS)
    assert sum(looked_at) == sum(crop.size for crop in crops)


def test_colours_differ() -> None:
    assert len(set(default_colours(8))) == 8
    assert len(default_colours(11)) == 11

"""Formats by word: every one holds the cells that were given, in true colours."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import cv2
import geojson
import numpy as np
import pytest
import tifffile

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data.image_reader import open_image
from cellseg_mm.results import export, formats
from cellseg_mm.results.formats import FORMATS, Look, check_words, path_of, write_formats

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9))
LOOK = Look(class_names=('one', 'two', 'three', 'four'), class_colours=COLOURS)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.zeros((40, 50, 3), np.uint8)
    pixels[:] = (10, 100, 200)
    tifffile.imwrite(tmp_path / 'a.tif', pixels, photometric='rgb')
    return tmp_path / 'a.tif'


def make_cells(n: int = 3) -> InstanceSet:
    return InstanceSet.from_crops(
        'a.1',  # a name with a dot keeps it
        1,
        (40, 50),
        crops=[np.ones((6, 5), dtype=bool)] * n,
        offsets_yx=np.array([[0, 0], [10, 20], [30, 2]])[:n],
        class_ids=np.array([3, 0, 1])[:n],
        scores=np.array([0.6, 0.9, 0.4])[:n],
    )


def write(image: Path, words: tuple[str, ...], cells: InstanceSet, look: Look = LOOK) -> dict:
    with open_image(image) as reader:
        return write_formats(image.parent / 'out', words, cells, reader, look)


def test_every_format_holds_every_cell(tmp_path: Path, image: Path) -> None:
    done = write(image, tuple(FORMATS), make_cells())
    out = tmp_path / 'out'
    written = sorted(path.name for path in out.iterdir())
    assert written == sorted(f'a.1{suffix}' for suffix, _ in FORMATS.values())
    assert [e.n_written for e in done.values()] == [3] * len(FORMATS)
    assert [e.path for e in done.values()] == [path_of(out, 'a.1', word) for word in FORMATS]
    rows = list(csv.DictReader((out / 'a.1.cells.csv').read_text().splitlines()))
    assert [(r['class'], r['score']) for r in rows] == [
        ('one', '0.9'),
        ('four', '0.6'),
        ('two', '0.4'),
    ]
    records = json.loads((out / 'a.1.coco.json').read_text())
    assert [r['category_id'] for r in records] == [1, 4, 2]
    labels = tifffile.imread(out / 'a.1.labels.tif')
    assert (labels[10, 20], labels[0, 0], labels[30, 2]) == (1, 2, 3)
    features = geojson.loads((out / 'a.1.geojson').read_text()).features
    assert [f.properties['measurements']['Area px^2'] for f in features] == [30, 30, 30]
    picture = cv2.imread(str(out / 'a.1.overlay.png'))
    assert picture[10, 20].tolist() == [0, 0, 255]  # the first class is red; blue comes first


@pytest.mark.parametrize('swapped', [False, True])
def test_colours_are_true(tmp_path: Path, image: Path, swapped: bool) -> None:
    look = Look(class_names=LOOK.class_names, class_colours=COLOURS, red_blue_swapped=swapped)
    write(image, ('csv', 'overlay'), make_cells(1), look)
    (row,) = csv.DictReader((tmp_path / 'out/a.1.cells.csv').read_text().splitlines())
    means = [float(row[f'mean_{channel}']) for channel in ('red', 'green', 'blue')]
    assert means == ([200, 100, 10] if swapped else [10, 100, 200])
    picture = cv2.imread(str(tmp_path / 'out/a.1.overlay.png'))
    assert picture[35, 45].tolist() == ([10, 100, 200] if swapped else [200, 100, 10])


@pytest.mark.parametrize(
    ('words', 'n_times'), [(('csv', 'geojson'), 1), (('coco', 'label-map', 'imagej'), 0)]
)
def test_cells_are_measured_once_and_only_when_asked_for(
    image: Path, monkeypatch: pytest.MonkeyPatch, words: tuple, n_times: int
) -> None:
    measured = []
    measure = formats.measure
    monkeypatch.setattr(formats, 'measure', lambda *a: measured.append(1) or measure(*a))
    write(image, words, make_cells())
    assert len(measured) == n_times


def test_an_image_without_cells(tmp_path: Path, image: Path) -> None:
    done = write(image, tuple(FORMATS), make_cells()[:0])
    assert [e.n_written for e in done.values()] == [0] * len(FORMATS)
    assert json.loads((tmp_path / 'out/a.1.coco.json').read_text()) == []


def test_unknown_formats_are_refused() -> None:
    check_words(FORMATS)
    with pytest.raises(ConfigError, match='found pdf, qupath; expected some of label-map'):
        check_words(('csv', 'qupath', 'pdf'))


def reviewed(folder: Path) -> list[tuple[str, object, float]]:
    content = geojson.loads((folder / 'a.1.review.geojson').read_text())
    properties = [feature.properties for feature in content.features]
    return [
        (p['objectType'], p['measurements'].get('review rank'), p['measurements']['score'])
        for p in properties
    ]


def test_doubtful_cells_become_annotations_and_their_number_is_said(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = write(image, ('review',), make_cells())
    assert export.describe(done) == 'review: 1 of 3 cells to look at first'  # a quarter, rounded up
    monkeypatch.setattr(formats, 'SHARE_TO_REVIEW', 1.0)
    monkeypatch.setattr(formats, 'MOST_TO_REVIEW', 2)
    done = write(image, ('review',), make_cells())
    out = image.parent / 'out'
    assert reviewed(out) == [
        ('detection', None, 0.9),
        ('annotation', 2, 0.6),
        ('annotation', 1, 0.4),
    ]
    assert export.describe(done) == 'review: 2 of 3 cells to look at first'
    votes = replace(make_cells(), extra={'agreement': np.float32([1, 0.2, 1])})
    write(image, ('review',), votes)  # the best score has the fewest votes
    assert [rank for _, rank, _ in reviewed(out)] == [1, None, 2]

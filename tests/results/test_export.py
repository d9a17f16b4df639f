"""results.export: files are read back by the libraries that own the formats, pixel by pixel."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import geojson
import numpy as np
import pytest
import roifile
import shapely
import tifffile
from pycocotools import mask as coco_mask

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.results import export, measure
from tests.support.odd_masks import (
    COLOURS,
    EMPTY,
    NAMES,
    SETS,
    SHAPES,
    crop_of,
    make_set,
    pixels_inside,
    random_set,
    shapes_set,
)


@pytest.mark.parametrize('instances', [*SETS, pytest.param(EMPTY, id='empty')])
def test_label_map_is_read_back(instances: InstanceSet, tmp_path: Path) -> None:
    exported = export.write_label_map(tmp_path / 'm.tif', instances)
    found = tifffile.imread(tmp_path / 'm.tif')
    assert found.dtype == np.uint16
    expected = instances.by_score().to_label_map()
    assert np.array_equal(found, expected)
    kept = len(np.unique(expected[expected > 0]))
    n_empty = int((instances.areas == 0).sum())
    counts = (kept, n_empty, len(instances) - kept - n_empty)
    assert (exported.n_written, exported.n_empty, exported.n_hidden) == counts
    assert exported.n_lost_px == instances.areas.sum() - (expected > 0).sum()


def test_label_map_in_several_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, 'TILE_PX', 16)
    for seed in range(5):
        instances = random_set(seed, n=30)
        export.write_label_map(tmp_path / 'm.tif', instances)
        expected = instances.by_score().to_label_map()
        assert np.array_equal(tifffile.imread(tmp_path / 'm.tif'), expected)


def test_label_map_of_many_cells_is_wider(tmp_path: Path) -> None:
    n = 65_536
    crops = [np.ones((1, 1), dtype=bool)] * n
    offsets = np.stack(np.divmod(np.arange(n), 300), axis=1)
    instances = make_set(crops, offsets, (220, 300), scores=np.linspace(1, 0, n))
    export.write_label_map(tmp_path / 'm.tif', instances)
    found = tifffile.imread(tmp_path / 'm.tif')
    assert found.dtype == np.uint32
    assert found.max() == n
    export.write_label_map(tmp_path / 'm.tif', instances[:-1])
    assert tifffile.imread(tmp_path / 'm.tif').dtype == np.uint16


@pytest.mark.parametrize('instances', [*SETS, pytest.param(EMPTY, id='empty')])
def test_geojson_is_read_back(instances: InstanceSet, tmp_path: Path) -> None:
    path = tmp_path / 'cells.geojson'
    features = measure.measure(instances)
    exported = export.write_geojson(path, instances, NAMES, COLOURS, features=features)
    found = geojson.loads(path.read_text())
    assert found.is_valid, found.errors()
    ranked = instances.by_score()
    ranked = ranked[ranked.areas > 0]
    assert len(found.features) == len(ranked) == exported.n_written
    assert exported.n_empty == len(instances) - len(ranked)
    for i, feature in enumerate(found.features):
        shape = shapely.geometry.shape(feature.geometry)
        assert shape.is_valid
        assert np.array_equal(pixels_inside(shape, ranked.image_hw), ranked[i : i + 1].masks()[0])
        class_id = ranked.class_ids[i]
        properties = feature.properties
        assert properties['objectType'] == 'detection'
        assert properties['classification'] == {
            'name': NAMES[class_id],
            'color': list(COLOURS[class_id]),
        }
        assert np.float32(properties['measurements']['score']) == ranked.scores[i]
        assert properties['measurements']['Area px^2'] == ranked.areas[i] == shape.area
    assert len({feature.id for feature in found.features}) == len(ranked)


def roi_pixels(roi: roifile.ImagejRoi, image_hw) -> np.ndarray:
    """Fill by the even-odd rule, as ImageJ does."""
    rings = roi.coordinates(multi=True) if roi.composite else [roi.coordinates()]
    filled = np.zeros(image_hw, dtype=bool)
    for ring in rings:
        filled ^= pixels_inside(shapely.Polygon(ring), image_hw)
    return filled


@pytest.mark.parametrize('instances', [*SETS, pytest.param(EMPTY, id='empty')])
def test_imagej_rois_are_read_back(instances: InstanceSet, tmp_path: Path) -> None:
    path = tmp_path / 'cells.zip'
    exported = export.write_imagej_rois(path, instances, NAMES, class_colours=COLOURS)
    rois = roifile.roiread(path) if exported.n_written else []
    rois = rois if isinstance(rois, list) else [rois]
    ranked = instances.by_score()
    written = np.flatnonzero(ranked.areas > 0)
    assert exported.n_written == len(rois) == len(written)
    for roi, i in zip(rois, written.tolist(), strict=True):
        mask = ranked[i : i + 1].masks()[0]
        assert np.array_equal(roi_pixels(roi, ranked.image_hw), mask)
        number, name, score = roi.name.split('_')
        assert int(number) == i + 1
        assert name == NAMES[ranked.class_ids[i]].replace('/', '-')
        assert score == f'{ranked.scores[i]:.3f}'
        rows, columns = np.nonzero(mask)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert (roi.left, roi.top, roi.right, roi.bottom) == box
        assert tuple(roi.stroke_color) == (255, *COLOURS[ranked.class_ids[i]])


@pytest.mark.parametrize('corner', [19_990, 40_000, 70_000])
def test_imagej_rois_far_from_the_origin(corner: int, tmp_path: Path) -> None:
    crops = [crop_of(SHAPES['F']), crop_of(SHAPES['hole'])]
    instances = make_set(crops, [(3, corner)] * 2, image_hw=(10, corner + 10))
    export.write_imagej_rois(tmp_path / 'a.zip', instances, NAMES)
    for roi, original in zip(
        roifile.roiread(tmp_path / 'a.zip'), instances.by_score().crops()[0], strict=True
    ):
        rings = roi.coordinates(multi=True) if roi.composite else [roi.coordinates()]
        assert np.min(rings[0], axis=0).tolist() == [corner, 3]
        assert np.max(rings[0], axis=0).tolist() == [
            corner + original.shape[1],
            3 + original.shape[0],
        ]


def test_imagej_zip_name() -> None:
    with pytest.raises(ValueError, match=r'from a \.zip only'):
        export.write_imagej_rois('a.roi', EMPTY, NAMES)


def test_table(tmp_path: Path) -> None:
    instances = shapes_set()
    image = np.random.default_rng(5).integers(0, 256, (60, 71, 3)).astype(np.uint8)
    exported = export.write_cells_csv(tmp_path / 'c.csv', instances, NAMES, image=image)
    rows = list(csv.DictReader((tmp_path / 'c.csv').read_text().splitlines()))
    ranked = instances.by_score()
    assert [int(row['cell']) for row in rows] == list(range(1, len(ranked) + 1))
    assert exported.n_empty == 1
    for i, row in enumerate(rows):
        assert row['class'] == NAMES[ranked.class_ids[i]]
        assert np.float32(row['score']) == ranked.scores[i]
        assert int(row['area_px']) == ranked.areas[i]
        if not ranked.areas[i]:
            assert row['perimeter_px'] == row['box_x0_px'] == row['mean_red'] == ''
            continue
        mask = ranked[i : i + 1].masks()[0]
        ys, xs = np.nonzero(mask)
        # own loops, from the upper left corner of the image
        assert float(row['centroid_x_px']) == pytest.approx(xs.mean() + 0.5, abs=1e-4)
        assert float(row['centroid_y_px']) == pytest.approx(ys.mean() + 0.5, abs=1e-4)
        assert (int(row['box_x0_px']), int(row['box_y1_px'])) == (xs.min(), ys.max() + 1)
        for c, name in enumerate(('red', 'green', 'blue')):
            assert float(row[f'mean_{name}']) == pytest.approx(image[mask][:, c].mean(), abs=1e-4)


def test_coco_results_are_read_back(tmp_path: Path) -> None:
    instances = shapes_set()
    export.write_coco(tmp_path / 'r.json', [instances])
    records = json.loads((tmp_path / 'r.json').read_text())
    ranked = instances.by_score()
    assert [r['category_id'] for r in records] == (ranked.class_ids + 1).tolist()
    for record, mask in zip(records, ranked.masks(), strict=True):
        assert np.array_equal(coco_mask.decode(record['segmentation']).astype(bool), mask)


def write_all(folder: Path, instances: InstanceSet) -> dict[str, bytes]:
    export.write_label_map(folder / 'a.tif', instances)
    export.write_geojson(folder / 'a.geojson', instances, NAMES, COLOURS)
    export.write_imagej_rois(folder / 'a.zip', instances, NAMES)
    export.write_cells_csv(folder / 'a.csv', instances, NAMES)
    export.write_coco(folder / 'a.json', [instances])
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_bytes_repeat_and_nothing_else_is_left(tmp_path: Path) -> None:
    first, second = tmp_path / '1', tmp_path / '2'
    found = write_all(first, random_set(2))
    assert list(found) == ['a.csv', 'a.geojson', 'a.json', 'a.tif', 'a.zip']
    assert found == write_all(second, random_set(2))


def test_a_class_without_name_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    instances = random_set(2)
    for write in (
        lambda: export.write_geojson(tmp_path / 'a', instances, NAMES[:1], COLOURS),
        lambda: export.write_imagej_rois(tmp_path / 'a.zip', instances, NAMES[:1]),
        lambda: export.write_cells_csv(tmp_path / 'a.csv', instances, NAMES[:1]),
    ):
        with pytest.raises(ConfigError, match='give one per class'):
            write()
    assert not list(tmp_path.iterdir())


def test_describe_tells_what_was_left_out(tmp_path: Path) -> None:
    crop = np.ones((2, 2), dtype=bool)
    instances = make_set([crop, crop, np.zeros((1, 1), bool)], [(0, 0)] * 3)
    exported = {'label-map': export.write_label_map(tmp_path / 'a.tif', instances)}
    assert export.describe(exported) == (
        'label-map: 1 cells without a pixel, 1 cells hidden by better ones, '
        '4 px lost to better cells'
    )


# ------------------------------------------------------------------------------- micrometres

UM = (0.5, 0.25)  # height and width: not square, so that swapped ones show


def test_a_table_in_micrometres(tmp_path: Path) -> None:
    instances = random_set(3, n=12)
    features = measure.measure(instances)
    export.write_cells_csv(tmp_path / 'a.csv', instances, NAMES, features=features, um_per_px=UM)
    export.write_cells_csv(tmp_path / 'px.csv', instances, NAMES, features=features)
    rows = list(csv.DictReader((tmp_path / 'a.csv').read_text().splitlines()))
    plain = list(csv.DictReader((tmp_path / 'px.csv').read_text().splitlines()))
    assert tuple(rows[0])[-4:] == export.UM_COLUMNS
    for row, px in zip(rows, plain, strict=True):
        um = [row.pop(name) for name in export.UM_COLUMNS]
        assert row == px
        if px['area_px'] == '0':
            assert um == [''] * 4
            continue
        expected = [
            int(px['area_px']) * 0.125,
            float(px['centroid_x_px']) * 0.25,
            float(px['centroid_y_px']) * 0.5,
            float(px['perimeter_px']) * 0.375,
        ]
        assert np.allclose([float(value) for value in um], expected, atol=1e-4)  # 4 decimals


def test_geojson_has_measurements_in_micrometres(tmp_path: Path) -> None:
    instances = shapes_set()
    features = measure.measure(instances)
    path = tmp_path / 'a.geojson'
    export.write_geojson(path, instances, NAMES, COLOURS, features=features, um_per_px=UM)
    for feature in json.loads(path.read_text(encoding='utf-8'))['features']:
        found = feature['properties']['measurements']
        assert found['Area µm^2'] == found['Area px^2'] * 0.125
        assert found['Perimeter µm'] == found['Perimeter px'] * 0.375


def test_a_label_map_says_how_large_its_pixels_are(tmp_path: Path) -> None:
    export.write_label_map(tmp_path / 'm.tif', shapes_set(), um_per_px=UM)
    with tifffile.TiffFile(tmp_path / 'm.tif') as file:
        tags = file.pages[0].tags
        across, down = (tags[name].value for name in ('XResolution', 'YResolution'))
        assert tags['ResolutionUnit'].value == 3  # centimetre
    assert (across[0] / across[1], down[0] / down[1]) == (40_000, 20_000)

"""Exports are read back by the libraries that own the formats, and compared pixel by pixel."""

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
from skimage.measure import regionprops

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.results import export, measure, polygons

NAMES = ('epithelial', 'lymphocyte/T', 'neutrophil', 'macrophage')
COLOURS = [(0, 114, 178), (213, 94, 0), (240, 228, 66), (0, 158, 115)]

# Each provokes: a plain cell; one pixel; a hole; two parts; parts that touch in a corner; a hole
# that touches the outside in a corner; two holes that touch; a part inside a hole; no pixel.
SHAPES = {
    'F': ['111', '100', '110', '100'],
    'one pixel': ['1'],
    'hole': ['1111', '1001', '1111'],
    'two parts': ['1001', '1101'],
    'corner': ['110', '110', '001'],
    'open hole': ['0111', '1011', '1111'],
    'closed diamond': ['0110', '1001', '0110'],
    'two holes': ['11111', '10111', '11011', '11111'],
    'island': ['11111', '10001', '10101', '10001', '11111'],
    'crossing': ['10101', '01010', '10101'],
    'nothing': [],
}


def crop_of(rows: list[str]) -> np.ndarray:
    if not rows:
        return np.zeros((0, 0), dtype=bool)
    return np.array([[c == '1' for c in row] for row in rows])


def make_set(crops, offsets, image_hw=(60, 71), scores=None, name='a b') -> InstanceSet:
    rng = np.random.default_rng(len(crops))
    scores = rng.permutation(np.linspace(0.1, 0.9, len(crops))) if scores is None else scores
    class_ids = rng.integers(0, 4, len(crops))
    return InstanceSet.from_crops(
        name,
        7,
        image_hw,
        crops=crops,
        offsets_yx=np.array(offsets).reshape(-1, 2),
        class_ids=class_ids,
        scores=scores,
    )


def shapes_set() -> InstanceSet:
    crops = [crop_of(rows) for rows in SHAPES.values()]
    return make_set(crops, [(3 + 5 * i, 60 - 5 * i) for i in range(len(crops))])


def random_set(seed: int, n: int = 12) -> InstanceSet:
    """Overlapping noise masks: every kind of corner contact occurs, also at the image's edge."""
    rng = np.random.default_rng(seed)
    crops = [rng.random(rng.integers(1, 14, 2)) < rng.uniform(0.2, 0.95) for _ in range(n)]
    offsets = [rng.integers(0, np.array((60, 71)) - c.shape + 1) for c in crops]
    offsets[0] = (60 - crops[0].shape[0], 71 - crops[0].shape[1])
    offsets[1] = (0, 0)
    return make_set(crops, offsets)


SETS = [
    pytest.param(shapes_set(), id='shapes'),
    *(pytest.param(random_set(seed), id=f'seed {seed}') for seed in range(20)),
]
EMPTY = InstanceSet.empty('none', 1, (60, 71))


def pixels_inside(geometry, image_hw) -> np.ndarray:
    rows, columns = np.mgrid[: image_hw[0], : image_hw[1]]
    return shapely.contains_xy(geometry, columns + 0.5, rows + 0.5)


def as_shapely(parts) -> shapely.MultiPolygon:
    return shapely.MultiPolygon([(p.exterior, list(p.holes)) for p in parts])


# -------------------------------------------------------------------------------- polygons


@pytest.mark.parametrize('instances', SETS)
def test_polygons_hold_exactly_the_masks_pixels(instances: InstanceSet) -> None:
    parts = polygons.trace_polygons(*instances.crops())
    for mask, area, polygon in zip(instances.masks(), instances.areas, parts, strict=True):
        shape = as_shapely(polygon)
        assert shape.is_valid, shapely.is_valid_reason(shape)
        assert shape.area == area
        assert np.array_equal(pixels_inside(shape, instances.image_hw), mask)


@pytest.mark.parametrize(
    ('rows', 'n_holes'),
    [
        pytest.param(SHAPES['F'], [0], id='plain'),
        pytest.param(SHAPES['hole'], [1], id='hole'),
        pytest.param(SHAPES['corner'], [0, 0], id='corner contact separates'),
        pytest.param(SHAPES['open hole'], [1], id='hole touching the outside stays a hole'),
        pytest.param(SHAPES['closed diamond'], [0, 0, 0, 0], id='no connected ring'),
        pytest.param(SHAPES['two holes'], [2], id='touching holes'),
        pytest.param(SHAPES['island'], [1, 0], id='island in a hole'),
        pytest.param(SHAPES['nothing'], [], id='nothing'),
    ],
)
def test_parts_and_holes(rows: list[str], n_holes: list[int]) -> None:
    (parts,) = polygons.trace_polygons([crop_of(rows)], [(5, 3)])
    assert [len(p.holes) for p in parts] == n_holes


def test_ring_of_a_known_shape() -> None:
    # F: 3 wide, 4 high, at x 10, y 20; corners in walking order, clockwise on a screen
    (parts,) = polygons.trace_polygons([crop_of(SHAPES['F'])], [(20, 10)])
    expected = [(0, 0), (3, 0), (3, 1), (1, 1), (1, 2), (2, 2), (2, 3), (1, 3), (1, 4), (0, 4)]
    assert (parts[0].exterior - (10, 20)).tolist() == [list(corner) for corner in expected]


def test_exteriors_turn_against_holes() -> None:
    (parts,) = polygons.trace_polygons([crop_of(SHAPES['hole'])], [(0, 0)])
    rings = [shapely.LinearRing(ring) for ring in parts[0].rings]
    assert [ring.is_ccw for ring in rings] == [True, False]  # by numbers, as RFC 7946


@pytest.mark.parametrize('max_pixels', [1, 50, 400])
def test_canvas_size_changes_nothing(max_pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    instances = random_set(3, n=40)
    whole = polygons.trace_polygons(*instances.crops())
    stack = polygons.stack_crops
    monkeypatch.setattr(polygons, 'stack_crops', lambda c: stack(c, max_pixels=max_pixels))
    pieces = polygons.trace_polygons(*instances.crops())
    as_lists = [[[r.tolist() for r in p.rings] for p in parts] for parts in whole]
    assert as_lists == [[[r.tolist() for r in p.rings] for p in parts] for parts in pieces]


# -------------------------------------------------------------------------------- features


def as_ids(instances: InstanceSet) -> np.ndarray:
    """Each mask of a set without overlaps as its own label map, for regionprops."""
    return instances.masks().astype(np.int32)


@pytest.mark.parametrize('instances', SETS)
def test_features_equal_scikit_image(instances: InstanceSet) -> None:
    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (*instances.image_hw, 3)).astype(np.uint8)
    found = measure.measure(instances, image)
    for i, label_map in enumerate(as_ids(instances)):
        if not label_map.any():
            assert found.areas[i] == 0
            assert np.isnan(found.centroids_yx[i]).all()
            assert np.isnan([found.perimeters[i], found.eccentricities[i]]).all()
            assert np.isnan(found.mean_intensities[i]).all()
            continue
        (props,) = regionprops(label_map, intensity_image=image)
        top, left, bottom, right = props.bbox
        assert found.areas[i] == props.area
        assert found.boxes_xyxy[i].tolist() == [left, top, right, bottom]
        np.testing.assert_allclose(found.centroids_yx[i], props.centroid, rtol=1e-12)
        np.testing.assert_allclose(found.perimeters[i], props.perimeter, rtol=1e-12)
        # sqrt(1 - small / large) turns an error of 1e-15 into one of 3e-8 near a disc
        np.testing.assert_allclose(found.eccentricities[i], props.eccentricity, atol=1e-7)
        np.testing.assert_allclose(found.mean_intensities[i], props.mean_intensity, rtol=1e-12)


def test_features_do_not_lose_digits_far_from_the_origin() -> None:
    crop = crop_of(SHAPES['F'])
    near = make_set([crop], [(0, 0)], image_hw=(20_000, 20_000))
    far = make_set([crop], [(19_990, 19_990)], image_hw=(20_000, 20_000))
    a, b = measure.measure(near), measure.measure(far)
    assert a.eccentricities == b.eccentricities
    assert a.perimeters == b.perimeters
    assert (b.centroids_yx - a.centroids_yx == 19_990).all()


def test_regions_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, 'BLOCK_PX', 16)
    instances = random_set(1, n=40)
    image = np.random.default_rng(0).integers(0, 256, (60, 71, 3)).astype(np.uint8)
    largest = []

    def read(y0: int, x0: int, y1: int, x1: int) -> np.ndarray:
        largest.append((y1 - y0) * (x1 - x0))
        return image[y0:y1, x0:x1]

    by_blocks = measure.measure(instances, read).mean_intensities
    np.testing.assert_array_equal(by_blocks, measure.measure(instances, image).mean_intensities)
    assert max(largest) <= (16 + 13 * 2) ** 2  # a block and the cells that reach out of it


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    instances = random_set(2, n=40)
    image = np.random.default_rng(0).integers(0, 256, (60, 71, 3)).astype(np.uint8)
    whole = measure.measure(instances, image)
    monkeypatch.setattr(measure, 'CHUNK', 7)
    monkeypatch.setattr(measure, 'BLOCK_PX', 16)
    pieces = measure.measure(instances, image)
    for name in measure.CellFeatures.__slots__:
        np.testing.assert_array_equal(getattr(whole, name), getattr(pieces, name), err_msg=name)


def test_features_of_an_image_of_another_size() -> None:
    with pytest.raises(ValueError, match='image has shape'):
        measure.measure(random_set(0), np.zeros((3, 3, 3), np.uint8))


# ------------------------------------------------------------------------------- label map


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


# --------------------------------------------------------------------------------- GeoJSON


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


def test_geojson_object_types(tmp_path: Path) -> None:
    export.write_geojson(tmp_path / 'a', shapes_set(), NAMES, COLOURS, object_type='cell')
    kinds = {
        f['properties']['objectType'] for f in json.loads((tmp_path / 'a').read_text())['features']
    }
    assert kinds == {'cell'}
    with pytest.raises(ConfigError, match='expected detection, cell or annotation'):
        export.write_geojson(tmp_path / 'a', shapes_set(), NAMES, COLOURS, object_type='tile')


# ---------------------------------------------------------------------------------- ImageJ


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


# -------------------------------------------------------------------------- table and COCO


def test_table(tmp_path: Path) -> None:
    instances = shapes_set()
    image = np.random.default_rng(5).integers(0, 256, (60, 71, 3)).astype(np.uint8)
    exported = export.write_cells_csv(tmp_path / 'c.csv', instances, NAMES, image=image)
    rows = list(csv.DictReader((tmp_path / 'c.csv').open()))
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


# --------------------------------------------------------------------------------- general


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

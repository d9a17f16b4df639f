"""QuPath's objects arrive as drawn; what is no cell is counted as what it is."""

from __future__ import annotations

import json
from pathlib import Path

import geojson
import numpy as np
import pytest

from cellseg_mm.core.errors import CellSegError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data.importing.geojson import find_geojson
from cellseg_mm.results import export
from tests.support.import_sources import (
    cells_of_set,
    manifest,
    read_cells,
    run,
    stored,
    write_image,
)
from tests.support.odd_masks import COLOURS, NAMES, SETS


def square(x: float, y: float, side: float) -> list[list[float]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def feature(*rings: list, name: object = 'tumor', kind: str = 'detection', **more: object) -> dict:
    properties = {'objectType': kind, 'classification': {'name': name, 'color': [200, 0, 0]}}
    properties |= more.pop('properties', {})
    geometry = {'type': 'Polygon', 'coordinates': list(rings)}
    return {'type': 'Feature', 'geometry': geometry, 'properties': properties, **more}


def source(folder: Path, content: object, name: str = 'a.geojson') -> Path:
    write_image(folder / 'a.png')
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, encoding='utf-8')
    return folder


def collection(*features: object) -> dict:
    return {'type': 'FeatureCollection', 'features': list(features)}


@pytest.mark.parametrize('instances', SETS[:8])
def test_our_own_export_comes_back_pixel_by_pixel(tmp_path: Path, instances: InstanceSet) -> None:
    write_image(tmp_path / 'a.png', instances.image_hw)
    path = tmp_path / 'a.geojson'
    export.write_geojson(path, instances, NAMES, COLOURS)
    ours = path.read_text()
    assert ours.count('"detection"') == sum(area > 0 for area in instances.areas)
    for kind in ('detection', 'cell'):  # as QuPath calls them after its own steps
        path.write_text(ours.replace('"detection"', f'"{kind}"'))
        cells, _ = read_cells(find_geojson, tmp_path, class_names=NAMES, binary='ids')
        assert cells == cells_of_set(instances)


def test_the_library_of_the_format_writes_what_is_read(tmp_path: Path) -> None:
    polygon = geojson.Polygon([[(2, 2), (9, 2), (9, 8), (2, 8), (2, 2)]])
    parts = geojson.MultiPolygon([[square(12, 2, 3), square(13, 3, 1)], [square(12, 8, 2)]])
    rows = [
        geojson.Feature(geometry=polygon, properties={'classification': {'name': 'tumor'}}),
        geojson.Feature(geometry=parts, properties={'classification': 'stroma'}),
    ]
    source(tmp_path / 'in', geojson.dumps(geojson.FeatureCollection(rows)))
    report = run('geojson', tmp_path / 'in', tmp_path / 'out')
    assert report.class_names == ('stroma', 'tumor')
    masks = stored(tmp_path / 'out', 'a')
    assert masks[1][0].sum() == 9 - 1 + 4
    assert masks[2][0].tolist() == np.pad(np.ones((6, 7), bool), ((2, 9), (2, 14))).tolist()


@pytest.mark.parametrize(
    ('classification', 'name'),
    [
        pytest.param({'name': 'tumor', 'color': [1, 2, 3]}, 'tumor', id='new'),
        pytest.param({'name': 'tumor', 'colorRGB': -3670016}, 'tumor', id='old'),
        pytest.param({'names': ['tumor', 'Positive']}, 'tumor: Positive', id='derived'),
        pytest.param('tumor', 'tumor', id='text'),
    ],
)
@pytest.mark.parametrize('form', ['collection', 'list', 'feature'])
def test_forms_of_classes_and_files(
    tmp_path: Path, classification: object, name: str, form: str
) -> None:
    one = feature(square(2, 2, 5), properties={'classification': classification})
    content = {'collection': collection(one), 'list': [one], 'feature': one}[form]
    report = run('geojson', source(tmp_path / 'in', content), tmp_path / 'out')
    assert report.class_names == (name,)
    assert stored(tmp_path / 'out', 'a')[1][0].sum() == 25


def test_cells_give_their_outline_or_their_nucleus(tmp_path: Path) -> None:
    nucleus = {'type': 'Polygon', 'coordinates': [square(4, 4, 2)]}
    cell = feature(square(2, 2, 6), kind='cell', nucleusGeometry=nucleus)
    folder = source(tmp_path / 'in', collection(cell))
    report = run('geojson', folder, tmp_path / 'cells')
    assert report.left_out == {'nuclei inside cells': 1}
    assert stored(tmp_path / 'cells', 'a')[1][0].sum() == 36
    report = run('geojson', folder, tmp_path / 'nuclei', nuclei=True)
    assert report.left_out == {'outlines of cells around nuclei': 1}
    assert stored(tmp_path / 'nuclei', 'a')[1][0].sum() == 4


def test_what_is_no_cell_is_counted_as_what_it_is(tmp_path: Path) -> None:
    cells = [feature(square(x, 2, 4)) for x in (2, 8, 14)]
    line = {'type': 'LineString', 'coordinates': [[1, 1], [5, 5]]}
    others = [
        feature(square(0, 0, 16), kind='annotation', name='region'),
        feature(square(2, 9, 3), kind='annotation'),  # a cell drawn by hand
        feature(square(2, 9, 3), kind='tile'),
        feature(square(7, 9, 3), name='Ignore*'),
        {**feature(), 'geometry': line},
        {**feature(), 'geometry': None},
        {**feature(), 'geometry': {**cells[0]['geometry'], 'plane': {'c': -1, 'z': 2, 't': 0}}},
        feature([[1, 1], [2, 2]]),
        feature([[1, 1], ['x', 2], [3, 3]]),
        feature(square(5000, 5000, 4)),
        feature(square(8, 9, 1e7)),
        'text',
    ]
    folder = source(tmp_path / 'in', collection(*cells, *others))
    report = run('geojson', folder, tmp_path / 'out', skipped=frozenset(['region']))
    assert report.problems == ()
    assert report.class_names == ('tumor',)
    assert len(stored(tmp_path / 'out', 'a')[1]) == 5
    assert report.left_out == {
        'annotations around two or more other objects (regions)': 1,
        'objects that are tiles or cores': 1,
        'outlines of class Ignore*': 1,
        'objects without an area (points, lines, nothing)': 2,
        'objects on another plane than the first (z or t)': 1,
        'outlines with fewer than 3 points': 1,
        'outlines with a point that is no number of pixels': 1,
        'outlines without a pixel in the image': 1,
        'entries that are no features': 1,
    }
    assert any('1 cells reach beyond the image' in note for note in report.notes)


def test_objects_without_a_class(tmp_path: Path) -> None:
    rows = [feature(square(2, 2, 4)), feature(square(8, 2, 4), properties={'classification': None})]
    folder = source(tmp_path / 'in', rows)
    report = run('geojson', folder, tmp_path / 'out')
    assert report.left_out == {'outlines without a class (--class names one for them)': 1}
    report = run('geojson', folder, tmp_path / 'named', single_class='other')
    assert report.class_names == ('tumor', 'other')
    assert manifest(tmp_path / 'named')[0]['c2'] == '1'


def test_an_unknown_class_stops_its_image_only(tmp_path: Path) -> None:
    folder = source(tmp_path / 'in', [feature(square(2, 2, 4))])
    write_image(folder / 'b.png')
    (folder / 'b.geojson').write_text(json.dumps([feature(square(2, 2, 4), name='stroma')]))
    report = run('geojson', folder, tmp_path / 'out', class_names=('tumor',))
    assert [row['uuid'] for row in report.rows] == ['a']
    assert "b.geojson: has cells of class 'stroma'; expected tumor" in report.problems[0]


def test_objects_of_another_slide_are_left_out_by_name(tmp_path: Path) -> None:
    rows = [
        feature(square(2, 2, 4), properties={'image': 'C:\\slides\\a.png'}),
        feature(square(8, 2, 4), properties={'Image': 'b.svs'}),
        feature(square(8, 8, 4), slide='a'),
    ]
    report = run('geojson', source(tmp_path / 'in', rows), tmp_path / 'out')
    assert len(stored(tmp_path / 'out', 'a')[1]) == 2
    assert any('1 objects of another image left out (object 2 of b.svs)' in n for n in report.notes)


def test_doubles_go_and_shared_ids_are_said(tmp_path: Path) -> None:
    one, other = feature(square(2, 2, 4), id='x'), feature(square(8, 2, 4), id='x')
    early = [feature(square(x, 9, 3), id='PathDetectionObject') for x in (2, 8)]
    for row in early:
        del row['properties']['objectType']
    folder = source(tmp_path / 'in', [one, one, other, *early])
    report = run('geojson', folder, tmp_path / 'out')
    assert report.left_out == {'objects that occur twice': 1}
    assert len(stored(tmp_path / 'out', 'a')[1]) == 4
    assert any('1 objects have the id of another one' in note for note in report.notes)


def test_one_object_of_all_cells_is_refused_or_taken_apart(tmp_path: Path) -> None:
    """CellViT writes one MultiPolygon a class."""
    parts = [[square(x, y, 3)] for x in (1, 6, 11) for y in (1, 6)]
    row = {**feature(), 'geometry': {'type': 'MultiPolygon', 'coordinates': parts}}
    folder = source(tmp_path / 'in', [row])
    assert '--binary components' in run('geojson', folder, tmp_path / 'out').problems[0]
    run('geojson', folder, tmp_path / 'out', binary='components')
    assert len(stored(tmp_path / 'out', 'a')[1]) == 6


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        pytest.param('{"type": "FeatureColl', 'not valid JSON', id='torn'),
        pytest.param('\x00\x01', 'not valid JSON', id='bytes'),
        pytest.param('3', 'no list of features', id='number'),
        pytest.param({'shapes': []}, 'the keys shapes', id='labelme'),
        pytest.param([feature(square(99, 99, 4))], 'no cell can be used', id='all outside'),
        pytest.param([{'geometry': {'type': 'Polygon'}}], 'no cell can be used', id='empty'),
    ],
)
def test_a_file_that_cannot_be_used_costs_its_image_only(
    tmp_path: Path, content: object, message: str
) -> None:
    folder = source(tmp_path / 'in', content)
    write_image(folder / 'b.png')
    (folder / 'b.geojson').write_text(json.dumps([feature(square(2, 2, 4))]))
    report = run('geojson', folder, tmp_path / 'out')
    assert message in report.problems[0]
    assert [row['uuid'] for row in report.rows] == ['b']
    assert sorted(p.name for p in (tmp_path / 'out' / 'train').iterdir()) == ['b']


def test_images_are_found_by_name_or_named_as_missing(tmp_path: Path) -> None:
    folder = source(tmp_path / 'in', [feature(square(2, 2, 4))], name='a.png.geojson')
    (folder / 'gone.geojson').write_text(json.dumps([feature(square(2, 2, 4))]))
    write_image(folder / 'idle.png')
    report = run('geojson', folder, tmp_path / 'out')
    assert [row['uuid'] for row in report.rows] == ['a']
    assert 'gone.geojson: has 0 images of the name gone' in report.problems[0]
    assert any('1 images without annotations were not used (idle.png)' in n for n in report.notes)
    elsewhere = tmp_path / 'elsewhere'
    write_image(elsewhere / 'gone.tif')
    file = folder / 'gone.geojson'
    report = run('geojson', file, tmp_path / 'one', image_dir=elsewhere)
    assert [row['uuid'] for row in report.rows] == ['gone']
    with pytest.raises(CellSegError, match='nothing to import as geojson'):
        run('geojson', elsewhere, tmp_path / 'none')

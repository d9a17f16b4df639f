"""napari's plugin, through npe2: what is opened and saved, and that labels are the same cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from npe2 import PluginManager, PluginManifest, read, write
from PIL import Image

import cellseg_mm.viewers
from cellseg_mm.core.errors import CellSegError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data.case_writer import write_case as write_whole_case
from cellseg_mm.data.image_reader import SUFFIXES
from cellseg_mm.results.export import write_geojson, write_label_map
from cellseg_mm.results.predictions import Predictions, save_predictions
from cellseg_mm.viewers import napari_reader
from cellseg_mm.viewers.napari_reader import get_reader, read_layers
from tests.support.import_sources import HW, IMAGE, f_mask, numbered

MANIFEST = Path(cellseg_mm.viewers.__file__).with_name('napari.yaml')
MASKS = [f_mask(1, 1), f_mask(9, 8), f_mask(1, 15)]
COLOURS = [(255, 0, 0), (0, 0, 255)]
CELLS = InstanceSet.from_crops(
    'a',
    1,
    HW,
    crops=MASKS,
    offsets_yx=np.zeros((3, 2), np.int64),
    class_ids=np.array([1, 0, 1]),
    scores=np.array([0.6, 0.9, 0.7], np.float32),
)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> str:
    """The plugin in a manager of its own; napari has one for the process."""
    manager = PluginManager()
    manager.register(PluginManifest.from_file(MANIFEST))
    monkeypatch.setattr(PluginManager, 'instance', lambda: manager)
    monkeypatch.setattr(manager, 'discover', lambda *_, **__: 0)  # what else is installed
    return 'cellseg-mm'


def case(folder: Path) -> Path:
    """A case below a data folder whose classes have names."""
    maps = {2: numbered(MASKS[:2], [4, 9]), 1: numbered(MASKS[2:], [1])}
    write_whole_case(folder / 'train' / 'a', IMAGE, maps)
    (folder / 'import.json').write_text(json.dumps({'classes': ['x', 'y']}))
    return folder / 'train' / 'a'


def test_a_case_goes_through_napari_and_back(tmp_path: Path, plugin: str) -> None:
    layers = read([str(case(tmp_path))], stack=False, plugin_name=plugin)
    assert [(kind, attributes['name']) for _, attributes, kind in layers] == [
        ('image', 'a'),
        ('labels', 'a: x'),
        ('labels', 'a: y'),
    ]
    assert (layers[0][0] == IMAGE).all()
    assert (layers[2][0] == numbered(MASKS[:2], [4, 9])).all()
    layers[2][0][MASKS[0]] = 0  # a person removes a cell, and all of the other class
    layers[1][0][:] = 0
    written = write(str(tmp_path / 'new'), layers, plugin_name=plugin)
    assert sorted(Path(path).name for path in written) == ['class2.tif', 'image.tif']
    image = tifffile.imread(tmp_path / 'new' / 'image.tif')
    assert (image[..., :3] == IMAGE).all()
    label_map = tifffile.imread(tmp_path / 'new' / 'class2.tif')
    assert label_map.dtype == np.float64  # as the cases of the collection
    assert (label_map == numbered(MASKS[1:2], [9])).all()


def test_a_corrected_layer_replaces_its_file_only(tmp_path: Path, plugin: str) -> None:
    folder = case(tmp_path)
    before = (folder / 'image.tif').read_bytes()
    layers = read_layers(str(folder / 'class1.tif'))
    layers[0][0][:] = 0  # no cell is left
    assert write(str(folder), layers, plugin_name=plugin) == []
    assert sorted(path.name for path in folder.iterdir()) == ['class2.tif', 'image.tif']
    assert (folder / 'image.tif').read_bytes() == before


def assert_results(layers: list[Any]) -> None:
    """Two classes; each label of the features is the mask of its cell."""
    assert [attributes['metadata']['class_number'] for _, attributes, _ in layers] == [1, 2]
    found = {}
    for labels, attributes, kind in layers:
        assert kind == 'labels'
        features = attributes['features']
        assert sorted(features['index']) == np.unique(labels[labels > 0]).tolist()
        for label, name, score in zip(
            features['index'], features['class'], features['score'], strict=True
        ):
            found[round(score, 2)] = name, (labels == label).tolist()
    expected = {0.6: ('y', MASKS[0]), 0.9: ('x', MASKS[1]), 0.7: ('y', MASKS[2])}
    assert found == {score: (name, mask.tolist()) for score, (name, mask) in expected.items()}


def test_results_become_a_layer_for_each_class(tmp_path: Path, plugin: str) -> None:
    path = tmp_path / 'a.npz'
    save_predictions(path, Predictions((CELLS,), {'class_names': ['x', 'y']}))
    layers = read([str(path)], stack=False, plugin_name=plugin)
    assert_results(layers)
    assert layers[0][0].shape == HW
    assert layers[0][1]['name'] == 'a (score 0.5 and more): x'
    write_geojson(tmp_path / 'a.geojson', CELLS, ('x', 'y'), COLOURS)
    layers = read([str(tmp_path / 'a.geojson')], stack=False, plugin_name=plugin)
    padded = [  # a GeoJSON does not say how large the picture is
        (np.pad(data, [(0, n - m) for n, m in zip(HW, data.shape, strict=True)]), *rest)
        for data, *rest in layers
    ]
    assert_results(padded)
    blue = layers[1][1]['colormap'][None]
    assert blue == (0.0, 0.0, 1.0, 1.0)


def test_exported_label_maps_and_pictures(tmp_path: Path, plugin: str) -> None:
    write_label_map(tmp_path / 'a.labels.tif', CELLS)
    Image.fromarray(IMAGE).save(tmp_path / 'b.png')
    paths = [str(tmp_path / name) for name in ('a.labels.tif', 'b.png')]
    layers = [read([path], stack=False, plugin_name=plugin)[0] for path in paths]
    (labels, _, kind), (picture, attributes, _) = layers
    assert kind == 'labels'
    assert (labels == CELLS.by_score().to_label_map()).all()
    assert (picture == IMAGE).all()
    assert attributes == {'name': 'b', 'rgb': True}


def pyramid(path: Path) -> np.ndarray:
    """Two levels of noise."""
    picture = np.random.default_rng(0).integers(0, 256, (300, 200, 3)).astype(np.uint8)
    with tifffile.TiffWriter(path) as writer:
        options = {'photometric': 'rgb', 'tile': (64, 64), 'metadata': None}
        writer.write(picture, subifds=1, **options)
        writer.write(picture[::2, ::2], subfiletype=1, **options)
    return picture


def test_pyramids_are_read_where_they_are_looked_at(tmp_path: Path) -> None:
    pytest.importorskip('dask.array')
    picture = pyramid(tmp_path / 'p.tif')
    levels, attributes, _ = read_layers(str(tmp_path / 'p.tif'))[0]
    assert attributes['multiscale']
    assert [level.shape for level in levels] == [(300, 200, 3), (150, 100, 3)]
    assert (levels[0][7:90:2, 60:130].compute() == picture[7:90:2, 60:130]).all()
    assert (levels[1].compute() == picture[::2, ::2]).all()


def test_without_dask_the_level_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = pyramid(tmp_path / 'p.tif')
    monkeypatch.setitem(__import__('sys').modules, 'dask', None)
    monkeypatch.setattr(napari_reader, 'WHOLE_PX', 150 * 100)
    level, attributes, _ = read_layers(str(tmp_path / 'p.tif'))[0]
    assert (level == picture[::2, ::2]).all()
    assert attributes['scale'] == (2, 2)
    monkeypatch.setattr(napari_reader, 'WHOLE_PX', 10)
    with pytest.raises(CellSegError, match='expected at most 10 px without dask'):
        read_layers(str(tmp_path / 'p.tif'))


def test_other_files_are_left_to_others(tmp_path: Path) -> None:
    (tmp_path / 'empty').mkdir()
    for name in ('a.txt', 'a.csv', 'empty'):
        assert get_reader(str(tmp_path / name)) is None
    assert get_reader([]) is None
    assert get_reader([str(tmp_path / 'a.tif'), str(tmp_path / 'a.txt')]) is None


def test_bad_files_are_a_sentence(tmp_path: Path) -> None:
    many = Predictions((CELLS, InstanceSet.empty('b', 2, HW)), {})
    save_predictions(tmp_path / 'many.npz', many)
    with pytest.raises(CellSegError, match='holds 2 images; expected one'):
        read_layers(str(tmp_path / 'many.npz'))
    (tmp_path / 'a.geojson').write_text('{"features": [')
    with pytest.raises(CellSegError, match='not valid JSON'):
        read_layers(str(tmp_path / 'a.geojson'))
    rows = [{'geometry': {'type': 'Polygon', 'coordinates': [[[0, 0], [1e6, 0], [1e6, 1e6]]]}}]
    (tmp_path / 'a.geojson').write_text(json.dumps({'features': rows}))
    with pytest.raises(CellSegError, match='1000000 x 1000000 px; expected at most'):
        read_layers(str(tmp_path / 'a.geojson'))
    (tmp_path / 'a.geojson').write_text(json.dumps({'features': [3, {'geometry': None}]}))
    assert read_layers(str(tmp_path / 'a.geojson')) == []


def layer(name: str, data: np.ndarray, kind: str = 'labels', **attributes: object) -> Any:
    return data, {'name': name, **attributes}, kind


@pytest.mark.parametrize(
    ('layers', 'sentence'),
    [
        ([layer('cells', np.ones(HW, int))], 'layer cells: does not say which class it is'),
        ([layer('class 1', np.ones(HW, int))] * 2, 'expected one layer for each class'),
        ([layer('class 1', np.ones((2, *HW), int))], 'expected whole numbers in rows and columns'),
        ([layer('class 1', np.full(HW, -1))], 'has labels from -1 to -1'),
        ([layer('class 1', np.ones(HW, int))], 'has no image.tif, and no image is to be saved'),
        (
            [layer('i', IMAGE, 'image'), layer('class 1', np.ones((3, 3), int))],
            r'the layers have the sizes \[\(3, 3\), \(17, 23\)\]',
        ),
        ([layer('i', IMAGE / 255, 'image'), layer('class 1', np.ones(HW, int))], 'holds float64'),
    ],
)
def test_what_cannot_be_saved_is_a_sentence_and_writes_nothing(
    tmp_path: Path, plugin: str, layers: list[Any], sentence: str
) -> None:
    with pytest.raises(CellSegError, match=sentence):
        write(str(tmp_path / 'case'), layers, plugin_name=plugin)
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_is_found_and_names_what_is_read() -> None:
    text = (Path(__file__).resolve().parents[2] / 'pyproject.toml').read_text(encoding='utf-8')
    assert 'cellseg-mm = "cellseg_mm.viewers:napari.yaml"' in text
    manifest = PluginManifest.from_file(MANIFEST)
    manifest.validate_imports()
    patterns = manifest.contributions.readers[0].filename_patterns
    assert patterns == [f'*{suffix}' for suffix in (*SUFFIXES, '.geojson', '.npz')]

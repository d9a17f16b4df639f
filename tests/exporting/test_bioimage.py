"""BioImage.IO packages: what the library validates and runs, and what it refuses."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import cellseg_mm  # noqa: F401

pytest.importorskip('torch')
onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
spec = pytest.importorskip('bioimageio.spec')
core = pytest.importorskip('bioimageio.core')

import yaml  # noqa: E402

from cellseg_mm.core.errors import ConfigError  # noqa: E402
from cellseg_mm.exporting.bioimage import with_cells_alone, write_package  # noqa: E402
from tests.support.marker_model import CLASSES, marked_picture, marker_model  # noqa: E402

CARD = {
    'class_names': list(CLASSES),
    'red_blue_swapped': True,
    'half': False,
    'scores': None,
    'members': [{'fold': 0, 'source_hash': 'abc'}],
    'training': [
        {
            'split': 'train',
            'config': 'fold0.py',
            'red_blue_swapped': False,
            **dict.fromkeys(('iterations', 'seed', 'n_images', 'data_hash', 'fold_hash', 'commit')),
        }
    ],
    'made_with': {'code_commit': 'abc', 'versions': {'torch': '2'}},
    'summary': 'Finds markers',
    'authors': 'Ada Example; Bob Example',
    'licence': 'CC BY-NC-SA 4.0',
    'attribution': 'Verma et al., MoNuSAC2020, https://doi.org/10.1109/TMI.2021.3085712.',
}


@pytest.fixture(scope='module')
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    path = tmp_path_factory.mktemp('package') / 'markers.v1.zip'
    content = marker_model(um_per_px=0.25)
    return path, write_package(path, content, card=CARD, picture=marked_picture((150, 200)))


def test_a_package_is_valid_and_finds_its_cells(written: tuple[Path, list[str]]) -> None:
    path, said = written
    summary = core.test_model(path)
    assert summary.status == 'passed'
    assert len(said) == 1
    assert spec.__version__ in said[0]
    assert path.parent.exists()
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_what_is_inside(written: tuple[Path, list[str]]) -> None:
    with zipfile.ZipFile(written[0]) as archive:
        described = yaml.safe_load(archive.read('rdf.yaml'))
        page = archive.read('README.md').decode()
        cover = archive.read('cover.png')
    assert described['name'] == 'markers v1'
    assert described['description'] == 'Finds markers'
    assert described['license'] == 'CC-BY-NC-SA-4.0'
    assert [author['name'] for author in described['authors']] == ['Ada Example', 'Bob Example']
    assert described['cite'][0]['doi'] == '10.1109/TMI.2021.3085712'
    sides = described['inputs'][0]['axes'][:2]
    assert [(side['id'], side['scale'], side['unit']) for side in sides] == [
        ('y', 0.25, 'micrometer'),
        ('x', 0.25, 'micrometer'),
    ]
    assert [out['id'] for out in described['outputs']] == ['boxes', 'categories', 'scores', 'masks']
    assert described['config']['cellseg_mm']['class_names'] == list(CLASSES)
    assert '1 round, 2 square' in page
    assert 'MoNuSAC2020' in page
    assert 'Pictures: RGB in the natural order' in page
    assert 'red first, as it is.' in page
    width, height = (int.from_bytes(cover[at : at + 4], 'big') for at in (16, 20))  # PNG's header
    assert (width, height) == (300, 150)
    assert len(cover) < 500_000


def test_cells_below_the_threshold_are_left_out() -> None:
    picture = marked_picture((60, 60))
    content = marker_model()
    whole = onnxruntime.InferenceSession(content)
    boxes, classes, scores, masks, _ = whole.run(None, {'image': picture})
    kept = scores >= 0.52
    assert 0 < kept.sum() < len(kept)
    cut = onnxruntime.InferenceSession(with_cells_alone(content, 0.52))
    found = dict(
        zip([one.name for one in cut.get_outputs()], cut.run(None, {'image': picture}), strict=True)
    )
    np.testing.assert_array_equal(found['boxes'], boxes[kept])
    np.testing.assert_array_equal(found['categories'], classes[kept] + 1)
    np.testing.assert_array_equal(found['scores'], scores[kept])
    np.testing.assert_array_equal(found['masks'], masks[kept])


def test_what_the_collection_needs_is_said(tmp_path: Path) -> None:
    card = {key: value for key, value in CARD.items() if key not in ('authors', 'licence')}
    path = tmp_path / 'm.zip'
    said = write_package(path, marker_model(), card=card, picture=marked_picture((150, 150)))
    assert 'no model without authors and licence' in said[1]
    assert spec.load_description(path).name == 'm (cells)'


@pytest.mark.parametrize(
    ('changes', 'hw', 'part'),
    [
        pytest.param({'licence': 'all mine'}, (150, 150), 'refuses the description', id='licence'),
        pytest.param(
            {}, (100, 150), 'has 100 x 150 px and .* expected 128 px', id='too small a picture'
        ),
        pytest.param({}, (10, 150), 'and 0 cells with a score', id='no cell'),
    ],
)
def test_what_cannot_be_a_package_is_not_written(
    tmp_path: Path, changes: dict, hw: tuple[int, int], part: str
) -> None:
    with pytest.raises(ConfigError, match=part):
        write_package(
            tmp_path / 'model.zip',
            marker_model(),
            card={**CARD, **changes},
            picture=marked_picture(hw),
        )
    assert not list(tmp_path.iterdir())


def test_a_library_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'bioimageio.core', None)
    with pytest.raises(ConfigError, match=r"pip install -c constraints.txt -e '\.\[bioimageio\]'"):
        write_package(tmp_path / 'model.zip', marker_model(), card=CARD)

"""Corrections come back: pictures stay, old cells are kept, and origins are noted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_mm.core.errors import CellSegError
from cellseg_mm.core.files import file_hash
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data.case_writer import write_image
from cellseg_mm.data.importing import import_data as importers
from cellseg_mm.data.importing.import_data import ImportReport
from cellseg_mm.data.labels import find_cases, read_gt
from cellseg_mm.data.origins import read_origins
from cellseg_mm.data.pixel_size import of_case
from cellseg_mm.results.export import write_geojson
from tests.support.import_sources import HW, IMAGE, manifest, run
from tests.support.prepared_cases import write_case

NAMES = ('round', 'long')
COLOURS = ((255, 0, 0), (0, 255, 0))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder that another tool made: cases a and b, of a patient."""
    root = tmp_path / 'data'
    for name in 'ab':
        write_case(root, name)
        write_image(root / 'train' / name / 'image.tif', IMAGE, um_per_px=(0.25, 0.5))
    table = 'uuid,height,width,c1,c2,name,patient\na,1,1,0,0,slide 1,P1\nb,1,1,0,0,slide 2,P1\n'
    (root / 'manifest.csv').write_text(table)
    return root


def drawn(folder: Path, name: str, class_ids: tuple[int, ...] = (1,)) -> Path:
    """QuPath's file of one square a class id."""
    n = len(class_ids)
    cells = InstanceSet.from_crops(
        name,
        1,
        HW,
        crops=[np.ones((3, 3), dtype=bool)] * n,
        offsets_yx=np.array([[4 * i, 6] for i in range(n)]),
        class_ids=np.array(class_ids),
        scores=np.ones(n),
    )
    folder.mkdir(exist_ok=True)
    path = folder / f'{name}.geojson'
    write_geojson(path, cells, NAMES, COLOURS, to_review=np.arange(n))  # as annotations
    return folder


def correct(source: Path, data: Path, **options: object) -> ImportReport:
    given = {'class_names': NAMES, 'image_dir': data / 'train', 'add': True, **options}
    return run('geojson', source, data, **given)


def test_a_corrected_case_keeps_its_picture_and_what_it_was(tmp_path: Path, data: Path) -> None:
    source = drawn(tmp_path / 'drawn', 'a', (1, 1))
    (tmp_path / 'a.state.json').write_text('{"settings": "0123abcd"}')  # predict's, a folder above
    before = {path.name: path.read_bytes() for path in (data / 'train/a').iterdir()}
    report = correct(source, data, swap_red_blue=True)  # a picture that is there is never swapped
    assert report.problems == ()
    kept = data / 'replaced/a/1'
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert (data / 'train/a/image.tif').read_bytes() == before['image.tif']
    cases = find_cases(data, 'train', 2)
    assert [case.name for case in cases] == ['a', 'b']
    assert read_gt(cases[0]).class_ids.tolist() == [1, 1]
    rows = {row['uuid']: row for row in manifest(data)}
    assert (rows['a']['c2'], rows['a']['name'], rows['a']['patient']) == ('2', 'slide 1', 'P1')
    assert rows['b']['height'] == '1'  # as it was
    (entry,) = read_origins(data)['a']
    wanted = {
        'format': 'geojson',
        'file': 'a.geojson',
        'file_hash': file_hash(source / 'a.geojson')[:16],
        'kept': 'replaced/a/1',
        'predicted_with': '0123abcd',
    }
    assert {key: value for key, value in entry.items() if key != 'date'} == wanted
    correct(drawn(source, 'a', (0,)), data)
    assert [entry['kept'] for entry in read_origins(data)['a']] == ['replaced/a/1', 'replaced/a/2']
    assert [path.name for path in (data / 'replaced/a/2').glob('class*')] == ['class2.tif']


def test_a_new_case_brings_its_pixel_size(tmp_path: Path, data: Path) -> None:
    source = drawn(tmp_path / 'drawn', 'new')
    write_image(source / 'new.tif', IMAGE, um_per_px=(0.25, 0.5))
    correct(source, data, image_dir=None)
    assert of_case(data / 'train/new/image.tif').um_per_px == pytest.approx((0.25, 0.5))
    assert not (data / 'replaced').exists()
    (entry,) = read_origins(data)['new']
    assert (entry['kept'], entry['predicted_with']) == (None, None)
    assert [row['uuid'] for row in manifest(data)] == ['a', 'b', 'new']


def test_a_copy_of_the_picture_will_do_and_another_will_not(tmp_path: Path, data: Path) -> None:
    source = drawn(tmp_path / 'drawn', 'a')
    tifffile.imwrite(source / 'a.tif', IMAGE, photometric='rgb')
    assert correct(source, data, image_dir=None).problems == ()
    tifffile.imwrite(source / 'a.tif', IMAGE[:, ::-1], photometric='rgb')
    before = (data / 'train/a/class2.tif').read_bytes()
    (problem,) = correct(source, data, image_dir=None).problems
    assert 'is there with another picture; expected cells of that one; give --images' in problem
    assert (data / 'train/a/class2.tif').read_bytes() == before
    assert len(read_origins(data)['a']) == 1


def test_a_case_is_noted_before_it_changes(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(importers, 'write_case', full)
    before = (data / 'train/a/class1.tif').read_bytes()
    with pytest.raises(OSError, match='No space'):
        correct(drawn(tmp_path / 'drawn', 'a'), data)
    assert (data / 'train/a/class1.tif').read_bytes() == before
    assert 'a' in read_origins(data)  # it counts as corrected rather than as untouched


def test_what_is_not_known_is_not_guessed(tmp_path: Path, data: Path) -> None:
    source = drawn(tmp_path / 'drawn', 'a')
    with pytest.raises(CellSegError, match=r'does not say what its class1\.tif.*--classes'):
        correct(source, data, class_names=())
    (data / 'manifest.csv').unlink()
    report = correct(source, data)
    assert any('patients of new cases are not noted' in note for note in report.notes)
    assert not (data / 'manifest.csv').exists()  # a table of one case would hide the others
    for content in ('{', '{"version": 2, "cases": {}}', json.dumps([1])):
        (data / 'origins.json').write_text(content)
        with pytest.raises(CellSegError, match='nobody knows which they are'):
            read_origins(data)

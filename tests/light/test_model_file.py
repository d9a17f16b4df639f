"""Model files: whole ones come back, all others are one sentence."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest

from cellseg_mm.core.errors import CellSegError, CheckpointError
from cellseg_mm.light import model_file
from cellseg_mm.light.model_file import (
    MANIFEST,
    VERSION,
    ModelRecord,
    is_name,
    read_model_file,
    write_model_file,
)

RECORD = ModelRecord(
    class_names=('a', 'b'),
    class_colours=((1, 2, 3), (4, 5, 6)),
    red_blue_swapped=True,
    resize={'type': 'Resize', 'scale': [96, 96], 'keep_ratio': True},
    mask_frame=1.25,
    mask_thr=0.5,
    score_thr=0.01,
    max_per_img=20,
    member={'source_hash': 'x'},
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / 'model.cellseg'
    write_model_file(path, [b'first', b'second'], settings={'version': 1}, card={'name': 'he'})
    return path


def test_parts_come_back(path: Path) -> None:
    found = read_model_file(path)
    assert [member.content for member in found.members] == [b'first', b'second']
    assert found.settings == {'version': 1}
    assert found.card == {'name': 'he'}


def test_the_same_parts_make_the_same_file(path: Path, tmp_path: Path) -> None:
    again = tmp_path / 'again.cellseg'
    write_model_file(again, [b'first', b'second'], settings={'version': 1}, card={'name': 'he'})
    assert again.read_bytes() == path.read_bytes()


def test_every_cut_or_changed_byte_is_one_sentence(path: Path) -> None:
    whole = path.read_bytes()
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match='damaged'):
            read_model_file(path)
    at = whole.index(b'first')
    path.write_bytes(whole[:at] + b'F' + whole[at + 1 :])
    with pytest.raises(CheckpointError, match='damaged'):
        read_model_file(path)
    for at in range(0, len(whole), 5):  # some bytes, such as dates, mean nothing
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            found = read_model_file(path)
        except CellSegError:
            continue
        assert [member.content for member in found.members] == [b'first', b'second']


def rewrite(path: Path, **changes: object) -> None:
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    manifest = {**json.loads(parts[MANIFEST]), **changes}
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in {**parts, MANIFEST: json.dumps(manifest).encode()}.items():
            archive.writestr(name, content)


def test_a_part_that_is_not_what_the_manifest_says(path: Path) -> None:
    rewrite(path, parts={'member0.onnx': {'sha256': 'other'}})
    with pytest.raises(CheckpointError, match=r'member0.onnx is not what manifest.json says'):
        read_model_file(path)


def test_newer_and_foreign_files(path: Path, tmp_path: Path) -> None:
    rewrite(path, version=VERSION + 1)
    with pytest.raises(CheckpointError, match='take a newer cellseg_mm'):
        read_model_file(path)
    rewrite(path, format='theirs', version=VERSION)
    with pytest.raises(CheckpointError, match='no model of this project'):
        read_model_file(path)
    with pytest.raises(CheckpointError, match='there is no such model file'):
        read_model_file(tmp_path / 'none.onnx')


def test_models_of_the_package_are_found_by_name(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = tmp_path / 'box'
    box.mkdir()
    path.rename(box / 'he4.cellseg')
    monkeypatch.setattr(model_file, 'MODELS', box)
    monkeypatch.chdir(tmp_path)
    assert read_model_file('he4').card == {'name': 'he'}
    with pytest.raises(
        CheckpointError, match=r'He5: no model has this name; the nearest is he4; .*he4'
    ):
        read_model_file('He5')
    with pytest.raises(CheckpointError, match='name; expected one of he4, a model file'):
        read_model_file('fluorescence')
    (tmp_path / 'slides').mkdir()
    assert not is_name('slides')
    assert not is_name('none.onnx')
    assert not is_name('other/he4')
    (tmp_path / 'he4').mkdir()  # a folder of pictures may be called so
    assert is_name('he4')


def test_a_card_that_is_none(path: Path) -> None:
    rewrite(path, card=['he'])
    with pytest.raises(CheckpointError, match='has no card'):
        read_model_file(path)


def test_records_come_back() -> None:
    assert asdict(ModelRecord.from_json(RECORD.to_json(), 'x')) == asdict(RECORD)
    older = json.loads(RECORD.to_json())
    del older['um_per_px']
    assert ModelRecord.from_json(json.dumps(older), 'x') == RECORD


@pytest.mark.parametrize(
    ('changes', 'part'),
    [
        ({'version': 2}, 'format version 2'),
        ({'format': 'y'}, 'no model of this project'),
        ({'class_names': []}, 'make no sense'),
        ({'class_colours': 3}, 'damaged'),
        ({'mask_frame': 'wide'}, 'damaged'),
        ({'um_per_px': 0}, 'make no sense'),
        ({'resize': {'type': 'Warp'}}, 'Warp'),
    ],
)
def test_records_that_make_no_sense(changes: dict, part: str) -> None:
    text = json.dumps({**json.loads(RECORD.to_json()), **changes})
    with pytest.raises(CellSegError, match=part):
        ModelRecord.from_json(text, 'x')


@pytest.mark.parametrize('content', [b'', b'no model at all', b'\x08\x07' * 50])
def test_what_onnxruntime_cannot_load(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip('onnxruntime')
    from cellseg_mm.light.detector import OnnxModel

    path = tmp_path / 'model.onnx'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r'cannot load it|no model of this project'):
        OnnxModel(read_model_file(path).members[0])


@pytest.mark.parametrize('name', ['m.onnx', 'm.cellseg'])
def test_pipes_and_folders_are_no_model_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=r'is no file \(Is a directory\); expected'):
        read_model_file(tmp_path / name)
    (tmp_path / name).rmdir()
    os.mkfifo(tmp_path / name)  # opening it would wait for ever
    with pytest.raises(CheckpointError, match=r'is no file \(it is not a regular'):
        read_model_file(tmp_path / name)

"""results.predictions: what is saved comes back, and a damaged file is refused."""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from cellseg_mm.core.errors import PredictionError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.results import predictions
from cellseg_mm.results.predictions import (
    Predictions,
    load_predictions,
    save_predictions,
)
from tests.support.prediction_sets import FUZZ, PROVENANCE, assert_equal_sets, make_set, make_sets


@pytest.mark.parametrize('extras', [True, False])
def test_save_and_load(tmp_path: Path, extras: bool) -> None:
    sets = make_sets(extras=extras)
    save_predictions(tmp_path / 'p.npz', Predictions(sets, PROVENANCE))
    got = load_predictions(tmp_path / 'p.npz')
    assert_equal_sets(got.sets, sets)
    assert got.provenance == PROVENANCE
    got.sets[0].scores[0] = 0.5  # writable, as of any other origin
    with np.load(tmp_path / 'p.npz', allow_pickle=False) as arrays:  # plain numpy reads it
        assert arrays['offsets'].tolist() == [0, 5, 5, 6, 14]


def test_no_images(tmp_path: Path) -> None:
    save_predictions(tmp_path / 'p.npz', Predictions((), {}))
    assert load_predictions(tmp_path / 'p.npz') == Predictions((), {})


def test_equal_predictions_give_equal_bytes(tmp_path: Path) -> None:
    for name in ('a.npz', 'b.npz'):
        save_predictions(tmp_path / name, Predictions(make_sets(), PROVENANCE))
    assert (tmp_path / 'a.npz').read_bytes() == (tmp_path / 'b.npz').read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.npz', 'b.npz']


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    s = make_set('a', 1, (5, 5), 2)
    with pytest.raises(PredictionError, match="name 'a' occurs twice"):
        Predictions((s, make_set('a', 2, (5, 5), 1)))
    with pytest.raises(PredictionError, match='image_id 1 occurs twice'):
        Predictions((s, make_set('b', 1, (5, 5), 1)))
    with pytest.raises(ValueError, match='npz'):
        save_predictions(tmp_path / 'p.pkl', Predictions((s,)))
    with pytest.raises(ValueError, match='mask_probs'):
        save_predictions(
            tmp_path / 'p.npz', Predictions((s, make_set('b', 2, (5, 5), 1, extras=False)))
        )
    huge = InstanceSet.empty('huge', 3, (1, 1 << 21))
    with pytest.raises(ValueError, match='image size is out of range'):
        save_predictions(tmp_path / 'p.npz', Predictions((s, huge)))
    s.scores[0] = np.nan
    with pytest.raises(ValueError, match='score'):
        save_predictions(tmp_path / 'p.npz', Predictions((s,)))
    assert list(tmp_path.iterdir()) == []


def rewritten(path: Path, **changes: object) -> Path:
    """A copy of the file in which some arrays are others; None removes one."""
    with np.load(path) as arrays:
        content = {key: arrays[key] for key in arrays.files}
    content.update(changes)
    out = path.with_name('changed.npz')
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as archive:
        for key, value in content.items():
            if value is None:
                continue
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.asarray(value), allow_pickle=True)
            archive.writestr(f'{key}.npy', buffer.getvalue())
    return out


def header_with(**changes: object) -> np.ndarray:
    header = {
        'format': 'cellseg_mm predictions',
        'version': 1,
        'names': ['a', 'b'],
        'provenance': {},
        **changes,
    }
    return np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)


@pytest.mark.parametrize(
    'changes',
    [
        pytest.param({'scores': None}, id='array missing'),
        pytest.param({'scores': np.zeros(3)}, id='float64 scores'),
        pytest.param({'scores': np.zeros(2, np.float32)}, id='too few scores'),
        pytest.param({'scores': np.full(3, 1.5, np.float32)}, id='score above 1'),
        pytest.param({'scores': np.full(3, np.nan, np.float32)}, id='score NaN'),
        pytest.param({'scores': np.float32(0.5)}, id='score without axis'),
        pytest.param({'class_ids': np.array([0, -1, 0])}, id='negative class'),
        pytest.param({'boxes_xyxy': np.full((3, 4), np.inf, np.float32)}, id='infinite box'),
        pytest.param({'boxes_xyxy': np.zeros((3, 5), np.float32)}, id='box of five'),
        pytest.param({'offsets': np.array([0, 2, 1])}, id='falling offsets'),
        pytest.param({'offsets': np.array([1, 2, 3])}, id='offsets from one'),
        pytest.param({'offsets': np.array([0, 3])}, id='too few offsets'),
        pytest.param({'offsets': np.array([0, 9, 3])}, id='offset beyond'),
        pytest.param({'rle_lengths': np.array([1, 1, -2])}, id='negative length'),
        pytest.param(
            {'rle_lengths': np.array([2**63 - 1, 2**63 - 1, 11])}, id='lengths that overflow'
        ),
        pytest.param({'rle_bytes': np.zeros(9, np.uint8)}, id='not RLE'),
        pytest.param({'image_hws': np.array([[5, 5], [5, 6]])}, id='masks of another size'),
        pytest.param({'image_hws': np.array([[5, 5], [0, 5]])}, id='image without pixels'),
        pytest.param({'image_hws': np.array([[5, 5], [1, 2**40]])}, id='image too large'),
        pytest.param({'image_ids': np.array([1, 1])}, id='id twice'),
        pytest.param({'header': header_with(names=['a', 'a'])}, id='name twice'),
        pytest.param({'header': header_with(names=['a', 5])}, id='name is a number'),
        pytest.param({'header': header_with(names=['a'])}, id='too few names'),
        pytest.param({'header': header_with(version=2)}, id='newer version'),
        pytest.param({'header': header_with(format='other')}, id='other format'),
        pytest.param({'header': header_with(provenance=3)}, id='provenance is a number'),
        pytest.param({'header': np.frombuffer(b'\xff{', np.uint8)}, id='header no JSON'),
        pytest.param({'header': np.frombuffer(b'[' * 9**5, np.uint8)}, id='header nested'),
        pytest.param({'extra.n_votes': np.zeros(2)}, id='extra too short'),
        pytest.param({'surprise': np.zeros(3)}, id='unknown array'),
        pytest.param({'scores': np.array([1, 'a', None], dtype=object)}, id='pickle'),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    sets = (make_set('a', 1, (5, 5), 2), make_set('b', 2, (5, 5), 1))
    save_predictions(tmp_path / 'p.npz', Predictions(sets))
    assert len(load_predictions(rewritten(tmp_path / 'p.npz')).sets) == 2
    with pytest.raises(PredictionError, match=r'changed\.npz: .*predict again'):
        load_predictions(rewritten(tmp_path / 'p.npz', **changes))


def test_a_false_shape_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / 'p.npz'
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (4000000000000,), }"
    content = b'\x93NUMPY\x01\x00' + len(header).to_bytes(2, 'little') + header.encode()
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('scores.npy', content)
    with pytest.raises(PredictionError, match='cannot be read'):
        load_predictions(path)


def test_zip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, 'FREE_BYTES', 1 << 20)
    path = tmp_path / 'p.npz'
    with (
        zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive,
        archive.open('scores.npy', 'w') as stream,
    ):
        for _ in range(20):
            stream.write(bytes(1 << 20))
    with pytest.raises(PredictionError, match='unpacks to more'):
        load_predictions(path)


def test_missing_cut_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / 'p.npz'
    with pytest.raises(PredictionError, match='is missing'):
        load_predictions(path)
    with pytest.raises(PredictionError, match='cannot be read'):
        load_predictions(tmp_path)
    save_predictions(path, Predictions(make_sets(), PROVENANCE))
    content = path.read_bytes()
    for n in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:n])
        with pytest.raises(PredictionError):
            load_predictions(path)
    np.savez(path, a=np.zeros(3))
    with pytest.raises(PredictionError, match='no header'):
        load_predictions(path)


@FUZZ
@given(data=st.data())
def test_changed_bytes_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / 'p.npz'
    if not path.exists():
        save_predictions(path, Predictions(make_sets(extras=False), PROVENANCE))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / 'q.npz').write_bytes(content)
    with contextlib.suppress(PredictionError):
        assert len(load_predictions(tmp_path / 'q.npz').sets) == 4


@FUZZ
@given(st.lists(st.binary(max_size=12) | st.text('0123456789:PQRSTo`n', max_size=9), max_size=4))
def test_any_rle_bytes_in_a_file(tmp_path: Path, texts: list[bytes | str]) -> None:
    """The arrays fit together, so that what is refused is the masks."""
    rles = [t.encode() if isinstance(t, str) else t for t in texts]
    n = len(rles)
    s = InstanceSet('a', 1, (3, 4), [0] * n, [0.5] * n, np.zeros((n, 4)), rles)
    save_predictions(tmp_path / 'p.npz', Predictions((s,)))
    with contextlib.suppress(PredictionError):
        (got,) = load_predictions(tmp_path / 'p.npz').sets
        decoded = coco_mask.decode([{'size': [3, 4], 'counts': r} for r in got.rles]) if n else None
        assert not n or np.array_equal(np.moveaxis(decoded, 2, 0), got.masks())

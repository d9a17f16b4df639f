"""predictions and coco_results: what goes out comes back, anything else is refused."""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from cellseg_mm.core.errors import PredictionError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data.labels import IdEntry
from cellseg_mm.results import coco_results, predictions
from cellseg_mm.results.coco_results import looks_like_xyxy, parse_records
from cellseg_mm.results.predictions import (
    Predictions,
    from_coco_results,
    image_refs,
    load_predictions,
    save_predictions,
    to_coco_results,
)

PROVENANCE = {'config': 'configs/fold0.py', 'fold': 0, 'class_names': ['epithelial'], 'ünï': None}
FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def make_set(
    name: str, image_id: int, hw: tuple[int, int], n: int, *, extras: bool = True
) -> InstanceSet:
    """Boxes a little off their rectangular masks; the first mask fills the image."""
    rng = np.random.default_rng(image_id)
    crops, offsets = [], np.zeros((n, 2), dtype=np.int64)
    for i in range(n):
        h, w = hw if i == 0 else (rng.integers(1, hw[0] + 1), rng.integers(1, hw[1] + 1))
        offsets[i] = rng.integers(0, hw[0] - h + 1), rng.integers(0, hw[1] - w + 1)
        crops.append(np.ones((h, w), dtype=bool))
    s = InstanceSet.from_crops(
        name,
        image_id,
        hw,
        crops=crops,
        offsets_yx=offsets,
        class_ids=rng.integers(0, 4, n),
        scores=rng.random(n, dtype=np.float32),
    )
    extra = {
        'mask_probs': rng.random((n, 28, 28)).astype(np.float16),
        'n_votes': rng.integers(1, 6, n),
    }
    boxes = s.boxes_xyxy + rng.uniform(-0.3, 0.3, (n, 4)).astype(np.float32)
    return InstanceSet(
        name, image_id, hw, s.class_ids, s.scores, boxes, s.rles, extra if extras else {}
    )


def make_sets(*, extras: bool = True) -> tuple[InstanceSet, ...]:
    return (
        make_set('b', 7, (17, 11), 5, extras=extras),
        InstanceSet.empty('nothing found', 3, (9, 4)),
        make_set('a/../ü', 12, (1, 1), 1, extras=extras),
        make_set('c', 5, (40, 33), 8, extras=extras),
    )


def assert_equal_sets(got: tuple[InstanceSet, ...], expected: tuple[InstanceSet, ...]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a.name, a.image_id, a.image_hw, a.rles) == (b.name, b.image_id, b.image_hw, b.rles)
        for key in ('class_ids', 'scores', 'boxes_xyxy'):
            assert getattr(a, key).dtype == getattr(b, key).dtype
            assert np.array_equal(getattr(a, key), getattr(b, key))
        if len(b):
            assert set(a.extra) == set(b.extra)
        for key in b.extra:
            assert a.extra[key].dtype == b.extra[key].dtype
            assert np.array_equal(a.extra[key], b.extra[key])


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


# COCO results


def test_coco_records_hand_computed() -> None:
    # 3 x 4 px image; the mask is the pixel in row 1, column 2 of 0..3: 7 zeros, 1, 4 zeros.
    s = InstanceSet('a', 9, (3, 4), [2], [0.25], [[1.5, 0.5, 3.25, 2]], (b'714',))
    assert s.masks()[0, 1, 2]
    assert to_coco_results([s]) == [
        {
            'image_id': 9,
            'category_id': 3,
            'bbox': [1.5, 0.5, 1.75, 1.5],
            'score': 0.25,
            'segmentation': {'size': [3, 4], 'counts': '714'},
        }
    ]


@pytest.mark.parametrize('form', ['list', 'json', 'zip'])
def test_to_and_from_coco(tmp_path: Path, form: str) -> None:
    sets = make_sets(extras=False)
    results: object = to_coco_results(sets)
    if form == 'json':
        (tmp_path / 'r.json').write_text(json.dumps(results))
        results = tmp_path / 'r.json'
    elif form == 'zip':
        with zipfile.ZipFile(tmp_path / 'r.zip', 'w') as archive:
            archive.writestr('anything.json', json.dumps(results))
        results = tmp_path / 'r.zip'
    got = from_coco_results(results, sets)
    rounded = tuple(  # boxes come back to 1/1000 px, all else exactly
        InstanceSet(b.name, b.image_id, b.image_hw, b.class_ids, b.scores, a.boxes_xyxy, b.rles)
        for a, b in zip(got, sets, strict=True)
    )
    assert_equal_sets(got, rounded)
    for a, b in zip(got, sets, strict=True):
        assert np.allclose(a.boxes_xyxy, b.boxes_xyxy, atol=2e-3)


def test_images_may_be_an_id_map() -> None:
    s = make_set('b', 7, (17, 11), 5, extras=False)
    entries = [IdEntry('z.tif', 1, (3, 3)), IdEntry('b.tif', 7, (17, 11))]
    got = from_coco_results(to_coco_results([s]), entries)
    assert [(g.name, len(g)) for g in got] == [('z', 0), ('b', 5)]


def record(**changes: object) -> dict:
    base = {
        'image_id': 1,
        'category_id': 1,
        'bbox': [2, 1, 1, 1],
        'score': 0.5,
        'segmentation': {'size': [3, 4], 'counts': '714'},
    }
    return {**base, **changes}


IMAGE = [IdEntry('a.tif', 1, (3, 4))]


def test_foreign_records() -> None:
    """Uncompressed RLE, no box, integral floats, strings longer than needed."""
    long_one = bytes([48 + 0x20 + 7, 48, 49, 52]).decode()  # 7 as two groups, then 1, 4
    records = [
        record(segmentation={'size': [3, 4], 'counts': [7, 1, 4]}),
        record(segmentation={'size': [3, 4], 'counts': [0, 12]}),
        record(segmentation={'size': [3, 4], 'counts': [12]}),
        record(bbox=None, image_id=1.0, score=1, iscrowd=0),
        record(segmentation={'size': [3, 4], 'counts': long_one}),
    ]
    (got,) = from_coco_results(records, IMAGE)
    assert [int(mask.sum()) for mask in got.masks()] == [1, 12, 0, 1, 1]
    assert got.rles[0] == got.rles[3] == got.rles[4] == b'714'
    assert got.boxes_xyxy.tolist() == [[2, 1, 3, 2]] * 5


@pytest.mark.parametrize(
    ('bad', 'code', 'message'),
    [
        pytest.param([], 'record', 'expected an object', id='list'),
        pytest.param(record(image_id='1'), 'image-id', 'expected an integer', id='id as text'),
        pytest.param(record(image_id=True), 'image-id', 'expected an integer', id='id as bool'),
        pytest.param(record(image_id=float('nan')), 'image-id', 'integer', id='id NaN'),
        pytest.param(record(image_id=2), 'image-id', 'not in the id map', id='unknown id'),
        pytest.param(record(category_id=0), 'category', 'expected 1 to 4', id='0-based'),
        pytest.param(record(category_id=5), 'category', 'expected 1 to 4', id='fifth class'),
        pytest.param(record(score=1.5), 'score', 'in 0..1', id='score 1.5'),
        pytest.param(record(score=float('nan')), 'score', 'in 0..1', id='score NaN'),
        pytest.param(record(score=10**400), 'score', 'in 0..1', id='score beyond float'),
        pytest.param(record(score='0.5'), 'score', 'in 0..1', id='score as text'),
        pytest.param(record(bbox=[1, 2, 3]), 'box', 'four finite', id='box of three'),
        pytest.param(record(bbox=[1, 2, 3, float('inf')]), 'box', 'four finite', id='box inf'),
        pytest.param(record(segmentation=[[1, 2, 3]]), 'segmentation', 'polygons', id='polygons'),
        pytest.param(record(segmentation=None), 'segmentation', 'NoneType', id='no mask'),
        pytest.param(
            record(segmentation={'size': [4, 3], 'counts': '714'}), 'size', 'swapped', id='swapped'
        ),
        pytest.param(
            record(segmentation={'size': [9, 9], 'counts': '714'}),
            'size',
            r'is \[3, 4\]',
            id='size',
        ),
        pytest.param(
            record(segmentation={'size': [3, 4], 'counts': '715'}),
            'rle',
            'add up',
            id='RLE too long',
        ),
        pytest.param(
            record(segmentation={'size': [3, 4], 'counts': 'é'}), 'rle', 'ASCII', id='RLE no ASCII'
        ),
        pytest.param(
            record(segmentation={'size': [3, 4], 'counts': [7, 1]}),
            'rle',
            'add up',
            id='list short',
        ),
        pytest.param(
            record(segmentation={'size': [3, 4], 'counts': [13, -1]}),
            'rle',
            'add up',
            id='negative',
        ),
    ],
)
def test_bad_records(bad: object, code: str, message: str) -> None:
    parsed = parse_records([record(), bad, record()], image_refs(IMAGE), n_classes=4)
    assert [(p.code, p.index) for p in parsed.problems] == [(code, 1)]
    assert parsed.index.tolist() == [0, 2]
    with pytest.raises(PredictionError, match=f'1 of 3 records .* record 1: .*{message}'):
        from_coco_results([record(), bad, record()], IMAGE, n_classes=4)


def test_corners_instead_of_xywh_are_noticed() -> None:
    sets = (make_set('c', 5, (40, 33), 20, extras=False),)
    records = to_coco_results(sets)
    for r in records:
        x, y, w, h = r['bbox']
        r['bbox'] = [x, y, x + w, y + h]
    assert looks_like_xyxy(parse_records(records, image_refs(sets)))
    assert not looks_like_xyxy(parse_records(to_coco_results(sets), image_refs(sets)))
    assert not looks_like_xyxy(parse_records([], image_refs(sets)))
    with pytest.raises(PredictionError, match='corners'):
        from_coco_results(records, sets)
    (got,) = from_coco_results(records, sets, boxes_from_masks=True)
    xywh = coco_mask.toBbox([r['segmentation'] for r in records])
    assert np.array_equal(got.boxes_xyxy[:, 2:] - got.boxes_xyxy[:, :2], xywh[:, 2:])


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        pytest.param(b'', 'not valid JSON', id='empty'),
        pytest.param(b'{"annotations": []}', 'holds a dict', id='object'),
        pytest.param(b'[' * 100_000, 'not valid JSON', id='nested'),
        pytest.param(b'\xff\xfe\x00', 'not valid JSON', id='no text'),
        pytest.param(b'PK\x03\x04 and no more', 'not a readable zip', id='cut zip'),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / 'r.json').write_bytes(content)
    with pytest.raises(PredictionError, match=message):
        from_coco_results(tmp_path / 'r.json', IMAGE)


def test_zips_that_are_no_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco_results, 'FREE_BYTES', 1 << 20)
    path = tmp_path / 'r.zip'
    for names in ([], ['a.json', 'b.json']):
        with zipfile.ZipFile(path, 'w') as archive:
            for name in names:
                archive.writestr(name, '[]')
        if names:
            with pytest.raises(PredictionError, match=f'holds {len(names)} JSON files'):
                from_coco_results(path, IMAGE)
    with (
        zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive,
        archive.open('a.json', 'w') as stream,
    ):
        for _ in range(20):
            stream.write(b' ' * (1 << 20))
    with pytest.raises(PredictionError, match='unpacks to 20 MiB'):
        from_coco_results(path, IMAGE)
    with pytest.raises(PredictionError, match='cannot be read'):
        from_coco_results(tmp_path / 'absent.json', IMAGE)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)


@FUZZ
@given(
    st.lists(
        JSON
        | st.fixed_dictionaries(
            {
                'image_id': st.sampled_from([1, 2]) | JSON,
                'category_id': st.integers(0, 5) | JSON,
                'score': st.floats(0, 1) | JSON,
                'bbox': st.lists(st.floats(), min_size=4, max_size=4) | JSON,
                'segmentation': st.fixed_dictionaries(
                    {
                        'size': st.just([3, 4]) | JSON,
                        'counts': st.text('01234567890abcPQRSTo', max_size=8)
                        | st.lists(st.integers(0, 12), max_size=4)
                        | JSON,
                    }
                )
                | JSON,
            }
        ),
        max_size=6,
    )
)
def test_any_records_are_parsed_or_named(records: list) -> None:
    parsed = parse_records(records, image_refs(IMAGE), n_classes=4)
    assert sorted([*parsed.index.tolist(), *(p.index for p in parsed.problems)]) == list(
        range(len(records))
    )
    assert len(parsed.rles) == len(parsed.areas) == len(parsed.mask_boxes_xyxy) == len(parsed.index)

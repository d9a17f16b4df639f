"""results.coco_results: records of others are read exactly, or each fault is named."""

from __future__ import annotations

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
from cellseg_mm.data.labels import IdEntry
from cellseg_mm.results import coco_results
from cellseg_mm.results.coco_results import looks_like_xyxy, parse_records
from cellseg_mm.results.predictions import (
    from_coco_results,
    image_refs,
    to_coco_results,
)
from tests.support.prediction_sets import FUZZ, assert_equal_sets, make_set, make_sets


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

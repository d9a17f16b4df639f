"""results.submission_check: what we write passes, and each fault of others is named."""

from __future__ import annotations

import contextlib
import json
import runpy
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from cellseg_mm.core.errors import PredictionError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.results.submission import write_submission
from cellseg_mm.results.submission_check import (
    diff_sets,
    diff_submissions,
    format_diff,
    lint_submission,
)
from tests.support.submission_sets import ID_MAP, make_sets, squares

TOOL = Path(__file__).parents[2] / 'tools' / 'check_submission.py'


# The linter
def cells(n: int = 6) -> list[dict]:
    """Good records: every image has some, boxes fit."""
    records = []
    for i in range(n):
        entry = ID_MAP[i % 3]
        mask = np.zeros(entry.image_hw, np.uint8, order='F')
        mask[1 + i // 3 : 4, 2 : 4 + i // 3] = 1
        rle = coco_mask.encode(mask)
        records.append(
            {
                'image_id': entry.image_id,
                'category_id': 1 + i % 4,
                'bbox': coco_mask.toBbox(rle).tolist(),
                'score': 0.5,
                'segmentation': {'size': rle['size'], 'counts': rle['counts'].decode()},
            }
        )
    return records


def lint(
    tmp_path: Path, records: object, *, name: str = 'test-results.json', **files: str
) -> list[tuple[str, str, int]]:
    path = tmp_path / 'submission.zip'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr(name, json.dumps(records))
        for other, text in files.items():
            archive.writestr(other, text)
    return [(f.severity, f.code, f.count) for f in lint_submission(path, ID_MAP)]


def test_a_good_submission_has_no_findings(tmp_path: Path) -> None:
    assert lint(tmp_path, cells()) == []


def edited(edit: dict[int, dict], **everywhere: object) -> list[dict]:
    return [{**r, **everywhere, **edit.get(i, {})} for i, r in enumerate(cells())]


EMPTY = {
    'segmentation': {
        'size': [17, 11],
        'counts': coco_mask.encode(np.zeros((17, 11), np.uint8, order='F'))['counts'].decode(),
    }
}


@pytest.mark.parametrize(
    ('records', 'expected'),
    [
        pytest.param(
            edited({1: {'score': 2}, 4: {'score': None}}), ('error', 'score', 2), id='score'
        ),
        pytest.param(edited({1: {'category_id': 0}}), ('error', 'category', 1), id='0-based class'),
        pytest.param(edited({5: {'category_id': 5}}), ('error', 'category', 1), id='fifth class'),
        pytest.param(edited({1: {'image_id': 4}}), ('error', 'image-id', 1), id='unknown image'),
        pytest.param(
            edited({0: {'segmentation': {'size': [11, 17], 'counts': '0'}}}),
            ('error', 'size', 1),
            id='size swapped',
        ),
        pytest.param(
            edited({0: {'segmentation': {'size': [17, 11], 'counts': '0!'}}}),
            ('error', 'rle', 1),
            id='RLE broken',
        ),
        pytest.param(edited({0: EMPTY}), ('error', 'area', 1), id='empty mask'),
        pytest.param(edited({0: {'bbox': None}}), ('error', 'box', 1), id='no box'),
        pytest.param(edited({0: {'bbox': [1, 1, 1]}}), ('error', 'box', 1), id='box of three'),
        pytest.param(
            edited({0: {'bbox': [9, 14, 1, 1]}}), ('warning', 'box-mask', 1), id='box off'
        ),
        pytest.param(
            edited({0: {'bbox': [-3, 0, 9, 5]}}), ('warning', 'box-outside', 1), id='box outside'
        ),
        pytest.param([*cells(), cells()[2]], ('warning', 'duplicate', 1), id='duplicate'),
        pytest.param(
            [r for r in cells() if r['image_id'] != 30],
            ('warning', 'images', 1),
            id='image missing',
        ),
        pytest.param([*cells(), 5], ('error', 'record', 1), id='no record'),
    ],
)
def test_each_fault_is_found(tmp_path: Path, records: list, expected: tuple[str, str, int]) -> None:
    assert expected in lint(tmp_path, records)


def test_corners_are_found(tmp_path: Path) -> None:
    records = cells()
    for r in records:
        x, y, w, h = r['bbox']
        r['bbox'] = [x, y, x + w, y + h]
    found = lint(tmp_path, records)
    assert ('error', 'xyxy', 6) in found
    assert not any(code == 'box-mask' for _, code, _ in found)  # said once


def test_names_within_the_zip(tmp_path: Path) -> None:
    assert lint(tmp_path, cells(), name='results.json') == [('error', 'file-name', 1)]
    assert lint(tmp_path, cells(), **{'readme.txt': 'x'}) == [('warning', 'other-files', 1)]


def test_plain_json_and_no_records(tmp_path: Path) -> None:
    (tmp_path / 'r.json').write_text(json.dumps(cells()))
    assert lint_submission(tmp_path / 'r.json', ID_MAP) == []
    assert lint(tmp_path, []) == [('error', 'images', 3)]


FUZZ = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(content=st.binary(max_size=60) | st.text('[]{}",:0123a', max_size=30).map(str.encode))
def test_any_bytes_are_findings_or_a_prediction_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / 'r.json'
    for prefix in (b'', b'PK'):
        path.write_bytes(prefix + content)
        with contextlib.suppress(PredictionError):
            assert lint_submission(path, ID_MAP)


@FUZZ
@given(data=st.data())
def test_changed_bytes_of_a_zip_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    good = tmp_path / 'good.zip'
    if not good.exists():
        write_submission(good, make_sets(), ID_MAP)
    content = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / 'bad.zip').write_bytes(content)
    with contextlib.suppress(PredictionError):
        lint_submission(tmp_path / 'bad.zip', ID_MAP)


# The difference
def test_diff_hand_computed(tmp_path: Path) -> None:
    first, second = make_sets(), make_sets()
    # a: the 4 x 4 cell loses its last column (IoU 12/16) and gains 0.5; the 3 x 3 cell changes
    # class, so that it is unmatched on both sides; the 2 x 2 cell is as before.
    second[0] = InstanceSet.from_crops(
        'a',
        77,
        (9, 14),
        crops=[np.ones((4, 3), bool), np.ones((3, 3), bool), np.ones((2, 2), bool)],
        offsets_yx=np.array([[0, 0], [5, 9], [2, 7]]),
        class_ids=np.array([0, 2, 1]),
        scores=np.array([0.75, 0.75, 0.5], dtype=np.float32),
    )
    write_submission(tmp_path / 'a.zip', first, ID_MAP)
    write_submission(tmp_path / 'b.zip', second, ID_MAP)
    rows = diff_submissions(tmp_path / 'a.zip', tmp_path / 'b.zip', ID_MAP)
    by_key = {(r.name, r.class_id): r for r in rows}
    total = by_key['', -1]
    assert (total.n_first, total.n_second, total.n_matched) == (4, 4, 3)
    assert total.mean_iou == pytest.approx((1 + 0.75 + 1) / 3)
    assert total.mean_score_shift == pytest.approx(0.5 / 3)
    one = by_key['a', 0]
    assert (one.n_matched, one.mean_iou, one.mean_score_shift) == (1, 0.75, 0.5)
    assert (by_key['a', 3].n_first, by_key['a', 3].n_second) == (1, 0)
    assert np.isnan(by_key['a', 3].mean_iou)
    assert (by_key['', 2].n_first, by_key['', 2].n_second, by_key['', 2].n_matched) == (1, 2, 1)
    table = format_diff(rows, ['epithelial', 'lymphocyte'])
    assert table.splitlines()[1].split() == ['all', 'all', '4', '4', '3', '0.9167', '+0.1667']
    assert 'epithelial' in table


def test_each_instance_is_matched_once_and_best_first() -> None:
    one = squares('a', 1, (9, 14), [(0, 0, 4, 0, 0.5)])
    # Both overlap the one by at least half; the identical one must win although it is second.
    two = squares('a', 1, (9, 14), [(0, 0, 5, 0, 0.25), (0, 0, 4, 0, 0.75)])
    for first, second, shift in ((one, two, 0.25), (two, one, -0.25)):
        total = diff_sets([first], [second])[0]
        assert (total.n_matched, total.mean_iou, total.mean_score_shift) == (1, 1.0, shift)


def test_diff_needs_the_same_images() -> None:
    with pytest.raises(PredictionError, match='same images'):
        diff_sets(make_sets(), make_sets()[:2])


# The tool
def run_tool(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr('sys.argv', ['check_submission.py', *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(TOOL), run_name='__main__')
    return stopped.value.code


def test_tool_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [
        {
            'file_name': e.file_name,
            'id': e.image_id,
            'height': e.image_hw[0],
            'width': e.image_hw[1],
        }
        for e in ID_MAP
    ]
    (tmp_path / 'ids.json').write_text(json.dumps(entries))
    (tmp_path / 'good.json').write_text(json.dumps(cells()))
    (tmp_path / 'bad.json').write_text(json.dumps(edited({1: {'score': 2}})))
    options = ('--id-map', tmp_path / 'ids.json')
    assert run_tool(monkeypatch, tmp_path / 'good.json', *options) == 0
    assert 'no finding' in capsys.readouterr().out
    assert run_tool(monkeypatch, tmp_path / 'bad.json', *options) == 1
    assert 'error: score: 1 record(s): record 1: score is 2' in capsys.readouterr().out
    assert run_tool(monkeypatch, tmp_path / 'good.json', tmp_path / 'good.json', *options) == 0
    assert 'mean IoU' in capsys.readouterr().out
    assert run_tool(monkeypatch, tmp_path / 'absent.json', *options) == 2
    assert 'absent.json: cannot be read' in capsys.readouterr().err
    assert run_tool(monkeypatch, tmp_path / 'good.json', '--id-map', tmp_path / 'absent') == 2

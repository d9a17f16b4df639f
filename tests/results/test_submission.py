"""results.submission: the records that are written, the same bytes for any order of sets."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from cellseg_mm.core.errors import PredictionError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.results.submission import write_submission
from cellseg_mm.results.submission_check import (
    Remark,
    lint_submission,
)
from tests.support.submission_sets import ID_MAP, make_sets, squares


def records_of(path: Path) -> list[dict]:
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ['test-results.json']
        return json.loads(archive.read('test-results.json'))


def test_written_records(tmp_path: Path) -> None:
    summary = write_submission(tmp_path, make_sets(), ID_MAP)
    assert summary.path == tmp_path / 'test-results.json.zip'
    assert (summary.n_images, summary.n_images_without, summary.n_instances) == (3, 1, 4)
    records = records_of(summary.path)
    assert [(r['image_id'], r['category_id'], r['bbox'], r['score']) for r in records] == [
        (2, 3, [6, 8, 5, 5], 0.125),
        (1, 4, [9, 5, 3, 3], 0.75),
        (1, 2, [7, 2, 2, 2], 0.5),
        (1, 1, [0, 0, 4, 4], 0.25),
    ]
    mask = coco_mask.decode(records[1]['segmentation'])
    assert mask.shape == (9, 14)
    assert mask[5:8, 9:12].all()
    assert mask.sum() == 9
    assert lint_submission(summary.path, ID_MAP) == [
        Remark('warning', 'images', '1 image(s) have no usable record: none', 1)
    ]


def test_same_bytes_again_whatever_the_order_of_sets(tmp_path: Path) -> None:
    write_submission(tmp_path / 'a.zip', make_sets(), ID_MAP)
    write_submission(tmp_path / 'b.zip', make_sets()[::-1], ID_MAP)
    assert (tmp_path / 'a.zip').read_bytes() == (tmp_path / 'b.zip').read_bytes()


def test_empty_masks_are_left_out_and_counted(tmp_path: Path) -> None:
    sets = make_sets()
    sets[2] = InstanceSet('none', 79, (5, 6), [0], [0.5], [[0, 0, 1, 1]], (b'n0',))
    assert sets[2].areas.tolist() == [0]
    summary = write_submission(tmp_path / 'a.zip', sets, ID_MAP)
    assert (summary.n_empty_masks, summary.n_instances, summary.n_images_without) == (1, 4, 1)


@pytest.mark.parametrize(
    ('sets', 'message'),
    [
        pytest.param(make_sets()[:2], r'1 image\(s\) are not predicted \(none\)', id='missing'),
        pytest.param(
            [*make_sets(), InstanceSet.empty('d', 1, (2, 2))], r'not in the id map \(d\)', id='more'
        ),
        pytest.param([*make_sets(), make_sets()[0]], "'a' occurs twice", id='twice'),
        pytest.param(
            [*make_sets()[:2], InstanceSet.empty('none', 1, (6, 5))],
            '6 x 5 px, .* 5 x 6',
            id='size',
        ),
        pytest.param(
            [*make_sets()[:2], squares('none', 1, (5, 6), [(0, 0, 2, 0, np.nan)])],
            'not in 0..1',
            id='NaN',
        ),
    ],
)
def test_sets_that_do_not_fit_the_map(
    tmp_path: Path, sets: list[InstanceSet], message: str
) -> None:
    with pytest.raises(PredictionError, match=message):
        write_submission(tmp_path / 'a.zip', sets, ID_MAP)
    assert list(tmp_path.iterdir()) == []


def test_name_must_be_a_zip(tmp_path: Path) -> None:
    with pytest.raises(PredictionError, match=r'ends in \.zip'):
        write_submission(tmp_path / 'a.json', make_sets(), ID_MAP)

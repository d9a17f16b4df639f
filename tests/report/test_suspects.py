"""Which cells a person should look at again, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.report.suspects import (
    OTHER_CLASS,
    UNLABELLED,
    UNSEEN,
    label_suspects,
    member_doubts,
    write_suspects,
)
from cellseg_mm.scores.matching import compare


def square_set(cells: list[tuple[int, int, int, float]]) -> InstanceSet:
    """Return 10 x 10 px cells given as (y, x, class, score)."""
    return InstanceSet.from_crops(
        'a',
        1,
        (60, 80),
        crops=[np.ones((10, 10), dtype=bool)] * len(cells),
        offsets_yx=np.array([c[:2] for c in cells]).reshape(-1, 2),
        class_ids=np.array([c[2] for c in cells], dtype=np.int64),
        scores=np.array([c[3] for c in cells], dtype=np.float32),
    )


def test_suspects_by_hand() -> None:
    gt = square_set(
        [(0, 0, 0, 1), (0, 20, 0, 1), (0, 40, 1, 1), (30, 0, 1, 1), (0, 60, 0, 1), (0, 60, 1, 1)]
    )
    pred = square_set(
        [
            (0, 0, 0, 0.9),  # right
            (0, 20, 1, 0.8),  # other class
            (30, 40, 0, 0.75),  # nothing labelled there
            (30, 60, 0, 0.6),  # nor there, but not confident
            (0, 60, 0, 0.9),  # two labels of different classes lie there: its own is one of them
            (4, 40, 1, 0.9),  # IoU 60 / 140 = 0.43 with its label: neither, and it supports it
        ]
    )
    found = label_suspects([compare(gt, pred)])
    assert [(f.class_id, f.label_class_id) for f in found[OTHER_CLASS]] == [(1, 0)]
    assert [f.value for f in found[UNLABELLED]] == [pytest.approx(0.75)]
    assert [(f.index, f.value) for f in found[UNSEEN]] == [(3, 0.0)]


def test_suspects_for_qupath_are_the_labels_with_marks(tmp_path: Path) -> None:
    gt = square_set([(0, 0, 0, 1), (0, 20, 0, 1), (30, 0, 1, 1)])
    pred = square_set([(0, 0, 0, 0.9), (0, 20, 1, 0.8), (30, 40, 0, 0.75)])
    counts = write_suspects(tmp_path, [compare(gt, pred)], ['a', 'b'], [(0, 0, 0), (9, 9, 9)])
    assert counts == {OTHER_CLASS: 1, UNLABELLED: 1, UNSEEN: 1}
    cells = json.loads((tmp_path / 'a.review.geojson').read_text())['features']
    kinds = {}
    for cell in cells:
        corner = tuple(np.min(cell['geometry']['coordinates'][0], axis=0))
        properties = cell['properties']
        rank = properties['measurements'].get('review rank')
        kinds[corner] = (properties['classification']['name'], properties['objectType'], rank)
    assert kinds == {
        (0, 0): ('a', 'detection', None),
        (40, 30): ('a*', 'annotation', 1),
        (20, 0): ('a', 'annotation', 2),
        (0, 30): ('b', 'annotation', 3),
    }
    nothing = write_suspects(tmp_path / 'none', [compare(gt, gt)], ['a', 'b'], [(0, 0, 0)] * 2)
    assert sum(nothing.values()) == 0
    assert not (tmp_path / 'none').exists()


def test_member_doubts_by_hand() -> None:
    first = square_set([(0, 0, 0, 0.9), (0, 20, 0, 0.5), (30, 0, 0, 0.1)])
    extra = {'agreement': np.array([1.0, 0.6, 0.2], dtype=np.float32)}
    extra['mask_uncertainty'] = np.array([0.2, 0.4, 0.9], dtype=np.float32)
    sets = [
        InstanceSet(
            'a', 1, first.image_hw, first.class_ids, first.scores, first.boxes_xyxy, first.rles, e
        )
        for e in (extra, {})
    ]
    (doubt,) = member_doubts(sets)
    assert doubt.n == 2  # score 0.1 does not count
    assert doubt.agreement == pytest.approx(0.8)
    assert doubt.doubt == pytest.approx(((0 + 0.2) / 2 + (0.4 + 0.4) / 2) / 2)

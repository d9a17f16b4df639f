"""fusion.clusters: pairs that overlap and weighted boxes, equal to loops over all pairs."""

from __future__ import annotations

import numpy as np
import pytest

from cellseg_mm.core import rle
from cellseg_mm.fusion.clusters import box_pairs, mask_pairs, weighted_boxes
from tests.support import reference_fusion as reference


@pytest.mark.parametrize('seed', range(20))
def test_pairs_equal_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, hw = 30, (23, 31)
    low = rng.integers(-3, 25, (n, 2)).astype(float)
    boxes = np.concatenate([low, low + rng.choice([0, 1, 2.5, 7, 40], (n, 2))], axis=1)
    group = rng.integers(0, 3, n)
    found = box_pairs(boxes, group)
    expected = [
        (i, j, reference.box_iou(boxes[i], boxes[j]))
        for i in range(n)
        for j in range(i + 1, n)
        if group[i] == group[j] and reference.box_iou(boxes[i], boxes[j]) > 0
    ]
    assert list(zip(found.first, found.second, found.iou, strict=True)) == expected

    masks = rng.random((n, *hw)) < rng.choice([0, 0.01, 0.5], (n, 1, 1))
    crops = list(masks)
    runs = rle.runs_from_crops(crops, np.zeros((n, 2), int), hw)
    found = mask_pairs(runs, group)
    table = rle.iou_matrix(rle.encode_runs(runs), rle.encode_runs(runs), hw)
    expected = [
        (i, j, table[i, j])
        for i in range(n)
        for j in range(i + 1, n)
        if group[i] == group[j] and table[i, j] > 0
    ]
    assert list(zip(found.first, found.second, found.iou, strict=True)) == expected


def test_boxes_that_overlap_by_less_than_rounding_meet() -> None:
    # A large group number moves the boxes so far along the line that their edges become equal.
    boxes = np.array([[0, 0, 1, 1], [1 - 1e-9, 0, 2, 1], [1, 1, 2, 2]])
    found = box_pairs(boxes, np.full(3, 10**9))
    assert (found.first.tolist(), found.second.tolist()) == ([0], [1])


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('iou_thr', [0.0, 0.05, 0.3, 0.5, 0.52])
def test_weighted_boxes_equal_reference_where_means_wander(iou_thr: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 150
    low = rng.random((n, 2)) * 40
    sizes = rng.choice([2, 5, 20], (n, 2)) * (1 + rng.random((n, 2)) / 2)
    boxes = np.concatenate([low, low + sizes], axis=1)
    boxes[n // 2 :] = boxes[: n // 2] + rng.normal(size=(n // 2, 4)) / 3  # so that many fit well
    scores = np.sort(rng.random(n))[::-1]
    group = rng.integers(0, 2, n)
    clusters, means = weighted_boxes(boxes, scores, group, iou_thr)
    rows = zip(boxes.tolist(), scores.tolist(), group.tolist(), strict=True)
    cells = [{'box': b, 'score': s, 'cls': g, 'id': i} for i, (b, s, g) in enumerate(rows)]
    expected, expected_means = reference.weigh_boxes(cells, iou_thr, False)
    got = [np.flatnonzero(clusters.owner == c).tolist() for c in range(len(clusters))]
    assert got == [[cell['id'] for cell in cluster] for cluster in expected]
    np.testing.assert_allclose(means, expected_means, rtol=1e-12)


def test_weighted_boxes_of_equal_fit_join_the_better_cluster() -> None:
    # The third box covers half of each of the others; the grid lists the second one first.
    boxes = np.array([[12, 0, 16, 4], [8, 0, 12, 4], [10, 0, 14, 4]], float)
    clusters, _ = weighted_boxes(boxes, np.array([0.9, 0.8, 0.7]), np.zeros(3, int), 0.2)
    assert clusters.owner.tolist() == [0, 1, 0]


def test_mask_pairs_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    runs = rle.runs_from_crops(list(rng.random((9, 12, 13)) < 0.5), np.zeros((9, 2), int), (12, 13))
    whole = mask_pairs(runs, np.zeros(9, int))
    monkeypatch.setattr('cellseg_mm.fusion.clusters.MAX_RUN_PAIRS', 7)
    parts = mask_pairs(runs, np.zeros(9, int))
    assert len(whole.iou) == 36
    for key in ('first', 'second', 'iou'):
        assert np.array_equal(getattr(whole, key), getattr(parts, key))

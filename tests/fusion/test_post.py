"""fusion.post: what is cut or dropped after fusion, equal to a pixel loop and counted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.fusion.fuse import PostProcess, from_spec, fuse, fuse_with_report, postprocess
from cellseg_mm.fusion.post import Dropped
from tests.support import reference_fusion as reference
from tests.support.fusion_members import (
    as_cells,
    random_members,
    rectangles,
)


@pytest.mark.parametrize('seed', range(10))
@pytest.mark.parametrize('share', [0.0, 0.4, 1.0])
def test_disjoint_equals_reference(share: float, seed: int) -> None:
    members = random_members(seed)
    everything = fuse(members, from_spec('soft_nms:min_score=0'))
    expected = reference.make_disjoint(as_cells(everything), share, 3)
    post = PostProcess(disjoint=True, max_lost_share=share, min_area_px=3)
    got, dropped = postprocess(everything, post)
    assert got.masks().tolist() == [cell['mask'].tolist() for cell in expected]
    assert got.extra['uncut_area'].tolist() == [cell['uncut'] for cell in expected]
    assert got.scores.tolist() == [np.float32(cell['score']) for cell in expected]
    assert got.masks().sum(axis=0).max() <= 1
    assert dropped.lost_overlap + dropped.too_small == len(everything) - len(got) > 0


def test_a_contested_pixel_goes_to_the_higher_score() -> None:
    cells = rectangles([(1, 1, 5, 5), (3, 1, 9, 5)], [0.6, 0.8])
    got, dropped = postprocess(cells, PostProcess(disjoint=True))
    assert got.areas.tolist() == [24, 8]  # the lower one lost 2 of 4 columns: half, not more
    assert got.extra['uncut_area'].tolist() == [24, 16]
    assert dropped == Dropped()
    below = float(np.nextafter(0.5, 0))
    got, dropped = postprocess(cells, PostProcess(disjoint=True, max_lost_share=below))
    assert got.areas.tolist() == [24]
    assert dropped.lost_overlap == 1


def test_what_is_dropped_takes_no_pixel() -> None:
    # The second loses 3 of its 4 columns and goes; the third then keeps all of its own.
    cells = rectangles([(1, 1, 5, 5), (2, 1, 6, 5), (5, 1, 9, 5)], [0.9, 0.8, 0.7])
    got, dropped = postprocess(cells, PostProcess(disjoint=True))
    assert got.areas.tolist() == [16, 16]
    assert dropped.lost_overlap == 1
    # A cell that loses everything goes even when any loss is allowed.
    twice = rectangles([(1, 1, 5, 5), (1, 1, 5, 5)], [0.9, 0.8])
    got, dropped = postprocess(twice, PostProcess(disjoint=True, max_lost_share=1.0))
    assert (len(got), dropped.lost_overlap) == (1, 1)


def test_thresholds_include_their_value() -> None:
    cells = rectangles([(1, 1, 4, 4), (6, 1, 9, 4), (1, 8, 3, 10)], [0.7, 0.7, 0.3], [0, 1, 1])
    assert len(postprocess(cells, PostProcess(score_thr=0.7))[0]) == 2
    got, dropped = postprocess(cells, PostProcess(score_thr=(0.71, 0.3)))
    assert got.class_ids.tolist() == [1, 1]
    assert dropped == Dropped(below_score=1)
    got, dropped = postprocess(cells, PostProcess(min_area_px=9))
    assert (len(got), dropped) == (2, Dropped(too_small=1))
    assert len(postprocess(cells, PostProcess(min_area_px=10))[0]) == 0
    got, dropped = postprocess(cells, PostProcess(max_instances=1))
    assert (got.class_ids.tolist(), dropped) == ([0], Dropped(over_limit=2))
    with pytest.raises(ConfigError, match='2 values and the instances have class 3'):
        postprocess(replace(cells, class_ids=[0, 1, 2]), PostProcess(score_thr=(0.5, 0.5)))


def test_min_votes() -> None:
    members = [
        rectangles([(1, 1, 5, 5)], [0.8]),
        rectangles([(1, 1, 5, 5), (8, 8, 12, 12)], [0.6] * 2),
    ]
    got, report = fuse_with_report(members, from_spec('nms'), PostProcess(min_votes=2))
    assert got.extra['n_votes'].tolist() == [2]
    assert (report.n_in, report.n_merged, report.n_few_votes, report.n_out) == (3, 1, 1, 1)
    with pytest.raises(ConfigError, match='carry no votes'):
        postprocess(members[0], PostProcess(min_votes=2))

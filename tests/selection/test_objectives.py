"""mPQ+ counts what is left after post-processing; test_search.py compares it with ``score``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.fusion.settings import DEFAULT_FUSION, default_settings
from cellseg_mm.selection.objectives import Mpq, Samples

HW = (17, 23)
CLASSES = ('a', 'b')
PLAIN = (None, DEFAULT_FUSION)
ALL = np.ones((1, 1), dtype=np.int64)


def squares(class_ids: list[int], scores: list[float]) -> InstanceSet:
    """Equal masks at one place."""
    n = len(class_ids)
    return InstanceSet.from_crops(
        'image0',
        0,
        HW,
        crops=[np.ones((8, 8), bool)] * n,
        offsets_yx=np.full((n, 2), 3),
        class_ids=np.array(class_ids, dtype=np.int64),
        scores=np.array(scores, dtype=np.float32),
    )


def objective_of(gt: InstanceSet, pred: InstanceSet) -> Mpq:
    return Mpq(Samples((gt,), {PLAIN: (pred,)}, np.zeros(1), CLASSES))


def test_images_without_anything_count_nothing() -> None:
    empty = InstanceSet.empty('image0', 0, HW)
    counted = objective_of(empty, empty).measure(default_settings('instances', CLASSES))
    assert counted.tp.tolist() == counted.n_pred.tolist() == counted.n_gt.tolist() == [[0, 0]]
    assert np.isnan(counted.pq(ALL)).all()


@pytest.mark.parametrize(('score_thr', 'tp'), [((0.55, 0.5), [[0, 0]]), ((0.65, 0.5), [[0, 1]])])
def test_a_better_detection_that_falls_gives_its_pixels_back(score_thr, tp) -> None:
    # Both lie on the one cell; the better one is of the wrong class and covers all of the other.
    objective = objective_of(squares([1], [1.0]), squares([0, 1], [0.6, 0.5]))
    settings = replace(default_settings('instances', CLASSES), score_thr=score_thr)
    assert objective.measure(settings).tp.tolist() == tp

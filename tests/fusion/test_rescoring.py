"""fusion.rescoring: features against a slow loop, and new scores made once."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.fusion.fuse import from_spec, fuse, to_spec
from cellseg_mm.fusion.rescoring import (
    BIN_PX,
    FEATURES,
    REACH,
    Rescored,
    Rescoring,
    features,
    rescoring_from_json,
)
from cellseg_mm.fusion.settings import InferenceSettings, apply_settings, default_settings

CLASSES = ('round', 'long')
CELL = st.tuples(
    st.integers(0, 900), st.integers(0, 700), st.integers(1, 60), st.integers(1, 60),
    st.integers(0, 1), st.sampled_from([0.0, 0.2, 0.5, 0.50001, 0.9, 1.0]),
)  # fmt: skip


def image(cells: list[tuple]) -> InstanceSet:
    return InstanceSet.from_crops(
        'a', 1, (760, 960),
        crops=[np.ones((h, w), dtype=bool) for _, _, w, h, _, _ in cells],
        offsets_yx=np.array([(y, x) for x, y, *_ in cells], dtype=np.int64).reshape(-1, 2),
        class_ids=np.array([c[4] for c in cells], dtype=np.int64),
        scores=np.array([c[5] for c in cells], dtype=np.float32),
    )  # fmt: skip


def weights(**by_name: float) -> Rescoring:
    row = [by_name.get(name, 0.0) for name in (*FEATURES, 'intercept')]
    far = (1e6,) * len(FEATURES)
    return Rescoring(CLASSES, (tuple(row),) * 2, (tuple(-v for v in far),) * 2, (far,) * 2)


def slowly(one: InstanceSet, i: int) -> dict[str, float]:
    """All features of one detection, by loops over all others."""
    scores = [min(max(float(s), 1e-4), 1 - 1e-4) for s in one.scores]
    x0, y0, x1, y1 = map(float, one.boxes_xyxy[i])
    area = float(one.masks()[i].sum())
    iou = share = total = own = count = 0.0
    place = [math.floor((x0 + x1) / 2 / BIN_PX), math.floor((y0 + y1) / 2 / BIN_PX)]
    for j in range(len(one)):
        a0, b0, a1, b1 = map(float, one.boxes_xyxy[j])
        inter = max(min(x1, a1) - max(x0, a0), 0) * max(min(y1, b1) - max(y0, b0), 0)
        mine, other = (x1 - x0) * (y1 - y0), (a1 - a0) * (b1 - b0)
        if scores[j] > scores[i] and inter:
            iou = max(iou, inter / (mine + other - inter))
            share = max(share, inter / min(mine, other))
        there = [math.floor((a0 + a1) / 2 / BIN_PX), math.floor((b0 + b1) / 2 / BIN_PX)]
        if max(abs(p - q) for p, q in zip(place, there, strict=True)) <= REACH:
            total, count = total + scores[j], count + 1
            own += scores[j] * (one.class_ids[j] == one.class_ids[i])
    return {
        'logit': math.log(scores[i] / (1 - scores[i])),
        'log_area': math.log(area),
        'log_area_squared': math.log(area) ** 2 / 10,
        'fill': area / ((x1 - x0) * (y1 - y0)),
        'elongation': abs(math.log((x1 - x0) / (y1 - y0))),
        'overlap_iou': iou,
        'overlap_share': share,
        'at_border': float(x0 < 1 or y0 < 1 or x1 > 959 or y1 > 759),
        'class_share': math.log((own + 0.5) / (total + 1)),
        'score_around': math.log1p(total),
        'count_around': math.log1p(count),
    }


@settings(max_examples=25, deadline=None)
@given(st.lists(CELL, max_size=12), st.randoms(use_true_random=False))
def test_features_equal_a_loop_in_any_order(cells: list, random) -> None:
    one = image(cells)
    found = features(one, 2)
    wanted = np.array([[slowly(one, i)[name] for name in FEATURES] for i in range(len(one))])
    np.testing.assert_allclose(found, wanted.reshape(found.shape), rtol=1e-5, atol=1e-6)
    order = list(range(len(cells)))
    random.shuffle(order)
    np.testing.assert_allclose(features(one[order], 2), found[order], rtol=1e-9, atol=1e-9)


def test_new_scores_are_the_logistic_of_the_features_within_their_range() -> None:
    one = image([(10, 10, 20, 20, 0, 0.8), (300, 300, 10, 40, 1, 0.3)])
    anew = weights(logit=0.5, elongation=-1.0, intercept=0.25).apply(one)
    logit = [0.5 * math.log(4) + 0.25, 0.5 * math.log(3 / 7) - math.log(4) + 0.25]
    np.testing.assert_allclose(anew.scores, [1 / (1 + math.exp(-v)) for v in logit], rtol=1e-5)
    narrow = replace(weights(logit=1.0), high=((0.0,) * len(FEATURES),) * 2)
    np.testing.assert_allclose(narrow.apply(one).scores, [0.5, 0.3], rtol=1e-5)
    assert anew.rles == one.rles
    assert len(weights(logit=1.0).apply(image([]))) == 0


def test_scores_are_new_before_thresholds_and_only_once() -> None:
    one = image([(10, 10, 20, 20, 0, 0.8), (300, 300, 10, 40, 1, 0.3)])
    half = replace(
        default_settings('instances', CLASSES), rescoring=weights(logit=1.0, intercept=-1.0)
    )
    assert isinstance(half.rule, Rescored)
    cells = fuse([one], half.rule, half.post)
    np.testing.assert_allclose(cells.scores, [4 / (4 + math.e)], rtol=1e-5)
    again = apply_settings(cells, half)
    np.testing.assert_array_equal(again.scores, cells.scores)
    assert to_spec(half.rule) == f'soft_mask, rescored {half.rescoring.hash}'
    assert to_spec(replace(half, rescoring=None).rule) == to_spec(from_spec('soft_mask'))
    assert InferenceSettings().rescoring is None


def test_what_is_no_rescoring_is_refused_in_a_sentence() -> None:
    good = weights(logit=1.0)
    assert rescoring_from_json(good.to_json(), CLASSES) == good

    def broken(**rows: list) -> dict:
        return {**good.to_json(), 'classes': dict.fromkeys(CLASSES, rows)}

    for bad, says in [
        ([], 'other features'),
        ({**good.to_json(), 'features': ['logit']}, 'other features'),
        ({**good.to_json(), 'classes': {}}, 'has the classes nothing'),
        (broken(), 'damaged'),
        (broken(weights=[1.0], low=[], high=[]), 'not 12 finite numbers'),
        (broken(weights=['a'] * 12, low=[0.0] * 11, high=[0.0] * 11), 'finite numbers'),
    ]:
        with pytest.raises(ConfigError, match=says):
            rescoring_from_json(bad, CLASSES)

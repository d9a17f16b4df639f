"""Instance sets as a prediction file holds them."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, settings

from cellseg_mm.core.instances import InstanceSet

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

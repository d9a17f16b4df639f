from __future__ import annotations

import numpy as np
import pytest

from cellseg_mm.core.arrays import ranges_of


@pytest.mark.parametrize('seed', range(10))
def test_ranges_are_those_of_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 5, size=seed)  # empty parts among them, no part for seed 0
    ranges = ranges_of(counts)
    assert ranges.dtype == np.int64
    assert ranges.tolist() == [i for count in counts.tolist() for i in range(count)]

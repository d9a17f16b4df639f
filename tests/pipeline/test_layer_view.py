"""pipeline.layer_view: runs of layers."""

from __future__ import annotations

import numpy as np
import pytest

from cellseg_mm.pipeline.layer_view import find_runs, paint_runs
from tests.support.provoking_masks import SEEDS

pytestmark = pytest.mark.mm


@pytest.mark.parametrize('seed', SEEDS)
def test_painting_runs_is_the_inverse_of_finding_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    hw = (int(rng.integers(1, 9)), int(rng.integers(1, 9)))
    cells = rng.integers(0, 3, hw).astype(np.int32) * (rng.random(hw) < 0.2 * seed)
    np.testing.assert_array_equal(paint_runs(find_runs(cells.astype(np.int32)), hw), cells)

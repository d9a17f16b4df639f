"""Array types with a short name, and the index arithmetic that several rooms need.

In: counts. Out: indices. Invariant: no loop over elements.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]
Float = NDArray[np.float64]


def ranges_of(counts: Int) -> Int:
    """Return 0, 1, ... c - 1 for each count c, joined: the place of each element in its part.

    Args:
        counts: (N,) int64, not negative; N parts that lie one after another.
    """
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)

"""Resampling of images or groups for intervals.

In: units and a seed. Out: weights. Invariant: one group's images are drawn together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cellseg_mm.core.arrays import Int


def sampling_units(names: Sequence[str], groups: Mapping[str, str]) -> tuple[str, Int]:
    """Return what a bootstrap draws, ``images`` or ``groups``, and each image's unit, (I,) int64.

    Args:
        names: I image names.
        groups: Group by image name; images without one are units of their own.
    """
    if not any(name in groups for name in names):
        return 'images', np.arange(len(names))
    keys = [(0, groups[name]) if name in groups else (1, name) for name in names]
    number = {key: i for i, key in enumerate(sorted(set(keys)))}
    return 'groups', np.array([number[key] for key in keys], dtype=np.int64)


def resampled_weights(unit_of: Int, n: int, seed: int) -> Int:
    """Return how often each image counts when units are drawn with replacement, (n, I) int64.

    Args:
        unit_of: (I,) int64 in 0..U - 1, each image's unit. Images of one unit are drawn together.
        n: Resamples.
        seed: Of the drawing.
    """
    n_units = int(unit_of.max()) + 1
    drawn = np.random.default_rng(seed).integers(0, n_units, size=(n, n_units))
    counts = [np.bincount(row, minlength=n_units)[unit_of] for row in drawn]
    return np.array(counts, dtype=np.int64).reshape(n, len(unit_of))

"""Searches for folds that share every quantity evenly and keep groups whole.

In: each group's share of each quantity. Out: the fold of each group. Invariant: whole numbers
inside, so that the same input gives the same folds on every machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

N_STARTS = 8  # random starts of the search; more than this changed the third digit only
SHARE_UNIT = 10**6  # shares are whole millionths, so that ties are ties on every machine
LEAST_GAIN = 10**4  # in squared units, 1e-8 of squared share; less costs time and buys nothing
NEVER = np.iinfo(np.int64).max
SWAP_LIMIT = 1000  # groups
MAX_PASSES = 50  # the search stops by itself after 3 to 8 passes


def balanced(
    shares: NDArray[np.float64], n_folds: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return the fold of each group: the most even of several searched assignments.

    Args:
        shares: (G, F) float64, each group's share of each of F quantities, 0..1.
        n_folds: Number of folds, at most G.
        rng: Decides the order of each start.
    """
    units = np.rint(shares * SHARE_UNIT).astype(np.int64)
    found = [_searched(units, n_folds, rng) for _ in range(N_STARTS)]
    costs = [_cost(units, fold_of, n_folds) for fold_of in found]
    return found[int(np.argmin(costs))]


def _cost(shares: NDArray[np.int64], fold_of: NDArray[np.int64], n_folds: int) -> int:
    sums = np.zeros((n_folds, shares.shape[1]), dtype=np.int64)
    np.add.at(sums, fold_of, shares)
    return int((sums**2).sum())


def _searched(
    shares: NDArray[np.int64], n_folds: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Place large groups first, then move and swap single groups while that helps.

    The cost is the sum of the squared fold sums; their total is fixed, so it is least when even.
    No fold stays empty: every group has a share of the images, so an empty fold costs least, and
    leaving a fold empty never pays.
    """
    order = rng.permutation(len(shares))
    order = order[np.argsort(-shares.max(axis=1)[order], kind='stable')]
    fold_of = np.zeros(len(shares), dtype=np.int64)
    sums = np.zeros((n_folds, shares.shape[1]), dtype=np.int64)
    for group in order.tolist():
        fold = int(np.argmin(sums @ shares[group]))
        fold_of[group] = fold
        sums[fold] += shares[group]
    for _ in range(MAX_PASSES):
        changes = [_improve(group, shares, fold_of, sums) for group in order.tolist()]
        if not any(changes):
            break
    return fold_of


def _improve(
    group: int,
    shares: NDArray[np.int64],
    fold_of: NDArray[np.int64],
    sums: NDArray[np.int64],
) -> bool:
    """Make the best move or swap of one group in place, if one lowers the cost."""
    own, home = shares[group], int(fold_of[group])
    move = 2 * own @ own + 2 * (sums - sums[home]) @ own
    move[home] = NEVER
    # With many small groups moves alone are even enough, and swaps cost groups squared.
    partners = shares[: len(shares) if len(shares) <= SWAP_LIMIT else 0]
    places = fold_of[: len(partners)]
    gain = partners - own  # what the home fold gains when the group trades places with another
    swap = 2 * (gain**2).sum(axis=1) + 2 * (gain * (sums[home] - sums[places])).sum(axis=1)
    swap[places == home] = NEVER
    best_swap = swap.min(initial=NEVER)
    if min(move.min(), best_swap) > -LEAST_GAIN:
        return False
    if move.min() <= best_swap:
        target = int(np.argmin(move))
    else:
        other = int(np.argmin(swap))
        target = int(fold_of[other])
        fold_of[other] = home
        sums[home] += shares[other]
        sums[target] -= shares[other]
    fold_of[group] = target
    sums[home] -= own
    sums[target] += own
    return True

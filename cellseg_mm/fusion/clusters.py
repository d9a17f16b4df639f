"""Which instances of several members are the same cell: overlaps, and four ways to group by them.

In: boxes or runs of N instances in canonical order (best first). Out: :class:`Clusters`.
Invariant: only pairs that overlap are ever looked at; an IoU equal to a threshold is no match.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from cellseg_mm.core import rle
from cellseg_mm.core.arrays import Float, Int, ranges_of

# Run pairs looked at together: about 30 bytes each.
MAX_RUN_PAIRS = 1 << 22


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of overlapping instances, each once, sorted by ``first``, then ``second``.

    Attributes:
        first: (P,) int64, the earlier instance of a pair.
        second: (P,) int64, the later one.
        iou: (P,) float64, above 0.
        n: Number of instances.
    """

    first: Int
    second: Int
    iou: Float
    n: int

    def above(self, iou_thr: float) -> Pairs:
        """Return the pairs whose IoU is greater than ``iou_thr``."""
        keep = self.iou > iou_thr
        return Pairs(self.first[keep], self.second[keep], self.iou[keep], self.n)

    def both_ways(self) -> tuple[Int, Int, Float]:
        """Return each pair twice, sorted by its first: begin (N + 1,), neighbour, IoU."""
        first = np.concatenate([self.first, self.second])
        order = np.argsort(first, kind='stable')
        neighbour = np.concatenate([self.second, self.first])[order]
        return _begins(first, self.n), neighbour, np.tile(self.iou, 2)[order]


@dataclass(frozen=True, slots=True)
class Clusters:
    """Groups of instances; C clusters of N instances, ordered by their leads.

    Attributes:
        owner: (N,) int64, the instance's cluster, or -1 for an instance that is in none.
        leads: (C,) int64, rising: the first instance of each cluster.
    """

    owner: Int
    leads: Int

    def __len__(self) -> int:
        return len(self.leads)

    @property
    def sizes(self) -> Int:
        """Instances per cluster, (C,) int64."""
        return np.bincount(self.owner[self.owner >= 0], minlength=len(self))

    def sums(self, values: NDArray[np.floating]) -> Float:
        """Return the sums of ``values`` (N,) over each cluster, (C,) float64."""
        inside = self.owner >= 0
        owner, values = self.owner[inside], np.asarray(values)[inside]
        # Without a value bincount forgets the weights and answers in integers.
        return np.bincount(owner, weights=values, minlength=len(self)).astype(np.float64)

    def votes(self, member_of: Int, n_members: int) -> Int:
        """Return how many different members take part in each cluster, (C,) int64."""
        inside = self.owner >= 0
        seen = np.unique(self.owner[inside] * n_members + member_of[inside])
        return np.bincount(seen // n_members, minlength=len(self))


def box_pairs(boxes_xyxy: NDArray[np.floating], group: Int) -> Pairs:
    """Find overlapping boxes within each group.

    Args:
        boxes_xyxy: (N, 4) floats.
        group: (N,) int64; boxes of different groups never meet.
    """
    boxes = np.asarray(boxes_xyxy, dtype=np.float64)
    i, j = _sweep(boxes, group)
    low = np.maximum(boxes[i, :2], boxes[j, :2])
    high = np.minimum(boxes[i, 2:], boxes[j, 2:])
    shared = np.maximum(high - low, 0).prod(axis=1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    overlap = shared > 0
    i, j, shared = i[overlap], j[overlap], shared[overlap]
    return _pairs(i, j, shared / (area[i] + area[j] - shared), len(boxes))


def _sweep(boxes: Float, group: Int) -> tuple[Int, Int]:
    """Return pairs of boxes that may overlap, each once, two (P,) int64.

    A sweep along x within horizontal strips. Strips lie one after the other on one line, so that
    one search serves all; a pair counts in the strip where the two boxes begin to share rows.
    """
    if not len(boxes):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    top, tall = boxes[:, 1].min(), _cell_size(boxes)
    first = np.floor((boxes[:, 1] - top) / tall).astype(np.int64)
    last = np.maximum(np.floor((boxes[:, 3] - top) / tall).astype(np.int64), first)
    n_strips = last - first + 1
    box = np.repeat(np.arange(len(boxes)), n_strips)
    strip = first[box] + ranges_of(n_strips)
    line = (group[box] * (last.max() + 1) + strip) * (np.ptp(boxes[:, ::2]) + 1)
    order = np.argsort(line + boxes[box, 0])
    box, strip, line = box[order], strip[order], line[order]
    # Adding `line` rounds, but never changes an order: equal is taken for overlap, and cut later.
    n_after = np.searchsorted(line + boxes[box, 0], line + boxes[box, 2], side='right')
    n_after = np.maximum(n_after - np.arange(len(box)) - 1, 0)
    left = np.repeat(np.arange(len(box)), n_after)
    right = left + 1 + ranges_of(n_after)
    i, j = box[left], box[right]
    here = np.maximum(first[i], first[j]) == strip[left]
    return i[here], j[here]


def mask_pairs(runs: rle.Runs, group: Int) -> Pairs:
    """Find overlapping masks within each group, and their exact IoU.

    All runs are intervals on one line of pixels; a sweep along it meets only the runs that overlap.

    Args:
        runs: Runs of N masks.
        group: (N,) int64; masks of different groups never meet.
    """
    n = runs.n_masks
    shift = group[runs.owner] * (runs.image_hw[0] * runs.image_hw[1])
    order = np.argsort(runs.starts + shift, kind='stable')
    start, end = (runs.starts + shift)[order], (runs.ends + shift)[order]
    owner = runs.owner[order]
    n_after = np.searchsorted(start, end) - np.arange(len(start)) - 1
    shared = sparse.csr_matrix((n, n), dtype=np.int64)
    for chunk in _chunks(n_after):
        left = np.repeat(chunk, n_after[chunk])
        right = left + 1 + ranges_of(n_after[chunk])
        pixels = np.minimum(end[left], end[right]) - start[right]
        i = np.minimum(owner[left], owner[right])
        j = np.maximum(owner[left], owner[right])
        shared = shared + sparse.coo_matrix((pixels, (i, j)), shape=(n, n)).tocsr()
    table = shared.tocoo()
    i, j = table.row.astype(np.int64), table.col.astype(np.int64)
    area = rle.areas_of(runs)
    return _pairs(i, j, table.data / (area[i] + area[j] - table.data), n)


def _chunks(n_pairs: Int) -> Iterator[Int]:
    """Yield consecutive indices whose pairs are about ``MAX_RUN_PAIRS`` together."""
    chunk_of = (np.cumsum(n_pairs) - n_pairs) // MAX_RUN_PAIRS
    edges = np.flatnonzero(np.diff(chunk_of)) + 1
    for chunk in np.split(np.arange(len(n_pairs)), edges):
        if len(chunk):
            yield chunk


def _begins(first: Int, n: int) -> Int:
    return np.concatenate([[0], np.cumsum(np.bincount(first, minlength=n))])


def _pairs(i: Int, j: Int, iou: Float, n: int) -> Pairs:
    first, second = np.minimum(i, j), np.maximum(i, j)
    order = np.lexsort((second, first))
    return Pairs(first[order], second[order], iou[order], n)


def suppress(pairs: Pairs) -> Clusters:
    """Group greedily: the first free instance takes all free instances that it is paired with.

    The leads are what non-maximum suppression keeps.
    """
    begin = _begins(pairs.first, pairs.n).tolist()
    lead = np.full(pairs.n, -1, dtype=np.int64)
    for i in range(pairs.n):
        if lead[i] < 0:
            lead[i] = i
            near = pairs.second[begin[i] : begin[i + 1]]
            lead[near[lead[near] < 0]] = i
    return _from_leads(lead)


def one_per_member(pairs: Pairs, member_of: Int) -> Clusters:
    """Group greedily: the first free instance takes each other member's best free partner.

    Best is the highest IoU, and of equal ones the earlier instance.
    """
    order = np.lexsort((pairs.second, -pairs.iou, pairs.first))
    near = pairs.second[order].tolist()
    begin = _begins(pairs.first, pairs.n).tolist()
    member = member_of.tolist()
    lead = [-1] * pairs.n
    for i in range(pairs.n):
        if lead[i] >= 0:
            continue
        lead[i] = i
        joined = {member[i]}
        for j in near[begin[i] : begin[i + 1]]:
            if lead[j] < 0 and member[j] not in joined:
                lead[j] = i
                joined.add(member[j])
    return _from_leads(np.array(lead, dtype=np.int64))


def _from_leads(lead: Int) -> Clusters:
    """Turn each instance's lead, or -1, into clusters."""
    leads = np.unique(lead[lead >= 0])
    number = np.full(len(lead) + 1, -1, dtype=np.int64)  # the last place serves -1
    number[leads] = np.arange(len(leads))
    return Clusters(number[lead], leads)


def decay_scores(
    scores: NDArray[np.floating], pairs: Pairs, weights: Float, min_score: float
) -> Float:
    """Return each instance's score at the moment when Soft-NMS picks it, (N,) float64.

    The best of the rest is picked, and the scores of its partners that are left are multiplied by
    the pair's weight. Instances that fall to ``min_score`` or below are never picked: they get 0.

    Args:
        scores: (N,) floats.
        pairs: Instances that weaken each other.
        weights: (P,) factors in 0..1, one per pair.
        min_score: In 0..1.

    Source: N. Bodla et al., "Soft-NMS", ICCV 2017.
    """
    begin, near, weight = Pairs(pairs.first, pairs.second, weights, pairs.n).both_ways()
    begin = begin.tolist()
    current = np.asarray(scores, dtype=np.float64).copy()
    final = np.zeros(len(current))
    # A score only falls, so an entry of the heap is never too low: one that is stale goes back.
    heap = [(-score, i) for i, score in enumerate(current.tolist())]
    heapq.heapify(heap)
    while heap and -heap[0][0] > min_score:
        noted, i = heap[0]
        score = float(current[i])
        if score != -noted:
            heapq.heapreplace(heap, (-score, i))
            continue
        heapq.heappop(heap)
        final[i] = score
        a, b = begin[i], begin[i + 1]
        current[near[a:b]] *= weight[a:b]
    return final


def weighted_boxes(
    boxes_xyxy: NDArray[np.floating],
    scores: NDArray[np.floating],
    group: Int,
    iou_thr: float,
) -> tuple[Clusters, Float]:
    """Group boxes as weighted boxes fusion does: each joins the mean box that it fits best.

    A box that reaches no mean box of its group with an IoU above ``iou_thr`` starts a new one.
    A mean box moves whenever a box joins it: it is the mean of its boxes, weighted by score.

    Args:
        boxes_xyxy: (N, 4) floats, best first.
        scores: (N,) floats; if all of a cluster are 0 its boxes count alike.
        group: (N,) int64; boxes of different groups never meet.
        iou_thr: In 0..1.

    Returns:
        The clusters and their mean boxes, (C, 4) float64.

    Source: R. Solovyev et al., "Weighted boxes fusion", Image and Vision Computing 2021.
    """
    boxes = np.asarray(boxes_xyxy, dtype=np.float64)
    grid = _Grid(_cell_size(boxes))
    owner = np.empty(len(boxes), dtype=np.int64)
    leads: list[int] = []
    sums: list[list[float]] = []
    means: list[list[float]] = []
    # Boxes with score 0 still have a mean; the small number does not change any other sum.
    weights = np.maximum(np.asarray(scores, dtype=np.float64), 1e-30).tolist()
    for i, (box, weight, kind) in enumerate(
        zip(boxes.tolist(), weights, group.tolist(), strict=True)
    ):
        best = _best_mean(box, grid.near(kind, _where_to_look(box, iou_thr)), means, iou_thr)
        if best < 0:
            best = len(leads)
            leads.append(i)
            means.append(box)
            sums.append([weight * v for v in box] + [weight])
        else:
            x1, y1, x2, y2, total = sums[best]
            x1, y1, total = x1 + weight * box[0], y1 + weight * box[1], total + weight
            x2, y2 = x2 + weight * box[2], y2 + weight * box[3]
            sums[best] = [x1, y1, x2, y2, total]
            means[best] = [x1 / total, y1 / total, x2 / total, y2 / total]
        owner[i] = best
        grid.add(kind, means[best], best)
    return (
        Clusters(owner, np.array(leads, dtype=np.int64)),
        np.array(means, dtype=np.float64).reshape(-1, 4),
    )


def _where_to_look(box: list[float], iou_thr: float) -> list[float]:
    """Return what every box that fits must touch: the centre where IoU has to be above a half.

    Such boxes share more than half of the width and of the height, so each holds the other's
    centre; above 0.51 that is safe from rounding.
    """
    if iou_thr < 0.51:
        return box
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return [x, y, x, y]


class _Grid:
    """Which clusters may touch a box: each is listed in all cells its mean box ever touched."""

    def __init__(self, cell: float) -> None:
        self.cell = cell
        self.lists: dict[tuple[int, int, int], list[int]] = {}
        self.spans: dict[int, tuple[int, int, int, int]] = {}

    def span(self, box: list[float]) -> tuple[int, int, int, int]:
        """Return the first and last column, then the first and last row of cells."""
        cell = self.cell
        return int(box[0] // cell), int(box[2] // cell), int(box[1] // cell), int(box[3] // cell)

    def near(self, kind: int, box: list[float]) -> list[int]:
        """Return clusters of one group, some more than once."""
        left, right, top, bottom = self.span(box)
        found: list[int] = []
        for x in range(left, right + 1):
            for y in range(top, bottom + 1):
                if listed := self.lists.get((kind, x, y)):
                    found += listed
        return found

    def add(self, kind: int, box: list[float], cluster: int) -> None:
        """List a cluster where its mean box is now."""
        span = self.span(box)
        if self.spans.get(cluster) == span:
            return
        self.spans[cluster] = span
        for x in range(span[0], span[1] + 1):
            for y in range(span[2], span[3] + 1):
                listed = self.lists.setdefault((kind, x, y), [])
                if cluster not in listed:
                    listed.append(cluster)


def _cell_size(boxes: Float) -> float:
    """Return a grid step at which a usual box touches few cells and a large one not too many."""
    if not len(boxes):
        return 1.0
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0).max(axis=1)
    return float(max(np.median(sides), sides.max() / 32, 1.0))


def _best_mean(
    box: list[float], candidates: list[int], means: list[list[float]], iou_thr: float
) -> int:
    """Return the candidate with the highest IoU above the threshold, the lower of equals, or -1."""
    x1, y1, x2, y2 = box
    area = (x2 - x1) * (y2 - y1)
    best, best_iou = -1, iou_thr
    for candidate in candidates:
        a1, b1, a2, b2 = means[candidate]
        if a1 >= x2 or x1 >= a2 or b1 >= y2 or y1 >= b2:
            continue
        shared = ((x2 if x2 < a2 else a2) - (x1 if x1 > a1 else a1)) * (
            (y2 if y2 < b2 else b2) - (y1 if y1 > b1 else b1)
        )
        iou = shared / (area + (a2 - a1) * (b2 - b1) - shared)
        if iou >= best_iou and (iou > best_iou or candidate < best):
            best, best_iou = candidate, iou
    return best

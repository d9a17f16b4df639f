"""Panoptic quality of disjoint predictions at any thresholds, without looking at a mask again.

In: ground truth and detections of many images. Out: :class:`Scene`, whose :meth:`Scene.tally` is
what ``fusion.postprocess`` (disjoint) and ``score`` would count, in milliseconds.
Invariant: the counts are exactly theirs, for any thresholds per class and any least area.

Pixels covered by the same masks behave alike under every threshold: they are one *atom*. Which
detection owns an atom is decided by going through the detections by score, as post-processing does;
detections of one *level* have no pixel in common and are decided together, in all images at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core import rle
from cellseg_mm.core.instances import InstanceSet, canonical_order
from cellseg_mm.scores.average_precision import mean_defined
from cellseg_mm.scores.records import Counted

Int = NDArray[np.int64]
Float = NDArray[np.float64]

MATCH_THR = 0.5  # of panoptic quality, exclusive
MAX_LOST_SHARE = 0.5  # default of PostProcess


@dataclass(frozen=True, slots=True)
class PqTally:
    """What each of I images adds to the panoptic quality of K classes.

    Attributes:
        tp: (I, K) int64 pairs.
        iou_sum: (I, K) float64 over the pairs.
        n_pred: (I, K) int64.
        n_gt: (I, K) int64.
    """

    tp: Int
    iou_sum: Float
    n_pred: Int
    n_gt: Int

    def pq(self, weights: NDArray) -> Float:
        """Return PQ (B, K) when image i is there ``weights[b, i]`` times; NaN if undefined."""
        tp, n_pred, n_gt = (weights @ part for part in (self.tp, self.n_pred, self.n_gt))
        return Counted(MATCH_THR, tp, n_pred - tp, n_gt - tp, weights @ self.iou_sum).pq

    def values(self, weights: NDArray) -> Float:
        """Return mPQ+ (B,), the mean of :meth:`pq` over defined classes."""
        return mean_defined(self.pq(weights).T)

    @classmethod
    def mixed(cls, parts: Sequence[PqTally], part_of: Int) -> PqTally:
        """Take image i from ``parts[part_of[i]]``; ``part_of`` is (I,)."""
        at = np.arange(len(part_of))
        return cls(
            *(
                np.stack([getattr(part, name) for part in parts])[part_of, at]
                for name in ('tp', 'iou_sum', 'n_pred', 'n_gt')
            )
        )


@dataclass(frozen=True, slots=True)
class Scene:
    """All images' detections and instances as atoms; P detections, A atoms, E entries.

    An entry is a detection that covers an atom. Detections of an image are best first.

    Attributes:
        n_images: I.
        n_classes: K.
        image_of: (P,) int64.
        class_ids: (P,) int64.
        scores: (P,) float32.
        uncut: (P,) int64 mask px.
        atom_px: (A,) int64.
        levels: Per level its detections (n,), and per entry of theirs the atom (e,) and the index
            in the detections (e,).
        pair_pred: (Q,) int64, detection of each pair of one class that overlaps.
        pair_gt_px: (Q,) int64, area of the pair's instance.
        join_atom: (J,) int64, atoms that both of a pair cover.
        join_pair: (J,) int64, that pair.
        n_gt: (I, K) int64.
    """

    n_images: int
    n_classes: int
    image_of: Int
    class_ids: Int
    scores: NDArray[np.float32]
    uncut: Int
    atom_px: Int
    levels: tuple[tuple[Int, Int, Int], ...]
    pair_pred: Int
    pair_gt_px: Int
    join_atom: Int
    join_pair: Int
    n_gt: Int

    def tally(self, score_thr: Sequence[float], min_area_px: int) -> PqTally:
        """Count pairs as if the images had been post-processed and scored.

        Args:
            score_thr: K thresholds, none below the scene's floor.
            min_area_px: Fewest pixels after overlaps were resolved.
        """
        owner, left = self._resolve(score_thr, min_area_px)
        mine = owner[self.join_atom] == self.pair_pred[self.join_pair]
        shared = np.bincount(
            self.join_pair, weights=self.atom_px[self.join_atom] * mine, minlength=self.n_pairs
        )
        iou = shared / (self.pair_gt_px + left[self.pair_pred] - shared)
        found = np.flatnonzero(iou > MATCH_THR)
        # Two disjoint detections never both match one instance. Instances of a class may overlap
        # in imported data; then a detection takes the one with the larger IoU.
        found = found[np.argsort(-iou[found], kind='stable')]
        _, first = np.unique(self.pair_pred[found], return_index=True)
        found = found[first]
        preds = self.pair_pred[found]
        return PqTally(
            tp=self._table(preds).astype(np.int64),
            iou_sum=self._table(preds, iou[found]),
            n_pred=self._table(np.flatnonzero(left > 0)).astype(np.int64),
            n_gt=self.n_gt,
        )

    @property
    def n_pairs(self) -> int:
        """Number of pairs that overlap."""
        return len(self.pair_pred)

    def _resolve(self, score_thr: Sequence[float], min_area_px: int) -> tuple[Int, Int]:
        """Return each atom's detection or -1, and the pixels that each detection is left with."""
        alive = self.scores >= np.array(score_thr, dtype=np.float32)[self.class_ids]
        owner = np.full(len(self.atom_px), -1, dtype=np.int64)
        left = np.zeros(len(self.scores), dtype=np.int64)
        for preds, atoms, inside in self.levels:
            free = (owner[atoms] < 0) & alive[preds][inside]
            area = np.bincount(inside, weights=self.atom_px[atoms] * free, minlength=len(preds))
            lost = self.uncut[preds] - area
            stays = (area > 0) & (lost <= MAX_LOST_SHARE * self.uncut[preds])
            stays &= area >= min_area_px
            taken = free & stays[inside]
            owner[atoms[taken]] = preds[inside[taken]]
            left[preds] = np.where(stays, area, 0)
        return owner, left

    def _table(self, preds: Int, weights: Float | None = None) -> NDArray:
        cell = self.image_of[preds] * self.n_classes + self.class_ids[preds]
        size = self.n_images * self.n_classes
        return np.bincount(cell, weights=weights, minlength=size).reshape(self.n_images, -1)


def make_scene(
    gt_sets: Sequence[InstanceSet],
    pred_sets: Sequence[InstanceSet],
    n_classes: int,
    *,
    floor: float = 0.0,
) -> Scene:
    """Split all images into atoms.

    Args:
        gt_sets: One set per image.
        pred_sets: The same images in the same order.
        n_classes: K.
        floor: Detections with a lower score are left out.
    """
    parts = [
        _atoms(gt, _best_first(pred, floor)) for gt, pred in zip(gt_sets, pred_sets, strict=True)
    ]
    atom_base, pred_base, gt_base = (
        np.cumsum([0, *(getattr(part, name) for part in parts)])
        for name in ('n_atoms', 'n_preds', 'n_gts')
    )

    def joined(name: str, base: Int | None = None) -> Int:
        shifts = np.zeros(len(parts), dtype=np.int64) if base is None else base
        rows = [getattr(part, name) + shifts[i] for i, part in enumerate(parts)]
        return np.concatenate(rows).astype(np.int64)

    class_ids, gt_class = joined('pred_class'), joined('gt_class')
    pred_entries = joined('entry_pred', pred_base), joined('entry_atom', atom_base)
    gt_entries = joined('entry_gt', gt_base), joined('entry_gt_atom', atom_base)
    pairs = _pairs(pred_entries, gt_entries, class_ids, gt_class, n_atoms=int(atom_base[-1]))
    pair_pred, pair_gt, join_atom, join_pair = pairs
    return Scene(
        n_images=len(parts),
        n_classes=n_classes,
        image_of=np.repeat(np.arange(len(parts)), np.diff(pred_base)),
        class_ids=class_ids,
        scores=np.concatenate([part.scores for part in parts]),
        uncut=joined('uncut'),
        atom_px=joined('atom_px'),
        levels=_levels(*pred_entries, n_preds=int(pred_base[-1])),
        pair_pred=pair_pred,
        pair_gt_px=joined('gt_px')[pair_gt],
        join_atom=join_atom,
        join_pair=join_pair,
        n_gt=np.stack([np.bincount(s.class_ids, minlength=n_classes) for s in gt_sets]),
    )


def _best_first(pred: InstanceSet, floor: float) -> InstanceSet:
    pred = pred[np.flatnonzero(pred.scores >= np.float32(floor))]
    return pred[canonical_order(pred)]


@dataclass(frozen=True, slots=True)
class _Atoms:
    """One image's atoms; see :class:`Scene`. Indices are the image's own."""

    scores: NDArray[np.float32]
    pred_class: Int
    gt_class: Int
    uncut: Int
    gt_px: Int
    atom_px: Int
    entry_pred: Int
    entry_atom: Int
    entry_gt: Int
    entry_gt_atom: Int

    @property
    def n_atoms(self) -> int:
        return len(self.atom_px)

    @property
    def n_preds(self) -> int:
        return len(self.scores)

    @property
    def n_gts(self) -> int:
        return len(self.gt_class)


def _atoms(gt: InstanceSet, pred: InstanceSet) -> _Atoms:
    pred_runs = rle.decode_runs(pred.rles, pred.image_hw)
    gt_runs = rle.decode_runs(gt.rles, gt.image_hw)
    edges = np.unique(
        np.concatenate([pred_runs.starts, pred_runs.ends, gt_runs.starts, gt_runs.ends])
    )
    first, px = _distinct_intervals(edges, pred_runs, gt_runs)
    entry_pred, entry_atom = _entries(edges, pred_runs, first)
    entry_gt, entry_gt_atom = _entries(edges, gt_runs, first)
    return _Atoms(
        scores=pred.scores,
        pred_class=pred.class_ids,
        gt_class=gt.class_ids,
        uncut=rle.areas_of(pred_runs),
        gt_px=rle.areas_of(gt_runs),
        atom_px=px,
        entry_pred=entry_pred,
        entry_atom=entry_atom,
        entry_gt=entry_gt,
        entry_gt_atom=entry_gt_atom,
    )


def _distinct_intervals(edges: Int, pred_runs: rle.Runs, gt_runs: rle.Runs) -> tuple[Int, Int]:
    """Group the intervals between edges by the masks that cover them.

    Masks have random 64-bit names, and an interval's name is the sum of its masks' names: with
    10,000 intervals an image, two different sums meet by chance once in 10^11 images.

    Returns:
        Per atom covered by a detection its first interval, rising, and its pixels.
    """
    generator = np.random.default_rng(0)
    name_change = np.zeros(len(edges), dtype=np.uint64)
    n_change = np.zeros(len(edges), dtype=np.int64)
    for runs, is_pred in ((pred_runs, 1), (gt_runs, 0)):
        names = generator.integers(1, 2**63, size=runs.n_masks, dtype=np.uint64)[runs.owner]
        begin, end = np.searchsorted(edges, runs.starts), np.searchsorted(edges, runs.ends)
        np.add.at(name_change, begin, names)
        np.subtract.at(name_change, end, names)
        np.add.at(n_change, begin, is_pred)
        np.subtract.at(n_change, end, is_pred)
    covered = np.flatnonzero(np.cumsum(n_change) > 0)
    names = np.cumsum(name_change)[covered]
    _, index, atom = np.unique(names, return_index=True, return_inverse=True)
    lengths = edges[np.minimum(covered + 1, len(edges) - 1)] - edges[covered]
    px = np.bincount(atom.reshape(-1), weights=lengths, minlength=len(index)).astype(np.int64)
    order = np.argsort(index)
    return covered[index[order]], px[order]


def _entries(edges: Int, runs: rle.Runs, first: Int) -> tuple[Int, Int]:
    """Return mask and atom of each atom that a mask covers, two (E,) int64."""
    low = np.searchsorted(first, np.searchsorted(edges, runs.starts))
    high = np.searchsorted(first, np.searchsorted(edges, runs.ends))
    n = high - low
    within = np.arange(int(n.sum())) - np.repeat(np.cumsum(n) - n, n)
    return np.repeat(runs.owner, n), np.repeat(low, n) + within


def _pairs(
    pred_entries: tuple[Int, Int],
    gt_entries: tuple[Int, Int],
    class_ids: Int,
    gt_class: Int,
    *,
    n_atoms: int,
) -> tuple[Int, Int, Int, Int]:
    """Return the pairs of one class that overlap (two (Q,)), and their atoms (two (J,))."""
    pred, atom = pred_entries
    order = np.argsort(atom, kind='stable')
    begin = np.searchsorted(atom[order], np.arange(n_atoms + 1))
    gt, gt_atom = gt_entries
    n = begin[gt_atom + 1] - begin[gt_atom]
    within = np.arange(int(n.sum())) - np.repeat(np.cumsum(n) - n, n)
    entry = order[np.repeat(begin[gt_atom], n) + within]
    pair_pred, pair_gt, join_atom = pred[entry], np.repeat(gt, n), atom[entry]
    same = class_ids[pair_pred] == gt_class[pair_gt]
    n_gts = max(len(gt_class), 1)
    key, join_pair = np.unique((pair_pred * n_gts + pair_gt)[same], return_inverse=True)
    return key // n_gts, key % n_gts, join_atom[same], join_pair.reshape(-1)


def _levels(pred: Int, atom: Int, *, n_preds: int) -> tuple[tuple[Int, Int, Int], ...]:
    """Put each detection one level above all better ones that share a pixel with it."""
    order = np.lexsort((pred, atom))
    pred, atom = pred[order], atom[order]
    neighbours = atom[1:] == atom[:-1]
    edges = np.unique(np.stack([pred[1:], pred[:-1]])[:, neighbours], axis=1)
    level = [0] * n_preds
    for worse, better in edges.T.tolist():  # by the worse one: the better one's level is final
        level[worse] = max(level[worse], level[better] + 1)
    level_of = np.array(level, dtype=np.int64)
    by_level = np.argsort(level_of[pred], kind='stable')
    pred, atom = pred[by_level], atom[by_level]
    n_levels = int(level_of.max()) + 1 if n_preds else 0
    bounds = np.searchsorted(level_of[pred], np.arange(n_levels + 1))
    result = []
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        members, inside = np.unique(pred[begin:end], return_inverse=True)
        result.append((members, atom[begin:end], inside.reshape(-1)))
    return tuple(result)

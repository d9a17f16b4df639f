"""What fusion itself brings, measured on images that none of the members ever saw.

In: prediction files of members that were trained with ``exclude_folds=[h]``, on the images of fold
h. Out: the fused scores beside the members' own, and an interval of the difference. Invariant: a
member that has seen one of the images, or may have, is refused.

In plain k-fold cross-validation each image has exactly one clean member, so there is nothing to
fuse without leaking; docs/fusion.md says why this design was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.arrays import Float
from cellseg_mm.core.errors import PredictionError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.progress import track
from cellseg_mm.data.folds import load_folds
from cellseg_mm.data.images import Images
from cellseg_mm.data.labels import read_gt
from cellseg_mm.ensemble.fuse_files import clean_sets
from cellseg_mm.fusion.fuse import from_spec, fuse, post_from_spec, to_spec
from cellseg_mm.scores.average_precision import mean_defined, rank_class, weighted_ap
from cellseg_mm.scores.bootstrap import resampled_weights, sampling_units
from cellseg_mm.scores.matching import compare

IOU_THR = 0.5


@dataclass(frozen=True, slots=True)
class RuleGain:
    """One fusion rule on the held-out images.

    Attributes:
        rule: As on the command line.
        ap50: Mask AP50 of the fused predictions.
        gain: ``ap50`` minus the mean AP50 of the single members.
        interval: 95 % percentile interval of ``gain`` over resampled groups of images (see
            ``FusionGain.interval_unit``); every resample scores the fused predictions and all
            members on the same images.
        gain_over_best: ``ap50`` minus the best single member, chosen on these very images, which
            flatters that member: a lower bound.
    """

    rule: str
    ap50: float
    gain: float
    interval: tuple[float, float]
    gain_over_best: float


@dataclass(frozen=True, slots=True)
class FusionGain:
    """The estimate.

    Attributes:
        n_images: Images of the held-out part.
        fold_hash: Hash of the folds.
        held_out: The fold.
        member_ap50: Mask AP50 of each member by its file's path.
        rules: One entry per rule, in the order given.
        cap: Detections per class and image that count.
        interval_unit: What the resamples draw: ``images``, or ``groups`` of them (patients).
        n_interval_units: How many of these there are.
    """

    n_images: int
    fold_hash: str
    held_out: int
    member_ap50: dict[str, float]
    rules: tuple[RuleGain, ...]
    cap: int
    interval_unit: str
    n_interval_units: int

    def table(self) -> str:
        """Return the estimate for a terminal."""
        lines = [
            f'fold {self.held_out} of folds {self.fold_hash}: {self.n_images} images that none of '
            f'{len(self.member_ap50)} members saw; mask AP50 at cap {self.cap}; '
            f'95 % intervals over {self.n_interval_units} {self.interval_unit}'
        ]
        lines += [f'  {value:.4f}  {path}' for path, value in self.member_ap50.items()]
        mean = np.mean(list(self.member_ap50.values()))
        lines.append(f'  {mean:.4f}  mean of the members')
        for rule in self.rules:
            low, high = rule.interval
            lines.append(
                f'  {rule.ap50:.4f}  {rule.rule}: {rule.gain:+.4f} ({low:+.4f} to {high:+.4f}), '
                f'against the best member {rule.gain_over_best:+.4f}'
            )
        return '\n'.join(lines)


def fusion_gain(
    paths: Sequence[Path | str],
    images: Images,
    rules: Sequence[str],
    *,
    post: str = '',
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> FusionGain:
    """Measure what each rule brings over single members.

    Args:
        paths: At least two members' prediction files of the images.
        images: The images of the held-out fold (split ``val``).
        rules: Rules, as on the command line.
        post: Post-processing of the fused instances.
        n_bootstrap: Resamples of the images, or of their groups where the folds know any.
        seed: Of the resampling.

    Raises:
        PredictionError: Fewer than two members, or a file does not hold these images.
        FoldError: A member saw one of the images, or was trained with other folds.
    """
    if len(paths) < 2:
        raise PredictionError(
            f'fusion gain: {len(paths)} member(s) given; at least 2 are needed; train more folds '
            'with the same exclude_folds'
        )
    members, sets_of = clean_sets(paths, images)
    gt = [read_gt(case) for case in track(images.cases, description='ground truth')]
    after = post_from_spec(post)
    candidates: list[Sequence[InstanceSet]] = [*sets_of]
    for text in rules:
        rule = from_spec(text)
        candidates.append([fuse(list(sets), rule, after) for sets in zip(*sets_of, strict=True)])
    cap = max(1, max(len(s) for sets in candidates for s in sets))
    unit, unit_of = sampling_units([g.name for g in gt], load_folds(images.folds_path).groups)
    weights = _resamples(unit_of, n_bootstrap, seed)
    ap50 = [_ap50(gt, sets, len(images.class_names), cap, weights) for sets in candidates]
    single, fused = np.stack(ap50[: len(members)]), ap50[len(members) :]
    return FusionGain(
        n_images=len(gt),
        fold_hash=members[0].fold_hash,
        held_out=int(images.fold or 0),
        member_ap50={m.source: float(v[0]) for m, v in zip(members, single, strict=True)},
        rules=tuple(_rule_gain(t, v, single) for t, v in zip(rules, fused, strict=True)),
        cap=cap,
        interval_unit=unit,
        n_interval_units=int(unit_of.max()) + 1,
    )


def _resamples(unit_of: NDArray[np.int64], n_bootstrap: int, seed: int) -> NDArray[np.int64]:
    """Return how often each image counts: once each, then one row per resample."""
    once = np.ones((1, len(unit_of)), dtype=np.int64)
    return np.concatenate([once, resampled_weights(unit_of, n_bootstrap, seed)])


def _ap50(
    gt: Sequence[InstanceSet],
    pred: Sequence[InstanceSet],
    n_classes: int,
    cap: int,
    weights: NDArray[np.int64],
) -> Float:
    """Return the mean AP50 over classes for each row of weights, (B,)."""
    images = [compare(g, p) for g, p in zip(gt, pred, strict=True)]
    ranked = [rank_class(images, k, np.array([IOU_THR]), cap=cap) for k in range(n_classes)]
    return mean_defined(np.stack([weighted_ap(r, weights)[:, 0] for r in ranked]))


def _rule_gain(text: str, fused: Float, single: Float) -> RuleGain:
    gains = fused - single.mean(axis=0)
    resampled = gains[1:][~np.isnan(gains[1:])]
    low, high = np.percentile(resampled, [2.5, 97.5]) if len(resampled) else (np.nan, np.nan)
    return RuleGain(
        to_spec(from_spec(text)),
        ap50=float(fused[0]),
        gain=float(gains[0]),
        interval=(float(low), float(high)),
        gain_over_best=float(fused[0] - single[:, 0].max()),
    )

"""What a second model changes, on the same images, with an interval.

In: ground truth and two sets of predictions. Out: :class:`Change` of AP50 and mPQ. Invariant: both
models are scored on the same resamples, so that how hard the images are cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cellseg_mm.core.files import JsonValue
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.scores.bootstrap import sampling_units
from cellseg_mm.scores.records import ScoreParams
from cellseg_mm.scores.score import percentiles, resampled_scores, score

NAMES = {'segm_AP50': 'AP50', 'mPQ': 'mPQ'}  # of ``Scores.headline``, and for people
FEWEST_UNITS = 3  # an interval over fewer patients or images says nothing


@dataclass(frozen=True, slots=True)
class Change:
    """One score of two models.

    Attributes:
        name: For people.
        before: Of the first model.
        after: Of the second.
        interval: 95 % percentile interval of ``after - before`` over resampled groups of images;
            None where there are fewer than ``FEWEST_UNITS``.
    """

    name: str
    before: float
    after: float
    interval: tuple[float, float] | None

    def text(self) -> str:
        """Return it for people."""
        text = f'{self.name} {self.before:.3f} -> {self.after:.3f} ({self.after - self.before:+.3f}'
        if self.interval is None:
            return f'{text}, too few images for an interval)'
        low, high = self.interval
        return f'{text}, 95 % interval {low:+.3f} to {high:+.3f})'

    def to_json(self) -> dict[str, JsonValue]:
        """Return it as JSON; what is not defined is null."""
        low, high = self.interval or (math.nan, math.nan)
        numbers = {
            'before': self.before,
            'after': self.after,
            'difference': self.after - self.before,
            'low': low,
            'high': high,
        }
        return {key: None if math.isnan(value) else value for key, value in numbers.items()}


def changes(
    gt_sets: Sequence[InstanceSet],
    before: Sequence[InstanceSet],
    after: Sequence[InstanceSet],
    class_names: Sequence[str],
    params: ScoreParams,
    *,
    groups: Mapping[str, str],
) -> tuple[tuple[Change, ...], str, int]:
    """Compare two models on the same images; see :func:`cellseg_mm.scores.score.score`.

    Returns:
        A change by score; what the resamples draw (``groups`` or ``images``), and of how many.
    """
    unit, unit_of = sampling_units([gt.name for gt in gt_sets], groups)
    n_units = len(set(unit_of.tolist()))
    plain = replace(params, n_bootstrap=0)
    values = [score(gt_sets, sets, class_names, plain).headline() for sets in (before, after)]
    samples = [
        resampled_scores(gt_sets, sets, class_names, params, groups=groups)
        for sets in (before, after)
    ]
    found = tuple(
        Change(
            name,
            values[0][key],
            values[1][key],
            percentiles(samples[1][key] - samples[0][key]) if n_units >= FEWEST_UNITS else None,
        )
        for key, name in NAMES.items()
    )
    return found, unit, n_units

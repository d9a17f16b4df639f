"""What transforms share: the sample's own randomness, its masks and its weights.

In: a results dict. Out: its parts. Invariant: a sample is a function of seed and draw number.
"""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.pipeline.label_map_masks import LabelMapMasks


def sample_rng() -> np.random.Generator:
    """Return a generator that follows the seed which mmengine and SeededDataset set per sample."""
    return np.random.default_rng(random.getrandbits(64))


def require_share(name: str, value: float) -> None:
    """Refuse what is no share from 0 to 1."""
    if not 0 <= value <= 1:
        raise ConfigError(f'{name}: {value}; expected a share from 0 to 1')


def label_masks(results: dict, transform: str) -> LabelMapMasks:
    """Return a sample's masks; refuse those that LoadLabelMaps did not make."""
    masks = results.get('gt_masks')
    if type(masks) is not LabelMapMasks:
        raise ConfigError(
            f'{transform}: gt_masks is {type(masks).__name__}; expected LabelMapMasks; '
            'put LoadLabelMaps before it in the pipeline'
        )
    return masks


def keep_instances(results: dict, keep: NDArray[np.bool_]) -> dict:
    """Drop the cells that ``keep``, (N,), leaves out; changes and returns ``results``."""
    for key in ('gt_bboxes', 'gt_bboxes_labels', 'gt_masks', 'gt_ignore_flags'):
        if key in results:
            results[key] = results[key][keep]
    return results


def record_homography(results: dict, step: NDArray[np.float32]) -> None:
    """Note the step as mmdet's own transforms do, for pipelines that map boxes back."""
    before = results.get('homography_matrix')
    results['homography_matrix'] = step if before is None else step @ before


def class_weights(class_ids: NDArray[np.int64], *, power: int) -> NDArray[np.float64]:
    """Return each cell's probability, proportional to (number of cells of its class) ** -power."""
    _, index, counts = np.unique(class_ids, return_inverse=True, return_counts=True)
    weights = 1.0 / counts[index] ** power
    return weights / weights.sum()

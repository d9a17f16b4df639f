"""Six drawn images in three folds, their truth, and predictions as tools/test.py writes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data.folds import Folds
from cellseg_mm.results.predictions import Predictions, save_predictions

CLASSES = ('epithelial', 'lymphocyte', 'neutrophil', 'macrophage')


@dataclass(frozen=True)
class World:
    """Six drawn images in three folds, and their truth."""

    root: Path
    data_root: Path
    folds: Folds
    gt: dict[str, InstanceSet]


def noisy(gt: InstanceSet, rng: np.random.Generator) -> InstanceSet:
    """Some of the true cells, with scores and a few wrong classes."""
    kept = gt[rng.random(len(gt)) < 0.7]
    scores = rng.uniform(0.05, 1, len(kept)).astype(np.float32)
    wrong = rng.random(len(kept)) < 0.15
    class_ids = np.where(wrong, (kept.class_ids + 1) % 4, kept.class_ids)
    return replace(kept, scores=scores, class_ids=class_ids).by_score()


def write(
    world: World, path: Path, *, fold: int, seed: int = 0, trained: dict | None = None, **more
) -> Path:
    """Write a fold's validation predictions as tools/test.py does."""
    rng = np.random.default_rng(seed)
    sets = [noisy(world.gt[name], rng) for name in world.folds.val_names(fold)]
    provenance = {
        'split': 'val',
        'fold': fold,
        'fold_hash': world.folds.hash,
        'class_names': list(CLASSES),
        **more,
    }
    if trained is not None:
        provenance['trained'] = trained
    path.parent.mkdir(parents=True, exist_ok=True)
    save_predictions(path, Predictions(tuple(sets), provenance))
    return path


def trained_for(world: World, fold: int, *excluded: int) -> dict:
    return {'fold': fold, 'fold_hash': world.folds.hash, 'excluded_folds': list(excluded)}

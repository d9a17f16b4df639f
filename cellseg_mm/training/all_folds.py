"""Train one member on all folds, after cross-validation has judged the recipe.

In: a fold's config and the work folders of the trained folds. Out: the config changed so that every
image is trained on and none is scored. Invariant: what the folds chose decides the length; the
checkpoint says that it has seen everything.
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path

from mmengine.config import Config

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.layout import FINISHED
from cellseg_mm.core.trainings import read_mark
from cellseg_mm.data.config import dataset_settings

FOLDER = 'all'  # beside the folds' work folders
BEST_ITERATION = re.compile(r'_iter_(\d+)\.pth$')


def train_on_all_folds(cfg: Config, *, work_dir: str | None = None) -> str:
    """Change a fold's config to train on every image of the data, with no validation.

    Args:
        cfg: From :func:`cellseg_mm.training.load_config.load_config`; changed in place. Its
            ``work_dir`` is the fold's, whose neighbours are looked at.
        work_dir: Folder for this training; None for ``all`` beside the folds'.

    Returns:
        A sentence about the length of the training.

    Raises:
        ConfigError: The recipe is not counted in iterations, or starts from weights that one fold
            has chosen.
    """
    if cfg.train_cfg.get('max_iters') is None:
        raise ConfigError(
            '--all-folds: train_cfg has no max_iters; expected a recipe that is counted in '
            'iterations, whose number the folds choose; use IterBasedTrainLoop'
        )
    dataset = dataset_settings(cfg, 'train_dataloader')
    dataset.split, dataset.fold = 'all', None
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.default_hooks.checkpoint.pop('save_best', None)
    folds = Path(cfg.work_dir).parent
    best = best_iterations(folds)
    planned = int(cfg.train_cfg.max_iters)
    cfg.work_dir = work_dir or str(folds / FOLDER)
    if not best:
        return f'no finished fold in {folds}: training for the {planned} iterations of the recipe'
    # The schedule of rates stays as it was where the folds were best.
    cfg.train_cfg.max_iters = min(planned, int(statistics.median_low(best)))
    return (
        f'training for {cfg.train_cfg.max_iters} iterations: {len(best)} finished folds were best '
        f'at {", ".join(map(str, best))} of {planned}'
    )


def best_iterations(folder: Path) -> list[int]:
    """Return at which iteration each finished training below a folder was best."""
    marks = [read_mark(path) for path in sorted(folder.glob(f'fold*/{FINISHED}'))]
    found = [BEST_ITERATION.search(str(mark.get('best', ''))) for mark in marks]
    return [int(match.group(1)) for match in found if match]

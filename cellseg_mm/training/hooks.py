"""Hooks of training: provenance, exact resuming, and stopping where going on makes no sense.

In: a running mmengine Runner. Out: checkpoints that say where they come from, and errors that name
images. Invariant: none of these hooks changes what a model computes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mmdet.registry import HOOKS
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import Runner

from cellseg_mm.core import files
from cellseg_mm.core.errors import CellSegError


@HOOKS.register_module()
class StepSeedHook(Hook):
    """Seed the main process before every step from seed, iteration and rank.

    RoI and anchor sampling draw random numbers in the model. With this hook (and SeededDataset) a
    run that was killed and resumed repeats exactly what an uninterrupted run would have done.
    """

    priority = 'VERY_HIGH'

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Set the seeds of random, numpy and torch."""
        entropy = [int(runner.seed or 0), runner.iter, get_rank()]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - mmdet draws from it
        torch.manual_seed(seed)


@HOOKS.register_module()
class RevalidateOnResumeHook(Hook):
    """Validate once more when a run goes on from a checkpoint of a validation's iteration.

    A checkpoint is written before the validation of its iteration. A run that is killed during that
    validation would otherwise never know its score, and could miss its best checkpoint.
    """

    priority = 'LOWEST'  # after CheckpointHook knows where the best checkpoint goes

    def before_train(self, runner: Runner) -> None:
        """Run the validation that an uninterrupted run has done at this iteration."""
        loop = runner.train_loop
        interval = getattr(loop, 'val_interval', 0)
        is_due = runner.iter > 0 and interval and runner.iter % interval == 0
        if not (runner._resume and is_due and runner.val_loop is not None):
            return
        runner.logger.info(f'Resumed at iteration {runner.iter}: repeating its validation')
        runner.val_loop.run()
        runner.model.train()


@HOOKS.register_module()
class StopOnInvalidLossHook(Hook):
    """Stop when the loss is not finite, and save which images were in the batch.

    Args:
        interval: Check every so many iterations; each check waits for the device.

    Raises:
        CellSegError: The loss is NaN or infinite.
    """

    def __init__(self, interval: int = 1) -> None:
        self.interval = interval

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None
    ) -> None:
        """Look at the loss of this step."""
        if not self.every_n_train_iters(runner, self.interval) or not outputs:
            return
        losses = {k: v for k, v in outputs.items() if 'loss' in k and torch.is_tensor(v)}
        bad = sorted(name for name, value in losses.items() if not torch.isfinite(value).all())
        if not bad:
            return
        paths = _image_paths(data_batch)
        report = Path(runner.work_dir) / f'invalid_loss_rank{get_rank()}.json'
        values = {name: str(value.tolist()) for name, value in losses.items()}
        files.write_json(report, {'iter': runner.iter, 'losses': values, 'images': paths})
        raise CellSegError(
            f'training: {", ".join(bad)} not finite at iteration {runner.iter + 1} on {paths}; '
            f'expected finite losses; the batch is in {report}; look at these images, or lower the '
            'learning rate or set optim_wrapper.clip_grad'
        )


def _image_paths(data_batch: dict | None) -> list[str]:
    samples: Sequence = (data_batch or {}).get('data_samples', ())
    return [str(sample.metainfo.get('img_path', '?')) for sample in samples]

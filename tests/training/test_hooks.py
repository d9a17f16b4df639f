"""training.hooks: seeds of a step, the validation that a kill cut off, and invalid losses."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

from cellseg_mm.core.errors import CellSegError  # noqa: E402
from cellseg_mm.training.hooks import (  # noqa: E402
    RevalidateOnResumeHook,
    StepSeedHook,
    StopOnInvalidLossHook,
)

pytestmark = pytest.mark.mm


def draws(seed: int | None, step: int) -> tuple[float, float, float]:
    StepSeedHook().before_train_iter(SimpleNamespace(seed=seed, iter=step), batch_idx=0)
    return random.random(), float(np.random.rand()), torch.rand(()).item()  # noqa: NPY002


def test_a_step_draws_the_same_whatever_was_drawn_before() -> None:
    first = draws(3, 7)
    assert first == draws(3, 7)
    for other in (draws(3, 8), draws(4, 7), draws(None, 7)):
        assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ('step', 'resumes', 'interval', 'n_runs'),
    [
        pytest.param(20, True, 10, 1, id='at a validation'),
        pytest.param(25, True, 10, 0, id='between two'),
        pytest.param(0, True, 10, 0, id='at the start'),
        pytest.param(20, False, 10, 0, id='not resumed'),
        pytest.param(20, True, 0, 0, id='never validated'),
    ],
)
def test_a_resumed_run_repeats_the_validation_of_its_iteration(
    step: int, resumes: bool, interval: int, n_runs: int
) -> None:
    model, runs = torch.nn.Linear(1, 1).eval(), []
    RevalidateOnResumeHook().before_train(
        SimpleNamespace(
            iter=step,
            _resume=resumes,
            train_loop=SimpleNamespace(val_interval=interval),
            val_loop=SimpleNamespace(run=lambda: runs.append(step)),
            model=model,
            logger=logging.getLogger('test'),
        )
    )
    assert len(runs) == n_runs
    assert model.training == bool(n_runs)  # back in training mode after validating


def test_a_loss_that_is_not_finite_stops_and_its_batch_is_written(tmp_path: Path) -> None:
    runner = SimpleNamespace(iter=4, work_dir=str(tmp_path))
    batch = {'data_samples': [SimpleNamespace(metainfo={'img_path': 'a/image.tif'})]}
    good = {'loss_cls': torch.tensor(1.0), 'acc': torch.tensor(float('nan'))}
    hook = StopOnInvalidLossHook()
    hook.after_train_iter(runner, 0, batch, good)  # an accuracy is no loss
    bad = {**good, 'loss_mask': torch.tensor([1.0, float('inf')])}
    with pytest.raises(CellSegError, match=r'loss_mask not finite at iteration 5 on .*a/image'):
        hook.after_train_iter(runner, 0, batch, bad)
    record = json.loads((tmp_path / 'invalid_loss_rank0.json').read_text())
    assert (record['iter'], record['images']) == (4, ['a/image.tif'])
    assert record['losses']['loss_mask'] == '[1.0, inf]'
    StopOnInvalidLossHook(interval=10).after_train_iter(runner, 0, batch, bad)  # not yet due

"""Equal seeds give equal weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import cellseg_mm.components
from tests.faults.jobs import checkpoint_digest
from tests.faults.kill import run_to_end
from tests.support.micro import MICRO

pytestmark = pytest.mark.mm
assert cellseg_mm.components


def weights_of(data: Path, work_dir: Path, *words: str, seed: int = 1) -> str:
    settings = {
        **MICRO,
        'train_cfg.max_iters': 2,
        'train_cfg.val_interval': 50,
        'train_dataloader.dataset.dataset.pipeline.3.crop_size': [64, 64],
        'val_dataloader.dataset.pipeline.1.scale_factor': 0.25,
        'randomness.seed': seed,
    }
    options = ['--cfg-options', *(f'{k}={json.dumps(v)}' for k, v in settings.items())]
    log = work_dir.with_suffix('.log')
    os.environ['CELLSEG_DATA'] = str(data)
    command = ['tools/train.py', 'configs/sample/fold0.py', '--work-dir', str(work_dir)]
    assert run_to_end([*command, *words, *options], log) == 0, log.read_text()[-3000:]
    if words:
        assert 'deterministic=True' in log.read_text().replace(' ', '')
    return checkpoint_digest(work_dir / 'iter_2.pth')


def test_deterministic_training_gives_the_same_weights_twice(
    sample_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('CELLSEG_DATA', str(sample_data))
    torch.set_num_threads(1)
    first = weights_of(sample_data, tmp_path / 'a', '--deterministic')
    assert weights_of(sample_data, tmp_path / 'b', '--deterministic') == first
    assert weights_of(sample_data, tmp_path / 'c', '--deterministic', seed=2) != first

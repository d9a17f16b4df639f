"""training.all_folds: all images are trained on, none is scored, the folds choose the length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cellseg_mm.core.layout import FINISHED
from cellseg_mm.data.cases import find_cases
from cellseg_mm.training.all_folds import train_on_all_folds
from tests.training.test_train import options, run, train

pytestmark = pytest.mark.mm


def finish(folder: Path, best: str) -> None:
    folder.mkdir(parents=True)
    (folder / FINISHED).write_text(json.dumps({'version': 2, 'best': best}))


def test_length_is_what_the_folds_chose(sample_config, tmp_path: Path) -> None:
    sample_config.work_dir = str(tmp_path / 'sample/fold0')
    planned = sample_config.train_cfg.max_iters
    for fold, best in enumerate([40, 60, planned]):
        finish(tmp_path / f'sample/fold{fold}', f'best_cell_segm_mAP_50_iter_{best}.pth')
    finish(tmp_path / 'sample/ensemble', 'best_cell_segm_mAP_50_iter_1.pth')
    said = train_on_all_folds(sample_config)
    assert sample_config.train_cfg.max_iters == 60
    assert sample_config.work_dir == str(tmp_path / 'sample/all')
    assert said == (
        f'training for 60 iterations: 3 finished folds were best at 40, 60, {planned} of {planned}'
    )


def test_without_folds_the_recipe_says_how_long(sample_config, tmp_path: Path) -> None:
    sample_config.work_dir = str(tmp_path / 'sample/fold0')
    planned = sample_config.train_cfg.max_iters
    assert 'no finished fold' in train_on_all_folds(sample_config, work_dir='elsewhere')
    assert sample_config.train_cfg.max_iters == planned
    assert sample_config.work_dir == 'elsewhere'


def test_all_images_are_trained_on_and_none_can_be_scored(
    sample_data: Path, tmp_path: Path
) -> None:
    done = train(sample_data, tmp_path, '--all-folds', **{'train_cfg.max_iters': 1})
    n_images = len(find_cases(sample_data, 'train', 4))
    assert f'all: {n_images} images of' in done.stdout
    assert 'trained on all images:' in done.stdout
    checkpoint = torch.load(tmp_path / 'iter_1.pth', weights_only=False)
    said = checkpoint['meta']['cellseg']
    assert (said['split'], said['fold']) == ('all', None)
    assert json.loads((tmp_path / FINISHED).read_text())['best'] == 'iter_1.pth'
    words = ['tools/test.py', 'configs/sample/fold0.py', tmp_path / 'iter_1.pth']
    done = run([*words, '--work-dir', tmp_path / 'test', *options()], sample_data, expect=2)
    assert 'was trained on all images' in done.stderr

"""Three folds of a very small Mask R-CNN with random weights on six drawn images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

import cellseg_mm.components
from cellseg_mm.data.drawing.sample import make_sample
from cellseg_mm.data.folds import Folds, save_folds
from cellseg_mm.data.labels import find_cases

ROOT = Path(__file__).resolve().parents[2]
N_FOLDS = 3

CONFIG = f"""
_base_ = '{ROOT}/configs/_base_/mask_rcnn_tiny.py'
model = dict(
    backbone=dict(base_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(num_convs=1, in_channels=16, conv_out_channels=16),
    ),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=60), rcnn=dict(max_per_img=20)),
)
test_pipeline = [
    dict(type='LoadCellImage', red_blue_swapped=True),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    dict(type='PackDetInputs', meta_keys={{{{_base_.meta_keys}}}}),
]
small = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size=2, dataset=dict(dataset=dict(fold=FOLD)), **small)
val_dataloader = dict(dataset=dict(fold=FOLD, pipeline=test_pipeline), **small)
test_dataloader = dict(dataset=dict(fold=FOLD, pipeline=test_pipeline), **small)
test_evaluator = dict(n_bootstrap=5)
log_level = 'WARNING'
"""


@dataclass(frozen=True)
class TinyFolds:
    """Paths of everything; ``configs[k]`` and ``checkpoints[k]`` are fold k's."""

    root: Path
    data_root: Path
    folds: Folds
    configs: tuple[str, ...]
    checkpoints: tuple[Path, ...]


def make_tiny_folds(root: Path) -> TinyFolds:
    """Draw images, make folds, write configs and checkpoints below ``root``.

    ``CELLSEG_DATA`` must be ``root / 'data'`` whenever the configs are read.
    """
    data_root = make_sample(root / 'data', n_train=6, n_test=2)
    names = [case.name for case in find_cases(data_root, 'train', 4)]
    folds = Folds(tuple(tuple(names[2 * k : 2 * k + 2]) for k in range(N_FOLDS)))
    save_folds(data_root / 'folds.json', folds)
    configs, checkpoints = [], []
    for fold in range(N_FOLDS):
        path = root / 'configs' / f'fold{fold}.py'
        path.parent.mkdir(exist_ok=True)
        path.write_text(CONFIG.replace('FOLD', str(fold)))
        configs.append(str(path))
        checkpoint = root / 'work_dirs' / f'fold{fold}' / 'best_cell_iter_1.pth'
        save_checkpoint(checkpoint, random_model(path, fold), fold=fold, fold_hash=folds.hash)
        checkpoints.append(checkpoint)
    return TinyFolds(root, data_root, folds, tuple(configs), tuple(checkpoints))


def random_model(config: Path | str, seed: int) -> nn.Module:
    """Build the model of a config with weights that make it find something."""
    assert cellseg_mm.components.__all__
    init_default_scope('mmdet')
    torch.manual_seed(seed)
    model = MODELS.build(Config.fromfile(config).model)
    nn.init.normal_(model.rpn_head.rpn_cls.weight, std=1.0)
    nn.init.normal_(model.roi_head.bbox_head.fc_cls.weight, std=2.0)
    nn.init.normal_(model.roi_head.mask_head.conv_logits.weight, std=1.0)
    return model.eval()


def save_checkpoint(path: Path, model: nn.Module, **trained: object) -> Path:
    """Write a checkpoint as mmengine's Runner and ProvenanceHook do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {
        'fold': None,
        'fold_hash': '',
        'excluded_folds': [],
        'split': 'train',
        'class_names': ['epithelial', 'lymphocyte', 'neutrophil', 'macrophage'],
    }
    hub = {'runtime_info': {'best_score': 0.25}}
    meta = {'cellseg': {**known, **trained}}
    torch.save({'meta': meta, 'message_hub': hub, 'state_dict': model.state_dict()}, path)
    return path


def environment(data_root: Path) -> dict[str, str]:
    """Return the environment for tools in other processes."""
    return {**os.environ, 'CELLSEG_DATA': str(data_root), 'OMP_NUM_THREADS': '1'}

"""Registers everything that configs name; put it into ``custom_imports``.

Stock MMDetection tools run our configs too, because a config file imports this module itself.
"""

from __future__ import annotations

from cellseg_mm import (
    box_precision,
    checkpoints,
    dataset,
    fold_ensemble,
    hooks,
    label_map_masks,
    mask_head,
    metric,
    optim,
    proposal_caps,
    transforms,
    tta,
    visualization,
    weights,
    weights_report,
)

__all__ = [
    'box_precision',
    'checkpoints',
    'dataset',
    'fold_ensemble',
    'hooks',
    'label_map_masks',
    'mask_head',
    'metric',
    'optim',
    'proposal_caps',
    'transforms',
    'tta',
    'visualization',
    'weights',
    'weights_report',
]

checkpoints.use_safe_loading()

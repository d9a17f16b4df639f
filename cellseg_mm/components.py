"""Registers everything that configs name; put it into ``custom_imports``.

Stock MMDetection tools run our configs too, because a config file imports this module itself.
"""

from __future__ import annotations

from cellseg_mm.detectors import fold_ensemble
from cellseg_mm.model import box_precision, mask_head, tta
from cellseg_mm.model import caps as proposal_caps
from cellseg_mm.pipeline import dataset, label_map_masks
from cellseg_mm.pipeline import geometry as transforms
from cellseg_mm.training import hooks, metric, optim
from cellseg_mm.training import pictures as visualization
from cellseg_mm.weights import checkpoints
from cellseg_mm.weights import published as weights
from cellseg_mm.weights import report_hook as weights_report
from cellseg_mm.weights.loaders import use_safe_loading

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

use_safe_loading()

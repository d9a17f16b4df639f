"""Registers everything that configs name; put it into ``custom_imports``.

Stock MMDetection tools run our configs too, because a config file imports this module itself.
"""

from __future__ import annotations

from cellseg_mm.detectors import hook
from cellseg_mm.model import (
    box_precision,
    caps,
    efficientnet_lite,
    mask_head,
    memory_format,
    roi_head,
    tta,
)
from cellseg_mm.pipeline import colour, copy_paste, dataset, geometry, loading, seeding
from cellseg_mm.training import fold_guard, hooks, metric, optim, pictures
from cellseg_mm.weights import published, report_hook
from cellseg_mm.weights.loaders import use_safe_loading

__all__ = [
    'box_precision',
    'caps',
    'colour',
    'copy_paste',
    'dataset',
    'efficientnet_lite',
    'fold_guard',
    'geometry',
    'hook',
    'hooks',
    'loading',
    'mask_head',
    'memory_format',
    'metric',
    'optim',
    'pictures',
    'published',
    'report_hook',
    'roi_head',
    'seeding',
    'tta',
]

use_safe_loading()

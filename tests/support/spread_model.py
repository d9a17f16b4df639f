"""A model without training that is a fair subject of comparisons to the last digits.

Saturated scores tie, and boxes without a side have no IoU; both are all that weights of the usual
size give.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tests.support.tiny_folds import random_model


def spread_model(config: Path, seed: int) -> nn.Module:
    """Build a model of random weights with scores between 0 and 1 and boxes that are boxes."""
    model = random_model(config, seed)
    rpn, head = model.rpn_head, model.roi_head.bbox_head
    with torch.no_grad():
        rpn.rpn_cls.weight.normal_(std=0.05)
        head.fc_cls.weight.normal_(std=0.05)
        rpn.rpn_reg.weight *= 0.02
        head.fc_reg.weight *= 0.05
    return model

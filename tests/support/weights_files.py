"""What tests of weights share: a pickle that calls, the stock model, and small checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import cellseg_mm  # noqa: F401
from cellseg_mm.weights.conversion import build_model_config


class Call:
    """Pickles as a call of ``function`` with ``args``: how code gets into a pickle."""

    def __init__(self, function: object, *args: object) -> None:
        self.reduced = (function, args)

    def __reduce__(self) -> tuple:
        return self.reduced


def build(n_classes: int) -> nn.Module:
    import mmdet.models  # noqa: F401
    from mmdet.registry import MODELS
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(build_model_config((3, 4, 6, 3), n_classes))


def save(path: Path, content: object = None) -> Path:
    torch.save({'state_dict': {'w': torch.ones(3)}} if content is None else content, path)
    return path

"""The order in which a model's numbers lie in memory, as a setting of the recipe.

In: ``model.memory_format`` of a config. Out: a detector whose convolutions compute in that order.
Invariant: results differ from the other order's by rounding only; checkpoints fit both.

It is part of the model, so that training, testing, ensembles and prediction all have it: a
convolution whose weights lie channels-last computes so, whatever its input is like.
"""

from __future__ import annotations

import torch
from mmdet.models.detectors import MaskRCNN
from mmdet.registry import MODELS

from cellseg_mm.core.errors import ConfigError

FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}


@MODELS.register_module()
class CellMaskRCNN(MaskRCNN):
    """``MaskRCNN`` with a memory format; weights and their names are those of ``MaskRCNN``.

    Args:
        memory_format: 'contiguous' or 'channels_last'. On a CPU depthwise convolutions are
            faster channels-last and plain ones may be slower, see docs/recipes.md.

    Raises:
        ConfigError: There is no such format.
    """

    def __init__(self, *args: object, memory_format: str = 'contiguous', **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        if memory_format not in FORMATS:
            raise ConfigError(
                f'model.memory_format: found {memory_format!r}; expected one of '
                f'{", ".join(FORMATS)}; correct it'
            )
        self.memory_format = FORMATS[memory_format]
        self.to(memory_format=self.memory_format)

    def init_weights(self) -> None:
        """Initialise alike in every format: random numbers are dealt out in memory's order."""
        self.to(memory_format=torch.contiguous_format)
        super().init_weights()
        self.to(memory_format=self.memory_format)

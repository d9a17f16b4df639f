"""EfficientNet-Lite as a backbone: small, without squeeze-and-excitation, quick on a CPU.

In: a batch of RGB pictures, (x - 127) / 128. Out: four feature maps, strides 4, 8, 16 and 32.
Invariant: with the published weights the features are those of the published network.

The weights (ImageNet) are a file inside a package of the index, so no connection to anywhere else
is needed: ``init_cfg=dict(type='Pretrained', checkpoint='package://...')``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from cellseg_mm.core.errors import CheckpointError, ConfigError

# Repeats, kernel, stride, expansion, channels in, channels out of each stage of lite0.
# Source: efficientnet_lite_builder.py of tensorflow/tpu (Apache-2.0).
STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)
OUT_STAGES = (1, 2, 4, 6)  # the last of each stride
WIDTH_AND_DEPTH = {'lite0': (1.0, 1.0), 'lite1': (1.0, 1.1), 'lite2': (1.1, 1.2)}
STEM_CHANNELS = 32  # not widened, and neither are the first and the last stage repeated
EPS = 1e-3
# The classifier behind the features, which a detector has no use for.
CLASSIFIER = re.compile(r'_(?:conv_head|bn1|fc)\.')
# Published names of a block's layers, in our order.
LAYERS = (
    ('expand', '_expand_conv', '_bn0'),
    ('depthwise', '_depthwise_conv', '_bn1'),
    ('project', '_project_conv', '_bn2'),
)


class SameConvNorm(nn.Sequential):
    """Convolution with TensorFlow's 'same' padding, batch norm, and ReLU6 if wanted."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        activate: bool = True,
    ) -> None:
        padding = kernel // 2 if stride == 1 else 0
        layers = {
            'conv': nn.Conv2d(
                in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False
            ),
            'norm': nn.BatchNorm2d(out_channels, eps=EPS),
        }
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        if activate:
            self.add_module('activation', nn.ReLU6(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        if self.conv.stride[0] > 1:
            (kernel, _), (stride, _) = self.conv.kernel_size, self.conv.stride
            (top, bottom), (left, right) = (
                same_padding(size, kernel, stride) for size in x.shape[-2:]
            )
            x = F.pad(x, (left, right, top, bottom))
        return super().forward(x)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return TensorFlow's padding before and after: where it is odd, the end gets more."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class InvertedResidual(nn.Module):
    """Expand, convolve each channel by itself, project; added to its input where sizes agree."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        width = in_channels * expansion
        if expansion > 1:
            self.expand = SameConvNorm(in_channels, width, 1)
        self.depthwise = SameConvNorm(width, width, kernel, stride=stride, groups=width)
        self.project = SameConvNorm(width, out_channels, 1, activate=False)
        self.is_residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        y = self.expand(x) if hasattr(self, 'expand') else x
        y = self.project(self.depthwise(y))
        return x + y if self.is_residual else y


@MODELS.register_module()
class EfficientNetLite(BaseModule):
    """The feature stages of EfficientNet-Lite, for a feature pyramid.

    Args:
        arch: 'lite0', 'lite1' or 'lite2'.
        frozen_stages: How many stages keep weights and statistics, counted from the stem, which is
            the first of eight; 0 trains all.
        norm_eval: Keep the statistics of all norms as they were loaded.
        init_cfg: mmengine's; ``Pretrained`` takes a published file and fits it name by name.

    Attributes:
        out_channels: Channels of the four outputs, for ``neck.in_channels``.

    Raises:
        ConfigError: There is no such ``arch``.

    Source: github.com/tensorflow/tpu, models/official/efficientnet/lite (Apache-2.0).
    """

    def __init__(
        self,
        arch: str = 'lite0',
        *,
        frozen_stages: int = 0,
        norm_eval: bool = False,
        init_cfg: Mapping | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if arch not in WIDTH_AND_DEPTH:
            raise ConfigError(
                f'EfficientNetLite.arch: found {arch!r}; expected one of '
                f'{", ".join(WIDTH_AND_DEPTH)}; correct model.backbone.arch'
            )
        self.arch, self.frozen_stages, self.norm_eval = arch, frozen_stages, norm_eval
        self.stem = SameConvNorm(3, STEM_CHANNELS, 3, stride=2)
        self.stages = nn.ModuleList(
            nn.Sequential(*(InvertedResidual(*block) for block in blocks))
            for blocks in stage_blocks(arch)
        )
        self.out_channels = [stage_blocks(arch)[i][-1][1] for i in OUT_STAGES]
        self._freeze()

    def init_weights(self) -> None:
        """Load what ``init_cfg`` names, tensor by tensor, or initialise as mmengine does."""
        init = self.init_cfg
        if not isinstance(init, Mapping) or init.get('type') != 'Pretrained':
            super().init_weights()
            return
        name = init['checkpoint']
        content = CheckpointLoader.load_checkpoint(name, map_location='cpu', logger='current')
        load_published(self, content, where=name)
        self._is_init = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return four maps of (B, C, H / stride, W / stride), finest first."""
        x = self.stem(x)
        outputs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in OUT_STAGES:
                outputs.append(x)
        return tuple(outputs)

    def train(self, mode: bool = True) -> EfficientNetLite:
        """Set the mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self) -> None:
        for part in [self.stem, *self.stages][: self.frozen_stages]:
            part.eval().requires_grad_(False)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()


def stage_blocks(arch: str) -> list[list[tuple[int, int, int, int, int]]]:
    """Return for each stage its blocks: channels in and out, kernel, stride, expansion."""
    width, depth = WIDTH_AND_DEPTH[arch]
    stages = []
    for i, (repeats, kernel, stride, expansion, n_in, n_out) in enumerate(STAGES):
        is_fixed = i in (0, len(STAGES) - 1)
        n_blocks = repeats if is_fixed else math.ceil(repeats * depth)
        n_in = STEM_CHANNELS if i == 0 else scaled_channels(n_in, width)
        n_out = scaled_channels(n_out, width)
        first = (n_in, n_out, kernel, stride, expansion)
        stages.append([first] + [(n_out, n_out, kernel, 1, expansion)] * (n_blocks - 1))
    return stages


def scaled_channels(channels: int, width: float) -> int:
    """Return the nearest multiple of 8, but never less than 90 % of what was asked for."""
    asked = channels * width
    rounded = max(8, int(asked + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * asked else rounded


def load_published(model: EfficientNetLite, content: Mapping[str, object], *, where: str) -> None:
    """Fill a backbone from a published file of the same arch.

    Raises:
        CheckpointError: Its tensors are not those of this arch.
    """
    ours = our_names(model.arch)
    found = {name: t for name, t in content.items() if not CLASSIFIER.match(name)}
    wanted = model.state_dict()
    state = {ours[name]: tensor for name, tensor in found.items() if name in ours}
    odd = sorted(found.keys() - ours.keys()) + sorted(wanted.keys() - state.keys())
    odd += sorted(n for n in state if n in wanted and wanted[n].shape != state[n].shape)
    if odd:
        raise CheckpointError(
            f'{where}: {len(odd)} tensors do not fit EfficientNetLite {model.arch} '
            f'({", ".join(odd[:3])}); expected the published file of this arch; correct '
            'model.backbone.arch or its init_cfg'
        )
    with torch.no_grad():
        model.load_state_dict(state, strict=True)


def our_names(arch: str) -> dict[str, str]:
    """Return our tensor name for each published one."""
    parts = {'_conv_stem': 'stem.conv', '_bn0': 'stem.norm'}
    index = 0
    for stage, blocks in enumerate(stage_blocks(arch)):
        for block, (*_, expansion) in enumerate(blocks):
            for layer, conv, norm in LAYERS[expansion == 1 :]:
                prefix = f'stages.{stage}.{block}.{layer}'
                parts[f'_blocks.{index}.{conv}'] = f'{prefix}.conv'
                parts[f'_blocks.{index}.{norm}'] = f'{prefix}.norm'
            index += 1
    kinds: dict[str, Sequence[str]] = {
        'conv': ('weight',),
        'norm': ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'),
    }
    return {
        f'{theirs}.{kind}': f'{ours}.{kind}'
        for theirs, ours in parts.items()
        for kind in kinds[ours.rsplit('.', 1)[-1]]
    }

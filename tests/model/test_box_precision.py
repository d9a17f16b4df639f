"""box_precision: boxes keep their place under mixed precision; in float32 all is MMDetection's."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

import cellseg_mm  # noqa: E402, F401, I001  (before mmdet: gives it NMS and RoIAlign)
from mmdet.models.dense_heads import RPNHead  # noqa: E402
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmengine.config import Config, ConfigDict  # noqa: E402
from mmengine.registry import DefaultScope, init_default_scope  # noqa: E402

from cellseg_mm.model.box_precision import Fp32RoIExtractor, Fp32RPNHead  # noqa: E402
from cellseg_mm.runtime import ops_backend  # noqa: E402
from tests.support.tiny_folds import CONFIG, random_model  # noqa: E402

pytestmark = pytest.mark.mm

ROOT = Path(__file__).resolve().parents[2]
# All configs of a folder have one model, see test_configs.
RECIPES = sorted((ROOT / 'configs').glob('**/fold0.py'))
STOCK_OF = {'Fp32RoIExtractor': 'SingleRoIExtractor', 'Fp32RPNHead': 'RPNHead'}
ROUNDING = 2.0**-8  # of a bfloat16, relative


def extractor(kind: type, strides: tuple[int, ...] = (4,), channels: int = 1) -> torch.nn.Module:
    return kind(
        roi_layer={'type': 'RoIAlign', 'output_size': 7, 'sampling_ratio': 0},
        out_channels=channels,
        featmap_strides=list(strides),
        finest_scale=14,
    )


def pooled_ramp(kind: type) -> torch.Tensor:
    """Pool a cell of 14 px at 700.3 px from features that say how far right of 700 px they are."""
    columns = torch.arange(256, dtype=torch.float32) - 175  # whole numbers: exact in bfloat16
    ramp = columns.expand(1, 1, 256, 256)
    rois = torch.tensor([[0, 700.3, 700.3, 714.3, 714.3]])
    with torch.autocast('cpu', torch.bfloat16):
        return extractor(kind)((ramp.bfloat16(),), rois)[0, 0]


def test_a_box_under_autocast_stays_where_it_is() -> None:
    # Bins of 2 px; a feature's centre lies 0.5 features right of its edge; stride 4.
    centres = [(700.3 + 2 * (k + 0.5)) / 4 - 0.5 - 175 for k in range(7)]
    wanted = torch.tensor(centres).expand(7, 7)
    got = pooled_ramp(Fp32RoIExtractor)
    assert got.dtype == torch.bfloat16  # the layers that follow expect the features' type
    torch.testing.assert_close(got.float(), wanted, rtol=ROUNDING, atol=1e-5)
    if ops_backend() == 'mmcv':
        with pytest.raises(NotImplementedError, match='BFloat16'):
            pooled_ramp(SingleRoIExtractor)
        return
    # 714.3 becomes 716 in bfloat16: when this fails, MMDetection has ceased to round.
    stock = pooled_ramp(SingleRoIExtractor).float()
    assert (stock[:, -1] - wanted[:, -1]).min() > 0.3


def scattered(seed: int, n: int = 60) -> torch.Tensor:
    """(n, 5) boxes of 6 to 90 px in two images of 200 x 160 px; some leave the image."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(n, 2, generator=generator) * torch.tensor([160.0, 200.0])
    sides = torch.rand(n, 2, generator=generator) * 84 + 6
    image = torch.randint(0, 2, (n, 1), generator=generator).float()
    return torch.cat([image, centres - sides / 2, centres + sides / 2], dim=1)


def pyramid(seed: int, strides: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, 200 // s, 160 // s, generator=generator) for s in strides)


def pooled_with_gradients(
    kind: type, seed: int, n: int, strides: tuple[int, ...], scale: float | None, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Return the RoIs' features and the gradient of each level."""
    levels = [level.to(dtype).requires_grad_() for level in pyramid(seed, strides)]
    module = extractor(kind, strides, channels=3)
    pooled = module(tuple(levels), scattered(seed, n), scale)
    weights = torch.linspace(-1, 1, 147).view(3, 7, 7)
    (pooled * weights).sum().backward()
    grads = [level.grad for level in levels if level.grad is not None]
    return [pooled.detach(), *grads]


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('strides', [(8,), (4, 8, 16)], ids=['one level', 'three levels'])
@pytest.mark.parametrize('scale', [None, 1.3], ids=['as they are', 'enlarged'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['fp32', 'fp64'])
def test_extractor_in_full_precision_is_mmdetections(
    seed: int, strides: tuple[int, ...], scale: float | None, dtype: torch.dtype
) -> None:
    options = (seed, 60, strides, scale, dtype)
    got, wanted = (
        pooled_with_gradients(kind, *options) for kind in (Fp32RoIExtractor, SingleRoIExtractor)
    )
    assert len(got) == len(wanted) == 1 + len(strides)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype == dtype
        assert torch.equal(a, b)
        assert float(a.abs().max()) > 0.1


def test_half_features_get_the_gradients_of_exact_boxes() -> None:
    strides = (4, 8, 16)
    options = (5, 60, strides, None)
    half = pooled_with_gradients(Fp32RoIExtractor, *options, torch.bfloat16)
    with torch.no_grad():
        rounded = [level.bfloat16().float() for level in pyramid(5, strides)]
        exact = extractor(SingleRoIExtractor, strides, 3)(tuple(rounded), scattered(5))
    assert torch.equal(half[0], exact.bfloat16())
    full = pooled_with_gradients(SingleRoIExtractor, *options, torch.float32)
    for a, b in zip(half[1:], full[1:], strict=True):
        assert a.dtype == torch.bfloat16
        # only the incoming weights of up to 60 boxes and the sum are rounded
        torch.testing.assert_close(a.float(), b, rtol=2 * ROUNDING, atol=0.02)


def test_no_boxes_give_no_features() -> None:
    levels = tuple(level.bfloat16() for level in pyramid(0, (4, 8, 16)))
    got = extractor(Fp32RoIExtractor, (4, 8, 16), 3)(levels, torch.zeros(0, 5))
    assert got.shape == (0, 3, 7, 7)
    assert got.dtype == torch.bfloat16


# ---- proposals


def proposals(kind: type, dtype: torch.dtype | None, delta_std: float) -> torch.Tensor:
    """Return the proposals on a picture of 1024 px that has features near its far corner only."""
    test_cfg = ConfigDict(
        nms_pre=200, max_per_img=200, min_bbox_size=0, nms={'type': 'nms', 'iou_threshold': 0.9}
    )
    with DefaultScope.overwrite_default_scope('mmdet'):  # whatever ran before
        head = kind(
            in_channels=4,
            feat_channels=4,
            anchor_generator={
                'type': 'AnchorGenerator', 'scales': [5], 'ratios': [1.0], 'strides': [4],
            },
            bbox_coder={'type': 'DeltaXYWHBBoxCoder'},
            loss_cls={'type': 'CrossEntropyLoss', 'use_sigmoid': True},
            loss_bbox={'type': 'L1Loss'},
            test_cfg=test_cfg,
        )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for layer, std in ((head.rpn_conv, 0.3), (head.rpn_cls, 1.0), (head.rpn_reg, delta_std)):
        layer.weight.data.copy_(torch.randn(layer.weight.shape, generator=generator) * std)
        layer.bias.data.zero_()
    features = torch.zeros(1, 4, 256, 256)
    features[..., 200:240, 180:230] = torch.randn(1, 4, 40, 50, generator=generator)
    meta = {'img_shape': (1024, 1024), 'scale_factor': (1.0, 1.0)}
    with torch.no_grad(), torch.autocast('cpu', dtype, enabled=dtype is not None):
        scores, deltas = head((features,))
        found = head.predict_by_feat(scores, deltas, batch_img_metas=[meta])[0]
    return found.bboxes


def test_proposals_under_autocast_lie_where_their_anchors_are() -> None:
    # Without deltas proposals are anchors: 20 px about multiples of the stride.
    edges = proposals(Fp32RPNHead, torch.bfloat16, 0.0)
    assert edges.dtype == torch.float32
    assert len(edges) > 50
    assert torch.equal(edges[:, 2:] - edges[:, :2], torch.full_like(edges[:, :2], 20))
    assert torch.equal((edges + 10) % 4, torch.zeros_like(edges))
    if ops_backend() == 'mmcv':
        with pytest.raises(RuntimeError, match='BFloat16'):
            proposals(RPNHead, torch.bfloat16, 0.0)
        return
    # 10 px off a multiple of 4 is none: when this fails, MMDetection has ceased to round.
    stock = proposals(RPNHead, torch.bfloat16, 0.0).float()
    far = stock[(stock[:, 0] > 512)]
    assert len(far) > 20
    assert torch.equal(far % 4, torch.zeros_like(far))


def test_proposals_in_full_precision_are_mmdetections() -> None:
    got, wanted = (proposals(kind, None, 0.1) for kind in (Fp32RPNHead, RPNHead))
    assert len(got) > 50
    assert torch.equal(got, wanted)


# ---- recipes


def build(cfg: Config) -> torch.nn.Module:
    init_default_scope('mmdet')
    with torch.device('meta'):
        return MODELS.build(cfg.model)


def with_stock_parts(cfg: Config) -> Config:
    """Return the config with MMDetection's classes in the place of ours."""
    cfg = Config(cfg.to_dict())
    for part in (
        cfg.model.rpn_head,
        cfg.model.roi_head.bbox_roi_extractor,
        cfg.model.roi_head.mask_roi_extractor,
    ):
        part.type = STOCK_OF[part.type]
    return cfg


@pytest.mark.parametrize('path', RECIPES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_recipes_keep_boxes_exact_and_their_weights_names(path: Path) -> None:
    cfg = Config.fromfile(path)
    model = build(cfg)
    assert type(model.rpn_head) is Fp32RPNHead
    for name in ('bbox_roi_extractor', 'mask_roi_extractor'):
        assert type(getattr(model.roi_head, name)) is Fp32RoIExtractor
    stock = build(with_stock_parts(cfg))
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, stock)]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) > 100


def found_in(model: torch.nn.Module, side: int, seen: list[torch.Tensor]) -> list:
    """Predict a drawn picture; ``seen`` gets the boxes that reach RoIAlign."""
    for part in (model.roi_head.bbox_roi_extractor, model.roi_head.mask_roi_extractor):
        for layer in part.roi_layers:
            layer.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    picture = torch.randint(0, 256, (3, side, side), generator=torch.Generator().manual_seed(1))
    info = {'img_shape': (side, side), 'ori_shape': (side, side), 'scale_factor': (1.0, 1.0)}
    data = {'inputs': [picture.byte()], 'data_samples': [DetDataSample(metainfo=info)]}
    with torch.no_grad():
        return model.test_step(data)


def test_a_whole_model_under_autocast_pools_exact_boxes(tmp_path: Path) -> None:
    path = tmp_path / 'tiny.py'
    path.write_text(CONFIG.replace('FOLD', '0'))
    model, seen = random_model(path, 0), []
    with torch.autocast('cpu', torch.bfloat16):
        found = found_in(model, 640, seen)[0].pred_instances
    assert len(found) > 5
    assert found.bboxes.dtype == torch.float32
    edges = torch.cat(seen)[:, 1:]
    assert edges.dtype == torch.float32
    far = edges[(edges > 512) & (edges < 640)]
    assert len(far) > 20
    assert (far != far.bfloat16().float()).float().mean() > 0.9

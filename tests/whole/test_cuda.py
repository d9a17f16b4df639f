"""What runs on a GPU equals what runs on the CPU: ops, masks, targets, training, whole predictions.

Selected only where torch finds a CUDA device; elsewhere ``conftest.py`` prints that they were left
out, and ``CELLSEG_REQUIRE_GPU=1`` makes their absence a failure. ``CELLSEG_TEST_DEVICE=cpu`` runs
the same code on the CPU against itself, which shows that the tests run, not that CUDA is right.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

import cellseg_mm  # noqa: E402, F401, I001  (before mmdet: gives it NMS and RoIAlign)
from mmdet.structures.bbox import bbox2roi  # noqa: E402
from mmdet.structures.mask import BitmapMasks  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

from cellseg_mm.core import rle  # noqa: E402
from cellseg_mm.model.nms import nms  # noqa: E402
from cellseg_mm.detectors.hook import FoldEnsembleHook  # noqa: E402
from cellseg_mm.core.instances import InstanceSet  # noqa: E402
from cellseg_mm.pipeline.label_map_masks import LabelMapMasks  # noqa: E402
from cellseg_mm.model.mask_head import paste_runs  # noqa: E402
from cellseg_mm.results.predictions import load_predictions  # noqa: E402
from cellseg_mm.runtime import ops_of, torchvision_problem  # noqa: E402
from tests.support.tiny_folds import TinyFolds, make_tiny_folds, random_model  # noqa: E402

pytestmark = [pytest.mark.mm, pytest.mark.gpu]

BACKENDS = ('torch', 'torchvision')


@pytest.fixture(scope='module')
def device() -> str:
    name = os.environ.get('CELLSEG_TEST_DEVICE', 'cuda')
    if name == 'cuda':
        assert torch.cuda.is_available(), 'these tests need a CUDA device'
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return name


@pytest.fixture(scope='module')
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyFolds]:
    root = tmp_path_factory.mktemp('tiny')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('CELLSEG_DATA', str(root / 'data'))
        yield make_tiny_folds(root)


def some_boxes(seed: int, n: int, side: float = 200.0) -> torch.Tensor:
    """Boxes of cell size, many overlapping, in float32."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(n, 2, generator=generator) * side
    wh = torch.rand(n, 2, generator=generator) * 30 + 6
    return torch.cat([centre - wh / 2, centre + wh / 2], dim=1)


# ---- ops


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('seed', range(5))
def test_nms_keeps_the_same_boxes(device: str, backend: str, seed: int) -> None:
    _require(backend)
    boxes = some_boxes(seed, 1500)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(len(boxes), generator=generator).round(decimals=2)  # ties
    wanted = nms(boxes, scores, 0.5, 0)
    got = ops_of(backend)['nms'](boxes.to(device), scores.to(device), 0.5, 0).cpu()
    assert 100 < len(wanted) < len(boxes)
    if backend == 'torch':
        assert torch.equal(got, wanted)
    else:  # torchvision's sort is not stable on CUDA: equal scores may come in another order
        assert torch.equal(scores[got], scores[wanted])
        ties = torch.bincount((scores * 100).round().long())
        assert int(ties.max()) > 1


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('sampling_ratio', [0, 2])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=['fp32', 'fp16'])
def test_roi_align_and_its_gradient(
    device: str, backend: str, sampling_ratio: int, dtype: torch.dtype
) -> None:
    _require(backend)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 8, 40, 50, generator=generator)
    boxes = some_boxes(0, 60, 190.0)
    rois = torch.cat([(torch.arange(60) % 2)[:, None].float(), boxes.round()], dim=1)
    grad = torch.randn(60, 8, 7, 7, generator=generator)
    tensors = [features, rois, grad]
    wanted = _pooled_and_gradient('torch', *tensors, sampling_ratio)
    got = _pooled_and_gradient(backend, *(t.to(device, dtype) for t in tensors), sampling_ratio)
    # half: 11 bits of mantissa, sums of about 50 terms in the gradient
    atol = 1e-4 if dtype == torch.float32 else 0.1
    for a, b in zip(got, wanted, strict=True):
        assert float(b.abs().max()) > 0.5
        torch.testing.assert_close(a.cpu().float(), b, rtol=0, atol=atol)


def _pooled_and_gradient(
    backend: str,
    features: torch.Tensor,
    rois: torch.Tensor,
    grad: torch.Tensor,
    sampling_ratio: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    ops = ops_of(backend)
    options = {
        'aligned_height': 7,
        'aligned_width': 7,
        'spatial_scale': 0.25,
        'sampling_ratio': sampling_ratio,
        'pool_mode': 1,
        'aligned': True,
    }
    output, gradient = torch.zeros_like(grad), torch.zeros_like(features)
    nowhere = features.new_zeros(0)
    ops['roi_align_forward'](features, rois, output, nowhere, nowhere, **options)
    ops['roi_align_backward'](grad, rois, nowhere, nowhere, gradient, **options)
    return output, gradient


def _require(backend: str) -> None:
    problem = torchvision_problem() if backend == 'torchvision' else None
    if problem and os.environ.get('CELLSEG_TEST_DEVICE', 'cuda') == 'cuda':
        pytest.fail(f'torchvision is the faster backend on a GPU and does not work: {problem}')
    if problem:
        pytest.skip(f'dry run on the CPU without torchvision: {problem}')


# ---- masks


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('threshold', [0.5, 0.3])
def test_pasted_masks_are_the_same(device: str, seed: int, threshold: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(200, 1, 5, 5, generator=generator) * 3
    probs = torch.nn.functional.interpolate(coarse, size=28, mode='bicubic')[:, 0].sigmoid()
    boxes = some_boxes(seed, 200)
    image_hw = (211, 187)
    wanted = _dense(paste_runs(probs, boxes, image_hw, threshold=threshold, whole_grid=True))
    runs = paste_runs(probs.to(device), boxes.to(device), image_hw, threshold=threshold)
    if device == 'cpu':
        runs = paste_runs(probs, boxes, image_hw, threshold=threshold, whole_grid=True)
    got = _dense(runs)
    assert wanted.any(axis=1).sum() > 150
    # A pixel whose probability is the threshold to the last bit may fall either way: fused
    # multiply-add on a GPU rounds once where a CPU rounds twice.
    assert (got != wanted).sum() <= 1e-5 * got.size
    different = (got != wanted).any(axis=1).sum()
    assert different <= 2


def _dense(runs: rle.Runs) -> np.ndarray:
    """Decode runs to (N, H * W) Booleans."""
    rles = rle.encode_runs(runs)
    return np.stack([m.ravel() for m in _masks_of(rles)])


def _masks_of(rles: list[bytes]) -> np.ndarray:
    hw = (211, 187)
    n = len(rles)
    zeros = np.zeros(n)
    boxes = np.zeros((n, 4), dtype=np.float32)
    return InstanceSet('x', 1, hw, zeros.astype(np.int64), zeros, boxes, tuple(rles)).masks()


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('binarize', [True, False])
def test_mask_targets_are_the_same(device: str, seed: int, binarize: bool) -> None:
    rng = np.random.default_rng(seed)
    bitmaps = np.zeros((40, 150, 130), dtype=np.uint8)
    corners = some_boxes(seed, 40, 120.0).numpy().clip(0, 129)
    for bitmap, (x1, y1, x2, y2) in zip(bitmaps, corners.astype(int), strict=True):
        bitmap[y1 : y2 + 1, x1 : x2 + 1] = rng.random((y2 - y1 + 1, x2 - x1 + 1)) < 0.7
    masks = LabelMapMasks.from_bitmaps(BitmapMasks(bitmaps, 150, 130))
    inds = torch.from_numpy(rng.integers(0, 40, 100))
    boxes = torch.from_numpy(corners[inds.numpy()] + rng.uniform(-3, 3, (100, 4))).float()
    wanted = masks.crop_and_resize(boxes, (28, 28), inds, binarize=binarize).masks
    moved = masks.to(device)
    assert torch.as_tensor(moved.view.source.array).device.type == device
    got = moved.crop_and_resize(
        boxes.to(device), (28, 28), inds.to(device), device, binarize=binarize
    ).masks
    assert 0.05 < wanted.mean() < 0.95
    if binarize:  # a share of one half to the last bit may fall either way
        assert (got != wanted).mean() < 1e-4
    else:
        # float32 knows 200 px to 1.5e-5, and so a share of an edge pixel
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)


# ---- training


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_training_steps_have_finite_losses_near_the_cpus(
    device: str, tiny: TinyFolds, tmp_path: Path, dtype: str
) -> None:
    cfg = Config.fromfile(tiny.configs[0])
    cfg.work_dir, cfg.load_from = str(tmp_path), None
    batches = iter(Runner.build_dataloader(cfg.train_dataloader, seed=1))
    batches = [next(batches) for _ in range(4)]
    model = random_model(tiny.configs[0], 0).train()
    reference = copy.deepcopy(model)
    wanted = _losses(reference, batches[:1], 'cpu', 'float32')
    got = _losses(model.to(device), batches, device, dtype)
    assert np.isfinite(got).all()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    # Sampling of RoIs draws from another generator on CUDA: the losses agree, not their bits.
    assert abs(got[0] - wanted[0]) < 0.25 * wanted[0]
    assert any(
        not torch.equal(a.cpu(), b)
        for a, b in zip(
            model.parameters(), random_model(tiny.configs[0], 0).parameters(), strict=True
        )
    )


def _losses(model: torch.nn.Module, batches: list[dict], device: str, dtype: str) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler(device, enabled=dtype == 'float16' and device == 'cuda')
    found = []
    torch.manual_seed(0)
    for batch in batches:
        data = model.data_preprocessor(copy.deepcopy(batch), True)
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != 'float32'):
            loss, _ = model.parse_losses(model(**data, mode='loss'))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_training_through_the_runner_with_amp(
    device: str, tiny: TinyFolds, tmp_path: Path, dtype: str
) -> None:
    if device == 'cpu':
        pytest.skip('dry run: AmpOptimWrapper refuses a CPU')
    cfg = Config.fromfile(tiny.configs[0])
    cfg.work_dir, cfg.load_from = str(tmp_path), None
    cfg.train_cfg.update(max_iters=6, val_interval=6)
    cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype=dtype, loss_scale='dynamic')
    runner = Runner.from_cfg(cfg)
    model = runner.train()  # StopOnInvalidLossHook raises for a loss that is not finite
    assert runner.iter == 6
    assert all(torch.isfinite(p).all() for p in model.parameters())


# ---- prediction


def test_every_stage_agrees(device: str, tiny: TinyFolds) -> None:
    """Each stage from the CPU's input to it: a random model's cells nearly tie, so that a last bit
    decides which are kept. Whole predictions are compared by benchmarks/gpu/same_cells.py.
    """
    cfg = Config.fromfile(tiny.configs[0])
    cfg.test_dataloader.dataset.split = 'test'
    model = random_model(tiny.configs[0], 3)
    other = copy.deepcopy(model).to(device)
    n_compared = 0
    for batch in Runner.build_dataloader(cfg.test_dataloader):
        with torch.no_grad():
            data = model.data_preprocessor(batch, False)
            features = model.extract_feat(data['inputs'])
            proposals = model.rpn_head.predict(features, data['data_samples'], rescale=False)
            rois = bbox2roi([found.bboxes for found in proposals])
            wanted = _stages(model, data['inputs'], features, rois)
            there = [level.to(device) for level in features]
            got = _stages(other, data['inputs'].to(device), there, rois.to(device))
        assert len(rois) > 20
        for a, b in zip(got, wanted, strict=True):
            scale = float(b.abs().max())
            assert scale > 1e-3
            torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-3 * scale)
            n_compared += 1
    assert n_compared > 10


def _stages(
    model: torch.nn.Module,
    images: torch.Tensor,
    features: Sequence[torch.Tensor],
    rois: torch.Tensor,
) -> list[torch.Tensor]:
    """Return what backbone and neck, RPN, box head and mask head answer."""
    scores, deltas = model.rpn_head(features)
    boxes = model.roi_head._bbox_forward(features, rois)
    masks = model.roi_head._mask_forward(features, rois)
    heads = [boxes['cls_score'], boxes['bbox_pred'], masks['mask_preds']]
    return [*model.extract_feat(images), *scores, *deltas, *heads]


def assert_like(got: InstanceSet, wanted: InstanceSet) -> int:
    """Compare sets whose scores differ in their last bits, so that a tail may be another one."""
    assert abs(len(got) - len(wanted)) <= 1
    n_same = 0
    for k in range(len(wanted)):
        near = np.abs(got.boxes_xyxy - wanted.boxes_xyxy[k]).max(axis=1) < 0.01
        near &= np.abs(got.scores - wanted.scores[k]) < 1e-3
        near &= got.class_ids == wanted.class_ids[k]
        if near.any():
            other = int(np.flatnonzero(near)[0])
            iou = rle.iou_matrix([got.rles[other]], [wanted.rles[k]], got.image_hw)
            n_same += float(np.asarray(iou)[0, 0]) > 0.98 or got.rles[other] == wanted.rles[k]
    assert n_same >= 0.95 * len(wanted)
    return n_same


def test_members_on_the_device_equal_members_that_take_turns(
    device: str, tiny: TinyFolds, tmp_path: Path
) -> None:
    found = {}
    for placement in ('device', 'turns'):
        cfg = Config.fromfile(tiny.configs[0])
        out = tmp_path / placement
        cfg.work_dir, cfg.load_from = str(out), None
        cfg.test_dataloader.dataset.split = 'test'
        path = str(out / 'test.predictions.npz')
        cfg.test_evaluator = {'type': 'SaveInstances', 'path': path}
        runner = Runner.from_cfg(cfg)
        assert next(runner.model.parameters()).device.type == device
        members = [
            {'config': tiny.configs[k], 'checkpoint': str(tiny.checkpoints[k])} for k in range(3)
        ]
        runner.register_hook(FoldEnsembleHook(members, rule='nms', placement=placement))
        runner.test()
        found[placement] = load_predictions(path).sets
    n = 0
    for a, b in zip(found['device'], found['turns'], strict=True):
        n += assert_like(a, b)
    assert n > 10

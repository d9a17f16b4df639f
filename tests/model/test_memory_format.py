"""A memory format changes the order of numbers in memory, and results by rounding only."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

import cellseg_mm  # noqa: F401  (makes mmdet importable where mmcv has no compiled ops)

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

from mmdet.registry import MODELS  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmdet.structures.mask import BitmapMasks  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402
from torch import nn  # noqa: E402

from cellseg_mm.core.errors import ConfigError  # noqa: E402
from cellseg_mm.detectors.member_models import MemberSource, load_members  # noqa: E402
from cellseg_mm.model.detections import to_instance_set  # noqa: E402
from tests.support.micro import ROOT  # noqa: E402

pytestmark = pytest.mark.mm

CLASSES = ('epithelial', 'lymphocyte', 'neutrophil', 'macrophage')
CELLS = [(10, 12, 24, 30), (40, 8, 60, 22), (70, 60, 84, 90), (20, 66, 44, 88)]


def recipe(memory_format: str) -> Config:
    """Return the quick laptop recipe without the weights' file.

    It trains its heads on the cells alone: rounding may swap two proposals of nearly one score.
    """
    cfg = Config.fromfile(ROOT / 'configs/laptop-quick/fold0.py')
    cfg.model.memory_format = memory_format
    cfg.model.backbone.init_cfg = None
    cfg.model.train_cfg.rpn_proposal.max_per_img = 0
    return cfg


def build(memory_format: str) -> nn.Module:
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(recipe(memory_format).model)
        model.init_weights()
    return model


def batch() -> dict:
    rng = np.random.default_rng(1)
    masks = np.zeros((len(CELLS), 96, 96), np.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, CELLS, strict=True):
        mask[y0:y1, x0:x1] = 1
    sample = DetDataSample(
        metainfo={
            'img_shape': (96, 96), 'ori_shape': (96, 96), 'scale_factor': (1.0, 1.0),
            'pad_shape': (96, 96), 'batch_input_shape': (96, 96), 'img_id': 0,
            'img_path': 'a.tif',
        },
        gt_instances=InstanceData(
            bboxes=torch.tensor(CELLS, dtype=torch.float32),
            labels=torch.arange(len(CELLS)),
            masks=BitmapMasks(masks, 96, 96),
        ),
    )  # fmt: skip
    image = torch.from_numpy(rng.integers(0, 256, (3, 96, 96), dtype=np.uint8))
    return {'inputs': [image], 'data_samples': [sample]}


def convolutions(model: nn.Module) -> list[torch.Tensor]:
    """Return the weights whose order in memory matters."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    return [w for w in weights if w.shape[1] > 1 and w.shape[2] > 1]


def is_channels_last(weight: torch.Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_training_differs_by_rounding_only() -> None:
    results = []
    for memory_format in ('contiguous', 'channels_last'):
        # float64: an untrained network in training mode makes much of float32's last bit
        model = build(memory_format).double().train()
        data = model.data_preprocessor(batch(), training=True)
        data['inputs'] = data['inputs'].double()
        torch.manual_seed(3)  # RoI and anchor sampling
        losses, _ = model.parse_losses(model(**data, mode='loss'))
        losses.backward()
        results.append((losses.item(), {n: p.grad for n, p in model.named_parameters()}))
    (loss, gradients), (other_loss, other_gradients) = results
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for name, ours in gradients.items():
        assert (ours - other_gradients[name]).norm() <= 1e-5 * ours.norm() + 1e-9, name


def test_a_seed_gives_the_same_start_in_every_format() -> None:
    one, other = build('contiguous').state_dict(), build('channels_last').state_dict()
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


def test_predictions_differ_by_rounding_only() -> None:
    found = []
    for memory_format in ('contiguous', 'channels_last'):
        model = build(memory_format).eval()
        with torch.no_grad():
            (sample,) = model.test_step(batch())
        found.append(to_instance_set(sample))
    one, other = found
    assert len(one) == len(other) > 5
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


@pytest.mark.parametrize('memory_format', ['contiguous', 'channels_last'])
def test_a_model_keeps_its_format(memory_format: str) -> None:
    model = build(memory_format)
    wanted = memory_format == 'channels_last'
    other = build('contiguous' if wanted else 'channels_last')
    model.load_state_dict(other.state_dict())
    for kept in (model, copy.deepcopy(model), model.to('cpu')):
        assert convolutions(kept)
        assert all(is_channels_last(weight) == wanted for weight in convolutions(kept))


def test_members_of_an_ensemble_have_their_recipes_format(tmp_path: Path) -> None:
    path = tmp_path / 'member.pth'
    state = build('contiguous').state_dict()
    torch.save({'state_dict': state, 'meta': {'cellseg': {'class_names': list(CLASSES)}}}, path)
    source = MemberSource(recipe('channels_last'), 'fold0.py', path)
    with DefaultScope.overwrite_default_scope('mmdet'):
        (loaded,) = load_members([source], CLASSES)
    assert all(map(is_channels_last, convolutions(loaded.model)))
    assert all(w.equal(state[n]) for n, w in loaded.model.state_dict().items())


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.memory_format: found 'nhwc'"):
        build('nhwc')

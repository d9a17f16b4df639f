"""The assigner gives what MMDetection's gives, ties and empty images included."""

from __future__ import annotations

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

import cellseg_mm  # noqa: E402, F401, I001  (before mmdet: gives it NMS and RoIAlign)
from mmdet.models.task_modules.assigners import MaxIoUAssigner  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402

from cellseg_mm.core.layout import CONFIGS  # noqa: E402
from cellseg_mm.model.box_precision import CellMaxIoUAssigner  # noqa: E402
from cellseg_mm.training.load_config import load_config  # noqa: E402

pytestmark = pytest.mark.mm


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('min_pos_iou', [0.0, 1e-4, 0.3])
@pytest.mark.parametrize('all_ties', [True, False])
def test_it_assigns_as_stock_does(seed: int, min_pos_iou: float, all_ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    # few values: many anchors tie for a cell, and many cells share their best anchor
    overlaps = torch.randint(0, 8, (30, 400), generator=generator).float() / 10
    overlaps[:, torch.rand(400, generator=generator) < 0.5] = 0
    overlaps[3] = 0
    labels = torch.randint(0, 4, (30,), generator=generator)
    settings = {
        'pos_iou_thr': 0.65,
        'neg_iou_thr': 0.3,
        'min_pos_iou': min_pos_iou,
        'gt_max_assign_all': all_ties,
    }
    wanted = MaxIoUAssigner(**settings).assign_wrt_overlaps(overlaps.clone(), labels)
    got = CellMaxIoUAssigner(**settings).assign_at_once(overlaps.clone(), labels)
    assert len(wanted.gt_inds.unique()) > 10
    for name in ('gt_inds', 'labels', 'max_overlaps'):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name


@pytest.mark.parametrize('shape', [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_assign(shape: tuple[int, int]) -> None:
    settings = {'pos_iou_thr': 0.7, 'neg_iou_thr': 0.3, 'min_pos_iou': 0.3}
    labels = torch.zeros(shape[0], dtype=torch.long)
    wanted = MaxIoUAssigner(**settings).assign_wrt_overlaps(torch.zeros(shape), labels)
    got = CellMaxIoUAssigner(**settings).assign_at_once(torch.zeros(shape), labels)
    assert torch.equal(got.gt_inds, wanted.gt_inds)
    assert torch.equal(got.labels, wanted.labels)


@pytest.mark.parametrize('config', ['fold0.py', 'laptop/fold0.py'])
def test_the_recipes_use_it_under_the_name_of_stock(config: str) -> None:
    cfg = load_config(CONFIGS / config)
    assert cfg.model.train_cfg.rpn.assigner.type == 'MaxIoUAssigner'
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    assert type(model.rpn_head.assigner) is CellMaxIoUAssigner
    assert model.rpn_head.assigner.min_pos_iou == 1e-4
    assert cfg.model.train_cfg.rpn.assigner.type == 'MaxIoUAssigner'

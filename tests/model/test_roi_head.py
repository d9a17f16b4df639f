"""CellRoIHead: boxes looked at again; exporting holds it equal to a second implementation."""

from __future__ import annotations

import numpy as np
import pytest

import cellseg_mm  # noqa: F401

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

from mmengine.config import ConfigDict  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

from cellseg_mm.core.errors import ConfigError  # noqa: E402
from cellseg_mm.model.roi_head import CellRoIHead, deltas_of_best  # noqa: E402

pytestmark = pytest.mark.mm

META = {'img_shape': (64, 80), 'scale_factor': (1.0, 1.0)}
N_CLASSES = 3


def head(*, agnostic: bool = False, **loss: object) -> CellRoIHead:
    layer = {'type': 'RoIAlign', 'output_size': 3, 'sampling_ratio': 0}
    extractor = {
        'type': 'SingleRoIExtractor', 'out_channels': 2, 'featmap_strides': [4], 'roi_layer': layer,
    }  # fmt: skip
    coder = {'type': 'DeltaXYWHBBoxCoder', 'target_stds': [0.1, 0.1, 0.2, 0.2]}
    box_head = {
        'type': 'Shared2FCBBoxHead', 'in_channels': 2, 'fc_out_channels': 8, 'roi_feat_size': 3,
        'num_classes': N_CLASSES, 'bbox_coder': coder, 'reg_class_agnostic': agnostic, **loss,
    }  # fmt: skip
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        made = CellRoIHead(bbox_roi_extractor=extractor, bbox_head=box_head).eval()
    for part in made.bbox_head.parameters():
        torch.nn.init.normal_(part, std=0.3)
    return made


def boxes_of(made: CellRoIHead, passes: object, n: int = 9) -> InstanceData:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 38, (n, 2))
    boxes = np.concatenate([low, low + rng.uniform(5, 25, (n, 2))], axis=1)
    x = (torch.from_numpy(rng.normal(size=(1, 2, 16, 20))).float(),)
    found = InstanceData(bboxes=torch.from_numpy(boxes).float())
    nms = {'type': 'nms', 'iou_threshold': 0.5}
    cfg = ConfigDict(score_thr=0.0, nms=nms, max_per_img=100)
    if passes is not None:
        cfg.box_passes = passes
    with torch.no_grad():
        return made.predict_bbox(x, [META], [found], cfg)[0]


@pytest.mark.parametrize('agnostic', [False, True])
def test_boxes_that_do_not_move_keep_their_scores(agnostic: bool) -> None:
    made = head(agnostic=agnostic)
    stock, moved = boxes_of(made, None), boxes_of(made, 2)
    assert len(stock) != len(moved) or not torch.allclose(stock.bboxes, moved.bboxes)
    torch.nn.init.zeros_(made.bbox_head.fc_reg.weight)
    torch.nn.init.zeros_(made.bbox_head.fc_reg.bias)
    stock = boxes_of(made, 1)
    for passes in (2, 4):
        again = boxes_of(made, passes)
        torch.testing.assert_close(again.bboxes, stock.bboxes, atol=1e-4, rtol=0)
        torch.testing.assert_close(again.scores, stock.scores, atol=1e-6, rtol=0)
        assert torch.equal(again.labels, stock.labels)


def test_without_proposals_there_are_no_boxes() -> None:
    assert len(boxes_of(head(), 2, n=0)) == 0


def test_each_box_moves_for_its_most_likely_cell() -> None:
    logits = torch.tensor([[0.0, 3, 1, 9], [5, 0, 1, 0]])  # background last
    deltas = torch.arange(24.0).reshape(2, 12)
    assert deltas_of_best(logits, deltas).tolist() == [[4, 5, 6, 7], [12, 13, 14, 15]]
    assert deltas_of_best(logits, deltas[:, :4]).tolist() == deltas[:, :4].tolist()


@pytest.mark.parametrize('passes', [0, 1.5, 'twice'])
def test_passes_without_meaning_are_refused(passes: object) -> None:
    with pytest.raises(ConfigError, match='expected a whole number from 1 on'):
        boxes_of(head(), passes)


def test_an_activation_of_its_own_is_refused() -> None:
    loss = {'type': 'SeesawLoss', 'num_classes': N_CLASSES}
    with pytest.raises(ConfigError, match='expected softmax'):
        boxes_of(head(loss_cls=loss), 2)

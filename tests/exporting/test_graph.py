"""The rewritten model finds what MMDetection's own code finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import cellseg_mm  # noqa: F401

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

from mmdet.structures import DetDataSample  # noqa: E402
from mmengine.config import Config  # noqa: E402

from cellseg_mm.core import rle  # noqa: E402
from cellseg_mm.core.errors import ConfigError  # noqa: E402
from cellseg_mm.exporting.carried import check_model, resize_step  # noqa: E402
from cellseg_mm.exporting.graph import PlainMaskRCNN  # noqa: E402
from cellseg_mm.fusion.fuse import paste_probs  # noqa: E402
from cellseg_mm.light.detector import enlarged  # noqa: E402
from cellseg_mm.model import mask_head  # noqa: E402
from tests.support.spread_model import spread_model  # noqa: E402
from tests.support.tiny_folds import CONFIG, random_model  # noqa: E402

pytestmark = pytest.mark.mm


@pytest.fixture(scope='module')
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('configs') / 'fold0.py'
    path.write_text(CONFIG.replace('FOLD', '0'))
    return path


def changed(config: Path, **model: object) -> Path:
    path = config.with_name('changed.py')
    path.write_text(f"_base_ = './fold0.py'\nmodel = {model!r}\n")
    return path


ONE_BOX = {'roi_head': {'bbox_head': {'reg_class_agnostic': True}}}
FRAME = {'roi_head': {'type': 'CellRoIHead', 'mask_frame': 1.25}}
TWICE = {'roi_head': {'type': 'CellRoIHead'}, 'test_cfg': {'rcnn': {'box_passes': 2}}}
CASES = [
    pytest.param({}, (64, 96), id='as it is'),
    pytest.param(FRAME, (50, 75), id='masks beyond their boxes'),
    pytest.param(TWICE, (50, 75), id='boxes looked at twice'),
    pytest.param(
        {
            'roi_head': {'type': 'CellRoIHead', 'bbox_head': {'reg_class_agnostic': True}},
            'test_cfg': {'rcnn': {'box_passes': 3}},
        },
        (64, 96),
        id='agnostic boxes looked at three times',
    ),
    pytest.param({'rpn_head': {'num_convs': 2}}, (33, 33), id='two convolutions'),
    pytest.param(
        {'roi_head': {'bbox_head': {'reg_class_agnostic': True}}}, (64, 64), id='agnostic'
    ),
    pytest.param({'data_preprocessor': {'bgr_to_rgb': True}}, (40, 64), id='red first'),
]


@pytest.mark.parametrize(('model', 'hw'), CASES)
def test_eager_equals_mmdetection(config: Path, model: dict, hw: tuple[int, int]) -> None:
    detector = spread_model(changed(config, **model), 3)
    detector.roi_head.test_cfg['keep_mask_probs'] = True
    picture = np.random.default_rng(1).integers(0, 256, (*hw, 3), dtype=np.uint8)
    meta = {'img_shape': hw, 'ori_shape': hw, 'scale_factor': (1.0, 1.0), 'img_id': 0}
    blue_first = torch.from_numpy(np.ascontiguousarray(picture[..., ::-1].transpose(2, 0, 1)))
    data = {'inputs': [blue_first], 'data_samples': [DetDataSample(metainfo=meta)]}
    with torch.no_grad():
        theirs = detector.test_step(data)[0].pred_instances
        boxes, classes, scores, masks, _ = PlainMaskRCNN(detector)(torch.from_numpy(picture))
    assert len(theirs.bboxes) > 15
    torch.testing.assert_close(boxes, theirs.bboxes, atol=1e-4, rtol=0)
    torch.testing.assert_close(scores, theirs.scores, atol=1e-6, rtol=0)
    assert torch.equal(classes, theirs.labels)
    torch.testing.assert_close(masks.half(), theirs.mask_probs, atol=1e-3, rtol=0)
    assert not detector.training


def test_masks_pasted_without_torch_have_the_same_pixels() -> None:
    rng = np.random.default_rng(2)
    n, hw = 300, (180, 240)
    low = rng.uniform(-8, 200, (n, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.5, 60, (n, 2))], axis=1).astype(np.float32)
    coarse = rng.normal(size=(n, 7, 7)).astype(np.float32)
    probs = 1 / (1 + np.exp(-4 * coarse.repeat(4, axis=1).repeat(4, axis=2)))
    frames = enlarged(boxes, 1.25)
    in_torch = mask_head.enlarged(torch.from_numpy(boxes), 1.25)
    np.testing.assert_allclose(frames, in_torch, atol=1e-5)
    theirs = mask_head.encode_masks(torch.from_numpy(probs), in_torch, hw, threshold=0.5)
    crops, offsets = paste_probs(probs, frames, hw, 0.5)
    ours = rle.encode_crops(crops, offsets, hw)
    areas = rle.areas_of(rle.decode_runs(ours, hw))
    iou = np.diag(rle.iou_matrix(ours, [one['counts'] for one in theirs], hw))
    odd = areas.sum() - (areas * iou).sum()
    assert areas.sum() > 50_000
    assert odd <= 3


@pytest.mark.parametrize(
    ('model', 'part'),
    [
        ({'roi_head': {'mask_head': {'type': 'DynamicMaskHead'}}}, 'DynamicMaskHead'),
        ({'test_cfg': {'rcnn': {'nms': {'type': 'soft_nms'}}}}, 'soft_nms'),
        (
            {'roi_head': {'mask_roi_extractor': {'roi_layer': {'sampling_ratio': 2}}}},
            'sampling_ratio=2',
        ),
    ],
)
def test_what_cannot_be_carried_is_named(config: Path, model: dict, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        check_model(random_model(changed(config, **model), 0), 'here')


def test_cascades_and_point_heads_are_named(config: Path) -> None:
    detector = random_model(config, 0)
    for path in ('', 'roi_head', 'roi_head.mask_head'):
        part = detector.get_submodule(path)
        kind = type(part)
        part.__class__ = type('CascadeOrPointRend', (kind,), {})
        with pytest.raises(ConfigError, match='CascadeOrPointRend'):
            check_model(detector, 'here')
        part.__class__ = kind
    check_model(detector, 'here')


def test_pipelines(config: Path) -> None:
    pipeline = Config.fromfile(config).test_dataloader.dataset.pipeline
    assert resize_step(pipeline, 'x') == {'type': 'Resize', 'scale': (96, 96), 'keep_ratio': True}
    assert resize_step(pipeline[:1], 'x') is None
    with pytest.raises(ConfigError, match='resizes 2 times'):
        resize_step([pipeline[1], pipeline[1]], 'x')
    with pytest.raises(ConfigError, match='RandomFlip'):
        resize_step([{'type': 'RandomFlip'}], 'x')

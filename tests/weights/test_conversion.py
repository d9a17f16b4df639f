"""weights.conversion: every tensor arrives once where it belongs, or the file is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

import cellseg_mm  # noqa: F401
from cellseg_mm.core.errors import CheckpointError
from cellseg_mm.core.safe_pickle import read_pickle
from cellseg_mm.weights.conversion import convert
from cellseg_mm.weights.names import COCO_IDS
from cellseg_mm.weights.published import convert_file
from tests.support import random_detectron2
from tests.support.weights_files import build

CLASSWISE = {
    f'roi_head.{layer}.{part}'
    for layer in ('bbox_head.fc_cls', 'bbox_head.fc_reg', 'mask_head.conv_logits')
    for part in ('weight', 'bias')
}


@pytest.fixture(scope='module')
def arrays(published: Path) -> dict[str, np.ndarray]:
    return read_pickle(published)['model']


def zeros(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors of these shapes that take no memory."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


# Typed by hand from the two code bases; the first of several equal ones each.
PAIRS = {
    'backbone.bottom_up.stem.conv1.weight': 'backbone.conv1.weight',
    'backbone.bottom_up.stem.conv1.norm.running_var': 'backbone.bn1.running_var',
    'backbone.bottom_up.res2.0.shortcut.weight': 'backbone.layer1.0.downsample.0.weight',
    'backbone.bottom_up.res3.0.shortcut.norm.bias': 'backbone.layer2.0.downsample.1.bias',
    'backbone.bottom_up.res4.5.conv2.weight': 'backbone.layer3.5.conv2.weight',
    'backbone.bottom_up.res5.2.conv3.norm.weight': 'backbone.layer4.2.bn3.weight',
    'backbone.fpn_lateral2.weight': 'neck.lateral_convs.0.conv.weight',
    'backbone.fpn_lateral5.norm.running_mean': 'neck.lateral_convs.3.bn.running_mean',
    'backbone.fpn_output4.weight': 'neck.fpn_convs.2.conv.weight',
    'proposal_generator.rpn_head.conv.conv1.bias': 'rpn_head.rpn_conv.1.conv.bias',
    'proposal_generator.rpn_head.objectness_logits.weight': 'rpn_head.rpn_cls.weight',
    'proposal_generator.rpn_head.anchor_deltas.bias': 'rpn_head.rpn_reg.bias',
    'roi_heads.box_head.conv1.weight': 'roi_head.bbox_head.shared_convs.0.conv.weight',
    'roi_heads.box_head.conv4.norm.bias': 'roi_head.bbox_head.shared_convs.3.bn.bias',
    'roi_heads.box_head.fc1.weight': 'roi_head.bbox_head.shared_fcs.0.weight',
    'roi_heads.box_predictor.cls_score.weight': 'roi_head.bbox_head.fc_cls.weight',
    'roi_heads.box_predictor.bbox_pred.bias': 'roi_head.bbox_head.fc_reg.bias',
    'roi_heads.mask_head.mask_fcn3.weight': 'roi_head.mask_head.convs.2.conv.weight',
    'roi_heads.mask_head.mask_fcn1.norm.weight': 'roi_head.mask_head.convs.0.bn.weight',
    'roi_heads.mask_head.deconv.weight': 'roi_head.mask_head.upsample.weight',
    'roi_heads.mask_head.predictor.bias': 'roi_head.mask_head.conv_logits.bias',
}


def test_every_tensor_arrives_once_where_it_belongs(arrays: dict[str, np.ndarray]) -> None:
    conversion = convert(arrays, where='x', keep_all_classes=True)
    state = conversion.state_dict
    for theirs, ours in PAIRS.items():
        np.testing.assert_array_equal(state[ours].numpy(), arrays[theirs], err_msg=ours)
    theirs_digests, ours_digests = (
        sorted(hashlib.sha1(np.ascontiguousarray(array)).hexdigest() for array in part)
        for part in (arrays.values(), (tensor.numpy() for tensor in state.values()))
    )
    assert theirs_digests == ours_digests
    assert (conversion.backbone, conversion.source, conversion.n_classes) == (
        'resnet50',
        'detectron2',
        80,
    )
    assert conversion.ignored == conversion.dropped == ()


def test_the_stock_model_loads_it_strictly(arrays: dict[str, np.ndarray]) -> None:
    model = build(n_classes=3)
    kept = convert(arrays, where='x', keep_classes=[7, 0, 7]).state_dict
    model.load_state_dict(kept, strict=True)
    weight = arrays['roi_heads.box_predictor.cls_score.weight']
    # background is row 80 there and the last row here
    np.testing.assert_array_equal(
        model.roi_head.bbox_head.fc_cls.weight.detach(), weight[[7, 0, 7, 80]]
    )
    deltas = arrays['roi_heads.box_predictor.bbox_pred.bias'].reshape(80, 4)
    np.testing.assert_array_equal(
        model.roi_head.bbox_head.fc_reg.bias.detach().reshape(3, 4), deltas[[7, 0, 7]]
    )
    logits = arrays['roi_heads.mask_head.predictor.weight']
    np.testing.assert_array_equal(
        model.roi_head.mask_head.conv_logits.weight.detach(), logits[[7, 0, 7]]
    )


@pytest.mark.parametrize(
    ('backbone', 'n_tensors', 'found', 'std'),
    [
        ('R101', 738, 'resnet101', (1.0, 1.0, 1.0)),
        ('regnetx', 558, 'regnetx_4.0gf', (57.375, 57.12, 58.395)),
    ],
)
def test_the_other_backbones_fit(
    backbone: str, n_tensors: int, found: str, std: tuple[float, ...]
) -> None:
    shapes = random_detectron2.model_shapes(backbone)
    assert len(shapes) == n_tensors
    conversion = convert(zeros(shapes), where='x')
    assert (conversion.backbone, len(conversion.state_dict)) == (found, n_tensors - 6)
    assert conversion.preprocessing.std == std
    assert set(conversion.dropped) == CLASSWISE


def test_counters_may_lack_and_buffers_are_ignored_and_both_are_told() -> None:
    shapes = random_detectron2.model_shapes('R50')
    n_counters = sum(name.endswith('num_batches_tracked') for name in shapes)
    tensors = zeros({k: v for k, v in shapes.items() if not k.endswith('num_batches_tracked')})
    extra = ['proposal_generator.anchor_generator.cell_anchors.0', 'pixel_mean', 'pixel_std']
    conversion = convert(tensors | zeros(dict.fromkeys(extra, (3,))), where='x')
    assert conversion.ignored == tuple(extra)
    # stem, 16 blocks of 3, 4 shortcuts, 8 in the FPN, 4 and 4 in the heads
    assert conversion.n_counters_filled == n_counters == 1 + 16 * 3 + 4 + 8 + 4 + 4
    assert f'{n_counters} batch counters set to 0' in conversion.summary()
    assert '3 without weights ignored' in conversion.summary()


def changed(**changes: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
    shapes = random_detectron2.model_shapes('R50')
    for name, shape in changes.items():
        shapes.pop(name, None)
        if shape is not None:
            shapes[name] = shape
    return zeros(shapes)


@pytest.mark.parametrize(
    ('changes', 'problem'),
    [
        pytest.param(
            {'backbone.fpn_output3.norm.bias': None},
            r'x.pkl: 1 tensors missing: neck.fpn_convs.1.bn.bias',
            id='one missing',
        ),
        pytest.param(
            {'roi_heads.mask_head.predictor.bias': None},
            'missing: roi_head.mask_head.conv_logits.bias',
            id='a dropped one missing',
        ),
        pytest.param(
            {'backbone.fpn_output3.bias': (256,)},
            'left over: backbone.fpn_output3.bias',
            id='one left over',
        ),
        pytest.param(
            {'backbone.bottom_up.res4.1.conv1.weight': (256, 1024, 3, 3)},
            r'misshapen: backbone.layer3.1.conv1.weight \(256, 1024, 3, 3\) instead of',
            id='another shape',
        ),
        pytest.param(
            {'backbone.bottom_up.res4.6.conv1.weight': (256, 1024, 1, 1)},
            r'\(3, 4, 7, 3\) blocks per stage',
            id='one block too many',
        ),
        pytest.param(
            {'roi_heads.box_head.fc2.weight': (1024, 1024)},
            'wrong architecture: .* older mask_rcnn',
            id='3x head',
        ),
        pytest.param(
            {'backbone.bottom_up.s1.b1.f.se.f_ex.0.weight': (8, 32, 1, 1)},
            'wrong architecture: .* RegNetY',
            id='RegNetY',
        ),
        pytest.param(
            {'roi_heads.res5.0.conv1.weight': (512, 1024, 1, 1)},
            'wrong architecture: .* C4',
            id='C4',
        ),
    ],
)
def test_a_file_that_does_not_fit_is_named_for_it(
    changes: dict[str, tuple[int, ...] | None], problem: str
) -> None:
    with pytest.raises(CheckpointError, match=problem):
        convert(changed(**changes), where='x.pkl')


@pytest.mark.parametrize(
    ('name', 'problem'),
    [
        ('stem.conv1.weight', 'ImageNet backbone'),
        ('conv1_w', 'ImageNet backbone'),
        ('backbone.fpn.inner_blocks.0.0.bias', 'v1'),
        ('encoder.weight', 'none of its 1 names'),
    ],
)
def test_foreign_models_are_recognised(name: str, problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        convert(zeros({name: (3,)}), where='x')


def test_entries_that_are_no_arrays_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r'fc1\.weight is a list'):
        convert({'roi_heads.box_head.fc1.weight': [1.0]}, where='x')


@pytest.mark.parametrize('keep', [[80], [-1], []])
def test_a_class_that_is_not_there_cannot_be_kept(
    arrays: dict[str, np.ndarray], keep: list[int]
) -> None:
    with pytest.raises(CheckpointError, match=r'numbers 0\.\.79 were expected'):
        convert(arrays, where='x', keep_classes=keep)


def torchvision_shapes() -> dict[str, tuple[int, ...]]:
    """maskrcnn_resnet50_fpn_v2, typed from its source; equal to its real state dict (0.29.1)."""
    shapes: dict[str, tuple[int, ...]] = {'backbone.body.conv1.weight': (64, 3, 7, 7)}
    norm = random_detectron2.norm
    shapes |= norm('backbone.body.bn1', 64)
    n_in = 64
    for stage, n_blocks in enumerate((3, 4, 6, 3), start=1):
        inner = 32 * 2**stage
        for block in range(n_blocks):
            at = f'backbone.body.layer{stage}.{block}'
            shapes[f'{at}.conv1.weight'] = (inner, n_in, 1, 1)
            shapes[f'{at}.conv2.weight'] = (inner, inner, 3, 3)
            shapes[f'{at}.conv3.weight'] = (4 * inner, inner, 1, 1)
            for k, width in ((1, inner), (2, inner), (3, 4 * inner)):
                shapes |= norm(f'{at}.bn{k}', width)
            if block == 0:
                shapes[f'{at}.downsample.0.weight'] = (4 * inner, n_in, 1, 1)
                shapes |= norm(f'{at}.downsample.1', 4 * inner)
            n_in = 4 * inner
        shapes[f'backbone.fpn.inner_blocks.{stage - 1}.0.weight'] = (256, n_in, 1, 1)
        shapes |= norm(f'backbone.fpn.inner_blocks.{stage - 1}.1', 256)
        shapes[f'backbone.fpn.layer_blocks.{stage - 1}.0.weight'] = (256, 256, 3, 3)
        shapes |= norm(f'backbone.fpn.layer_blocks.{stage - 1}.1', 256)
        for head in ('box_head', 'mask_head'):
            shapes[f'roi_heads.{head}.{stage - 1}.0.weight'] = (256, 256, 3, 3)
            shapes |= norm(f'roi_heads.{head}.{stage - 1}.1', 256)
    for name, shape in (
        ('rpn.head.conv.0.0', (256, 256, 3, 3)),
        ('rpn.head.conv.1.0', (256, 256, 3, 3)),
        ('rpn.head.cls_logits', (3, 256, 1, 1)),
        ('rpn.head.bbox_pred', (12, 256, 1, 1)),
        ('roi_heads.box_head.5', (1024, 12544)),
        ('roi_heads.box_predictor.cls_score', (91, 1024)),
        ('roi_heads.box_predictor.bbox_pred', (364, 1024)),
        ('roi_heads.mask_predictor.conv5_mask', (256, 256, 2, 2)),
        ('roi_heads.mask_predictor.mask_fcn_logits', (91, 256, 1, 1)),
    ):
        shapes |= {f'{name}.weight': shape, f'{name}.bias': shape[:1]}
    return shapes


def test_torchvision_rows_are_put_into_our_order() -> None:
    tensors = zeros(torchvision_shapes())
    assert len(tensors) == 432
    tensors['roi_heads.box_predictor.cls_score.bias'] = torch.arange(91.0)
    tensors['roi_heads.box_predictor.bbox_pred.bias'] = torch.arange(364.0)
    tensors['roi_heads.mask_predictor.mask_fcn_logits.bias'] = torch.arange(91.0)
    conversion = convert(tensors, where='x', keep_all_classes=True)
    scores = conversion.state_dict['roi_head.bbox_head.fc_cls.bias']
    assert len(scores) == 81
    # person 1, bicycle 2, stop sign (12th class, after the gap at 12) 13, toothbrush 90, background
    assert scores[[0, 1, 11, 79, 80]].tolist() == [1, 2, 13, 90, 0]
    deltas = conversion.state_dict['roi_head.bbox_head.fc_reg.bias'].reshape(80, 4)
    assert deltas[11].tolist() == [52, 53, 54, 55]  # 4 * 13 ...
    masks = conversion.state_dict['roi_head.mask_head.conv_logits.bias']
    assert masks.tolist() == [float(number) for number in COCO_IDS]
    assert conversion.preprocessing.channel_order == 'RGB'
    assert (len(COCO_IDS), COCO_IDS[0], COCO_IDS[-1]) == (80, 1, 90)


def test_mmdet_checkpoints_pass_and_keep_their_style(tmp_path: Path) -> None:
    published = zeros(random_detectron2.model_shapes('R50'))
    ours = convert(published, where='x', keep_all_classes=True).state_dict
    for style, order in (('pytorch', 'RGB'), ('caffe', 'BGR')):
        path = tmp_path / f'{style}.pth'
        torch.save(
            {'state_dict': ours, 'meta': {'config': f"backbone=dict(style='{style}')"}}, path
        )
        conversion = convert_file(path, tmp_path / 'out.pth')
        assert conversion.source == 'mmdet'
        assert conversion.preprocessing.channel_order == order
        assert conversion.preprocessing.backbone_style == style
    state = torch.load(tmp_path / 'out.pth', weights_only=True)['state_dict']
    assert set(state) == set(ours) - CLASSWISE

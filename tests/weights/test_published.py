"""Published weights: the restricted unpickler, the strict mapping, load_from, the report."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import threading
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

import cellseg_mm  # noqa: F401
from cellseg_mm.core.errors import CheckpointError, ConfigError
from cellseg_mm.weights import published as weights
from cellseg_mm.weights.conversion import build_model_config, convert
from cellseg_mm.weights.names import COCO_IDS, NEW_HEADS
from cellseg_mm.weights.published import check_name_hash, convert_file, locate
from cellseg_mm.weights.report_hook import WeightsReportHook, check_preprocessing, report_loading
from cellseg_mm.weights.safe_pickle import read_pickle
from tests.support import random_detectron2

CLASSWISE = {
    f'roi_head.{layer}.{part}'
    for layer in ('bbox_head.fc_cls', 'bbox_head.fc_reg', 'mask_head.conv_logits')
    for part in ('weight', 'bias')
}


# ------------------------------------------------------------------------- the unpickler


def sample_tree(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        'model': OrderedDict(
            filters=rng.normal(size=(3, 4, 5)).astype(np.float32),
            fortran=np.asfortranarray(rng.normal(size=(3, 4))),  # its bytes are column by column
            transposed=rng.normal(size=(4, 6)).T,
            scalar=np.array(3),  # shape ()
            empty=np.zeros((0, 3), np.int64),
            big_endian=rng.normal(size=7).astype('>f8'),
            flags=np.array([True, False]),
            half=rng.normal(size=3).astype(np.float16),
        ),
        '__author__': 'Détectron2',
        'numbers': [1, -2.5, None, True, 2**70],
        'shared': [[1, 2]] * 2,
        'pair': ('a', 0),
    }


# names are length-prefixed from protocol 4 on, so the other spelling is tried below that only
@pytest.mark.parametrize(
    ('protocol', 'module'),
    [(protocol, b'numpy._core') for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    + [(protocol, b'numpy.core') for protocol in range(4)],
)
def test_arrays_come_back_as_pickle_loads_them(
    tmp_path: Path, protocol: int, module: bytes
) -> None:
    content = pickle.dumps(sample_tree(protocol), protocol=protocol)
    if protocol < 4:
        content = content.replace(b'numpy._core', b'numpy.core').replace(b'numpy.core', module)
        assert module in content
    path = tmp_path / 'x.pkl'
    path.write_bytes(content)
    got = read_pickle(path)
    want = sample_tree(protocol)
    assert list(got['model']) == list(want['model'])
    for name, array in want['model'].items():
        assert got['model'][name].dtype == array.dtype, name
        np.testing.assert_array_equal(got['model'][name], array, err_msg=name)
        assert got['model'][name].shape == array.shape
    assert {key: got[key] for key in got if key != 'model'} == {
        key: want[key] for key in want if key != 'model'
    }


def test_python_2_pickle_is_read(tmp_path: Path) -> None:
    # protocol 2 of Python 2: array bytes are a str (SHORT_BINSTRING), as in old model files
    data = struct.pack('<3f', 1.5, -2.0, 200.25)
    content = (
        b'\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b'
        b'\x87R(K\x01K\x03\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff'
        b'J\xff\xff\xff\xffK\x00tb\x89U' + bytes([len(data)]) + data + b'tbs.'
    )
    path = tmp_path / 'old.pkl'
    path.write_bytes(content)
    assert read_pickle(path)['w'].tolist() == [1.5, -2.0, 200.25]


@pytest.mark.parametrize('protocol', [0, 2, 4, 5])
def test_a_pickle_cut_anywhere_is_refused(tmp_path: Path, protocol: int) -> None:
    content = pickle.dumps({'model': {'w': np.arange(6.0).reshape(2, 3)}}, protocol=protocol)
    path = tmp_path / 'cut.pkl'
    for n_bytes in range(len(content)):
        path.write_bytes(content[:n_bytes])
        with pytest.raises(CheckpointError, match=r'cut\.pkl'):
            read_pickle(path)


def test_truncation_says_so(tmp_path: Path) -> None:
    content = pickle.dumps({'model': {'w': np.zeros(1000)}})
    path = tmp_path / 'cut.pkl'
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r'ends after \d+ bytes in the middle'):
        read_pickle(path)


class Call:
    """Pickles as a call of ``function`` with ``args``: how code gets into a pickle."""

    def __init__(self, function: object, *args: object) -> None:
        self.reduced = (function, args)

    def __reduce__(self) -> tuple:
        return self.reduced


def malicious_pickles(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Name to (content, what the refusal must mention); the first ones would make ``marker``."""
    touch = f'open({str(marker)!r}, "w").close()'
    shell = f'touch {marker}'.encode()
    reconstruct = b'cnumpy.core.multiarray\n_reconstruct\n'
    return {
        'os.system': (pickle.dumps({'model': Call(os.system, shell.decode())}), 'system'),
        'eval': (pickle.dumps(Call(eval, touch), protocol=2), 'eval'),
        'exec': (pickle.dumps(Call(exec, touch)), 'exec'),
        'INST': (b"(S'" + shell + b"'\nios\nsystem\n.", 'INST'),
        'OBJ': (b"(cos\nsystem\nS'" + shell + b"'\no.", 'system|OBJ'),
        'getattr chain': (
            b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'__reduce__'\ntR.",
            r'builtins\.getattr',
        ),
        'numpy.load': (pickle.dumps(Call(np.load, str(marker))), r'numpy\.load'),
        'numpy runstring': (
            b"cnumpy.testing._private.utils\nrunstring\n(S'" + touch.encode() + b"'\n}tR.",
            'runstring',
        ),
        'dotted name': (b'\x80\x04\x8c\x05numpy\x8c\x0ddtype.__new__\x93.', r'dtype\.__new__'),
        'BUILD on a function': (reconstruct + b"}S'__doc__'\nS'x'\nsb.", 'change to a function'),
        'EXT': (b'\x82\x01.', 'EXT1'),
        'persistent id': (b'Pname\n.', 'PERSID'),
        'NEWOBJ': (b'\x80\x02cnumpy\nndarray\n)\x81.', 'NEWOBJ'),
        'object array': (pickle.dumps(np.array([{}], object)), 'dtype'),
        'structured array': (pickle.dumps(np.zeros(2, [('a', 'i4')])), 'dtype'),
        'masked array': (pickle.dumps(np.ma.zeros(2)), r'numpy\.ma'),
        'matrix': (pickle.dumps(np.zeros((2, 2)).view(np.matrix)), 'matrix'),
        'huge memo': (b'\x80\x02Nr\xff\xff\xff\x7f.', 'memo slot'),
        'call of ndarray': (b'cnumpy\nndarray\n(K\x05tR.', 'calling numpy.ndarray'),
        'preallocation': (
            reconstruct + b'(cnumpy\nndarray\n(I99999999999\ntC\x01btR.',
            'not a plain array',
        ),
    }


@pytest.mark.parametrize('name', malicious_pickles(Path('x')))
def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    marker = tmp_path / 'code-was-run'
    content, mentions = malicious_pickles(marker)[name]
    path = tmp_path / 'evil.pkl'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=mentions) as caught:
        read_pickle(path)
    assert 'evil.pkl' in str(caught.value)
    assert not marker.exists()


def test_the_malicious_pickles_are_dangerous(tmp_path: Path) -> None:
    # otherwise the test above would prove nothing
    for name in ('os.system', 'eval', 'exec', 'INST'):
        marker = tmp_path / name
        pickle.loads(malicious_pickles(marker)[name][0])
        assert marker.exists()


@pytest.mark.parametrize(
    ('state', 'problem'),
    [
        pytest.param((1, (4,), b'\0' * 8), 'with 8 bytes', id='too few bytes'),
        pytest.param((1, (-1, -2), b'\0' * 8), 'with 8 bytes', id='negative sides'),
        pytest.param((1, (2**62, 4), b'\0' * 8), 'with 8 bytes', id='product overflows int64'),
    ],
)
def test_array_whose_shape_and_bytes_disagree_is_refused(
    tmp_path: Path, state: tuple, problem: str
) -> None:
    version, shape, data = state

    class Lying:
        def __reduce__(self) -> tuple:
            function, args = np.zeros(1, np.float32).__reduce__()[:2]
            return function, args, (version, shape, np.dtype('f4'), False, data)

    path = tmp_path / 'lying.pkl'
    path.write_bytes(pickle.dumps(Lying()))
    with pytest.raises(CheckpointError, match=problem):
        read_pickle(path)


def test_shared_and_circular_containers_end(tmp_path: Path) -> None:
    bomb: list = []
    for _ in range(15):  # 2**15 paths through 15 lists
        bomb = [bomb, bomb]
    circle: list = [1]
    circle.append(circle)
    path = tmp_path / 'x.pkl'
    path.write_bytes(pickle.dumps({'bomb': bomb, 'circle': circle}))
    assert read_pickle(path)['circle'] == [1, None]
    for _ in range(20):
        bomb = [bomb]
    path.write_bytes(pickle.dumps(bomb))
    with pytest.raises(CheckpointError, match='nested deeper'):
        read_pickle(path)


def test_other_files_and_large_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / 'page.pkl'
    path.write_bytes(b'<html>please log in</html>')
    with pytest.raises(CheckpointError, match='not a pickle of arrays'):
        read_pickle(path)
    with pytest.raises(CheckpointError, match='at most 5 were expected'):
        read_pickle(path, max_bytes=5)
    with pytest.raises(CheckpointError, match='no such file'):
        read_pickle(tmp_path / 'none.pkl')


# ------------------------------------------------------------------------- the mapping


@pytest.fixture(scope='module')
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole R50 in detectron2's format with random weights."""
    return random_detectron2.write(tmp_path_factory.mktemp('published'))


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


def build(n_classes: int) -> nn.Module:
    import mmdet.models  # noqa: F401
    from mmdet.registry import MODELS
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(build_model_config((3, 4, 6, 3), n_classes))


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


def test_unsafe_torch_file_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / 'code-was-run'
    path = tmp_path / 'evil.pth'
    torch.save({'state_dict': {}, 'x': Call(os.system, f'touch {marker}')}, path)
    with pytest.raises(CheckpointError, match=r'asks for .*system'):
        convert_file(path, tmp_path / 'out.pth')
    assert not marker.exists()
    assert not (tmp_path / 'out.pth').exists()


# ------------------------------------------------------------------------- files and URLs


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / 'cache'
    monkeypatch.setenv('CELLSEG_CACHE', str(folder))
    return folder


class Server(HTTPServer):
    """Serves ``files`` by their last path part; counts requests; can cut answers short."""

    files: dict[str, bytes]
    n_requests = 0
    cut = False

    def url(self, name: str) -> str:
        return f'http://127.0.0.1:{self.server_port}/new_baselines/r50/{name}'


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.n_requests += 1
        content = self.server.files.get(self.path.rsplit('/', 1)[-1])
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.server.cut else content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Server:
    made = Server(('127.0.0.1', 0), Handler)
    made.files = {}
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def load(name: str) -> dict:
    return CheckpointLoader.load_checkpoint(name, map_location='cpu', logger='silent')


def test_a_published_url_is_fetched_and_converted_once(
    cache: Path, server: Server, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files = {published.name: published.read_bytes()}
    first = load(server.url(published.name))
    assert (len(first['state_dict']), server.n_requests) == (426, 1)
    origin = first['meta']['cellseg_weights']
    assert origin['sha256'] == hashlib.sha256(published.read_bytes()).hexdigest()
    assert origin['preprocessing']['channel_order'] == 'BGR'
    server.files = {}  # gone from the net: the cache serves
    monkeypatch.setattr(weights, 'convert_file', pytest.fail)
    second = load(server.url(published.name))
    assert server.n_requests == 1
    assert first.keys() == second.keys()
    assert first['state_dict'].keys() == second['state_dict'].keys()
    name = 'neck.fpn_convs.0.conv.weight'
    assert torch.equal(first['state_dict'][name], second['state_dict'][name])
    local = load(str(published))  # the same bytes elsewhere need no second conversion
    assert local['meta'] == first['meta']
    assert not list(cache.rglob('.tmp-*'))


def small_file(named: str = 'md5') -> tuple[str, bytes]:
    content = pickle.dumps({'model': {'a.weight': np.zeros(3)}})
    digest = hashlib.new(named, content).hexdigest()
    return f'model_final_{digest[:6]}.pkl', content


def test_a_damaged_download_is_refused_and_not_kept(cache: Path, server: Server) -> None:
    name, content = small_file()
    server.files = {name: content[:-5] + b'12345'}
    with pytest.raises(CheckpointError, match=f'{name}: hash is MD5 .*SHA-256 .* the name says'):
        load(server.url(name))
    server.files, server.cut = {name: content}, True
    with pytest.raises(CheckpointError, match=r'cannot be fetched \(.*ended after|IncompleteRead'):
        load(server.url(name))
    assert [path for path in cache.rglob('*') if path.is_file()] == []
    server.cut = False
    assert locate(server.url(name)).read_bytes() == content


def test_offline_says_how_to_go_on(cache: Path, server: Server) -> None:
    url = server.url('model_final_14d201.pkl')
    with pytest.raises(CheckpointError, match=r'cannot be fetched \(Not Found\).*put it at'):
        load(url)
    server.shutdown()
    server.server_close()
    with pytest.raises(CheckpointError, match=r'cannot be fetched .*load_from=None') as caught:
        load(url)
    text = str(caught.value)
    assert str(cache / 'model_final_14d201.pkl') in text
    assert '\n' not in text
    # and the way out works: a file put there is found without a connection
    name, content = small_file()
    cache.mkdir(exist_ok=True)
    (cache / name).write_bytes(content)
    assert locate(f'detectron2://new_baselines/x/1/{name}') == cache / name
    assert locate(f'https://dl.fbaipublicfiles.com/detectron2/x/1/{name}') == cache / name


def test_same_names_without_hash_are_kept_apart(cache: Path, server: Server) -> None:
    server.files = {'model.pkl': b'one'}
    one = locate(server.url('model.pkl'))
    server.files = {'model.pkl': b'two'}
    two = locate(f'http://127.0.0.1:{server.server_port}/other/model.pkl')
    assert (one.read_bytes(), two.read_bytes()) == (b'one', b'two')


@pytest.mark.parametrize(
    ('name', 'ours'),
    [
        (
            'https://dl.fbaipublicfiles.com/detectron2/new_baselines/a/1/model_final_14d201.pkl',
            True,
        ),
        ('detectron2://new_baselines/a/1/model_final_14d201.pkl', True),
        ('work/model.pkl', True),
        ('/data/model_final_14d201.pkl', True),
        ('http://mirror.example/x/model_final_14d201.pkl', True),
        ('https://download.pytorch.org/models/maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth', True),
        (
            'https://download.openmmlab.com/mmdetection/v2.0/simple_copy_paste/a/b-12345678.pth',
            True,
        ),
        ('work_dirs/fold0/iter_10.pth', False),
        ('https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/a-12345678.pth', False),
        ('torchvision://resnet50', False),
    ],
)
def test_only_published_names_are_taken_over(name: str, ours: bool) -> None:
    loader = CheckpointLoader._get_checkpoint_loader(name)
    assert (loader is weights.load_from_published) == ours


@pytest.mark.parametrize('algorithm', ['md5', 'sha256'])
def test_either_hash_in_the_name_is_accepted(tmp_path: Path, algorithm: str) -> None:
    name, content = small_file(algorithm)
    (tmp_path / name).write_bytes(content)
    check_name_hash(tmp_path / name)
    wrong = tmp_path / 'model_final_14d201.pkl'
    wrong.write_bytes(content)
    with pytest.raises(CheckpointError, match='name says 14d201; the file is damaged'):
        check_name_hash(wrong)
    with pytest.raises(CheckpointError, match='name says 73cbd019'):
        check_name_hash(wrong.rename(tmp_path / 'maskrcnn_v2-73cbd019.pth'))
    check_name_hash(tmp_path / 'model_final.pkl')  # no hash in the name: nothing to compare


def test_a_truncated_file_is_refused_with_and_without_hash(tmp_path: Path) -> None:
    name, content = small_file()
    path = tmp_path / name
    path.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match='hash is'):
        convert_file(path, tmp_path / 'out.pth')
    with pytest.raises(CheckpointError, match='ends after'):
        convert_file(path.rename(tmp_path / 'renamed.pkl'), tmp_path / 'out.pth')
    assert not (tmp_path / 'out.pth').exists()


def test_conversion_writes_checkpoint_and_preprocessing(tmp_path: Path, published: Path) -> None:
    out_path = tmp_path / 'lsj.pth'
    convert_file(published, out_path, keep_classes=[0, 0, 1, 2])
    content = torch.load(out_path, weights_only=True)
    assert len(content['state_dict']) == 432
    assert content['state_dict']['roi_head.bbox_head.fc_cls.bias'].shape == (5,)
    beside = json.loads((tmp_path / 'lsj.json').read_text())
    assert beside == content['meta']['cellseg_weights']
    assert beside['preprocessing'] == {
        'channel_order': 'BGR',
        'mean': [103.53, 116.28, 123.675],
        'std': [1.0, 1.0, 1.0],
        'backbone_style': 'caffe',
    }


# ------------------------------------------------------------------------- the report


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.bn = nn.BatchNorm2d(2)


class Tiny(BaseModel):
    """A model with a body and a class-wise head, trained on numbers."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.backbone = Body()
        self.roi_head = nn.Module()
        self.roi_head.bbox_head = nn.Module()
        self.roi_head.bbox_head.fc_cls = nn.Linear(2, n_classes)

    def forward(self, inputs: torch.Tensor, mode: str = 'tensor') -> dict | torch.Tensor:
        x = self.backbone.bn(self.backbone.conv(inputs)).mean((2, 3))
        scores = self.roi_head.bbox_head.fc_cls(x)
        return {'loss': scores.square().mean()} if mode == 'loss' else scores


def tiny_state(n_classes: int, seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn_like(v.float()) for name, v in Tiny(n_classes).state_dict().items()}


def test_report_sorts_every_tensor() -> None:
    model, state = Tiny(5), tiny_state(81)
    del state['backbone.conv.bias'], state['backbone.bn.num_batches_tracked']
    state['neck.weight'] = torch.zeros(2)
    report = report_loading(model, state)
    assert set(report.loaded) == {
        'backbone.conv.weight',
        *(f'backbone.bn.{p}' for p in ('weight', 'bias', 'running_mean', 'running_var')),
    }
    assert report.new == ('backbone.conv.bias',)
    assert report.unused == ('neck.weight',)
    assert report.mismatched == (
        ('roi_head.bbox_head.fc_cls.weight', (81, 2), (5, 2)),
        ('roi_head.bbox_head.fc_cls.bias', (81,), (5,)),
    )
    table = report.table()
    assert 'backbone' in table
    assert 'roi_head.bbox_head' in table
    row = next(line.split() for line in table.splitlines() if line.startswith('backbone'))
    assert row[1:] == ['5', '0.000', '1', '0.000']
    with pytest.raises(CheckpointError) as caught:
        report.check(where='f.pth')
    for part in (
        'f.pth: 2 tensors have another shape',
        'fc_cls.bias is (81,) in the file and (5,) in the model',
        '1 tensors are not in the file (backbone.conv.bias)',
        '1 tensors are in the file only (neck.weight)',
    ):
        assert part in str(caught.value)
    with pytest.raises(CheckpointError, match=r'conv\.bias') as caught:
        report.check(allow_new=NEW_HEADS, allow_unused=[r'neck\..*'], where='f.pth')
    assert 'fc_cls' not in str(caught.value)
    report.check(
        allow_new=[*NEW_HEADS, r'backbone\.conv\.bias'], allow_unused=[r'neck\..*'], where='f'
    )


def test_absent_counters_are_not_called_new() -> None:
    state = tiny_state(5)
    del state['backbone.bn.num_batches_tracked']
    report = report_loading(Tiny(5), state)
    report.check(where='f')
    assert len(report.loaded) == 9 - 1  # 2 of the convolution, 5 of the norm, 2 of the head


class RestoreBias(WeightsReportHook):
    """Plays the hook that undoes a load."""

    priority = 'LOW'

    def before_train(self, runner: Runner) -> None:
        nn.init.zeros_(runner.model.backbone.conv.bias)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        pass


def make_runner(
    folder: Path, load_from: Path, *, hooks: list, n_classes: int = 5, **options: object
) -> Runner:
    data = {
        'dataset': [torch.ones(1, 2, 2) * i for i in range(4)],
        'sampler': {'type': 'DefaultSampler', 'shuffle': False},
        'batch_size': 2,
        'collate_fn': lambda items: {'inputs': torch.stack(items)},
    }
    return Runner(
        model=Tiny(n_classes),
        work_dir=str(folder / 'work'),
        train_dataloader=data,
        train_cfg={'by_epoch': True, 'max_epochs': options.pop('epochs', 1)},
        optim_wrapper={'optimizer': {'type': 'SGD', 'lr': 0.1}},
        default_hooks={'checkpoint': {'type': 'CheckpointHook', 'interval': 1}},
        custom_hooks=hooks,
        load_from=str(load_from),
        log_level='INFO',
        experiment_name=f'{folder.name}-{len(list(folder.rglob("*")))}',
        **options,
    )


def logged(runner: Runner) -> str:
    return '\n'.join(path.read_text() for path in Path(runner.work_dir).rglob('*.log'))


def test_hook_reports_then_training_and_resuming_go_on(tmp_path: Path) -> None:
    path = tmp_path / 'start.pth'
    torch.save({'state_dict': tiny_state(81)}, path)
    runner = make_runner(tmp_path, path, hooks=[WeightsReportHook()])
    runner.train()
    text = logged(runner)
    assert text.count(f'Weights of {path}') == 1
    assert 'new: roi_head.bbox_head.fc_cls.weight, roi_head.bbox_head.fc_cls.bias' in text
    resumed = make_runner(
        tmp_path, tmp_path / 'work/epoch_1.pth', hooks=[WeightsReportHook()], resume=True, epochs=2
    )
    resumed.train()
    assert resumed.epoch == 2


def test_hook_stops_what_mmengine_would_only_warn_about(tmp_path: Path) -> None:
    path = tmp_path / 'start.pth'
    state = tiny_state(5)
    state['backbone.conv.weight'] = torch.zeros(2, 3, 1, 1)
    torch.save({'state_dict': state}, path)
    runner = make_runner(tmp_path, path, hooks=[WeightsReportHook()])
    with pytest.raises(CheckpointError, match=r'conv.weight is \(2, 3, 1, 1\) in the file'):
        runner.train()


def test_hook_allows_no_new_heads_when_resuming(tmp_path: Path) -> None:
    path = tmp_path / 'start.pth'
    torch.save({'state_dict': tiny_state(81), 'meta': {'epoch': 0, 'iter': 0}}, path)
    runner = make_runner(tmp_path, path, hooks=[WeightsReportHook()], resume=True)
    with pytest.raises(CheckpointError, match=r'fc_cls\.bias is'):
        runner.train()


def test_hook_notices_values_changed_after_loading(tmp_path: Path) -> None:
    path = tmp_path / 'start.pth'
    torch.save({'state_dict': tiny_state(5)}, path)
    runner = make_runner(tmp_path, path, hooks=[RestoreBias(), WeightsReportHook()])
    with pytest.raises(CheckpointError, match=r'1 tensors differ .*backbone\.conv\.bias'):
        runner.train()


def test_preprocessing_that_differs_is_refused() -> None:
    model = build(n_classes=1)
    origin = {
        'preprocessing': {
            'channel_order': 'BGR',
            'mean': [103.53, 116.28, 123.675],
            'std': [1.0, 1.0, 1.0],
            'backbone_style': 'caffe',
        }
    }
    check_preprocessing(model, origin, where='f')
    model.backbone.style = 'pytorch'
    with pytest.raises(ConfigError, match=r'backbone_style pytorch; the weights .* caffe'):
        check_preprocessing(model, origin, where='f')
    model.backbone.style = 'caffe'
    model.data_preprocessor.mean = model.data_preprocessor.mean.flip(0)
    with pytest.raises(ConfigError, match=r'mean \[123.675, 116.28, 103.53\]'):
        check_preprocessing(model, origin, where='f')

"""What published Mask R-CNN files call their tensors, and what we call them: data, no logic.

In and out: nothing; ``weights`` reads these tables. This is the one place where a name, a row order
or a preprocessing constant of somebody else's weights is written down.
Invariant: core; a new family of weights is a new ``WeightFamily`` here and nothing else.

In a table the left name is the published one, the right one ours. ``{norm}`` is one part of a batch
norm, ``{part}`` is weight or bias, any other word in braces is a number; ``{n-2}`` is that number
minus two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_DETECTRON2_NAMES = (
    # ResNet
    ('backbone.bottom_up.stem.conv1.weight', 'backbone.conv1.weight'),
    ('backbone.bottom_up.stem.conv1.norm.{norm}', 'backbone.bn1.{norm}'),
    (
        'backbone.bottom_up.res{stage}.{block}.conv{k}.weight',
        'backbone.layer{stage-1}.{block}.conv{k}.weight',
    ),
    (
        'backbone.bottom_up.res{stage}.{block}.conv{k}.norm.{norm}',
        'backbone.layer{stage-1}.{block}.bn{k}.{norm}',
    ),
    (
        'backbone.bottom_up.res{stage}.{block}.shortcut.weight',
        'backbone.layer{stage-1}.{block}.downsample.0.weight',
    ),
    (
        'backbone.bottom_up.res{stage}.{block}.shortcut.norm.{norm}',
        'backbone.layer{stage-1}.{block}.downsample.1.{norm}',
    ),
    # RegNetX (RegNetY has se.f_ex.* as well, which no MMDetection backbone has)
    ('backbone.bottom_up.stem.conv.weight', 'backbone.conv1.weight'),
    ('backbone.bottom_up.stem.bn.{norm}', 'backbone.bn1.{norm}'),
    (
        'backbone.bottom_up.s{stage}.b{block}.f.a.weight',
        'backbone.layer{stage}.{block-1}.conv1.weight',
    ),
    (
        'backbone.bottom_up.s{stage}.b{block}.f.b.weight',
        'backbone.layer{stage}.{block-1}.conv2.weight',
    ),
    (
        'backbone.bottom_up.s{stage}.b{block}.f.c.weight',
        'backbone.layer{stage}.{block-1}.conv3.weight',
    ),
    (
        'backbone.bottom_up.s{stage}.b{block}.f.a_bn.{norm}',
        'backbone.layer{stage}.{block-1}.bn1.{norm}',
    ),
    (
        'backbone.bottom_up.s{stage}.b{block}.f.b_bn.{norm}',
        'backbone.layer{stage}.{block-1}.bn2.{norm}',
    ),
    (
        'backbone.bottom_up.s{stage}.b{block}.f.c_bn.{norm}',
        'backbone.layer{stage}.{block-1}.bn3.{norm}',
    ),
    (
        'backbone.bottom_up.s{stage}.b{block}.proj.weight',
        'backbone.layer{stage}.{block-1}.downsample.0.weight',
    ),
    (
        'backbone.bottom_up.s{stage}.b{block}.bn.{norm}',
        'backbone.layer{stage}.{block-1}.downsample.1.{norm}',
    ),
    # FPN
    ('backbone.fpn_lateral{level}.weight', 'neck.lateral_convs.{level-2}.conv.weight'),
    ('backbone.fpn_lateral{level}.norm.{norm}', 'neck.lateral_convs.{level-2}.bn.{norm}'),
    ('backbone.fpn_output{level}.weight', 'neck.fpn_convs.{level-2}.conv.weight'),
    ('backbone.fpn_output{level}.norm.{norm}', 'neck.fpn_convs.{level-2}.bn.{norm}'),
    # RPN
    ('proposal_generator.rpn_head.conv.conv{i}.{part}', 'rpn_head.rpn_conv.{i}.conv.{part}'),
    ('proposal_generator.rpn_head.objectness_logits.{part}', 'rpn_head.rpn_cls.{part}'),
    ('proposal_generator.rpn_head.anchor_deltas.{part}', 'rpn_head.rpn_reg.{part}'),
    # Box head, mask head
    ('roi_heads.box_head.conv{i}.weight', 'roi_head.bbox_head.shared_convs.{i-1}.conv.weight'),
    ('roi_heads.box_head.conv{i}.norm.{norm}', 'roi_head.bbox_head.shared_convs.{i-1}.bn.{norm}'),
    ('roi_heads.box_head.fc{i}.{part}', 'roi_head.bbox_head.shared_fcs.{i-1}.{part}'),
    ('roi_heads.box_predictor.cls_score.{part}', 'roi_head.bbox_head.fc_cls.{part}'),
    ('roi_heads.box_predictor.bbox_pred.{part}', 'roi_head.bbox_head.fc_reg.{part}'),
    ('roi_heads.mask_head.mask_fcn{i}.weight', 'roi_head.mask_head.convs.{i-1}.conv.weight'),
    ('roi_heads.mask_head.mask_fcn{i}.norm.{norm}', 'roi_head.mask_head.convs.{i-1}.bn.{norm}'),
    ('roi_heads.mask_head.deconv.{part}', 'roi_head.mask_head.upsample.{part}'),
    ('roi_heads.mask_head.predictor.{part}', 'roi_head.mask_head.conv_logits.{part}'),
)
_TORCHVISION_NAMES = (
    ('backbone.body.conv1.weight', 'backbone.conv1.weight'),
    ('backbone.body.bn1.{norm}', 'backbone.bn1.{norm}'),
    (
        'backbone.body.layer{stage}.{block}.conv{k}.weight',
        'backbone.layer{stage}.{block}.conv{k}.weight',
    ),
    (
        'backbone.body.layer{stage}.{block}.bn{k}.{norm}',
        'backbone.layer{stage}.{block}.bn{k}.{norm}',
    ),
    (
        'backbone.body.layer{stage}.{block}.downsample.0.weight',
        'backbone.layer{stage}.{block}.downsample.0.weight',
    ),
    (
        'backbone.body.layer{stage}.{block}.downsample.1.{norm}',
        'backbone.layer{stage}.{block}.downsample.1.{norm}',
    ),
    ('backbone.fpn.inner_blocks.{i}.0.weight', 'neck.lateral_convs.{i}.conv.weight'),
    ('backbone.fpn.inner_blocks.{i}.1.{norm}', 'neck.lateral_convs.{i}.bn.{norm}'),
    ('backbone.fpn.layer_blocks.{i}.0.weight', 'neck.fpn_convs.{i}.conv.weight'),
    ('backbone.fpn.layer_blocks.{i}.1.{norm}', 'neck.fpn_convs.{i}.bn.{norm}'),
    ('rpn.head.conv.{i}.0.{part}', 'rpn_head.rpn_conv.{i}.conv.{part}'),
    ('rpn.head.cls_logits.{part}', 'rpn_head.rpn_cls.{part}'),
    ('rpn.head.bbox_pred.{part}', 'rpn_head.rpn_reg.{part}'),
    ('roi_heads.box_head.{i}.0.weight', 'roi_head.bbox_head.shared_convs.{i}.conv.weight'),
    ('roi_heads.box_head.{i}.1.{norm}', 'roi_head.bbox_head.shared_convs.{i}.bn.{norm}'),
    # 0-3 are convolutions, 4 flattens, 5 is the fully connected layer
    ('roi_heads.box_head.{i}.{part}', 'roi_head.bbox_head.shared_fcs.{i-5}.{part}'),
    ('roi_heads.box_predictor.cls_score.{part}', 'roi_head.bbox_head.fc_cls.{part}'),
    ('roi_heads.box_predictor.bbox_pred.{part}', 'roi_head.bbox_head.fc_reg.{part}'),
    ('roi_heads.mask_head.{i}.0.weight', 'roi_head.mask_head.convs.{i}.conv.weight'),
    ('roi_heads.mask_head.{i}.1.{norm}', 'roi_head.mask_head.convs.{i}.bn.{norm}'),
    ('roi_heads.mask_predictor.conv5_mask.{part}', 'roi_head.mask_head.upsample.{part}'),
    ('roi_heads.mask_predictor.mask_fcn_logits.{part}', 'roi_head.mask_head.conv_logits.{part}'),
)
_MMDET_NAMES = (('{any}', '{any}'),)

# Signs of models that have another architecture than ours, and what to tell their owner.
FOREIGN = (
    (r'.*\.se\.f_ex\..*', 'a RegNetY, whose squeeze-and-excitation blocks MMDetection has not'),
    (r'roi_heads\.res5\..*', "detectron2's C4 architecture, which has no FPN"),
    (r'head\.cls_subnet\..*', "detectron2's RetinaNet, which has no masks"),
    (
        r'roi_heads\.box_head\.fc2\..*|proposal_generator\.rpn_head\.conv\.weight',
        "detectron2's older mask_rcnn_*_FPN_1x/3x architecture (0conv2fc head, FrozenBN)",
    ),
    (r'(stem|res2\.0)\.conv1\..*|conv1_w|res2_0_.*', 'an ImageNet backbone alone'),
    (
        r'backbone\.fpn\.inner_blocks\.0\.(0\.)?bias',
        "torchvision's maskrcnn_resnet50_fpn (v1), which has no norm in FPN and heads",
    ),
    (r'bbox_head\.(cls|reg)_convs\..*', 'a one-stage MMDetection model'),
    (r'roi_head\.(bbox|mask)_head\.0\..*', 'a cascade'),
)

# Rows of the class-wise layers: (rows per class, whether there is a background row).
CLASS_LAYERS = {
    'roi_head.bbox_head.fc_cls': (1, True),
    'roi_head.bbox_head.fc_reg': (4, False),
    'roi_head.mask_head.conv_logits': (1, False),
}
NEW_HEADS = tuple(rf'{re.escape(name)}\.(weight|bias)' for name in CLASS_LAYERS)

# COCO numbers its 80 classes 1..90 with gaps; torchvision keeps the gaps as rows nobody uses.
_COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_IDS = tuple(number for number in range(1, 91) if number not in _COCO_GAPS)


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What the images and the backbone must be like for the weights to mean anything.

    Attributes:
        channel_order: Of the tensor that enters the network.
        mean: Per channel, in that order, in grey levels 0..255.
        std: The same.
        backbone_style: 'caffe' has the stride in the first 1x1 convolution, 'pytorch' in the 3x3.
    """

    channel_order: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    backbone_style: str


CAFFE = Preprocessing('BGR', (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), 'caffe')
REGNET = Preprocessing('BGR', (103.53, 116.28, 123.675), (57.375, 57.12, 58.395), 'pytorch')
_PYTORCH = Preprocessing('RGB', (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 'pytorch')


@dataclass(frozen=True, slots=True)
class WeightFamily:
    """One family of published weights.

    Attributes:
        names: The table of names, first fitting row wins.
        ignored: Patterns of names that hold no weights.
        sign: Pattern that some name of such a file fits, and no name of another family's.
        background_first: Whether row 0 of the class scores is the background (else the last).
    """

    title: str
    names: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]
    sign: str
    background_first: bool
    preprocessing: Preprocessing


SOURCES = {
    'detectron2': WeightFamily(
        title="detectron2's new_baselines",
        names=_DETECTRON2_NAMES,
        ignored=(
            r'proposal_generator\.anchor_generator\.cell_anchors\.\d+',
            r'pixel_mean|pixel_std',
        ),
        sign=r'backbone\.bottom_up\..*',
        background_first=False,
        preprocessing=CAFFE,
    ),
    'torchvision': WeightFamily(
        title="torchvision's maskrcnn_resnet50_fpn_v2",
        names=_TORCHVISION_NAMES,
        ignored=(),
        sign=r'backbone\.body\..*',
        background_first=True,
        preprocessing=_PYTORCH,
    ),
    'mmdet': WeightFamily(
        title="MMDetection's strong_baselines and simple_copy_paste",
        names=_MMDET_NAMES,
        ignored=(r'data_preprocessor\.(mean|std)',),
        sign=r'neck\.lateral_convs\..*',
        background_first=False,
        preprocessing=_PYTORCH,
    ),
}

# Blocks per stage tell the backbone; the rest of the model is the same for all.
BACKBONES = {
    (3, 4, 6, 3): ('resnet50', {'depth': 50}, (256, 512, 1024, 2048)),
    (3, 4, 23, 3): ('resnet101', {'depth': 101}, (256, 512, 1024, 2048)),
    (2, 5, 14, 2): (
        'regnetx_4.0gf',
        {'type': 'RegNet', 'arch': 'regnetx_4.0gf'},
        (80, 240, 560, 1360),
    ),
}
BASE_CONFIG = (
    'mmdet::strong_baselines/mask-rcnn_r50-caffe_fpn_rpn-2conv_4conv1fc_syncbn-all_lsj-100e_coco.py'
)
COUNTER = '.num_batches_tracked'

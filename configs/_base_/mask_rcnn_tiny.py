# A Mask R-CNN of 1.6 million parameters that learns from random weights on a laptop's CPU.
# The parts are MMDetection's; only widths, anchors and sizes differ from the base recipe.
_base_ = './mask_rcnn_r50_lsj.py'

# Plain BN: 4 crops of 256 px give the backbone thousands of positions per channel, and each head
# at least 4 x 64 RoIs, so batch statistics are sound on one device from random weights.
norm_cfg = dict(_delete_=True, type='BN', requires_grad=True)
load_from = None
score_thr = 0.01
crop_size = (256, 256)  # px; cells are 10 to 60 px at the files' own resolution
meta_keys = _base_.meta_keys

model = dict(
    backbone=dict(depth=18, base_channels=24, style='pytorch', norm_cfg=norm_cfg, norm_eval=False),
    neck=dict(in_channels=[24, 48, 96, 192], out_channels=64, norm_cfg=norm_cfg, num_outs=4),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        num_convs=1,
        # 12, 24, 48, 96 px
        anchor_generator=dict(scales=[3], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, featmap_strides=[4, 8, 16], finest_scale=28),
        bbox_head=dict(
            _delete_=True,
            type='Shared2FCBBoxHead',
            in_channels=64,
            fc_out_channels=256,
            roi_feat_size=7,
            num_classes=_base_.model.roi_head.bbox_head.num_classes,
            bbox_coder=dict(
                type='DeltaXYWHBBoxCoder',
                target_means=[0.0, 0.0, 0.0, 0.0],
                target_stds=[0.1, 0.1, 0.2, 0.2],
            ),
            reg_class_agnostic=False,
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type='L1Loss', loss_weight=1.0),
        ),
        mask_roi_extractor=dict(
            out_channels=64,
            featmap_strides=[4, 8, 16],
            finest_scale=28,
            roi_layer=dict(output_size=14),
        ),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, norm_cfg=norm_cfg),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=300),
        rcnn=dict(sampler=dict(num=128, pos_fraction=0.35)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=1000, max_per_img=1000), rcnn=dict(score_thr=score_thr)),
)
val_evaluator = dict(score_thr=score_thr)  # for the report on truncation
test_evaluator = dict(score_thr=score_thr)
train_pipeline = [
    dict(type='LoadCellImage', red_blue_swapped=_base_.red_blue_swapped),
    dict(type='LoadLabelMaps'),
    dict(type='RandomScale', ratio_range=(0.8, 1.25)),
    dict(type='RandomCrop', crop_size=crop_size, recompute_bbox=True, allow_negative_crop=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomRotate90', prob=0.75),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(2, 2), keep_empty=False),
    dict(type='PackCellInputs', meta_keys=meta_keys),
]
test_pipeline = [
    dict(type='LoadCellImage', red_blue_swapped=_base_.red_blue_swapped),
    dict(type='Resize', scale_factor=1.0, keep_ratio=True),
    dict(type='PackDetInputs', meta_keys=meta_keys),
]
train_dataloader = dict(batch_size=4, dataset=dict(dataset=dict(pipeline=train_pipeline)))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))

max_iters = 200
train_cfg = dict(max_iters=max_iters, val_interval=100)
optim_wrapper = dict(
    # one rate for all: nothing here is pretrained
    paramwise_cfg=dict(_delete_=True),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=False, begin=0, end=max_iters,
        T_max=max_iters,
    ),
]  # fmt: skip
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=100))

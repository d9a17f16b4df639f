# The recipe for a machine without a GPU: twice the files' resolution, since cells of 10 to 30 px
# are small for a pyramid whose finest map has one position per 4 px.
# Cost: 800 iterations of 4 crops, about 20 min on two quiet cores, one fold.
_base_ = './mask_rcnn_lite.py'

crop_size = (384, 384)  # px at twice the resolution
meta_keys = _base_.meta_keys
train_pipeline = [
    dict(type='LoadCellImage', red_blue_swapped=_base_.red_blue_swapped),
    dict(type='LoadLabelMaps'),
    dict(type='RandomScale', ratio_range=(1.4, 2.4)),
    dict(type='RandomCrop', crop_size=crop_size, recompute_bbox=True, allow_negative_crop=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomRotate90', prob=0.75),
    dict(type='HEDJitter'),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(2, 2), keep_empty=False),
    dict(type='PackCellInputs', meta_keys=meta_keys),
]
test_pipeline = [
    dict(type='LoadCellImage', red_blue_swapped=_base_.red_blue_swapped),
    # 2.0 up to a side of 1600 px; a picture of 3200 x 3200 px takes about 3 GB
    dict(type='ScaleBy', factor=2.0, max_side_px=3200),
    dict(type='PackDetInputs', meta_keys=meta_keys),
]
train_dataloader = dict(dataset=dict(dataset=dict(pipeline=train_pipeline)))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
model = dict(
    rpn_head=dict(anchor_generator=dict(scales=[5])),  # 20, 40, 80, 160 px
    roi_head=dict(
        bbox_roi_extractor=dict(finest_scale=56), mask_roi_extractor=dict(finest_scale=56)
    ),
    test_cfg=dict(rpn=dict(nms_pre=2000, max_per_img=2000)),
)

max_iters = 800
train_cfg = dict(max_iters=max_iters, val_interval=400)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=False, begin=0, end=max_iters,
        T_max=max_iters,
    ),
]  # fmt: skip
default_hooks = dict(checkpoint=dict(interval=100))

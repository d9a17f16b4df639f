# What the best public systems on this collection found to help, on the base model: tiles of
# 768 px at twice the files' resolution, small anchors, 1000 detections, class-balanced sampling,
# moving average of the weights, stain jitter, turns, a schedule three times as long.
# Cost: 15000 iterations of 4 tiles, about 3 h on one 24 GB GPU, one fold.
_base_ = './mask_rcnn_r50_lsj.py'

tile_px = 768
max_per_img = 1000
meta_keys = _base_.meta_keys
train_pipeline = [
    dict(type='LoadCellImage', red_blue_swapped=_base_.red_blue_swapped),
    dict(type='LoadLabelMaps'),
    # cells are 10 to 30 px in the files, the COCO weights know objects from 32 px on
    dict(type='RandomScale', ratio_range=(1.4, 2.8)),
    dict(type='ClassAwareCrop', crop_size=(tile_px, tile_px)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomRotate90', prob=0.75),
    dict(type='HEDJitter'),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(2, 2), keep_empty=False),
    dict(type='PackCellInputs', meta_keys=meta_keys),
]
test_pipeline = [
    dict(type='LoadCellImage', red_blue_swapped=_base_.red_blue_swapped),
    dict(type='ScaleBy', factor=2.0, max_side_px=2400),
    dict(type='PackDetInputs', meta_keys=meta_keys),
]
dataset = _base_.dataset
train_dataloader = dict(
    batch_size=4,
    num_workers=4,
    dataset=dict(
        _delete_=True,
        type='SeededDataset',
        dataset=dict(
            type='ClassBalancedDataset',
            # images with a class that fewer than 40 % of the images have are repeated
            oversample_thr=0.4,
            dataset=dict(split='train', pipeline=train_pipeline, **dataset),
        ),
    ),
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
val_evaluator = dict(max_per_img=max_per_img)
test_evaluator = dict(max_per_img=max_per_img)

model = dict(
    # 16 to 256 px at twice the resolution: cells of 8 to 128 px in the files
    rpn_head=dict(anchor_generator=dict(scales=[4])),
    train_cfg=dict(rpn_proposal=dict(nms_pre=4000, max_per_img=2000)),
    test_cfg=dict(rpn=dict(nms_pre=4000, max_per_img=3000), rcnn=dict(max_per_img=max_per_img)),
)
max_iters = 15000
val_interval = 1000
train_cfg = dict(max_iters=max_iters, val_interval=val_interval)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-4, weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={'backbone': dict(lr_mult=0.25), 'neck': dict(lr_mult=0.5)},
    ),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=500),
    dict(
        type='CosineAnnealingLR', eta_min_ratio=1e-3, by_epoch=False, begin=0, end=max_iters,
        T_max=max_iters,
    ),
]  # fmt: skip
auto_scale_lr = dict(base_batch_size=4)
custom_hooks = [
    # 0.0005: an average over about the last 2000 iterations
    dict(
        type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0005, update_buffers=True, priority=49
    ),
]
default_hooks = dict(checkpoint=dict(interval=val_interval))

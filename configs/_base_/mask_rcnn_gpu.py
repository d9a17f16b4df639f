# The strong recipe made small enough to train five folds in a quarter of an hour on one large GPU,
# from random weights: ResNet-18, GroupNorm, tiles of 512 px, a short schedule.
# Cost: see docs/gpu.md; the number of iterations is planned from the measured throughput.
_base_ = './mask_rcnn_r50_strong.py'

load_from = None
tile_px = 512
# random weights have no statistics to freeze, and tiles of one slide are no fair batch
norm_cfg = dict(_delete_=True, type='GN', num_groups=32, requires_grad=True)
meta_keys = _base_.meta_keys
dataset = _base_.dataset
train_pipeline = [
    dict(type='LoadCellImage', red_blue_swapped=_base_.red_blue_swapped),
    dict(type='LoadLabelMaps'),
    dict(type='RandomScale', ratio_range=(1.4, 2.8)),
    dict(type='ClassAwareCrop', crop_size=(tile_px, tile_px)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomRotate90', prob=0.75),
    dict(type='HEDJitter'),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(2, 2), keep_empty=False),
    dict(type='PackCellInputs', meta_keys=meta_keys),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=2,  # five folds share 16 cores
    dataset=dict(dataset=dict(dataset=dict(pipeline=train_pipeline))),
)
model = dict(
    backbone=dict(depth=18, style='pytorch', norm_cfg=norm_cfg, norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[64, 128, 256, 512], norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
max_iters = 1500
val_interval = 500
train_cfg = dict(max_iters=max_iters, val_interval=val_interval)
optim_wrapper = dict(
    optimizer=dict(lr=4e-4),
    paramwise_cfg=dict(_delete_=True),  # one rate: nothing is pretrained
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, begin=0, end=150),
    dict(
        type='CosineAnnealingLR', eta_min_ratio=1e-3, by_epoch=False, begin=0, end=max_iters,
        T_max=max_iters,
    ),
]  # fmt: skip
custom_hooks = [
    # 0.005: an average over about the last 200 iterations
    dict(
        type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.005, update_buffers=True, priority=49
    ),
]
# often: a call on a lent machine ends after ten minutes
default_hooks = dict(checkpoint=dict(interval=100))

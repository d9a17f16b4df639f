# The laptop recipe made larger for one card: tiles of 512 px, batches of 8, weights averaged.
# Cost: 0.6 s a step with five folds side by side on one H200 (docs/gpu.md).
_base_ = './mask_rcnn_laptop.py'

tile_px = 512
meta_keys = _base_.meta_keys
train_pipeline = [
    dict(type='LoadCellImage', red_blue_swapped=_base_.red_blue_swapped),
    dict(type='LoadLabelMaps'),
    dict(type='RandomScale', ratio_range=(1.4, 2.8)),
    dict(
        type='RandomCrop',
        crop_size=(tile_px, tile_px),
        recompute_bbox=True,
        allow_negative_crop=True,
    ),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomRotate90', prob=0.75),
    dict(type='HEDJitter'),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(2, 2), keep_empty=False),
    dict(type='PackCellInputs', meta_keys=meta_keys),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=2,  # five folds share 16 cores
    dataset=dict(dataset=dict(pipeline=train_pipeline)),
)
max_iters = 1500
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=False, begin=0, end=max_iters,
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

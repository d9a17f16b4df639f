# The base recipe with the augmentation that its weights were trained with: large-scale jitter of
# 0.1 to 2.0 and a crop of 1024 px. Longer, since each image is seen at twenty sizes.
_base_ = './mask_rcnn_r50_lsj.py'

image_size = (1024, 1024)  # px
meta_keys = _base_.meta_keys
train_pipeline = [
    dict(type='LoadCellImage', red_blue_swapped=_base_.red_blue_swapped),
    dict(type='LoadLabelMaps'),
    dict(type='RandomResize', scale=image_size, ratio_range=(0.1, 2.0), keep_ratio=True),
    dict(
        type='RandomCrop', crop_type='absolute_range', crop_size=image_size, recompute_bbox=True,
        allow_negative_crop=True,
    ),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1e-2, 1e-2), keep_empty=False),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackCellInputs', meta_keys=meta_keys),
]  # fmt: skip
train_dataloader = dict(dataset=dict(dataset=dict(pipeline=train_pipeline)))
model = dict(
    data_preprocessor=dict(
        batch_augments=[dict(type='BatchFixedSizePad', size=image_size, pad_mask=True)]
    )
)
max_iters = 10000
train_cfg = dict(max_iters=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=500),
    dict(
        type='CosineAnnealingLR', eta_min_ratio=1e-4, by_epoch=False, begin=0, end=max_iters,
        T_max=max_iters,
    ),
]  # fmt: skip

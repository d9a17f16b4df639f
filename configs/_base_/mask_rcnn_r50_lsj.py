# The original recipe on MMDetection's replica of detectron2's new_baselines Mask R-CNN R50-FPN.
# Cost: 5000 iterations of 3 images, about 1 h on one 24 GB GPU, one fold. Start:
#   python tools/train.py configs/fold0.py
_base_ = (
    'mmdet::strong_baselines/mask-rcnn_r50-caffe_fpn_rpn-2conv_4conv1fc_syncbn-all_lsj-400e_coco.py'
)

custom_imports = dict(imports=['cellseg_mm.components'], allow_failed_imports=False)

# ---------------------------------------------------------------------------------- data
# Each line below is evaluated here. To change one in a child config, change the data loaders;
# or set the environment variables, which work for every config and tool.
# Pasted in as text: these quotes leave any name whole.
data_root = r"""{{$CELLSEG_DATA:data}}"""
folds_file = r"""{{$CELLSEG_FOLDS:auto}}"""  # auto: <data_root>/folds.json
metainfo = dict(
    classes=('epithelial', 'lymphocyte', 'neutrophil', 'macrophage'),
    # Okabe and Ito's colour-blind-safe colours: blue, vermilion, yellow, bluish green
    palette=[(0, 114, 178), (213, 94, 0), (240, 228, 66), (0, 158, 115)],
)
# The files of this collection hold blue where red belongs. True undoes it, so that the
# COCO-trained weights get the BGR they were trained on (the original fed them as they are).
red_blue_swapped = True

meta_keys = (
    'img_id', 'name', 'img_path', 'label_paths', 'ori_shape', 'img_shape', 'scale_factor',
    'flip', 'flip_direction',
)  # fmt: skip
train_pipeline = [
    dict(type='LoadCellImage', red_blue_swapped=red_blue_swapped),
    dict(type='LoadLabelMaps'),
    # detectron2's ResizeShortestEdge(640..800, max 1333), Pillow's antialiased bilinear
    dict(
        type='RandomChoiceResize',
        scales=[(1333, 640), (1333, 672), (1333, 704), (1333, 736), (1333, 768), (1333, 800)],
        resize_type='Resize',
        keep_ratio=True,
        backend='pillow',
    ),
    dict(type='RandomFlip', prob=0.5),
    # keep_empty=False keeps an image that lost all its cells, as a negative sample
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1e-2, 1e-2), keep_empty=False),
    dict(type='PackCellInputs', meta_keys=meta_keys),
]
test_pipeline = [
    dict(type='LoadCellImage', red_blue_swapped=red_blue_swapped),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True, backend='pillow'),
    dict(type='PackDetInputs', meta_keys=meta_keys),
]
dataset = dict(
    type='CellDataset', data_root=data_root, folds_file=folds_file, metainfo=metainfo, fold=0
)
train_dataloader = dict(
    _delete_=True,  # MMDetection repeats an epoch-based data set; ours is drawn from forever
    batch_size=3,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='SeededInfiniteSampler', shuffle=True),
    dataset=dict(
        type='SeededDataset', dataset=dict(split='train', pipeline=train_pipeline, **dataset)
    ),
)
val_dataloader = dict(
    _delete_=True,  # no COCO file
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(split='val', pipeline=test_pipeline, test_mode=True, **dataset),
)
# tools/test.py scores the fold's own validation split; the ensemble tool turns it to split='test'
test_dataloader = dict(
    _delete_=True,
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(split='val', pipeline=test_pipeline, test_mode=True, **dataset),
)
max_per_img = 500  # the original's 100 lost most of a dense image
score_thr = 1e-3  # the original's
val_evaluator = dict(
    _delete_=True, type='CellMetric', n_bootstrap=0, max_per_img=max_per_img, score_thr=score_thr
)
test_evaluator = dict(
    _delete_=True, type='CellMetric', max_per_img=max_per_img, score_thr=score_thr
)

# --------------------------------------------------------------------------------- model
# MMSyncBN cannot be built without a process group; SyncBN falls back to BN on one device.
head_norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    # LSJ pads every training image to 1024 x 1024; this recipe does not crop to that size
    data_preprocessor=dict(batch_augments=None),
    # three images are too few for batch statistics in the backbone; its affine part is trained
    backbone=dict(norm_eval=True),
    # as MMDetection's, but mixed precision does not round boxes: bfloat16 moves them by 2 px
    rpn_head=dict(type='Fp32RPNHead'),
    roi_head=dict(
        bbox_roi_extractor=dict(type='Fp32RoIExtractor'),
        mask_roi_extractor=dict(type='Fp32RoIExtractor'),
        bbox_head=dict(num_classes=4, norm_cfg=head_norm_cfg),
        mask_head=dict(type='CellMaskHead', num_classes=4, norm_cfg=head_norm_cfg),
    ),
    train_cfg=dict(
        # detectron2's rule: each cell gets its best anchor. MMDetection's 0.3 leaves every cell
        # below 16 px without one; exactly 0 would let a cell that no anchor touches take them all.
        rpn=dict(assigner=dict(min_pos_iou=1e-4)),
        rcnn=dict(assigner=dict(match_low_quality=False)),  # as detectron2
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=2000, max_per_img=2000),
        rcnn=dict(score_thr=score_thr, max_per_img=max_per_img),
    ),
)
load_from = 'https://dl.fbaipublicfiles.com/detectron2/new_baselines/mask_rcnn_R_50_FPN_400ep_LSJ/42019571/model_final_14d201.pkl'

# ------------------------------------------------------------------------------ training
max_iters = 5000
val_interval = 250
train_cfg = dict(
    _delete_=True, type='IterBasedTrainLoop', max_iters=max_iters, val_interval=val_interval
)
optim_wrapper = dict(
    _delete_=True,  # Adam takes no momentum
    constructor='CellOptimWrapperConstructor',
    type='OptimWrapper',
    optimizer=dict(type='Adam', lr=1e-3, weight_decay=1e-4),
    # detectron2 names the FPN 'backbone.fpn_*', so the original's 0.1 for 'backbone' covers it
    paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.1), 'neck': dict(lr_mult=0.1)}),
)
# The product of the two follows detectron2's WarmupCosineLR within 2.7 %.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=500),
    dict(
        type='CosineAnnealingLR', eta_min_ratio=1e-4, by_epoch=False, begin=0, end=max_iters,
        T_max=max_iters,
    ),
]  # fmt: skip
auto_scale_lr = dict(base_batch_size=3, enable=False)
randomness = dict(seed=313551058)  # the original's number

# ------------------------------------------------------------------------------- runtime
default_hooks = dict(
    # False: scores are logged at their iteration, not all at step 0
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    checkpoint=dict(
        type='CheckpointHook',
        by_epoch=False,
        interval=val_interval,
        max_keep_ckpts=2,
        save_best='cell/segm_mAP_50',
        rule='greater',
    ),
    weights=dict(type='WeightsReportHook'),
    provenance=dict(type='ProvenanceHook'),
    step_seed=dict(type='StepSeedHook'),
    revalidate=dict(type='RevalidateOnResumeHook'),
    invalid_loss=dict(type='StopOnInvalidLossHook'),
    proposal_caps=dict(type='ProposalCapHook'),
)
log_processor = dict(by_epoch=False)

# The base recipe from random weights, where the COCO weights cannot be had.
# GroupNorm: batches of three are too small for batch statistics, and random weights have no
# statistics to freeze. Expect to need several times the iterations of the base recipe.
_base_ = './mask_rcnn_r50_lsj.py'

load_from = None
norm_cfg = dict(_delete_=True, type='GN', num_groups=32, requires_grad=True)
model = dict(
    backbone=dict(norm_cfg=norm_cfg, norm_eval=False),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
optim_wrapper = dict(
    optimizer=dict(lr=2e-4),
    paramwise_cfg=dict(_delete_=True),  # one rate: nothing is pretrained
    clip_grad=dict(max_norm=10.0),
)

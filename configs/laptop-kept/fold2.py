_base_ = '../_base_/mask_rcnn_laptop_kept.py'

train_dataloader = dict(dataset=dict(dataset=dict(fold=2)))
val_dataloader = dict(dataset=dict(fold=2))
test_dataloader = dict(dataset=dict(fold=2))

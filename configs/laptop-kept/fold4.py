_base_ = '../_base_/mask_rcnn_laptop_kept.py'

train_dataloader = dict(dataset=dict(dataset=dict(fold=4)))
val_dataloader = dict(dataset=dict(fold=4))
test_dataloader = dict(dataset=dict(fold=4))

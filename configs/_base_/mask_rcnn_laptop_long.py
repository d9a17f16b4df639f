# As far as the data allow on a CPU: the laptop recipe with a second, shorter cycle of the rate.
_base_ = './mask_rcnn_laptop.py'

warm_up, first_cycle, second_cycle = 50, 800, 400
max_iters = first_cycle + second_cycle
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=warm_up),
    dict(
        type='CosineRestartLR', periods=[first_cycle - warm_up, second_cycle],
        restart_weights=[1.0, 0.5], eta_min_ratio=0.01, by_epoch=False, begin=warm_up,
        end=max_iters,
    ),
]  # fmt: skip

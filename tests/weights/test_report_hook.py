"""weights.report_hook: what was loaded, what was not, and what changed afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

import cellseg_mm  # noqa: F401
from cellseg_mm.core.errors import CheckpointError, ConfigError
from cellseg_mm.weights.names import NEW_HEADS
from cellseg_mm.weights.report_hook import WeightsReportHook, check_preprocessing, report_loading
from tests.support.weights_files import build


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.bn = nn.BatchNorm2d(2)


class Tiny(BaseModel):
    """A model with a body and a class-wise head, trained on numbers."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.backbone = Body()
        self.roi_head = nn.Module()
        self.roi_head.bbox_head = nn.Module()
        self.roi_head.bbox_head.fc_cls = nn.Linear(2, n_classes)

    def forward(self, inputs: torch.Tensor, mode: str = 'tensor') -> dict | torch.Tensor:
        x = self.backbone.bn(self.backbone.conv(inputs)).mean((2, 3))
        scores = self.roi_head.bbox_head.fc_cls(x)
        return {'loss': scores.square().mean()} if mode == 'loss' else scores


def tiny_state(n_classes: int, seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn_like(v.float()) for name, v in Tiny(n_classes).state_dict().items()}


def test_report_sorts_every_tensor() -> None:
    model, state = Tiny(5), tiny_state(81)
    del state['backbone.conv.bias'], state['backbone.bn.num_batches_tracked']
    state['neck.weight'] = torch.zeros(2)
    report = report_loading(model, state)
    assert set(report.loaded) == {
        'backbone.conv.weight',
        *(f'backbone.bn.{p}' for p in ('weight', 'bias', 'running_mean', 'running_var')),
    }
    assert report.new == ('backbone.conv.bias',)
    assert report.unused == ('neck.weight',)
    assert report.mismatched == (
        ('roi_head.bbox_head.fc_cls.weight', (81, 2), (5, 2)),
        ('roi_head.bbox_head.fc_cls.bias', (81,), (5,)),
    )
    table = report.table()
    assert 'backbone' in table
    assert 'roi_head.bbox_head' in table
    row = next(line.split() for line in table.splitlines() if line.startswith('backbone'))
    assert row[1:] == ['5', '0.000', '1', '0.000']
    with pytest.raises(CheckpointError) as caught:
        report.check(where='f.pth')
    for part in (
        'f.pth: 2 tensors have another shape',
        'fc_cls.bias is (81,) in the file and (5,) in the model',
        '1 tensors are not in the file (backbone.conv.bias)',
        '1 tensors are in the file only (neck.weight)',
    ):
        assert part in str(caught.value)
    with pytest.raises(CheckpointError, match=r'conv\.bias') as caught:
        report.check(allow_new=NEW_HEADS, allow_unused=[r'neck\..*'], where='f.pth')
    assert 'fc_cls' not in str(caught.value)
    report.check(
        allow_new=[*NEW_HEADS, r'backbone\.conv\.bias'], allow_unused=[r'neck\..*'], where='f'
    )


def test_absent_counters_are_not_called_new() -> None:
    state = tiny_state(5)
    del state['backbone.bn.num_batches_tracked']
    report = report_loading(Tiny(5), state)
    report.check(where='f')
    assert len(report.loaded) == 9 - 1  # 2 of the convolution, 5 of the norm, 2 of the head


class RestoreBias(WeightsReportHook):
    """Plays the hook that undoes a load."""

    priority = 'LOW'

    def before_train(self, runner: Runner) -> None:
        nn.init.zeros_(runner.model.backbone.conv.bias)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        pass


def make_runner(
    folder: Path, load_from: Path, *, hooks: list, n_classes: int = 5, **options: object
) -> Runner:
    data = {
        'dataset': [torch.ones(1, 2, 2) * i for i in range(4)],
        'sampler': {'type': 'DefaultSampler', 'shuffle': False},
        'batch_size': 2,
        'collate_fn': lambda items: {'inputs': torch.stack(items)},
    }
    return Runner(
        model=Tiny(n_classes),
        work_dir=str(folder / 'work'),
        train_dataloader=data,
        train_cfg={'by_epoch': True, 'max_epochs': options.pop('epochs', 1)},
        optim_wrapper={'optimizer': {'type': 'SGD', 'lr': 0.1}},
        default_hooks={'checkpoint': {'type': 'CheckpointHook', 'interval': 1}},
        custom_hooks=hooks,
        load_from=str(load_from),
        log_level='INFO',
        experiment_name=f'{folder.name}-{len(list(folder.rglob("*")))}',
        **options,
    )


def logged(runner: Runner) -> str:
    return '\n'.join(path.read_text() for path in Path(runner.work_dir).rglob('*.log'))


def test_hook_reports_then_training_and_resuming_go_on(tmp_path: Path) -> None:
    path = tmp_path / 'start.pth'
    torch.save({'state_dict': tiny_state(81)}, path)
    runner = make_runner(tmp_path, path, hooks=[WeightsReportHook()])
    runner.train()
    text = logged(runner)
    assert text.count(f'Weights of {path}') == 1
    assert 'new: roi_head.bbox_head.fc_cls.weight, roi_head.bbox_head.fc_cls.bias' in text
    resumed = make_runner(
        tmp_path, tmp_path / 'work/epoch_1.pth', hooks=[WeightsReportHook()], resume=True, epochs=2
    )
    resumed.train()
    assert resumed.epoch == 2


def test_hook_stops_what_mmengine_would_only_warn_about(tmp_path: Path) -> None:
    path = tmp_path / 'start.pth'
    state = tiny_state(5)
    state['backbone.conv.weight'] = torch.zeros(2, 3, 1, 1)
    torch.save({'state_dict': state}, path)
    runner = make_runner(tmp_path, path, hooks=[WeightsReportHook()])
    with pytest.raises(CheckpointError, match=r'conv.weight is \(2, 3, 1, 1\) in the file'):
        runner.train()


def test_hook_allows_no_new_heads_when_resuming(tmp_path: Path) -> None:
    path = tmp_path / 'start.pth'
    torch.save({'state_dict': tiny_state(81), 'meta': {'epoch': 0, 'iter': 0}}, path)
    runner = make_runner(tmp_path, path, hooks=[WeightsReportHook()], resume=True)
    with pytest.raises(CheckpointError, match=r'fc_cls\.bias is'):
        runner.train()


def test_hook_notices_values_changed_after_loading(tmp_path: Path) -> None:
    path = tmp_path / 'start.pth'
    torch.save({'state_dict': tiny_state(5)}, path)
    runner = make_runner(tmp_path, path, hooks=[RestoreBias(), WeightsReportHook()])
    with pytest.raises(CheckpointError, match=r'1 tensors differ .*backbone\.conv\.bias'):
        runner.train()


def test_preprocessing_that_differs_is_refused() -> None:
    model = build(n_classes=1)
    origin = {
        'preprocessing': {
            'channel_order': 'BGR',
            'mean': [103.53, 116.28, 123.675],
            'std': [1.0, 1.0, 1.0],
            'backbone_style': 'caffe',
        }
    }
    check_preprocessing(model, origin, where='f')
    model.backbone.style = 'pytorch'
    with pytest.raises(ConfigError, match=r'backbone_style pytorch; the weights .* caffe'):
        check_preprocessing(model, origin, where='f')
    model.backbone.style = 'caffe'
    model.data_preprocessor.mean = model.data_preprocessor.mean.flip(0)
    with pytest.raises(ConfigError, match=r'mean \[123.675, 116.28, 103.53\]'):
        check_preprocessing(model, origin, where='f')

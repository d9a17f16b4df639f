"""optim: every parameter in one group, keys that miss are refused, settings as mmengine's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.mm


class Toy(nn.Module):
    """Names like a detector's, with a norm and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.neck = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)


def constructor(keys: dict, kind: str = 'cell', **paramwise):
    from mmengine.optim import DefaultOptimWrapperConstructor

    from cellseg_mm.training.optim import CellOptimWrapperConstructor

    cls = {'cell': CellOptimWrapperConstructor, 'stock': DefaultOptimWrapperConstructor}[kind]
    settings = {
        'type': 'OptimWrapper',
        'optimizer': {'type': 'Adam', 'lr': 1e-3, 'weight_decay': 1e-4},
    }
    return cls(settings, {'custom_keys': keys, **paramwise})


KEYS = {'backbone': {'lr_mult': 0.1}, 'neck': {'lr_mult': 0.1}, 'backbone.1': {'decay_mult': 0.0}}


def settings_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple]:
    names = {id(p): name for name, p in model.named_parameters()}
    found = [
        (names[id(p)], (group['lr'], group['weight_decay']))
        for group in optimizer.param_groups
        for p in group['params']
    ]
    assert len(found) == len({name for name, _ in found}), 'a parameter is in two groups'
    return dict(found)


@pytest.mark.parametrize('paramwise', [{}, {'norm_decay_mult': 0.0, 'bias_lr_mult': 2.0}])
def test_settings_equal_mmengines_constructor(paramwise: dict) -> None:
    model = Toy()
    ours = settings_by_name(model, constructor(KEYS, **paramwise)(model).optimizer)
    stock = settings_by_name(model, constructor(KEYS, 'stock', **paramwise)(model).optimizer)
    assert ours == stock
    assert set(ours) == {name for name, _ in model.named_parameters()}


def test_golden_table() -> None:
    got = settings_by_name(model := Toy(), constructor(KEYS)(model).optimizer)
    assert got == {
        'backbone.0.weight': (1e-4, 1e-4),
        'backbone.0.bias': (1e-4, 1e-4),
        'backbone.1.weight': (1e-3, 0.0),  # the longest key wins, and has no lr_mult
        'backbone.1.bias': (1e-3, 0.0),
        'neck.weight': (1e-4, 1e-4),
        'neck.bias': (1e-4, 1e-4),
        'head.weight': (1e-3, 1e-4),
        'head.bias': (1e-3, 1e-4),
    }


def test_groups_are_merged_and_shown() -> None:
    from cellseg_mm.training.optim import group_table

    optimizer = constructor(KEYS)(Toy()).optimizer
    assert [g['pattern'] for g in optimizer.param_groups] == [
        'backbone', 'backbone.1', 'neck', '(all others)',
    ]  # fmt: skip
    lines = group_table(optimizer.param_groups).splitlines()
    # 3 * 4 * 9 weights + 4 biases = 112
    assert lines[2].split() == ['backbone', '2', '112', '0.0001', '0.0001']


@pytest.mark.parametrize('key', ['backbon3', 'roi_head'])
def test_key_that_matches_nothing_is_refused(key: str) -> None:
    from cellseg_mm.core.errors import ConfigError

    with pytest.raises(ConfigError, match=key):
        constructor({**KEYS, key: {'lr_mult': 0.5}})(Toy())


def test_key_that_is_always_overruled_is_refused() -> None:
    from cellseg_mm.core.errors import ConfigError

    with pytest.raises(ConfigError, match="'nec'"):
        constructor({'nec': {'lr_mult': 0.5}, 'neck': {'lr_mult': 0.1}})(Toy())

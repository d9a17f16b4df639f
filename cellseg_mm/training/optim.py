"""Parameter groups that can be read, and learning-rate keys that cannot miss.

In: a model and mmengine's ``paramwise_cfg``. Out: an optimizer with one group per rule instead of
one per tensor, and a table of the groups in the log. Invariant: every trainable parameter is in
exactly one group, and every key of ``custom_keys`` matches at least one parameter.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from mmdet.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.logging import MMLogger, print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.text_table import text_table

REST = '(all others)'


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class CellOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's rules for learning rates and weight decay, checked, merged and logged.

    Raises:
        ConfigError: A key of ``paramwise_cfg.custom_keys`` matches no parameter.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper and log its groups."""
        plain = model.module if hasattr(model, 'module') else model
        self._refuse_unmatched_keys(plain)
        wrapper = super().__call__(model)
        print_log(group_table(wrapper.optimizer.param_groups), logger='current')
        return wrapper

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = '', **kwargs: object
    ) -> None:
        """Add ``module``'s parameters; at the root, merge groups that share all settings."""
        if prefix:
            super().add_params(params, module, prefix=prefix, **kwargs)
            return
        with _one_line_per_parameter_silenced():
            super().add_params(params, module, prefix=prefix, **kwargs)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        params[:] = self._merged(params, names)

    def _merged(self, params: list[dict], names: dict[int, str]) -> list[dict]:
        # One group per tensor would cost Adam its fused loop over tensors.
        merged: dict[tuple, dict] = {}
        for group in params:
            (parameter,) = group['params']
            pattern = self._pattern(names[id(parameter)])
            settings = {k: v for k, v in group.items() if k != 'params'}
            key = (pattern, *sorted((k, repr(v)) for k, v in settings.items()))
            merged.setdefault(key, {'params': [], 'pattern': pattern, **settings})
            merged[key]['params'].append(parameter)
        return list(merged.values())

    def _keys(self) -> list[str]:
        # mmengine's order: the longest matching key wins, ties alphabetically.
        return sorted(sorted(self.paramwise_cfg.get('custom_keys', {})), key=len, reverse=True)

    def _pattern(self, name: str) -> str:
        return next((key for key in self._keys() if key in name), REST)

    def _refuse_unmatched_keys(self, model: nn.Module) -> None:
        used = {self._pattern(name) for name, _ in model.named_parameters()}
        unused = [key for key in self._keys() if key not in used]
        if unused:
            raise ConfigError(
                f'optim_wrapper.paramwise_cfg.custom_keys: {unused} decide no parameter; every key '
                'must be part of a parameter name that no longer key matches; the names of this '
                f'model begin with {sorted({n.split(".")[0] for n, _ in model.named_parameters()})}'
            )


@contextmanager
def _one_line_per_parameter_silenced() -> Iterator[None]:
    """Hide mmengine's 'paramwise_options' line per tensor; the table replaces them."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)


def group_table(groups: list[dict]) -> str:
    """Return one line per parameter group: pattern, tensors, parameters, lr, weight decay."""
    head = ('pattern', 'tensors', 'parameters', 'lr', 'weight decay')
    rows = [
        (
            str(group.get('pattern', REST)),
            str(len(group['params'])),
            f'{sum(p.numel() for p in group["params"]):,}',
            f'{group.get("initial_lr", group["lr"]):.3g}',
            f'{group.get("weight_decay", 0):.3g}',
        )
        for group in groups
    ]
    return 'Parameter groups:\n' + textwrap.indent(text_table(head, rows), '  ')

"""Saying which weights came from a file, and refusing to start when any was passed over.

In: a model and the checkpoint about to be loaded into it. Out: one table in the log, or an error.
Invariant: what mmengine would skip with a warning is an error here unless it was announced.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop
from torch import Tensor, nn

from cellseg_mm.core.errors import CheckpointError, ConfigError
from cellseg_mm.core.text_table import text_table
from cellseg_mm.weights.names import COUNTER, NEW_HEADS


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading a file into a model does, tensor by tensor.

    Attributes:
        loaded: Names in both with equal shapes.
        new: Names of the model that the file lacks; they keep their initialisation.
        unused: Names of the file that the model lacks.
        mismatched: Name, shape in the file, shape in the model; they keep their initialisation.
        n_params: Elements per name of the model.
    """

    loaded: tuple[str, ...]
    new: tuple[str, ...]
    unused: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    n_params: Mapping[str, int] = field(repr=False)

    def table(self) -> str:
        """Return one row per part of the model: tensors and millions of numbers, file and new."""
        kept = (*self.new, *(name for name, _, _ in self.mismatched))
        parts: dict[str, list[float]] = {}
        for column, names in ((0, self.loaded), (2, kept)):
            for name in names:
                row = parts.setdefault(_part_of(name), [0, 0, 0, 0])
                row[column] += 1
                row[column + 1] += self.n_params[name] / 1e6
        cells = [
            [part, str(n_file), f'{m_file:.3f}', str(n_new), f'{m_new:.3f}']
            for part, (n_file, m_file, n_new, m_new) in parts.items()
        ]
        head = ['part', 'tensors from file', 'millions', 'new tensors', 'millions']
        lines = [text_table(head, cells)]
        if kept:
            lines.append(f'new: {_shorten(kept)}')
        if self.unused:
            lines.append(f'in the file, not in the model: {_shorten(self.unused)}')
        return '\n'.join(lines)

    def check(
        self, *, allow_new: Sequence[str] = (), allow_unused: Sequence[str] = (), where: str
    ) -> None:
        """Refuse what was not announced.

        Args:
            allow_new: Patterns (whole names) of tensors that may be new or of another shape.
            allow_unused: Patterns of tensors of the file that the model may lack.
            where: What to call the file.

        Raises:
            CheckpointError: A tensor would be passed over, named with its shapes.
        """
        problems = []
        shapes = [
            f'{name} is {in_file} in the file and {in_model} in the model'
            for name, in_file, in_model in self.mismatched
            if not _matches(name, allow_new)
        ]
        new = [name for name in self.new if not _matches(name, allow_new)]
        unused = [name for name in self.unused if not _matches(name, allow_unused)]
        for what, names in (
            ('have another shape', shapes),
            ('are not in the file', new),
            ('are in the file only', unused),
        ):
            if names:
                problems.append(f'{len(names)} tensors {what} ({_shorten(names)})')
        if problems:
            raise CheckpointError(
                f'{where}: {"; ".join(problems)}; every tensor was expected to fit; load weights of'
                ' this architecture, or allow the names in WeightsReportHook(allow_new=...,'
                ' allow_unused=...)'
            )


def report_loading(model: nn.Module, state_dict: Mapping[str, Tensor]) -> LoadReport:
    """Compare a file with a model before it is loaded. Absent batch counters do not count."""
    model = model.module if is_model_wrapper(model) else model
    own = model.state_dict()
    fits = {
        name: name in own and value.shape == own[name].shape for name, value in state_dict.items()
    }
    return LoadReport(
        loaded=tuple(name for name in own if fits.get(name)),
        new=tuple(n for n in own if n not in state_dict and not n.endswith(COUNTER)),
        unused=tuple(name for name in state_dict if name not in own),
        mismatched=tuple(
            (name, tuple(value.shape), tuple(own[name].shape))
            for name, value in state_dict.items()
            if name in own and not fits[name]
        ),
        n_params={name: value.numel() for name, value in own.items()},
    )


def check_preprocessing(model: nn.Module, origin: Mapping[str, object], *, where: str) -> None:
    """Refuse a model whose normalisation or backbone style is not what its weights need.

    No tensor shape shows this mistake; it cost 4 AP in MMDetection's issue 9111.

    Raises:
        ConfigError: Names the setting, what it is and what the weights need.
    """
    model = model.module if is_model_wrapper(model) else model
    needed = origin['preprocessing']
    found = {
        'mean': getattr(model.data_preprocessor, 'mean', None),
        'std': getattr(model.data_preprocessor, 'std', None),
    }
    found = {
        key: None if value is None else [round(float(x), 3) for x in value.flatten()]
        for key, value in found.items()
    }
    found['backbone_style'] = getattr(model.backbone, 'style', None)
    for key, value in found.items():
        if value != needed[key]:
            raise ConfigError(
                f'{where}: model has {key} {value}; the weights were trained with {needed[key]} '
                f'({needed["channel_order"]} input); set model.data_preprocessor and '
                'model.backbone.style accordingly, or WeightsReportHook(check_preprocessing=False)'
            )


@HOOKS.register_module()
class WeightsReportHook(Hook):
    """Log once which weights come from the file, and refuse to start if any is passed over.

    Before a file is loaded, names, shapes and preprocessing are compared; when training begins,
    the values in the model are compared with the file's. When resuming or testing nothing may be
    new, whatever ``allow_new`` says.

    Args:
        allow_new: Patterns of the model's tensors that may start anew.
        allow_unused: Patterns of the file's tensors that the model may lack.
        check_preprocessing: Compare mean, std and backbone style for converted files.
    """

    # After EMAHook, which exchanges the tensors of a checkpoint in place.
    priority = 'VERY_LOW'

    def __init__(
        self,
        *,
        allow_new: Sequence[str] = NEW_HEADS,
        allow_unused: Sequence[str] = (),
        check_preprocessing: bool = True,
    ) -> None:
        self.allow_new = tuple(allow_new)
        self.allow_unused = tuple(allow_unused)
        self.check_preprocessing = check_preprocessing
        self._expected: dict[str, Tensor] = {}

    def after_load_checkpoint(self, runner: object, checkpoint: dict) -> None:
        """Compare the file with the model; mmengine calls this before it copies the tensors."""
        state = checkpoint.get('state_dict', checkpoint)
        state = {re.sub(r'^module\.', '', name): value for name, value in state.items()}
        where = str(getattr(runner, '_load_from', None) or 'checkpoint')
        report = report_loading(runner.model, state)
        fine_tunes = isinstance(runner._train_loop, BaseLoop) and not runner._resume
        report.check(
            allow_new=self.allow_new if fine_tunes else (),
            allow_unused=self.allow_unused,
            where=where,
        )
        origin = checkpoint.get('meta', {}).get('cellseg_weights')
        if origin and self.check_preprocessing:
            check_preprocessing(runner.model, origin, where=where)
        runner.logger.info(f'Weights of {where}:\n{report.table()}')
        self._expected = {name: state[name] for name in report.loaded}

    def before_train(self, runner: object) -> None:
        """Check that the model holds the file's values, then let the file go.

        Raises:
            CheckpointError: A tensor of the model differs from the file.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not self._expected:
            parts = [f'{name} starts from {file}' for name, file in pretrained_parts(model).items()]
            parts.append(f'all{" others" if parts else ""} start from the initialisation.')
            runner.logger.info(f'Weights: no file was loaded; {"; ".join(parts)}')
        own = model.state_dict()
        wrong = [
            name
            for name, value in self._expected.items()
            if not torch.equal(own[name].cpu(), value.to('cpu', own[name].dtype))
        ]
        self._expected = {}
        if wrong:
            raise CheckpointError(
                f'{len(wrong)} tensors differ from the file they were loaded from '
                f'({_shorten(wrong)}); equal values were expected; a hook or init_cfg that runs '
                'after loading changes them: remove it'
            )


def pretrained_parts(model: nn.Module) -> dict[str, str]:
    """Return the file of each part that fills itself from one, by the part's name."""
    inits = {name: getattr(part, 'init_cfg', None) for name, part in model.named_modules()}
    return {
        name: str(init['checkpoint'])
        for name, init in inits.items()
        if isinstance(init, Mapping) and init.get('type') == 'Pretrained'
    }


def _part_of(name: str) -> str:
    depth = 2 if name.startswith('roi_head.') else 1
    return '.'.join(name.split('.')[:depth])


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _shorten(names: Sequence[str], limit: int = 6) -> str:
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more

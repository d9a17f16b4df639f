"""What is wrong with a setting, and where settings are read.

In: a config. Out: :class:`Fault` records. Invariant: nothing is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# What Runner, MMDetection's tools or our own read. Any other name in a config is a variable that
# was used while the file was read: to change it afterwards changes nothing.
READ_KEYS = {
    *('model', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'optim_wrapper'),
    *('param_scheduler', 'val_evaluator', 'test_evaluator', 'data_preprocessor', 'runner_type'),
    *('work_dir', 'load_from', 'resume', 'launcher', 'env_cfg', 'log_level', 'visualizer'),
    *('default_scope', 'randomness', 'experiment_name', 'custom_hooks', 'cfg'),
    *('default_hooks', 'model_wrapper_cfg', 'sync_bn', 'find_unused_parameters', 'compile'),
    *('efficient_conv_bn_eval', 'activation_checkpointing', 'auto_scale_lr', 'log_processor'),
    *('train_cfg', 'val_cfg', 'test_cfg', 'tta_model', 'tta_pipeline', 'um_per_px'),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """A setting that does not do what it seems to.

    Attributes:
        is_error: Whether it is surely wrong; else it is odd, and worth a warning.
        text: Where: what was found; what was expected; what to do.
    """

    is_error: bool
    text: str


def nodes_of(node: object, path: str = '') -> Iterator[tuple[str, dict]]:
    """Yield every dict of a config with its dotted path, as ``--cfg-options`` takes it."""
    if isinstance(node, dict):
        yield path, node
    if isinstance(node, dict | list | tuple):
        pairs = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in pairs:
            yield from nodes_of(value, f'{path}.{key}' if path else str(key))


def places_of(content: dict, name: str) -> Iterator[tuple[str, object]]:
    """Yield the dotted path and the value of everything called ``name`` that something reads."""
    for path, node in nodes_of({key: content[key] for key in content if key in READ_KEYS}):
        if path and name in node:
            yield f'{path}.{name}', node[name]

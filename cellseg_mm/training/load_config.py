"""What every tool does before it calls the library: read a config, adapt it to the machine.

In: a config's path and changes to it. Out: a config that is ready for a Runner, or one sentence.
Invariant: what MMDetection's own tools accept means the same here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.dist import init_dist, is_distributed
from mmengine.logging import print_log
from mmengine.utils.dl_utils import set_multi_processing

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.layout import work_dir_of
from cellseg_mm.training.config_faults import refuse_faults
from cellseg_mm.training.faults import READ_KEYS, places_of


def load_config(
    path: Path | str,
    *,
    cfg_options: Mapping[str, object] | None = None,
    work_dir: Path | str | None = None,
    launcher: str = 'none',
    local_rank: int = 0,
) -> Config:
    """Read a config and make it ready for a Runner on this machine.

    Args:
        path: Config file.
        cfg_options: Settings to change, by their dotted path.
        work_dir: ``None`` for the config's own, or the one that is named after it.
        launcher: What has started this process, see ``mmengine.dist.init_dist``.
        local_rank: Number of this process on its machine, where ``LOCAL_RANK`` does not say it.

    Raises:
        ConfigError: No such file, or settings that nothing would read or that contradict each
            other, see ``config_faults``.
    """
    if not Path(path).is_file():
        raise ConfigError(f'{path}: no such config file; see configs/ for those there are')
    os.environ.setdefault('LOCAL_RANK', str(local_rank))
    cfg = Config.fromfile(path)
    if cfg_options:
        refuse_unknown_keys(cfg, cfg_options)
        cfg.merge_from_dict(dict(cfg_options))
    refuse_faults(cfg, path)
    cfg.launcher = launcher
    cfg.work_dir = str(work_dir or cfg.get('work_dir') or work_dir_of(path))
    adapt_to_machine(cfg)
    return cfg


def refuse_unknown_keys(cfg: Config, options: Mapping[str, object]) -> None:
    """Raise ConfigError for an option whose top-level key nothing reads."""
    unread = sorted({key.split('.')[0] for key in options} - READ_KEYS)
    unknown = [key for key in unread if key not in cfg]
    if unknown:
        raise ConfigError(
            f'--cfg-options: {unknown} are not in the config and nothing reads them; '
            'correct the spelling: settings are named as in the config and its bases, key.sub=value'
        )
    if unread:
        raise ConfigError(
            f'--cfg-options: {", ".join(unread)}: a variable that the config used while it was '
            f'read, so that changing it now has no effect; {_instead(cfg, unread)}'
        )


def _instead(cfg: Config, names: list[str]) -> str:
    """Say where the values of a config's variables have gone."""
    if {'data_root', 'folds_file'} & set(names):
        return 'set the environment variables CELLSEG_DATA and CELLSEG_FOLDS instead'
    content = cfg.to_dict()
    places = sorted(path for name in names for path, _ in places_of(content, name))
    named = f'set {", ".join(places)} instead, or ' if places else ''
    return f'{named}change it in a config file'


def adapt_to_machine(cfg: Config) -> None:
    """Make a config written for CUDA run on a CPU, and say what was changed."""
    import torch

    for loader in _loaders(cfg):
        if not loader.get('num_workers', 0):  # torch refuses both without workers
            loader.pop('persistent_workers', None)
            loader.pop('prefetch_factor', None)
    if torch.cuda.is_available():
        _join_processes(cfg)
        return
    for loader in _loaders(cfg):
        loader.pop('pin_memory', None)
    if cfg.get('launcher', 'none') == 'none':
        return
    n_changed = sum(_sync_bn_to_bn(part) for part in (cfg.model, cfg.get('tta_model')) if part)
    cfg.setdefault('env_cfg', ConfigDict()).setdefault('dist_cfg', ConfigDict())
    cfg.env_cfg.dist_cfg.backend = 'gloo'
    # MMDetection would hand the CPU model a CUDA device number
    wrapper = {'type': 'MMDistributedDataParallel', 'device_ids': None, 'broadcast_buffers': False}
    cfg.setdefault('model_wrapper_cfg', ConfigDict(wrapper))
    _start_gloo()
    print_log(f'No CUDA device: gloo backend, {n_changed} SyncBN settings changed to BN', 'current')


def _join_processes(cfg: Config) -> None:
    """Join the other processes as the Runner will, but before any file is written.

    Until then each of them would take itself for the first, verify the data and write the folds.
    """
    if cfg.get('launcher', 'none') == 'none' or is_distributed():
        return
    settings = cfg.get('env_cfg') or {}
    set_multi_processing(**settings.get('mp_cfg', {}), distributed=True)
    init_dist(cfg.launcher, **settings.get('dist_cfg', {'backend': 'nccl'}))


def _loaders(cfg: Config) -> Iterator[ConfigDict]:
    yield from (
        cfg[f'{name}_dataloader']
        for name in ('train', 'val', 'test')
        if cfg.get(f'{name}_dataloader')
    )


def _start_gloo() -> None:
    # mmengine's init_dist calls torch.cuda.set_device; a group that already runs is left alone.
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group('gloo')


def _sync_bn_to_bn(node: object) -> int:
    """SyncBN has no CPU kernel; with one process per CPU plain BN is what runs anyway."""
    if isinstance(node, dict):
        changed = int(node.get('type') == 'SyncBN')
        if changed:
            node['type'] = 'BN'
        return changed + sum(_sync_bn_to_bn(value) for value in node.values())
    if isinstance(node, (list, tuple)):
        return sum(_sync_bn_to_bn(value) for value in node)
    return 0

"""What every tool does before it calls the library: read a config, adapt it to the machine.

In: command-line words. Out: a config that is ready for a Runner, and errors as one sentence.
Invariant: what MMDetection's own tools accept means the same here.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.dist import init_dist, is_distributed
from mmengine.logging import print_log
from mmengine.utils.dl_utils import set_multi_processing

from cellseg_mm.core import worker_watch
from cellseg_mm.core.errors import CellSegError, ConfigError

# What Runner, MMDetection's tools or our own read. Any other name in a config is a variable that
# was used while the file was read: to change it afterwards changes nothing.
READ_KEYS = {
    *('model', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'optim_wrapper'),
    *('param_scheduler', 'val_evaluator', 'test_evaluator', 'data_preprocessor', 'runner_type'),
    *('work_dir', 'load_from', 'resume', 'launcher', 'env_cfg', 'log_level', 'visualizer'),
    *('default_scope', 'randomness', 'experiment_name', 'custom_hooks', 'cfg'),
    *('default_hooks', 'model_wrapper_cfg', 'sync_bn', 'find_unused_parameters', 'compile'),
    *('efficient_conv_bn_eval', 'activation_checkpointing', 'auto_scale_lr', 'log_processor'),
    *('train_cfg', 'val_cfg', 'test_cfg', 'tta_model', 'tta_pipeline'),
}


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that MMDetection's train and test tools share."""
    parser.add_argument('--work-dir', help='folder for logs, checkpoints and results')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override settings, key=value; lists as key="[a,b]" or key=a,b without spaces',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher',
    )
    # torch.distributed.launch passes it; torchrun sets LOCAL_RANK itself
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def same_run(words: Sequence[str]) -> str:
    """Return what of a command line another tool needs in order to look at the same run.

    Args:
        words: A command line with the options of :func:`add_config_arguments`.

    Returns:
        ``--work-dir`` and ``--cfg-options`` with their values, after a space; '' without any.
    """
    kept: list[str] = []
    is_wanted = False
    for word in words:
        if word.startswith('--'):
            is_wanted = word.split('=')[0] in ('--work-dir', '--cfg-options')
        kept += [word] * is_wanted
    return f' {shlex.join(kept)}' if kept else ''


def default_work_dir(config_path: str | Path) -> Path:
    """Return ``work_dirs/<path below configs, without suffix>``.

    MMDetection takes the file's name alone; ``configs/fold0.py`` and ``configs/strong/fold0.py``
    would then write into the same folder.
    """
    parts = Path(config_path).resolve().with_suffix('').parts
    last = len(parts) - 1 - parts[::-1].index('configs') if 'configs' in parts else len(parts) - 2
    return Path('work_dirs', *parts[last + 1 :])


def load_config(args: argparse.Namespace) -> Config:
    """Read ``args.config`` with the shared options applied.

    Raises:
        ConfigError: No such file, or a ``--cfg-options`` key that nothing would read.
    """
    if not Path(args.config).is_file():
        raise ConfigError(f'{args.config}: no such config file; see configs/ for those there are')
    if 'LOCAL_RANK' not in os.environ:
        os.environ['LOCAL_RANK'] = str(args.local_rank)
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        refuse_unknown_keys(cfg, args.cfg_options)
        cfg.merge_from_dict(args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = str(args.work_dir or cfg.get('work_dir') or default_work_dir(args.config))
    adapt_to_machine(cfg)
    return cfg


def refuse_unknown_keys(cfg: Config, options: dict) -> None:
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
    read = {key: value for key, value in cfg.to_dict().items() if key in READ_KEYS}
    places = sorted(path for name in names for path in _places(read, name))
    named = f'set {", ".join(places)} instead, or ' if places else ''
    return f'{named}change it in a config file'


def _places(node: object, name: str, path: str = '') -> Iterator[str]:
    """Yield the dotted path of everything called ``name``."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in pairs:
        here = f'{path}.{key}' if path else str(key)
        if key == name:
            yield here
        elif isinstance(value, (dict, list, tuple)):
            yield from _places(value, name, here)


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


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what led to it, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def root_error(error: BaseException) -> CellSegError | None:
    """Return the innermost CellSegError; mmengine's registries wrap what a constructor raises."""
    return next((e for e in reversed(list(causes(error))) if isinstance(e, CellSegError)), None)


# What a machine, not the code, is to blame for.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)
OUT_OF_MEMORY = (
    'the device ran out of memory ({reason}); expected the model and a batch to fit; when training '
    'lower train_dataloader.batch_size (and the learning rate with it) or the image size, or add '
    '--amp; when testing lower model.test_cfg.rpn.max_per_img, or cut large images into tiles with '
    'tools/predict.py --tile'
)


def explain(error: BaseException) -> str | None:
    """Return one sentence for an error that a user can do something about, else None."""
    known = root_error(error)
    if known is not None:
        return _without_worker_traceback(str(known))
    for one in causes(error):
        if type(one).__name__ == 'OutOfMemoryError':  # torch's; torch may not be imported
            return OUT_OF_MEMORY.format(reason=str(one).split('. ')[0][:200])
        if isinstance(one, RuntimeError) and 'DefaultCPUAllocator' in str(one):
            return OUT_OF_MEMORY.format(reason=str(one).split('DefaultCPUAllocator: ')[-1][:200])
        misspelt = _misspelt_option(one, sys.argv)
        if misspelt is not None:
            return misspelt
        death = worker_watch.explain_death(str(one)) if isinstance(one, RuntimeError) else None
        if death is not None:
            return death
        if isinstance(one, OSError) and one.errno in DISK_ERRORS:
            where = one.filename or 'a result file'
            return (
                f'{where}: cannot be written or read ({one.strerror}); expected a folder with room '
                'and permission; make room, or name another with --work-dir or --out; the same '
                'command goes on from the last whole file (tools/train.py with --resume)'
            )
    return None


def _misspelt_option(error: BaseException, words: Sequence[str]) -> str | None:
    """Return one sentence for a ``--cfg-options`` key that a constructor did not know."""
    pattern = r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'"
    found = re.search(pattern, str(error)) if isinstance(error, TypeError) else None
    for word in words if found else ():
        key = word.split('=')[0]
        if '=' in word and key.split('.')[-1] == found[2]:
            return (
                f'--cfg-options: {key}: {found[1]} has no setting {found[2]!r}; expected one of '
                "those in its documentation and in the config; correct the key's spelling"
            )
    return None


def _without_worker_traceback(text: str) -> str:
    """Return the sentence of an error that torch brought from a worker with its traceback."""
    if not re.search(r'Caught \w+ in DataLoader worker', text):
        return text
    return re.split(r'\ncellseg_mm\.core\.errors\.\w+: ', text)[-1].strip()


def run_tool(
    main: Callable[[], int | None], *, go_on: str = 'start the same command again to go on'
) -> None:
    """Run a tool's ``main`` and exit: 0 or its number, 2 with one sentence for a user's error.

    Args:
        main: What the tool does.
        go_on: What to type after Ctrl-C.
    """
    try:
        code = main()
    except KeyboardInterrupt:
        print(f'interrupted; {go_on}', file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        print(f'error: {sentence}', file=sys.stderr)
        sys.exit(2)
    sys.exit(code or 0)

"""Marks of a training in its work folder: begun, finished, by which recipe.

In: a config. Out: started.json and finished.json. Invariant: a mark tells whose result it is.
"""

from __future__ import annotations

import json
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import print_log

from cellseg_mm.core import files
from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.layout import FINISHED, STARTED
from cellseg_mm.data.config import DataSettings
from cellseg_mm.data.folds import load_folds

MARK_VERSION = 2

# What decides the weights. Where things are, launcher, loading and logging do not.
RECIPE_KEYS = (
    *('model', 'train_dataloader', 'optim_wrapper', 'param_scheduler', 'train_cfg'),
    *('randomness', 'custom_hooks'),
)

NOT_RECIPE_KEYS = {
    *('data_root', 'folds_file', 'num_workers', 'persistent_workers', 'pin_memory'),
    *('prefetch_factor', 'timeout'),
}


def recipe_hash(cfg: Config) -> str:
    """Return 16 hex digits over the settings that decide the weights.

    The same for a config as it is read and as ``load_config`` adapts it to a machine.
    """
    parts = {**_recipe(cfg), 'load_from': Path(cfg.get('load_from') or '').name}
    return files.text_hash(json.dumps(parts, sort_keys=True, default=str))


def recipe_parts(cfg: Config) -> dict[str, str]:
    """Return a hash of each of the settings that decide the weights, to name what differs."""
    return {
        key: files.text_hash(json.dumps(part, sort_keys=True, default=str))
        for key, part in _recipe(cfg).items()
    }


def _recipe(cfg: Config) -> dict:
    settings = cfg.to_dict()
    parts = {key: _recipe_part(settings.get(key)) for key in RECIPE_KEYS}
    parts['model'] = {k: v for k, v in (parts['model'] or {}).items() if k != 'test_cfg'}
    return parts


def _recipe_part(node: object) -> object:
    if isinstance(node, dict):
        kept = {k: _recipe_part(v) for k, v in node.items() if k not in NOT_RECIPE_KEYS}
        if kept.get('type') == 'SyncBN':  # what load_config makes of it where there is no kernel
            kept['type'] = 'BN'
        return kept
    return [_recipe_part(v) for v in node] if isinstance(node, (list, tuple)) else node


def fold_hash_of(cfg: Config) -> str:
    """Return the hash of the folds in force, '' if there are none yet."""
    path = DataSettings.from_config(cfg).folds_path
    return load_folds(path).hash if path.is_file() else ''


def refuse_changed_settings(path: Path, state: dict) -> None:
    """Raise ConfigError where training would not go on as it began; only its length may differ.

    A checkpoint brings the optimizer's rates and the schedule along: other ones would be ignored.
    """
    began = read_mark(path)
    before = began.get('parts', {})
    changed = [key for key, value in state['parts'].items() if before.get(key, value) != value]
    if began and not before and began['recipe'] != state['recipe']:
        changed = ['settings']  # an older mark does not say which
    if changed == ['train_cfg']:
        print_log(f'{path}: training began with another train_cfg; going on with this', 'current')
    elif changed:
        raise ConfigError(
            f'{path}: training began with other values of {", ".join(changed)} than the config and '
            'the options (--amp and --deterministic too) have now; going on would mix the two or '
            'ignore the new ones; restore them, or train anew in another --work-dir, from these '
            'weights with --cfg-options load_from=CHECKPOINT'
        )


def mark_start(work_dir: Path, state: dict, *, is_new: bool) -> None:
    """Take back the mark of an earlier end, and note what is trained from the start."""
    (work_dir / FINISHED).unlink(missing_ok=True)
    if is_new or not (work_dir / STARTED).is_file():
        files.write_json(work_dir / STARTED, state)


def write_finished(work_dir: Path | str, best: Path, state: dict) -> None:
    """Leave the mark that training has come to its end, with what belongs to it."""
    known = {'best': best.name, 'best_hash': files.file_hash(best)[:16]}
    files.write_json(Path(work_dir) / FINISHED, {**known, **state})


def finished_state(cfg: Config, work_dir: Path | str) -> tuple[bool, str]:
    """Tell whether a fold's training is complete, and why or why not.

    Args:
        cfg: The config with the options of this training merged in.
        work_dir: The fold's work folder.

    Raises:
        ConfigError: It was trained, or begun, with other settings or folds than those in force.
    """
    work_dir = Path(work_dir)
    finished, started = read_mark(work_dir / FINISHED), read_mark(work_dir / STARTED)
    if finished:
        _refuse_other_recipe(work_dir / FINISHED, finished, cfg)
    if not finished:
        if not any(work_dir.glob('*_*.pth')):
            return False, f'{work_dir}: not begun'
        if started:  # without a checkpoint training starts anew, and nothing can be mixed
            _refuse_other_recipe(work_dir / STARTED, started, cfg)
        return False, f'{work_dir / FINISHED} is not there'
    best = work_dir / finished['best']
    if not best.is_file():
        return False, f'{best} is gone'
    if files.file_hash(best)[:16] != finished['best_hash']:
        return False, f'{best} is not the file that training ended with'
    return True, str(best)


def read_mark(path: Path) -> dict:
    """Return what a mark says; empty if it is missing, damaged or of another version."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}
    is_ours = isinstance(content, dict) and content.get('version') == MARK_VERSION
    return content if is_ours else {}


def _refuse_other_recipe(path: Path, mark: dict, cfg: Config) -> None:
    folds = fold_hash_of(cfg)
    if folds and mark['fold_hash'] and mark['fold_hash'] != folds:
        raise ConfigError(
            f'{path}: trained with folds {mark["fold_hash"]}, now there are folds {folds}; delete '
            f'{path.parent} to train it again, or restore the folds file'
        )
    if mark['recipe'] != recipe_hash(cfg):
        raise ConfigError(
            f'{path}: trained with other settings than the config and its options have now; '
            f'delete {path.parent} to train it again, or restore the settings'
        )

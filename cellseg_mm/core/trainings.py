"""Whose weights are these? Recipes, marks of trainings, and the checkpoint that counts.

In: a work folder, a config's settings, what a checkpoint says of its training. Out: what differs,
or a refusal. Invariant: a file's name decides nothing; what is compared is what stands inside.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cellseg_mm.core import files
from cellseg_mm.core.errors import CheckpointError
from cellseg_mm.core.layout import FINISHED, STARTED

logger = logging.getLogger(__name__)

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

# Parts of a model that change neither what its weights mean nor how it answers.
NOT_NETWORK_KEYS = {
    *('test_cfg', 'train_cfg', 'init_cfg', 'with_cp', 'keep_mask_probs', 'memory_format'),
}

# Types that train alike: what load_config makes of SyncBN where there is no kernel for it, and what
# is the other without settings of its own (mask_frame, which is compared).
SAME = {'SyncBN': 'BN', 'CellRoIHead': 'StandardRoIHead'}

# What a checkpoint says of its recipe: all of it as one hash; by part as trained, as the config and
# its options had it, and as the config file has it; and the network that the weights belong to.
RECORD_KEYS = ('recipe', 'parts', 'config_parts', 'file_parts', 'network')

SHOWN = 8  # class names in a message

REGULAR_NAME = re.compile(r'(?:iter|epoch)_(\d+)\.pth')

Record = Mapping[str, Any]


def recipe_hash(settings: Record) -> str:
    """Return 16 hex digits over the settings that decide the weights.

    The same for a config as it is read and as ``load_config`` adapts it to a machine.
    """
    return _hash({**_recipe(settings), 'load_from': Path(settings.get('load_from') or '').name})


def recipe_parts(settings: Record) -> dict[str, str]:
    """Return a hash of each of the settings that decide the weights, to name what differs."""
    scaling = settings.get('auto_scale_lr') or {}
    more = {
        'load_from': Path(settings.get('load_from') or '').name,
        'auto_scale_lr': scaling if scaling.get('enable') else None,
    }
    return {key: _hash(part) for key, part in {**_recipe(settings), **more}.items()}


def network_hash(settings: Record) -> str:
    """Return 16 hex digits over what the weights of a model mean, shapes or not."""
    return _hash(_part(settings.get('model'), NOT_NETWORK_KEYS))


def _hash(value: object) -> str:
    return files.text_hash(json.dumps(value, sort_keys=True, default=str))


def _recipe(settings: Record) -> dict[str, Any]:
    parts: dict[str, Any] = {key: _part(settings.get(key), NOT_RECIPE_KEYS) for key in RECIPE_KEYS}
    parts['model'] = {k: v for k, v in (parts['model'] or {}).items() if k != 'test_cfg'}
    return parts


def _part(node: object, without: set[str]) -> object:
    if isinstance(node, dict):
        kept = {k: _part(v, without) for k, v in node.items() if k not in without}
        kind = kept.get('type')
        if isinstance(kind, str) and kind in SAME:
            kept['type'] = SAME[kind]
        return kept
    return [_part(v, without) for v in node] if isinstance(node, (list, tuple)) else node


def differing(now: Record, *known: Record) -> list[str]:
    """Return the parts of a recipe that are as none of ``known`` has them; unknown ones pass."""
    said = {key: {one[key] for one in known if key in one} for key in now}
    return [key for key, value in now.items() if said[key] and value not in said[key]]


def read_mark(path: Path) -> dict[str, Any]:
    """Return what a mark says; empty if it is missing, damaged or of another version."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}
    is_ours = isinstance(content, dict) and content.get('version') == MARK_VERSION
    return content if is_ours else {}


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Sort checkpoints by time of writing, then by step number (coarse clocks), then by name."""
    return sorted(paths, key=_age, reverse=True)


def _age(path: Path) -> tuple[int, int, str]:
    number = re.search(r'(\d+)\.pth$', path.name)
    return path.stat().st_mtime_ns, int(number.group(1)) if number else -1, path.name


def best_files(work_dir: Path | str) -> list[Path]:
    """Return the checkpoints of the best validations, newest first."""
    return newest_first(Path(work_dir).glob('best_*.pth'))


def regular_files(work_dir: Path | str) -> list[Path]:
    """Return the regular checkpoints, from which training goes on, newest first."""
    found = Path(work_dir).glob('*_*.pth')
    return newest_first(path for path in found if REGULAR_NAME.fullmatch(path.name))


def finished_best(work_dir: Path | str) -> Path | None:
    """Return the checkpoint that a finished training ended with; None if nothing says which.

    Raises:
        CheckpointError: The file of that name is another one, or it is gone and others are there.
    """
    mark_path = Path(work_dir) / FINISHED
    mark = read_mark(mark_path)
    if not mark:
        return None
    wanted, path = str(mark.get('best_hash')), Path(work_dir) / str(mark.get('best'))
    if path.is_file():
        if (found := files.file_hash(path)[:16]) == wanted:
            return path
        raise CheckpointError(
            f'{path}: has the hash {found}, {mark_path.name} says that training ended with '
            f'{wanted}; expected that file; restore it, train again, or give a checkpoint by path'
        )
    others = best_files(work_dir)
    same = [other for other in others if files.file_hash(other)[:16] == wanted]
    if others and not same:
        raise CheckpointError(
            f'{path}: is gone, {mark_path.name} says that training ended with it, and '
            f'{others[0].name} is another file; restore it, train again, or give the path of a '
            'checkpoint'
        )
    return same[0] if same else None


def hash_in_force(work_dir: Path | str) -> tuple[str, str]:
    """Return name and hash of the checkpoint that counts in a work folder, read without torch.

    Returns:
        Two empty texts where nothing tells. A finished training's stays known when its file is
        deleted, as people do who need the room.

    Raises:
        CheckpointError: See :func:`finished_best`.
    """
    mark = read_mark(Path(work_dir) / FINISHED)
    if finished_best(work_dir) is not None or (mark and not regular_files(work_dir)):
        return str(mark['best']), str(mark['best_hash'])
    for path in [*best_files(work_dir), *regular_files(work_dir)]:
        if zipfile.is_zipfile(path):  # a torn one is passed over, as best_checkpoint does
            return path.name, files.file_hash(path)[:16]
    return '', ''


def trained_record(content: Record) -> dict[str, Any]:
    """Return what a loaded checkpoint says of its training; empty if it says nothing."""
    meta = content.get('meta')
    said = meta.get('cellseg') if isinstance(meta, Mapping) else None
    return dict(said) if isinstance(said, Mapping) else {}


def class_names_of(content: Record) -> tuple[str, ...]:
    """Return the class names that stand in a loaded checkpoint; () if none do."""
    meta = content.get('meta')
    theirs = meta.get('dataset_meta') if isinstance(meta, Mapping) else None  # MMDetection's own
    names = trained_record(content).get('class_names')
    if not names and isinstance(theirs, Mapping):
        names = theirs.get('classes')
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) else ()


def refuse_other_classes(path: Path | str, content: Record, class_names: Sequence[str]) -> None:
    """Raise CheckpointError where scores would be called by other names than in training."""
    known = class_names_of(content)
    if known and class_names and known != tuple(class_names):
        raise CheckpointError(
            f'{path}: its classes are {listed(known)}; the config has {listed(class_names)}; names '
            'and their order must be the same; give the config that it was trained with'
        )


def listed(names: Sequence[str]) -> str:
    """Return class names for a message; of many the first."""
    more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
    return ', '.join(names[:SHOWN]) + more


def refuse_mixed_folder(path: Path, trained: Record) -> None:
    """Raise CheckpointError unless a checkpoint is of the training that its folder's marks name."""
    for name in (FINISHED, STARTED):
        mark = read_mark(path.parent / name)
        changed = differing(trained.get('parts') or {}, mark.get('parts') or {})
        changed = [key for key in changed if key != 'train_cfg']  # going on may change the length
        for key in ('fold_hash', 'fold'):
            said = {mark.get(key), trained.get(key)} - {None, ''}
            changed += [key] * (len(said) > 1)
        if changed:
            raise CheckpointError(
                f'{path}: was trained with other values of {", ".join(changed)} than '
                f'{name} beside it says of this folder; expected the checkpoint of that training; '
                'take away what was copied here, or give the path of a checkpoint'
            )


def refuse_other_network(path: Path | str, trained: Record, settings: Record) -> None:
    """Raise CheckpointError where weights belong to another model, though their shapes may fit."""
    known = trained.get('network')
    if known and known != network_hash(settings):
        raise CheckpointError(
            f'{path}: was trained with other settings of model than the config and its options '
            'have now; the weights would mean something else; give the config and the '
            '--cfg-options of its training'
        )


def refuse_other_recipe(path: Path, trained: Record, settings: Record) -> None:
    """Raise CheckpointError where a work folder's checkpoint is of another recipe than a config's.

    Options that only training was given, and --amp, are no difference.
    """
    if not trained.get('parts'):
        say_once(path, 'does not say by which recipe it was trained; that is not compared')
        return
    changed = other_parts(path, trained, settings)
    if changed:
        raise CheckpointError(
            f'{path}: was trained with other values of {", ".join(changed)} than the config and '
            'its options have now; expected the result of this config; give the config and the '
            '--cfg-options of its training, another --work-dir, or the path of the checkpoint to '
            'take it as it is'
        )


def other_parts(path: Path, trained: Record, settings: Record) -> list[str]:
    """Return the parts of a recipe that are another training's than that of a checkpoint."""
    now = recipe_parts(settings)
    if settings.get('resume'):  # a config that a resumed run left begins at its own checkpoint
        now.pop('load_from')
    known = [trained.get(key) or {} for key in ('parts', 'config_parts', 'file_parts')]
    changed = differing(now, *known)
    # A training that went on for longer keeps the best of its shorter part.
    marks = [read_mark(path.parent / name).get('parts') or {} for name in (STARTED, FINISHED)]
    if any(mark.get('train_cfg') == now['train_cfg'] for mark in marks):
        changed = [key for key in changed if key != 'train_cfg']
    return changed


def say_once(where: Path | str, what: str) -> None:
    """Warn of what cannot be compared, for the first file of a kind only."""
    told = _told(what)
    if not told:
        told.append(str(where))
        logger.warning('%s: %s (said for the first such file only)', where, what)


@functools.cache
def _told(what: str) -> list[str]:
    return []

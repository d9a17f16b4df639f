"""Marks of a training in its work folder: begun, finished, by which recipe.

In: a config. Out: started.json, finished.json and the lock. Invariant: a mark tells whose result it
is, and a folder holds one training's.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from mmengine.config import Config
from mmengine.logging import print_log

from cellseg_mm.core import files, trainings
from cellseg_mm.core.errors import CellSegError, CheckpointError, ConfigError
from cellseg_mm.core.layout import FINISHED, STARTED, TRAINING_LOCK
from cellseg_mm.core.trainings import (
    MARK_VERSION,
    best_files,
    differing,
    read_mark,
    regular_files,
)
from cellseg_mm.data.config import DataSettings
from cellseg_mm.data.folds import load_folds
from cellseg_mm.weights.checkpoints import load_checkpoint_file


def recipe_hash(cfg: Config) -> str:
    """Return a hash of the settings that decide the weights; see ``core.trainings``."""
    return trainings.recipe_hash(cfg.to_dict())


def recipe_parts(cfg: Config) -> dict[str, str]:
    """Return a hash of each of the settings that decide the weights, to name what differs."""
    return trainings.recipe_parts(cfg.to_dict())


def recipe_record(cfg: Config, given: dict[str, str] | None = None) -> dict:
    """Return what a checkpoint says of its recipe: ``trainings.RECORD_KEYS``.

    Args:
        cfg: As it trains.
        given: Parts before the options of tools/train.py; None if there are none.
    """
    parts = recipe_parts(cfg)
    given = given or parts
    path = getattr(cfg, 'filename', None)
    is_file = path is not None and Path(path).is_file()
    return {
        'recipe': recipe_hash(cfg),
        'parts': parts,
        'config_parts': given,
        'file_parts': recipe_parts(Config.fromfile(path)) if is_file else given,
        'network': trainings.network_hash(cfg.to_dict()),
    }


def training_state(cfg: Config, given: dict[str, str]) -> dict:
    """Return what the marks of a training say: its recipe, its folds and its classes."""
    data = DataSettings.from_config(cfg)
    return {
        'version': MARK_VERSION,
        **recipe_record(cfg, given),
        'fold_hash': fold_hash_of(cfg),
        'fold': data.fold,
        'class_names': list(data.class_names),
    }


def fold_hash_of(cfg: Config) -> str:
    """Return the hash of the folds in force, '' if there are none yet."""
    path = DataSettings.from_config(cfg).folds_path
    return load_folds(path).hash if path.is_file() else ''


def refuse_changed_settings(checkpoint: Path, state: dict) -> None:
    """Raise ConfigError where training would not go on as it began; only its length may differ.

    A checkpoint brings the optimizer's rates and the schedule along: other ones would be ignored.
    What stands in the checkpoint counts, then the mark beside it.
    """
    path = checkpoint.parent / STARTED
    began = read_mark(path)
    if checkpoint.is_file() and (trained := _said_by(checkpoint)).get('parts'):
        path, began = checkpoint, trained
    changed = differing(state['parts'], began.get('parts', {}))
    if began and not began.get('parts') and began['recipe'] != state['recipe']:
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


def refuse_other_training(work_dir: Path, state: dict, *, goes_on: bool) -> None:
    """Raise ConfigError where a folder holds checkpoints of another recipe or of other folds.

    Its best would be scored under the new name, and what stays of it would be lost or mixed in.
    A folder without checkpoints has nothing to mix: a training that is cut before its first one
    may begin anew with other settings.
    """
    newest = [found[0] for of in (best_files, regular_files) if (found := of(work_dir))]
    if not newest:
        return
    for path in (*newest, work_dir / FINISHED, work_dir / STARTED):
        said = read_mark(path) if path.suffix == '.json' else _said_by(path)
        changed = differing(state['parts'], said.get('parts') or {})
        if goes_on:
            changed = [key for key in changed if key != 'train_cfg']
        if said.get('fold_hash') and state['fold_hash'] not in ('', said['fold_hash']):
            changed.append('the folds')
        if changed:
            raise ConfigError(
                f'{path}: is of a training with other values of {", ".join(changed)} than the '
                f'config and its options have now; expected an empty folder or the same training; '
                'name another folder with --work-dir, restore the settings, or move the old files '
                'away'
            )
    if not _said_by(newest[0]).get('parts') and not read_mark(work_dir / STARTED):
        trainings.say_once(newest[0], 'does not say by which recipe it was trained; it stays')


def _said_by(checkpoint: Path) -> dict:
    """Return what a checkpoint says of its training; empty for one that does not open."""
    try:
        return trainings.trained_record(load_checkpoint_file(checkpoint))
    except CheckpointError:
        return {}


def mark_start(work_dir: Path, state: dict) -> None:
    """Take back the mark of an earlier end, and note what is trained."""
    (work_dir / FINISHED).unlink(missing_ok=True)
    files.write_json(work_dir / STARTED, state)


@contextmanager
def alone(work_dir: Path) -> Iterator[None]:
    """Hold a work folder's lock while this process trains in it.

    The kernel frees the lock when its process is gone, however it ended; processes that load data
    do not hold it. The file names the owner for people.

    Raises:
        CellSegError: Another process trains there; names it.
    """
    path = work_dir / TRAINING_LOCK
    work_dir.mkdir(parents=True, exist_ok=True)
    with _locked(path) as stream:
        stream.seek(0)
        if before := stream.read():
            print_log(
                f'{path}: was left by {_owner(before)}, which is gone; taken over',
                'current',
                level=logging.WARNING,
            )
        stream.truncate(0)
        since = time.strftime('%Y-%m-%d %H:%M:%S')
        stream.write(json.dumps({'process': os.getpid(), 'host': platform.node(), 'since': since}))
        stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)
            with suppress(PermissionError):  # Windows keeps a file that is open
                path.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    """Open the lock file and hold it; who unlinks it does so while holding it."""
    while True:
        stream = path.open('a+', encoding='utf-8')
        stream.seek(0)
        said = stream.read()
        if not _try_lock(stream, said):
            owner = _owner(said)
            stream.close()
            raise CellSegError(
                f'{path}: {owner} trains in this folder; expected nobody, two trainings would '
                'mix their files; wait until it ends, end it, or name another folder with '
                '--work-dir'
            )
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(stream.fileno()).st_ino:
                break
        stream.close()  # its owner has ended and removed it meanwhile
    with stream:
        yield stream


def _try_lock(stream: TextIO, text: str) -> bool:
    """Lock an open file unless a living process has; where files cannot be locked, ask its text."""
    try:
        import fcntl

        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as problem:
        if getattr(problem, 'errno', None) in (errno.EACCES, errno.EAGAIN):
            return False
        said = _read_owner(text)
        is_here = said.get('host') == platform.node() and said.get('process') != os.getpid()
        return not (is_here and files.is_alive(int(said.get('process', 0))))
    return True


def _read_owner(text: str) -> dict:
    try:
        said = json.loads(text)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _owner(text: str) -> str:
    said = _read_owner(text)
    if not said:
        return 'an unknown process'
    return f'process {said.get("process")} on {said.get("host")} (since {said.get("since")})'


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


def _refuse_other_recipe(path: Path, mark: dict, cfg: Config) -> None:
    folds = fold_hash_of(cfg)
    if folds and mark['fold_hash'] and mark['fold_hash'] != folds:
        raise ConfigError(
            f'{path}: trained with folds {mark["fold_hash"]}, now there are folds {folds}; delete '
            f'{path.parent} to train it again, or restore the folds file'
        )
    now = recipe_parts(cfg)
    parts = mark.get('parts')
    if differing(now, parts) if parts else mark['recipe'] != recipe_hash(cfg):
        raise ConfigError(
            f'{path}: trained with other settings than the config and its options have now; '
            f'delete {path.parent} to train it again, or restore the settings'
        )

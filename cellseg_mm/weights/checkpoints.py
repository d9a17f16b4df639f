"""Checkpoint files: read without running anything they hold, written whole, found again.

In: files that mmengine's Runner or a stranger wrote. Out: plain dictionaries of tensors, numbers
and text. Invariant: every load is ``weights_only=True``, resuming included; mmengine itself falls
back to unpickling whatever a file asks for (``_safe_torch_load``, onedl-mmengine 0.10.12).

Nothing is patched: :func:`use_safe_loading` registers a loader for every scheme that mmengine's
``CheckpointLoader`` knows, and a storage backend for local files, through mmengine's own functions.
Since the Runner loads and saves through these two tables, stock tools are covered as well.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import barrier, get_rank
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import (
    CheckpointLoader,
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)
from numpy.typing import NDArray

from cellseg_mm.core.errors import CheckpointError
from cellseg_mm.core.files import atomic_path

logger = logging.getLogger(__name__)

NUMERIC_DTYPES = ('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8')
STATISTICS = ('min', 'max', 'mean', 'current')
REGULAR_NAME = re.compile(r'(?:iter|epoch)_(\d+)\.pth')

Weights = dict[str, object]
MapLocation = str | torch.device | Callable | None


class _Refused(CheckpointError):
    """The file asks for something that weights do not need; the text says what."""


class _Dtype:
    """Stand-in for ``numpy.dtype``: a plain number type and its byte order, nothing else.

    numpy's own trusts what it unpickles: one changed byte of its state ends the process with a
    segmentation fault (numpy 2.2), so files must not reach it.
    """

    def __init__(self, code: str, *_: object) -> None:
        if code not in NUMERIC_DTYPES:
            raise _Refused(f'asks for numpy.dtype({code!r:.40})')
        self.code, self.order = code, '<'

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ('<', '>', '|'):
            raise _Refused(f'asks for numpy.dtype of byte order {state[1]!r:.40}')
        self.order = state[1]

    def read(self, data: bytes, shape: tuple[int, ...], order: str = 'C') -> NDArray:
        """Return an array that owns its numbers, in the byte order of this machine."""
        array = np.frombuffer(data, np.dtype(self.order + self.code)).reshape(shape, order=order)
        return array.astype(self.code)


class _Array:
    """Stand-in for ``numpy.ndarray``, filled in two steps as pickle does."""

    value: NDArray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        if not isinstance(dtype, _Dtype):
            raise _Refused('asks for numpy.ndarray of objects')
        self.value = dtype.read(data, shape, 'F' if is_fortran else 'C')


def _reconstruct(kind: type, *_: object) -> _Array:
    """Stand in for numpy's first step."""
    if kind is not _Array:
        raise _Refused('asks for numpy.reconstruct of no array')
    return _Array()


def _scalar(dtype: _Dtype, data: bytes) -> np.generic:
    """Stand in for numpy's constructor of scalars."""
    return dtype.read(data, (1,))[0]


class _History:
    """Stand-in for mmengine's HistoryBuffer."""

    state: dict[str, object] | None = None

    def __setstate__(self, state: dict[str, object]) -> None:
        self.state = state

    def read(self) -> HistoryBuffer:
        """Return the buffer with mmengine's own statistics, whatever the file names."""
        state = self.state or {}
        logs, counts = (state[key].value for key in ('_log_history', '_count_history'))
        max_length = int(state['max_length'])
        if not len(logs) == len(counts) <= max_length:
            raise _Refused('asks for a HistoryBuffer of impossible length')
        return HistoryBuffer(logs, counts, max_length)


def _statistic(owner: type, name: str) -> str:
    """Stand in for ``getattr``: a HistoryBuffer carries references to its own methods."""
    if owner is not _History or name not in STATISTICS:
        raise _Refused(f'asks for getattr of {name!r:.60}')
    return name


# What mmengine's own checkpoints hold beyond tensors, under the names it goes by: numpy 1 and 2
# keep the constructors in modules of different names.
ADMITTED = [
    (_History, 'mmengine.logging.history_buffer.HistoryBuffer'),
    (_statistic, 'builtins.getattr'),
    (_Array, 'numpy.ndarray'),
    (_Dtype, 'numpy.dtype'),
    (_reconstruct, 'numpy.core.multiarray._reconstruct'),
    (_reconstruct, 'numpy._core.multiarray._reconstruct'),
    (_scalar, 'numpy.core.multiarray.scalar'),
    (_scalar, 'numpy._core.multiarray.scalar'),
]


def _resolve(value: object, seen: set[int]) -> object:
    """Replace stand-ins inside containers by what they stand for; dicts and lists in place."""
    if isinstance(value, _Array):
        if value.value is None:
            raise _Refused('asks for numpy.ndarray without data')
        return value.value
    if isinstance(value, _History):
        return value.read()
    if isinstance(value, _Dtype | type) or callable(value):
        raise _Refused(f'asks for {value!r:.60}')
    if type(value) is tuple:
        return tuple(_resolve(item, seen) for item in value)
    if isinstance(value, dict | list) and id(value) not in seen:
        seen.add(id(value))
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            value[key] = _resolve(item, seen)
    return value


def load_checkpoint_file(path: Path | str, *, map_location: MapLocation = 'cpu') -> Weights:
    """Read a checkpoint without running anything in it.

    Args:
        path: Local file.
        map_location: As in ``torch.load``.

    Raises:
        CheckpointError: The file is missing, empty, cut short, no checkpoint, or holds objects
            other than tensors, numbers, text and mmengine's history.
    """
    path = Path(path).expanduser()
    _check_file(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(ADMITTED):
            warnings.simplefilter('ignore')  # torch's advice for its own developers on odd files
            content = torch.load(path, map_location=map_location, weights_only=True)
        content = _resolve(content, set())
    # A damaged file raises nearly anything: RuntimeError, EOFError, UnpicklingError, KeyError,
    # UnicodeDecodeError, MemoryError, ... The message is the only thing to tell them apart by.
    except Exception as error:
        raise CheckpointError(f'{path}: {_explain(error)}') from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f'{path}: holds a {type(content).__name__}; expected a dict of weights; '
            'is it a checkpoint of this project?'
        )
    return content


def _check_file(path: Path) -> None:
    """Raise CheckpointError for what shows without unpickling."""
    remedy = 'fetch or train it again'
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise CheckpointError(f'{path}: is no file; expected a checkpoint; give its path')
        if size == 0:
            raise CheckpointError(f'{path}: is empty; expected a checkpoint; {remedy}')
        with path.open('rb') as stream:
            is_archive = stream.read(2) == b'PK'
        if is_archive:
            _check_archive(path, size)
    except FileNotFoundError as error:
        raise CheckpointError(f'{path}: there is no such checkpoint; check the path') from error
    except OSError as error:
        raise CheckpointError(f'{path}: cannot be read ({error.strerror}); {remedy}') from error


def _check_archive(path: Path, size: int) -> None:
    """Raise CheckpointError for a zip file that is cut, damaged, or grows when it is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise CheckpointError(
                    f'{path}: is compressed; torch never compresses checkpoints; do not trust it'
                )
            damaged = archive.testzip()
    except OSError:
        raise
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f'{path}: is cut short or damaged ({error}); expected a whole checkpoint; '
            'use the one before, or fetch or train it again'
        ) from error
    if damaged is not None:
        raise CheckpointError(
            f'{path}: is damaged at {damaged!r}; expected a whole checkpoint; '
            'use the one before, or fetch or train it again'
        )


def _explain(error: Exception) -> str:
    """Say in one clause what is wrong with a file that torch could not load."""
    text = str(error)
    if isinstance(error, _Refused):
        asked = text
    else:
        found = re.search(r'GLOBAL ([\w.]+)', text)
        asked = f'asks for {found.group(1)}' if found else ''
    if asked:
        return (
            f'{asked}, which weights do not need and which could run code; nothing was run; '
            'use a file of weights from a source that you trust'
        )
    found = re.search(r'WeightsUnpickler error: (.+)', text)
    reason = found.group(1) if found else text.partition('\n')[0] or type(error).__name__
    return f'is no checkpoint, or is damaged ({reason[:120]}); expected a file of torch.save'


def use_safe_loading() -> None:
    """Make mmengine load every checkpoint by :func:`load_checkpoint_file` and write files whole.

    Registered over mmengine's own entries (``force=True``), nothing else changes:

    - ``CheckpointLoader`` schemes: local paths, http(s), ``torchvision://``, ``modelzoo://``,
      ``open-mmlab://``, ``openmmlab://`` and ``mmcls://`` load weights only; ``pavi://``, ``s3://``
      and ``petrel://`` (which would unpickle) are refused.
    - the local storage backend: :class:`AtomicLocalBackend`, which CheckpointHook writes through.
    """
    for prefixes, loader in (
        ('', load_from_local),
        (('http://', 'https://'), load_from_http),
        (('modelzoo://', 'torchvision://'), load_from_torchvision),
        (('open-mmlab://', 'openmmlab://'), load_from_openmmlab),
        ('mmcls://', load_from_mmcls),
        (('pavi://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://'), load_from_refused),
    ):
        CheckpointLoader.register_scheme(prefixes, loader, force=True)
    register_backend('local', AtomicLocalBackend, force=True, prefixes='')


class AtomicLocalBackend(LocalBackend):
    """mmengine's local files, but replaced in one step instead of written in place."""

    def put(self, obj: bytes, filepath: Path | str) -> None:
        """Replace ``filepath`` by ``obj``; after a crash it is the old or the new file."""
        with atomic_path(filepath) as temporary:
            temporary.write_bytes(obj)

    def put_text(self, obj: str, filepath: Path | str, encoding: str = 'utf-8') -> None:
        """Replace ``filepath`` by ``obj``; after a crash it is the old or the new file."""
        self.put(obj.encode(encoding), filepath)


# mmengine logs the part of these names after "load_from_".
def load_from_local(filename: str, map_location: MapLocation = None) -> Weights:
    """Load a local file; see :func:`load_checkpoint_file`."""
    return load_checkpoint_file(filename, map_location=map_location)


def load_from_http(filename: str, map_location: MapLocation = None) -> Weights:
    """Fetch a URL once into torch's cache, whole or not at all, and load it.

    Raises:
        CheckpointError: It cannot be fetched, or is no checkpoint.
    """
    folder = Path(torch.hub.get_dir()) / 'checkpoints'
    cached = folder / Path(filename.split('?')[0]).name
    if get_rank() == 0 and not cached.is_file():
        try:
            with atomic_path(cached) as temporary:
                torch.hub.download_url_to_file(filename, str(temporary), progress=os.isatty(2))
        except OSError as error:
            raise CheckpointError(
                f'{filename}: cannot be fetched ({error}); fetch it elsewhere and set load_from to '
                'the local file, or set load_from=None for random weights'
            ) from error
    barrier()
    return load_checkpoint_file(cached, map_location=map_location)


def load_from_torchvision(filename: str, map_location: MapLocation = None) -> Weights:
    """Load a model that torchvision publishes, by its name."""
    return load_from_http(_published(filename, get_torchvision_models()), map_location)


def load_from_openmmlab(filename: str, map_location: MapLocation = None) -> Weights:
    """Load a model of mmengine's list of names."""
    models = get_external_models()
    models |= {
        old: models[new] for old, new in get_deprecated_model_names().items() if new in models
    }
    address = _published(filename, models)
    is_url = address.startswith(('http://', 'https://'))
    return (load_from_http if is_url else load_from_local)(address, map_location)


def load_from_mmcls(filename: str, map_location: MapLocation = None) -> Weights:
    """Load the backbone of a classification model of mmengine's list of names."""
    content = load_from_http(_published(filename, get_mmcls_models()), map_location)
    weights = content.get('state_dict', content)
    prefix = 'backbone.'
    return {
        'state_dict': {
            name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)
        }
    }


def load_from_refused(filename: str, map_location: MapLocation = None) -> Weights:
    """Refuse a storage whose loader in mmengine would run code from the file."""
    raise CheckpointError(
        f'{filename}: this storage is not supported, because mmengine reads it by unpickling; '
        'copy the file to this machine and give its path'
    )


def _published(filename: str, models: dict[str, str]) -> str:
    """Return the address of ``scheme://name``."""
    name = filename.split('://', 1)[1]
    if name not in models:
        raise CheckpointError(f'{filename}: no model is published under this name; check it')
    return models[name]


def last_good_checkpoint(work_dir: Path | str) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint to resume from that opens.

    ``last_checkpoint``, mmengine's note of the newest, is not used: a run that is killed leaves it
    empty or one behind. The newest is the one written last; after a restart from scratch in an old
    folder that is not the one with the largest number.

    Returns:
        The path, ``None`` if there is none, and one sentence for every newer one that was skipped.
    """
    files = [path for path in Path(work_dir).glob('*_*.pth') if REGULAR_NAME.fullmatch(path.name)]
    return _first_good(files)


def best_checkpoint(work_dir: Path | str) -> Path:
    """Find the checkpoint of the best validation, or the newest if none was validated.

    Raises:
        CheckpointError: There is none, or none that opens.
    """
    best, skipped = _first_good(list(Path(work_dir).glob('best_*.pth')))
    if best is None and not skipped:
        best, skipped = last_good_checkpoint(work_dir)
        if best is not None:
            logger.warning(
                '%s: no best_*.pth, no validation has run; using %s', work_dir, best.name
            )
    if best is None:
        found = '; '.join(skipped) or 'has no checkpoint (best_*.pth, iter_*.pth or epoch_*.pth)'
        raise CheckpointError(f'{work_dir}: {found}; train first, or give the path of a checkpoint')
    for reason in skipped:
        logger.warning('%s; using %s', reason, best.name)
    return best


def _first_good(paths: list[Path]) -> tuple[Path | None, list[str]]:
    """Return the newest file that loads and has weights, and why newer ones were skipped."""
    skipped = []
    for path in sorted(paths, key=_age, reverse=True):
        try:
            if 'state_dict' in load_checkpoint_file(path):
                return path, skipped
            skipped.append(f'{path}: has no state_dict')
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def _age(path: Path) -> tuple[int, int, str]:
    """Sort by time of writing, then by step number (coarse clocks), then by name."""
    number = re.search(r'(\d+)\.pth$', path.name)
    return path.stat().st_mtime_ns, int(number.group(1)) if number else -1, path.name


def remove_leftovers(work_dir: Path | str) -> list[Path]:
    """Delete unfinished checkpoints of killed runs; call it before a run starts to write.

    Returns:
        What was deleted: files that :func:`cellseg_mm.core.files.atomic_path` had not renamed yet.
    """
    leftovers = sorted(Path(work_dir).glob('.tmp-*.pth'))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers

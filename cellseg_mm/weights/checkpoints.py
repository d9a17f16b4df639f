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
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from numpy.typing import NDArray

from cellseg_mm.core.errors import CheckpointError
from cellseg_mm.core.stand_ins import Array, Dtype, Refused, reconstruct, scalar

logger = logging.getLogger(__name__)

STATISTICS = ('min', 'max', 'mean', 'current')

Weights = dict[str, object]
MapLocation = str | torch.device | Callable | None


def _number(dtype: object, data: object) -> np.generic:
    return scalar(dtype, data).to_numpy()[()]


def _owned(array: NDArray) -> NDArray:
    """Return an array that owns its numbers, in the byte order of this machine."""
    return array.astype(array.dtype.newbyteorder('='))


class _History:
    """Stand-in for mmengine's HistoryBuffer."""

    state: dict[str, object] | None = None

    def __setstate__(self, state: dict[str, object]) -> None:
        self.state = state

    def read(self) -> HistoryBuffer:
        """Return the buffer with mmengine's own statistics, whatever the file names."""
        state = self.state or {}
        logs, counts = (_owned(state[key].to_numpy()) for key in ('_log_history', '_count_history'))
        max_length = int(state['max_length'])
        if not len(logs) == len(counts) <= max_length:
            raise Refused('a HistoryBuffer of impossible length')
        return HistoryBuffer(logs, counts, max_length)


def _statistic(owner: type, name: str) -> str:
    """Stand in for ``getattr``: a HistoryBuffer carries references to its own methods."""
    if owner is not _History or name not in STATISTICS:
        raise Refused(f'getattr of {name!r:.60}')
    return name


# What mmengine's own checkpoints hold beyond tensors, under the names it goes by: numpy 1 and 2
# keep the constructors in modules of different names.
ADMITTED = [
    (_History, 'mmengine.logging.history_buffer.HistoryBuffer'),
    (_statistic, 'builtins.getattr'),
    (Array, 'numpy.ndarray'),
    (Dtype, 'numpy.dtype'),
    (reconstruct, 'numpy.core.multiarray._reconstruct'),
    (reconstruct, 'numpy._core.multiarray._reconstruct'),
    (_number, 'numpy.core.multiarray.scalar'),
    (_number, 'numpy._core.multiarray.scalar'),
]


def _resolve(value: object, seen: set[int]) -> object:
    """Replace stand-ins inside containers by what they stand for; dicts and lists in place."""
    if isinstance(value, Array):
        return _owned(value.to_numpy())
    if isinstance(value, _History):
        return value.read()
    if isinstance(value, Dtype | type) or callable(value):
        raise Refused(f'{value!r:.60}')
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
    if isinstance(error, Refused):
        asked = f'asks for {text}'
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

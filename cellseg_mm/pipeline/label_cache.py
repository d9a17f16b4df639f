"""Label maps that were read once, remembered as runs.

In: the label files of a case. Out: its label layers, ready to view. A training run reads each image
some hundred times; opening and checking its class files costs more than all mask work that follows,
and their runs take a thirtieth of the memory of the layers. Invariant: what is remembered is
used only while every file has the size and the time of change it had when it was read.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.data.labels import Case, read_label_layers
from cellseg_mm.pipeline.layer_view import LayerSource, Runs, find_runs

Stamp = tuple[tuple[int, str, int, int], ...]


@dataclass(frozen=True, slots=True)
class _Remembered:
    stamp: Stamp
    image_hw: tuple[int, int]
    runs: tuple[Runs, ...]
    layer_of: NDArray[np.int64]
    class_ids: NDArray[np.int64]

    @property
    def n_bytes(self) -> int:
        return sum(runs.n_bytes for runs in self.runs) + 16 * len(self.class_ids)


class LabelCache:
    """Label layers of the cases used last, up to a limit of memory.

    Args:
        max_bytes: Most memory for what is remembered; 0 remembers nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.n_bytes = 0
        self._cases: OrderedDict[str, _Remembered] = OrderedDict()

    def __len__(self) -> int:
        """Return how many cases are remembered."""
        return len(self._cases)

    def __getstate__(self) -> dict:
        return {'max_bytes': self.max_bytes, 'n_bytes': 0, '_cases': OrderedDict()}

    def read(self, case: Case) -> tuple[LayerSource, NDArray[np.int64], NDArray[np.int64]]:
        """Return the layers, ``layer_of`` (N,) and ``class_ids`` (N,) of a case.

        Instance i has the value i + 1, as in ``labels.LabelLayers``. The layers are new memory.

        Raises:
            LabelMapError: See ``labels.read_label_layers``.
        """
        key = str(case.image_path)
        known = self._cases.get(key)
        stamp = _stamp_of(case) if self.max_bytes else ()
        if known is not None and (known.stamp, known.image_hw) == (stamp, case.image_hw):
            self._cases.move_to_end(key)
            source = LayerSource.of_runs(known.runs, known.image_hw)
            return source, known.layer_of, known.class_ids.copy()
        found = read_label_layers(case)
        runs = tuple(find_runs(layer) for layer in found.layers)
        if self.max_bytes:
            read = _Remembered(stamp, case.image_hw, runs, found.layer_of, found.class_ids)
            self._remember(key, read)
        return LayerSource.of_array(found.layers, runs), found.layer_of, found.class_ids.copy()

    def _remember(self, key: str, case: _Remembered) -> None:
        before = self._cases.pop(key, None)
        self.n_bytes += case.n_bytes - (before.n_bytes if before else 0)
        self._cases[key] = case
        while self.n_bytes > self.max_bytes:
            self.n_bytes -= self._cases.popitem(last=False)[1].n_bytes


def _stamp_of(case: Case) -> Stamp:
    # Taken before reading: a file that changes meanwhile is read again next time. A missing file
    # has no stamp here and is named by the reader.
    stamps = []
    for class_id, path in sorted(case.label_paths.items()):
        status = path.stat() if path.is_file() else None
        size, changed = (status.st_size, status.st_mtime_ns) if status else (-1, -1)
        stamps.append((class_id, str(path), size, changed))
    return tuple(stamps)

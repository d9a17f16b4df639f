"""No reader opens what is not a regular file: a pipe would wait for ever."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cellseg_mm.core.errors import CellSegError
from cellseg_mm.data import cases, folds, labels
from cellseg_mm.data.image_reader import open_image
from cellseg_mm.data.intensity import load_range
from cellseg_mm.fusion.settings import load_settings
from cellseg_mm.results.coco_results import read_results_file
from cellseg_mm.results.predictions import load_predictions

READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    'image': ('a.tif', labels.read_image),
    'label map': ('class1.tif', labels.read_label_map),
    'image to predict': ('a.tif', lambda path: open_image(path).__enter__()),
    'picture to predict': ('a.png', lambda path: open_image(path).__enter__()),
    'id map': ('ids.json', cases.read_id_map),
    'exclusions': ('exclude.txt', lambda path: cases.read_exclude(path.parent, path)),
    'folds': ('folds.json', lambda path: folds.load_folds(path, ['a'])),
    'predictions': ('a.npz', load_predictions),
    'COCO results': ('a.json', read_results_file),
    'settings': ('inference.json', lambda path: load_settings(path, 'submission', ['a'])),
    'range of values': ('range.json', load_range),
}


@pytest.mark.parametrize('kind', READERS)
def test_a_pipe_is_refused(kind: str, tmp_path: Path) -> None:
    name, read = READERS[kind]
    os.mkfifo(tmp_path / name)
    with pytest.raises(CellSegError, match=r'regular file|there are no settings'):
        read(tmp_path / name)

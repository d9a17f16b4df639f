"""The whole loop on drawn images: correct, import, extend the folds, train on, compare."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cellseg_mm.core.errors import FoldError
from cellseg_mm.core.layout import AGAINST_START
from cellseg_mm.core.trainings import trained_record
from cellseg_mm.data.config import CLASS_NAMES
from cellseg_mm.data.folds import load_folds
from cellseg_mm.data.image_reader import open_image
from cellseg_mm.data.importing.import_data import import_data
from cellseg_mm.data.importing.sources import ImportParams
from cellseg_mm.data.labels import find_cases, read_gt
from cellseg_mm.data.preparing import prepare
from cellseg_mm.data.preparing.groups import GroupRule
from cellseg_mm.data.preparing.records import PrepareParams
from cellseg_mm.pipeline.dataset import CellDataset
from cellseg_mm.results.formats import Look, write_formats
from cellseg_mm.training.fold_guard import refuse_seen_start
from cellseg_mm.weights.checkpoints import load_checkpoint_file
from tests.support.tiny_folds import TinyFolds, make_tiny_folds
from tools import train

pytestmark = pytest.mark.mm

LOOK = Look(class_names=CLASS_NAMES, class_colours=((1, 2, 3),) * 4)
SHORT = [
    *('--cfg-options', 'train_cfg.max_iters=2', 'train_cfg.val_interval=2'),
    'default_hooks.checkpoint.interval=2',
]
PARAMS = PrepareParams(
    n_folds=3, n_workers=1, groups=GroupRule(manifest=False, alike=False), extend_folds=True
)


def reviewed(world: TinyFolds, folder: Path, name: str, new_name: str = '') -> None:
    """Write what comes back of a case: its cells, the worst of them removed."""
    (case,) = (case for case in find_cases(world.data_root, 'train', 4) if case.name == name)
    cells = replace(read_gt(case)[np.arange(len(read_gt(case)) - 1)], name=new_name or name)
    with open_image(case.image_path) as reader:
        write_formats(folder, ('review',), cells, reader, LOOK)


def test_corrections_are_trained_on_and_judged_on_what_nobody_corrected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv('CELLSEG_DATA', str(tmp_path / 'data'))
    monkeypatch.setenv('LOCAL_RANK', '0')
    world = make_tiny_folds(tmp_path)
    data = world.data_root
    held_out, untouched = world.folds.val_names(0)
    taught = world.folds.val_names(1)[0]
    source = tmp_path / 'corrected'
    for name in (held_out, taught):
        reviewed(world, source, name)
    params = ImportParams(class_names=CLASS_NAMES, image_dir=data / 'train', add=True)
    assert import_data('geojson', source, data, params).problems == ()
    fresh = tmp_path / 'fresh'
    reviewed(world, fresh, taught, 'fresh')
    shutil.copy(data / 'train' / taught / 'image.tif', fresh / 'fresh.tif')
    params = replace(params, image_dir=None)
    assert import_data('geojson', fresh, data, params).problems == ()
    report = prepare.prepare(data, PARAMS)
    assert report.errors == ()
    folds = load_folds(data / 'folds.json')
    assert folds.lineage == (world.folds.hash,)
    assert folds.fold_of()['fresh'] == 1  # the same picture as its group

    start = str(world.checkpoints[0])
    trained = trained_record(load_checkpoint_file(world.checkpoints[0]))
    common = {'data_root': str(data), 'split': 'train', 'metainfo': {'classes': CLASS_NAMES}}
    with pytest.raises(FoldError, match=r'trained for fold 0 .* has seen images of fold 1'):
        refuse_seen_start(trained, CellDataset(fold=1, **common))

    words = [world.configs[0], '--work-dir', str(tmp_path / 'work0'), '--start-from', start]
    monkeypatch.setattr(sys, 'argv', ['train.py', *words, *SHORT])
    train.main()
    said = capsys.readouterr().out
    assert 'on 1 images (1 images) that were neither corrected nor trained on: AP50 ' in said
    assert '1 held-out images that were corrected or added are left out' in said
    record = json.loads((tmp_path / 'work0' / AGAINST_START).read_text())
    assert (record['images'], record['left_out']) == ([untouched], [held_out])
    assert record['before']['hash'] != record['after']['hash']
    assert record['fold_hash'] == folds.hash
    assert set(record['changes']) == {'AP50', 'mPQ'}

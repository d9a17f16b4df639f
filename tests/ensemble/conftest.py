"""The drawn world that tests of files share."""

from __future__ import annotations

import pytest

from cellseg_mm.data.drawing.sample import make_sample
from cellseg_mm.data.folds import Folds, save_folds
from cellseg_mm.data.labels import find_cases, read_gt
from tests.support.drawn_world import World


@pytest.fixture(scope='module')
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp('oof')
    data_root = make_sample(root / 'data', n_train=6, n_test=2)
    cases = find_cases(data_root, 'train', 4)
    names = [case.name for case in cases]
    folds = Folds((tuple(names[:2]), tuple(names[2:4]), tuple(names[4:])))
    save_folds(data_root / 'folds.json', folds)
    return World(root, data_root, folds, {case.name: read_gt(case) for case in cases})

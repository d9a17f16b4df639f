"""images: which images a split holds, and by which ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellseg_mm.core.errors import FoldError
from cellseg_mm.data.config import CLASS_NAMES
from cellseg_mm.data.folds import load_folds
from cellseg_mm.data.images import find_images


@pytest.mark.parametrize('fold', [None, 0, 1])
def test_val_holds_one_fold_and_all_holds_every_fold(sample_data: Path, fold: int | None) -> None:
    path = sample_data / 'folds.json'
    every = find_images(sample_data, 'all', CLASS_NAMES, folds_path=path)
    names = [case.name for case in every.cases]
    assert names == sorted(names)
    folds = load_folds(path, names)
    val = find_images(sample_data, 'val', CLASS_NAMES, folds_path=path, fold=fold)
    assert [case.name for case in val.cases] == sorted(folds.val_names(fold or 0))
    ids = {case.name: case.image_id for case in every.cases}
    assert all(case.image_id == ids[case.name] for case in val.cases)
    assert (val.fold, val.split, val.class_names) == (fold, 'val', tuple(CLASS_NAMES))


def test_test_images_have_no_labels_and_need_no_folds(sample_data: Path, tmp_path: Path) -> None:
    path = tmp_path / 'none.json'
    images = find_images(sample_data, 'test', CLASS_NAMES, folds_path=path)
    assert len(images.cases) == 2
    assert not any(case.label_paths for case in images.cases)
    with pytest.raises(FoldError, match=r'none\.json'):
        find_images(sample_data, 'val', CLASS_NAMES, folds_path=path)

"""The images of a split, with the ids that files know them by.

In: folders, folds and an id map. Out: images in a stated order. Invariant: nothing is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cellseg_mm.data.config import DataSettings
from cellseg_mm.data.folds import excluded_by, load_folds
from cellseg_mm.data.labels import Case, find_cases

Split = Literal['test', 'val', 'all']


@dataclass(frozen=True, slots=True)
class Images:
    """The images that are predicted.

    Attributes:
        data_root: Data folder.
        split: ``test``, ``val`` (one fold's held-out images) or ``all`` training images.
        class_names: Names of the classes.
        cases: The images, sorted by name.
        folds_path: The folds file.
        fold: The fold of ``val``.
    """

    data_root: Path
    split: Split
    class_names: tuple[str, ...]
    cases: tuple[Case, ...]
    folds_path: Path
    fold: int | None = None


def find_images(
    data_root: Path | str,
    split: Split,
    class_names: Sequence[str],
    *,
    folds_path: Path | str,
    fold: int | None = None,
) -> Images:
    """Find the images of a split.

    Raises:
        DataError: The data folder has errors.
        FoldError: ``val`` is asked for and the folds are missing, or have no such fold.
    """
    root, classes = Path(data_root), tuple(class_names)
    where: Literal['train', 'test'] = 'test' if split == 'test' else 'train'
    excluded = excluded_by(folds_path)
    cases = find_cases(root, where, len(classes), exclude_names=excluded)
    if split == 'val':
        folds = load_folds(folds_path, [case.name for case in cases])
        wanted = set(folds.val_names(0 if fold is None else fold))
        cases = [case for case in cases if case.name in wanted]
    return Images(root, split, classes, tuple(cases), Path(folds_path), fold)


def cases_of(data: DataSettings, split: Literal['train', 'test']) -> list[Case]:
    """Find the cases of a folder as the data set does.

    Raises:
        DataError: The data folder has errors.
        FoldError: The folds file cannot be read.
    """
    excluded = excluded_by(data.folds_path)
    return find_cases(data.data_root, split, len(data.class_names), exclude_names=excluded)

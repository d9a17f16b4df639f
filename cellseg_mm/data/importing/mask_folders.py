"""One PNG a nucleus, as DSB2018 has it.

In: a folder. Out: cells of one class. Invariant: a file is one cell.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from scipy import ndimage

from cellseg_mm.core.errors import CellSegError
from cellseg_mm.data.importing.sources import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    Annotated,
    Cell,
    Classes,
    ImportParams,
    Job,
    _check_size,
    _entries,
    _listed,
    _single_class,
    read_picture,
)


def _tight(cell: Cell) -> Cell:
    """Cut empty rows and columns off."""
    box = ndimage.find_objects(cell.mask.astype(np.uint8))
    if not box:
        return Cell(cell.class_number, 0, 0, np.zeros((0, 0), dtype=bool))
    rows, columns = box[0]
    return Cell(
        cell.class_number,
        cell.top + rows.start,
        cell.left + columns.start,
        cell.mask[rows, columns],
    )


def _find_mask_folders(source: Path, params: ImportParams) -> tuple[list[Job], Classes]:
    classes, number = _single_class(params)
    jobs = []
    for folder in sorted(path for path in _entries(source) if path.is_dir()):
        read = partial(_read_mask_folder, folder, number, params)
        jobs.append(Job(folder.name, folder, '', read))
    return jobs, classes


def _read_mask_folder(folder: Path, number: int, params: ImportParams) -> Annotated:
    for name in ('images', 'masks'):
        if not (folder / name).is_dir():
            raise CellSegError(f'{folder}: has no folder {name}; expected images and masks')
    images = _listed(folder / 'images', IMAGE_SUFFIXES)
    if len(images) != 1:
        raise CellSegError(f'{folder / "images"}: has {len(images)} images; expected one')
    image = read_picture(images[0], max_pixels=params.max_pixels)
    cells, n_empty = [], 0
    for path in _listed(folder / 'masks', MASK_SUFFIXES):
        mask = read_picture(path, max_pixels=params.max_pixels).max(axis=2) > 0
        _check_size(path, mask.shape, image.shape[:2])
        cell = _tight(Cell(number, 0, 0, mask))
        n_empty += not cell.mask.size
        cells += [cell] if cell.mask.size else []
    notes = [f'{n_empty} masks without a pixel left out'] if n_empty else []
    return Annotated(image, cells, notes)

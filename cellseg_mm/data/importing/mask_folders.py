"""One PNG a nucleus, as DSB2018 has it.

In: a folder. Out: cells of one class. Invariant: a file is one cell, or the folder is refused.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from cellseg_mm.core.errors import CellSegError, LabelMapError
from cellseg_mm.data.importing.classes import Classes
from cellseg_mm.data.importing.label_maps import cells_of, one_class
from cellseg_mm.data.importing.parts import tell_apart
from cellseg_mm.data.importing.pictures import read_grid, read_picture
from cellseg_mm.data.importing.sources import (
    IMAGE_SUFFIXES,
    Annotated,
    Cell,
    ImportParams,
    Job,
    Picture,
    Tally,
    entries,
    listed,
    unused_note,
)


def find_mask_folders(source: Path, params: ImportParams) -> tuple[list[Job], Classes, list[str]]:
    """Find folders with one image and a mask per cell; see ``import_data``."""
    number, classes = one_class(source, params)
    jobs = []
    for folder in sorted(path for path in entries(source) if path.is_dir()):
        read = partial(_read_mask_folder, folder, number, params)
        jobs.append(Job(folder.name, folder, '', read))
    return jobs, classes, unused_note(source, ())


def _read_mask_folder(folder: Path, number: int, params: ImportParams) -> Annotated:
    for name in ('images', 'masks'):
        if not (folder / name).is_dir():
            raise CellSegError(
                f'{folder}: has no folder {name}; expected images and masks; check the path'
            )
    images = listed(folder / 'images', IMAGE_SUFFIXES)
    if len(images) != 1:
        raise CellSegError(
            f'{folder / "images"}: has {len(images)} images; expected one, and its cells in masks; '
            f'for label maps choose the format label-map'
        )
    tally = Tally()
    image = read_picture(images[0], tally, max_pixels=params.max_pixels)
    tally.remarks += unused_note(folder / 'masks', IMAGE_SUFFIXES)
    cells = _read_masks(folder / 'masks', image, number, tally)
    cells = tell_apart(str(folder / 'masks'), cells, params.binary, tally)
    return Annotated(image, cells, tally)


def _read_masks(folder: Path, image: Picture, number: int, tally: Tally) -> list[Cell]:
    cells: list[Cell] = []
    for path in listed(folder, IMAGE_SUFFIXES):
        try:
            mask = read_grid(path, image.shape[:2])
        except LabelMapError as problem:
            tally.leave_out('masks that cannot be read', str(problem))
            continue
        values = np.unique(mask[mask > 0])
        if not len(values):
            tally.leave_out('masks without a pixel', path.name)
        elif len(values) > 1:
            tally.leave_out(
                'masks with more than two values (label maps need the format label-map)', path.name
            )
        else:
            cells += cells_of(mask, number)
    return cells

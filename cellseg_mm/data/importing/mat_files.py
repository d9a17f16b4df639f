"""CoNSeP's mat files: inst_map and types, as HoVer-Net's data sets (Kumar, CPM) have them.

In: ``Images/<name>.png`` and ``Labels/<name>.mat``. Out: cells. Invariant: a cell's class is what
inst_type says; where it is missing, the type that most of the cell's pixels have.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import LabelMapError
from cellseg_mm.data.importing.classes import UNNAMED, Classes, build_classes, classes_found
from cellseg_mm.data.importing.label_maps import cells_of
from cellseg_mm.data.importing.pairs import Pair, find_pairs
from cellseg_mm.data.importing.sources import Annotated, Cell, ImportParams, Job, Tally

VARIABLES = ('inst_map', 'type_map', 'inst_type')
# CoNSeP's README: types 1 to 7
NAMES = (
    'other',
    'inflammatory',
    'healthy epithelial',
    'dysplastic/malignant epithelial',
    'fibroblast',
    'muscle',
    'endothelial',
)

Variables = Mapping[str, NDArray[Any]]


def find_mat_files(source: Path, params: ImportParams) -> tuple[list[Job], Classes, list[str]]:
    """Find images with mat files; see ``import_data``."""
    pairs, notes = find_pairs(source, ('.mat',), params)
    has_types = any(_types_in(pair.table) for pair in pairs)
    classes = build_classes(params, NAMES) if has_types else classes_found(params, [UNNAMED])
    jobs = []
    for pair in pairs:
        read = partial(_read_pair, pair, classes, params)
        jobs.append(pair.job(read))
    return jobs, classes, notes


def _types_in(table: Path) -> bool:
    """Tell whether a file has types; what is wrong with it is said when it is read."""
    from scipy import io

    try:
        return any(name in VARIABLES[1:] for name, _, _ in io.whosmat(table))
    except Exception:
        return False


def _load(table: Path) -> Variables:
    from scipy import io

    try:
        found: Variables = io.loadmat(table, variable_names=VARIABLES)
    except Exception as problem:  # damaged files raise anything; 7.3 is HDF5
        hint = ' (a file of MATLAB 7.3)' if isinstance(problem, NotImplementedError) else ''
        raise LabelMapError(
            f'{table}: cannot be read{hint} ({str(problem)[:80]}); expected a MATLAB file up to '
            f'version 7 with inst_map; save it with -v7, or download it again'
        ) from problem
    if 'inst_map' not in found:
        raise LabelMapError(
            f'{table}: has no inst_map; expected a map of ids, and type_map or inst_type; check '
            f'the file'
        )
    return found


def _read_pair(pair: Pair, classes: Classes, params: ImportParams) -> Annotated:
    tally = Tally()
    image = pair.read_image(tally, params)
    variables = _load(pair.table)
    ids, image_hw = _grid(pair.table, 'inst_map', variables), image.shape[:2]
    if ids.shape != image_hw:
        raise LabelMapError(
            f'{pair.table}: inst_map has the shape {ids.shape}, the image {image_hw}; they must '
            f'match; check that both are of one image'
        )
    values = [value for value in np.unique(ids).tolist() if value]
    cells: list[Cell] = []
    for cell, name in zip(cells_of(ids, 1), _types(pair.table, variables, values), strict=True):
        if name == UNNAMED and UNNAMED not in classes.number_of:
            tally.leave_out('cells of type 0 (--class names one for them)', str(len(cells) + 1))
            continue
        number = classes.number(name, pair.table)
        if number:
            cells.append(Cell(number, cell.top, cell.left, cell.mask))
        else:
            tally.skipped[f'cells of class {name}'] += 1
    return Annotated(image, cells, tally)


def _grid(table: Path, name: str, variables: Variables) -> NDArray[np.int64]:
    values = variables[name]
    is_number = values.dtype.kind in 'buif'
    if not is_number or values.ndim != 2 or (values < 0).any() or (values % 1 != 0).any():
        raise LabelMapError(
            f'{table}: {name} holds {values.dtype} of the shape {values.shape}, or values that are '
            f'no ids; expected whole numbers from 0; check the file'
        )
    return values.astype(np.int64)


def _types(table: Path, variables: Variables, ids: list[int]) -> list[str]:
    """Return the class name of each cell, by rising id."""
    if 'inst_type' in variables:
        types = _grid(table, 'inst_type', variables).reshape(-1)
        # one entry for each id that there is, or for each number up to the largest
        known = np.array([i - 1 for i in ids if i <= len(types)], dtype=np.intp)
        chosen = types if len(types) == len(ids) else types[known]
        if len(chosen) != len(ids):
            raise LabelMapError(
                f'{table}: inst_type has {len(types)} entries, inst_map {len(ids)} cells up to id '
                f'{max(ids)}; they must match; check the file'
            )
        return [_name(value) for value in chosen.tolist()]
    if 'type_map' not in variables:
        return [UNNAMED] * len(ids)
    id_map, type_map = _grid(table, 'inst_map', variables), _grid(table, 'type_map', variables)
    if type_map.shape != id_map.shape:
        raise LabelMapError(
            f'{table}: type_map has the shape {type_map.shape}, inst_map {id_map.shape}; they must '
            f'match; check the file'
        )
    kinds = int(type_map.max(initial=0)) + 1
    votes = np.bincount(
        np.searchsorted([0, *ids], id_map.reshape(-1)) * kinds + type_map.reshape(-1),
        minlength=(len(ids) + 1) * kinds,
    ).reshape(-1, kinds)
    votes[:, 0] = 0 if kinds > 1 else votes[:, 0]
    return [_name(int(row.argmax()) if row.any() else 0) for row in votes[1:]]


def _name(number: int) -> str:
    if not number:
        return UNNAMED
    return NAMES[number - 1] if number <= len(NAMES) else f'type {number}'

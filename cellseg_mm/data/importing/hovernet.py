"""HoVer-Net's and CellViT's JSON: one outline per nucleus, with its type.

In: ``<name>.json`` of an image. Out: cells. Invariant: outlines are OpenCV's, whose points are
pixels that belong to the cell; filling them gives the mask back, but for holes, which they lack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from cellseg_mm.core.errors import CellSegError, LabelMapError
from cellseg_mm.data.importing.classes import UNNAMED, Classes, classes_found
from cellseg_mm.data.importing.pairs import Pair, find_pairs, read_json
from cellseg_mm.data.importing.shapes import Part, Ring, Shape, cells_of_shapes
from cellseg_mm.data.importing.sources import (
    Annotated,
    ImportParams,
    Job,
    Tally,
    first_of,
)

TYPE_INFO = 'type_info.json'  # HoVer-Net's table of types: {"1": ["neopla", [255, 0, 0]]}
CENTRES = 'cell_detection'  # what CellViT writes beside the outlines
SUFFIXES = ('_cells.json', '.cells.json', '.json')
MAX_OUTLINE_PX = 1e6  # longer outlines are no nuclei

Names = Mapping[str, str]


def find_hovernet(source: Path, params: ImportParams) -> tuple[list[Job], Classes, list[str]]:
    """Find images with outlines of HoVer-Net or CellViT; see ``import_data``."""
    pairs, notes = find_pairs(source, SUFFIXES, params)
    pairs = [pair for pair in pairs if pair.table.name != TYPE_INFO]
    centres = [pair.table.name for pair in pairs if pair.table.stem.endswith(CENTRES)]
    if centres:
        pairs = [pair for pair in pairs if pair.table.name not in centres]
        notes.append(
            f'{source}: files of centres without outlines were not used: {first_of(centres)}'
        )
    names: dict[str, None] = {}
    jobs = []
    tables: dict[Path, Names] = {}
    for pair in pairs:
        folder = pair.table.parent
        if folder not in tables:
            tables[folder] = _type_info(source, folder)
        names |= dict.fromkeys(_names_in(pair.table, tables[folder]))
    classes = classes_found(params, names)
    for pair in pairs:
        read = partial(_read_pair, pair, tables[pair.table.parent], classes, params)
        jobs.append(pair.job(read))
    return jobs, classes, notes


def _type_info(source: Path, folder: Path) -> Names:
    """Return the names of types by number, where HoVer-Net's table lies with the results."""
    root = source if source.is_dir() else source.parent
    for path in (folder / TYPE_INFO, root / TYPE_INFO):
        if path.exists():
            return _names_of(path, read_json(path, "HoVer-Net's type_info.json"))
    return {}


def _names_of(path: Path, content: object) -> Names:
    """Return names by number, of name by number, number by name, or name and colour by number."""
    if not isinstance(content, Mapping):
        raise CellSegError(
            f'{path}: is no table of types; expected {{"1": ["tumor", [255, 0, 0]]}}; correct it'
        )
    found = {}
    for key, value in content.items():
        first = value[0] if isinstance(value, list) and value else value
        number, name = (first, key) if isinstance(first, int) else (key, first)
        found[str(number)] = UNNAMED if str(number) == '0' else str(name)
    return found


def _names_in(table: Path, type_info: Names) -> list[str]:
    """Return the class names of a file; what is wrong with it is said when it is read."""
    try:
        return [shape.class_name for shape in _shapes(table, type_info, Tally())]
    except CellSegError:
        return []


def _read_pair(pair: Pair, type_info: Names, classes: Classes, params: ImportParams) -> Annotated:
    tally = Tally()
    image = pair.read_image(tally, params)
    shapes = list(_shapes(pair.table, type_info, tally))
    image_hw = image.shape[:2]
    cells = cells_of_shapes(shapes, classes, pair.table, image_hw, tally, first_centre=0)
    return Annotated(image, cells, tally)


def _shapes(table: Path, type_info: Names, tally: Tally) -> Iterator[Shape]:
    content = read_json(table, "HoVer-Net's or CellViT's JSON")
    found = content if isinstance(content, Mapping) else {}
    cells = found.get('nuc', found.get('cells'))
    if isinstance(cells, list):  # CellViT
        cells = {str(number): row for number, row in enumerate(cells, start=1)}
    if not isinstance(cells, Mapping):
        keys = ', '.join(map(str, found))[:80]
        raise LabelMapError(
            f'{table}: has neither nuc nor cells (its keys: {keys or "none"}); expected '
            f"HoVer-Net's or CellViT's JSON; check the file"
        )
    if 'type_map' in found:
        type_info = _names_of(table, found['type_map'])
    if isinstance(found.get('mag'), int | float):
        tally.remarks.append(
            f'outlines were found at magnification {found["mag"]:g}: they are taken as pixels of '
            f'the image'
        )
    for key, row in cells.items():
        shape = _shape(f'nucleus {key}', row, type_info)
        if shape is None:
            tally.leave_out('nuclei without an outline of numbers x, y', f'nucleus {key}')
        else:
            yield shape


def _shape(which: str, row: object, type_info: Names) -> Shape | None:
    contour = row.get('contour') if isinstance(row, Mapping) else None
    try:
        ring = np.array(contour, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    if ring.ndim != 2 or ring.shape[1] != 2 or not isinstance(row, Mapping):
        return None
    kind = row.get('type')
    number = UNNAMED if kind is None else str(kind)
    name = type_info.get(number, UNNAMED if number == '0' else number)
    return Shape(name, (Part(_with_outline(ring)),), which)


def _with_outline(ring: Ring) -> Ring:
    """Return a ring with every pixel that OpenCV's straight edges pass, so that all are vertices.

    Where a cell is one pixel wide the outline goes forth and back, which encloses nothing.
    """
    steps = np.roll(ring, -1, axis=0) - ring  # (V, 2) x, y px
    lengths = np.abs(steps).max(axis=1, initial=0)
    is_straight = (steps[:, 0] == 0) | (steps[:, 1] == 0) | (abs(steps[:, 0]) == abs(steps[:, 1]))
    if not ((ring % 1 == 0).all() and is_straight.all() and lengths.sum() < MAX_OUTLINE_PX):
        return ring
    counts = np.maximum(lengths, 1).astype(np.intp)
    start = np.repeat(np.cumsum(counts) - counts, counts)
    along = (np.arange(counts.sum()) - start)[:, None] / counts.repeat(counts)[:, None]
    filled: Ring = np.repeat(ring, counts, axis=0) + along * np.repeat(steps, counts, axis=0)
    return filled.round()

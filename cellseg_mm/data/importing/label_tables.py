"""Label maps with a table that tells each cell's class: CSV or JSON beside the label map.

In: images, label maps and tables; what this project exports (``<name>.labels.tif`` with
``<name>.cells.csv``) is one of them. Out: cells. Invariant: a cell without a row, a row without a
cell, and an id with two classes are counted; none gets a class that no row gave it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from cellseg_mm.core.errors import CellSegError, LabelMapError
from cellseg_mm.data.importing.classes import UNNAMED, Classes, classes_found, clean
from cellseg_mm.data.importing.label_maps import MaskPair, cells_of, find_mask_pairs
from cellseg_mm.data.importing.pairs import read_json
from cellseg_mm.data.importing.pictures import read_grid
from cellseg_mm.data.importing.sources import (
    MAX_TEXT_BYTES,
    Annotated,
    Cell,
    ImportParams,
    Job,
    Tally,
    composed,
    entries,
)

SUFFIXES = ('.csv', '.json')
# Columns and keys that say a cell's id and its class, the likeliest first.
IDS = ('id', 'cell', 'label', 'cell_id', 'label_id', 'instance', 'instance_id', 'index', 'object')
CLASSES = ('class', 'class_name', 'type', 'cell_type', 'category', 'phenotype', 'name')
EXPECTED = 'expected a CSV file with the columns id and class, or JSON such as {"1": "tumor"}'


def find_label_tables(source: Path, params: ImportParams) -> tuple[list[Job], Classes, list[str]]:
    """Find images with a label map and a table of classes; see ``import_data``."""
    pairs, notes = find_mask_pairs(source, 'label-table', tables=SUFFIXES)
    tables = [(pair, _tables_of(source, pair)) for pair in pairs]
    names: dict[str, None] = {}
    for _, found in tables:
        for path in found[:1]:
            names |= dict.fromkeys(_names_in(path))
    classes = classes_found(params, names)
    jobs = []
    for pair, found in tables:
        read = partial(_read_pair, pair, found, classes, params)
        jobs.append(Job(pair.name, pair.first, '', read))
    return jobs, classes, notes


def _tables_of(source: Path, pair: MaskPair) -> list[Path]:
    """Return tables named like the image or the label map, beside them or in classes."""
    stems = {composed(path.stem) for path in (*pair.images, *pair.masks)} | {pair.name}
    names = {f'{stem}{end}' for stem in stems for end in ('', '_classes', '_types', '.cells')}
    folders = [*(p.parent for p in (*pair.masks, *pair.images)), source / 'classes']
    return [
        path
        for folder in dict.fromkeys(folders)
        if folder.is_dir()
        for path in entries(folder)
        if path.suffix.lower() in SUFFIXES and composed(path.stem) in names
    ]


def _names_in(table: Path) -> list[str]:
    """Return the class names of a table; what is wrong with it is said when it is read."""
    try:
        return [name for _, name in _rows(table, Tally())]
    except CellSegError:
        return []


def _read_pair(
    pair: MaskPair, tables: list[Path], classes: Classes, params: ImportParams
) -> Annotated:
    tally = Tally()
    image = pair.read_image(tally, params)
    if len(tables) != 1:
        raise CellSegError(
            f'{pair.masks[0]}: has {len(tables)} tables of classes '
            f'({" and ".join(map(str, tables)) or "none"}); expected one; name it '
            f'{pair.name}_classes.csv or {pair.name}_classes.json'
        )
    ids = read_grid(pair.masks[0], image.shape[:2])
    name_of = _name_of(tables[0], tally)
    cells = []
    values = sorted(set(ids[ids > 0].tolist()))
    for value, cell in zip(values, cells_of(ids, 1), strict=True):
        number = _number_of(value, name_of, classes, tables[0], tally)
        if number:
            cells.append(Cell(number, cell.top, cell.left, cell.mask))
    for value in sorted(name_of.keys() - set(values)):
        tally.leave_out('rows whose id the label map has not', str(value))
    return Annotated(image, cells, tally)


def _number_of(
    value: int, name_of: Mapping[int, str], classes: Classes, table: Path, tally: Tally
) -> int:
    """Return the class of a cell, or count why it has none, and return 0."""
    name = name_of.get(value, UNNAMED)
    if name == UNNAMED and UNNAMED not in classes.number_of:
        tally.leave_out('cells without a class (--class names one for them)', str(value))
        return 0
    number = classes.number(name, table)
    if not number:
        tally.skipped[f'cells of class {name or "without name"}'] += 1
    return number


def _name_of(table: Path, tally: Tally) -> dict[int, str]:
    """Return the class name by id; ids with two different classes have none."""
    name_of: dict[int, str] = {}
    torn: set[int] = set()
    for value, name in _rows(table, tally):
        if name_of.setdefault(value, name) != name:
            torn.add(value)
    for value in sorted(torn):
        tally.leave_out('ids with several classes', str(value))
        name_of[value] = UNNAMED
    return name_of


# ---- tables ----


def _rows(table: Path, tally: Tally) -> Iterator[tuple[int, str]]:
    """Yield id and class name of each row.

    Raises:
        LabelMapError: It is no such table.
    """
    pairs = _json_pairs(table) if table.suffix.lower() == '.json' else _csv_pairs(table)
    for key, name in pairs:
        text = str(key).strip()
        text = text.removesuffix('.0')  # pandas writes whole numbers so where some are missing
        if text.isascii() and text.isdecimal() and int(text) > 0:
            yield int(text), clean(str(name if name is not None else ''))
        elif text != '0':  # background
            tally.leave_out('rows whose id is no whole number', text[:40] or 'an empty one')


def _csv_pairs(table: Path) -> Iterator[tuple[object, object]]:
    try:
        if table.stat().st_size > MAX_TEXT_BYTES:
            raise LabelMapError(f'{table}: is larger than 2 GiB; {EXPECTED}; split it')
        text = table.read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as problem:
        raise LabelMapError(
            f'{table}: cannot be read ({problem}); {EXPECTED} (UTF-8); save it again'
        ) from problem
    first = text.partition('\n')[0]
    separator = max(',;\t', key=first.count)  # spreadsheets of many countries write semicolons
    reader = csv.DictReader(io.StringIO(text), delimiter=separator)
    columns = list(reader.fieldnames or [])
    id_key, class_key = _key(columns, IDS), _key(columns, CLASSES)
    if not (id_key and class_key):
        raise LabelMapError(f'{table}: has the columns {columns}; {EXPECTED}; rename the columns')
    for row in reader:
        yield row[id_key], row[class_key]


def _json_pairs(table: Path) -> Iterator[tuple[object, object]]:
    content = read_json(table, 'a table of classes')
    if isinstance(content, dict) and not any(str(key).isdecimal() for key in content):
        lists = [value for value in content.values() if isinstance(value, list | dict)]
        content = lists[0] if len(lists) == 1 else content  # {"cells": ...}
    if isinstance(content, dict):
        for key, value in content.items():
            yield key, value[_key(value, CLASSES)] if _has_class(value) else value
    elif isinstance(content, list) and all(_has_class(row) and _key(row, IDS) for row in content):
        for row in content:
            yield row[_key(row, IDS)], row[_key(row, CLASSES)]
    else:
        raise LabelMapError(f'{table}: is no table of classes; {EXPECTED}; correct it')


def _has_class(row: object) -> bool:
    return isinstance(row, dict) and bool(_key(row, CLASSES))


def _key(keys: Iterable[object], wanted: tuple[str, ...]) -> str:
    """Return the key that is one of the wanted words, capitals aside; '' if none is."""
    by_fold = {str(key).strip().casefold(): str(key) for key in keys}
    return next((by_fold[word] for word in wanted if word in by_fold), '')

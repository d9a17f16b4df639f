"""What a data folder says of its imports: the classes' names, and the table of cases.

In: import.json and manifest.csv. Out: the same with what a new import adds. Invariant: a class's
number means one name in a folder, and what other tools noted of a case stays.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from cellseg_mm.core.errors import CellSegError
from cellseg_mm.core.files import write_text
from cellseg_mm.data.importing.sources import ImportParams

CLASSES_FILE = 'import.json'  # what class 1, 2, ... of a folder mean


def imported_classes(data_dir: Path | str) -> tuple[str, ...]:
    """Return the classes of earlier imports into a data folder; () if there were none.

    Raises:
        CellSegError: Their file is damaged.
    """
    path = Path(data_dir) / CLASSES_FILE
    if not path.exists():
        return ()
    try:
        return tuple(map(str, json.loads(path.read_bytes())['classes']))
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise CellSegError(
            f'{path}: cannot be read ({problem}); expected the classes of earlier imports; remove '
            f'it if you know them'
        ) from problem


def require_same_classes(out_dir: Path, names: Sequence[str], params: ImportParams) -> None:
    """Refuse to add other classes to a folder in which their numbers mean something else."""
    before = imported_classes(out_dir)
    if params.add and not before and not params.class_names:
        raise CellSegError(
            f'--add: {out_dir} does not say what its class1.tif, class2.tif, ... are; expected '
            '--classes with their names in this order'
        )
    if before and before != tuple(names):
        raise CellSegError(
            f'{out_dir / CLASSES_FILE}: the folder has the classes {", ".join(before)}, this '
            f'import {", ".join(names)}; expected the same in the same order; give them with '
            f'--classes, or choose another folder'
        )


def columns_of(n_classes: int) -> list[str]:
    """Return the columns of a table that imports make."""
    counts = [f'c{k}' for k in range(1, n_classes + 1)]
    return ['uuid', 'height', 'width', *counts, 'patient', 'source', 'lost_px']


def read_manifest(
    path: Path, columns: list[str], *, is_others: bool
) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Return the columns of the table, and the rows of an existing one by case name.

    Args:
        path: The table, perhaps not there.
        columns: Of a table that imports make.
        is_others: Another tool's table will do, if its column ``uuid`` names cases.

    Raises:
        CellSegError: It has other columns.
    """
    if not path.exists():
        return columns, {}
    reader = csv.DictReader(io.StringIO(path.read_text(encoding='utf-8')))
    found = list(reader.fieldnames or ())
    if found != columns and not (is_others and 'uuid' in found):
        raise CellSegError(
            f'{path}: has the columns {found}, expected {columns}; import into another folder, '
            f'or with the same --classes as before'
        )
    return found, {row['uuid']: row for row in reader}


def write_manifest(path: Path, columns: list[str], table: Mapping[str, dict[str, str]]) -> None:
    """Write the table, sorted by name; what has no column in it is left out."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, extrasaction='ignore', lineterminator='\n')
    writer.writeheader()
    writer.writerows(table[name] for name in sorted(table))
    write_text(path, stream.getvalue())

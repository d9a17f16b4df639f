"""YOLO's data sets of outlines, as Ultralytics and Roboflow write them.

In: a folder with ``images`` and ``labels`` (or ``train/images`` ...) and ``data.yaml``, or that
file. Out: cells. Invariant: a class number without a name in the file is counted, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from cellseg_mm.core.errors import CellSegError, LabelMapError
from cellseg_mm.data.importing.classes import Classes, build_classes, classes_found
from cellseg_mm.data.importing.pairs import PICTURES
from cellseg_mm.data.importing.pictures import read_picture
from cellseg_mm.data.importing.shapes import Part, Shape, cells_of_shapes
from cellseg_mm.data.importing.sources import (
    MAX_TEXT_BYTES,
    Annotated,
    ImportParams,
    Job,
    Tally,
    composed,
    entries,
    first_of,
    listed,
)

Names = Mapping[int, str]


def find_yolo(source: Path, params: ImportParams) -> tuple[list[Job], Classes, list[str]]:
    """Find the images of a YOLO data set; see ``import_data``."""
    root = source.parent if source.is_file() else source
    tables = [source] if source.is_file() else listed(root, ('.yaml', '.yml'))
    names = next((found for table in tables if (found := _read_names(table))), {})
    images, labels = _find_files(root)
    if names:
        own = list(dict.fromkeys(names[k] for k in sorted(names)))
        classes = build_classes(params, own, found=own, is_fixed=False)
    else:
        rows = (row for path in labels.values() for row in _rows(path, Tally()))
        classes = classes_found(params, dict.fromkeys(str(number) for number, _, _ in rows))
    jobs = []
    for key in sorted(labels, key=str):
        read = partial(_read_pair, labels[key], images.get(key, ()), names, classes, params)
        jobs.append(Job(composed(key.name), labels[key], '', read, _split(key, root)))
    idle = sorted(path.name for key in images.keys() - labels.keys() for path in images[key])
    notes = [
        f'{root}: {len(idle)} images without a file of labels were not used ({first_of(idle)}); an '
        f'empty file says that there is no cell'
    ]
    return jobs, classes, notes if idle else []


def _find_files(root: Path) -> tuple[dict[Path, list[Path]], dict[Path, Path]]:
    """Return images and files of labels by the path of the image without its suffix."""
    folders = [root, *(path for path in entries(root) if path.is_dir())]
    images: dict[Path, list[Path]] = {}
    labels: dict[Path, Path] = {}
    for folder in folders:
        if (folder / 'images').is_dir():
            for path in listed(folder / 'images', PICTURES, deep=True):
                images.setdefault(path.with_suffix(''), []).append(path)
        if (folder / 'labels').is_dir():
            for path in listed(folder / 'labels', ('.txt',), deep=True):
                inner = path.relative_to(folder / 'labels').with_suffix('')
                labels[folder / 'images' / inner] = path
    return images, labels


def _split(key: Path, root: Path) -> str:
    """Return train, val ...: the folder around or inside ``images``."""
    inner = [part for part in key.relative_to(root).parent.parts if part != 'images']
    return '_'.join(inner)


def _read_names(table: Path) -> Names:
    """Return the names by class number; none if the file has no such list."""
    try:
        import yaml
    except ImportError as problem:
        raise CellSegError(
            f'{table}: PyYAML is not installed; expected it to read the names of classes; install '
            f'pyyaml'
        ) from problem
    try:
        content = yaml.safe_load(table.read_bytes()[: 1 << 20])
    except (OSError, yaml.YAMLError, RecursionError, ValueError) as problem:
        raise CellSegError(
            f'{table}: cannot be read ({str(problem)[:80]}); expected data.yaml with names; '
            f'correct it'
        ) from problem
    names = content.get('names') if isinstance(content, dict) else None
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict):
        return {}
    return {int(key): str(name) for key, name in names.items() if str(key).isdecimal()}


def _read_pair(
    label: Path, images: Sequence[Path], names: Names, classes: Classes, params: ImportParams
) -> Annotated:
    if len(images) != 1:
        found = ' and '.join(map(str, images)) or 'none'
        raise CellSegError(
            f'{label}: has {len(images)} images ({found}); expected one of its name in images; add '
            f'it, or remove this'
        )
    tally = Tally()
    image = read_picture(images[0], tally, max_pixels=params.max_pixels)
    scale = np.array(image.shape[1::-1], dtype=np.float64)
    shapes = []
    seen: set[tuple[float, ...]] = set()
    for number, values, which in _rows(label, tally):
        if (number, *values) in seen:
            tally.leave_out('rows that occur twice', which)
        elif names and number not in names:
            tally.leave_out('rows of classes that data.yaml does not name', f'{which}: {number}')
        else:
            seen.add((number, *values))
            ring = np.array(values, dtype=np.float64).reshape(-1, 2) * scale
            shapes.append(Shape(names.get(number, str(number)), (Part(ring),), which))
    return Annotated(image, cells_of_shapes(shapes, classes, label, image.shape[:2], tally), tally)


def _rows(label: Path, tally: Tally) -> list[tuple[int, list[float], str]]:
    """Return class number, coordinates and line of each outline; other rows are counted."""
    try:
        if label.stat().st_size > MAX_TEXT_BYTES:
            raise LabelMapError(f'{label}: is larger than 2 GiB; expected one image; split it')
        lines = label.read_text(encoding='utf-8', errors='replace').splitlines()
    except OSError as problem:
        raise LabelMapError(
            f'{label}: cannot be read ({problem.strerror}); expected rows of labels; check it'
        ) from problem
    rows = []
    for number, line in enumerate(lines, start=1):
        which = f'line {number}'
        try:
            values = [float(word) for word in line.split()]
        except ValueError:
            values = [math.nan]
        fault = _fault(values) if values else ''
        if fault:
            tally.leave_out(fault, which)
        elif values:
            rows.append((int(values[0]), values[1:], which))
    return rows


def _fault(values: list[float]) -> str:
    """Say why a row is no outline; '' if it is one."""
    if not all(map(math.isfinite, values)) or values[0] < 0 or values[0] % 1:
        return 'rows that are no class number and numbers'
    if len(values) == 5:
        return 'boxes (a box alone is no cell)'
    if len(values) < 7 or len(values) % 2 == 0:
        return 'rows without pairs of x and y for 3 points or more'
    if not all(-0.5 <= value <= 1.5 for value in values[1:]):
        return 'rows with coordinates far outside 0 to 1 (expected fractions of the image)'
    return ''

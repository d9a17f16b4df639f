"""Run lengths in a CSV file, as the Data Science Bowl of 2018 has them: ImageId, EncodedPixels.

In: a CSV file and its images. Out: cells of one class. Invariant: runs count from 1, down the
columns; a row is one cell, or is counted by its reason.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from cellseg_mm.core.errors import CellSegError, ImageError
from cellseg_mm.data.importing.classes import Classes
from cellseg_mm.data.importing.coco_shapes import UnusableError, coco_cell
from cellseg_mm.data.importing.label_maps import one_class
from cellseg_mm.data.importing.parts import tell_apart
from cellseg_mm.data.importing.pictures import read_picture
from cellseg_mm.data.importing.sources import (
    IMAGE_SUFFIXES,
    MAX_TEXT_BYTES,
    Annotated,
    Cell,
    ImportParams,
    Job,
    Tally,
    composed,
)

COLUMNS = ('ImageId', 'EncodedPixels')
EXPECTED = f'expected a CSV file with the columns {" and ".join(COLUMNS)}'

Row = Mapping[str, str]


def find_run_lengths(source: Path, params: ImportParams) -> tuple[list[Job], Classes, list[str]]:
    """Find the images of a CSV file of run lengths; see ``import_data``."""
    number, classes = one_class(source, params)
    folder = params.image_dir or source.parent
    if not folder.is_dir():
        raise CellSegError(f'--images {folder}: is no folder; expected one; correct it')
    by_image: dict[str, list[tuple[int, Row]]] = {}
    for line, row in enumerate(_rows(source), start=2):
        by_image.setdefault(composed(row['ImageId'] or ''), []).append((line, row))
    images: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob('*')):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.parent.name != 'masks':
            images.setdefault(composed(path.stem), []).append(path)
    jobs = []
    for image_id, rows in sorted(by_image.items()):
        name = PurePosixPath(image_id).stem if image_id.endswith(IMAGE_SUFFIXES) else image_id
        read = partial(_read_rows, source, image_id, images.get(name, []), rows, number, params)
        jobs.append(Job(name, source.parent / (name or '?'), '', read))
    return jobs, classes, []


def _rows(source: Path) -> Sequence[Row]:
    try:
        if source.stat().st_size > MAX_TEXT_BYTES:
            raise CellSegError(f'{source}: is larger than 2 GiB; {EXPECTED}; split it')
        reader = csv.DictReader(io.StringIO(source.read_text(encoding='utf-8-sig')))
        columns = list(reader.fieldnames or [])
        rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise CellSegError(
            f'{source}: cannot be read ({str(problem)[:80]}); {EXPECTED}; check the path'
        ) from problem
    if not set(COLUMNS) <= set(columns):
        raise CellSegError(f'{source}: has the columns {columns[:8]}; {EXPECTED}; check the file')
    return rows


def _read_rows(
    source: Path,
    image_id: str,
    images: Sequence[Path],
    rows: Sequence[tuple[int, Row]],
    number: int,
    params: ImportParams,
) -> Annotated:
    if len(images) != 1:
        found = ' and '.join(map(str, images)) or 'none'
        raise CellSegError(
            f'{source}: has {len(images)} images of the name {image_id!r} ({found}); expected one; '
            f'name the folder of images with --images'
        )
    tally = Tally()
    image = read_picture(images[0], tally, max_pixels=params.max_pixels)
    image_hw = image.shape[0], image.shape[1]
    cells: list[Cell] = []
    seen: set[str] = set()
    for line, row in rows:
        _check_size(source, line, row, image_hw)
        text = ' '.join((row['EncodedPixels'] or '').split())
        if row.get('Usage') == 'Ignored':  # in the bowl's stage1_solution.csv
            tally.skipped['rows that the file says to ignore'] += 1
        elif text in seen and text:
            tally.leave_out('rows that occur twice', f'line {line}')
        elif text:  # an image without cells has one row without runs
            seen.add(text)
            _add_cell(cells, text, f'line {line}', number, image_hw, tally)
    return Annotated(image, tell_apart(str(source), cells, params.binary, tally, least=4), tally)


def _check_size(source: Path, line: int, row: Row, image_hw: tuple[int, int]) -> None:
    stated = (row.get('Height') or ''), (row.get('Width') or '')
    if all(stated) and stated != (str(image_hw[0]), str(image_hw[1])):
        raise ImageError(
            f'{source}: line {line} says {stated[0]} x {stated[1]} px, the image is '
            f'{image_hw[0]} x {image_hw[1]} px; they must match; name the right folder with '
            f'--images'
        )


def _add_cell(
    cells: list[Cell],
    text: str,
    which: str,
    number: int,
    image_hw: tuple[int, int],
    tally: Tally,
) -> None:
    try:
        counts = _counts(text, math.prod(image_hw))
        cell, _ = coco_cell({'size': list(image_hw), 'counts': counts}, number, image_hw)
    except UnusableError as problem:
        tally.leave_out(str(problem), which)
    else:
        cells.append(cell)


def _counts(text: str, n_px: int) -> list[int]:
    """Return COCO's run lengths (background, cell, background, ...) of starts and lengths."""
    words = text.split(' ')
    if not all(word.isascii() and word.isdecimal() and len(word) < 19 for word in words):
        raise UnusableError('runs that are no whole numbers')
    if len(words) % 2:
        raise UnusableError('runs with an odd number of values (cut off?)')
    starts, lengths = np.array(words, dtype=np.int64).reshape(-1, 2).T
    order = np.argsort(starts, kind='stable')
    starts, ends = starts[order] - 1, (starts + lengths - 1)[order]
    if starts[0] < 0 or ends.max() > n_px:
        raise UnusableError('runs that leave the image (they count from 1)')
    if (starts[1:] < ends[:-1]).any():
        raise UnusableError('runs that overlap')
    edges = np.stack([starts, ends], axis=1).reshape(-1)
    return [int(n) for n in np.diff(np.concatenate([[0], edges, [n_px]]))]

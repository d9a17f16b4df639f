"""Labelme's JSON: one file an image, with polygons, circles, rectangles and masks.

In: ``<name>.json`` beside an image. Out: cells. Invariant: shapes of one label and ``group_id`` are
one cell, as Labelme's own converters take them.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from cellseg_mm.core.errors import LabelMapError
from cellseg_mm.data.importing.classes import UNNAMED, Classes, classes_found
from cellseg_mm.data.importing.pairs import Pair, find_pairs, read_json
from cellseg_mm.data.importing.shapes import (
    Part,
    Ring,
    Shape,
    cells_of_shapes,
    ellipse,
    grouped,
    ring_of,
)
from cellseg_mm.data.importing.sources import Annotated, ImportParams, Job, Mask, Tally

EXPECTED = "Labelme's JSON"
Row = Mapping[str, object]


def find_labelme(source: Path, params: ImportParams) -> tuple[list[Job], Classes, list[str]]:
    """Find images with Labelme's shapes; see ``import_data``."""
    pairs, notes = find_pairs(source, ('.json',), params)
    names: dict[str, None] = {}
    for pair in pairs:
        try:
            names |= dict.fromkeys(_label(row) for row in _rows(_content(pair.table), Tally()))
        except LabelMapError:
            continue  # said when it is read
    classes = classes_found(params, names)
    jobs = []
    for pair in pairs:
        read = partial(_read_pair, pair, classes, params)
        jobs.append(pair.job(read))
    return jobs, classes, notes


def _read_pair(pair: Pair, classes: Classes, params: ImportParams) -> Annotated:
    tally = Tally()
    content = _content(pair.table)
    image = pair.read_image(tally, params)
    stated = content.get('imageHeight'), content.get('imageWidth')
    if None not in stated and stated != image.shape[:2]:
        raise LabelMapError(
            f'{pair.table}: is of an image of {stated[0]} x {stated[1]} px, {pair.images[0].name} '
            f'has {image.shape[0]} x {image.shape[1]} px; they must match; name the right folder '
            f'with --images'
        )
    found = []
    for number, row in enumerate(_rows(content, tally), start=1):
        shape = _shape(row, f'shape {number}', math.prod(image.shape[:2]), tally)
        if shape is not None:
            found.append((row.get('group_id'), shape))
    cells = cells_of_shapes(grouped(found), classes, pair.table, image.shape[:2], tally)
    return Annotated(image, cells, tally)


def _content(table: Path) -> Row:
    content = read_json(table, EXPECTED)
    if not isinstance(content, dict) or not isinstance(content.get('shapes'), list):
        raise LabelMapError(
            f'{table}: has no list of shapes; expected {EXPECTED}; save it again, or move it away'
        )
    return content


def _rows(content: Row, tally: Tally) -> list[Row]:
    shapes = content['shapes']
    rows = shapes if isinstance(shapes, list) else []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            tally.leave_out('shapes that are no objects', f'shape {number}')
    return [row for row in rows if isinstance(row, dict)]


def _label(row: Row) -> str:
    label = row.get('label')
    return label if isinstance(label, str) else UNNAMED


def _shape(row: Row, which: str, max_pixels: int, tally: Tally) -> Shape | None:
    """Return a shape with an area, or count why it is none."""
    points = ring_of(row.get('points'))
    kind = row.get('shape_type') or 'polygon'
    if kind == 'mask':
        crop = _mask(row.get('mask'), max_pixels)
        if crop is None or len(points) < 1 or not np.isfinite(points).all():
            tally.leave_out('masks that cannot be read', which)
            return None
        left, top = np.clip(points[0], -1e6, 1e6).astype(int).tolist()
        return Shape(_label(row), (), which, ((top, left, crop),))
    ring = _ring(str(kind), points)
    if ring is None:
        tally.leave_out('shapes that are no areas (points, lines)', which)
        return None
    return Shape(_label(row), (Part(ring),), which)


def _ring(kind: str, points: Ring) -> Ring | None:
    """Return the outline of a shape; None if it is no area."""
    if kind == 'polygon':
        return points
    if kind == 'rectangle' and len(points) == 2:
        (x0, y0), (x1, y1) = points
        return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    if kind == 'circle' and len(points) == 2:
        radius = float(np.hypot(*(points[1] - points[0])))
        return ellipse(points[0].tolist(), (radius, radius))
    return points if kind == 'oriented_rectangle' else None


def _mask(text: object, max_pixels: int) -> Mask | None:
    """Return a mask stored as a PNG in base64; None if it is none, or larger than the image."""
    try:
        content = base64.b64decode(text if isinstance(text, str) else '', validate=True)
        with Image.open(io.BytesIO(content), formats=('PNG',)) as picture:
            if math.prod(picture.size) > max_pixels:
                return None
            values = np.asarray(picture)
    except (binascii.Error, ValueError, OSError, SyntaxError, Image.DecompressionBombError):
        return None
    return values > 0 if values.ndim == 2 else None

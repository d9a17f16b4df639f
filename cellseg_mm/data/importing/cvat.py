"""CVAT's XML "for images 1.1": polygons, ellipses and masks of many images in one file.

In: the XML file, or the folder that it lies in as ``annotations.xml``. Out: cells. Invariant:
shapes of one label and group are one cell, as CVAT's own converters take them; a path never leaves
the folder of images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from xml.parsers import expat

import numpy as np

from cellseg_mm.core.errors import CellSegError, ImageError, LabelMapError
from cellseg_mm.data.importing.classes import Classes, classes_found, clean
from cellseg_mm.data.importing.pictures import read_picture
from cellseg_mm.data.importing.shapes import (
    Part,
    Shape,
    cells_of_shapes,
    ellipse,
    grouped,
    ring_of,
)
from cellseg_mm.data.importing.sources import (
    MAX_TEXT_BYTES,
    Annotated,
    ImportParams,
    Job,
    Mask,
    Tally,
    composed,
)
from cellseg_mm.data.tiff import size_text

AREAS = ('polygon', 'ellipse', 'mask')
OTHERS = ('box', 'polyline', 'points', 'cuboid', 'skeleton', 'tag')
EXPECTED = 'the XML of "CVAT for images 1.1"'
Attributes = Mapping[str, str]


@dataclass(slots=True)
class _Entry:
    """An image of the file and its shapes: kind and attributes."""

    attributes: Attributes
    shapes: list[tuple[str, Attributes]] = field(default_factory=list)


def find_cvat(source: Path, params: ImportParams) -> tuple[list[Job], Classes, list[str]]:
    """Find the images of a CVAT file; see ``import_data``."""
    table = source / 'annotations.xml' if source.is_dir() else source
    content = _read_cvat(table)
    used = {clean(row.get('label', '')) for e in content.entries for kind, row in e.shapes}
    names = dict.fromkeys([*content.labels, *sorted(used)])
    classes = classes_found(params, names)
    folder = params.image_dir or table.parent
    jobs = []
    for entry in content.entries:
        path = PurePosixPath(composed(entry.attributes.get('name', '')).replace('\\', '/'))
        read = partial(_read_image, entry, table, folder, classes, params)
        jobs.append(Job(path.stem, Path(path), '', read, str(path.parent).strip('./')))
    return jobs, classes, []


def _read_image(
    entry: _Entry, table: Path, folder: Path, classes: Classes, params: ImportParams
) -> Annotated:
    tally = Tally()
    path = _image_path(entry.attributes.get('name', ''), table, folder)
    image = read_picture(path, tally, max_pixels=params.max_pixels)
    image_hw = image.shape[0], image.shape[1]
    stated = tuple(entry.attributes.get(key) for key in ('height', 'width'))
    if None not in stated and stated != tuple(map(str, image_hw)):
        raise ImageError(
            f'{path}: the image is {size_text(image_hw)}, {table} says {stated[0]} x {stated[1]}; '
            f'they must match; name the right folder with --images'
        )
    found = []
    for number, (kind, row) in enumerate(entry.shapes, start=1):
        shape = _shape(kind, row, f'{kind} {number}', math.prod(image_hw), tally)
        if shape is not None:
            found.append((row.get('group_id'), shape))
    cells = cells_of_shapes(grouped(found), classes, table, image_hw, tally)
    return Annotated(image, cells, tally)


def _image_path(name: str, table: Path, folder: Path) -> Path:
    root = folder.resolve()
    name = composed(name).replace('\\', '/')
    alone = PurePosixPath(name).name
    places = [root / name, root / 'images' / name, root / alone, root / 'images' / alone]
    for place in places if alone and '\0' not in name else []:
        path = place.resolve()
        if path.is_relative_to(root) and path.is_file():
            return path
    raise ImageError(
        f'{table}: the image {name!r} is not in {folder}; expected it there or in its folder '
        f'images; name the folder of images with --images'
    )


def _shape(kind: str, row: Attributes, which: str, max_pixels: int, tally: Tally) -> Shape | None:
    """Return a shape with an area, or count why it is none."""
    label = row.get('label', '')
    try:
        if kind == 'polygon':
            pairs = [point.split(',') for point in row.get('points', '').split(';')]
            return Shape(label, (Part(ring_of(pairs)),), which)
        if kind == 'ellipse':
            x, y, width, height, turn = (
                float(row.get(key, '0' if key == 'rotation' else ''))
                for key in ('cx', 'cy', 'rx', 'ry', 'rotation')
            )
            return Shape(label, (Part(ellipse((x, y), (width, height), turn)),), which)
        if kind == 'mask':
            top, left = int(row.get('top', '')), int(row.get('left', ''))
            return Shape(label, (), which, ((top, left, _mask(row, max_pixels)),))
    except (ValueError, OverflowError):
        tally.leave_out(f'shapes of broken numbers ({kind})', which)
        return None
    tally.leave_out('shapes that are no areas (boxes, lines, points, tags)', which)
    return None


def _mask(row: Attributes, max_pixels: int) -> Mask:
    """Return a mask of run lengths, row by row from background on.

    Raises:
        ValueError: The runs do not fill the mask, or it is larger than the image.
    """
    width, height = int(row.get('width', '')), int(row.get('height', ''))
    runs = np.array([int(word) for word in row.get('rle', '').split(',')], dtype=np.int64)
    is_sound = width > 0 and height > 0 and width * height <= max_pixels and (runs >= 0).all()
    if not is_sound or runs.sum() != width * height:
        raise ValueError('runs')
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)


# ---- the file ----


def _read_cvat(table: Path) -> _CvatReader:
    reader = _CvatReader(table)
    try:
        if table.stat().st_size > MAX_TEXT_BYTES:
            raise LabelMapError(f'{table}: is larger than 2 GiB; expected {EXPECTED}; split it')
        with table.open('rb') as stream:
            reader.parser.ParseFile(stream)
    except (expat.ExpatError, LookupError) as problem:
        raise LabelMapError(
            f'{table}: not valid XML ({problem}); expected {EXPECTED}; export it again'
        ) from problem
    except OSError as problem:
        raise LabelMapError(
            f'{table}: cannot be read ({problem.strerror}); expected {EXPECTED}; check the path'
        ) from problem
    if not reader.entries:
        raise LabelMapError(f'{table}: has no image; expected {EXPECTED}; export it again')
    return reader


class _CvatReader:
    """Collects images and shapes while the file streams by; refuses document types and videos."""

    def __init__(self, table: Path) -> None:
        self.table = table
        self.entries: list[_Entry] = []
        self.labels: list[str] = []
        self._path: list[str] = []
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartDoctypeDeclHandler = self._refuse
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._text

    def _refuse(self, *_: object) -> None:
        raise LabelMapError(
            f'{self.table}: has a DOCTYPE, which is not accepted; expected {EXPECTED}; remove it'
        )

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self._path.append(tag)
        if tag == 'track':
            raise CellSegError(
                f'{self.table}: has tracks of a video; expected {EXPECTED}; export it in that form'
            )
        if tag == 'image':
            self.entries.append(_Entry(attributes))
        elif tag in (*AREAS, *OTHERS) and self._path[-2:-1] == ['image']:
            self.entries[-1].shapes.append((tag, attributes))

    def _end(self, tag: str) -> None:
        self._path.pop()

    def _text(self, text: str) -> None:
        if self._path[-2:] == ['label', 'name'] and clean(text):
            self.labels.append(clean(text))

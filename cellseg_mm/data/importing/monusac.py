"""MoNuSAC's own files: folders of patients with Aperio XML outlines.

In: a folder. Out: regions. Invariant: a region of unknown class is never dropped in silence.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import CellSegError, LabelMapError
from cellseg_mm.data.config import CLASS_NAMES
from cellseg_mm.data.importing.sources import (
    MAX_TEXT_BYTES,
    Annotated,
    Cell,
    Classes,
    ImportParams,
    Job,
    Mask,
    _listed,
    read_picture,
)

AMBIGUOUS = 'ambiguous'  # MoNuSAC's name for areas that its scoring leaves out


def fill_polygon(
    vertices_xy: NDArray[np.float64], image_hw: Sequence[int]
) -> tuple[int, int, Mask]:
    """Rasterise one polygon.

    A pixel belongs to the polygon if the point (column, row) is inside by the even-odd rule, on its
    outline, or a vertex; a line that is drawn forth and back encloses nothing. This is the rule of
    MoNuSAC's own scripts, which call ``skimage.draw.polygon``; compared on random polygons.

    Args:
        vertices_xy: (V, 2) float64, px; closed implicitly.
        image_hw: Height and width; what is outside is cut off.

    Returns:
        Row and column of the crop, and its (h, w) bool mask; (0, 0) if no pixel is inside.
    """
    low = np.maximum(np.ceil(vertices_xy.min(axis=0)), 0).astype(int)
    high = np.minimum(np.floor(vertices_xy.max(axis=0)), np.array(image_hw[::-1]) - 1).astype(int)
    if (high < low).any():
        return 0, 0, np.zeros((0, 0), dtype=bool)
    xs = np.arange(low[0], high[0] + 1, dtype=np.float64)
    # Parity of the edges to the right and to the left of each point. The two differ for points on
    # the outline only: an edge through the point counts for neither side.
    right = np.zeros((high[1] - low[1] + 1, len(xs)), dtype=bool)
    left = np.zeros_like(right)
    for (x0, y0), (x1, y1) in zip(vertices_xy, np.roll(vertices_xy, -1, axis=0), strict=True):
        first, last = max(math.ceil(min(y0, y1)), low[1]), min(math.floor(max(y0, y1)), high[1])
        if first <= last and y0 != y1:
            ys = np.arange(first, last + 1, dtype=np.float64)[:, None]
            rows = slice(first - low[1], last - low[1] + 1)
            side = ((xs - x0) * (y1 - y0) - (ys - y0) * (x1 - x0)) * np.sign(y1 - y0)
            right[rows] ^= ((y0 > ys) != (y1 > ys)) & (side < 0)
            left[rows] ^= ((y0 < ys) != (y1 < ys)) & (side > 0)
    inside = right | left
    corners = vertices_xy[(vertices_xy % 1 == 0).all(axis=1)].astype(int) - low
    corners = corners[((corners >= 0) & (corners <= high - low)).all(axis=1)]
    inside[corners[:, 1], corners[:, 0]] = True
    return int(low[1]), int(low[0]), inside


@dataclass(slots=True)
class Region:
    """One outline of an Aperio file: class name, whether it is a hole, and its vertices."""

    class_name: str
    is_negative: bool
    vertices_xy: list[tuple[float, float]]


def _find_monusac(source: Path, params: ImportParams) -> tuple[list[Job], Classes]:
    classes = Classes.from_params(params, CLASS_NAMES, [AMBIGUOUS])
    jobs = []
    by_stem: dict[Path, list[Path]] = {}
    for path in _listed(source, ('.svs', '.tif', '.tiff', '.xml'), deep=True):
        by_stem.setdefault(path.with_suffix(''), []).append(path)
    for stem, paths in sorted(by_stem.items()):
        images = [path for path in paths if path.suffix.lower() != '.xml']
        tables = [path for path in paths if path.suffix.lower() == '.xml']
        # The distribution has both; the TIFF needs no slide reader and holds the same pixels.
        images.sort(key=lambda path: path.suffix.lower() == '.svs')
        patient = stem.parent.name if stem.parent != source else ''
        read = partial(_read_monusac, stem, images, tables, classes, params)
        jobs.append(Job(stem.name, (images or tables)[0], patient, read))
    return jobs, classes


def _read_monusac(
    stem: Path, images: list[Path], tables: list[Path], classes: Classes, params: ImportParams
) -> Annotated:
    if not images or not tables:
        found = (images or tables)[0]
        missing = 'no .xml with its outlines' if images else 'no .tif or .svs image'
        raise CellSegError(f'{found}: there is {missing} beside it; add {stem.name} or remove this')
    image = read_picture(images[0], max_pixels=params.max_pixels)
    cells: list[Cell] = []
    left_out: Counter[str] = Counter()
    for region in read_aperio_xml(tables[0]):
        number = classes.number(region.class_name, tables[0])
        if region.is_negative:
            left_out['outlines marked as negative'] += 1
        elif not number:
            left_out[f'outlines of class {region.class_name}'] += 1
        elif len(region.vertices_xy) < 3:
            left_out['outlines with fewer than 3 vertices'] += 1
        else:
            top, left, mask = fill_polygon(np.array(region.vertices_xy), image.shape[:2])
            if mask.any():
                cells.append(Cell(number, top, left, mask))
            else:
                left_out['outlines without a pixel in the image'] += 1
    notes = [f'{n} {what} left out' for what, n in sorted(left_out.items())]
    return Annotated(image, cells, notes)


def read_aperio_xml(path: Path) -> list[Region]:
    """Read the outlines of an Aperio ImageScope file; the class is the annotation's attribute.

    Raises:
        LabelMapError: The file is unreadable, no such XML, has a document type (which could
            reach other files or grow without bound), or holds a vertex that is no number.
    """
    reader = _AperioReader(path)
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise LabelMapError(f'{path}: is larger than 2 GiB; expected the outlines of one image')
        with path.open('rb') as stream:
            reader.parser.ParseFile(stream)
    except expat.ExpatError as problem:
        raise LabelMapError(
            f'{path}: not valid XML ({problem}); expected an Aperio annotation; export it again'
        ) from problem
    except OSError as problem:
        raise LabelMapError(f'{path}: cannot be read ({problem.strerror})') from problem
    if not reader.n_annotations:
        raise LabelMapError(
            f'{path}: has no Annotation element; expected an Aperio annotation; export it again'
        )
    return reader.regions


class _AperioReader:
    """Collects regions while the file streams by; refuses document types."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.regions: list[Region] = []
        self.n_annotations = 0
        self._class_name = ''
        self._first_region = 0
        self.parser = expat.ParserCreate()
        self.parser.StartDoctypeDeclHandler = self._refuse
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end

    def _refuse(self, *_: object) -> None:
        raise LabelMapError(
            f'{self.path}: has a DOCTYPE, which is not accepted; expected a plain Aperio '
            f'annotation; remove the DOCTYPE'
        )

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        if tag == 'Annotation':
            self.n_annotations += 1
            self._class_name = attributes.get('Name', '')
            self._first_region = len(self.regions)
        elif tag == 'Attribute' and attributes.get('Name'):
            self._class_name = attributes['Name']
        elif tag == 'Region':
            is_negative = attributes.get('NegativeROA', '0') == '1'
            self.regions.append(Region('', is_negative, []))
        elif tag == 'Vertex' and self.regions:
            self.regions[-1].vertices_xy.append(self._vertex(attributes))

    def _vertex(self, attributes: dict[str, str]) -> tuple[float, float]:
        try:
            x, y = float(attributes['X']), float(attributes['Y'])
        except (KeyError, ValueError):
            x = y = math.nan
        if not (abs(x) < 1e7 and abs(y) < 1e7):
            line = self.parser.CurrentLineNumber
            raise LabelMapError(
                f'{self.path}: line {line}: a vertex is {attributes}; expected X and Y in pixels'
            )
        return x, y

    def _end(self, tag: str) -> None:
        if tag == 'Annotation':  # the attribute may come after the regions
            for region in self.regions[self._first_region :]:
                region.class_name = self._class_name

"""Aperio XML outlines: MoNuSAC's folders of patients, MoNuSeg's folders of images and outlines.

In: folders with images and outlines. Out: cells. Invariant: an outline of unknown class is never
dropped in silence, and one that cannot be used costs no other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from xml.parsers import expat

import numpy as np

from cellseg_mm.core.errors import CellSegError, LabelMapError
from cellseg_mm.data.config import CLASS_NAMES
from cellseg_mm.data.importing.classes import Classes, build_classes, clean
from cellseg_mm.data.importing.pictures import read_picture
from cellseg_mm.data.importing.shapes import fill_polygon
from cellseg_mm.data.importing.sources import (
    IMAGE_SUFFIXES,
    MAX_TEXT_BYTES,
    Annotated,
    Cell,
    ImportParams,
    Job,
    Tally,
    composed,
    listed,
    unused_note,
)

AMBIGUOUS = 'ambiguous'  # MoNuSAC's name for areas that its scoring leaves out
SUFFIXES = ('.svs', *IMAGE_SUFFIXES, '.xml')
# Attributes that ImageScope and others offer for any text: the class is their value, if any
GENERIC = ('description', 'class', 'classification', 'type', 'label', 'name', 'category')
OUTLINES = ('', '0', '1')  # ImageScope: drawn by hand, rectangle; then ellipse, arrow, ruler


@dataclass(slots=True)
class Region:
    """One outline of an Aperio file.

    Attributes:
        number: Which one in the file, from 1.
        class_name: Its class, '' if the file names none.
        is_negative: It is a hole.
        shape: Aperio's number for the tool that drew it.
        vertices_xy: Points in px; NaN where the file has no number.
    """

    number: int
    class_name: str
    is_negative: bool
    shape: str
    vertices_xy: list[tuple[float, float]]


def find_monusac(source: Path, params: ImportParams) -> tuple[list[Job], Classes, list[str]]:
    """Find images with Aperio outlines; see ``import_data``."""
    by_stem: dict[Path, list[Path]] = {}
    for path in listed(source, SUFFIXES, deep=True):
        by_stem.setdefault(path.with_suffix(''), []).append(path)
    pairs = _pair_across_folders(by_stem)
    tables = [path for paths in pairs.values() for path in paths if _is_table(path)]
    has_options = params.class_map or params.skipped or params.single_class
    found = _names_in(tables) if has_options else []
    own = [params.single_class] if params.single_class else CLASS_NAMES
    classes = build_classes(params, own, found=found, left_out=[AMBIGUOUS])
    jobs = []
    for stem, paths in sorted(pairs.items()):
        images = [path for path in paths if not _is_table(path)]
        its_tables = [path for path in paths if _is_table(path)]
        # The distribution has both; the TIFF needs no slide reader and holds the same pixels.
        images.sort(key=lambda path: path.suffix.lower() == '.svs')
        # a folder that holds images only, as MoNuSeg's, is no patient
        is_patient = stem.parent != source and all(p.parent == stem.parent for p in its_tables)
        patient = stem.parent.name if is_patient else ''
        folder = '' if stem.parent == source else stem.parent.name
        read = partial(_read_monusac, stem, images, its_tables, classes, params)
        jobs.append(Job(stem.name, (images or its_tables)[0], patient, read, folder))
    return jobs, classes, unused_note(source, SUFFIXES, deep=True)


def _is_table(path: Path) -> bool:
    return path.suffix.lower() == '.xml'


def _pair_across_folders(by_stem: dict[Path, list[Path]]) -> dict[Path, list[Path]]:
    """Join images and outlines of one name that lie in two folders, as MoNuSeg's do."""
    images: dict[str, list[Path]] = {}
    tables: dict[str, list[Path]] = {}
    for stem, paths in by_stem.items():
        has_table = [_is_table(path) for path in paths]
        if all(has_table) or not any(has_table):
            (tables if all(has_table) else images).setdefault(composed(stem.name), []).append(stem)
    pairs = dict(by_stem)
    for name, stems in tables.items():
        if len(stems) == 1 and len(images.get(name, [])) == 1:
            image = images[name][0]
            pairs[image] = pairs[image] + pairs.pop(stems[0])
    return pairs


def _names_in(tables: Sequence[Path]) -> list[str]:
    """Return the class names of all outlines that can be read; problems are named later."""
    names: dict[str, None] = {}
    for path in tables:
        try:
            names |= dict.fromkeys(clean(region.class_name) for region in read_aperio_xml(path))
        except LabelMapError:
            continue
    return list(names)


def _read_monusac(
    stem: Path, images: list[Path], tables: list[Path], classes: Classes, params: ImportParams
) -> Annotated:
    if not images or not tables:
        found = (images or tables)[0]
        missing = 'no .xml with its outlines' if images else 'no .tif or .svs image'
        raise CellSegError(
            f'{found}: there is {missing} beside it; expected both; add {stem.name}, or remove this'
        )
    if sum(path.suffix.lower() != '.svs' for path in images) > 1:
        raise CellSegError(
            f'{images[0]}: {" and ".join(path.name for path in images)} have the same outlines; '
            f'expected one image; remove the wrong one'
        )
    tally = Tally()
    image = read_picture(images[0], tally, max_pixels=params.max_pixels)
    cells: list[Cell] = []
    for region in read_aperio_xml(tables[0]):
        number = classes.number(region.class_name, tables[0])
        fault = _fault(region)
        if not number:
            tally.skipped[f'outlines of class {region.class_name or "without name"}'] += 1
        elif fault:
            tally.leave_out(fault, f'outline {region.number}')
        else:
            top, left, mask = fill_polygon(np.array(region.vertices_xy), image.shape[:2])
            if mask.any():
                cells.append(Cell(number, top, left, mask))
            else:
                tally.leave_out('outlines without a pixel in the image', f'outline {region.number}')
    return Annotated(image, cells, tally)


def _fault(region: Region) -> str:
    """Say why an outline cannot be used; '' if it can."""
    if region.is_negative:
        return 'outlines marked as negative'
    if region.shape not in OUTLINES:
        return 'regions that are no outlines (ellipses, arrows, rulers)'
    if len(region.vertices_xy) < 3:
        return 'outlines with fewer than 3 vertices'
    if any(math.isnan(x) for x, _ in region.vertices_xy):
        return 'outlines with a vertex that is no number of pixels'
    return ''


def read_aperio_xml(path: Path) -> list[Region]:
    """Read the outlines of an Aperio ImageScope file.

    The class is the name of the layer's attribute; where that is one for any text (Description), it
    is the attribute's value, or else the name of the layer.

    Raises:
        LabelMapError: The file is unreadable, no such XML, or has a document type (which could
            reach other files or grow without bound).
    """
    reader = _AperioReader(path)
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise LabelMapError(
                f'{path}: is larger than 2 GiB; expected the outlines of one image; split it'
            )
        with path.open('rb') as stream:
            reader.parser.ParseFile(stream)
    except (expat.ExpatError, ValueError, LookupError) as problem:
        if isinstance(problem, LabelMapError):
            raise
        raise LabelMapError(
            f'{path}: not valid XML ({problem}); expected an Aperio annotation; export it again'
        ) from problem
    except OSError as problem:
        raise LabelMapError(
            f'{path}: cannot be read ({problem.strerror}); expected an Aperio annotation; check it'
        ) from problem
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
        self._layer_name = ''
        self._class_name = ''
        self._first_region = 0
        self._is_in_region = False
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
            self._layer_name = clean(attributes.get('Name', ''))
            self._class_name = ''
            self._first_region = len(self.regions)
        elif tag == 'Attribute' and not self._is_in_region:
            self._class_name = self._class_name or _class_of(attributes)
        elif tag == 'Region':
            self._is_in_region = True
            is_negative = attributes.get('NegativeROA', '0') == '1'
            shape = attributes.get('Type', '').strip()
            self.regions.append(Region(len(self.regions) + 1, '', is_negative, shape, []))
        elif tag == 'Vertex' and self.regions:
            self.regions[-1].vertices_xy.append(_vertex(attributes))

    def _end(self, tag: str) -> None:
        if tag == 'Region':
            self._is_in_region = False
        elif tag == 'Annotation':  # the attribute may come after the regions
            for region in self.regions[self._first_region :]:
                region.class_name = self._class_name or self._layer_name


def _class_of(attributes: dict[str, str]) -> str:
    """Return the class that a layer's attribute names, '' if none."""
    name = clean(attributes.get('Name', ''))
    return clean(attributes.get('Value', '')) if name.casefold() in GENERIC else name


def _vertex(attributes: dict[str, str]) -> tuple[float, float]:
    try:
        x, y = float(attributes['X']), float(attributes['Y'])
    except (KeyError, ValueError):
        return math.nan, math.nan
    return (x, y) if abs(x) < 1e7 and abs(y) < 1e7 else (math.nan, math.nan)

"""Finds and reads annotated images in the formats that ``importers`` turns into data folders.

In: MoNuSAC's own distribution, COCO JSON, one label map per image, one picture per cell.
Out: per case a :class:`Job` whose reader returns :class:`Annotated`: pixels, cells as crops, and
sentences about what the source holds but a label map cannot.
Invariant: sources are not trusted: sizes are judged before decoding, paths stay inside the folder,
XML with a document type is refused, and nothing is guessed.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal
from xml.parsers import expat

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage

from cellseg_mm.core import rle
from cellseg_mm.core.errors import CellSegError, ImageError, LabelMapError
from cellseg_mm.data.labels import read_image, read_label_map
from cellseg_mm.data.drawing.sample import CLASS_NAMES
from cellseg_mm.data.tiff import DEFAULT_MAX_PIXELS

Format = Literal['monusac', 'coco', 'label-map', 'mask-folders']
Mask = NDArray[np.bool_]

IMAGE_SUFFIXES = ('.tif', '.tiff', '.png', '.jpg', '.jpeg', '.bmp')
MASK_SUFFIXES = ('.tif', '.tiff', '.png')
MAX_TEXT_BYTES = 2 << 30  # an annotation file beyond 2 GiB is a mistake
AMBIGUOUS = 'ambiguous'  # MoNuSAC's name for areas that its scoring leaves out


@dataclass(frozen=True, slots=True)
class ImportParams:
    """What to import.

    Attributes:
        class_names: Name of class 1, 2, ...; empty means the format's own: MoNuSAC's four types,
            COCO's categories by rising id, or the single class ``cell``.
        class_map: Name in the source -> name in ``class_names``; names are compared without case.
        skipped: Names in the source to leave out; they are counted in the report.
        single_class: Class of all cells, for formats without classes; empty means class 1.
        image_dir: Folder of the images of a COCO file; by default the file's folder.
        swap_red_blue: Exchange the two channels, to match data that is stored so.
        replace: Write cases again that are already there.
        max_pixels: Most pixels (height times width) of an image that are accepted.
    """

    class_names: tuple[str, ...] = ()
    class_map: Mapping[str, str] = field(default_factory=dict)
    skipped: frozenset[str] = frozenset()
    single_class: str = ''
    image_dir: Path | None = None
    swap_red_blue: bool = False
    replace: bool = False
    max_pixels: int = DEFAULT_MAX_PIXELS


@dataclass(frozen=True, slots=True)
class Cell:
    """One annotated cell: 1-based class, row and column of the crop, and its (h, w) bool mask."""

    class_number: int
    top: int
    left: int
    mask: Mask


@dataclass(frozen=True, slots=True)
class Annotated:
    """One source image, (H, W, 3) uint8, its cells in the source's order, and what to report."""

    image: NDArray[np.uint8]
    cells: Sequence[Cell]
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """One case to import: its name in the source, file for messages, patient, how to read it."""

    name: str
    source: Path
    patient: str
    read: Callable[[], Annotated]


# ---- classes ----


@dataclass(frozen=True, slots=True)
class Classes:
    """How names in the source become class numbers.

    Attributes:
        names: Name of class 1, 2, ...
        number_of: Lower-case name in the source -> class number, or 0 for names to leave out.
    """

    names: tuple[str, ...]
    number_of: Mapping[str, int]

    @classmethod
    def from_params(
        cls, params: ImportParams, default: Sequence[str], skipped: Iterable[str] = ()
    ) -> Classes:
        """Combine the options with a format's own class names."""
        names = params.class_names or tuple(default)
        number_of = {name.casefold(): k for k, name in enumerate(names, start=1)}
        if len(number_of) < len(names):
            raise CellSegError(f'class names must differ, found {", ".join(names)}')
        known = dict(number_of)
        for origin, target in params.class_map.items():
            if target.casefold() not in known:
                raise CellSegError(
                    f'{origin} is mapped to {target}, which is none of {", ".join(names)}'
                )
            number_of[origin.casefold()] = known[target.casefold()]
        for name in (*skipped, *params.skipped):
            number_of.setdefault(name.casefold(), 0)
        return cls(names, number_of)

    def number(self, name: str, source: Path) -> int:
        """Return the class number of a name in the source, 0 if it is to be left out.

        Raises:
            LabelMapError: The name is neither known nor skipped.
        """
        number = self.number_of.get(name.strip().casefold())
        if number is None:
            raise LabelMapError(
                f'{source}: has cells of class {name!r}; expected {", ".join(self.names)}; map it '
                f'to one of them, or name it among those to skip'
            )
        return number


def _single_class(params: ImportParams) -> tuple[Classes, int]:
    classes = Classes.from_params(params, [params.single_class or 'cell'])
    if not params.single_class:
        return classes, 1
    number = classes.number_of.get(params.single_class.casefold(), 0)
    if not number:
        raise CellSegError(
            f'class {params.single_class!r} is none of {", ".join(classes.names)}; name one'
        )
    return classes, number


# ---- pixels ----


def read_picture(path: Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> NDArray[np.uint8]:
    """Read an image of any of the formats that sources use; alpha is dropped.

    Args:
        path: TIFF, SVS (its full-resolution level), PNG, JPEG or BMP.
        max_pixels: Most pixels that are accepted, judged on the header.

    Returns:
        (H, W, 3) uint8 in the file's channel order.

    Raises:
        ImageError: The file cannot be read, is too large, or is marked as turned.
    """
    suffix = path.suffix.lower()
    if suffix in ('.tif', '.tiff'):
        return read_image(path, max_pixels=max_pixels)
    if suffix == '.svs':
        return _read_svs(path, max_pixels)
    values, mode = _read_with_pillow(path, max_pixels, ImageError)
    if mode in ('L', 'LA', 'F', '1') or mode.startswith('I'):
        values = _grey_to_uint8(path, values if values.ndim == 2 else values[..., 0])
        return np.repeat(values[..., None], 3, axis=2)
    if mode not in ('RGB', 'RGBA'):
        raise ImageError(f'{path}: the colours are {mode}; expected RGB or grey; convert it')
    return np.ascontiguousarray(values[..., :3])


def _grey_to_uint8(path: Path, values: NDArray) -> NDArray[np.uint8]:
    """Keep 8-bit values; scale 16-bit values by the full range unless none exceeds 255."""
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint8:
        return values
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if low < 0 or high > 65535 or values.dtype.kind == 'f':
        raise ImageError(f'{path}: grey values {low} to {high}; expected 8 or 16 bit integers')
    scale = 1.0 if high <= 255 else 255 / 65535
    return np.rint(values * scale).astype(np.uint8)


def _read_with_pillow(
    path: Path, max_pixels: int, error: type[CellSegError]
) -> tuple[NDArray, str]:
    """Return values and mode; palettes become RGB for images and stay indices for label maps."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise error(
                    f'{path}: has {height} x {width} px; at most {max_pixels} px are accepted; '
                    f'cut it into tiles or raise the limit'
                )
            if picture.getexif().get(0x0112, 1) != 1:
                raise error(
                    f'{path}: is marked as turned (EXIF), so annotations may not fit; save it '
                    f'turned as it should be'
                )
            if picture.mode == 'P' and error is ImageError:
                mode = 'RGBA' if 'transparency' in picture.info else 'RGB'
                return np.asarray(picture.convert(mode)), mode
            return np.asarray(picture), picture.mode
    except CellSegError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        raise error(
            f'{path}: cannot be read ({str(problem)[:120]}); expected a PNG, JPEG or BMP picture; '
            f'export it again'
        ) from problem


def _read_svs(path: Path, max_pixels: int) -> NDArray[np.uint8]:
    """Read the full-resolution level of a slide, which is the one that vertices refer to."""
    try:
        with tifffile.TiffFile(path) as slide:
            level = slide.series[0].levels[0]
            n_pixels = math.prod(level.shape[:2])
            if n_pixels > max_pixels:
                raise ImageError(
                    f'{path}: level 0 has {n_pixels} px; at most {max_pixels} are accepted; cut '
                    f'the slide into regions first'
                )
            values = level.asarray(maxworkers=1)
    except ImageError:
        raise
    except Exception as problem:  # damaged files raise anything from struct.error to codec errors
        raise ImageError(
            f'{path}: cannot be read as SVS ({str(problem)[:120]}); export it again'
        ) from problem
    if values.dtype != np.uint8 or values.ndim != 3 or values.shape[2] not in (3, 4):
        raise ImageError(
            f'{path}: level 0 has shape {values.shape} and type {values.dtype}; expected 8-bit RGB'
        )
    return np.ascontiguousarray(values[..., :3])


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


def _tight(cell: Cell) -> Cell:
    """Cut empty rows and columns off."""
    box = ndimage.find_objects(cell.mask.astype(np.uint8))
    if not box:
        return Cell(cell.class_number, 0, 0, np.zeros((0, 0), dtype=bool))
    rows, columns = box[0]
    return Cell(
        cell.class_number,
        cell.top + rows.start,
        cell.left + columns.start,
        cell.mask[rows, columns],
    )


# ---- MoNuSAC: patient folders, Aperio XML ----


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


# ---- COCO JSON ----


def _find_coco(source: Path, params: ImportParams) -> tuple[list[Job], Classes]:
    content = _read_coco(source)
    name_of = {_id_of(c, source, 'category'): str(c.get('name', '')) for c in content['categories']}
    default = [name_of[key] for key in sorted(name_of)]
    classes = Classes.from_params(params, default)
    by_image: dict[int, list[dict]] = {}
    for annotation in content['annotations']:
        by_image.setdefault(_id_of(annotation, source, 'annotation', 'image_id'), []).append(
            annotation
        )
    jobs = []
    for entry in sorted(content['images'], key=lambda e: str(e.get('file_name'))):
        image_id = _id_of(entry, source, 'image')
        annotations = by_image.pop(image_id, [])
        file_name = str(entry.get('file_name', ''))
        reader = _CocoReader(source, entry, annotations, name_of, classes, params)
        name = Path(file_name).stem or str(image_id)
        jobs.append(Job(name, Path(file_name or source), '', reader.read))
    if by_image:
        raise CellSegError(
            f'{source}: {sum(map(len, by_image.values()))} annotations are of image ids that '
            f'are not listed: {sorted(by_image)[:5]}; add the images or remove the annotations'
        )
    return jobs, classes


def _read_coco(source: Path) -> dict[str, list[dict]]:
    try:
        if source.stat().st_size > MAX_TEXT_BYTES:
            raise CellSegError(f'{source}: is larger than 2 GiB; expected a COCO file')
        content = json.loads(source.read_bytes())
    except OSError as problem:
        raise CellSegError(f'{source}: cannot be read ({problem.strerror})') from problem
    except (ValueError, RecursionError) as problem:
        raise CellSegError(
            f'{source}: not valid JSON ({str(problem)[:80]}); expected a COCO file'
        ) from problem
    keys = ('images', 'annotations', 'categories')
    for key in keys:
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise CellSegError(f'{source}: {key} is no list of objects; expected a COCO file')
    for key in ('images', 'categories'):
        ids = Counter(_id_of(row, source, key) for row in content[key])
        repeated = [i for i, n in ids.items() if n > 1]
        if repeated:
            raise CellSegError(f'{source}: {key} ids {repeated[:5]} occur more than once')
    return {key: content[key] for key in keys}


def _id_of(row: Mapping, source: Path, what: str, key: str = 'id') -> int:
    value = row.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CellSegError(f'{source}: {what}: {key} is {value!r}; expected a whole number')
    return value


@dataclass(frozen=True, slots=True)
class _CocoReader:
    source: Path
    entry: Mapping
    annotations: Sequence[Mapping]
    name_of: Mapping[int, str]
    classes: Classes
    params: ImportParams

    def read(self) -> Annotated:
        path = self._image_path()
        image = read_picture(path, max_pixels=self.params.max_pixels)
        stated = (self.entry.get('height'), self.entry.get('width'))
        if stated != image.shape[:2]:
            raise ImageError(
                f'{path}: the image is {image.shape[0]} x {image.shape[1]} px, {self.source} says '
                f'{stated[0]} x {stated[1]}; they must match'
            )
        cells: list[Cell] = []
        left_out: Counter[str] = Counter()
        for annotation in self.annotations:
            where = f'{self.source}: annotation {annotation.get("id")}'
            category_id = _id_of(annotation, self.source, 'annotation', 'category_id')
            category = self.name_of.get(category_id)
            if category is None:
                raise LabelMapError(
                    f'{where}: category_id is {category_id}; expected one of {sorted(self.name_of)}'
                )
            number = self.classes.number(category, self.source)
            if annotation.get('iscrowd', 0):
                left_out['crowd areas (iscrowd)'] += 1
            elif not number:
                left_out[f'cells of class {category}'] += 1
            else:
                cell = coco_cell(annotation.get('segmentation'), number, image.shape[:2], where)
                if cell.mask.any():
                    cells.append(cell)
                else:
                    left_out['cells without a pixel'] += 1
        return Annotated(
            image, cells, [f'{n} {what} left out' for what, n in sorted(left_out.items())]
        )

    def _image_path(self) -> Path:
        folder = (self.params.image_dir or self.source.parent).resolve()
        name = self.entry.get('file_name')
        path = folder
        if isinstance(name, str) and '\0' not in name:
            path = (folder / name).resolve()
        if not path.is_relative_to(folder) or path == folder:
            raise ImageError(
                f'{self.source}: file_name is {name!r}; expected a file inside {folder}; correct '
                f'it or name the folder of images'
            )
        return path


def coco_cell(segmentation: object, class_number: int, image_hw: Sequence[int], where: str) -> Cell:
    """Turn a COCO segmentation into a cell.

    Args:
        segmentation: Polygons (lists of x, y; joined), or RLE with ``counts`` as a list or text.
        class_number: 1-based.
        image_hw: Height and width that an RLE must have; polygons are cut off there.
        where: Begin of error messages.

    Raises:
        LabelMapError: The segmentation is broken.
    """
    if isinstance(segmentation, list) and segmentation:
        polygons = [_checked_polygon(polygon, image_hw, where) for polygon in segmentation]
        parts = coco_mask.frPyObjects(polygons, *image_hw)
        counts = coco_mask.merge(parts)['counts']
    elif isinstance(segmentation, dict):
        if segmentation.get('size') != list(image_hw):
            raise LabelMapError(
                f'{where}: the RLE has size {segmentation.get("size")}, the image {list(image_hw)}'
            )
        counts = _rle_counts(segmentation.get('counts'), image_hw, where)
    else:
        raise LabelMapError(f'{where}: segmentation is missing; expected polygons or an RLE')
    try:
        crops, corners = rle.decode_crops([counts], (image_hw[0], image_hw[1]))
    except CellSegError as problem:
        raise LabelMapError(f'{where}: {problem}') from None
    return Cell(class_number, int(corners[0, 0]), int(corners[0, 1]), crops[0])


def _checked_polygon(polygon: object, image_hw: Sequence[int], where: str) -> list[float]:
    values = polygon if isinstance(polygon, list) else []
    are_numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not are_numbers or len(values) < 6 or len(values) % 2:
        raise LabelMapError(
            f'{where}: a polygon has {len(values)} values; expected an even number of at least 6 '
            f'numbers'
        )
    # pycocotools allocates by the length of the outline, and trusts what it gets.
    reach = 2 * max(image_hw)
    if not all(-reach <= v <= 2 * reach for v in values):
        raise LabelMapError(f'{where}: a polygon leaves the image by far; expected pixels')
    return [float(v) for v in values]


def _rle_counts(counts: object, image_hw: Sequence[int], where: str) -> bytes:
    if isinstance(counts, str) and counts.isascii():
        return counts.encode()
    runs = counts if isinstance(counts, list) else []
    are_runs = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in runs)
    if not are_runs or sum(runs) != math.prod(image_hw):
        raise LabelMapError(
            f'{where}: the RLE counts are broken; expected runs that fill {image_hw[0]} x '
            f'{image_hw[1]} px'
        )
    encoded = coco_mask.frPyObjects({'size': list(image_hw), 'counts': runs}, *image_hw)
    return bytes(encoded['counts'])


# ---- one label map per image (Cellpose, StarDist) ----


def _find_label_maps(source: Path, params: ImportParams) -> tuple[list[Job], Classes]:
    classes, number = _single_class(params)
    image_dir = source / 'images' if (source / 'images').is_dir() else source
    mask_dir = source / 'masks'
    images: dict[str, list[Path]] = {}
    masks: dict[str, list[Path]] = {}
    for path in _listed(image_dir, IMAGE_SUFFIXES):
        mask_of = re.fullmatch(r'(.+?)_(?:cp_)?masks', path.stem)
        stem = mask_of[1] if mask_of else path.stem
        (masks if mask_of else images).setdefault(re.sub('_img$', '', stem), []).append(path)
    if mask_dir.is_dir():
        for path in _listed(mask_dir, MASK_SUFFIXES):
            stem = re.sub(r'_(?:cp_)?masks?$', '', path.stem)
            masks.setdefault(re.sub('_img$', '', stem), []).append(path)
    jobs = []
    for stem in sorted(images.keys() | masks.keys()):
        pair = images.get(stem, []), masks.get(stem, [])
        first = (pair[0] or pair[1])[0]
        jobs.append(Job(stem, first, '', partial(_read_pair, stem, *pair, number, params)))
    return jobs, classes


def _read_pair(
    stem: str, images: list[Path], masks: list[Path], number: int, params: ImportParams
) -> Annotated:
    for what, paths in (('image', images), ('label map', masks)):
        if len(paths) != 1:
            beside = (images + masks)[0]
            found = ' and '.join(str(path) for path in paths) or 'none'
            raise CellSegError(f'{beside}: {stem} has {len(paths)} {what}s ({found}); expected one')
    image = read_picture(images[0], max_pixels=params.max_pixels)
    label_map = _read_any_label_map(masks[0], image.shape[:2])
    return Annotated(image, _cells_of(label_map, number))


def _read_any_label_map(path: Path, image_hw: Sequence[int]) -> NDArray[np.int32]:
    if path.suffix.lower() in ('.tif', '.tiff'):
        return read_label_map(path, (image_hw[0], image_hw[1]))
    limit = max(math.prod(image_hw), DEFAULT_MAX_PIXELS)
    values, mode = _read_with_pillow(path, limit, LabelMapError)
    if values.ndim != 2 or values.dtype.kind not in 'bui' or values.min(initial=0) < 0:
        raise LabelMapError(
            f'{path}: the mode is {mode}; expected one channel with an id per pixel; export ids, '
            f'not colours'
        )
    _check_size(path, values.shape, image_hw)
    return values.astype(np.int32)


def _check_size(path: Path, hw: tuple[int, ...], image_hw: Sequence[int]) -> None:
    if tuple(hw) != tuple(image_hw):
        raise LabelMapError(
            f'{path}: is {hw[0]} x {hw[1]} px, the image is {image_hw[0]} x {image_hw[1]} px; '
            f'they must match'
        )


def _cells_of(label_map: NDArray[np.int32], class_number: int) -> list[Cell]:
    """Return the instances of a label map by rising id."""
    ids, compact = np.unique(label_map, return_inverse=True)
    compact = compact.reshape(label_map.shape) + (0 if ids[0] == 0 else 1)
    boxes = ndimage.find_objects(compact)
    return [
        Cell(class_number, box[0].start, box[1].start, compact[box] == i)
        for i, box in enumerate(boxes, start=1)
    ]


# ---- one picture per cell (DSB2018) ----


def _find_mask_folders(source: Path, params: ImportParams) -> tuple[list[Job], Classes]:
    classes, number = _single_class(params)
    jobs = []
    for folder in sorted(path for path in _entries(source) if path.is_dir()):
        read = partial(_read_mask_folder, folder, number, params)
        jobs.append(Job(folder.name, folder, '', read))
    return jobs, classes


def _read_mask_folder(folder: Path, number: int, params: ImportParams) -> Annotated:
    for name in ('images', 'masks'):
        if not (folder / name).is_dir():
            raise CellSegError(f'{folder}: has no folder {name}; expected images and masks')
    images = _listed(folder / 'images', IMAGE_SUFFIXES)
    if len(images) != 1:
        raise CellSegError(f'{folder / "images"}: has {len(images)} images; expected one')
    image = read_picture(images[0], max_pixels=params.max_pixels)
    cells, n_empty = [], 0
    for path in _listed(folder / 'masks', MASK_SUFFIXES):
        mask = read_picture(path, max_pixels=params.max_pixels).max(axis=2) > 0
        _check_size(path, mask.shape, image.shape[:2])
        cell = _tight(Cell(number, 0, 0, mask))
        n_empty += not cell.mask.size
        cells += [cell] if cell.mask.size else []
    notes = [f'{n_empty} masks without a pixel left out'] if n_empty else []
    return Annotated(image, cells, notes)


# ---- folders ----


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith('.'))
    except OSError as problem:
        raise CellSegError(
            f'{folder}: cannot be listed ({problem.strerror}); expected a folder; check the path'
        ) from problem


def _listed(folder: Path, suffixes: Sequence[str], *, deep: bool = False) -> list[Path]:
    """Return files with one of the suffixes, sorted; ``deep`` looks one folder further down."""
    found = []
    for path in _entries(folder):
        if path.is_file() and path.suffix.lower() in suffixes:
            found.append(path)
        elif deep and path.is_dir():
            found += _listed(path, suffixes)
    return found


FINDERS: Mapping[str, Callable[[Path, ImportParams], tuple[list[Job], Classes]]] = {
    'monusac': _find_monusac,
    'coco': _find_coco,
    'label-map': _find_label_maps,
    'mask-folders': _find_mask_folders,
}

"""Finds and reads annotated images in the formats that ``importers`` turns into data folders.

In: MoNuSAC's own distribution, COCO JSON, one label map per image, one picture per cell.
Out: per case a :class:`Job` whose reader returns :class:`Annotated`: pixels, cells as crops, and
sentences about what the source holds but a label map cannot.
Invariant: sources are not trusted: sizes are judged before decoding, paths stay inside the folder,
XML with a document type is refused, and nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from cellseg_mm.core.errors import CellSegError, ImageError, LabelMapError
from cellseg_mm.data.labels import read_image
from cellseg_mm.data.tiff import DEFAULT_MAX_PIXELS

Format = Literal['monusac', 'coco', 'label-map', 'mask-folders']
Mask = NDArray[np.bool_]

IMAGE_SUFFIXES = ('.tif', '.tiff', '.png', '.jpg', '.jpeg', '.bmp')
MASK_SUFFIXES = ('.tif', '.tiff', '.png')
MAX_TEXT_BYTES = 2 << 30  # an annotation file beyond 2 GiB is a mistake


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


# ---- MoNuSAC: patient folders, Aperio XML ----


# ---- COCO JSON ----


# ---- one label map per image (Cellpose, StarDist) ----


def _check_size(path: Path, hw: tuple[int, ...], image_hw: Sequence[int]) -> None:
    if tuple(hw) != tuple(image_hw):
        raise LabelMapError(
            f'{path}: is {hw[0]} x {hw[1]} px, the image is {image_hw[0]} x {image_hw[1]} px; '
            f'they must match'
        )


# ---- one picture per cell (DSB2018) ----


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

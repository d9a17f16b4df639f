"""How large a pixel is, as far as a file says it.

In: an open TIFF, a bitmap's resolution, numbers with units. Out: a :class:`PixelSize`. Invariant:
a size is taken only where it is plausible for a picture of cells, 0.05 to 5 um; what a microscope
or scanner wrote and is not is said, a resolution for print (72 to 4800 dpi, or none) is not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import tifffile

from cellseg_mm.core.errors import CellSegError, ConfigError
from cellseg_mm.core.files import regular, write_json
from cellseg_mm.core.layout import size_files

Um = tuple[float, float]  # height and width of a pixel

PLAUSIBLE_UM = (0.05, 5.0)  # 100x with a fine camera, and 2x; 5080 dpi is 5 um
SAME = 0.01  # sizes that differ by less are the same: 0.2520 and 0.2522 come from one scanner
IN_UM = {
    **dict.fromkeys(('um', 'micron', 'microns', 'micrometer', 'micrometre', 'micrometers'), 1.0),
    **dict.fromkeys(('pm', 'picometer'), 1e-6),
    **dict.fromkeys(('nm', 'nanometer', 'nanometre', 'nanometers'), 1e-3),
    **dict.fromkeys(('mm', 'millimeter', 'millimetre', 'millimeters'), 1e3),
    **dict.fromkeys(('cm', 'centimeter', 'centimetre'), 1e4),
    **dict.fromkeys(('m', 'meter', 'metre', 'meters'), 1e6),
    **dict.fromkeys(('inch', 'inches', 'in'), 25400.0),
    'angstrom': 1e-4,
}
_OF_TAG = {2: 25400.0, 3: 1e4}  # TIFF's ResolutionUnit: inch and centimetre
_APERIO = re.compile(r'\|\s*MPP\s*=\s*([0-9.]+)')
# Quotes are written as &quot;; levels and overviews have theirs, the scan's is the smallest.
_PHILIPS = re.compile(r'"DICOM_PIXEL_SPACING"[^>]*>\W*(?:quot;)?([\d.e-]+)[^<\d]+([\d.e-]+)')


@dataclass(frozen=True, slots=True)
class PixelSize:
    """Height and width of a pixel.

    Attributes:
        um_per_px: In micrometres; None where it is not known.
        says: What a person should know of it; empty where there is nothing.
    """

    um_per_px: Um | None = None
    says: str = ''


UNKNOWN = PixelSize()


def um_text(size: Um) -> str:
    """Return a size for people: one number where both are the same."""
    height, width = size
    if is_same(size, (height, height)):
        return f'{height:.4g} um'
    return f'{height:.4g} x {width:.4g} um (height x width)'


def is_same(first: Um, second: Um) -> bool:
    """Tell whether two sizes are the same but for rounding."""
    return all(math.isclose(a, b, rel_tol=SAME) for a, b in zip(first, second, strict=True))


def um_of(unit: str | None) -> float | None:
    """Return how many micrometres a unit has; None for pixels and what is no length."""
    word = (unit or '').strip().replace('\\u00B5', 'u')
    word = word.replace('\u00b5', 'u').replace('\u03bc', 'u').replace('\u00c5', 'angstrom')
    return IN_UM.get(word.lower())


def judge(height_um: float, width_um: float, source: str) -> PixelSize:
    """Return a size that a file gives, if it is plausible.

    Args:
        height_um: Of a pixel.
        width_um: Of a pixel.
        source: What says so, for people; empty for what is as often a resolution for print.
    """
    size = (float(height_um), float(width_um))
    if not all(PLAUSIBLE_UM[0] <= um <= PLAUSIBLE_UM[1] for um in size):
        if not source or not any(um > 0 and math.isfinite(um) for um in size):
            return UNKNOWN
        low, high = PLAUSIBLE_UM
        return PixelSize(
            None,
            f'{source} says {um_text(size)} a pixel, not the {low:g} to {high:g} um of a picture '
            'of cells; it is not used',
        )
    is_square = is_same(size, (size[0], size[0]))
    return PixelSize(size, '' if is_square else f'its pixels are {um_text(size)}')


def of_dpi(dpi: object) -> PixelSize:
    """Return the size for Pillow's resolution, (across, down) in dots per inch."""
    if not isinstance(dpi, tuple) or len(dpi) != 2:
        return UNKNOWN
    try:
        across, down = float(dpi[0]), float(dpi[1])
        return judge(25400 / down, 25400 / across, '')
    except (ValueError, TypeError, ArithmeticError):
        return UNKNOWN


# ---- TIFF


def of_tiff(file: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> PixelSize:
    """Return the size of a pixel of an image's largest level, by the first that says it.

    Args:
        file: Open.
        series: The largest level.
    """
    for look in (_of_ome, _of_vendor, _of_imagej):
        found = look(file, series)
        if found is not None:
            return found
    return _of_tags(series.keyframe)


def of_case(path: Path) -> PixelSize:
    """Return the size of a training image's pixels; the image was read before, so it is a TIFF."""
    try:
        with tifffile.TiffFile(path) as file:
            return of_tiff(file, file.series[0])
    except Exception:  # its pixels are there; odd text beside them is no reason to refuse it
        return UNKNOWN


def _of_ome(file: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> PixelSize | None:
    if series.kind != 'ome' or file.ome_metadata is None:
        return None
    try:
        root = ElementTree.fromstring(file.ome_metadata)
    except ElementTree.ParseError:
        return None
    images = [element for element in root if element.tag.endswith('}Image')]
    number = next((k for k, one in enumerate(file.series) if one is series), 0)
    pixels = images[number].find('{*}Pixels') if number < len(images) else None
    if pixels is None or pixels.get('PhysicalSizeX') is None:
        return None
    lengths = []
    for axis in 'YX':
        unit = um_of(pixels.get(f'PhysicalSize{axis}Unit', 'um'))
        value = _number(pixels.get(f'PhysicalSize{axis}', pixels.get('PhysicalSizeX')))
        lengths.append((unit or 0.0) * value)
    return judge(lengths[0], lengths[1], 'its OME text')


def _of_vendor(file: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> PixelSize | None:
    text = file.pages.first.description or ''
    if file.pages.first.is_svs and (found := _APERIO.search(text)):
        um = _number(found[1])
        return judge(um, um, "Aperio's text (MPP)")
    if file.is_philips and (spacings := _PHILIPS.findall(text)):
        down, across = min((_number(down), _number(across)) for down, across in spacings)
        return judge(1e3 * down, 1e3 * across, "Philips's text")
    if file.is_lsm and (known := file.lsm_metadata):
        sizes = [1e6 * float(known.get(f'VoxelSize{axis}', 0)) for axis in 'YX']
        return judge(sizes[0], sizes[1], "Zeiss's LSM header")
    return None


def _of_imagej(file: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> PixelSize | None:
    """Read what ImageJ writes: pixels per unit in the tags, the unit in the text."""
    known = file.imagej_metadata if file.is_imagej else None
    per_unit = _per_unit(series.keyframe)
    across = um_of(str(known.get('unit', ''))) if known else None
    if known is None or across is None or per_unit is None:
        return None
    down = um_of(str(known['yunit'])) if known.get('yunit') else across
    if down is None:
        return None
    return judge(down / per_unit[0], across / per_unit[1], "ImageJ's text")


def _of_tags(page: tifffile.TiffPage) -> PixelSize:
    unit = page.tags.get(296)
    length = _OF_TAG.get(int(unit.value)) if unit is not None else _OF_TAG[2]
    per_unit = _per_unit(page)
    if length is None or per_unit is None:
        return UNKNOWN
    return judge(length / per_unit[0], length / per_unit[1], '')


def _per_unit(page: tifffile.TiffPage) -> tuple[float, float] | None:
    """Return pixels per unit, down and across."""
    found = []
    for code in (283, 282):
        tag = page.tags.get(code)
        try:
            fraction: tuple[int, int] = tag.value if tag is not None else (0, 0)
            top, bottom = fraction
            found.append(top / bottom)
        except (ValueError, TypeError, ArithmeticError):
            return None
    return (found[0], found[1]) if min(found) > 0 else None


def _number(text: str | None) -> float:
    try:
        return float(text or '')
    except ValueError:
        return 0.0


# ---- a collection


def of_collection(sizes: Sequence[Um | None]) -> tuple[Um | None, list[tuple[Um, int]]]:
    """Return the size that all images share which say one; and each size with its count.

    Returns:
        None where no image says it or they differ; the most frequent size first.
    """
    counts: dict[Um, int] = {}
    for size in sizes:
        if size is not None:
            known = next((one for one in counts if is_same(one, size)), size)
            counts[known] = counts.get(known, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return (ordered[0][0] if len(ordered) == 1 else None), ordered


def stated(value: object, where: str) -> Um | None:
    """Return a size that a config or a model states: a number, or height and width.

    Raises:
        ConfigError: It is no plausible size.
    """
    if value is None:
        return None
    numbers: list[Any] = list(value) if isinstance(value, list | tuple) else [value, value]
    is_size = len(numbers) == 2 and all(
        isinstance(n, int | float)
        and not isinstance(n, bool)
        and PLAUSIBLE_UM[0] <= n <= PLAUSIBLE_UM[1]
        for n in numbers
    )
    if not is_size:
        raise ConfigError(
            f'{where}: um_per_px is {value!r}; expected micrometres a pixel, {PLAUSIBLE_UM[0]:g} '
            f'to {PLAUSIBLE_UM[1]:g}, one number or height and width; correct it'
        )
    return float(numbers[0]), float(numbers[1])


def recorded_size(data_root: Path | str, folds_path: Path | str) -> Um | None:
    """Return the size that ``prepare_data`` recorded beside the folds, or beside the data.

    Returns:
        None where there is no such file: the images do not say it, or not the same.

    Raises:
        CellSegError: The file is damaged.
    """
    path = next((path for path in size_files(data_root, folds_path) if path.is_file()), None)
    if path is None:
        return None
    try:
        content = json.loads(regular(path).read_bytes())
        return stated(content['um_per_px'], str(path))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise CellSegError(
            f'{path}: cannot be read ({str(problem)[:80]}); expected "um_per_px": [HEIGHT, WIDTH]; '
            'remove it, and prepare the data again'
        ) from problem


def save_size(path: Path, size: Um) -> None:
    """Write what all images of a data folder share."""
    write_json(path, {'version': 1, 'um_per_px': [*size]})

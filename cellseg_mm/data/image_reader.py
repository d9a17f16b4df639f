"""Regions of images that may be far larger than memory.

In: a path: TIFF, BigTIFF, OME-TIFF or pyramid by region, slides by the readers in ``slides``,
PNG, JPEG and BMP whole. Out: an
:class:`ImageReader` whose ``read`` gives (h, w, 3) uint8 in the channel order of the file.
Invariant: for every region the pixels are those of ``labels.read_image``; what is read of a file
that holds several pictures is decided by :mod:`contents`, and said.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import tifffile

from cellseg_mm.core.errors import ConfigError, ImageError
from cellseg_mm.data import bitmaps, intensity, labels, pixel_size, tiff
from cellseg_mm.data.contents import NO_CHOICE, Choice, Selection, check_level, level_hw, select
from cellseg_mm.data.file_kind import is_tiff, read_head
from cellseg_mm.data.intensity import ValueRange
from cellseg_mm.data.regions import ImageReader, Picture, WholeImage
from cellseg_mm.data.slides import bioio_reader, czi_reader, openslide_reader, zarr_reader
from cellseg_mm.data.tiff_regions import TiffRegions

__all__ = ['BY_REGION', 'SUFFIXES', 'WHOLE_PX', 'ImageReader', 'Picture', 'open_image']

BITMAPS = ('.png', '.jpg', '.jpeg', '.bmp')
# What is read by region, so that its size is known before its pixels are.
BY_REGION = (
    *('.tif', '.tiff', '.btf', '.tf8', '.svs', '.ndpi', '.scn'),
    *openslide_reader.SUFFIXES,
    *('.vsi', '.czi', *bioio_reader.PLUGINS, zarr_reader.SUFFIX),
)
SUFFIXES = (*BY_REGION, *BITMAPS)
WHOLE_PX = 4096 * 4096  # a TIFF of one page up to this size is read and checked whole, 48 MB


@contextmanager
def open_image(
    path: Path | str,
    *,
    level: int = 0,
    choice: Choice = NO_CHOICE,
    whole_px: int = WHOLE_PX,
    value_range: ValueRange | None = None,
) -> Iterator[ImageReader]:
    """Open an image for reading by region.

    Args:
        path: A TIFF of any kind, a slide or microscope file that a package which is installed
            reads, an OME-Zarr folder; or a PNG, JPEG or BMP, which are read whole.
        level: Level of a pyramid, 0 the largest.
        choice: Which image, plane and channels, where the file holds several.
        whole_px: Plain TIFFs of at most so many pixels are read whole.
        value_range: Of values of more than 8 bits; None decides by this file alone.

    Raises:
        ImageError: The file cannot be read, is damaged, holds several pictures and none was
            chosen, or its pixels are no RGB or grey image; see ``labels.read_image``.
        ConfigError: There is no such level, image, plane or channel.
    """
    path = Path(path)
    with ExitStack() as stack:
        how = (path, stack, level, choice, value_range)
        found = _by_name(*how) or _by_content(*how)
        if isinstance(found, tifffile.TiffFile):
            found = _tiff(path, found, level, choice, whole_px, value_range)
        yield found


def _by_name(
    path: Path, stack: ExitStack, level: int, choice: Choice, value_range: ValueRange | None
) -> ImageReader | None:
    """Open what a folder or a suffix tells, since some slides begin as a JPEG or a text does."""
    suffix = path.suffix.lower()
    if zarr_reader.is_zarr(path):
        return zarr_reader.open_zarr(path, level, choice, value_range)
    if suffix in openslide_reader.SUFFIXES:
        return _slide(path, stack, level, choice)
    if suffix in bioio_reader.PLUGINS:
        return bioio_reader.open_bioio(path, level, choice, value_range)
    return None


def _by_content(
    path: Path, stack: ExitStack, level: int, choice: Choice, value_range: ValueRange | None
) -> ImageReader | tifffile.TiffFile:
    """Open what the first bytes tell; of a TIFF the file."""
    head = read_head(path, ImageError)
    if head.startswith(czi_reader.MAGIC):
        if choice.is_default and openslide_reader.can_open(path):
            return _slide(path, stack, level, choice)
        return stack.enter_context(czi_reader.open_czi(path, level, choice, value_range))
    if head[128:132] == b'DICM':
        return _slide(path, stack, level, choice)
    if not is_tiff(head):
        check_level(path, level, [])
        return _bitmap(path, head, choice, value_range)
    if path.suffix.lower() == '.vsi':
        raise ImageError(
            f'{path}: is an Olympus VSI slide, whose pixels lie in .ets files that no reader here '
            'reads; expected another format; convert it to OME-TIFF with QuPath or Bio-Formats.'
        )
    file = stack.enter_context(_opened(path))
    # Ventana's tiles overlap and are out of order
    return _slide(path, stack, level, choice) if file.is_bif else file


def _slide(path: Path, stack: ExitStack, level: int, choice: Choice) -> ImageReader:
    return stack.enter_context(openslide_reader.open_slide(path, level, choice))


def _tiff(
    path: Path,
    file: tifffile.TiffFile,
    level: int,
    choice: Choice,
    whole_px: int,
    value_range: ValueRange | None,
) -> ImageReader:
    with _in_a_sentence(path):
        selection = select(path, file, choice, level)
        size = pixel_size.of_tiff(file, selection.levels[0])
        if choice.is_first and _is_plain(file, selection, whole_px):
            reader: ImageReader = WholeImage(
                path,
                *labels.read_scaled(path, max_pixels=whole_px, value_range=value_range),
                says=selection.says,
            )
        else:
            reader = TiffRegions(path, selection, level, value_range)
        reader.set_pixel_size(size)
    return reader


def _is_plain(file: tifffile.TiffFile, selection: Selection, whole_px: int) -> bool:
    """Tell whether a TIFF is one picture of one page, all there, and small."""
    height, width = level_hw(selection.levels[0])
    is_one = len(selection.levels) == 1 and len(file.pages) == 1 and not file.is_ome
    is_whole = all(count > 0 for count in file.pages[0].databytecounts)
    return is_one and is_whole and height * width <= whole_px


def _bitmap(path: Path, head: bytes, choice: Choice, value_range: ValueRange | None) -> WholeImage:
    values, size, says = bitmaps.read_bitmap(path, head, max_pixels=tiff.DEFAULT_MAX_PIXELS)
    n_channels = values.shape[2]
    if any((choice.image, choice.z, choice.t)) or max(choice.channels, default=0) >= n_channels:
        raise ConfigError(
            f'{path}: holds one picture of {n_channels} channels; expected image 0, z 0, t 0, and '
            f'channels from 0 to {n_channels - 1}; choose these, or leave the choice to the file'
        )
    if choice.channels:
        values = values[..., list(choice.channels)]
        says.append(f'read: channels {", ".join(map(str, choice.channels))}')
    bits = 8 * values.dtype.itemsize
    value_range = intensity.range_for(path, values, bits, value_range)
    picture = intensity.to_uint8(path, values, bits, value_range)
    if picture.shape[2] == 1:
        picture = np.repeat(picture, 3, axis=2)
    reader = WholeImage(path, np.ascontiguousarray(picture), value_range, '; '.join(says))
    reader.set_pixel_size(size)
    return reader


def _opened(path: Path) -> tifffile.TiffFile:
    tiff.check_file(path, ImageError)
    with _in_a_sentence(path):
        return tifffile.TiffFile(path)


@contextmanager
def _in_a_sentence(path: Path) -> Iterator[None]:
    """Say what is wrong where tifffile meets damaged bytes with whatever it trips over."""
    try:
        yield
    except (ImageError, ConfigError):
        raise
    except Exception as problem:
        reason = ' '.join(str(problem).split())[:120] or type(problem).__name__
        raise ImageError(
            f'{path}: the file is damaged or of an unknown kind ({reason}); expected a readable '
            f'TIFF; {tiff.FIX}.'
        ) from problem

"""Regions of slides that OpenSlide reads: MIRAX, Ventana, DICOM, Zeiss, Hamamatsu VMS, Sakura.

In: a slide's path. Out: an image reader. Invariant: what the scanner did not see is white, as
glass is; coordinates are those of OpenSlide's levels, so that results lie where QuPath and other
programs that read by OpenSlide show them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import ConfigError, ImageError
from cellseg_mm.data.contents import Choice, check_level
from cellseg_mm.data.pixel_size import PixelSize, judge
from cellseg_mm.data.regions import ImageReader, Picture
from cellseg_mm.data.slides.choosing import in_a_sentence, package

if TYPE_CHECKING:
    from openslide import OpenSlide

# By suffix, since some begin as a JPEG, a text or a database does.
SUFFIXES = ('.mrxs', '.bif', '.dcm', '.vms', '.vmu', '.svslide')
_SERIES = b'\x20\x00\x0e\x00UI'  # (0020,000E), little endian with its type, as slides have it
_SERIES_BYTES = 1 << 16  # it stands before what is large
_KIND = 'a slide that OpenSlide knows'


class SlideRegions(ImageReader):
    """Reads a level of a slide.

    At levels whose downsample is not a whole number OpenSlide shifts a region by up to half a pixel
    of the largest level, and interpolates; at others it gives the pixels as they are.
    """

    def __init__(self, path: Path, slide: OpenSlide, level: int) -> None:
        level_hws = [(height, width) for width, height in slide.level_dimensions]
        check_level(path, level, level_hws)
        n = len(level_hws)
        super().__init__(path, level_hws, level, says=f'read: level {level} of {n}' * (n > 1))
        self._slide = slide
        self._step = slide.level_downsamples[level]
        self.set_pixel_size(_size_of(slide))

    def _read(self, y0: int, x0: int, y1: int, x1: int) -> Picture:
        at = (round(x0 * self._step), round(y0 * self._step))
        with in_a_sentence(self.path, _KIND):
            rgba = np.asarray(self._slide.read_region(at, self.level, (x1 - x0, y1 - y0)))
        return on_white(rgba)


@contextmanager
def open_slide(path: Path, level: int, choice: Choice) -> Iterator[SlideRegions]:
    """Open a slide.

    Raises:
        ImageError: OpenSlide is not installed, or does not read it.
        ConfigError: There is no such level, image, plane or channel.
    """
    _check_there(path)
    openslide: Any = package(path, _named(path), 'openslide', 'slides')
    if any((choice.image, choice.z, choice.t)) or choice.channels not in ((), (0, 1, 2)):
        raise ConfigError(
            f'{path}: holds one picture of red, green and blue; expected image 0, z 0, t 0, and '
            'no other channels; leave the choice to the file'
        )
    with in_a_sentence(path, _KIND):
        slide = openslide.OpenSlide(str(path))
    with slide:
        yield SlideRegions(path, slide, level)


def series_of(path: Path) -> str:
    """Return which series a DICOM file is of: a slide is one, a file for each level and label.

    Returns:
        Its UID; the path where the file does not say it as slides do.
    """
    with contextlib.suppress(OSError), path.open('rb') as stream:
        head = stream.read(_SERIES_BYTES)
        at = head.find(_SERIES)
        if at >= 0:
            length = int.from_bytes(head[at + 6 : at + 8], 'little')
            return head[at + 8 : at + 8 + length].decode('ascii', 'replace').strip('\0 ')
    return str(path)


def can_open(path: Path) -> bool:
    """Tell whether OpenSlide is there and reads a file that another reader reads, too."""
    try:
        import openslide
    except (ImportError, OSError):
        return False
    try:
        with openslide.OpenSlide(str(path)):
            return True
    except openslide.OpenSlideError:
        return False


def on_white(rgba: Picture) -> Picture:
    """Return the colours of (h, w, 4) with what is transparent on white; own memory."""
    rgb: Picture = rgba[..., :3]
    alpha: NDArray[np.uint16] = rgba[..., 3:].astype(np.uint16)
    if alpha.min() == 255:
        return np.array(rgb, order='C')
    mixed: Picture = ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return mixed


def _named(path: Path) -> str:
    return 'a DICOM file' if path.suffix.lower() == '.dcm' else f'a slide ({path.suffix})'


def _check_there(path: Path) -> None:
    """Refuse what is no regular file, and a MIRAX file without its folder."""
    if not path.is_file():
        raise ImageError(f'{path}: there is no such file; expected a slide; check the path.')
    folder = path.with_suffix('')
    if path.suffix.lower() == '.mrxs' and not (folder / 'Slidedat.ini').is_file():
        raise ImageError(
            f'{path}: its folder {folder.name}, with Slidedat.ini and all pixels, is not beside '
            'it; expected both together; copy the folder, too.'
        )


def _size_of(slide: OpenSlide) -> PixelSize:
    try:
        sizes = [float(slide.properties[f'openslide.mpp-{axis}']) for axis in 'yx']
    except (KeyError, ValueError):
        return PixelSize()
    return judge(sizes[0], sizes[1], 'the slide')

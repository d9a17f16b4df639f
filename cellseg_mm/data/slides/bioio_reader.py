"""Planes of microscope files that bioio's readers know: Nikon ND2, Leica LIF.

In: a path. Out: an image reader. Invariant: a scene is one image, of one level; planes are decoded
whole, once, where they fit into memory.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellseg_mm.core.errors import ImageError
from cellseg_mm.data.contents import Choice, check_level
from cellseg_mm.data.intensity import ValueRange
from cellseg_mm.data.pixel_size import PixelSize, judge
from cellseg_mm.data.regions import Region, StoredRegions, Values
from cellseg_mm.data.slides.choosing import Picked, in_a_sentence, package, pick, pick_image

if TYPE_CHECKING:
    from bioio import BioImage

# The package that reads each, which bioio finds by itself.
PLUGINS = {'.nd2': 'bioio_nd2', '.lif': 'bioio_lif'}
HELD_BYTES = 512 << 20  # a plane up to this size is kept


class BioioRegions(StoredRegions):
    """Reads a plane of one scene."""

    def __init__(
        self, path: Path, image: BioImage, picked: Picked, value_range: ValueRange | None
    ) -> None:
        super().__init__(path, [(int(image.dims.Y), int(image.dims.X))], 0)
        at = {axis.upper(): k for axis, k in picked.at.items()}
        self._has_samples = 'S' in image.dims.order
        if self._has_samples:
            values = image.get_image_dask_data('YXS', C=0, **at)[..., list(picked.channels)]
        else:
            values = image.get_image_dask_data('YXC', **at)[..., list(picked.channels)]
        self._values: Any = values
        dtype = np.dtype(values.dtype)
        self._lock = threading.Lock()
        self.take_range(dtype, 8 * dtype.itemsize, value_range)

    def _stored(self, region: Region) -> Values:
        y0, x0, y1, x1 = region
        with self._lock, in_a_sentence(self.path, 'a microscope file'):
            is_lazy = not isinstance(self._values, np.ndarray)
            if is_lazy and self._values.size * self._values.dtype.itemsize <= HELD_BYTES:
                self._values = np.asarray(self._values)
            return np.asarray(self._values[y0:y1, x0:x1])


def open_bioio(
    path: Path, level: int, choice: Choice, value_range: ValueRange | None
) -> BioioRegions:
    """Open a file that a plugin of bioio reads.

    Raises:
        ImageError: bioio or the plugin is not installed, or the file is damaged or does not decide
            what is read.
        ConfigError: There is no such level, image, plane or channel.
    """
    what = f'a microscope file ({path.suffix})'
    if not path.is_file():
        raise ImageError(f'{path}: there is no such file; expected {what}; check the path.')
    bioio = package(path, what, 'bioio', 'microscopes')
    if plugin := PLUGINS.get(path.suffix.lower()):
        package(path, what, plugin, 'microscopes')
    check_level(path, level, [])
    with in_a_sentence(path, what):
        image = bioio.BioImage(str(path))
        number = pick_image(path, [str(name) for name in image.scenes], choice)
        image.set_scene(number)
        sizes = _sizes_of(image)
        is_rgb = 'S' in image.dims.order
        names = [] if is_rgb else [str(name) for name in image.channel_names or ()]
        picked = pick(path, sizes, names, choice)
        reader = BioioRegions(path, image, picked, value_range)
    says = [f'image {number} of {len(image.scenes)}'] if len(image.scenes) > 1 else []
    says += () if is_rgb and not choice.channels else picked.says
    reader.says = f'read: {", ".join(says)}' if says else ''
    reader.set_pixel_size(_size_of(image))
    return reader


def _sizes_of(image: BioImage) -> Mapping[str, int]:
    """Return the sizes of the axes that are chosen from; samples of a pixel are channels."""
    sizes = {axis.lower(): int(getattr(image.dims, axis)) for axis in 'TCZ'}
    if 'S' in image.dims.order:
        sizes['c'] = min(int(image.dims.S), 3)  # a fourth is alpha
    return sizes


def _size_of(image: BioImage) -> PixelSize:
    size = image.physical_pixel_sizes
    if (size.Y, size.X) == (1.0, 1.0):
        return PixelSize(
            says='its pixels are 1 um by its text, which is also what is said where nobody knows; '
            'it is not used'
        )
    return judge(size.Y or 0.0, size.X or 0.0, 'the file')

"""Regions of Zeiss CZI files, through Zeiss's own library.

In: a path. Out: an image reader. Invariant: a scene is one image, of one level; brightfield is
white where the scanner did not look, fluorescence is black.

Not through bioio-czi: what its 3.0.1 reads lazily of RGB files has red, green and blue alike.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.data.contents import Choice, check_level
from cellseg_mm.data.intensity import ValueRange
from cellseg_mm.data.pixel_size import PixelSize, judge
from cellseg_mm.data.regions import Region, StoredRegions, Values
from cellseg_mm.data.slides.choosing import Picked, in_a_sentence, package, pick, pick_image

if TYPE_CHECKING:
    from pylibCZIrw.czi import CziReader, Rectangle

MAGIC = b'ZISRAWFILE'
_KIND = 'a Zeiss CZI file'
_DTYPES = {'8': np.uint8, '24': np.uint8, '16': np.uint16, '48': np.uint16}


class CziRegions(StoredRegions):
    """Reads a scene of a CZI file."""

    def __init__(self, path: Path, document: CziReader, scene: int | None, picked: Picked) -> None:
        where = document.total_bounding_rectangle
        if scene is not None:
            where = document.scenes_bounding_rectangle[scene]
        super().__init__(path, [(where.h, where.w)], 0)
        self._document, self._scene, self._corner = document, scene, (where.y, where.x)
        self._picked, self._lock = picked, threading.Lock()
        kind = document.get_channel_pixel_type(0)
        self.is_rgb = kind.startswith('Bgr')
        self.dtype = np.dtype(_DTYPES.get(kind.strip('BgrayGFlot'), np.float32))

    def _stored(self, region: Region) -> Values:
        y0, x0, y1, x1 = region
        roi = (self._corner[1] + x0, self._corner[0] + y0, x1 - x0, y1 - y0)
        known = {'roi': roi, 'scene': self._scene, 'background_pixel': (float(self.is_rgb),) * 3}
        at = {axis.upper(): k for axis, k in self._picked.at.items()}
        with self._lock, in_a_sentence(self.path, _KIND):
            if self.is_rgb:  # stored as blue, green, red
                values = self._document.read(plane={**at, 'C': 0}, **known)[..., ::-1]
                return np.asarray(values)[..., list(self._picked.channels)]
            parts = [
                self._document.read(plane={**at, 'C': channel}, **known)
                for channel in self._picked.channels
            ]
        return np.concatenate(parts, axis=2)


@contextmanager
def open_czi(
    path: Path, level: int, choice: Choice, value_range: ValueRange | None
) -> Iterator[CziRegions]:
    """Open a CZI file.

    Raises:
        ImageError: pylibCZIrw is not installed, or the file is damaged or does not decide what is
            read.
        ConfigError: There is no such level, image, plane or channel.
    """
    library = package(path, _KIND, 'pylibCZIrw.czi', 'microscopes')
    with in_a_sentence(path, _KIND):
        opened = library.open_czi(str(path))
        document = opened.__enter__()
    try:
        with in_a_sentence(path, _KIND):
            reader = _reader(path, document, choice)
            check_level(path, level, [])
            reader.take_range(reader.dtype, 8 * reader.dtype.itemsize, value_range)
        yield reader
    finally:
        opened.__exit__(None, None, None)


def _reader(path: Path, document: CziReader, choice: Choice) -> CziRegions:
    scenes = sorted(document.scenes_bounding_rectangle)
    if not scenes and choice.image:
        raise ConfigError(f'{path}: holds one image; choose --image 0, or none')
    names = [_scene_text(k, document.scenes_bounding_rectangle[k]) for k in scenes]
    number = pick_image(path, names, choice) if scenes else 0
    box = document.total_bounding_box
    is_rgb = document.get_channel_pixel_type(0).startswith('Bgr')
    sizes = {axis: box[axis.upper()][1] for axis in 'ztc' if axis.upper() in box}
    known = document.metadata['ImageDocument']['Metadata']
    if is_rgb:
        sizes['c'] = 3
    picked = pick(path, sizes, [] if is_rgb else _channel_names(known), choice)
    reader = CziRegions(path, document, scenes[number] if scenes else None, picked)
    says = [f'image {number} of {len(scenes)}'] if len(scenes) > 1 else []
    says += () if is_rgb and not choice.channels else picked.says
    reader.says = f'read: {", ".join(says)}' if says else ''
    reader.set_pixel_size(_size_of(known))
    return reader


def _scene_text(number: int, where: Rectangle) -> str:
    return f'scene {number}, {where.h} x {where.w} px'


def _listed(value: object) -> list[Mapping[str, Any]]:
    """Return what XML gives as one thing or as a list of them."""
    if isinstance(value, list):
        return value
    return [value] if isinstance(value, dict) else []


def _channel_names(known: Mapping[str, Any]) -> list[str]:
    dimensions = known['Information']['Image'].get('Dimensions') or {}
    channels = _listed((dimensions.get('Channels') or {}).get('Channel'))
    names = [str(one.get('@Name', '')) for one in channels]
    return names if all(names) else []


def _size_of(known: Mapping[str, Any]) -> PixelSize:
    """Return the size that ``Scaling`` gives, in metres."""
    items = (known.get('Scaling') or {}).get('Items') or {}
    metres = {str(one.get('@Id')): str(one.get('Value')) for one in _listed(items.get('Distance'))}
    try:
        return judge(1e6 * float(metres['Y']), 1e6 * float(metres['X']), 'its Scaling')
    except (KeyError, TypeError, ValueError):
        return PixelSize()

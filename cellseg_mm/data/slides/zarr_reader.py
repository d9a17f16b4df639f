"""Regions of OME-Zarr images: folders of chunks, versions 0.1 to 0.5 of NGFF, Zarr 2 and 3.

In: a folder. Out: an image reader. Invariant: levels, axes and the size of pixels are those of the
multiscales that the folder describes; a folder without them is refused, whatever arrays it holds.

Source: https://ngff.openmicroscopy.org/0.5 and /0.4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellseg_mm.core.errors import ConfigError, ImageError
from cellseg_mm.data.contents import Choice, check_level
from cellseg_mm.data.intensity import ValueRange
from cellseg_mm.data.pixel_size import PixelSize, judge, um_of
from cellseg_mm.data.regions import Region, StoredRegions, Values
from cellseg_mm.data.slides.choosing import in_a_sentence, package, pick, pick_image

if TYPE_CHECKING:
    from zarr import Group

SUFFIX = '.zarr'
_MARKS = ('zarr.json', '.zgroup', '.zattrs')
_KIND = 'an OME-Zarr image'
_BEFORE_AXES = 'tczyx'  # what every image had before version 0.3

Json = Mapping[str, Any]


class ZarrRegions(StoredRegions):
    """Reads a level of an OME-Zarr image; a chunk that is not stored has the array's fill value."""

    def __init__(
        self,
        path: Path,
        arrays: Sequence[Any],
        axes: str,
        level: int,
        value_range: ValueRange | None,
    ) -> None:
        hws = [(int(a.shape[axes.index('y')]), int(a.shape[axes.index('x')])) for a in arrays]
        check_level(path, level, hws)
        super().__init__(path, hws, level)
        self._array, self._axes = arrays[level], axes
        self.channels: tuple[int, ...] = (0,)
        self.at: Mapping[str, int] = {}
        dtype = np.dtype(self._array.dtype)
        self.take_range(dtype, 1 if dtype.kind == 'b' else 8 * dtype.itemsize, value_range)
        chunk = dict(zip(axes, self._array.chunks, strict=True))
        self.block_hw = max(chunk['y'], 1024), max(chunk['x'], 1024)

    def _stored(self, region: Region) -> Values:
        y0, x0, y1, x1 = region
        where: dict[str, Any] = {'y': slice(y0, y1), 'x': slice(x0, x1), **self.at}
        first, last = min(self.channels), max(self.channels) + 1
        where['c'] = slice(first, last)  # what lies together is read together
        with in_a_sentence(self.path, _KIND):
            values = np.asarray(self._array[tuple(where[axis] for axis in self._axes)])
        left = [axis for axis in self._axes if axis in 'cyx']
        if 'c' not in left:
            return values.transpose([left.index(axis) for axis in 'yx'])[..., None]
        values = values.transpose([left.index(axis) for axis in 'yxc'])
        return values[..., [channel - first for channel in self.channels]]


def is_zarr(path: Path) -> bool:
    """Tell whether a folder is one Zarr store, rather than a folder with images."""
    return path.is_dir() and any((path / mark).is_file() for mark in _MARKS)


def open_zarr(
    path: Path, level: int, choice: Choice, value_range: ValueRange | None
) -> ZarrRegions:
    """Open an OME-Zarr image.

    Raises:
        ImageError: The package zarr is not installed, the folder holds no multiscales, several
            images and none was chosen, or is damaged.
        ConfigError: There is no such level, image, plane or channel.
    """
    zarr = package(path, 'an OME-Zarr folder', 'zarr', 'slides')
    with in_a_sentence(path, _KIND):
        group, says = _image_of(path, zarr.open_group(str(path), mode='r'), choice)
        known = _described(group)
        scale = known['multiscales'][0]
        axes, units = _axes_of(path, scale)
        arrays: list[Any] = [group[str(one['path'])] for one in scale['datasets']]
        reader = ZarrRegions(path, arrays, axes, level, value_range)
        sizes = dict(zip(axes, arrays[0].shape, strict=True))
        picked = pick(path, sizes, _names_of(known), choice)
        reader.at, reader.channels = picked.at, picked.channels
        if len(arrays) > 1:
            says.append(f'level {level} of {len(arrays)}')
        says += picked.says
        reader.says = f'read: {", ".join(says)}' if says else ''
        reader.set_pixel_size(_size_of(scale, axes, units))
    return reader


def _described(group: Group) -> Json:
    """Return what a group says of itself: below ``ome`` since version 0.5."""
    attributes: Json = group.attrs.asdict()
    inner: Json = attributes.get('ome', attributes)
    return inner


def _image_of(path: Path, group: Group, choice: Choice) -> tuple[Group, list[str]]:
    """Return the group of the one image, and what to say of which it is."""
    known = _described(group)
    if known.get('multiscales'):
        if choice.image:
            raise ConfigError(f'{path}: holds one image; choose --image 0, or none')
        return group, []
    if 'plate' in known or 'well' in known:
        raise ImageError(
            f'{path}: is a plate of wells; expected one image; name a field of a well, such as '
            f'{path.name}/A/1/0.'
        )
    series = known.get('series') or []
    if not series and 'bioformats2raw.layout' in known:
        series = sorted((name for name in group.group_keys() if name.isdigit()), key=int)
    if not series:
        raise ImageError(
            f'{path}: is a Zarr folder without multiscales; expected an OME-Zarr image; write it '
            'with ome-zarr or bioformats2raw, or name the image inside it.'
        )
    number = pick_image(path, [str(name) for name in series], choice)
    says = [f'image {number} of {len(series)}'] if len(series) > 1 else []
    inner: Any = group[str(series[number])]
    if not _described(inner).get('multiscales'):
        raise ImageError(f'{path}: its image {number} has no multiscales; copy it again.')
    return inner, says


def _axes_of(path: Path, scale: Json) -> tuple[str, dict[str, str]]:
    """Return the axes by one letter each, and the units of those that have one."""
    axes = scale.get('axes') or list(_BEFORE_AXES)
    names = ''.join(str(one['name'] if isinstance(one, dict) else one) for one in axes)
    if not {'y', 'x'} <= set(names) or not set(names) <= set(_BEFORE_AXES):
        raise ImageError(
            f'{path}: its axes are {names}; expected y and x, perhaps t, c and z; save one plane.'
        )
    units = {str(one['name']): str(one['unit']) for one in axes if 'unit' in one}
    return names, units


def _names_of(known: Json) -> list[str]:
    channels = (known.get('omero') or {}).get('channels') or []
    names = [str(one.get('label', '')) for one in channels]
    return names if all(names) else []


def _size_of(scale: Json, axes: str, units: Mapping[str, str]) -> PixelSize:
    """Return the size of the largest level's pixels; axes without a unit have none."""
    steps = np.ones(len(axes))
    for holder in (scale, scale['datasets'][0]):
        for one in holder.get('coordinateTransformations') or ():
            if one.get('type') == 'scale' and len(one.get('scale', ())) == len(axes):
                steps *= one['scale']
    lengths = [um_of(units.get(axis)) or 0.0 for axis in 'yx']
    y, x = (float(steps[axes.index(axis)]) for axis in 'yx')
    if not all(units.get(axis) for axis in 'yx') and (y, x) != (1, 1):
        return PixelSize(says=f'its pixels are {y:.4g} x {x:.4g} of no named unit; it is not used')
    return judge(y * lengths[0], x * lengths[1], 'its coordinateTransformations')

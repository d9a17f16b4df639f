"""What a TIFF holds, and which of it is the picture that is read.

In: an open TIFF and a :class:`Choice`. Out: a :class:`Selection`: levels, and the plane of each
channel. Invariant: which image, plane and channels are read follows from what the file says of
itself, or from the choice; where neither decides, what the file holds is listed, and refused.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import tifffile

from cellseg_mm.core.errors import ConfigError, ImageError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.data import tiff
from cellseg_mm.data.colours import check_space, colour_channels

# What slide scanners put beside the scan, by the names that tifffile and Bio-Formats give.
BESIDE = ('macro', 'label', 'thumbnail', 'overview', 'map', 'other', 'probability')
# Formats whose levels are known without a mark that they are reduced.
_SCANNERS = ('svs', 'scn', 'ndpi', 'philips', 'qpi')
_SLIDES = (*_SCANNERS, 'ome')
MAX_LISTED = 8

Page = tifffile.TiffPage | tifffile.TiffFrame


@dataclass(frozen=True, slots=True)
class Choice:
    """Which part of a file is read, where it holds more than one picture; all count from 0.

    Attributes:
        image: Number of the image; None takes the only one.
        channels: One channel for grey, or those for red, green and blue; empty takes what the
            file says.
        z: Plane in depth; None takes the only one.
        t: Moment in time; None takes the only one.

    Raises:
        ConfigError: There are neither one nor three channels, or a number is negative.
    """

    image: int | None = None
    channels: tuple[int, ...] = ()
    z: int | None = None
    t: int | None = None

    def __post_init__(self) -> None:
        numbers = [n for n in (self.image, self.z, self.t, *self.channels) if n is not None]
        if len(self.channels) not in (0, 1, 3) or any(n < 0 for n in numbers):
            raise ConfigError(
                f'choice: image {self.image}, channels {list(self.channels)}, z {self.z}, '
                f't {self.t}; expected numbers from 0, and one channel (grey) or three (red, '
                'green, blue)'
            )

    def to_json(self) -> JsonValue:
        """Return the choice by its names."""
        return {'image': self.image, 'channels': [*self.channels], 'z': self.z, 't': self.t}

    @property
    def is_default(self) -> bool:
        """Nothing is chosen."""
        return self == NO_CHOICE

    @property
    def is_first(self) -> bool:
        """Nothing is chosen but what a file of one picture has, too."""
        return not self.channels and not any((self.image, self.z, self.t))


NO_CHOICE = Choice()


@dataclass(frozen=True, slots=True)
class Plane:
    """Where one channel of the picture lies.

    Attributes:
        page: The directory.
        skip: Bytes from the page's own values to the plane's; other than 0 only in uncompressed
            stacks that list one page.
        sample: Which value of a pixel.
    """

    page: Page
    skip: int
    sample: int


@dataclass(frozen=True, slots=True)
class Selection:
    """What is read.

    Attributes:
        levels: Of the image, largest first.
        planes: Of the chosen level: one for grey, three for red, green and blue.
        says: What was chosen of several, for people; empty where there was nothing to choose.
    """

    levels: Sequence[tifffile.TiffPageSeries]
    planes: tuple[Plane, ...]
    says: str


@dataclass(slots=True)
class _Image:
    """One image of a file: a series, at one place of the axes that nobody knows."""

    name: str
    levels: list[tifffile.TiffPageSeries]
    at: dict[str, int] = field(default_factory=dict)
    is_beside: bool = False

    @property
    def hw(self) -> tuple[int, int]:
        return level_hw(self.levels[0])

    def size(self, axis: str) -> int:
        return dict(_outer(self.levels[0])).get(axis, 1)


def level_hw(series: tifffile.TiffPageSeries) -> tuple[int, int]:
    """Return height and width of a level in px."""
    return int(series.keyframe.imagelength), int(series.keyframe.imagewidth)


def select(path: Path, file: tifffile.TiffFile, choice: Choice, level: int) -> Selection:
    """Decide what of a file is read.

    Raises:
        ImageError: The file does not decide and nothing was chosen, or parts of it are missing.
        ConfigError: The choice names what is not there.
    """
    elsewhere = check_neighbours(path, file)
    images = _images(path, file)
    image, number, why = _pick_image(path, images, choice)
    check_level(path, level, [level_hw(series) for series in image.levels])
    says = [f'this part alone of the set that {elsewhere} describes'] if elsewhere else []
    if len(images) > 1:
        says.append(f'image {number} of {len(images)} ({_describe(image)}{why})')
    if len(image.levels) > 1:
        says.append(f'level {level} of {len(image.levels)}')
    index = dict(image.at)
    for axis, wanted in (('Z', choice.z), ('T', choice.t)):
        index[axis] = _pick_plane(path, image, axis, wanted)
        if image.size(axis) > 1:
            says.append(f'{axis.lower()} {index[axis]} of {image.size(axis)}')
    planes, what = _pick_channels(path, file, image, level, index, choice.channels)
    says += [what] if what else []
    return Selection(image.levels, planes, f'read: {", ".join(says)}' if says else '')


def check_level(path: Path, level: int, level_hws: Sequence[tuple[int, int]]) -> None:
    """Refuse a level that is not there.

    Raises:
        ConfigError: See the message.
    """
    n_levels = max(len(level_hws), 1)
    if not 0 <= level < n_levels:
        sizes = ', '.join(tiff.size_text(hw) for hw in level_hws) or 'no pyramid'
        raise ConfigError(
            f'{path}: has no level {level}; it has {n_levels} ({sizes}); choose --level from '
            f'0 to {n_levels - 1}'
        )


# ---- files that belong together


def check_neighbours(path: Path, file: tifffile.TiffFile) -> str:
    """Look at the files that an OME-TIFF says belong to it, before anything opens them.

    Returns:
        The file that describes the set, where this one does not; else nothing.

    Raises:
        ImageError: One is missing, is no regular file of the same folder, or is another one.
    """
    if not file.is_ome or file.ome_metadata is None:
        return ''
    try:
        root = ElementTree.fromstring(file.ome_metadata)
    except ElementTree.ParseError as problem:
        raise ImageError(
            f'{path}: its OME text is damaged ({problem}); expected XML; {tiff.FIX}.'
        ) from problem
    if (master := root.find('{*}BinaryOnly')) is not None:
        return str(master.get('MetadataFile', 'another file'))
    own = root.get('UUID')
    named = {
        str(element.get('FileName')): str(element.text)
        for element in root.iter()
        if element.tag.rsplit('}')[-1] == 'UUID' and element.get('FileName')
    }
    if own is None:
        named = {name: uuid for name, uuid in named.items() if name.lower() != path.name.lower()}
    _check_set(path, named, own)
    return ''


def _check_set(path: Path, named: Mapping[str, str], own: str | None) -> None:
    """Refuse a set whose files, UUID by name, are not all there."""
    missing = []
    for name, uuid in named.items():
        if Path(name).name != name or '\\' in name:
            raise ImageError(
                f'{path}: its OME text names the file {name[:80]!r} of another folder; expected '
                'files of one folder; export the set again.'
            )
        if uuid == own:
            continue
        if not _is_regular(path.parent / name):
            missing.append(name)
        elif own is not None and (found := _uuid_of(path.parent / name)) not in ('', uuid):
            raise ImageError(
                f'{path}: belongs to a set with {name}, but the file of that name is another one '
                f'({found}, expected {uuid}); keep each set in a folder of its own.'
            )
    if missing:
        more = f' and {len(missing) - 3} more' if len(missing) > 3 else ''
        raise ImageError(
            f'{path}: is part of a set of files, of which {", ".join(missing[:3])}{more} '
            f'{"is" if len(missing) == 1 else "are"} missing; expected the whole set in one '
            'folder; copy it there, or save this part alone as a plain TIFF.'
        )


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _uuid_of(path: Path) -> str:
    """Return what an OME-TIFF calls itself; empty if it does not."""
    try:
        with tifffile.TiffFile(path) as file:
            text = file.pages.first.description if len(file.pages) else ''
            return ElementTree.fromstring(text).get('UUID', '')
    except (OSError, ValueError, ElementTree.ParseError):
        return ''


# ---- images


def _images(path: Path, file: tifffile.TiffFile) -> list[_Image]:
    """Return all images of a file in its order."""
    if not len(file.pages) or not file.series:
        raise ImageError(f'{path}: the TIFF has no image in it; expected one; {tiff.FIX}.')
    scans = _scn_scans(file) if file.is_scn else None
    found: list[_Image] = []
    for number, series in enumerate(_levels_declared(file)):
        image = _Image(series[0].name, series)
        image.is_beside = _is_beside(file, image) or (scans is not None and number not in scans)
        if image.is_beside and scans is not None:
            image.name = image.name or 'macro'
        found += _spread(image)
    return found


def _levels_declared(file: tifffile.TiffFile) -> Iterator[list[tifffile.TiffPageSeries]]:
    """Yield the levels of each image; what only has a fitting size is an image of its own."""
    series = list(file.series)
    if series[0].kind == 'svs':
        series = _svs_series(series)
    for one in series:
        levels = [one.levels[0]]
        apart: list[tifffile.TiffPageSeries] = []
        for level in one.levels[1:]:
            key = level.keyframe
            is_declared = one.kind in _SLIDES or key.is_reduced or key.is_subifd
            (levels if is_declared else apart).append(level)
        yield levels
        yield from ([level] for level in apart)


def _svs_series(series: list[tifffile.TiffPageSeries]) -> list[tifffile.TiffPageSeries]:
    """Aperio slides without a thumbnail: a tiled second page is a level."""
    if len(series) > 1 and series[1].name == 'Thumbnail' and series[1].keyframe.is_tiled:
        levels = [*series[0].levels[1:], series[1]]
        if len({level.axes for level in (series[0], *levels)}) == 1:
            levels.sort(key=lambda level: -level.keyframe.imagewidth)
            series[0].levels[1:] = levels
            return [series[0], *series[2:]]
    return series


def _is_beside(file: tifffile.TiffFile, image: _Image) -> bool:
    """Tell whether an image is what comes with a scan: a label, a small copy, a mask."""
    key, kind = image.levels[0].keyframe, image.levels[0].kind
    if key.subfiletype & 0b101:  # a reduced copy, or a mask of transparent pixels
        return True
    if file.pages.first.is_svs and kind != 'svs':  # not tiled: the first page is the scan
        return key.index != 0
    name = image.name.lower().strip().removesuffix(' image')
    return kind in _SLIDES and name in BESIDE


def _scn_scans(file: tifffile.TiffFile) -> set[int]:
    """Return which images of a Leica SCN are scans: those smaller than the whole glass.

    Source: OpenSlide 4.0, openslide-vendor-leica.c: an image of the collection's size is the macro.
    """
    scans, number = set(), 0
    for collection in ElementTree.fromstring(file.pages.first.description):
        size = (collection.get('sizeX'), collection.get('sizeY'))
        for image in collection:
            if not image.tag.endswith('}image') or not any('ifd' in e.attrib for e in image.iter()):
                continue
            views = [e for e in image if e.tag.endswith('}view')]
            if not any((view.get('sizeX'), view.get('sizeY')) == size for view in views):
                scans.add(number)
            number += 1
    return scans


def _spread(image: _Image) -> list[_Image]:
    """Return an image for each place on axes that are neither depth, time nor channels."""
    axes = [(axis, n) for axis, n in _outer(image.levels[0]) if axis not in 'CZT' and n > 1]
    names = [axis for axis, _ in axes]
    return [
        _Image(image.name, image.levels, dict(zip(names, at, strict=True)), image.is_beside)
        for at in np.ndindex(*[n for _, n in axes])
    ]


def _outer(series: tifffile.TiffPageSeries) -> list[tuple[str, int]]:
    """Return axis and size of what lies outside a page."""
    axes, shape = series.axes, series.shape
    if hasattr(series, 'get_axes'):  # before tifffile 2026.5, those leave out what has length 1
        axes, shape = series.get_axes(False), series.get_shape(False)
    outer = [(axis, int(n)) for axis, n in zip(axes, shape, strict=True) if axis not in 'YXS']
    n_samples, n_pages = series.keyframe.samplesperpixel, len(series.pages)
    n_planes = math.prod(n for _, n in outer)
    if n_samples > 1 and n_planes == n_pages * n_samples:  # a page's samples are called channels
        outer = [(axis, n) for axis, n in outer if axis != 'C']
    return outer


def _describe(image: _Image) -> str:
    sizes = [f'{n} {axis.lower()}' for axis, n in _outer(image.levels[0]) if n > 1]
    place = [f'{axis} {k}' for axis, k in image.at.items()]
    shown = [repr(image.name)] if image.name else []
    planes = [' x '.join(sizes)] if sizes and not image.at else []
    return ', '.join([*shown, *place, tiff.size_text(image.hw), *planes])


def _listed(images: Sequence[_Image]) -> str:
    lines = [f'{k}: {_describe(image)}' for k, image in enumerate(images[:MAX_LISTED])]
    more = [f'and {len(images) - MAX_LISTED} more'] if len(images) > MAX_LISTED else []
    return '; '.join([*lines, *more])


def _pick_image(path: Path, images: Sequence[_Image], choice: Choice) -> tuple[_Image, int, str]:
    """Return the image, its number, and by which rule where it was not the only one."""
    if choice.image is not None:
        if choice.image >= len(images):
            raise ConfigError(
                f'{path}: has no image {choice.image}; it holds {len(images)} ({_listed(images)}); '
                f'choose --image from 0 to {len(images) - 1}'
            )
        return images[choice.image], choice.image, ', as chosen'
    scans = [k for k, image in enumerate(images) if not image.is_beside]
    if len(images) == 1 and (scans or images[0].levels[0].kind not in _SCANNERS):
        return images[0], 0, ''
    if len(scans) != 1:
        raise ImageError(
            f'{path}: holds {len(images)} image{"s" * (len(images) > 1)} ({_listed(images)}), '
            f'{len(scans)} of them no label, macro or copy; expected one, or a choice; '
            f'save the right one alone, or choose it (predict.py has --image 0 to '
            f'{len(images) - 1}).'
        )
    return images[scans[0]], scans[0], ', the only one that is no label, macro, mask or small copy'


def _pick_plane(path: Path, image: _Image, axis: str, wanted: int | None) -> int:
    n, option = image.size(axis), f'--{axis.lower()}'
    if wanted is None and n > 1:
        what = 'planes in depth' if axis == 'Z' else 'moments in time'
        raise ImageError(
            f'{path}: holds {n} {what} ({_describe(image)}); expected one, or a choice; save the '
            f'right one alone, or choose it (predict.py has {option} 0 to {n - 1}).'
        )
    if wanted is not None and wanted >= n:
        raise ConfigError(
            f'{path}: has no {axis.lower()} {wanted}; it has {n}; choose {option} from 0 to {n - 1}'
        )
    return wanted or 0


# ---- channels


def _pick_channels(
    path: Path,
    file: tifffile.TiffFile,
    image: _Image,
    level: int,
    index: dict[str, int],
    wanted: tuple[int, ...],
) -> tuple[tuple[Plane, ...], str]:
    """Return the planes of the chosen channels, and what to say of them."""
    series = image.levels[level]
    header = tiff.header_of(series.keyframe)
    check_space(path, header)
    n_pages = image.size('C')
    n_channels = n_pages * header.n_samples
    names = _channel_names(file, image, n_channels)
    try:
        channels = wanted or colour_channels(path, header, n_pages=n_pages)
    except ImageError as problem:
        if not names:
            raise
        text = ', '.join(f'{k} {name}' for k, name in enumerate(names[:MAX_LISTED]))
        raise ImageError(f'{str(problem).rstrip(".")}: {text}.') from problem
    if max(channels) >= n_channels:
        raise ConfigError(
            f'{path}: has no channel {max(channels)}; it has {n_channels}; choose --channels from '
            f'0 to {n_channels - 1}'
        )
    planes = tuple(
        _plane(path, series, {**index, 'C': k // header.n_samples}, k % header.n_samples)
        for k in channels
    )
    is_plain_rgb = n_pages == 1 and header.photometric in (2, 6) and not wanted
    if n_channels == 1 or is_plain_rgb:
        return planes, ''
    shown = ', '.join(f'{k} ({names[k]})' if names else str(k) for k in channels)
    what = 'grey' if len(channels) == 1 else 'red, green and blue'
    return planes, f'channel{"s" * (len(channels) > 1)} {shown} of {n_channels} as {what}'


def _channel_names(file: tifffile.TiffFile, image: _Image, n_channels: int) -> list[str]:
    """Return the names of an OME image's channels; empty if not each has one."""
    if image.levels[0].kind != 'ome' or file.ome_metadata is None:
        return []
    root = ElementTree.fromstring(file.ome_metadata)
    images = [element for element in root if element.tag.endswith('}Image')]
    if len(images) != len(file.series):
        return []
    number = next(k for k, one in enumerate(file.series) if one is image.levels[0])
    names = [e.get('Name', '') for e in images[number].iter() if e.tag.endswith('}Channel')]
    return names if len(names) == n_channels and all(names) else []


def _plane(
    path: Path, series: tifffile.TiffPageSeries, index: dict[str, int], sample: int
) -> Plane:
    outer = _outer(series)
    sizes = [n for _, n in outer]
    at = [min(index.get(axis, 0), n - 1) for axis, n in outer]
    number = int(np.ravel_multi_index(at, sizes)) if outer else 0
    pages = list(series.pages)
    page, skip = pages[0], 0
    if len(pages) == math.prod(sizes):
        page = pages[number]
    elif page is not None and len(pages) == 1 and series.dataoffset is not None:
        skip = number * page.nbytes
    else:
        raise ImageError(
            f'{path}: holds {math.prod(sizes)} planes by its text and {len(pages)} by its pages; '
            f'expected the same; {tiff.FIX}.'
        )
    if page is None:
        raise ImageError(f'{path}: plane {number} of {len(pages)} is missing; {tiff.FIX}.')
    return Plane(page, skip, sample)

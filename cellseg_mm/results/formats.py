"""Files that people and other programs open, by one word each: ``FORMATS`` has the words.

In: an image and the cells to show. Out: one file per format. Invariant: ``predict`` and ensembles
write the same bytes for the same cells, and every format holds every cell that was given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.layout import (
    COCO_SUFFIX,
    LABELS_SUFFIX,
    OVERLAY_SUFFIX,
    REVIEW_SUFFIX,
    ROIS_SUFFIX,
    TABLE_SUFFIX,
)
from cellseg_mm.core.windows import resize
from cellseg_mm.data.image_reader import ImageReader
from cellseg_mm.data.pixel_size import Um
from cellseg_mm.results import export, overlay
from cellseg_mm.results.export import Exported
from cellseg_mm.results.measure import CellFeatures, RegionReader, measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What an image's files show of the cells besides their shapes.

    Attributes:
        class_names: Name of each class.
        class_colours: RGB of each class.
        red_blue_swapped: The image files hold blue where red belongs.
    """

    class_names: tuple[str, ...]
    class_colours: tuple[tuple[int, int, int], ...]
    red_blue_swapped: bool = False


@dataclass(frozen=True)
class Content:
    """What a writer gets: the cells, their image, and their measures, taken when first needed.

    Attributes:
        cells: What is written.
        read: Reads regions of the image in true colours.
        look: Names and colours.
        um_per_px: Height and width of a pixel in micrometres; None if nobody knows.
        small: Reads a smaller copy of the image, with its height and width; None if there is none.
    """

    cells: InstanceSet
    read: RegionReader
    look: Look
    um_per_px: Um | None = None
    small: tuple[RegionReader, tuple[int, int]] | None = None

    @cached_property
    def features(self) -> CellFeatures:
        """The cells' measures; tables and outlines share them."""
        return measure(self.cells, self.read)


def _write_label_map(path: Path, content: Content) -> Exported:
    return export.write_label_map(path, content.cells, um_per_px=content.um_per_px)


def _write_geojson(
    path: Path, content: Content, to_review: NDArray[np.intp] | None = None
) -> Exported:
    look, features = content.look, content.features
    return export.write_geojson(
        path,
        content.cells,
        look.class_names,
        look.class_colours,
        features=features,
        um_per_px=content.um_per_px,
        to_review=to_review,
    )


def _write_review(path: Path, content: Content) -> Exported:
    n = min(MOST_TO_REVIEW, math.ceil(len(content.cells) * SHARE_TO_REVIEW))
    return _write_geojson(path, content, export.most_doubtful(content.cells, n))


def _write_imagej(path: Path, content: Content) -> Exported:
    look = content.look
    return export.write_imagej_rois(
        path, content.cells, look.class_names, class_colours=look.class_colours
    )


def _write_csv(path: Path, content: Content) -> Exported:
    names, features = content.look.class_names, content.features
    return export.write_cells_csv(
        path, content.cells, names, features=features, um_per_px=content.um_per_px
    )


def _write_coco(path: Path, content: Content) -> Exported:
    return export.write_coco(path, [content.cells])


def _write_overlay(path: Path, content: Content) -> Exported:
    cells, look, read = content.cells, content.look, content.read
    if content.small is not None:
        read, hw = content.small
        cells = resize(cells, hw)
    picture = overlay.draw_large(read, cells, look.class_colours, class_names=look.class_names)
    overlay.write_png(path, picture)
    return Exported(path, len(cells))


OVERLAY = 'overlay'
MOST_TO_REVIEW = 50  # cells of an image, and no more of all of them than
SHARE_TO_REVIEW = 0.25
# What a format's file is called after the image's name, and what writes it.
FORMATS: dict[str, tuple[str, Callable[[Path, Content], Exported]]] = {
    'label-map': (LABELS_SUFFIX, _write_label_map),
    'geojson': ('.geojson', _write_geojson),
    'review': (REVIEW_SUFFIX, _write_review),
    'imagej': (ROIS_SUFFIX, _write_imagej),
    'csv': (TABLE_SUFFIX, _write_csv),
    'coco': (COCO_SUFFIX, _write_coco),
    OVERLAY: (OVERLAY_SUFFIX, _write_overlay),
}


def check_words(words: Iterable[str]) -> None:
    """Accept words of ``FORMATS``.

    Raises:
        ConfigError: A word is none.
    """
    unknown = sorted(set(words) - set(FORMATS))
    if unknown:
        raise ConfigError(
            f'formats: found {", ".join(unknown)}; expected some of {", ".join(FORMATS)}; '
            'correct the spelling'
        )


def path_of(folder: Path | str, name: str, word: str) -> Path:
    """Return where an image's file of a format lies."""
    return Path(folder) / f'{name}{FORMATS[word][0]}'


def write_formats(
    folder: Path | str,
    words: Sequence[str],
    cells: InstanceSet,
    reader: ImageReader,
    look: Look,
    *,
    small: ImageReader | None = None,
) -> dict[str, Exported]:
    """Write an image's cells in several formats.

    Args:
        folder: Gets ``<name><suffix>`` with the name of ``cells``.
        words: Keys of ``FORMATS``; their order does not matter.
        cells: Everything in it is written.
        reader: The image; the size of its pixels adds measures in micrometres.
        look: Names, colours and channel order.
        small: A smaller level of the image, as large as a picture for people or larger.

    Returns:
        What each file holds and could not hold, by word.

    Raises:
        ConfigError: A class has no name or colour.
        ImageError: The image cannot be read.
    """
    copy = None if small is None else (_true_colours(small, look), small.image_hw)
    content = Content(cells, _true_colours(reader, look), look, reader.um_per_px, copy)
    return {word: FORMATS[word][1](path_of(folder, cells.name, word), content) for word in words}


def _true_colours(reader: ImageReader, look: Look) -> RegionReader:
    if not look.red_blue_swapped:
        return reader.read
    return lambda *region: np.ascontiguousarray(reader.read(*region)[..., ::-1])

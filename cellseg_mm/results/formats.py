"""Files that people and other programs open, by one word each: ``FORMATS`` has the words.

In: an image's cells, or a prediction file with its images. Out: one file per image and format.
Invariant: ``predict`` and ensembles write the same bytes for the same cells, and what is written is
what the prediction file holds, from a score on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.progress import track
from cellseg_mm.data.image_reader import ImageReader, open_image
from cellseg_mm.data.images import Images
from cellseg_mm.results import export, overlay
from cellseg_mm.results.export import Exported
from cellseg_mm.results.measure import CellFeatures, RegionReader, measure
from cellseg_mm.results.predictions import load_predictions


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
    """

    cells: InstanceSet
    read: RegionReader
    look: Look

    @cached_property
    def features(self) -> CellFeatures:
        """The cells' measures; tables and outlines share them."""
        return measure(self.cells, self.read)


def _write_label_map(path: Path, content: Content) -> Exported:
    return export.write_label_map(path, content.cells)


def _write_geojson(path: Path, content: Content) -> Exported:
    look, features = content.look, content.features
    return export.write_geojson(
        path, content.cells, look.class_names, look.class_colours, features=features
    )


def _write_imagej(path: Path, content: Content) -> Exported:
    look = content.look
    return export.write_imagej_rois(
        path, content.cells, look.class_names, class_colours=look.class_colours
    )


def _write_csv(path: Path, content: Content) -> Exported:
    names, features = content.look.class_names, content.features
    return export.write_cells_csv(path, content.cells, names, features=features)


def _write_coco(path: Path, content: Content) -> Exported:
    return export.write_coco(path, [content.cells])


def _write_overlay(path: Path, content: Content) -> Exported:
    cells, look = content.cells, content.look
    picture = overlay.draw_large(
        content.read, cells, look.class_colours, class_names=look.class_names
    )
    overlay.write_png(path, picture)
    return Exported(path, len(cells))


OVERLAY = 'overlay'
# What a format's file is called after the image's name, and what writes it.
FORMATS: dict[str, tuple[str, Callable[[Path, Content], Exported]]] = {
    'label-map': ('.labels.tif', _write_label_map),
    'geojson': ('.geojson', _write_geojson),
    'imagej': ('.rois.zip', _write_imagej),
    'csv': ('.cells.csv', _write_csv),
    'coco': ('.coco.json', _write_coco),
    OVERLAY: ('.overlay.png', _write_overlay),
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
    folder: Path | str, words: Sequence[str], cells: InstanceSet, reader: ImageReader, look: Look
) -> dict[str, Exported]:
    """Write an image's cells in several formats.

    Args:
        folder: Gets ``<name><suffix>`` with the name of ``cells``.
        words: Keys of ``FORMATS``; their order does not matter.
        cells: Everything in it is written.
        reader: The image.
        look: Names, colours and channel order.

    Returns:
        What each file holds and could not hold, by word.

    Raises:
        ConfigError: A class has no name or colour.
        ImageError: The image cannot be read.
    """
    content = Content(cells, _true_colours(reader, look), look)
    return {word: FORMATS[word][1](path_of(folder, cells.name, word), content) for word in words}


def _true_colours(reader: ImageReader, look: Look) -> RegionReader:
    if not look.red_blue_swapped:
        return reader.read
    return lambda *region: np.ascontiguousarray(reader.read(*region)[..., ::-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What to write of a prediction file.

    Attributes:
        formats: Words of ``FORMATS`` for every image.
        n_overlays: Pictures of the first so many images, besides.
        score_thr: Cells below it are left out.
        class_colours: RGB of each class.
        red_blue_swapped: Whether the files have red and blue exchanged.

    Raises:
        ConfigError: A format is not known.
    """

    formats: tuple[str, ...] = ()
    n_overlays: int = 0
    score_thr: float = 0.5
    class_colours: tuple[tuple[int, int, int], ...]
    red_blue_swapped: bool = False

    def __post_init__(self) -> None:
        check_words(self.formats)


@dataclass(frozen=True, slots=True)
class Written:
    """What :func:`write_outputs` wrote.

    Attributes:
        folder: Where.
        n_files: How many files.
        score_thr: Least score of the cells in them.
        exported: What each file holds, by image and word.
    """

    folder: Path
    n_files: int
    score_thr: float
    exported: Mapping[str, Mapping[str, Exported]]

    def describe(self) -> str:
        """Return lines for a terminal: what could not be expressed, and where the files are."""
        notes = {name: export.describe(files) for name, files in self.exported.items()}
        where = f'exports: {self.n_files} files in {self.folder} (scores >= {self.score_thr:g})'
        return '\n'.join([*(f'{name}: {note}' for name, note in notes.items() if note), where])


def write_outputs(
    predictions_path: Path | str, images: Images, out_dir: Path | str, outputs: Outputs
) -> Written:
    """Write a prediction file's images in the formats asked for, below ``exports``.

    Raises:
        ImageError: An image cannot be read.
    """
    by_name = {s.name: s for s in load_predictions(predictions_path).sets}
    look = Look(
        class_names=images.class_names,
        class_colours=outputs.class_colours,
        red_blue_swapped=outputs.red_blue_swapped,
    )
    folder = Path(out_dir) / 'exports'
    exported: dict[str, dict[str, Exported]] = {}
    for i, case in enumerate(track(images.cases, description='export')):
        words = set(outputs.formats) | ({OVERLAY} if i < outputs.n_overlays else set())
        if not words:
            continue
        found = by_name[case.name]
        shown = found[found.scores >= outputs.score_thr]
        with open_image(case.image_path) as reader:
            exported[case.name] = write_formats(folder, sorted(words), shown, reader, look)
    n_files = sum(len(files) for files in exported.values())
    return Written(folder, n_files, outputs.score_thr, exported)

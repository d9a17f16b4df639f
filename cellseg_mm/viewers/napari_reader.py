"""What napari opens: images, cases, label maps and results, as layers.

In: a path. Out: layer data as napari wants it: (data, attributes, kind). Invariant: nothing of
napari is imported; a label is the same cell in the picture and in the table of features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import ImageError, PredictionError
from cellseg_mm.core.layout import LABELS_SUFFIX
from cellseg_mm.data.config import default_colours
from cellseg_mm.data.image_reader import SUFFIXES, open_image
from cellseg_mm.data.importing.classes import classes_found
from cellseg_mm.data.importing.folder_notes import CLASSES_FILE
from cellseg_mm.data.importing.pairs import read_json
from cellseg_mm.data.importing.shapes import Part, Shape, cells_of_shapes, ring_of
from cellseg_mm.data.importing.sources import ImportParams, Tally
from cellseg_mm.data.labels import read_label_map
from cellseg_mm.results.predictions import load_predictions

LayerData: TypeAlias = tuple[Any, dict[str, Any], str]
Colour: TypeAlias = tuple[int, int, int]

CLASS_MAP = re.compile(r'class(\d+)\.tiff?', re.IGNORECASE)
CLASS_NUMBER = 'class_number'  # in a layer's metadata: its class, from 1
WHOLE_PX = 8192 * 8192  # a larger level is read where it is looked at, or not at all
MOST_LABEL_PX = 16384 * 16384  # 1 GB for each class
BLOCK_PX = 1024
SCORE_THR = 0.5  # as in the formats that predict writes
SHADES = (1.0, 0.8, 0.6, 0.9, 0.7)  # of the class's colour, so that cells that touch are seen


def get_reader(path: str | list[str]) -> Callable[[str | list[str]], list[LayerData]] | None:
    """Return what reads a path, None if it is not for this package (napari asks every plugin)."""
    paths = [Path(one) for one in ([path] if isinstance(path, str) else path)]
    return read_layers if paths and all(map(_is_known, paths)) else None


def _is_known(path: Path) -> bool:
    return _is_case(path) or path.name.lower().endswith((*SUFFIXES, '.geojson', '.npz'))


def _is_case(path: Path) -> bool:
    return _image_of(path) is not None


def read_layers(path: str | list[str]) -> list[LayerData]:
    """Read layers.

    Raises:
        CellSegError: A file cannot be read, or is larger than can be shown.
    """
    layers: list[LayerData] = []
    for one in map(Path, [path] if isinstance(path, str) else path):
        class_map = CLASS_MAP.fullmatch(one.name)
        if _is_case(one):
            layers += _case(one)
        elif class_map:
            layers.append(_class_map(one, int(class_map[1])))
        elif one.name.lower().endswith(LABELS_SUFFIX):
            layers.append((read_label_map(one), {'name': one.name}, 'labels'))
        elif one.suffix.lower() == '.geojson':
            layers += _outlines(one)
        elif one.suffix.lower() == '.npz':
            layers += _predictions(one)
        else:
            layers.append(_image(one))
    return layers


# ---- images ----


class LevelOfImage:
    """One level of an image as an array that reads what is asked of it.

    Attributes:
        shape: (H, W, 3).
        dtype: uint8.
        ndim: 3.
    """

    dtype, ndim = np.dtype(np.uint8), 3

    def __init__(self, path: Path, level: int, image_hw: tuple[int, int]) -> None:
        self.path, self.level = path, level
        self.shape = (*image_hw, 3)

    def __getitem__(self, index: tuple[slice, ...]) -> NDArray[np.uint8]:
        rows, columns = (s.indices(n) for s, n in zip(index[:2], self.shape[:2], strict=True))
        with open_image(self.path, level=self.level) as reader:
            region = reader.read(rows[0], columns[0], rows[1], columns[1])
        return region[:: rows[2], :: columns[2]][(slice(None), slice(None), *index[2:])]


def _image(path: Path) -> LayerData:
    """Return an image: whole, or as a pyramid that is read lazily where dask is installed."""
    with open_image(path) as reader:
        level_hws = reader.level_hws
        attributes: dict[str, Any] = {'name': path.stem, 'rgb': True}
        if reader.says:
            attributes['metadata'] = {'read': reader.says}
        if len(level_hws) == 1 and _n_px(level_hws[0]) <= WHOLE_PX:
            return reader.read(0, 0, *reader.image_hw), attributes, 'image'
    try:
        from dask import array
    except ImportError:
        return _level_that_fits(path, level_hws, attributes)
    levels = [LevelOfImage(path, level, hw) for level, hw in enumerate(level_hws)]
    chunks = (BLOCK_PX, BLOCK_PX, 3)
    pyramid = [array.from_array(level, chunks, lock=True, fancy=False) for level in levels]
    return pyramid, {**attributes, 'multiscale': True}, 'image'


def _level_that_fits(
    path: Path, level_hws: Sequence[tuple[int, int]], attributes: dict[str, Any]
) -> LayerData:
    fitting = [level for level, hw in enumerate(level_hws) if _n_px(hw) <= WHOLE_PX]
    if not fitting:
        raise ImageError(
            f'{path}: has {" and ".join(f"{h} x {w}" for h, w in level_hws)} px; expected at most '
            f'{WHOLE_PX} px without dask; install dask'
        )
    (full_h, full_w), (height, width) = level_hws[0], level_hws[fitting[0]]
    with open_image(path, level=fitting[0]) as reader:
        picture = reader.read(0, 0, height, width)
    scale = (full_h / height, full_w / width)  # so that labels of the full size fit
    return picture, {**attributes, 'scale': scale}, 'image'


def _n_px(hw: tuple[int, int]) -> int:
    return hw[0] * hw[1]


# ---- label maps ----


def _image_of(folder: Path) -> Path | None:
    """Return the image of a case's folder, None if it is no case."""
    names = ('image.tif', 'image.tiff')
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _case(folder: Path) -> list[LayerData]:
    layers: list[LayerData] = []
    for path in filter(None, [_image_of(folder)]):
        data, attributes, kind = _image(path)
        layers.append((data, {**attributes, 'name': folder.name}, kind))
    for path in sorted(folder.iterdir()):
        class_map = CLASS_MAP.fullmatch(path.name)
        if class_map:
            layers.append(_class_map(path, int(class_map[1])))
    return layers


def _class_map(path: Path, number: int) -> LayerData:
    """Return the label map of one class, named as the data folder says."""
    names: list[str] = []
    record = path.parent.parent.parent / CLASSES_FILE
    if record.is_file():
        content = read_json(record, 'the classes of an import')
        names = (
            [str(name) for name in content.get('classes', [])] if isinstance(content, dict) else []
        )
    name = names[number - 1] if 0 < number <= len(names) else f'class {number}'
    labels = read_label_map(path)
    colour = default_colours(number)[-1]
    return _labels(labels, f'{path.parent.name}: {name}', number, colour, None)


def _labels(
    labels: NDArray[np.int32],
    name: str,
    number: int,
    colour: Colour,
    features: dict[str, list[Any]] | None,
) -> LayerData:
    """Return a layer of one class: its cells in shades of one colour."""
    colours: dict[int | None, Any] = {None: _shade(colour, 1.0), 0: (0.0, 0.0, 0.0, 0.0)}
    for label in np.unique(labels[labels > 0]).tolist():
        colours[label] = _shade(colour, SHADES[label % len(SHADES)])
    attributes: dict[str, Any] = {
        'name': name,
        'colormap': colours,
        'metadata': {CLASS_NUMBER: number},
    }
    return labels, attributes | ({'features': features} if features else {}), 'labels'


def _shade(colour: Colour, brightness: float) -> tuple[float, float, float, float]:
    red, green, blue = (value / 255 * brightness for value in colour)
    return red, green, blue, 1.0


# ---- results ----


@dataclass(frozen=True, slots=True)
class _Found:
    """A cell of a result: its class, score and crop."""

    class_name: str
    score: float
    top: int
    left: int
    mask: NDArray[np.bool_]


def _predictions(path: Path) -> list[LayerData]:
    predictions = load_predictions(path)
    if len(predictions.sets) != 1:
        raise PredictionError(
            f'{path}: holds {len(predictions.sets)} images; expected one; open the files that '
            f'predict writes for each image'
        )
    cells = predictions.sets[0].by_score()
    cells = cells[cells.scores >= SCORE_THR]
    known = predictions.provenance.get('class_names')
    names = [str(name) for name in known] if isinstance(known, list) else []
    names += [f'class {k + 1}' for k in range(len(names), int(cells.class_ids.max(initial=-1)) + 1)]
    crops, offsets_yx = cells.crops()
    found = [
        _Found(names[class_id], float(score), y, x, crop)
        for class_id, score, (y, x), crop in zip(
            cells.class_ids.tolist(), cells.scores, offsets_yx.tolist(), crops, strict=True
        )
    ]
    title = f'{path.stem} (score {SCORE_THR} and more)'
    return _layers(path, title, found, cells.image_hw, dict(_palette(names)), names)


def _palette(names: Sequence[str]) -> list[tuple[str, Colour]]:
    return list(zip(names, default_colours(len(names)), strict=True))


def _outlines(path: Path) -> list[LayerData]:
    """Return the cells of QuPath's GeoJSON; the picture ends where the last cell ends."""
    content = read_json(path, "QuPath's GeoJSON")
    features = content.get('features') if isinstance(content, dict) else content
    rows = [row for row in features if isinstance(row, dict)] if isinstance(features, list) else []
    shapes = [(_shape(row, number), row) for number, row in enumerate(rows, start=1)]
    rings = [part.exterior for shape, _ in shapes for part in shape.parts if len(part.exterior)]
    corners = np.array([ring.max(axis=0) for ring in rings]).reshape(-1, 2)
    corners = corners[np.isfinite(corners).all(axis=1)]
    width, height = np.maximum(np.ceil(corners.max(axis=0, initial=1)), 1).astype(int).tolist()
    _require_size(path, (height, width))
    in_use = {shape.class_name for shape, _ in shapes}
    classes = classes_found(ImportParams(single_class='cell' if '' in in_use else ''), in_use)
    tally = Tally()
    found, colours = [], dict(_palette(classes.names))
    for shape, row in shapes:
        cells = cells_of_shapes([shape], classes, path, (height, width), tally)
        properties = row.get('properties') or {}
        for cell in cells:
            name = classes.names[cell.class_number - 1]
            score = float((properties.get('measurements') or {}).get('score', np.nan))
            found.append(_Found(name, score, cell.top, cell.left, cell.mask))
            rgb = (properties.get('classification') or {}).get('color')
            colours[name] = tuple(rgb) if isinstance(rgb, list) and len(rgb) == 3 else colours[name]
    layers = _layers(path, path.stem, found, (height, width), colours, list(classes.names))
    for _, attributes, _ in layers:
        attributes['metadata'] |= {'left out': tally.notes()} if tally.notes() else {}
    return layers


def _shape(row: dict[str, Any], number: int) -> Shape:
    geometry = row.get('geometry') or {}
    coordinates = geometry.get('coordinates') or []
    polygons = coordinates if geometry.get('type') == 'MultiPolygon' else [coordinates]
    parts = tuple(
        Part(ring_of(rings[0]), tuple(ring_of(hole) for hole in rings[1:]))
        for rings in polygons
        if geometry.get('type') in ('Polygon', 'MultiPolygon') and rings
    )
    classification = (row.get('properties') or {}).get('classification') or {}
    return Shape(str(classification.get('name') or ''), parts, f'object {number}')


def _layers(
    path: Path,
    title: str,
    found: Sequence[_Found],
    image_hw: tuple[int, int],
    colours: dict[str, Colour],
    names: Sequence[str],
) -> list[LayerData]:
    """Return a layer for each class that has cells; of two cells the better one has the pixel."""
    _require_size(path, image_hw)
    layers = []
    for number, name in enumerate(names, start=1):
        labels = np.zeros(image_hw, dtype=np.int32)
        own = [k for k, cell in enumerate(found, start=1) if cell.class_name == name]
        for k in sorted(own, key=lambda k: np.nan_to_num(found[k - 1].score)):
            cell = found[k - 1]
            (y, x), (height, width) = (cell.top, cell.left), cell.mask.shape
            labels[y : y + height, x : x + width][cell.mask] = k
        if own:
            features: dict[str, list[Any]] = {
                'index': own,
                'class': [name] * len(own),
                'score': [round(found[k - 1].score, 4) for k in own],
            }
            layers.append(_labels(labels, f'{title}: {name}', number, colours[name], features))
    return layers


def _require_size(path: Path, image_hw: tuple[int, int]) -> None:
    if _n_px(image_hw) > MOST_LABEL_PX:
        raise ImageError(
            f'{path}: its cells lie on {image_hw[0]} x {image_hw[1]} px; expected at most '
            f'{MOST_LABEL_PX} px; open it in QuPath, or predict a part (tools/predict.py --tissue)'
        )

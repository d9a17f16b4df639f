"""QuPath's GeoJSON: annotations, detections and cells with their classes.

In: ``<name>.geojson`` beside an image. Out: cells. Invariant: an object that is no cell (a region
around others, a tile, a point) is counted as such, and none is taken for another image's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cellseg_mm.core.errors import LabelMapError
from cellseg_mm.core.layout import REVIEW_SUFFIX
from cellseg_mm.data.importing.classes import UNNAMED, Classes, classes_found, clean
from cellseg_mm.data.importing.pairs import Pair, find_pairs, read_json
from cellseg_mm.data.importing.parts import tell_apart
from cellseg_mm.data.importing.shapes import (
    Part,
    Shape,
    cells_of_shapes,
    points_inside,
    ring_of,
)
from cellseg_mm.data.importing.sources import Annotated, ImportParams, Job, Tally, composed
from cellseg_mm.data.names import plain_name

NO_CELLS = ('tile', 'tma_core', 'tmacore', 'root')  # kinds of objects that QuPath's files hold too
OF_IMAGE = ('image', 'image_name', 'imagename', 'slide')  # properties that scripts add
IGNORED = '*'  # QuPath ignores classes whose names end so: Ignore*, Region*, Necrosis*
Row = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class _Object:
    """An object with an area: its kind in QuPath's words, '' if the file does not say."""

    kind: str
    shape: Shape


def find_geojson(source: Path, params: ImportParams) -> tuple[list[Job], Classes, list[str]]:
    """Find images with QuPath objects; see ``import_data``."""
    pairs, notes = find_pairs(source, (REVIEW_SUFFIX, '.geojson'), params)
    if not pairs:
        pairs, notes = find_pairs(source, ('.geo.json', '.json'), params)
    names = dict.fromkeys(name for pair in pairs for name in _names_in(pair.table))
    ignored = [name for name in names if name.endswith(IGNORED)]
    classes = classes_found(params, names, ignored)
    jobs = []
    for pair in pairs:
        read = partial(_read_pair, pair, classes, params)
        jobs.append(pair.job(read))
    return jobs, classes, notes


def _names_in(table: Path) -> list[str]:
    """Return the class names of a file; what is wrong with it is said when it is read."""
    try:
        features = _features(table, Tally())
    except LabelMapError:
        return []
    kinds = [_object(row, number, Tally(), nuclei=False) for number, row in features]
    return [clean(one.shape.class_name) for one in kinds if one is not None]


def _read_pair(pair: Pair, classes: Classes, params: ImportParams) -> Annotated:
    tally = Tally()
    image = pair.read_image(tally, params)
    objects = []
    for number, row in _own_features(_features(pair.table, tally), pair, tally):
        found = _object(row, number, tally, nuclei=params.nuclei)
        if found is not None:
            objects.append(found)
    shapes = _without_regions(objects, tally)
    cells = cells_of_shapes(shapes, classes, pair.table, image.shape[:2], tally)
    # some tools write all cells of a class as one object of many parts
    cells = tell_apart(str(pair.table), cells, params.binary, tally, least=4)
    return Annotated(image, cells, tally)


# ---- the file ----


def _features(table: Path, tally: Tally) -> list[tuple[int, Row]]:
    """Return the features of a collection, a list or a file of one, and their numbers from 1."""
    content = read_json(table, "QuPath's GeoJSON")
    found = content.get('features') if isinstance(content, dict) else content
    if isinstance(content, dict) and content.get('type') == 'Feature':
        found = [content]
    if not isinstance(found, list):
        keys = ', '.join(map(str, content))[:80] if isinstance(content, dict) else ''
        kind = f'the keys {keys}' if keys else 'one value'
        raise LabelMapError(
            f"{table}: has no list of features (the file holds {kind}); expected QuPath's GeoJSON; "
            f'export the objects as a FeatureCollection'
        )
    rows: list[tuple[int, Row]] = []
    for number, row in enumerate(found, start=1):
        if isinstance(row, dict) and ('geometry' in row or row.get('type') == 'Feature'):
            rows.append((number, row))
        else:
            tally.leave_out('entries that are no features', f'number {number}')
    return rows


def _own_features(
    features: Sequence[tuple[int, Row]], pair: Pair, tally: Tally
) -> Iterator[tuple[int, Row]]:
    """Leave out objects that occur twice, and those that say they belong to another image."""
    own = {plain_name(name).casefold() for name in (pair.name, pair.images[0].name)}
    seen: set[str] = set()
    ids: set[object] = set()
    n_shared = 0
    for number, row in features:
        others = [name for name in _images_named(row) if plain_name(name).casefold() not in own]
        text = json.dumps([row.get('id'), row.get('geometry'), _kind(row)])
        if others:
            tally.leave_out('objects of another image', f'{_which(row, number)} of {others[0]}')
        elif text in seen:
            tally.leave_out('objects that occur twice', _which(row, number))
        else:
            key = _id(row)
            n_shared += key in ids and not key.startswith('Path')
            seen.add(text)
            ids.update({key} - {''})
            yield number, row
    if n_shared:
        tally.remarks.append(
            f'{n_shared} objects have the id of another one and a different outline: all were taken'
        )


def _images_named(row: Row) -> list[str]:
    """Return the names of images, without folders, that an object says it belongs to."""
    found = {**_dict(row.get('properties')), **row}
    named = [value for key, value in found.items() if key.casefold() in OF_IMAGE]
    return [composed(v).replace('\\', '/').split('/')[-1] for v in named if isinstance(v, str)]


def _dict(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _id(row: Row) -> str:
    value = row.get('id')
    return composed(str(value)) if isinstance(value, str | int) else ''


def _which(row: Row, number: int) -> str:
    return f'object {number}' + (f' ({_id(row)})' if _id(row) else '')


# ---- one object ----


def _object(row: Row, number: int, tally: Tally, *, nuclei: bool) -> _Object | None:
    """Return an object with an area, or count why it is none."""
    kind, which = _kind(row), _which(row, number)
    geometry = _dict(row.get('geometry'))
    nucleus = _dict(row.get('nucleusGeometry'))
    plane = _dict(geometry.get('plane'))
    if kind in NO_CELLS:
        tally.skipped['objects that are tiles or cores'] += 1
        return None
    if any(plane.get(axis) not in (None, 0) for axis in ('z', 't')):
        tally.leave_out('objects on another plane than the first (z or t)', which)
        return None
    if nucleus:
        tally.skipped['outlines of cells around nuclei' if nuclei else 'nuclei inside cells'] += 1
        geometry = nucleus if nuclei else geometry
    parts = _parts(geometry)
    if parts is None:
        tally.leave_out('objects without an area (points, lines, nothing)', which)
        return None
    return _Object(kind, Shape(_class_name(row), parts, which))


def _kind(row: Row) -> str:
    """Return the kind of an object; early versions of QuPath write it in place of an id."""
    properties = _dict(row.get('properties'))
    kind = properties.get('objectType', properties.get('object_type', ''))
    kind = kind if isinstance(kind, str) and kind else _id(row)
    return kind.casefold().removeprefix('path').removesuffix('object')


def _class_name(row: Row) -> str:
    """Return a class: a text, or an object with a name, or (derived classes) with several."""
    classification = _dict(row.get('properties')).get('classification')
    if isinstance(classification, dict):
        names = classification.get('names')
        name = classification.get('name')
        if not isinstance(name, str) and isinstance(names, list):
            name = ': '.join(map(str, names))
        classification = name
    return classification if isinstance(classification, str) else UNNAMED


def _parts(geometry: Row) -> tuple[Part, ...] | None:
    coordinates = geometry.get('coordinates')
    if geometry.get('type') == 'Polygon':
        coordinates = [coordinates]
    elif geometry.get('type') != 'MultiPolygon':
        return None
    if not isinstance(coordinates, list):
        return None
    parts = []
    for polygon in coordinates:
        rings = [ring_of(ring) for ring in polygon] if isinstance(polygon, list) else []
        if rings:
            parts.append(Part(rings[0], tuple(rings[1:])))
    return tuple(parts)


def _without_regions(objects: Sequence[_Object], tally: Tally) -> list[Shape]:
    """Leave out annotations around two or more other objects: regions of interest, no cells."""
    rings = [
        one.shape.parts[0].exterior if one.shape.parts else np.zeros((0, 2)) for one in objects
    ]
    centres = np.array([ring.mean(axis=0) if len(ring) else (np.nan,) * 2 for ring in rings])
    order = np.argsort(centres[:, 0], kind='stable') if len(rings) else np.zeros(0, dtype=np.intp)
    shapes = []
    for i, one in enumerate(objects):
        n_inside = 0
        if one.kind == 'annotation' and len(rings[i]) >= 3 and np.isfinite(rings[i]).all():
            low, high = rings[i].min(axis=0), rings[i].max(axis=0)
            ends = np.searchsorted(centres[order, 0], [low[0], high[0]])
            near = order[ends[0] : ends[1]]
            near = near[(centres[near, 1] >= low[1]) & (centres[near, 1] <= high[1]) & (near != i)]
            n_inside = int(points_inside(rings[i], centres[near]).sum()) if len(near) > 1 else 0
        if n_inside > 1:
            tally.skipped['annotations around two or more other objects (regions)'] += 1
        else:
            shapes.append(one.shape)
    return shapes

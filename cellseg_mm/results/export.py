"""Instances in the formats of other programs: label map, QuPath, ImageJ, table, COCO.

In: an InstanceSet. Out: one file per image and format, and a record of what could not be expressed.
Invariant: cells are written by falling score, so number k means the same cell in every format;
outlines run along pixel edges, so masks read back are the masks written; equal input gives equal
bytes.
"""

from __future__ import annotations

import csv
import json
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from cellseg_mm.core import files, rle
from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.windows import boxes_and_areas
from cellseg_mm.data.names import roi_label
from cellseg_mm.data.pixel_size import Um
from cellseg_mm.results.coco_results import to_coco_results
from cellseg_mm.results.measure import CellFeatures, RegionReader, in_um, measure
from cellseg_mm.results.polygons import Polygon, trace_polygons

if TYPE_CHECKING:
    import roifile

TILE_PX = 512
CHUNK = 2000  # cells whose outlines are in memory at once
NAMESPACE = uuid.UUID('6f0f6b0e-5c1f-5d0e-9f43-1d2a5b8f7c11')  # any constant: ids must repeat
# ImageJ's path of a composite selection: java.awt.geom.PathIterator's numbers
MOVE_TO, LINE_TO, CLOSE = 0.0, 1.0, 4.0
CSV_COLUMNS = (
    *('cell', 'class', 'score', 'area_px', 'centroid_x_px', 'centroid_y_px'),
    *('box_x0_px', 'box_y0_px', 'box_x1_px', 'box_y1_px', 'perimeter_px', 'eccentricity'),
)
UM_COLUMNS = ('area_um2', 'centroid_x_um', 'centroid_y_um', 'perimeter_um')
CHANNELS = ('red', 'green', 'blue')


@dataclass(frozen=True, slots=True)
class Exported:
    """What a file holds, and what it could not hold.

    Attributes:
        path: The file.
        n_written: Cells in it.
        n_empty: Cells left out because their mask has no pixel.
        n_hidden: Cells left out because better ones cover them whole (label maps only).
        n_lost_px: Pixels that a cell lost to a better one (label maps only).
        n_to_review: Cells marked for a person to look at; None where none are asked for.
    """

    path: Path
    n_written: int
    n_empty: int = 0
    n_hidden: int = 0
    n_lost_px: int = 0
    n_to_review: int | None = None


def write_label_map(
    path: Path | str, instances: InstanceSet, *, um_per_px: Um | None = None
) -> Exported:
    """Write a TIFF in which k is the k-th cell by falling score, and 0 is background.

    A contested pixel goes to the higher score. uint16 where the cells fit, else uint32; zlib, in
    tiles, painted one row of tiles at a time: memory does not grow with the image's height. The
    size of a pixel goes into the resolution tags.
    """
    path, ranked = Path(path), instances.by_score()
    dtype = np.uint16 if len(ranked) < 1 << 16 else np.uint32
    boxes, areas = boxes_and_areas(ranked)
    painter = _Painter(ranked, boxes, dtype)
    with files.atomic_path(path) as temporary:
        tifffile.imwrite(
            temporary,
            painter.tiles(),
            shape=ranked.image_hw,
            dtype=dtype,
            tile=(TILE_PX, TILE_PX),
            compression='zlib',
            predictor=True,
            metadata=None,
            software='cellseg_mm',
            photometric='minisblack',
            **_resolution(um_per_px),
            maxworkers=1,
        )
    n_empty = int((areas == 0).sum())
    n_written = int((painter.n_pixels > 0).sum())
    return Exported(
        path,
        n_written,
        n_empty,
        len(ranked) - n_empty - n_written,
        int(areas.sum() - painter.n_pixels.sum()),
    )


def _resolution(um_per_px: Um | None) -> dict[str, Any]:
    if um_per_px is None:
        return {}
    across, down = 1e4 / um_per_px[1], 1e4 / um_per_px[0]
    return {'resolution': (across, down), 'resolutionunit': 'CENTIMETER'}


class _Painter:
    """Paints a label map tile by tile; afterwards ``n_pixels`` (N,) int64 tells what was kept."""

    def __init__(
        self, ranked: InstanceSet, boxes: NDArray[np.int64], dtype: type[np.unsignedinteger]
    ) -> None:
        self.ranked, self.dtype = ranked, dtype
        self.first_row, self.end_row = boxes[:, 1], boxes[:, 3]
        self.n_pixels = np.zeros(len(ranked), dtype=np.int64)

    def tiles(self) -> Iterator[NDArray[Any]]:
        """Yield tiles row by row, padded to full size."""
        height, width = self.ranked.image_hw
        for top in range(0, height, TILE_PX):
            band = self._band(top)
            for left in range(0, width, TILE_PX):
                yield np.ascontiguousarray(band[:, left : left + TILE_PX])

    def _band(self, top: int) -> NDArray[Any]:
        """Paint rows ``top`` to ``top + TILE_PX``, the best cells last."""
        width = -(-self.ranked.image_hw[1] // TILE_PX) * TILE_PX
        band = np.zeros((TILE_PX, width), dtype=self.dtype)
        chosen = np.flatnonzero((self.first_row < top + TILE_PX) & (self.end_row > top))
        rles = [self.ranked.rles[i] for i in chosen.tolist()]
        crops, offsets = rle.decode_crops(rles, self.ranked.image_hw)
        for k in range(len(chosen) - 1, -1, -1):
            (y, x), crop = offsets[k].tolist(), crops[k]
            crop = crop[max(top - y, 0) : top + TILE_PX - y]
            y = max(y - top, 0)
            band[y : y + crop.shape[0], x : x + crop.shape[1]][crop] = chosen[k] + 1
        counts = np.bincount(band.reshape(-1), minlength=len(self.n_pixels) + 1)
        self.n_pixels += counts[1:]
        return band


def _outlines(ranked: InstanceSet) -> Iterator[tuple[int, tuple[Polygon, ...]]]:
    """Yield each cell's number and polygons; cells without pixels are left out."""
    for start in range(0, len(ranked), CHUNK):
        rles = ranked.rles[start : start + CHUNK]
        crops, offsets = rle.decode_crops(rles, ranked.image_hw)
        for k, polygons in enumerate(trace_polygons(crops, offsets), start=start):
            if polygons:
                yield k, polygons


def write_geojson(
    path: Path | str,
    instances: InstanceSet,
    class_names: Sequence[str],
    class_colours: Sequence[Sequence[int]],
    *,
    features: CellFeatures | None = None,
    um_per_px: Um | None = None,
    to_review: NDArray[np.intp] | None = None,
) -> Exported:
    """Write a GeoJSON FeatureCollection of detections that QuPath opens by drag and drop.

    Coordinates are x, y px of the image from its upper left corner, the corners of pixels. Ids
    are made from the image's name and the cell, so they are the same when written again.

    Args:
        path: Where to.
        instances: The cells.
        class_names: Name of each class; QuPath's classification.
        class_colours: RGB of each class.
        features: From ``measure(instances)``, in the order of ``instances``: become measurements.
        um_per_px: Adds measurements in micrometres.
        to_review: Indices of cells to look at, the first first: become annotations, which QuPath
            lets people edit, with the measurement ``review rank`` from 1; None marks nothing.

    Raises:
        ConfigError: A class has no name or colour.
    """
    _check_classes(instances, class_names, class_colours)
    path, order = Path(path), np.argsort(-instances.scores, kind='stable')
    ranked, measures = instances[order], _measurements(features, order, um_per_px)
    rank_of = {int(i): rank for rank, i in enumerate(() if to_review is None else to_review, 1)}
    n_written = n_to_review = 0
    with files.atomic_path(path) as temporary, temporary.open('w', encoding='utf-8') as stream:
        stream.write('{"type":"FeatureCollection","features":[')
        for k, polygons in _outlines(ranked):
            values = {key: v for key, column in measures.items() if np.isfinite(v := column[k])}
            if rank := rank_of.get(int(order[k])):
                values, n_to_review = {'review rank': rank, **values}, n_to_review + 1
            class_id = int(ranked.class_ids[k])
            properties = {
                'objectType': 'annotation' if rank else 'detection',
                'classification': _class_of(class_id, class_names, class_colours),
                'measurements': {'score': _short(ranked.scores[k]), **values},
            }
            text = _feature(ranked, k, polygons, properties)
            stream.write((',\n' if n_written else '\n') + text)
            n_written += 1
        stream.write('\n]}\n')
    n_said = None if to_review is None else n_to_review
    return Exported(path, n_written, len(ranked) - n_written, n_to_review=n_said)


def most_doubtful(instances: InstanceSet, n: int) -> NDArray[np.intp]:
    """Return the indices of the ``n`` cells that a person should look at first, in this order.

    Where the instances carry votes, those with the fewest come first; then, and without votes, the
    lowest scores, which are the nearest to the threshold that let them in.
    """
    votes = instances.extra.get('agreement', np.zeros(len(instances)))
    order: NDArray[np.intp] = np.lexsort((instances.scores, np.round(votes, 3)))
    return order[:n]


def _feature(
    ranked: InstanceSet, k: int, polygons: Sequence[Polygon], properties: Mapping[str, object]
) -> str:
    feature = {
        'type': 'Feature',
        'id': _feature_id(ranked, k),
        'geometry': _geometry(polygons),
        'properties': properties,
    }
    return json.dumps(feature, separators=(',', ':'), ensure_ascii=False, allow_nan=False)


def _class_of(
    class_id: int, class_names: Sequence[str], class_colours: Sequence[Sequence[int]]
) -> dict[str, object]:
    colour = [int(value) for value in class_colours[class_id]]
    return {'name': class_names[class_id], 'color': colour}


def _check_classes(instances: InstanceSet, *per_class: Sequence[object]) -> None:
    highest = int(instances.class_ids.max(initial=-1))
    n_known = min(len(values) for values in per_class)
    if highest >= n_known:
        raise ConfigError(
            f'{instances.name}: class {highest} has no name or colour, {n_known} were given; '
            'give one per class'
        )


def _measurements(
    features: CellFeatures | None, order: NDArray[np.intp], um_per_px: Um | None
) -> dict[str, list[float]]:
    """Return QuPath's measurement names and columns."""
    if features is None:
        return {}
    columns = {
        'Area px^2': features.areas,
        'Perimeter px': features.perimeters,
        'Eccentricity': features.eccentricities,
    }
    names = _channel_names(features.mean_intensities.shape[1])
    for name, column in zip(names, features.mean_intensities.T, strict=True):
        columns[f'Mean {name}'] = column
    if um_per_px is not None:
        micrometres = in_um(features, um_per_px)
        columns['Area µm^2'] = micrometres[:, 0]
        columns['Perimeter µm'] = micrometres[:, 3]
    return {key: column[order].tolist() for key, column in columns.items()}


def _channel_names(n_channels: int) -> list[str]:
    return list(CHANNELS) if n_channels == 3 else [f'channel{c}' for c in range(n_channels)]


def _feature_id(ranked: InstanceSet, k: int) -> str:
    text = f'{ranked.name}/{k}/{ranked.class_ids[k]}/'.encode() + ranked.rles[k]
    return str(uuid.uuid5(NAMESPACE, text.decode('utf-8')))


def _short(score: np.float32) -> float:
    """Return the shortest decimal that is this float32, 0.9 and not 0.8999999761581421."""
    return float(str(score))


def _geometry(polygons: Sequence[Polygon]) -> dict[str, object]:
    parts = [[_closed(ring) for ring in polygon.rings] for polygon in polygons]
    if len(parts) == 1:
        return {'type': 'Polygon', 'coordinates': parts[0]}
    return {'type': 'MultiPolygon', 'coordinates': parts}


def _closed(ring: NDArray[np.int64]) -> list[list[int]]:
    return [*ring.tolist(), ring[0].tolist()]


def write_imagej_rois(
    path: Path | str,
    instances: InstanceSet,
    class_names: Sequence[str],
    *,
    class_colours: Sequence[Sequence[int]] = (),
) -> Exported:
    """Write a zip of ROIs that ImageJ and Fiji open in their ROI Manager.

    A cell is a traced polygon along pixel edges named ``<number>_<class>_<score>``; one with holes
    or several parts is a composite selection.

    Args:
        path: Where to; must end in .zip.
        instances: The cells.
        class_names: Name of each class.
        class_colours: RGB of each class's outline; none leaves ImageJ's own.

    Raises:
        ConfigError: A class has no name or colour.
        ValueError: ``path`` does not end in .zip.
    """
    path, ranked = Path(path), instances.by_score()
    if path.suffix != '.zip':
        raise ValueError(f'{path}: ImageJ opens several ROIs from a .zip only')
    _check_classes(ranked, class_names, class_colours or class_names)
    n_digits = max(len(str(len(ranked))), 4)
    n_written = 0
    with files.atomic_path(path) as temporary, zipfile.ZipFile(temporary, 'w') as archive:
        for k, polygons in _outlines(ranked):
            class_id = int(ranked.class_ids[k])
            label = roi_label(class_names[class_id])
            name = f'{k + 1:0{n_digits}d}_{label}_{ranked.scores[k]:.3f}'
            colour = class_colours[class_id] if class_colours else ()
            info = zipfile.ZipInfo(f'{name}.roi')  # dated 1980: the bytes do not tell the time
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, _imagej_roi(polygons, name, colour))
            n_written += 1
    return Exported(path, n_written, len(ranked) - n_written)


def _imagej_roi(polygons: Sequence[Polygon], name: str, colour: Sequence[int]) -> bytes:
    import roifile

    rings = [ring for polygon in polygons for ring in polygon.rings]
    if len(rings) == 1:
        # Integers mean pixel corners to ImageJ. It is what its own wand tool makes.
        roi = roifile.ImagejRoi.frompoints(rings[0], name=name)
        roi.roitype = roifile.ROI_TYPE.TRACED
    else:
        roi = _composite(rings, name)
    corners = np.concatenate(rings)
    roi.left, roi.top = corners.min(axis=0).tolist()
    roi.right, roi.bottom = corners.max(axis=0).tolist()  # roifile adds 1, ImageJ does not
    if len(colour):
        roi.stroke_color = bytes([255, *(int(value) for value in colour)])  # alpha first
    return roi.tobytes()


def _composite(rings: Sequence[NDArray[np.int64]], name: str) -> roifile.ImagejRoi:
    """Return a selection of several rings; ImageJ fills it by the even-odd rule."""
    import roifile

    path: list[float] = []
    for ring in rings:
        for i, (x, y) in enumerate(ring.tolist()):
            path += [LINE_TO if i else MOVE_TO, float(x), float(y)]
        path.append(CLOSE)
    roi = roifile.ImagejRoi()
    roi.roitype, roi.name = roifile.ROI_TYPE.RECT, name
    roi.multi_coordinates = np.array(path, dtype=np.float32)
    roi.shape_roi_size = len(path)
    return roi


def write_cells_csv(
    path: Path | str,
    instances: InstanceSet,
    class_names: Sequence[str],
    *,
    image: NDArray[Any] | RegionReader | None = None,
    features: CellFeatures | None = None,
    um_per_px: Um | None = None,
) -> Exported:
    """Write a table with one row per cell, by falling score.

    Columns: ``CSV_COLUMNS``, then ``mean_<channel>`` where there is an image, then ``UM_COLUMNS``
    where the size of a pixel is known. Centroids are px from
    the image's upper left corner (half a px more than scikit-image's); boxes are tight and
    half-open. A cell without pixels has a row with area 0 and empty fields.

    Args:
        path: Where to.
        instances: The cells.
        class_names: Name of each class.
        image: For mean intensities; see ``measure.measure``.
        features: Measured before, in the order of ``instances``; then ``image`` is not read.
        um_per_px: Height and width of a pixel in micrometres.

    Raises:
        ConfigError: A class has no name.
    """
    _check_classes(instances, class_names)
    found = measure(instances, image) if features is None else features
    channels = _channel_names(found.mean_intensities.shape[1])
    order = np.argsort(-instances.scores, kind='stable')
    lengths = np.zeros((len(instances), 0)) if um_per_px is None else in_um(found, um_per_px)
    with (
        files.atomic_path(path) as temporary,
        temporary.open('w', encoding='utf-8', newline='') as stream,
    ):
        table = csv.writer(stream, lineterminator='\n')
        table.writerow(
            [*CSV_COLUMNS, *(f'mean_{n}' for n in channels), *UM_COLUMNS[: lengths.shape[1]]]
        )
        for number, i in enumerate(order.tolist(), start=1):
            y, x = (found.centroids_yx[i] + 0.5).tolist()
            floats = [x, y, found.perimeters[i], found.eccentricities[i]]
            floats += [*found.mean_intensities[i], *lengths[i]]
            x, y, perimeter, eccentricity, *more = ('' if v != v else f'{v:.4f}' for v in floats)
            box = found.boxes_xyxy[i].tolist() if found.areas[i] > 0 else [''] * 4
            name, score = class_names[int(instances.class_ids[i])], _short(instances.scores[i])
            row = [number, name, score, int(found.areas[i]), x, y, *box, perimeter, eccentricity]
            table.writerow([*row, *more])
    return Exported(Path(path), len(instances), int((found.areas == 0).sum()))


def write_coco(path: Path | str, sets: Sequence[InstanceSet]) -> Exported:
    """Write COCO results as JSON: 1-based ``category_id``, ``bbox`` xywh, compressed RLE."""
    n_written = 0
    with files.atomic_path(path) as temporary, temporary.open('w', encoding='utf-8') as stream:
        stream.write('[')
        for instances in sets:
            ranked = instances.by_score()
            for start in range(0, len(ranked), CHUNK):  # a million records at once take a GB
                records = to_coco_results([ranked[np.arange(start, len(ranked))[:CHUNK]]])
                text = json.dumps(records, ensure_ascii=False, allow_nan=False)
                stream.write((', ' if n_written else '') + text[1:-1])
                n_written += len(records)
        stream.write(']\n')
    return Exported(Path(path), n_written)


def describe(exported: Mapping[str, Exported]) -> str:
    """Return what was left out or marked, for a terminal; '' when nothing was."""
    lines = []
    for kind, e in exported.items():
        faults = [
            (e.n_empty, 'cells without a pixel'),
            (e.n_hidden, 'cells hidden by better ones'),
            (e.n_lost_px, 'px lost to better cells'),
        ]
        text = ', '.join(f'{n} {what}' for n, what in faults if n)
        lines += [f'{kind}: {text}'] if text else []
        if e.n_to_review is not None:
            lines.append(f'{kind}: {e.n_to_review} of {e.n_written} cells to look at first')
    return '; '.join(lines)

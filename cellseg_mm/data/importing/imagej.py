"""ImageJ's ROIs: zips of the ROI Manager, and single files.

In: ``<name>.rois.zip``, ``<name>_RoiSet.zip``, ``<name>.zip`` or ``<name>.roi`` beside an image.
Out: cells. Invariant: one damaged ROI costs no other; lines and points are counted, never closed.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cellseg_mm.core.errors import LabelMapError
from cellseg_mm.data.importing.classes import UNNAMED, Classes, classes_found, clean
from cellseg_mm.data.importing.pairs import Pair, find_pairs
from cellseg_mm.data.importing.shapes import (
    Part,
    Ring,
    Shape,
    bridged,
    cells_of_shapes,
    ellipse,
)
from cellseg_mm.data.importing.sources import Annotated, ImportParams, Job, Tally, composed
from cellseg_mm.data.names import roi_label

if TYPE_CHECKING:
    import roifile

SUFFIXES = ('.rois.zip', '_rois.zip', '_roiset.zip', '.roi', '.zip')
OUR_NAME = re.compile(
    r'\d{4,}_(.+)_[01]\.\d{3}(?:-\d+)?'
)  # number, class, score; see results.export
MAX_ROI_BYTES = 64 << 20  # one ROI of more is no outline
MOVE_TO, LINE_TO, QUAD_TO, CUBIC_TO, CLOSE = range(5)  # java.awt.geom.PathIterator
N_CURVE = 8
RECT, OVAL = 1, 2
AREAS = (0, RECT, OVAL, 7, 8)  # polygon, rectangle, oval, freehand, traced


def find_imagej(source: Path, params: ImportParams) -> tuple[list[Job], Classes, list[str]]:
    """Find images with ROIs; see ``import_data``."""
    pairs, notes = find_pairs(source, SUFFIXES, params)
    written = {roi_label(name): name for name in params.class_names}
    names: dict[str, None] = {}
    for pair in pairs:
        try:
            found = (_class_name(roi, which) for roi, which in _rois(pair.table, Tally()))
            names |= dict.fromkeys(clean(written.get(name, name)) for name in found)
        except LabelMapError:
            continue  # said when it is read
    classes = classes_found(params, names)
    jobs = []
    for pair in pairs:
        read = partial(_read_pair, pair, written, classes, params)
        jobs.append(pair.job(read))
    return jobs, classes, notes


def _read_pair(
    pair: Pair, written: Mapping[str, str], classes: Classes, params: ImportParams
) -> Annotated:
    tally = Tally()
    image = pair.read_image(tally, params)
    shapes = []
    for roi, which in _rois(pair.table, tally):
        rings = _rings(roi)
        name = _class_name(roi, which)
        if rings is None:
            tally.leave_out('ROIs that are no areas (lines, points, text, curves)', which)
        elif max(roi.z_position, roi.t_position, roi.position) > 1:
            tally.leave_out('ROIs on another plane than the first', which)
        else:
            parts = (Part(bridged(rings)),) if rings else ()
            shapes.append(Shape(written.get(name, name), parts, which))
    cells = cells_of_shapes(shapes, classes, pair.table, image.shape[:2], tally)
    return Annotated(image, cells, tally)


def _rois(table: Path, tally: Tally) -> Iterator[tuple[roifile.ImagejRoi, str]]:
    """Yield ROIs and their names; damaged ones are counted.

    Raises:
        LabelMapError: The file cannot be read, or is no zip of ROIs.
    """
    import roifile

    seen: set[bytes] = set()
    for which, content in _contents(table, tally):
        if content in seen:
            tally.leave_out('ROIs that occur twice', which)
            continue
        seen.add(content)
        try:
            yield roifile.ImagejRoi.frombytes(content), which
        except Exception as problem:  # damaged ROIs raise anything
            text = f'{which}: {str(problem)[:60] or type(problem).__name__}'
            tally.leave_out('ROIs that cannot be read', text)


def _contents(table: Path, tally: Tally) -> Iterator[tuple[str, bytes]]:
    try:
        if table.suffix.lower() == '.roi':
            yield composed(table.stem), table.read_bytes()
            return
        with zipfile.ZipFile(table) as archive:
            for info in archive.infolist():
                which = composed(info.filename)
                if not which.lower().endswith('.roi'):
                    tally.skipped['files in the zip that are no ROIs'] += 1
                elif info.file_size > MAX_ROI_BYTES:
                    tally.leave_out('ROIs of more than 64 MiB', which)
                else:
                    yield which[:-4], _unpacked(archive, info)
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as problem:
        raise LabelMapError(
            f"{table}: cannot be read ({str(problem)[:80]}); expected a zip of ImageJ's ROI "
            f'Manager, or one .roi; save it again'
        ) from problem


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Return a file of a zip; one that is damaged is empty, which is no ROI."""
    try:
        return archive.read(info)
    except Exception:  # checksums, codecs and encryption raise of many kinds
        return b''


def _class_name(roi: roifile.ImagejRoi, which: str) -> str:
    """Return the class: in a name as our export writes it, or else the number of the group."""
    for name in (which, composed(roi.name or '')):
        ours = OUR_NAME.fullmatch(name)
        if ours:
            return ours[1]
    return f'group {roi.group}' if roi.group else UNNAMED


def _rings(roi: roifile.ImagejRoi) -> list[Ring] | None:
    """Return the outlines of a ROI; None if it is no area."""
    if roi.multi_coordinates is not None and roi.composite:
        return _path_rings(roi.multi_coordinates.tolist())
    if roi.roitype not in AREAS or roi.subtype:
        return None
    if roi.roitype in (RECT, OVAL):
        left, top, right, bottom = map(float, (roi.left, roi.top, roi.right, roi.bottom))
        if roi.subpixelrect:
            left, top = roi.xd, roi.yd
            right, bottom = left + roi.widthd, top + roi.heightd
        if roi.roitype == OVAL:
            centre = ((left + right) / 2, (top + bottom) / 2)
            return [ellipse(centre, ((right - left) / 2, (bottom - top) / 2))]
        return [np.array([[left, top], [right, top], [right, bottom], [left, bottom]])]
    return [np.asarray(roi.coordinates(), dtype=np.float64)]


def _path_rings(path: list[float]) -> list[Ring] | None:
    """Return the rings of a composite selection; None if it is no such path."""
    rings: list[list[tuple[float, float]]] = []
    n_values = {MOVE_TO: 2, LINE_TO: 2, QUAD_TO: 4, CUBIC_TO: 6, CLOSE: 0}
    at = 0
    while at < len(path):
        step = int(path[at])
        count = n_values.get(step, len(path))
        values = path[at + 1 : at + 1 + count]
        if len(values) != count or (step != MOVE_TO and not rings):
            return None
        points = list(zip(values[::2], values[1::2], strict=True))
        if step == MOVE_TO:
            rings.append(points)
        elif step != CLOSE:
            rings[-1] += _curve([rings[-1][-1], *points])
        at += 1 + count
    return [np.array(ring, dtype=np.float64) for ring in rings if len(ring) > 2]


def _curve(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return points along a Bezier curve after its first point; of a line, its end."""
    at = np.array(points, dtype=np.float64)[None]  # (1, order + 1, 2)
    steps = (
        np.linspace(0, 1, N_CURVE + 1)[1:, None, None] if len(points) > 2 else np.ones((1, 1, 1))
    )
    while at.shape[1] > 1:
        at = at[:, :-1] * (1 - steps) + at[:, 1:] * steps
    return [(x, y) for x, y in at[:, 0].tolist()]

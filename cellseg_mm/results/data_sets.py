"""A data folder as a data set of other tools: COCO, and YOLO's outlines.

In: training cases. Out: a folder with PNG images and annotations. Invariant: ``import_data`` reads
the same pixels back; the folder appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core import files
from cellseg_mm.core.arrays import Int
from cellseg_mm.core.errors import ConfigError, DataError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.progress import track
from cellseg_mm.core.windows import boxes_and_areas
from cellseg_mm.data.cases import Case, find_cases
from cellseg_mm.data.folds import load_folds
from cellseg_mm.data.importing.shapes import bridged
from cellseg_mm.data.intensity import recorded_range
from cellseg_mm.data.labels import read_gt, read_image
from cellseg_mm.results.overlay import write_png
from cellseg_mm.results.polygons import trace_polygons


@dataclass(frozen=True, slots=True)
class DataSetParams:
    """What to write.

    Attributes:
        class_names: Name of class 1, 2, ...
        folds_path: Tells folds, and the range of values of images of more than 8 bits.
        val_fold: Cases of this fold become the validation set; None writes one set.
        swap_red_blue: Exchange the two channels, where the data are stored so.
    """

    class_names: tuple[str, ...]
    folds_path: Path
    val_fold: int | None = None
    swap_red_blue: bool = False


@dataclass(slots=True)
class DataSetReport:
    """What was written: images by set, cells, and cells whose outline had to be joined by lines."""

    n_images: dict[str, int]
    n_cells: int = 0
    n_joined: int = 0

    def text(self) -> str:
        """Return the report for people."""
        images = ', '.join(f'{n} images in {name}' for name, n in self.n_images.items())
        lines = [f'{images}; {self.n_cells} cells']
        if self.n_joined:
            lines.append(
                f'note: {self.n_joined} cells have holes or several parts; their rings are joined '
                f'by lines forth and back, which enclose nothing where polygons are filled by '
                f'even-odd'
            )
        return '\n'.join(lines)


def write_data_set(
    kind: str, data_root: Path | str, out_dir: Path | str, params: DataSetParams
) -> DataSetReport:
    """Write all training cases as a data set.

    Args:
        kind: ``coco``: ``images/`` and ``train.json`` (and ``val.json``), masks as run lengths.
            ``yolo``: ``images/train/``, ``labels/train/`` (and ``val``), ``data.yaml``, outlines
            a quarter of a pixel inside the edges.
        data_root: The data folder.
        out_dir: Folder to make; it must be empty or not there.
        params: Options.

    Raises:
        ConfigError: ``kind`` is unknown, or ``out_dir`` holds something.
        CellSegError: A case or the folds cannot be read.
    """
    if kind not in WRITERS:
        raise ConfigError(f'data set {kind!r}: expected one of {", ".join(WRITERS)}; choose one')
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ConfigError(f'{out_dir}: is there already; expected a new folder; name another')
    cases = find_cases(data_root, 'train', len(params.class_names))
    sets = _split(cases, params)
    value_range = recorded_range(data_root, params.folds_path)
    report = DataSetReport({name: len(members) for name, members in sets.items()})
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix='.tmp-data-set-', dir=out_dir.parent))

    def write_picture(case: Case, path: Path) -> None:
        picture = read_image(case.image_path, value_range=value_range)
        write_png(path, picture[..., ::-1] if params.swap_red_blue else picture)

    try:
        folder = scratch / 'new'
        WRITERS[kind](folder, sets, params.class_names, write_picture, report)
        if out_dir.exists():
            out_dir.rmdir()
        folder.replace(out_dir)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return report


def _split(cases: Sequence[Case], params: DataSetParams) -> dict[str, list[Case]]:
    if params.val_fold is None:
        return {'train': list(cases)}
    fold_of = load_folds(params.folds_path, [case.name for case in cases]).fold_of()
    sets: dict[str, list[Case]] = {'train': [], 'val': []}
    for case in cases:
        sets['val' if fold_of[case.name] == params.val_fold else 'train'].append(case)
    if not sets['val']:
        raise DataError([f'{params.folds_path}: has no fold {params.val_fold}; name another'])
    return sets


PictureWriter = Callable[[Case, Path], None]


def _write_coco(
    folder: Path,
    sets: Mapping[str, Sequence[Case]],
    class_names: Sequence[str],
    write_picture: PictureWriter,
    report: DataSetReport,
) -> None:
    categories: list[files.JsonValue] = [
        {'id': k, 'name': name} for k, name in enumerate(class_names, start=1)
    ]
    for name, cases in sets.items():
        images: list[files.JsonValue] = []
        annotations: list[files.JsonValue] = []
        for case in track(cases, description=name):
            file_name = f'images/{case.name}.png'
            write_picture(case, folder / file_name)
            height, width = case.image_hw
            images.append(
                {'id': case.image_id, 'file_name': file_name, 'height': height, 'width': width}
            )
            cells = read_gt(case)
            annotations += _annotations(cells, report.n_cells)
            report.n_cells += len(cells)
        content: dict[str, files.JsonValue] = {
            'images': images,
            'annotations': annotations,
            'categories': categories,
        }
        files.write_json(folder / f'{name}.json', content, indent=None)


def _annotations(cells: InstanceSet, n_before: int) -> list[files.JsonValue]:
    boxes, areas = boxes_and_areas(cells)
    return [
        {
            'id': n_before + i + 1,
            'image_id': cells.image_id,
            'category_id': int(cells.class_ids[i]) + 1,
            'segmentation': {'size': list(cells.image_hw), 'counts': cells.rles[i].decode()},
            'area': int(areas[i]),
            'bbox': [int(x0), int(y0), int(x1 - x0), int(y1 - y0)],
            'iscrowd': 0,
        }
        for i, (x0, y0, x1, y1) in enumerate(boxes.tolist())
    ]


def _write_yolo(
    folder: Path,
    sets: Mapping[str, Sequence[Case]],
    class_names: Sequence[str],
    write_picture: PictureWriter,
    report: DataSetReport,
) -> None:
    for name, cases in sets.items():
        for case in track(cases, description=name):
            write_picture(case, folder / 'images' / name / f'{case.name}.png')
            cells = read_gt(case)
            report.n_cells += len(cells)
            rows = _yolo_rows(cells, report)
            files.write_text(folder / 'labels' / name / f'{case.name}.txt', ''.join(rows))
    lines = ['path: .', 'train: images/train', f'val: images/{"val" if "val" in sets else "train"}']
    lines += ['names:', *(f'  {k}: {json.dumps(name)}' for k, name in enumerate(class_names))]
    files.write_text(folder / 'data.yaml', '\n'.join(lines) + '\n')


def _yolo_rows(cells: InstanceSet, report: DataSetReport) -> list[str]:
    scale = np.array(cells.image_hw[::-1], dtype=np.float64)
    rows = []
    for class_id, polygons in zip(
        cells.class_ids.tolist(), trace_polygons(*cells.crops()), strict=True
    ):
        rings = [_inset(ring) for polygon in polygons for ring in polygon.rings]
        report.n_joined += len(rings) > 1
        values = (bridged(rings) / scale).reshape(-1).tolist()
        rows.append(f'{class_id} ' + ' '.join(f'{value:.7g}' for value in values) + '\n')
    return rows


def _inset(ring: Int) -> NDArray[np.float64]:
    """Move a traced ring a quarter of a pixel into its part, which lies to the right of its edges.

    The centres of pixels stay on their sides. Ultralytics cuts off the fractions and fills with the
    outline: so it gets the same pixels, and without this one more at each right and lower edge.
    """
    ways = np.sign(np.roll(ring, -1, axis=0) - ring)
    inward = np.stack([-ways[:, 1], ways[:, 0]], axis=1)
    moved: NDArray[np.float64] = ring + 0.25 * (inward + np.roll(inward, 1, axis=0))
    return moved


Writer = Callable[
    [Path, Mapping[str, Sequence[Case]], Sequence[str], PictureWriter, DataSetReport], None
]
WRITERS: Mapping[str, Writer] = {'coco': _write_coco, 'yolo': _write_yolo}

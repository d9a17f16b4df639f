"""COCO JSON: polygons and run lengths.

In: a JSON file and its images. Out: cells. Invariant: what cannot be drawn is named.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pycocotools import mask as coco_mask

from cellseg_mm.core import rle
from cellseg_mm.core.errors import CellSegError, ImageError, LabelMapError
from cellseg_mm.data.importing.sources import (
    MAX_TEXT_BYTES,
    Annotated,
    Cell,
    Classes,
    ImportParams,
    Job,
    read_picture,
)


def _find_coco(source: Path, params: ImportParams) -> tuple[list[Job], Classes]:
    content = _read_coco(source)
    name_of = {_id_of(c, source, 'category'): str(c.get('name', '')) for c in content['categories']}
    default = [name_of[key] for key in sorted(name_of)]
    classes = Classes.from_params(params, default)
    by_image: dict[int, list[dict]] = {}
    for annotation in content['annotations']:
        by_image.setdefault(_id_of(annotation, source, 'annotation', 'image_id'), []).append(
            annotation
        )
    jobs = []
    for entry in sorted(content['images'], key=lambda e: str(e.get('file_name'))):
        image_id = _id_of(entry, source, 'image')
        annotations = by_image.pop(image_id, [])
        file_name = str(entry.get('file_name', ''))
        reader = _CocoReader(source, entry, annotations, name_of, classes, params)
        name = Path(file_name).stem or str(image_id)
        jobs.append(Job(name, Path(file_name or source), '', reader.read))
    if by_image:
        raise CellSegError(
            f'{source}: {sum(map(len, by_image.values()))} annotations are of image ids that '
            f'are not listed: {sorted(by_image)[:5]}; add the images or remove the annotations'
        )
    return jobs, classes


def _read_coco(source: Path) -> dict[str, list[dict]]:
    try:
        if source.stat().st_size > MAX_TEXT_BYTES:
            raise CellSegError(f'{source}: is larger than 2 GiB; expected a COCO file')
        content = json.loads(source.read_bytes())
    except OSError as problem:
        raise CellSegError(f'{source}: cannot be read ({problem.strerror})') from problem
    except (ValueError, RecursionError) as problem:
        raise CellSegError(
            f'{source}: not valid JSON ({str(problem)[:80]}); expected a COCO file'
        ) from problem
    keys = ('images', 'annotations', 'categories')
    for key in keys:
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise CellSegError(f'{source}: {key} is no list of objects; expected a COCO file')
    for key in ('images', 'categories'):
        ids = Counter(_id_of(row, source, key) for row in content[key])
        repeated = [i for i, n in ids.items() if n > 1]
        if repeated:
            raise CellSegError(f'{source}: {key} ids {repeated[:5]} occur more than once')
    return {key: content[key] for key in keys}


def _id_of(row: Mapping, source: Path, what: str, key: str = 'id') -> int:
    value = row.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CellSegError(f'{source}: {what}: {key} is {value!r}; expected a whole number')
    return value


@dataclass(frozen=True, slots=True)
class _CocoReader:
    source: Path
    entry: Mapping
    annotations: Sequence[Mapping]
    name_of: Mapping[int, str]
    classes: Classes
    params: ImportParams

    def read(self) -> Annotated:
        path = self._image_path()
        image = read_picture(path, max_pixels=self.params.max_pixels)
        stated = (self.entry.get('height'), self.entry.get('width'))
        if stated != image.shape[:2]:
            raise ImageError(
                f'{path}: the image is {image.shape[0]} x {image.shape[1]} px, {self.source} says '
                f'{stated[0]} x {stated[1]}; they must match'
            )
        cells: list[Cell] = []
        left_out: Counter[str] = Counter()
        for annotation in self.annotations:
            where = f'{self.source}: annotation {annotation.get("id")}'
            category_id = _id_of(annotation, self.source, 'annotation', 'category_id')
            category = self.name_of.get(category_id)
            if category is None:
                raise LabelMapError(
                    f'{where}: category_id is {category_id}; expected one of {sorted(self.name_of)}'
                )
            number = self.classes.number(category, self.source)
            if annotation.get('iscrowd', 0):
                left_out['crowd areas (iscrowd)'] += 1
            elif not number:
                left_out[f'cells of class {category}'] += 1
            else:
                cell = coco_cell(annotation.get('segmentation'), number, image.shape[:2], where)
                if cell.mask.any():
                    cells.append(cell)
                else:
                    left_out['cells without a pixel'] += 1
        return Annotated(
            image, cells, [f'{n} {what} left out' for what, n in sorted(left_out.items())]
        )

    def _image_path(self) -> Path:
        folder = (self.params.image_dir or self.source.parent).resolve()
        name = self.entry.get('file_name')
        path = folder
        if isinstance(name, str) and '\0' not in name:
            path = (folder / name).resolve()
        if not path.is_relative_to(folder) or path == folder:
            raise ImageError(
                f'{self.source}: file_name is {name!r}; expected a file inside {folder}; correct '
                f'it or name the folder of images'
            )
        return path


def coco_cell(segmentation: object, class_number: int, image_hw: Sequence[int], where: str) -> Cell:
    """Turn a COCO segmentation into a cell.

    Args:
        segmentation: Polygons (lists of x, y; joined), or RLE with ``counts`` as a list or text.
        class_number: 1-based.
        image_hw: Height and width that an RLE must have; polygons are cut off there.
        where: Begin of error messages.

    Raises:
        LabelMapError: The segmentation is broken.
    """
    if isinstance(segmentation, list) and segmentation:
        polygons = [_checked_polygon(polygon, image_hw, where) for polygon in segmentation]
        parts = coco_mask.frPyObjects(polygons, *image_hw)
        counts = coco_mask.merge(parts)['counts']
    elif isinstance(segmentation, dict):
        if segmentation.get('size') != list(image_hw):
            raise LabelMapError(
                f'{where}: the RLE has size {segmentation.get("size")}, the image {list(image_hw)}'
            )
        counts = _rle_counts(segmentation.get('counts'), image_hw, where)
    else:
        raise LabelMapError(f'{where}: segmentation is missing; expected polygons or an RLE')
    try:
        crops, corners = rle.decode_crops([counts], (image_hw[0], image_hw[1]))
    except CellSegError as problem:
        raise LabelMapError(f'{where}: {problem}') from None
    return Cell(class_number, int(corners[0, 0]), int(corners[0, 1]), crops[0])


def _checked_polygon(polygon: object, image_hw: Sequence[int], where: str) -> list[float]:
    values = polygon if isinstance(polygon, list) else []
    are_numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not are_numbers or len(values) < 6 or len(values) % 2:
        raise LabelMapError(
            f'{where}: a polygon has {len(values)} values; expected an even number of at least 6 '
            f'numbers'
        )
    # pycocotools allocates by the length of the outline, and trusts what it gets.
    reach = 2 * max(image_hw)
    if not all(-reach <= v <= 2 * reach for v in values):
        raise LabelMapError(f'{where}: a polygon leaves the image by far; expected pixels')
    return [float(v) for v in values]


def _rle_counts(counts: object, image_hw: Sequence[int], where: str) -> bytes:
    if isinstance(counts, str) and counts.isascii():
        return counts.encode()
    runs = counts if isinstance(counts, list) else []
    are_runs = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in runs)
    if not are_runs or sum(runs) != math.prod(image_hw):
        raise LabelMapError(
            f'{where}: the RLE counts are broken; expected runs that fill {image_hw[0]} x '
            f'{image_hw[1]} px'
        )
    encoded = coco_mask.frPyObjects({'size': list(image_hw), 'counts': runs}, *image_hw)
    return bytes(encoded['counts'])

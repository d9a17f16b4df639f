"""One label map an image, as Cellpose and StarDist write it.

In: a folder. Out: cells of one class. Invariant: values are instances, never colours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from cellseg_mm.core.errors import CellSegError, LabelMapError
from cellseg_mm.data.importing.sources import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    Annotated,
    Cell,
    Classes,
    ImportParams,
    Job,
    _check_size,
    _listed,
    _read_with_pillow,
    _single_class,
    read_picture,
)
from cellseg_mm.data.labels import read_label_map
from cellseg_mm.data.tiff import DEFAULT_MAX_PIXELS


def _find_label_maps(source: Path, params: ImportParams) -> tuple[list[Job], Classes]:
    classes, number = _single_class(params)
    image_dir = source / 'images' if (source / 'images').is_dir() else source
    mask_dir = source / 'masks'
    images: dict[str, list[Path]] = {}
    masks: dict[str, list[Path]] = {}
    for path in _listed(image_dir, IMAGE_SUFFIXES):
        mask_of = re.fullmatch(r'(.+?)_(?:cp_)?masks', path.stem)
        stem = mask_of[1] if mask_of else path.stem
        (masks if mask_of else images).setdefault(re.sub('_img$', '', stem), []).append(path)
    if mask_dir.is_dir():
        for path in _listed(mask_dir, MASK_SUFFIXES):
            stem = re.sub(r'_(?:cp_)?masks?$', '', path.stem)
            masks.setdefault(re.sub('_img$', '', stem), []).append(path)
    jobs = []
    for stem in sorted(images.keys() | masks.keys()):
        pair = images.get(stem, []), masks.get(stem, [])
        first = (pair[0] or pair[1])[0]
        jobs.append(Job(stem, first, '', partial(_read_pair, stem, *pair, number, params)))
    return jobs, classes


def _read_pair(
    stem: str, images: list[Path], masks: list[Path], number: int, params: ImportParams
) -> Annotated:
    for what, paths in (('image', images), ('label map', masks)):
        if len(paths) != 1:
            beside = (images + masks)[0]
            found = ' and '.join(str(path) for path in paths) or 'none'
            raise CellSegError(f'{beside}: {stem} has {len(paths)} {what}s ({found}); expected one')
    image = read_picture(images[0], max_pixels=params.max_pixels)
    label_map = _read_any_label_map(masks[0], image.shape[:2])
    return Annotated(image, _cells_of(label_map, number))


def _read_any_label_map(path: Path, image_hw: Sequence[int]) -> NDArray[np.int32]:
    if path.suffix.lower() in ('.tif', '.tiff'):
        return read_label_map(path, (image_hw[0], image_hw[1]))
    limit = max(math.prod(image_hw), DEFAULT_MAX_PIXELS)
    values, mode = _read_with_pillow(path, limit, LabelMapError)
    if values.ndim != 2 or values.dtype.kind not in 'bui' or values.min(initial=0) < 0:
        raise LabelMapError(
            f'{path}: the mode is {mode}; expected one channel with an id per pixel; export ids, '
            f'not colours'
        )
    _check_size(path, values.shape, image_hw)
    return values.astype(np.int32)


def _cells_of(label_map: NDArray[np.int32], class_number: int) -> list[Cell]:
    """Return the instances of a label map by rising id."""
    ids, compact = np.unique(label_map, return_inverse=True)
    compact = compact.reshape(label_map.shape) + (0 if ids[0] == 0 else 1)
    boxes = ndimage.find_objects(compact)
    return [
        Cell(class_number, box[0].start, box[1].start, compact[box] == i)
        for i, box in enumerate(boxes, start=1)
    ]

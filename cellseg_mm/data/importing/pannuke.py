"""PanNuke's arrays: images.npy, masks.npy and types.npy of a fold.

In: a folder. Out: cells of five classes. Invariant: arrays are mapped, not loaded (a fold has
several GB), and nothing is unpickled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import CellSegError, ImageError, LabelMapError
from cellseg_mm.data.importing.classes import Classes, build_classes
from cellseg_mm.data.importing.label_maps import cells_of
from cellseg_mm.data.importing.sources import Annotated, Cell, ImportParams, Job, Picture, Tally

# Channels of masks.npy; the last one is what no cell covers.
NAMES = ('Neoplastic', 'Inflammatory', 'Connective', 'Dead', 'Epithelial')


def find_pannuke(source: Path, params: ImportParams) -> tuple[list[Job], Classes, list[str]]:
    """Find the images of PanNuke's folds; see ``import_data``."""
    classes = build_classes(params, NAMES, found=NAMES)
    jobs: list[Job] = []
    notes: list[str] = []
    for masks in sorted(source.rglob('masks.npy')):
        fold = masks.parent.name if masks.parent != source else source.resolve().name
        images = _beside(masks, 'images')
        n_images = _check(images, masks)
        tissues = _tissues(_beside(masks, 'types'), n_images, notes)
        counts = Counter(tissue for tissue in tissues if tissue)
        if counts:
            parts = ', '.join(f'{n} {tissue}' for tissue, n in sorted(counts.items()))
            notes.append(f'{masks.parent}: tissues, which end the names of cases: {parts}')
        for i, tissue in enumerate(tissues):
            name = f'{fold}_{i:05d}' + f'_{tissue}' * bool(tissue)
            read = partial(_read_image, images, masks, i, classes, params)
            jobs.append(Job(name, masks.parent / f'{i:05d}', '', read))
    return jobs, classes, notes


def _beside(masks: Path, what: str) -> Path:
    """Return where an array lies: with the masks, or as PanNuke is unpacked, in images/fold1."""
    near = masks.with_name(f'{what}.npy')
    parts = list(masks.parts)
    if not near.exists() and 'masks' in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index('masks')
        return Path(*parts[:last], 'images', *parts[last + 1 : -1], f'{what}.npy')
    return near


def _map(path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode='r', allow_pickle=False)
    except Exception as problem:  # damaged headers raise anything, errors of Python's parser too
        raise CellSegError(
            f'{path}: cannot be read ({str(problem)[:100]}); expected an array of numpy, without '
            f'pickled objects; unpack or download it again'
        ) from problem
    return array


def _check(images: Path, masks: Path) -> int:
    """Return how many images there are, or refuse arrays that do not belong together."""
    shapes = _map(images).shape, _map(masks).shape
    is_right = len(shapes[0]) == len(shapes[1]) == 4 and shapes[0][3] == 3
    if not is_right or shapes[0][:3] != shapes[1][:3] or shapes[1][3] != len(NAMES) + 1:
        raise CellSegError(
            f'{masks}: has the shape {shapes[1]}, {images} {shapes[0]}; expected (N, H, W, 6) and '
            f'(N, H, W, 3) of the same images; check that both are of one fold'
        )
    return shapes[0][0]


def _tissues(path: Path, n_images: int, notes: list[str]) -> Sequence[str]:
    """Return the tissue of each image; '' where types.npy does not say it."""
    if not path.exists():
        return [''] * n_images
    try:
        types = _map(path)
        if types.dtype.kind != 'U' or types.shape != (n_images,):
            raise CellSegError(
                f'{path}: holds {types.dtype} of the shape {types.shape}; expected {n_images} names'
            )
        return [name.decode() for name in types.astype('S')]
    except (CellSegError, UnicodeEncodeError, SystemError) as problem:  # characters that are none
        notes.append(f'{path}: tissues are left out ({problem})')
        return [''] * n_images


def _read_image(
    images: Path, masks: Path, i: int, classes: Classes, params: ImportParams
) -> Annotated:
    tally = Tally()
    image = _picture(images, np.array(_map(images)[i]), params)
    layers = np.array(_map(masks)[i])
    if not np.isfinite(layers).all() or (layers < 0).any() or (layers % 1 != 0).any():
        raise LabelMapError(
            f'{masks}: image {i} has values that are no ids (NaN, fractions or below 0); expected '
            f'whole ids, 0 for background; download it again'
        )
    cells: list[Cell] = []
    for channel, name in enumerate(NAMES):
        found = cells_of(layers[..., channel].astype(np.int64), classes.number(name, masks) or 1)
        if classes.number(name, masks):
            cells += found
        elif found:
            tally.skipped[f'cells of class {name}'] += len(found)
    return Annotated(image, cells, tally)


def _picture(images: Path, pixels: NDArray[Any], params: ImportParams) -> Picture:
    if pixels.shape[0] * pixels.shape[1] > params.max_pixels:
        raise ImageError(
            f'{images}: images have {pixels.shape[0]} x {pixels.shape[1]} px; at most '
            f'{params.max_pixels} px are accepted; raise --max-pixels'
        )
    values = pixels.astype(np.uint8)  # PanNuke stores 0..255 as float64
    if not np.isfinite(pixels).all() or (values != pixels).any():
        raise ImageError(
            f'{images}: has values that are no whole numbers from 0 to 255; expected 8-bit '
            f'colours, whatever their type; do not normalise them'
        )
    return values

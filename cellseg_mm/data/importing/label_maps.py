"""One label map an image, as Cellpose and StarDist write it.

In: a folder. Out: cells of one class. Invariant: values are instances, never colours, classes or
the two values of a mask; what may be one of these is refused with the option that settles it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import CellSegError, LabelMapError
from cellseg_mm.data.importing.classes import UNNAMED, Classes, build_classes, nearest
from cellseg_mm.data.importing.parts import (
    WAYS_OUT,
    count_parts,
    is_scattered,
    note_joined,
    split,
)
from cellseg_mm.data.importing.pictures import IDS, read_grid, read_picture
from cellseg_mm.data.importing.sources import (
    IMAGE_SUFFIXES,
    Annotated,
    Binary,
    Cell,
    Format,
    ImportParams,
    Job,
    Picture,
    Tally,
    composed,
    entries,
    first_of,
    listed,
    unused_note,
)

# What people write after an image's name: Cellpose, StarDist, QuPath, Omnipose, ilastik, DSB
LABEL_ENDS = re.compile(
    r'(.+?)[_\-. ](?:cp_)?(?:masks?|labels?|lbl|instances?|inst(?:ance)?_?map|seg|gt)',
    re.IGNORECASE,
)
# What Cellpose and StarDist write beside them
BY_PRODUCTS = re.compile(
    r'(.+?)_(?:d?flows?|cp_outputs?|cp_flows?|outlines|probs?|cellprob|dP|dist)', re.IGNORECASE
)
LABEL_FOLDERS = ('masks', 'labels', 'mask', 'label', 'gt')

Paths = dict[str, list[Path]]


@dataclass(frozen=True, slots=True)
class MaskPair:
    """An image and its mask: one file each, if all is well.

    Attributes:
        name: The image's, without suffix.
        images: Its files.
        masks: Label maps or masks of it.
        others: Names that have what this one lacks, for advice.
    """

    name: str
    images: Sequence[Path]
    masks: Sequence[Path]
    others: Sequence[str]

    @property
    def first(self) -> Path:
        """A file for messages."""
        return [*self.images, *self.masks][0]

    def read_image(self, tally: Tally, params: ImportParams) -> Picture:
        """Read the image.

        Raises:
            CellSegError: It or its mask is missing or there twice, or it cannot be read.
        """
        for what, paths in (('image', self.images), ('label map', self.masks)):
            if len(paths) != 1:
                found = ' and '.join(str(path) for path in paths) or 'none'
                near = '' if paths else nearest(self.name, self.others)
                hint = f' (nearest: {near})' if near else ''
                raise CellSegError(
                    f'{self.first}: {self.name} has {len(paths)} {what}s ({found}){hint}; expected '
                    f'one; name the label map <image>_masks or masks/<image>, or move the file away'
                )
        return read_picture(self.images[0], tally, max_pixels=params.max_pixels)


def find_label_maps(source: Path, params: ImportParams) -> tuple[list[Job], Classes, list[str]]:
    """Find pairs of an image and its label map; see ``import_data``."""
    number, classes = one_class(source, params)
    pairs, notes = find_mask_pairs(source, 'label-map')
    jobs = [Job(p.name, p.first, '', partial(_read_pair, p, number, params)) for p in pairs]
    return jobs, classes, notes


def find_mask_pairs(
    source: Path, source_format: Format, *, tables: Sequence[str] = ()
) -> tuple[list[MaskPair], list[str]]:
    """Find images and their masks by name.

    Args:
        source: Folder of images with ``<name>_masks`` or the like, or of ``images`` and ``masks``.
        source_format: For messages.
        tables: Suffixes of files that the format reads besides.

    Returns:
        Pairs by name, with what is missing of each; and sentences about files of other kinds.

    Raises:
        CellSegError: There is no image and no mask.
    """
    images, masks, notes = _find_files(source, (*IMAGE_SUFFIXES, *tables))
    if not images and not masks:
        raise CellSegError(_where_instead(source, source_format))
    pairs = []
    for name in sorted(images.keys() | masks.keys()):
        own = images.get(name, []), masks.get(name, [])
        pairs.append(MaskPair(name, *own, sorted((masks if own[0] else images).keys() - {name})))
    return pairs, notes


def one_class(source: Path, params: ImportParams) -> tuple[int, Classes]:
    """Return the class of all cells of a format without classes.

    Raises:
        CellSegError: Several classes are named, and not which one it is.
    """
    own = [params.single_class or 'cell']
    classes = build_classes(params, own, found=[UNNAMED])
    return classes.number(UNNAMED, source), classes


def _find_files(source: Path, used: Sequence[str]) -> tuple[Paths, Paths, list[str]]:
    """Return images and label maps by the image's name, and what was passed over."""
    image_dir = source / 'images' if (source / 'images').is_dir() else source
    notes = unused_note(image_dir, used)
    beside = {path: composed(path.stem) for path in listed(image_dir, IMAGE_SUFFIXES)}
    stems = {_image_name(stem) for stem in beside.values()}
    images: Paths = {}
    masks: Paths = {}
    passed: list[str] = []
    for path, stem in beside.items():
        mask_of = LABEL_ENDS.fullmatch(stem)
        by_product = BY_PRODUCTS.fullmatch(stem)
        is_sure = re.fullmatch(r'.+_(cp_)?masks', stem)
        if mask_of and (is_sure or _image_name(mask_of[1]) in stems):
            masks.setdefault(_image_name(mask_of[1]), []).append(path)
        elif by_product and _image_name(by_product[1]) in stems:
            passed.append(path.name)
        else:
            images.setdefault(_image_name(stem), []).append(path)
    if passed:
        notes.append(f'{image_dir}: by-products of other tools were not used: {first_of(passed)}')
    for folder in (source / name for name in LABEL_FOLDERS):
        if folder.is_dir():
            notes += unused_note(folder, used)
            for path in listed(folder, IMAGE_SUFFIXES):
                masks.setdefault(_label_name(composed(path.stem), images), []).append(path)
    return images, masks, notes


def _image_name(stem: str) -> str:
    return re.sub('_img$', '', stem)


def _label_name(stem: str, images: Mapping[str, list[Path]]) -> str:
    """Return the image's name that the name of a file in a folder of label maps means."""
    if _image_name(stem) in images:
        return _image_name(stem)
    mask_of = LABEL_ENDS.fullmatch(stem)
    return _image_name(mask_of[1] if mask_of else stem)


def _where_instead(source: Path, source_format: str) -> str:
    inner = [
        str(folder)
        for folder in entries(source)
        if folder.is_dir() and any((folder / name).is_dir() for name in ('images', *LABEL_FOLDERS))
    ]
    advice = f'name one of its folders: {first_of(inner)}' if inner else 'check the path'
    return (
        f'{source}: nothing to import as {source_format}; expected images with <name>_masks or '
        f'masks/<name>; {advice}'
    )


def _read_pair(pair: MaskPair, number: int, params: ImportParams) -> Annotated:
    tally = Tally()
    image = pair.read_image(tally, params)
    ids = read_grid(pair.masks[0], image.shape[:2])
    return Annotated(image, _cells(pair.masks[0], ids, number, params.binary, tally), tally)


def _cells(
    path: Path, ids: NDArray[np.int64], number: int, binary: Binary, tally: Tally
) -> list[Cell]:
    """Return the cells of a label map, or refuse what is a mask or a map of classes."""
    cells = cells_of(ids, number)
    values = np.unique(ids[ids > 0])
    if not cells or binary == 'ids':
        return cells
    n_parts = [count_parts(cell) for cell in cells]
    n_torn = sum(n > 1 for n in n_parts)
    if len(cells) == 1 and (n_torn or values[0] in (255, 65535) or ids.all()):
        if binary == 'components':
            found = split(cells[0])
            tally.remarks.append(f'{path.name}: a mask of one value became {len(found)} cells')
            note_joined(found, tally)
            return found
        raise LabelMapError(
            f'{path}: has one value ({values[0]}) in {n_parts[0]} parts, as a mask that does not '
            f'tell cells apart; expected an id per cell; {WAYS_OUT}, --binary ids one cell of it'
        )
    if is_scattered(n_parts):
        raise LabelMapError(
            f'{path}: {n_torn} of its {len(cells)} values lie in several parts, {sum(n_parts)} in '
            f'all, as classes, probabilities or grey values do; expected an id per cell; {IDS}, or '
            f'--binary ids takes each value as one cell'
        )
    if len(cells) == 1:
        tally.remarks.append(f'{path.name}: a single value ({values[0]}) was taken as one cell')
    elif n_torn:
        tally.remarks.append(
            f'{path.name}: {n_torn} of {len(cells)} cells lie in several parts that do not touch'
        )
    return cells


def cells_of(ids: NDArray[np.int64], class_number: int) -> list[Cell]:
    """Return the instances of a label map by rising id."""
    from scipy import ndimage

    values, compact = np.unique(ids, return_inverse=True)
    compact = compact.reshape(ids.shape) + (0 if values[0] == 0 else 1)
    boxes = ndimage.find_objects(compact)
    return [
        Cell(class_number, box[0].start, box[1].start, compact[box] == i)
        for i, box in enumerate(boxes, start=1)
    ]

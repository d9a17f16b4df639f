"""What one case's files hold, and everything that is odd about them.

In: a :class:`~cellseg_mm.data.cases.Case`. Out: :class:`CaseFacts`, small enough to keep for
10,000 cases and to send between processes. Invariant: the result depends on the files' content
only.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import CellSegError, ImageError, LabelMapError
from cellseg_mm.data import pixel_size, tiff
from cellseg_mm.data.cases import Case
from cellseg_mm.data.labels import LabelLayers, read_label_layers, read_label_map, read_scaled
from cellseg_mm.data.pixel_size import Um
from cellseg_mm.data.preparing.likeness import detail_of, thumb_of


@dataclass(frozen=True, slots=True)
class Finding:
    """Something odd that does not forbid to train.

    Attributes:
        kind: Short name, the same for all findings of one sort.
        count: How many instances, pixels or files are concerned.
        text: Sentence that names the file.
    """

    kind: str
    count: int
    text: str


@dataclass(frozen=True, slots=True)
class CaseFacts:
    """What was found in one case.

    Attributes:
        name: Case name.
        image_hw: Height and width in px.
        counts: Instances of each class.
        area_sums: Mask pixels of each class's instances in px.
        pixel_hash: 32 hex digits over the size and the 8-bit RGB pixels.
        thumb: Grey picture of 16 x 16 px as 512 hex digits, see ``likeness.thumb_of``.
        detail: What is darker and brighter than around it, see ``likeness.detail_of``.
        value_high: What would become 255 by this file alone; 0 for values of up to 8 bits.
        errors: Sentences about what cannot be used; then the fields above are of no use.
        warnings: See :class:`Finding`.
        um_per_px: Height and width of a pixel in micrometres; None where the file does not say it.
    """

    name: str
    image_hw: tuple[int, int]
    counts: tuple[int, ...]
    area_sums: tuple[int, ...]
    pixel_hash: str
    thumb: str
    detail: str
    value_high: float = 0.0
    errors: tuple[str, ...] = ()
    warnings: tuple[Finding, ...] = ()
    um_per_px: Um | None = None


def check_case(
    case: Case,
    n_classes: int,
    *,
    is_labelled: bool = True,
    max_pixels: int = tiff.DEFAULT_MAX_PIXELS,
) -> CaseFacts:
    """Read all of a case's files and report on them.

    Args:
        case: A case from ``find_cases`` or ``scan_cases``.
        n_classes: Number of classes.
        is_labelled: Whether to look for oddities of the cells; False for test images.
        max_pixels: Most pixels of an image that are accepted.
    """
    errors: list[str] = []
    warnings: list[Finding] = []
    pixel_hash = thumb = detail = ''
    value_high, size = 0.0, pixel_size.UNKNOWN
    try:
        image, found = read_scaled(case.image_path, max_pixels=max_pixels, value_range=None)
        value_high = found.high if found is not None else 0.0
        pixel_hash, thumb, detail = _pixel_hash(image), thumb_of(image), detail_of(image)
        warnings += _image_warnings(case.image_path, image)
        size = pixel_size.of_case(case.image_path)
        if size.says:
            warnings.append(Finding('size of pixels', 1, f'{case.image_path}: {size.says}.'))
    except ImageError as problem:
        errors.append(str(problem))
    counts = area_sums = (0,) * n_classes
    try:
        labels = read_label_layers(case)
        areas = _areas(labels)
        counts = _per_class(labels, np.ones(len(labels), dtype=np.int64), n_classes)
        area_sums = _per_class(labels, areas, n_classes)
        warnings += _label_warnings(case, labels, areas) if is_labelled else []
    except LabelMapError:
        errors += _label_errors(case)
    return CaseFacts(
        case.name,
        case.image_hw,
        counts,
        area_sums,
        pixel_hash,
        thumb,
        detail,
        value_high,
        tuple(errors),
        tuple(warnings),
        size.um_per_px,
    )


def _label_errors(case: Case) -> list[str]:
    """Read each label map by itself, so that one bad file does not hide the next."""
    errors = []
    for path in case.label_paths.values():
        try:
            read_label_map(path, case.image_hw)
        except CellSegError as problem:
            errors.append(str(problem))
    return errors


def _pixel_hash(image: NDArray[np.uint8]) -> str:
    digest = hashlib.sha256(f'{image.shape[0]}x{image.shape[1]}:'.encode())
    digest.update(image.data)
    return digest.hexdigest()[:32]


def _image_warnings(path: Path, image: NDArray[np.uint8]) -> list[Finding]:
    found = []
    if image.min() == image.max():
        text = f'{path}: every pixel has the value {image.min()}; expected a picture; look at it.'
        found.append(Finding('blank image', 1, text))
    return found


def _areas(labels: LabelLayers) -> NDArray[np.int64]:
    total = np.zeros(len(labels) + 1, dtype=np.int64)
    for layer in labels.layers:
        total += np.bincount(layer.reshape(-1), minlength=len(labels) + 1)
    return total[1:]


def _per_class(labels: LabelLayers, weights: NDArray[np.int64], n_classes: int) -> tuple[int, ...]:
    sums = np.zeros(n_classes, dtype=np.int64)
    np.add.at(sums, labels.class_ids, weights)
    return tuple(sums.tolist())


def _label_warnings(case: Case, labels: LabelLayers, areas: NDArray[np.int64]) -> list[Finding]:
    folder = case.image_path.parent
    if not len(labels):
        return [Finding('no cell', 1, f'{folder}: no class file has a cell; it trains as empty.')]
    found = []
    for class_id, path in case.label_paths.items():
        own = labels.class_ids == class_id
        if not own.any():
            text = f'{path}: the label map is all background; it could be left out.'
            found.append(Finding('empty class file', 1, text))
        if n := int((areas[own] == 1).sum()):
            found.append(Finding('1-px instance', n, f'{path}: {n} instance(s) of 1 px.'))
        if n := _n_in_parts(labels, np.flatnonzero(own)):
            text = f'{path}: {n} instance(s) in several parts that do not touch.'
            found.append(Finding('disconnected instance', n, text))
    return found + _between_classes(folder, labels, areas)


def _between_classes(folder: Path, labels: LabelLayers, areas: NDArray[np.int64]) -> list[Finding]:
    found = []
    ids, n_uses = np.unique(labels.original_ids, return_counts=True)
    if n := int((n_uses > 1).sum()):
        text = (
            f'{folder}: {n} id(s) such as {ids[n_uses > 1][0]} are used by more than one class; '
            'they are taken as different instances.'
        )
        found.append(Finding('id shared by classes', n, text))
    covered = (labels.layers != 0).any(axis=0).sum() if len(labels.layers) > 1 else areas.sum()
    if n := int(areas.sum() - covered):
        text = f'{folder}: {n} px belong to cells of two classes; both keep them.'
        found.append(Finding('px in two classes', n, text))
    return found


def _n_in_parts(labels: LabelLayers, chosen: NDArray[np.intp]) -> int:
    """Count the chosen instances whose pixels do not hang together, corners included."""
    from scipy import ndimage

    boxes = [ndimage.find_objects(layer, max_label=len(labels)) for layer in labels.layers]
    n = 0
    for i in chosen.tolist():
        layer = int(labels.layer_of[i])
        mask = labels.layers[layer][boxes[layer][i]] == i + 1
        n += ndimage.label(mask, structure=np.ones((3, 3)))[1] > 1
    return n

"""What one case's files hold, and everything that is odd about them.

In: a :class:`~cellseg_mm.data.cases.Case`. Out: :class:`CaseFacts`, small enough to keep for
10,000 cases and to send between processes. Invariant: the result depends on the files' content
only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cellseg_mm.core.errors import CellSegError, ImageError, LabelMapError
from cellseg_mm.data import tiff
from cellseg_mm.data.cases import Case
from cellseg_mm.data.labels import LabelLayers, read_image, read_label_layers, read_label_map

THUMB_PX = 16
DIM_SHARE = 0.1  # a wide image that uses less of its range comes out nearly black


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
        thumb: Grey picture of 16 x 16 px as 512 hex digits, for near-duplicates.
        errors: Sentences about what cannot be used; then the fields above are of no use.
        warnings: See :class:`Finding`.
    """

    name: str
    image_hw: tuple[int, int]
    counts: tuple[int, ...]
    area_sums: tuple[int, ...]
    pixel_hash: str
    thumb: str
    errors: tuple[str, ...] = ()
    warnings: tuple[Finding, ...] = ()


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
    pixel_hash = thumb = ''
    try:
        image = read_image(case.image_path, max_pixels=max_pixels)
        pixel_hash, thumb = _pixel_hash(image), _thumb(image)
        warnings += _image_warnings(case.image_path, image, max_pixels)
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
        tuple(errors),
        tuple(warnings),
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


def _thumb(image: NDArray[np.uint8]) -> str:
    small = Image.fromarray(image).convert('L').resize((THUMB_PX, THUMB_PX), Image.Resampling.BOX)
    return small.tobytes().hex()


def _image_warnings(path: Path, image: NDArray[np.uint8], max_pixels: int) -> list[Finding]:
    found = []
    if image.min() == image.max():
        text = f'{path}: every pixel has the value {image.min()}; expected a picture; look at it.'
        found.append(Finding('blank image', 1, text))
    elif image.max() < DIM_SHARE * 255 and tiff.read_header(path, max_pixels=max_pixels).bits > 8:
        text = (
            f'{path}: the values use {image.max() / 255:.1%} of their type, so the 8-bit image is '
            'nearly black; rescale it before.'
        )
        found.append(Finding('dim image', 1, text))
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


def near_duplicates(facts: Sequence[CaseFacts], *, least: float = 0.95) -> list[tuple[int, int]]:
    """Find pairs of images that look alike, also when one is turned or mirrored.

    Two images match when the correlation of their 16 x 16 px grey pictures reaches ``least`` and
    their shapes agree within 3 %. Images of one shade match nothing here; exact copies of these
    have equal ``pixel_hash``.

    Args:
        facts: n results without errors.
        least: Correlation. Among 248 different real H&E images no pair exceeds 0.56.

    Returns:
        Pairs of indices, first < second, sorted.
    """
    if len(facts) < 2:
        return []
    thumbs = np.stack([np.frombuffer(bytes.fromhex(f.thumb), dtype=np.uint8) for f in facts])
    centred = thumbs - thumbs.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = np.where(norm > THUMB_PX, centred / np.maximum(norm, 1e-9), 0).astype(np.float32)
    ratio = np.array([np.log(f.image_hw[0] / f.image_hw[1]) for f in facts])
    first, second = _candidates(unit, least)
    is_match = np.zeros(len(first), dtype=bool)
    for start in range(0, len(first), 8192):  # 8192 pairs of 256 px in float32 are 8 MB
        block = slice(start, start + 8192)
        i, j = first[block], second[block]
        for n_turns in range(4):
            is_same_shape = np.abs((ratio[i] if n_turns % 2 == 0 else -ratio[i]) - ratio[j]) < 0.03
            turned = np.rot90(unit[i].reshape(-1, THUMB_PX, THUMB_PX), n_turns, axes=(1, 2))
            for moved in (turned, turned[:, :, ::-1]):
                likeness = (moved.reshape(len(i), -1) * unit[j]).sum(axis=1)
                is_match[block] |= (likeness >= least) & is_same_shape
    return list(zip(first[is_match].tolist(), second[is_match].tolist(), strict=True))


def _candidates(
    unit: NDArray[np.float32], least: float
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return all pairs, first < second, that may match, and few others.

    Averaging a picture over the eight turns and mirrors is a projection: it brings no two pictures
    farther apart, and does not change when one of them is turned. So pairs whose averages are
    farther apart than matching pictures can be are out, after a product of 36 instead of 8 x 256.
    """
    half = THUMB_PX // 2
    pictures = unit.reshape(-1, THUMB_PX, THUMB_PX)
    halves = (pictures + pictures[:, ::-1])[:, :half]
    quarters = (halves + halves[:, :, ::-1])[:, :, :half]
    row, column = np.triu_indices(half)
    mean = (quarters + quarters.transpose(0, 2, 1))[:, row, column] / 8
    mean *= np.sqrt(np.where(row == column, 4, 8)).astype(np.float32)  # px with this mean
    norm2 = (mean**2).sum(axis=1)
    limit = 2 - 2 * least + 1e-4  # |a - b|^2 of unit vectors with this correlation, and rounding
    found: list[NDArray[np.intp]] = [np.zeros((2, 0), dtype=np.intp)]
    for start in range(0, len(unit), 1024):  # 1024 x 10,000 distances are 40 MB
        rows = slice(start, start + 1024)
        distance2 = mean[rows] @ (-2 * mean[start:].T)
        distance2 += norm2[rows, None]
        distance2 += norm2[None, start:]
        pairs = np.stack(np.nonzero(distance2 <= limit)) + start
        found.append(pairs[:, pairs[0] < pairs[1]])
    first, second = np.concatenate(found, axis=1)
    return first, second

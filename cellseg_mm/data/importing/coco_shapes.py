"""COCO segmentations: polygons and run lengths become masks.

In: what a file says. Out: cells. Invariant: nothing reaches pycocotools, which trusts what it gets,
before its length and range are known; why something cannot be used is said in one phrase.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pycocotools import mask as coco_mask

from cellseg_mm.core import rle
from cellseg_mm.core.errors import CellSegError
from cellseg_mm.data.importing.sources import Cell


class UnusableError(Exception):
    """An annotation cannot be used; its text names the kind, in the plural."""


def coco_cell(
    segmentation: object, class_number: int, image_hw: tuple[int, int]
) -> tuple[Cell, list[str]]:
    """Turn a COCO segmentation into a cell.

    Args:
        segmentation: Polygons (lists of x, y; joined), or RLE with ``counts`` as a list or text.
        class_number: 1-based.
        image_hw: Height and width that an RLE must have; polygons are cut off there.

    Returns:
        The cell, and why polygons of it could not be used, where others could.

    Raises:
        UnusableError: Nothing of it can be used.
    """
    lost: list[str] = []
    if isinstance(segmentation, list) and segmentation:
        counts = _polygon_counts(segmentation, image_hw, lost)
    elif isinstance(segmentation, dict) and segmentation:
        counts = _rle_counts(segmentation, image_hw)
    else:
        raise UnusableError('annotations without a segmentation (a box alone is no cell)')
    try:
        crops, corners = rle.decode_crops([counts], image_hw)
    except CellSegError as problem:
        raise UnusableError(f'broken run lengths ({problem})') from None
    if not crops[0].any():
        raise UnusableError('cells without a pixel')
    return Cell(class_number, int(corners[0, 0]), int(corners[0, 1]), crops[0]), lost


def _polygon_counts(polygons: list[object], image_hw: tuple[int, int], lost: list[str]) -> bytes:
    if all(_is_number(value) for value in polygons):
        raise UnusableError(
            'segmentations that are one flat list of numbers, not a list of polygons'
        )
    usable = []
    for polygon in polygons:
        try:
            usable.append(_checked_polygon(polygon, image_hw))
        except UnusableError as problem:
            lost.append(str(problem))
    if not usable:
        raise UnusableError(lost[0])
    counts: bytes = coco_mask.merge(coco_mask.frPyObjects(usable, *image_hw))['counts']
    return counts


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _checked_polygon(polygon: object, image_hw: tuple[int, int]) -> list[float]:
    if not isinstance(polygon, list) or not all(_is_number(value) for value in polygon):
        raise UnusableError('polygons that are no lists of numbers x, y, x, y, ...')
    if len(polygon) % 2:
        raise UnusableError('polygons with an odd number of values')
    if len(polygon) < 6:
        raise UnusableError('polygons with fewer than 3 points')
    # pycocotools allocates by the length of the outline
    reach = 2 * max(image_hw)
    if not all(-reach <= value <= 2 * reach for value in polygon):
        raise UnusableError('polygons that leave the image by far')
    if all(0 <= value <= 1 for value in polygon) and any(value % 1 for value in polygon):
        raise UnusableError('polygons in fractions of the image (expected pixels)')
    return [float(value) for value in polygon]


def _rle_counts(segmentation: Mapping[str, object], image_hw: tuple[int, int]) -> bytes:
    if segmentation.get('size') != list(image_hw):
        raise UnusableError(
            f'run lengths of another size ({segmentation.get("size")}, the image has '
            f'{list(image_hw)})'
        )
    counts = segmentation.get('counts')
    if isinstance(counts, str) and counts.isascii():
        return counts.encode()
    runs = counts if isinstance(counts, list) else []
    are_runs = all(_is_number(n) and n >= 0 and n % 1 == 0 for n in runs)
    if not are_runs or sum(runs) != math.prod(image_hw):
        raise UnusableError('broken run lengths (expected runs that fill the image)')
    whole = {'size': list(image_hw), 'counts': [int(n) for n in runs]}
    return bytes(coco_mask.frPyObjects(whole, *image_hw)['counts'])

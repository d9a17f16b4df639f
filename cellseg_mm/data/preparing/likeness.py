"""Which images show the same thing, though their pixels differ.

In: two small pictures of each image. Out: pairs. Invariant: what two images share by being taken
with one lamp and one microscope makes them no pair; what is in the picture does.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

THUMB_PX = 16
DETAIL_PX = 64
WINDOW_PX = 5  # of the detail picture: 1/13 of the image's side, some cells wide
LEAST_STEP = 2.5  # grey levels; averaged noise and the steps of a smooth lamp stay below
LEAST_DETAIL = 40  # px of 4096 with detail; below there is nothing to compare
LEAST_IMAGES = 8  # for telling what all images of a collection share
SHARED = 2 / 3  # of the images with detail of one sign at one place: the microscope's, not a cell's


class Pictured(Protocol):
    """What is asked of a case's facts; see ``case_checks.CaseFacts``."""

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width in px."""

    @property
    def thumb(self) -> str:
        """From :func:`thumb_of`."""

    @property
    def detail(self) -> str:
        """From :func:`detail_of`."""


def _small(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    grey = Image.fromarray(image).convert('L')
    return np.asarray(grey.resize((side, side), Image.Resampling.BOX))


def thumb_of(image: NDArray[np.uint8]) -> str:
    """Return the grey picture of 16 x 16 px as hex digits."""
    return _small(image, THUMB_PX).tobytes().hex()


def detail_of(image: NDArray[np.uint8]) -> str:
    """Return where the grey picture of 64 x 64 px differs from its surroundings.

    Two planes of bits as hex digits, brighter and darker. An illumination that changes slowly is
    in neither.
    """
    from scipy import ndimage

    small = _small(image, DETAIL_PX).astype(np.float32)
    step = small - ndimage.uniform_filter(small, WINDOW_PX, mode='reflect')
    planes = np.stack([step >= LEAST_STEP, step <= -LEAST_STEP])
    return np.packbits(planes).tobytes().hex()


def unpacked_detail(detail: str) -> NDArray[np.int8]:
    """Return (64, 64) int8 of 1, 0, -1 from hex digits.

    Raises:
        ValueError: The text is not from :func:`detail_of`.
    """
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(detail), dtype=np.uint8))
    planes = bits.reshape(2, DETAIL_PX, DETAIL_PX).astype(np.int8)
    signs: NDArray[np.int8] = planes[0] - planes[1]
    return signs


def near_duplicates(
    facts: Sequence[Pictured], *, least: float = 0.95, least_detail: float = 0.5
) -> list[tuple[int, int]]:
    """Find pairs of images that look alike, also when one is turned or mirrored.

    Two images match when the correlation of their 16 x 16 px grey pictures reaches ``least``, that
    of their detail reaches ``least_detail``, and their shapes agree within 3 %. Detail that most
    images have at one place (the field's edge, dust, a scale bar) does not count. Images of one
    shade match nothing here; exact copies of these have equal ``pixel_hash``.

    Args:
        facts: n results without errors.
        least: Correlation. Among 248 different real H&E images no pair exceeds 0.56.
        least_detail: Correlation of detail. Among 60 different real H&E images no pair exceeds
            0.10; copies that were dimmed, halved, compressed, blurred, made noisy or moved by 1 %
            of the side reach 0.59 or more.

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
    if not len(first):
        return []
    pictures = unit.reshape(-1, THUMB_PX, THUMB_PX)
    signs, is_own = _own_detail(facts)
    is_match = np.zeros(len(first), dtype=bool)
    for start in range(0, len(first), 1024):  # 1024 pairs of details are 4 x 16 MB
        block = slice(start, start + 1024)
        i, j = first[block], second[block]
        for n_turns, mirror in itertools.product(range(4), (1, -1)):
            is_same_shape = np.abs((ratio[i] if n_turns % 2 == 0 else -ratio[i]) - ratio[j]) < 0.03
            moved = _moved(pictures[i], n_turns, mirror)
            likeness = (moved * pictures[j]).sum(axis=(1, 2))
            at = np.flatnonzero((likeness >= least) & is_same_shape & ~is_match[block])
            # each detail where the other one's counts as well
            one = _moved(signs[i[at]], n_turns, mirror) * is_own[j[at]]
            other = signs[j[at]] * _moved(is_own[i[at]], n_turns, mirror)
            is_match[start + at] = _correlation(one, other) >= least_detail
    return list(zip(first[is_match].tolist(), second[is_match].tolist(), strict=True))


def _moved(pictures: NDArray[Any], n_turns: int, mirror: int) -> NDArray[Any]:
    moved: NDArray[Any] = np.rot90(pictures, n_turns, axes=(1, 2))[:, :, ::mirror]
    return moved


def _correlation(one: NDArray[np.int8], other: NDArray[np.int8]) -> NDArray[np.float64]:
    """Return (n,) correlations of signs; -1 where one of both has too little detail."""
    product = (one * other).sum(axis=(1, 2), dtype=np.int64)
    n_one, n_other = (np.count_nonzero(signs, axis=(1, 2)) for signs in (one, other))
    found: NDArray[np.float64] = product / np.sqrt(np.maximum(n_one * n_other, 1))
    return np.where(np.minimum(n_one, n_other) >= LEAST_DETAIL, found, -1.0)


def _own_detail(facts: Sequence[Pictured]) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
    """Return (n, 64, 64) signs, 0 where all images share them; and where they are an image's own.

    An image with hardly any detail of its own keeps all, as in a collection of copies.
    """
    from scipy import ndimage

    signs = np.stack([unpacked_detail(one.detail) for one in facts])
    is_own = np.ones(signs.shape, dtype=bool)
    if len(facts) >= LEAST_IMAGES:
        most = np.maximum((signs == 1).mean(axis=0), (signs == -1).mean(axis=0))
        # by chance, few images agree more often than many
        is_shared = most >= min(1.0, SHARED + 1 / np.sqrt(len(facts)))
        is_shared = ndimage.binary_dilation(is_shared, np.ones((3, 3)))  # its border is unsure
        has_own = (signs[:, ~is_shared] != 0).sum(axis=1) >= LEAST_DETAIL
        is_own[has_own] = ~is_shared
    return signs * is_own, is_own


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

"""Values of any depth become 8 bit by one range that no single pixel decides.

In: values as stored, and the range that a collection or a model has. Out: uint8.
Invariant: files of 8 bits and less do not come here to be judged: their pixels depend on nothing
else. Wider ones are mapped by one range: what is given, or what nearly all pixels of the file
(:class:`Brightest`) stay within.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import CellSegError, ConfigError, ImageError
from cellseg_mm.core.files import JsonValue, regular, write_json
from cellseg_mm.core.layout import range_files

CLIPPED = 1000  # one pixel in so many may be brighter than the range; QuPath's display has the same
NOMINAL = (255, 1023, 4095, 16383, 65535)  # full ranges of 8, 10, 12, 14 and 16 bits
FILLED = 0.9  # a full range that is filled so far is meant
DIM_SHARE = 0.1  # an image that uses less of its range comes out nearly black
OF_ANOTHER_SCALE = 4.0  # few files so many times brighter than the others do not decide for them
FEW = 10  # at most one file in so many, or one, is of another scale
CHANGED = 1.25  # data whose brightness is by so much another than what is recorded: a warning
FIX = 'export it again with values from 0 on'

Values = NDArray[np.generic]
Picture = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ValueRange:
    """The values that become 0 and 255; those between are scaled evenly, those outside are cut.

    Attributes:
        low: Becomes 0.
        high: Becomes 255.

    Raises:
        ConfigError: The numbers are not finite, or not rising.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ConfigError(
                f'range {self.low:g},{self.high:g}: expected two finite numbers, the first below '
                'the second; such as 0,4095'
            )

    def __str__(self) -> str:
        return f'{self.low:.6g}..{self.high:.6g}'

    @classmethod
    def from_text(cls, text: str) -> ValueRange:
        """Read ``LOW,HIGH``.

        Raises:
            ConfigError: The text is no such pair.
        """
        try:
            low, high = (float(word) for word in text.split(','))
        except ValueError as problem:
            raise ConfigError(
                f'range {text!r}: expected two numbers joined by a comma, such as 0,4095'
            ) from problem
        return cls(low, high)

    @classmethod
    def from_json(cls, value: object) -> ValueRange | None:
        """Return what :meth:`to_json` gave; None for anything else."""
        if not isinstance(value, list) or len(value) != 2:
            return None
        try:
            return cls(float(value[0]), float(value[1]))
        except (TypeError, ValueError):
            return None

    def to_json(self) -> JsonValue:
        """Return the two numbers."""
        return [self.low, self.high]


# ---- values of one file


def is_wide(values: Values, bits: int) -> bool:
    """Tell whether values have more than 8 bits each, so that a range is needed."""
    return values.dtype.kind != 'b' and not (values.dtype == np.uint8 and bits <= 8)


def range_for(path: Path, values: Values, bits: int, given: ValueRange | None) -> ValueRange | None:
    """Return the range that a file's values are mapped by; None for values of up to 8 bits.

    Args:
        path: For messages.
        values: All values of the file, (..., S).
        bits: Bits per value in the file, which may be fewer than those of the dtype.
        given: What is known already; None decides by this file alone.

    Raises:
        ImageError: The type is no number; NaN, infinite or negative values.
    """
    if not is_wide(values, bits):
        return None
    if given is not None:
        return given
    brightest = Brightest(path, values.size // max(values.shape[-1], 1))
    brightest.add(values)
    return brightest.value_range()


def to_uint8(path: Path, values: Values, bits: int, value_range: ValueRange | None) -> Picture:
    """Bring values of any type and shape to 8 bits.

    Args:
        path: For messages.
        values: Numbers.
        bits: Bits per value in the file.
        value_range: From :func:`range_for`.

    Raises:
        ImageError: The type is no number; NaN or infinite values, or negative ones that the range
            does not include.
    """
    if values.dtype.kind not in 'buif':
        raise ImageError(f'{path}: values of type {values.dtype}; expected integers or floats.')
    if values.dtype == np.uint8 and bits == 8:
        return values.astype(np.uint8, copy=False)
    if value_range is None:
        scale = 255 if values.dtype == bool else 255 / (2**bits - 1)  # unpacked to uint8
        return np.rint(values.astype(np.float64) * scale).astype(np.uint8)
    _check_values(path, values, least=min(value_range.low, 0.0))
    scaled: NDArray[np.float64] = values.astype(np.float64)
    scaled -= value_range.low
    scaled *= 255 / (value_range.high - value_range.low)
    return np.rint(np.clip(scaled, 0, 255, out=scaled), out=scaled).astype(np.uint8)


def _check_values(path: Path, values: Values, *, least: float = 0.0) -> None:
    if values.dtype.kind not in 'uif':
        raise ImageError(f'{path}: values of type {values.dtype}; expected integers or floats.')
    if not values.size:
        return
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):  # NaN wins in both
        n_bad = int(values.size - np.isfinite(values).sum())
        raise ImageError(
            f'{path}: {n_bad} values are NaN or infinite; expected finite numbers; {FIX}.'
        )
    if low < least:
        raise ImageError(f'{path}: values down to {low}; expected none below {least:g}; {FIX}.')


class Brightest:
    """The brightness that all but a thousandth of an image's pixels stay within.

    At least one pixel is left out of account, so that no single one decides. The image may come in
    parts; memory follows the thousandth.

    Args:
        path: For messages.
        n_pixels: Pixels of the whole image.
    """

    def __init__(self, path: Path, n_pixels: int) -> None:
        self._path = path
        self._n_kept = min(max(n_pixels // CLIPPED, 1) + 1, max(n_pixels, 1))
        self._kept: list[Values] = []
        self._n_held = 0
        self._is_float = False

    def add(self, values: Values) -> None:
        """Take a part of the image, (..., S), every pixel once.

        Raises:
            ImageError: The type is no number; NaN, infinite or negative values.
        """
        if not values.size:
            return
        _check_values(self._path, values)
        self._is_float = values.dtype.kind == 'f'
        self._kept.append(self._greatest(values.max(axis=-1).reshape(-1)))
        self._n_held += len(self._kept[-1])
        if self._n_held > 4 * self._n_kept + 65536:
            self._kept = [self._greatest(np.concatenate(self._kept))]
            self._n_held = len(self._kept[0])

    def _greatest(self, flat: Values) -> Values:
        if len(flat) <= self._n_kept:
            return flat
        return np.partition(flat, len(flat) - self._n_kept)[-self._n_kept :]

    def value(self) -> float:
        """Return the brightness; 0 for an image without pixels."""
        if not self._kept:
            return 0.0
        return float(self._greatest(np.concatenate(self._kept)).min())

    def value_range(self) -> ValueRange:
        """Return the range that the values of this image are meant to have."""
        return nominal_range(self.value(), is_float=self._is_float)


def nominal_range(brightest: float, *, is_float: bool) -> ValueRange:
    """Return the range for values up to ``brightest``.

    Integers that need no more than 8 bits stay as they are, floats within 0..1 become 0..255. A
    camera's full range is taken where it is nearly filled, else the brightness itself.
    """
    least = 1.0 if is_float else 255.0
    if brightest <= least:
        return ValueRange(0.0, least)
    for full in NOMINAL:
        if FILLED * full <= brightest <= full:
            return ValueRange(0.0, float(full))
    return ValueRange(0.0, brightest)


# ---- a collection


def collection_range(highs: Sequence[float]) -> ValueRange:
    """Return one range for all files of a collection.

    The brightest file decides, unless few files stand far above all others.

    Args:
        highs: What would become 255 of each file of more than 8 bits alone; at least one.
    """
    ordered = sorted(highs)
    most = max(len(ordered) // FEW, 1) if len(ordered) > 2 else 0  # of two, neither is the odd one
    for n_odd in range(most, 0, -1):
        if ordered[-n_odd] > OF_ANOTHER_SCALE * ordered[-n_odd - 1]:
            return ValueRange(0.0, ordered[-n_odd - 1])
    return ValueRange(0.0, ordered[-1])


def recorded_range(data_root: Path | str, folds_path: Path | str) -> ValueRange | None:
    """Return the range that ``prepare_data`` recorded beside the folds, or beside the data.

    Returns:
        None where there is no such file: all images have 8 bits, or were prepared long ago.

    Raises:
        CellSegError: The file is damaged.
    """
    for path in range_files(data_root, folds_path):
        if path.is_file():
            return load_range(path)
    return None


def load_range(path: Path) -> ValueRange:
    """Read a range file.

    Raises:
        CellSegError: It cannot be read, or holds no range.
    """
    try:
        content = json.loads(regular(path).read_bytes())
    except (OSError, ValueError, RecursionError) as problem:
        raise CellSegError(
            f'{path}: cannot be read ({str(problem)[:80]}); expected the range of values; remove '
            'it, and prepare the data again'
        ) from problem
    found = ValueRange.from_json(content.get('range') if isinstance(content, dict) else None)
    if found is None:
        raise CellSegError(
            f'{path}: holds no range; expected "range": [LOW, HIGH], rising; correct it, or remove '
            'it and prepare the data again'
        )
    return found


def save_range(path: Path, value_range: ValueRange) -> None:
    """Write a range file."""
    write_json(path, {'version': 1, 'range': value_range.to_json()})


# ---- pictures that are nearly black


def n_lit(picture: Picture) -> int:
    """Return how many pixels of an (h, w, 3) picture are not nearly black."""
    # ten times faster than max(axis=-1), which would take as long as reading a tile
    brightest = np.maximum(np.maximum(picture[..., 0], picture[..., 1]), picture[..., 2])
    return int((brightest >= DIM_SHARE * 255).sum())


def is_nearly_black(n_lit_pixels: int, n_pixels: int) -> bool:
    """Tell whether so few pixels are lit that the picture is as good as black."""
    return n_lit_pixels <= max(n_pixels // CLIPPED, 1) and n_pixels > 1

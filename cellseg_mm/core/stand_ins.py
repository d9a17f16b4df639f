"""Harmless stand-ins for what a pickle names, for both readers: pickles and torch checkpoints.

In: names in a stream. Out: arrays of numbers. Invariant: nothing of the stream runs, and it never
reaches numpy's own constructors: one changed byte of a dtype's state ends the process with a
segmentation fault (numpy 2.2).
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUMERIC_DTYPES = frozenset(('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8'))


class Refused(Exception):
    """The file asks for something that arrays do not need; the text says what."""


class Dtype:
    """Stand-in for ``numpy.dtype``: a numeric type code and a byte order, nothing else."""

    def __init__(self, code: str, *_: object) -> None:
        if not isinstance(code, str) or code.lstrip('<>|=') not in NUMERIC_DTYPES:
            raise Refused(f'an array of dtype {code!r:.40}')
        self.code = code.lstrip('<>|=')
        self.order = code[:1] if code[:1] in '<>|=' else '='

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        plain = isinstance(state, tuple) and len(state) in (8, 9) and state[1] in ('<', '>', '|')
        if not plain or state[2:5] != (None, None, None):
            raise Refused('a structured dtype')
        self.order = state[1]

    def to_numpy(self) -> np.dtype[Any]:
        """Return numpy's own."""
        return np.dtype(self.order + self.code)


class Array:
    """Stand-in for an array under construction: keeps checked bytes, makes the array itself."""

    def __init__(self) -> None:
        self.array: NDArray[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise Refused('an array state of unknown form')
        _, shape, dtype, is_fortran, data = state
        self.array = make_array(data, dtype, shape, 'F' if is_fortran else 'C')

    def to_numpy(self) -> NDArray[Any]:
        """Return the array, a read-only view of the file's bytes in the file's byte order."""
        if self.array is None:
            raise Refused('an array without data')
        return self.array


class AdmittedName:
    """What an admitted name stands for: callable at most, and closed to changes by BUILD.

    A bare function or class would not do: BUILD sets attributes on whatever it is given.
    """

    __slots__ = ('_make',)

    def __init__(self, make: Callable[..., object]) -> None:
        self._make = make

    def __call__(self, *args: object) -> object:
        """Make what the name stands for."""
        return self._make(*args)

    def __setstate__(self, state: object) -> None:
        raise Refused('a change to a function')


def _make_nothing(*_: object) -> None:
    raise Refused('an array made by calling numpy.ndarray')


NDARRAY = AdmittedName(_make_nothing)  # only ever passed on to reconstruct


def make_array(data: object, dtype: object, shape: object, order: object) -> NDArray[Any]:
    """Return an array of checked bytes; whatever does not fit together is refused."""
    if isinstance(data, str):  # Python 2 wrote bytes as str; latin-1 keeps them one to one
        data = data.encode('latin1')
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, Dtype):
        raise Refused('an array that does not hold plain numbers')
    if isinstance(shape, int):
        shape = (shape,)
    lengths = shape if isinstance(shape, tuple) else (-1,)
    sound = all(isinstance(n, int) and n >= 0 for n in lengths)
    if not sound or prod(lengths) * dtype.to_numpy().itemsize != len(data):
        raise Refused(f'an array of shape {shape!r:.60} with {len(data)} bytes of data')
    array: NDArray[Any] = np.frombuffer(bytes(data), dtype.to_numpy())
    return array.reshape(lengths, order='F' if order == 'F' else 'C')


def reconstruct(kind: object, shape: object, code: object) -> Array:
    """Stand in for numpy's first step: an array to be filled."""
    if kind not in (NDARRAY, Array) or shape != (0,) or code not in (b'b', 'b'):
        raise Refused('a numpy object that is not a plain array')
    return Array()


def scalar(dtype: object, data: object) -> Array:
    """Stand in for numpy's constructor of scalars: a 0-d array."""
    made = Array()
    made.array = make_array(data, dtype, (), 'C')
    return made

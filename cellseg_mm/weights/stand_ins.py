"""Harmless stand-ins for what a pickle names.

In: names in a stream. Out: plain values. Invariant: nothing of the stream runs.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
from numpy.typing import NDArray

_DTYPES = frozenset(('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8'))


class _Refused(Exception):
    """The file asks for something that arrays do not need; the text says what."""


class _Dtype:
    """Stand-in for ``numpy.dtype``: a numeric type code and a byte order, nothing else."""

    def __init__(self, code: str, *_: object) -> None:
        if not isinstance(code, str) or code.lstrip('<>|=') not in _DTYPES:
            raise _Refused(f'an array of dtype {code!r:.40}')
        self.code = code.lstrip('<>|=')
        self.order = code[:1] if code[:1] in '<>|=' else '='

    def __setstate__(self, state: tuple) -> None:
        plain = isinstance(state, tuple) and len(state) in (8, 9) and state[1] in ('<', '>', '|')
        if not plain or state[2:5] != (None, None, None):
            raise _Refused('a structured dtype')
        self.order = state[1]

    def to_numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _Array:
    """Stand-in for an array under construction: keeps checked bytes, makes the array itself."""

    def __init__(self) -> None:
        self.array: NDArray | None = None

    def __setstate__(self, state: tuple) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _Refused('an array state of unknown form')
        _, shape, dtype, is_fortran, data = state
        self.array = _make_array(data, dtype, shape, 'F' if is_fortran else 'C')


class _Name:
    """What an admitted name stands for: callable at most, and closed to changes by BUILD.

    A bare function or class would not do: BUILD sets attributes on whatever it is given.
    """

    __slots__ = ('_make',)

    def __init__(self, make: Callable[..., object]) -> None:
        self._make = make

    def __call__(self, *args: object) -> object:
        return self._make(*args)

    def __setstate__(self, state: object) -> None:
        raise _Refused('a change to a function')


def _make_nothing(*_: object) -> None:
    raise _Refused('an array made by calling numpy.ndarray')


_NDARRAY = _Name(_make_nothing)  # only ever passed on to _reconstruct


def _make_array(data: object, dtype: object, shape: object, order: object) -> NDArray:
    if isinstance(data, str):  # Python 2 wrote bytes as str; latin-1 keeps them one to one
        data = data.encode('latin1')
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, _Dtype):
        raise _Refused('an array that does not hold plain numbers')
    if isinstance(shape, int):
        shape = (shape,)
    sound = isinstance(shape, tuple) and all(isinstance(n, int) and n >= 0 for n in shape)
    if not sound or prod(shape) * dtype.to_numpy().itemsize != len(data):
        raise _Refused(f'an array of shape {shape!r:.60} with {len(data)} bytes of data')
    array = np.frombuffer(bytes(data), dtype.to_numpy())
    return array.reshape(shape, order='F' if order == 'F' else 'C')


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    if kind is not _NDARRAY or shape != (0,) or code not in (b'b', 'b'):
        raise _Refused('a numpy object that is not a plain array')
    return _Array()


def _scalar(dtype: object, data: object) -> _Array:
    made = _Array()
    made.array = _make_array(data, dtype, (), 'C')
    return made

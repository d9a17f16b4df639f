"""stand_ins: arrays come back as numpy makes them; what does not fit together is refused."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip('torch')

from cellseg_mm.core.stand_ins import (
    NDARRAY,
    AdmittedName,
    Array,
    Dtype,
    Refused,
    make_array,
    reconstruct,
    scalar,
)

pytestmark = pytest.mark.mm


@pytest.mark.parametrize('order', ['C', 'F'])
@pytest.mark.parametrize('code', ['<f4', '>f8', '<i2', '|u1', '|b1'])
def test_arrays_come_back_in_either_order_of_bytes_and_axes(code: str, order: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(code)
    made = make_array(array.tobytes(order), Dtype(code), array.shape, order)
    assert made.dtype == array.dtype
    assert made.tolist() == array.tolist()
    assert not made.flags.writeable


def test_the_two_steps_of_numpy_make_an_array() -> None:
    array = np.arange(6, dtype='>i4').reshape(2, 3)
    dtype = Dtype('i4')
    dtype.__setstate__((3, '>', None, None, None, -1, -1, 0))
    empty = reconstruct(NDARRAY, (0,), b'b')
    with pytest.raises(Refused, match='without data'):
        empty.to_numpy()
    empty.__setstate__((1, (2, 3), dtype, False, array.tobytes()))
    assert empty.to_numpy().tolist() == array.tolist()
    assert scalar(Dtype('<f8'), np.float64(0.75).tobytes()).to_numpy() == 0.75


@pytest.mark.parametrize(
    ('call', 'text'),
    [
        pytest.param(lambda: Dtype('O'), "dtype 'O'", id='objects'),
        pytest.param(lambda: Dtype('V4'), "dtype 'V4'", id='void'),
        pytest.param(
            lambda: Dtype('<f4').__setstate__((3, '<', ('f', 'f'), None, None, -1, -1, 0)),
            'structured dtype',
            id='a base dtype',
        ),
        pytest.param(
            lambda: make_array(bytes(7), Dtype('<f4'), (2,), 'C'), '7 bytes', id='too few bytes'
        ),
        pytest.param(
            lambda: make_array(bytes(4), Dtype('<f4'), (-1, -1), 'C'), 'shape', id='negative'
        ),
        pytest.param(
            lambda: make_array(bytes(4), '<f4', (1,), 'C'), 'plain numbers', id='no stand-in'
        ),
        pytest.param(lambda: reconstruct(object, (0,), b'b'), 'numpy object', id='other class'),
        pytest.param(lambda: NDARRAY(3), 'calling numpy.ndarray', id='ndarray called'),
        pytest.param(lambda: Array().__setstate__((1, 2)), 'unknown form', id='short state'),
        pytest.param(
            lambda: AdmittedName(len).__setstate__({}), 'a change to a function', id='changed name'
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(call, text: str) -> None:
    with pytest.raises(Refused, match=text):
        call()

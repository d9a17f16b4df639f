"""Reading arrays out of a pickle that came from the internet, without running any of it.

In: a pickle file as detectron2 publishes its models (Python 2 or 3, any protocol, numpy 1 or 2).
Out: dicts, lists, strings, numbers and numeric numpy arrays. Three fences, each enough by itself
against code: a list of admitted opcodes, a list of admitted names, and stand-ins instead of numpy's
own constructors.
Invariant: nothing the file names is ever imported or called; only the stand-ins below are.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path

from numpy.typing import NDArray

from cellseg_mm.core.errors import CheckpointError
from cellseg_mm.weights.stand_ins import (
    NDARRAY,
    AdmittedName,
    Array,
    Dtype,
    Refused,
    make_array,
    reconstruct,
    scalar,
)

Value = (
    None | bool | int | float | str | bytes | NDArray | list['Value'] | tuple['Value', ...] | dict
)

MAX_BYTES = 4 << 30  # the largest published model (R101) has 260 MB
MAX_OPCODES = 5_000_000  # one model has about 20 thousand
MAX_MEMO = 1_000_000  # a memo index makes Python allocate that many slots at once
MAX_DEPTH = 16

# What pickling dicts, lists, text, numbers and arrays produces. Left out on purpose: INST, OBJ,
# NEWOBJ, NEWOBJ_EX (make objects of a class), EXT* and PERSID (look names up elsewhere).
_OPCODES = frozenset(
    """
    PROTO FRAME STOP MARK POP POP_MARK DUP MEMOIZE
    PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    EMPTY_DICT DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD
    """.split()  # noqa: SIM905 (a list would take 54 lines)
)


def _frombuffer(data: object, dtype: object, shape: object, order: object) -> Array:
    made = Array()
    made.array = make_array(data, dtype, shape, order)
    return made


def _encode(text: object, encoding: object = 'latin1') -> bytes:
    if not isinstance(text, str) or encoding != 'latin1':
        raise Refused('text in an encoding other than latin1')
    return text.encode('latin1')


def _no_bytes(*args: object) -> bytes:
    if args:
        raise Refused('bytes made from other objects')
    return b''


def _ordered_dict(*args: object) -> OrderedDict:
    if args:
        raise Refused('an OrderedDict made from other objects')
    return OrderedDict()


_STAND_INS: dict[tuple[str, str], AdmittedName] = {
    ('numpy', 'dtype'): AdmittedName(Dtype),
    ('numpy', 'ndarray'): NDARRAY,
    ('numpy.core.multiarray', '_reconstruct'): AdmittedName(reconstruct),
    ('numpy._core.multiarray', '_reconstruct'): AdmittedName(reconstruct),
    ('numpy.core.multiarray', 'scalar'): AdmittedName(scalar),
    ('numpy._core.multiarray', 'scalar'): AdmittedName(scalar),
    ('numpy.core.numeric', '_frombuffer'): AdmittedName(_frombuffer),
    ('numpy._core.numeric', '_frombuffer'): AdmittedName(_frombuffer),
    ('_codecs', 'encode'): AdmittedName(_encode),  # how protocols 0-2 carry bytes
    ('__builtin__', 'bytes'): AdmittedName(_no_bytes),  # and how they carry empty bytes
    ('collections', 'OrderedDict'): AdmittedName(_ordered_dict),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Hands out stand-ins for the admitted names and refuses all others."""

    def find_class(self, module: str, name: str) -> AdmittedName:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise Refused(f'{module}.{name}') from None


def read_pickle(path: Path | str, *, max_bytes: int = MAX_BYTES) -> Value:
    """Read a pickle of dicts, lists, text, numbers and numeric arrays.

    Arrays are read-only views of the bytes in the file; numpy scalars come as 0-d arrays.

    Raises:
        CheckpointError: The file is missing, too large, cut short, no pickle, or asks for
            anything but arrays of numbers; nothing of it was run.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f'{path}: no such file; a pickled model was expected; check the path')
    if path.stat().st_size > max_bytes:
        raise CheckpointError(
            f'{path}: file has {path.stat().st_size} bytes; at most {max_bytes} were expected of a '
            'pickled model; check that it is the right file'
        )
    content = path.read_bytes()
    try:
        _check_opcodes(content)
        unpickler = _ArrayUnpickler(io.BytesIO(content), fix_imports=False, encoding='latin1')
        return _resolve(unpickler.load(), {}, 0)
    except Refused as refused:
        raise CheckpointError(
            f'{path}: the pickle asks for {refused}; only arrays of numbers, dicts, lists and text '
            'are read, and nothing was run; get the file again from a source you trust'
        ) from None
    except _Truncated as truncated:
        raise CheckpointError(
            f'{path}: the file ends after {len(content)} bytes in the middle of its content '
            f'({truncated}); a whole pickle was expected; download it again'
        ) from None
    except RECOVERABLE as error:
        raise CheckpointError(
            f'{path}: not a pickle of arrays ({type(error).__name__}: {str(error)[:120]}); a file '
            'like model_final_14d201.pkl was expected; check what was downloaded'
        ) from None


# What a malformed stream can raise inside the unpickler once only our stand-ins can be called.
RECOVERABLE = (
    pickle.UnpicklingError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    MemoryError,
    RecursionError,
)


class _Truncated(Exception):
    """The file ends before the pickle does."""


def _check_opcodes(content: bytes) -> None:
    """Walk the opcodes without executing any, and refuse all that arrays do not need."""
    count = 0
    try:
        for opcode, argument, _ in pickletools.genops(content):
            count += 1
            if opcode.name not in _OPCODES:
                raise Refused(f'the opcode {opcode.name}')
            if opcode.name in ('PUT', 'LONG_BINPUT') and argument > MAX_MEMO:
                raise Refused(f'memo slot {argument}')
            if count > MAX_OPCODES:
                raise Refused(f'more than {MAX_OPCODES} opcodes')
            if opcode.name == 'GLOBAL' and tuple(argument.split(' ', 1)) not in _STAND_INS:
                raise Refused(argument.replace(' ', '.', 1))
    except ValueError as error:
        # genops' own words for "the data ended": the only way to tell this from garbage.
        cut = ('exhausted', 'not enough data', 'but only', 'no newline found')
        if count and any(words in str(error) for words in cut):
            raise _Truncated(str(error)[:120]) from None
        raise


def _resolve(value: object, seen: dict[int, object], depth: int) -> Value:
    """Replace stand-ins by arrays; every container is visited once, however often it is shared."""
    if depth > MAX_DEPTH:
        raise Refused(f'containers nested deeper than {MAX_DEPTH}')
    if isinstance(value, Array):
        return value.to_numpy()
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if not isinstance(value, dict | list | tuple):
        raise Refused(f'an object of type {type(value).__name__.strip("_")}')
    if id(value) not in seen:
        seen[id(value)] = None  # a container that holds itself resolves to None inside itself
        if isinstance(value, dict):
            if not all(isinstance(key, str | int) for key in value):
                raise Refused('a dict whose keys are not text')
            made = {key: _resolve(item, seen, depth + 1) for key, item in value.items()}
        else:
            made = type(value)([_resolve(item, seen, depth + 1) for item in value])
        seen[id(value)] = made
    return seen[id(value)]

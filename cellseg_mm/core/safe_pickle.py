"""Reading arrays out of a pickle that came from the internet, without running any of it.

In: a pickle as detectron2 publishes its models and Cellpose saves its cells (Python 2 or 3, any
protocol, numpy 1 or 2).
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from numpy.typing import NDArray

from cellseg_mm.core.errors import CheckpointError
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

Key: TypeAlias = str | int
Value: TypeAlias = 'Plain | list[Value] | tuple[Value, ...] | dict[Key, Value]'
Plain: TypeAlias = bool | int | float | str | bytes | NDArray[Any] | None

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


def _ordered_dict(*args: object) -> OrderedDict[Key, object]:
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


class _ObjectDtype:
    """Stand-in for the dtype of arrays of objects."""

    def __setstate__(self, state: object) -> None:
        pass  # nothing of it is used


class _AnyArray(Array):
    """Stand-in for an array of numbers, or of objects: then ``items`` has them."""

    def __init__(self) -> None:
        super().__init__()
        self.items: object = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        is_tuple = isinstance(state, tuple) and len(state) == 5
        if not is_tuple or not isinstance(state[2], _ObjectDtype):
            super().__setstate__(state)
        elif isinstance(state[4], list) and (state[1] != () or len(state[4]) == 1):
            self.items = state[4] if state[1] else state[4][0]
        else:
            raise Refused('an array of objects of unknown form')


def _dtype(code: str, *_: object) -> Dtype | _ObjectDtype:
    return _ObjectDtype() if code in ('O', 'O8') else Dtype(code)


def _reconstruct_any(kind: object, shape: object, code: object) -> _AnyArray:
    reconstruct(kind, shape, code)
    return _AnyArray()


_WITH_OBJECTS: dict[tuple[str, str], AdmittedName] = {
    ('numpy', 'dtype'): AdmittedName(_dtype),
    ('numpy.core.multiarray', '_reconstruct'): AdmittedName(_reconstruct_any),
    ('numpy._core.multiarray', '_reconstruct'): AdmittedName(_reconstruct_any),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Hands out stand-ins for the admitted names and refuses all others."""

    def __init__(self, names: Mapping[tuple[str, str], AdmittedName], content: bytes) -> None:
        super().__init__(io.BytesIO(content), fix_imports=False, encoding='latin1')
        self.names = names

    def find_class(self, module: str, name: str) -> AdmittedName:
        try:
            return self.names[module, name]
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
    try:
        return unpickle(path.read_bytes(), expected='a file like model_final_14d201.pkl')
    except UnreadableError as problem:
        raise CheckpointError(f'{path}: {problem}') from None


def unpickle(content: bytes, *, expected: str, objects: bool = False) -> Value:
    """Read a pickle of dicts, lists, text, numbers and numeric arrays; see ``read_pickle``.

    Args:
        content: The pickle.
        expected: What it should be, for the sentence.
        objects: Admit arrays of objects, as numpy saves a dict: they become lists of what they
            hold, and those without a dimension what they hold.

    Raises:
        UnreadableError: It is cut short, no pickle, or asks for anything else; nothing was run.
    """
    names = {**_STAND_INS, **_WITH_OBJECTS} if objects else _STAND_INS
    try:
        _check_opcodes(content)
        return _resolve(_ArrayUnpickler(names, content).load(), {}, 0)
    except Refused as refused:
        raise UnreadableError(
            f'the pickle asks for {refused}; only arrays of numbers, dicts, lists and text '
            'are read, and nothing was run; get the file again from a source you trust'
        ) from None
    except _Truncated as truncated:
        raise UnreadableError(
            f'the file ends after {len(content)} bytes in the middle of its content '
            f'({truncated}); a whole pickle was expected; download it again'
        ) from None
    except RECOVERABLE as error:
        raise UnreadableError(
            f'not a pickle of arrays ({type(error).__name__}: {str(error)[:120]}); {expected} was '
            'expected; check what was downloaded'
        ) from None


class UnreadableError(Exception):
    """A pickle cannot be read; the text says why, what was expected and what to do."""


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
    argument: Any  # of the kind that the opcode has
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


def _resolve(value: object, seen: dict[int, Value], depth: int) -> Value:
    """Replace stand-ins by arrays; every container is visited once, however often it is shared."""
    if depth > MAX_DEPTH:
        raise Refused(f'containers nested deeper than {MAX_DEPTH}')
    if isinstance(value, _AnyArray) and value.items is not None:
        return _resolve(value.items, seen, depth + 1)
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
            seen[id(value)] = made
        else:
            items = [_resolve(item, seen, depth + 1) for item in value]
            seen[id(value)] = items if isinstance(value, list) else tuple(items)
    return seen[id(value)]

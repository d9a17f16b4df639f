"""Damages bytes: blindly, and knowing where TIFF, JSON and zip files keep their structure.

In: the bytes of a good (or already damaged) file. Out: other bytes. Everything random comes from
the generator that is passed, so a case is known by its seed.
"""

from __future__ import annotations

import copy
import io
import json
import struct
import zipfile
from collections.abc import Callable

import numpy as np

Rng = np.random.Generator
Mutator = Callable[[bytes, Rng], bytes]

NUMBERS = (0, 1, 2, 3, 7, 8, 16, 127, 128, 255, 256, 32767, 65535, 1 << 16, (1 << 31) - 1, 1 << 31)
WIDE = ((1 << 32) - 1, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)
ODD_VALUES = (
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e308, 2**31, 2**63, 10**30, '', 'a', '\x00'),
    *('../../etc/passwd', '/etc/passwd', '\ud800', 'é' * 300, [], {}, [[]], {'': None}, 'NaN'),
)


def any_bytes(content: bytes, rng: Rng) -> bytes:
    """Change, cut, double, move or insert at random places, one to four times."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        if not data:
            return bytes(rng.integers(0, 256, int(rng.integers(1, 40)), dtype=np.uint8))
        at = int(rng.integers(len(data)))
        length = int(min(rng.geometric(0.1), len(data) - at))
        kind = int(rng.integers(6))
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at : at + length] = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
        elif kind == 2:
            _overwrite_number(data, at, rng)
        elif kind == 3:
            end = len(data) if rng.random() < 0.3 else at + length
            del data[at:end]
        elif kind == 4:
            data[at:at] = data[at : at + length] * int(rng.integers(1, 4))
        else:
            source = int(rng.integers(len(data)))
            data[at : at + length] = data[source : source + length]
    return bytes(data)


def _overwrite_number(data: bytearray, at: int, rng: Rng) -> None:
    width = int(rng.choice([1, 2, 4, 8]))
    value = int(rng.choice(np.array([*NUMBERS, *WIDE], dtype=np.uint64))) % (1 << 8 * width)
    order = 'little' if rng.random() < 0.7 else 'big'
    data[at : at + width] = value.to_bytes(width, order)[: max(0, len(data) - at)]


def tiff_tags(content: bytes, rng: Rng) -> bytes:
    """Change number, type, count or value of one to three entries of the first directory."""
    if len(content) < 16 or content[:4] not in (b'II*\0', b'MM\0*'):
        return any_bytes(content, rng)
    order = '<' if content[:2] == b'II' else '>'
    data = bytearray(content)
    (start,) = struct.unpack_from(order + 'I', data, 4)
    if start + 2 > len(data):
        return any_bytes(content, rng)
    (n_entries,) = struct.unpack_from(order + 'H', data, start)
    for _ in range(int(rng.integers(1, 4))):
        at = start + 2 + 12 * int(rng.integers(max(1, min(n_entries, 40))))
        if at + 12 > len(data):
            continue
        field = int(rng.integers(5))
        if field == 0:
            tag = int(rng.choice([256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 317, 320, 339]))
            struct.pack_into(order + 'H', data, at, tag)
        elif field == 1:
            struct.pack_into(order + 'H', data, at + 2, int(rng.integers(0, 20)))
        elif field == 2:
            struct.pack_into(order + 'I', data, at + 4, _number(rng))
        else:
            struct.pack_into(order + 'I', data, at + 8, _number(rng))
    return bytes(data)


def _number(rng: Rng) -> int:
    if rng.random() < 0.3:
        return int(rng.integers(0, 1 << 32))
    return int(rng.choice(np.array([*NUMBERS, WIDE[0]], dtype=np.int64)))


def json_values(content: bytes, rng: Rng) -> bytes:
    """Replace, drop or double one to three values anywhere in a JSON text."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return any_bytes(content, rng)
    for _ in range(int(rng.integers(1, 4))):
        value = _changed(value, rng)
    return json.dumps(value, indent=1 if rng.random() < 0.3 else None).encode()


def _changed(value: object, rng: Rng) -> object:
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return copy.deepcopy(ODD_VALUES[int(rng.integers(len(ODD_VALUES)))])  # changed later
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[int(rng.integers(len(keys)))]
    chance = rng.random()
    if chance < 0.15:
        del value[key]
    elif chance < 0.25:
        double = copy.deepcopy(value[key])
        value.update({f'{key}2': double}) if isinstance(value, dict) else value.append(double)
    else:
        value[key] = _changed(value[key], rng)
    return value


def zip_members(inner: Mutator) -> Mutator:
    """Return a mutator that damages one file inside a zip, and packs it with a right checksum."""

    def mutate(content: bytes, rng: Rng) -> bytes:
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                members = [(info, archive.read(info)) for info in archive.infolist()]
        except Exception:
            return any_bytes(content, rng)
        if not members:
            return any_bytes(content, rng)
        chosen = int(rng.integers(len(members)))
        chance = rng.random()
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, 'w') as archive:
            for i, (info, data) in enumerate(members):
                if i == chosen and chance < 0.05:
                    continue
                name = info.filename
                if i == chosen and chance < 0.15:
                    data = members[int(rng.integers(len(members)))][1]
                elif i == chosen:
                    data = inner(data, rng)
                new = zipfile.ZipInfo(name)
                new.compress_type = info.compress_type
                archive.writestr(new, data)
        return packed.getvalue()

    return mutate


def npy_arrays(content: bytes, rng: Rng) -> bytes:
    """Damage one .npy: its header's text, or its numbers as a whole."""
    if not content.startswith(b'\x93NUMPY') or len(content) < 12:
        return any_bytes(content, rng)
    (length,) = struct.unpack_from('<H', content, 8)
    head, body = content[10 : 10 + length], bytearray(content[10 + length :])
    if rng.random() < 0.4:
        head = any_bytes(head.rstrip(), rng)
        head = head + b' ' * max(0, length - 1 - len(head)) + b'\n'
        return content[:8] + struct.pack('<H', len(head) % 65536) + head + bytes(body)
    if body and rng.random() < 0.7:
        step = 8 if len(body) % 8 == 0 else 1
        at = step * int(rng.integers(max(1, len(body) // step)))
        values = np.array([*NUMBERS, *WIDE], dtype=np.uint64)
        body[at : at + step] = int(rng.choice(values)).to_bytes(8, 'little')[:step]
        return content[: 10 + length] + bytes(body)
    return content[: 10 + length] + any_bytes(bytes(body), rng)


def one_of(*mutators: Mutator) -> Mutator:
    """Return a mutator that uses one of these each time."""
    return lambda content, rng: mutators[int(rng.integers(len(mutators)))](content, rng)

"""Prediction files: the instances of many images and where they come from, in one npz.

In: InstanceSets and their provenance. Out: one file that numpy opens without pickle, and back.
Invariant: what loads was checked: every mask fills its image, every array has its length.

Layout (docs/formats.md): ``header`` is JSON as uint8 (format, version, names, provenance);
``image_ids`` (I,), ``image_hws`` (I, 2), ``offsets`` (I + 1,) int64, instances of image i are
``offsets[i]:offsets[i + 1]``; ``class_ids`` (N,) int64, ``scores`` (N,), ``boxes_xyxy`` (N, 4)
float32, ``rle_lengths`` (N,) int64, ``rle_bytes`` uint8, all COCO strings end to end; and
``extra.<key>`` (N, ...).
"""

from __future__ import annotations

import io
import json
import tokenize
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core import rle
from cellseg_mm.core.errors import PredictionError
from cellseg_mm.core.files import JsonValue, atomic_path, regular
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.windows import CHUNK
from cellseg_mm.results.coco_results import (
    ZIP_ERRORS,
    ImageRef,
    from_coco_results,
    image_refs,
    to_coco_results,
)

__all__ = [
    'ImageRef',
    'Predictions',
    'from_coco_results',
    'image_refs',
    'load_predictions',
    'save_predictions',
    'to_coco_results',
]

FORMAT = 'cellseg_mm predictions'
VERSION = 1
# A file unpacks to at most this plus MAX_RATIO times its size. Deflate reaches 1032:1, ours about
# 3:1, and 60:1 where mask probabilities are all zero or one.
FREE_BYTES = 1 << 28
MAX_RATIO = 200
MAX_SIDE_PX = 1 << 20
COLUMNS = {
    'header': (np.uint8, ()),
    'image_ids': (np.int64, ()),
    'image_hws': (np.int64, (2,)),
    'offsets': (np.int64, ()),
    'class_ids': (np.int64, ()),
    'scores': (np.float32, ()),
    'boxes_xyxy': (np.float32, (4,)),
    'rle_lengths': (np.int64, ()),
    'rle_bytes': (np.uint8, ()),
}
EXTRA = 'extra.'


@dataclass(frozen=True, slots=True)
class Predictions:
    """Instances of many images and where they come from.

    Attributes:
        sets: One per image; names and image ids occur once.
        provenance: JSON values. Keys in use: ``config``, ``checkpoint``, ``code_commit``,
            ``data_hash``, ``fold_hash``, ``fold``, ``split``, ``seed``, ``versions``,
            ``class_names``, ``max_per_img``.
    """

    sets: tuple[InstanceSet, ...]
    provenance: Mapping[str, JsonValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, 'sets', tuple(self.sets))
        object.__setattr__(self, 'provenance', dict(self.provenance))
        image_refs(self.sets)


def save_predictions(path: Path | str, predictions: Predictions) -> None:
    """Write predictions in one step; equal predictions give equal bytes.

    Raises:
        ValueError: ``path`` does not end in .npz, ``provenance`` is not JSON, an image has more
            than ``MAX_SIDE_PX`` a side, a score is not in 0..1, a box is not finite, or sets with
            instances differ in the keys of ``extra``.
    """
    path = Path(path)
    if path.suffix != '.npz':
        raise ValueError(f'{path}: prediction files end in .npz')
    arrays = _pack(predictions)
    _check_lengths(arrays, len(predictions.sets), len(predictions.sets))
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, 'w') as archive:
        for name, array in arrays.items():
            info = zipfile.ZipInfo(f'{name}.npy')  # dated 1980: the bytes do not tell the time
            info.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(info, 'w', force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)  # type: ignore[no-untyped-call]


def _pack(predictions: Predictions) -> dict[str, NDArray[Any]]:
    sets = predictions.sets
    header = {
        'format': FORMAT,
        'version': VERSION,
        'names': [s.name for s in sets],
        'provenance': predictions.provenance,
    }
    text = json.dumps(header, allow_nan=False, ensure_ascii=False)
    rles = [counts for s in sets for counts in s.rles]
    values = {
        'header': np.frombuffer(text.encode(), dtype=np.uint8),
        'image_ids': np.array([s.image_id for s in sets]),
        'image_hws': np.array([s.image_hw for s in sets]).reshape(-1, 2),
        'offsets': np.cumsum([0, *(len(s) for s in sets)]),
        'class_ids': _joined([s.class_ids for s in sets], (0,)),
        'scores': _joined([s.scores for s in sets], (0,)),
        'boxes_xyxy': _joined([s.boxes_xyxy for s in sets], (0, 4)),
        'rle_lengths': np.array([len(counts) for counts in rles]),
        'rle_bytes': np.frombuffer(b''.join(rles), dtype=np.uint8),
    }
    arrays = {name: value.astype(COLUMNS[name][0]) for name, value in values.items()}
    filled = [s for s in sets if len(s)]
    keys = sorted({key for s in filled for key in s.extra})
    for key in keys:
        without = [s.name for s in filled if key not in s.extra]
        if without:
            raise ValueError(f'{without[0]}: has no {key!r}, other images have')
        arrays[EXTRA + key] = np.concatenate([s.extra[key] for s in filled])
    return arrays


def _joined(arrays: Sequence[NDArray[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
    return np.concatenate([np.empty(shape), *arrays])


def load_predictions(path: Path | str) -> Predictions:
    """Read and check a prediction file; nothing in it is ever executed.

    Raises:
        PredictionError: The file is missing, cut, not ours, inconsistent, or a zip bomb.
    """
    path = Path(path)
    try:
        arrays = _read_arrays(path)
    except PredictionError:
        raise
    except FileNotFoundError as problem:
        raise PredictionError(
            f'{path}: is missing; expected a prediction file; check the path or predict again.'
        ) from problem
    except (*ZIP_ERRORS, SyntaxError, OverflowError, KeyError, TypeError) as problem:
        raise PredictionError(
            f'{path}: cannot be read ({str(problem)[:80]}); expected a prediction file; '
            'it is damaged or of another kind, predict again.'
        ) from problem
    try:
        return _unpack(arrays)
    except (PredictionError, ValueError, RecursionError) as problem:
        raise PredictionError(
            f'{path}: {problem}; the file is damaged or of another kind, predict again.'
        ) from problem


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    limit = FREE_BYTES + MAX_RATIO * regular(path).stat().st_size
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > limit:
            raise PredictionError(
                f'{path}: unpacks to more than {limit >> 20} MiB; a prediction file packs less '
                f'than {MAX_RATIO}:1; this is not one.'
            )
        for member in members:
            # A name that occurs twice would let two readers see two contents.
            if not member.filename.endswith('.npy') or member.filename[:-4] in arrays:
                raise ValueError(f'unexpected file {member.filename[:80]!r} within')
            # zipfile reads no more than the size that was just summed up.
            arrays[member.filename[:-4]] = _read_array(archive.read(member))
    return arrays


def _read_array(content: bytes) -> NDArray[Any]:
    """Read one .npy: like ``np.load``, but a false shape cannot make it allocate."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)  # type: ignore[no-untyped-call]
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f'npy version {version}')
    try:
        shape, fortran, dtype = readers[version](stream)  # type: ignore[no-untyped-call]
    except (tokenize.TokenError, RecursionError, MemoryError) as problem:
        # numpy hands a header that is no Python literal to Python's tokenizer
        raise ValueError(f'a damaged array header ({problem})') from problem
    if dtype.kind not in 'biuf' or not dtype.isnative or fortran:
        raise ValueError(f'an array of type {dtype}')
    values = np.frombuffer(content, dtype=dtype, offset=stream.tell()).copy()
    return values.reshape(tuple(int(n) for n in shape))


def _unpack(arrays: dict[str, NDArray[Any]]) -> Predictions:
    header = _header(arrays)
    for name, (dtype, tail) in COLUMNS.items():
        array = arrays.get(name)
        if array is None or array.dtype != dtype or array.shape[1:] != tail or not array.ndim:
            raise ValueError(f'array {name} is missing or of the wrong type')
    names, n_images = header['names'], len(arrays['image_ids'])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError('the names are not a list of texts')
    _check_lengths(arrays, len(names), n_images)
    rles = _split(arrays['rle_bytes'].tobytes(), arrays['rle_lengths'])
    extra_keys = [name for name in arrays if name not in COLUMNS]
    sets, offsets = [], arrays['offsets'].tolist()
    for i, name in enumerate(names):
        rows = slice(offsets[i], offsets[i + 1])
        height, width = arrays['image_hws'][i].tolist()
        hw = (height, width)
        try:
            # Strings of foreign make may be longer than needed; C readers want the shortest.
            counts = _shortest(rles[rows], hw)
        except PredictionError as problem:
            raise PredictionError(f'image {name}: {problem}') from problem
        sets.append(
            InstanceSet(
                name,
                int(arrays['image_ids'][i]),
                hw,
                class_ids=arrays['class_ids'][rows],
                scores=arrays['scores'][rows],
                boxes_xyxy=arrays['boxes_xyxy'][rows],
                rles=tuple(counts),
                extra={key.removeprefix(EXTRA): arrays[key][rows] for key in extra_keys},
            )
        )
    return Predictions(tuple(sets), header['provenance'])


def _shortest(rles: Sequence[bytes], hw: tuple[int, int]) -> list[bytes]:
    """Return strings as they are written here; a part at a time, for a million take a GB."""
    counts: list[bytes] = []
    for start in range(0, len(rles), CHUNK):
        counts += rle.encode_runs(rle.decode_runs(rles[start : start + CHUNK], hw))
    return counts


def _header(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    if 'header' not in arrays or arrays['header'].dtype != np.uint8:
        raise ValueError('has no header')
    header = json.loads(arrays['header'].tobytes())
    if not isinstance(header, dict) or header.get('format') != FORMAT:
        raise ValueError('the header is not that of a prediction file')
    if header.get('version') != VERSION:
        raise ValueError(f'has format version {str(header.get("version"))[:20]}, not {VERSION}')
    if not isinstance(header.get('provenance'), dict) or 'names' not in header:
        raise ValueError('the header lacks names or provenance')
    return header


def _check_lengths(arrays: Mapping[str, NDArray[Any]], n_names: int, n_images: int) -> None:
    offsets, n = arrays['offsets'], len(arrays['class_ids'])
    if not n_names == n_images == len(arrays['image_hws']) == len(offsets) - 1:
        raise ValueError('names, ids, sizes and offsets differ in number')
    if offsets[0] != 0 or offsets[-1] != n or (np.diff(offsets) < 0).any():
        raise ValueError('the offsets do not cover the instances')
    for name, array in arrays.items():
        per_instance = name.startswith(EXTRA) or name in (
            'scores',
            'boxes_xyxy',
            'rle_lengths',
        )
        if not per_instance and name not in COLUMNS:
            raise ValueError(f'unexpected array {name[:80]!r}')
        if per_instance and (not array.ndim or len(array) != n):
            raise ValueError(f'{name} has not one entry per instance')
    lengths, hws = arrays['rle_lengths'], arrays['image_hws']
    if (lengths < 0).any() or (lengths > len(arrays['rle_bytes'])).any():
        raise ValueError('an RLE length is out of range')
    if lengths.sum() != len(arrays['rle_bytes']):
        raise ValueError('the RLE lengths do not add up')
    if (hws < 1).any() or (hws > MAX_SIDE_PX).any():
        raise ValueError('an image size is out of range')
    _check_values(arrays)


def _check_values(arrays: Mapping[str, NDArray[Any]]) -> None:
    scores = arrays['scores']
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError('a score is not in 0..1')
    if not np.isfinite(arrays['boxes_xyxy']).all():
        raise ValueError('a box is not finite')
    if (arrays['class_ids'] < 0).any():
        raise ValueError('a class id is negative')


def _split(content: bytes, lengths: NDArray[np.int64]) -> list[bytes]:
    ends = np.cumsum(lengths)
    begins = (ends - lengths).tolist()
    return [content[a:b] for a, b in zip(begins, ends.tolist(), strict=True)]

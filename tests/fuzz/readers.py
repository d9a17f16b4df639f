"""What is fuzzed: five readers, good files for each, and what a reader may raise.

A reader takes a path and returns a checked value, or raises :class:`CellSegError`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile

from cellseg_mm.core.errors import CellSegError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data import cases, folds, labels
from cellseg_mm.results import predictions
from cellseg_mm.weights import checkpoints
from tests.fuzz.mutate import (
    Mutator,
    any_bytes,
    json_values,
    npy_arrays,
    one_of,
    tiff_tags,
    zip_members,
)

HW = (13, 19)


@dataclass(frozen=True)
class Reader:
    """One reader under test.

    Attributes:
        suffix: Of the files that it reads.
        read: Reads a path; checks what it got.
        good: Makes the files to start from.
        mutate: Damages a file's bytes.
    """

    suffix: str
    read: Callable[[Path], None]
    good: Callable[[Path], list[bytes]]
    mutate: Mutator


def read_tiff(path: Path) -> None:
    """Read as image and as label map; both must hold what they promise."""
    refused = 0
    try:
        image = labels.read_image(path, max_pixels=1 << 22)
        assert image.dtype == np.uint8
        assert image.shape[2] == 3
        assert image.size > 0
    except CellSegError as error:
        named(error, path)
        refused += 1
    try:
        label_map = labels.read_label_map(path)
        assert label_map.dtype == np.int32
        assert label_map.min() >= 0
    except CellSegError as error:
        named(error, path)
        refused += 1
    if refused == 2:
        labels.read_image(path, max_pixels=1 << 22)  # the sentence, for the caller's count


def named(error: CellSegError, path: Path) -> None:
    """Check that an error is one printable sentence that begins with the file's name."""
    text = str(error)
    assert str(path) in text
    text.encode()


def good_tiffs(folder: Path) -> list[bytes]:
    """Images and label maps of all kinds that users have."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (*HW, 3)).astype(np.uint8)
    ids = np.zeros(HW, dtype=np.float64)
    ids[2:6, 3:9], ids[8, 1] = 1, 2
    rgba = np.dstack([rgb, rgb[..., :1]])
    kinds: list[tuple[np.ndarray, dict]] = [
        (rgba, {'photometric': 'rgb', 'compression': 'lzw', 'predictor': True}),
        (rgb, {'photometric': 'rgb'}),
        (rgb, {'photometric': 'rgb', 'compression': 'zlib', 'tile': (16, 16)}),
        (rgb, {'photometric': 'rgb', 'compression': 'lzw', 'rowsperstrip': 3, 'byteorder': '>'}),
        (rgb, {'photometric': 'rgb', 'compression': 'jpeg'}),
        (rgb, {'photometric': 'rgb', 'compression': 'packbits'}),
        (rgb, {'photometric': 'rgb', 'bigtiff': True, 'compression': 'zlib'}),
        (rgb.transpose(2, 0, 1), {'photometric': 'rgb', 'planarconfig': 'separate'}),
        (rgb[..., 0].astype(np.uint16) * 257, {'compression': 'lzw'}),
        (rgb[..., 0] > 127, {'photometric': 'minisblack'}),
        (ids, {'compression': 'lzw'}),
        (ids.astype(np.uint16), {'compression': 'zlib', 'predictor': True}),
        (ids.astype(np.float32), {}),
    ]
    files = []
    for array, options in kinds:
        tifffile.imwrite(folder / 'good.tif', array, **options)
        files.append((folder / 'good.tif').read_bytes())
    return files


def read_id_map(path: Path) -> None:
    """Read an id map; no name may lead out of its folder."""
    for entry in cases.read_id_map(path):
        assert Path(entry.file_name).name == entry.file_name
        assert entry.image_id >= 0
        assert min(entry.image_hw) >= 1


def good_id_maps(folder: Path) -> list[bytes]:
    entries = [
        {'file_name': f'{name}.tif', 'id': i, 'height': 17, 'width': 11 + i}
        for i, name in enumerate(['a', 'b é', 'c-d'])
    ]
    return [json.dumps(entries).encode(), json.dumps(entries, indent=1).encode()]


def read_folds(path: Path) -> None:
    """Read folds; every case is in one fold."""
    found = folds.load_folds(path)
    assert len(found.names) == len(set(found.names))
    assert all(found.names_by_fold)
    assert found.hash


def good_folds(folder: Path) -> list[bytes]:
    made = [
        folds.Folds((('a', 'b'), ('c',), ('d é', 'e')), {'a': 'p', 'b': 'p', 'c': 'q'}),
        folds.Folds((('a',), ('b',)), {}, 'original', 7),
    ]
    files = []
    for one in made:
        folds.save_folds(folder / 'folds.json', one)
        files.append((folder / 'folds.json').read_bytes())
    return files


def read_predictions(path: Path) -> None:
    """Read predictions; what loads must decode and save again."""
    found = predictions.load_predictions(path)
    for one in found.sets:
        assert len(one.crops()[0]) == len(one)
    predictions.save_predictions(path.with_name('again.npz'), found)


def good_predictions(folder: Path) -> list[bytes]:
    rng = np.random.default_rng(1)
    layers = np.zeros((1, *HW), dtype=np.int32)
    layers[0, 2:6, 3:9], layers[0, 8, 1], layers[0, 9:12, 10:12] = 1, 2, 3
    one = InstanceSet.from_label_layers('a é', 1, layers, np.zeros(3, int), np.array([0, 1, 3]))
    two = InstanceSet.empty('b', 2, HW)
    votes = InstanceSet(
        'c',
        3,
        HW,
        class_ids=one.class_ids,
        scores=rng.random(3).astype(np.float32),
        boxes_xyxy=one.boxes_xyxy,
        rles=one.rles,
        extra={'n_votes': np.array([1, 2, 3])},
    )
    files = []
    for sets in ((one, two), (votes,), ()):
        path = folder / 'good.npz'
        predictions.save_predictions(path, predictions.Predictions(sets, {'fold': 0}))
        files.append(path.read_bytes())
    return files


def read_checkpoint(path: Path) -> None:
    """Load a checkpoint; what loads is made of plain values only."""
    _plain(checkpoints.load_checkpoint_file(path), 0)


PLAIN = ('torch', 'numpy', 'builtins', 'collections', 'mmengine.logging.history_buffer')


def _plain(value: object, depth: int) -> None:
    assert type(value).__module__.split('.')[0] in {name.split('.')[0] for name in PLAIN}
    if depth < 20 and isinstance(value, dict):
        for item in value.values():
            _plain(item, depth + 1)


def good_checkpoints(folder: Path) -> list[bytes]:
    import torch
    from mmengine.logging import HistoryBuffer

    content = {
        'meta': {'iter': 3, 'cellseg': {'fold': 0, 'class_names': ['a', 'b']}},
        'state_dict': {'conv.weight': torch.arange(12.0).reshape(3, 4), 'n': torch.tensor(3)},
        'message_hub': {'log_scalars': {'loss': HistoryBuffer([1.0, 2.0], [1, 1])}},
        'x': np.float64(0.5),
        'y': np.arange(6).reshape(2, 3),
    }
    files = []
    for is_zip in (True, False):
        stream = io.BytesIO()
        torch.save(content, stream, _use_new_zipfile_serialization=is_zip)
        files.append(stream.getvalue())
    return files


READERS = {
    'tiff': Reader('.tif', read_tiff, good_tiffs, one_of(tiff_tags, tiff_tags, any_bytes)),
    'idmap': Reader('.json', read_id_map, good_id_maps, one_of(json_values, any_bytes)),
    'folds': Reader('.json', read_folds, good_folds, one_of(json_values, any_bytes)),
    'predictions': Reader(
        '.npz',
        read_predictions,
        good_predictions,
        one_of(zip_members(npy_arrays), zip_members(json_values), any_bytes),
    ),
    'checkpoint': Reader(
        '.pth',
        read_checkpoint,
        good_checkpoints,
        one_of(zip_members(any_bytes), zip_members(any_bytes), any_bytes),
    ),
}

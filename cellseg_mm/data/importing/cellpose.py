"""Cellpose's ``_seg.npy``: what its window saves, with the corrections drawn there.

In: ``<name>_seg.npy`` beside an image. Out: cells of one class. Invariant: the file is a pickle,
and nothing of it is run: only arrays of numbers, text and lists are read out of it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tokenize import TokenError

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from cellseg_mm.core.errors import LabelMapError
from cellseg_mm.core.safe_pickle import UnreadableError, Value, unpickle
from cellseg_mm.data.importing.classes import Classes
from cellseg_mm.data.importing.label_maps import cells_of, one_class
from cellseg_mm.data.importing.pairs import Pair, find_pairs
from cellseg_mm.data.importing.parts import tell_apart
from cellseg_mm.data.importing.sources import MAX_TEXT_BYTES, Annotated, ImportParams, Job, Tally

EXPECTED = "Cellpose's <name>_seg.npy"


def find_cellpose(source: Path, params: ImportParams) -> tuple[list[Job], Classes, list[str]]:
    """Find images that Cellpose saved cells of; see ``import_data``."""
    number, classes = one_class(source, params)
    pairs, notes = find_pairs(source, ('_seg.npy',), params)
    jobs = []
    for pair in pairs:
        read = partial(_read_pair, pair, number, params)
        jobs.append(pair.job(read))
    return jobs, classes, notes


def _read_pair(pair: Pair, number: int, params: ImportParams) -> Annotated:
    tally = Tally()
    image = pair.read_image(tally, params)
    ids = read_seg_masks(pair.table)
    if ids.shape != image.shape[:2]:
        raise LabelMapError(
            f'{pair.table}: its masks have the shape {ids.shape}, the image {image.shape[:2]}; '
            f'they must match; save it again for this image'
        )
    cells = tell_apart(str(pair.table), cells_of(ids, number), params.binary, tally)
    return Annotated(image, cells, tally)


def read_seg_masks(path: Path) -> NDArray[np.int64]:
    """Return the label map of a ``_seg.npy``; no code of the file is run.

    Raises:
        LabelMapError: It cannot be read, is no such file, or asks for more than arrays.
    """
    content = _read_dict(path)
    masks = content.get('masks') if isinstance(content, dict) else None
    if not isinstance(masks, np.ndarray) or masks.dtype.kind not in 'iub':
        keys = ', '.join(map(str, content))[:80] if isinstance(content, dict) else 'no dict'
        raise LabelMapError(
            f'{path}: has no masks of whole ids (it holds {keys}); expected {EXPECTED}; save it '
            f'again in Cellpose'
        )
    ids = masks.astype(np.int64)
    if ids.min(initial=0) < 0:
        raise LabelMapError(
            f'{path}: its masks have values down to {ids.min()}; expected ids, 0 for background; '
            f'save it again in Cellpose'
        )
    return ids


def _read_dict(path: Path) -> Value:
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise LabelMapError(f'{path}: is larger than 2 GiB; expected {EXPECTED}; split it')
        with path.open('rb') as stream:
            version = npy.read_magic(stream)  # type: ignore[no-untyped-call]
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(stream)  # type: ignore[no-untyped-call]
            if dtype != np.dtype(object) or shape != ():
                raise LabelMapError(
                    f'{path}: is an array of {dtype} of the shape {shape}; expected {EXPECTED}; '
                    f'for arrays of ids choose the format label-map'
                )
            return unpickle(stream.read(), expected=EXPECTED, objects=True)
    except LabelMapError:
        raise
    except UnreadableError as problem:
        raise LabelMapError(f'{path}: {problem}') from None
    except (OSError, ValueError, SyntaxError, TokenError) as problem:  # numpy parses the header
        raise LabelMapError(
            f'{path}: cannot be read ({str(problem)[:80]}); expected {EXPECTED}; save it again'
        ) from problem

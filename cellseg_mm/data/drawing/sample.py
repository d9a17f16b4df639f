"""Draws a small H&E-like data set in exactly the real collection's layout and file format.

In: a seed. Out: ``train/<uuid>/image.tif`` with ``class1.tif`` to ``class4.tif``, ``test_release``,
the id map and ``manifest.csv``. It is what the demo trains on and what end-to-end tests read.
Invariant: instances do not overlap, are connected by edges, and the same seed gives the same bytes.

Pictures are composed as amounts of dye (haematoxylin, eosin, blood) and turned into light by
Beer-Lambert's law, so overlaps, stain variation and pale regions behave as in real slides.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cellseg_mm.core.errors import CellSegError
from cellseg_mm.core.files import JsonValue, write_json, write_text
from cellseg_mm.core.layout import ID_MAP, TEST, TRAIN
from cellseg_mm.data.case_writer import write_case, write_image
from cellseg_mm.data.config import N_CLASSES
from cellseg_mm.data.drawing.cells import Rng
from cellseg_mm.data.drawing.pictures import DENSE_SCENE, SCENES, Picture, Stain, draw_picture

SMALLEST_HW, LARGEST_HW = (40, 60), (700, 500)


# ---- fields of noise and shape ----


# ---- the four cell types ----


# ---- placing cells ----


# ---- painting ----


# ---- files ----


def make_sample(
    out_dir: Path | str,
    *,
    n_train: int = 48,
    n_test: int = 8,
    seed: int = 0,
    dense: bool = False,
) -> Path:
    """Write a sample data set; the folder appears whole or not at all.

    Several images come from one patient, and patients differ in stain; training and test patients
    are different people. As in the real collection, red and blue are swapped in the files.

    Args:
        out_dir: Folder to make; it must not exist, or be empty.
        n_train: Training cases; the first two have the smallest and the largest size.
        n_test: Test images.
        seed: The same seed gives the same bytes.
        dense: Make every image full of small touching cells.

    Returns:
        ``out_dir``.

    Raises:
        CellSegError: The folder is in use, or a number of images is out of range.
    """
    out_dir = Path(out_dir)
    if n_train < 1 or n_test < 0:
        raise CellSegError(
            f'sample: {n_train} training and {n_test} test images were asked for; '
            f'at least 1 and 0 are needed'
        )
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise CellSegError(
            f'{out_dir}: exists and is not an empty folder; remove it or choose another name'
        )
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix='.tmp-sample-', dir=out_dir.parent))
    try:
        _write_all(temporary, n_train, n_test, np.random.default_rng(seed), dense=dense)
        temporary.chmod(0o777 & ~_umask())
        temporary.replace(out_dir)  # replaces an empty folder too
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out_dir


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _write_all(folder: Path, n_train: int, n_test: int, rng: Rng, *, dense: bool) -> None:
    rows: list[list[str | int]] = []
    for patient, name, picture in _draw_split(rng, n_train, 'sample-train', dense=dense):
        stored = {k: picture.label_maps.get(k) for k in range(1, N_CLASSES + 1)}
        write_case(folder / TRAIN / name, picture.image[..., ::-1], picture.label_maps)
        counts = [0 if m is None else len(np.unique(m)) - 1 for m in stored.values()]
        rows.append([name, *picture.image.shape[:2], *counts, patient])
    _write_manifest(folder / 'manifest.csv', rows)
    ids = rng.permutation(n_test) + 1  # not in the order of names, as in the real file
    entries: list[JsonValue] = []
    (folder / TEST).mkdir()
    for index, (_, name, picture) in enumerate(
        _draw_split(rng, n_test, 'sample-test', dense=dense)
    ):
        write_image(folder / TEST / f'{name}.tif', picture.image[..., ::-1])
        height, width = picture.image.shape[:2]
        entries.append(
            {'file_name': f'{name}.tif', 'id': int(ids[index]), 'height': height, 'width': width}
        )
    write_json(folder / ID_MAP, entries)


def _draw_split(
    rng: Rng, n: int, prefix: str, *, dense: bool
) -> Iterator[tuple[str, str, Picture]]:
    """Yield patient, case name and picture; each patient has one to five images."""
    patient, left = -1, 0
    for index in range(n):
        if left == 0:
            patient, left, stain = patient + 1, int(rng.integers(1, 6)), Stain.random(rng)
            usual = rng.permutation(len(SCENES))[:2]  # a patient's slides show similar tissue
        left -= 1
        scene = DENSE_SCENE if dense else SCENES[int(rng.choice(usual))]
        if prefix == 'sample-train' and index == 1 and not dense:
            scene = SCENES[1]  # the largest image alone must not outweigh a fold
        name = str(uuid.UUID(bytes=rng.bytes(16), version=4))
        sparse, gaps = not dense and index % 12 == 7, index % 5 == 3
        image_hw = _image_hw(rng, index, prefix)
        picture = draw_picture(rng, image_hw, scene, stain, sparse=sparse, gaps=gaps)
        yield f'{prefix}-{patient:02d}', name, picture


def _image_hw(rng: Rng, index: int, prefix: str) -> tuple[int, int]:
    height, width = np.exp(rng.uniform(np.log(150), np.log(350), 2)).astype(int).tolist()
    if prefix == 'sample-train' and index < 2:
        return (SMALLEST_HW, LARGEST_HW)[index]
    return height, width


def _write_manifest(path: Path, rows: Sequence[Sequence[str | int]]) -> None:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator='\n')
    header = ['uuid', 'height', 'width', *(f'c{k}' for k in range(1, N_CLASSES + 1)), 'patient']
    writer.writerows([header, *sorted(rows, key=lambda row: str(row[0]))])
    write_text(path, stream.getvalue())

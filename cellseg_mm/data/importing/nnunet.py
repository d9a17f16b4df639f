"""nnU-Net's folders of pictures: imagesTr, labelsTr and dataset.json, versions 1 and 2.

In: a folder. Out: cells. Invariant: labels are classes, so every connected part is one cell; the
label ``ignore`` is left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from cellseg_mm.core.errors import CellSegError, LabelMapError
from cellseg_mm.data.importing.class_maps import cells_of_classes
from cellseg_mm.data.importing.classes import Classes, build_classes
from cellseg_mm.data.importing.pairs import read_json
from cellseg_mm.data.importing.pictures import read_grid, read_picture
from cellseg_mm.data.importing.sources import (
    IMAGE_SUFFIXES,
    Annotated,
    ImportParams,
    Job,
    Picture,
    Tally,
    composed,
    listed,
    unused_note,
)

IGNORE = 'ignore'
LOOKS = 'expected "labels": {"background": 0, "tumor": 1, ...}'


def find_nnunet(source: Path, params: ImportParams) -> tuple[list[Job], Classes, list[str]]:
    """Find the training cases of nnU-Net's folder; see ``import_data``."""
    name_of = _labels(source / 'dataset.json')
    names = list(dict.fromkeys(name for _, name in sorted(name_of.items())))
    own = [name for name in names if name != IGNORE]
    left_out = [name for name in names if name == IGNORE]
    classes = build_classes(params, own, found=names, left_out=left_out, is_fixed=False)
    labels, images = source / 'labelsTr', source / 'imagesTr'
    notes = unused_note(labels, IMAGE_SUFFIXES)
    channels: dict[str, list[Path]] = {}
    for path in listed(images, IMAGE_SUFFIXES):
        of_case = re.fullmatch(r'(.+)_\d{4}', composed(path.stem))
        channels.setdefault(of_case[1] if of_case else composed(path.stem), []).append(path)
    jobs = []
    for path in listed(labels, IMAGE_SUFFIXES):
        found = channels.pop(composed(path.stem), [])
        read = partial(_read_case, path, found, name_of, classes, params)
        jobs.append(Job(path.stem, path, '', read))
    if channels:
        notes.append(f'{images}: {len(channels)} images without labels were not used')
    return jobs, classes, notes


def _labels(path: Path) -> dict[int, str]:
    """Return the class name of each value above 0."""
    content = read_json(path, "nnU-Net's dataset.json")
    labels = content.get('labels') if isinstance(content, Mapping) else None
    if not isinstance(labels, Mapping):
        raise CellSegError(f'{path}: has no labels; {LOOKS}; correct the file')
    name_of: dict[int, str] = {}
    for key, value in labels.items():
        name, number = (str(value), key) if str(key).isdecimal() else (str(key), value)
        if isinstance(number, list):
            raise CellSegError(
                f'{path}: label {name} is a region of several values ({number}); expected one '
                f'value for each class; list the values, and join classes with --map'
            )
        if isinstance(number, bool) or not str(number).isdecimal():
            raise CellSegError(
                f'{path}: label {name} has the value {number!r}; {LOOKS}; correct it'
            )
        if name_of.setdefault(int(number), name) != name:
            raise CellSegError(
                f'{path}: the labels {name_of[int(number)]} and {name} have the value {number}; '
                f'{LOOKS}; correct it'
            )
    name_of.pop(0, None)
    return name_of


def _read_case(
    label: Path,
    channels: list[Path],
    name_of: Mapping[int, str],
    classes: Classes,
    params: ImportParams,
) -> Annotated:
    tally = Tally()
    image = _read_channels(label, channels, tally, params)
    values = read_grid(label, image.shape[:2])
    return Annotated(image, cells_of_classes(values, name_of, classes, label, tally), tally)


def _read_channels(
    label: Path, channels: list[Path], tally: Tally, params: ImportParams
) -> Picture:
    """Read one picture, or three of one channel each as red, green and blue."""
    if len(channels) not in (1, 3):
        raise CellSegError(
            f'{label}: has {len(channels)} images {label.stem}_0000, _0001, ... in imagesTr; '
            f'expected one picture, or three of one channel each; save RGB pictures'
        )
    pictures = [read_picture(p, tally, max_pixels=params.max_pixels) for p in channels]
    if len(pictures) == 1:
        return pictures[0]
    if len({(p.shape, p.dtype) for p in pictures}) > 1:
        raise LabelMapError(
            f'{label}: its three images differ in size or type; they must match; save them anew'
        )
    if any((p != p[..., :1]).any() for p in pictures):
        raise LabelMapError(
            f'{label}: has three images, and one of them has colours; expected one channel in '
            f'each; keep the RGB picture alone'
        )
    return cast(Picture, np.stack([p[..., 0] for p in pictures], axis=2))

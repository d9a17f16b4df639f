"""Masks that paint classes, not cells: colours or grey values, as annotation tools export them.

In: a grid of values and what they mean. Out: cells. Invariant: every connected part of a class is
one cell, corners touch, and the report says how many parts look like several; a value that means
nothing is counted, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import CellSegError
from cellseg_mm.data.importing.classes import Classes, build_classes
from cellseg_mm.data.importing.label_maps import MaskPair, find_mask_pairs
from cellseg_mm.data.importing.parts import note_joined, split
from cellseg_mm.data.importing.pictures import read_colours, read_grid
from cellseg_mm.data.importing.sources import Annotated, Cell, ImportParams, Job, Tally

BACKGROUND = 0  # black too

NameOf = Mapping[int, str]


def find_colour_masks(source: Path, params: ImportParams) -> tuple[list[Job], Classes, list[str]]:
    """Find pairs of an image and a mask of colours; see ``import_data``."""
    name_of, has_colours = _parse(params.colours)
    names = list(dict.fromkeys(name_of.values()))
    classes = build_classes(params, names, found=names, is_fixed=False)
    pairs, notes = find_mask_pairs(source, 'colour-mask')
    jobs = []
    for pair in pairs:
        read = partial(_read_pair, pair, name_of, classes, params, has_colours)
        jobs.append(Job(pair.name, pair.first, '', read))
    return jobs, classes, notes


def _parse(colours: Mapping[str, str]) -> tuple[dict[int, str], bool]:
    """Return the class name of each value, and whether values are colours (0xRRGGBB)."""
    from PIL import ImageColor

    if not colours:
        raise CellSegError(
            "--colour: colour-mask does not know what the colours mean; expected such as '#ff0000="
            "tumor' for each class; name them, or take label-map --binary components for masks of "
            'one class'
        )
    grey = {text for text in colours if text.isascii() and text.isdecimal()}
    if grey and len(grey) < len(colours):
        raise CellSegError(
            f'--colour: {", ".join(sorted(grey))} are grey values, the others colours; expected '
            f'one kind; name all as colours (#010101 is grey 1)'
        )
    name_of: dict[int, str] = {}
    for text, name in colours.items():
        try:
            red, green, blue = (0, 0, int(text)) if grey else ImageColor.getrgb(text)[:3]
        except ValueError as problem:
            raise CellSegError(
                f'--colour {text}={name}: is no colour; expected #rrggbb, a name such as red, or a '
                f'grey value; correct it'
            ) from problem
        value = (red << 16) + (green << 8) + blue
        if name_of.setdefault(value, name) != name:
            raise CellSegError(
                f'--colour {text}: means {name_of[value]} and {name}; expected one class; remove '
                f'one'
            )
    return name_of, not grey


def _read_pair(
    pair: MaskPair, name_of: NameOf, classes: Classes, params: ImportParams, has_colours: bool
) -> Annotated:
    tally = Tally()
    image = pair.read_image(tally, params)
    read = read_colours if has_colours else read_grid
    values = read(pair.masks[0], image.shape[:2])
    form = '#{:06x}' if has_colours else '{}'
    cells = cells_of_classes(values, name_of, classes, pair.masks[0], tally, form=form)
    return Annotated(image, cells, tally)


def cells_of_classes(
    values: NDArray[np.int64],
    name_of: NameOf,
    classes: Classes,
    source: Path,
    tally: Tally,
    *,
    form: str = '{}',
) -> list[Cell]:
    """Turn a map of classes into cells: one per connected part of a class.

    Args:
        values: (H, W); 0 is background unless it has a name.
        name_of: Class name in the source by value; several values may be one class.
        classes: Tells class names.
        source: A file for messages.
        tally: Gets values without a class, and how many parts look like several cells.
        form: How a value is written in messages.

    Raises:
        LabelMapError: A class name is neither known nor skipped.
    """
    found, counts = np.unique(values, return_counts=True)
    values_of: dict[int, list[int]] = {}
    for value, n_px in sorted(
        zip(found.tolist(), counts.tolist(), strict=True), key=lambda p: -p[1]
    ):
        if value in name_of:
            number = classes.number(name_of[value], source)
            values_of.setdefault(number, []).append(value)
            if not number:
                tally.skipped[f'px of class {name_of[value]}'] += n_px
        elif value != BACKGROUND:
            which = f'{form.format(value)} ({n_px} px)'
            tally.leave_out('values of the mask that no class has', which)
    cells: list[Cell] = []
    for number in sorted(values_of.keys() - {0}):
        mask = np.isin(values, values_of[number])
        cells += split(Cell(number, 0, 0, mask))
    if cells:
        tally.remarks.append(
            'every connected part of a class became a cell (the masks hold classes, not cells)'
        )
        note_joined(cells, tally)
    return cells

"""The records that every source format fills in, and how its folders are listed.

In: options and folders. Out: a :class:`Job` per case, whose reader returns :class:`Annotated`:
pixels, cells as crops, and a :class:`Tally` of what was not taken over.
Invariant: sources are not trusted: sizes are judged before decoding, paths stay inside the folder,
nothing is guessed, and what cannot be used is counted by its reason.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import CellSegError
from cellseg_mm.data.tiff import DEFAULT_MAX_PIXELS

Format = Literal[
    'monusac',
    'coco',
    'label-map',
    'mask-folders',
    'geojson',
    'imagej',
    'cellpose',
    'labelme',
    'yolo',
    'cvat',
    'label-table',
    'colour-mask',
    'pannuke',
    'consep',
    'hovernet',
    'nnunet',
    'run-lengths',
]
Binary = Literal['', 'components', 'ids']
Mask: TypeAlias = NDArray[np.bool_]
Picture: TypeAlias = NDArray[np.uint8] | NDArray[np.uint16]

IMAGE_SUFFIXES = ('.tif', '.tiff', '.png', '.jpg', '.jpeg', '.bmp')
MAX_TEXT_BYTES = 2 << 30  # an annotation file beyond 2 GiB is a mistake
SHOWN = 5


@dataclass(frozen=True, slots=True)
class ImportParams:
    """What to import.

    Attributes:
        class_names: Name of class 1, 2, ...; empty means the format's own: MoNuSAC's four types,
            COCO's categories by rising id, or the single class ``cell``.
        class_map: Name in the source -> class; names are compared as ``classes`` says.
        skipped: Names in the source to leave out; they are counted in the report.
        single_class: Class of the cells that have no class name in the source. Where it is empty,
            a single name in ``class_names`` is taken.
        image_dir: Folder of the images, where annotations lie apart from them (COCO, GeoJSON, ROIs,
            Cellpose, Labelme, CVAT, CoNSeP, HoVer-Net, run lengths); by default the annotations'
            folder.
        colours: What a mask's colours mean: '#ff0000', 'red', or a grey value -> class.
        nuclei: Take the nuclei of QuPath's cells, not the cells around them.
        binary: What to do with a mask that does not tell cells apart: '' refuses it, 'components'
            makes each connected part a cell, 'ids' takes each value as one cell, as it stands.
        strict: Do not write a case of which something cannot be used.
        swap_red_blue: Exchange the two channels, to match data that is stored so.
        replace: Write cases again that are already there.
        add: The folder holds cases that were made otherwise: a case that is there keeps its picture
            and gets new cells, what it was is kept, and where cases came from is noted.
        max_pixels: Most pixels (height times width) of an image that are accepted.
    """

    class_names: tuple[str, ...] = ()
    class_map: Mapping[str, str] = field(default_factory=dict)
    skipped: frozenset[str] = frozenset()
    single_class: str = ''
    image_dir: Path | None = None
    colours: Mapping[str, str] = field(default_factory=dict)
    nuclei: bool = False
    binary: Binary = ''
    strict: bool = False
    swap_red_blue: bool = False
    replace: bool = False
    add: bool = False
    max_pixels: int = DEFAULT_MAX_PIXELS


@dataclass(frozen=True, slots=True)
class Cell:
    """One annotated cell: 1-based class, row and column of the crop, and its (h, w) bool mask."""

    class_number: int
    top: int
    left: int
    mask: Mask


@dataclass(slots=True)
class Tally:
    """What was not taken over from a source, by reason.

    Attributes:
        skipped: Reason -> number; left out because the options or the format say so.
        unusable: Reason -> which ones; left out because they cannot be used.
        remarks: What a person should know about what was taken.
    """

    skipped: Counter[str] = field(default_factory=Counter)
    unusable: dict[str, list[str]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def leave_out(self, reason: str, which: str) -> None:
        """Count something that cannot be used; ``reason`` names the kind in the plural."""
        self.unusable.setdefault(reason, []).append(which)

    def counts(self) -> Counter[str]:
        """Return reason -> number of everything that was left out."""
        return self.skipped + Counter({reason: len(w) for reason, w in self.unusable.items()})

    def notes(self) -> list[str]:
        """Return one sentence per reason."""
        notes = [f'{n} {reason} left out' for reason, n in sorted(self.skipped.items())]
        for reason, which in sorted(self.unusable.items()):
            notes.append(f'{len(which)} {reason} left out ({first_of(which)})')
        return notes


@dataclass(frozen=True, slots=True)
class Annotated:
    """One source image, (H, W, 3), its cells in the source's order, and what was left out."""

    image: Picture
    cells: Sequence[Cell]
    tally: Tally = field(default_factory=Tally)


@dataclass(frozen=True, slots=True)
class Job:
    """One case to import.

    Attributes:
        name: Its name in the source.
        source: A file for messages.
        patient: Whose image it is, '' if the source does not say.
        read: Reads it.
        folder: Its folder inside the source, which tells equal names apart.
        image_path: The image, where it is a file of its own that may say how large its pixels are.
    """

    name: str
    source: Path
    patient: str
    read: Callable[[], Annotated]
    folder: str = ''
    image_path: Path | None = None


def first_of(words: Iterable[str]) -> str:
    """Return the first few words, and how many there are more."""
    words = list(words)
    more = len(words) - SHOWN
    return ', '.join(words[:SHOWN]) + (f' and {more} more' if more > 0 else '')


def composed(text: str) -> str:
    """Return one spelling of accents (macOS decomposes them) that can be written as UTF-8.

    JSON can smuggle half a surrogate pair in.
    """
    return unicodedata.normalize('NFC', text.encode('utf-8', 'backslashreplace').decode())


# ---- folders ----


def entries(folder: Path) -> list[Path]:
    """Return what a folder holds, sorted; names that begin with a dot are left out."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith('.'))
    except OSError as problem:
        raise CellSegError(
            f'{folder}: cannot be listed ({problem.strerror}); expected a folder; check the path'
        ) from problem


def listed(folder: Path, suffixes: Sequence[str], *, deep: bool = False) -> list[Path]:
    """Return files with one of the suffixes, sorted; ``deep`` looks one folder further down."""
    found = []
    for path in entries(folder):
        if path.is_file() and path.suffix.lower() in suffixes:
            found.append(path)
        elif deep and path.is_dir():
            found += listed(path, suffixes)
    return found


def unused_note(folder: Path, suffixes: Sequence[str], *, deep: bool = False) -> list[str]:
    """Return a sentence about files of other kinds, counted by suffix; nothing without any."""
    counts: Counter[str] = Counter()
    for path in entries(folder):
        if deep and path.is_dir():
            counts += Counter(_kind(p) for p in entries(path) if _is_other(p, suffixes))
        elif _is_other(path, suffixes):
            counts[_kind(path)] += 1
    if not counts:
        return []
    kinds = ', '.join(f'{n} {kind}' for kind, n in sorted(counts.items()))
    return [f'{folder}: files of other kinds were not used: {kinds}']


def _is_other(path: Path, suffixes: Sequence[str]) -> bool:
    return path.is_file() and path.suffix.lower() not in suffixes


def _kind(path: Path) -> str:
    return path.suffix.lower() or 'without suffix'

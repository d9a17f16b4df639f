"""Which image a file of annotations belongs to, and how such files are read as JSON.

In: a folder or one file. Out: pairs by name. Invariant: a pair is made by name only, never by
order; what has no partner is named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cellseg_mm.core.errors import CellSegError, LabelMapError
from cellseg_mm.data.importing.classes import nearest
from cellseg_mm.data.importing.pictures import read_picture
from cellseg_mm.data.importing.sources import (
    IMAGE_SUFFIXES,
    MAX_TEXT_BYTES,
    Annotated,
    ImportParams,
    Job,
    Picture,
    Tally,
    composed,
    entries,
    first_of,
    listed,
)

PICTURES = ('.svs', *IMAGE_SUFFIXES)


@dataclass(frozen=True, slots=True)
class Pair:
    """A file of annotations and the images that its name can mean; one, if all is well.

    Attributes:
        name: Of the case.
        table: The annotations.
        images: Found for it.
        folder: The table's folder inside the source, which tells equal names apart.
        others: Names of images nearby, for advice.
    """

    name: str
    table: Path
    images: tuple[Path, ...]
    folder: str
    others: tuple[str, ...]

    def job(self, read: Callable[[], Annotated]) -> Job:
        """Return the case to import."""
        image = self.images[0] if len(self.images) == 1 else None
        return Job(self.name, self.table, '', read, self.folder, image)

    def read_image(self, tally: Tally, params: ImportParams) -> Picture:
        """Read the image.

        Raises:
            CellSegError: There is none or several, or it cannot be read.
        """
        if len(self.images) != 1:
            found = ' and '.join(str(path) for path in self.images) or 'none'
            near = '' if self.images else nearest(self.name, self.others)
            hint = f' (nearest: {near})' if near else ''
            raise CellSegError(
                f'{self.table}: has {len(self.images)} images of the name {self.name} ({found})'
                f'{hint}; expected one beside it; name the folder of images with --images'
            )
        return read_picture(self.images[0], tally, max_pixels=params.max_pixels)


def find_pairs(
    source: Path, suffixes: Sequence[str], params: ImportParams
) -> tuple[list[Pair], list[str]]:
    """Find files of annotations and their images.

    An image lies in ``--images``, beside the annotations, or in ``images`` of the source, and has
    the same name up to the suffix (``a.geojson`` or ``a.tif.geojson`` for ``a.tif``). ``--images``
    may also be the folder of a data folder's cases: ``<name>/image.tif``.

    Args:
        source: A file of annotations, or a folder of them (or of folders of them).
        suffixes: How files of annotations end, the longest first; capitals do not matter.
        params: ``image_dir`` replaces the other places.

    Returns:
        Pairs by rising path; and a sentence about images without annotations.

    Raises:
        CellSegError: A folder cannot be listed.
    """
    if params.image_dir is not None and not params.image_dir.is_dir():
        raise CellSegError(f'--images {params.image_dir}: is no folder; expected one; correct it')
    endings = tuple({Path(f'name{end}').suffix.lower() for end in suffixes})
    inside = [source] if source.is_file() else listed(source, endings, deep=True)
    tables = [path for path in inside if _ending(path, suffixes)]
    pairs: list[Pair] = []
    used: set[Path] = set()
    seen: dict[Path, list[Path]] = {}
    for table in tables:
        folders = _image_folders(source, table, params)
        near = [path for folder in folders for path in _pictures(folder, seen)]
        name = composed(table.name[: -len(_ending(table, suffixes))])
        images = [path for path in near if name in (composed(path.stem), composed(path.name))]
        used.update(images)
        case = composed(images[0].stem) if len(images) == 1 else name
        own = (params.image_dir or Path()) / name / 'image.tif'
        images += [own] if params.image_dir is not None and own.is_file() else []
        folder = '' if table.parent == source else table.parent.name
        others = tuple(sorted(path.stem for path in near))
        pairs.append(Pair(case, table, tuple(images), folder, others))
    idle = sorted({path.name for paths in seen.values() for path in paths if path not in used})
    notes = [f'{source}: {len(idle)} images without annotations were not used ({first_of(idle)})']
    return pairs, notes if idle and tables else []


def _ending(path: Path, suffixes: Sequence[str]) -> str:
    """Return the suffix of a file of annotations, '' if it is none."""
    name = path.name.casefold()
    fitting = [end for end in suffixes if name.endswith(end.casefold()) and len(name) > len(end)]
    return fitting[0] if fitting else ''


def _image_folders(source: Path, table: Path, params: ImportParams) -> list[Path]:
    if params.image_dir is not None:
        return [params.image_dir]
    # beside the annotations; in images, below them or beside their folder (CoNSeP: Images, Labels)
    inner = [
        path
        for folder in (table.parent, source)
        if folder.is_dir()
        for path in entries(folder)
        if path.is_dir() and path.name.casefold() == 'images'
    ]
    return list(dict.fromkeys([table.parent, *inner]))


def _pictures(folder: Path, seen: dict[Path, list[Path]]) -> list[Path]:
    if folder not in seen:
        seen[folder] = listed(folder, PICTURES)
    return seen[folder]


def read_json(path: Path, expected: str) -> object:
    """Return what a JSON file holds.

    Args:
        path: The file.
        expected: What it should be, for messages: 'a COCO file'.

    Raises:
        LabelMapError: It is no regular file, larger than 2 GiB, cannot be read, or is no JSON.
    """
    if path.exists() and not path.is_file():
        raise LabelMapError(
            f'{path}: is no regular file; expected {expected}; name the file itself'
        )
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise LabelMapError(f'{path}: is larger than 2 GiB; expected {expected}; split it')
        return json.loads(path.read_bytes())
    except OSError as problem:
        raise LabelMapError(
            f'{path}: cannot be read ({problem.strerror}); expected {expected}; check the path'
        ) from problem
    except (ValueError, RecursionError) as problem:
        if isinstance(problem, LabelMapError):
            raise
        raise LabelMapError(
            f'{path}: not valid JSON ({str(problem)[:80]}); expected {expected}; export it again'
        ) from problem

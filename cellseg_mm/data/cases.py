"""Finds the cases of a data folder: names, files, ids and sizes, without reading pixels.

In: ``train/<name>/image.tif`` with ``class1.tif`` ..., ``test_release/<name>.tif`` and the map from
test image names to ids (docs/formats.md). Out: :class:`Case`, sorted by name.
Invariant: what is wrong is listed all together, and no path comes from a file's content.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cellseg_mm.core.errors import CellSegError, DataError, IdMapError, ImageError
from cellseg_mm.core.files import regular
from cellseg_mm.core.layout import ID_MAP, TEST, TRAIN, is_result
from cellseg_mm.data import tiff
from cellseg_mm.data.tiff import DEFAULT_MAX_PIXELS, size_text, swapped_text

MAX_NUMBER = 2**31 - 1  # of ids and sizes in the id map
EXCLUDE_FILE = 'exclude.txt'
MAX_ID_MAP_BYTES = 64 << 20  # 64 MiB hold half a million entries

_CLASS_FILE = re.compile(r'class(\d{1,9})\.tiff?', re.IGNORECASE)
_IMAGE_FILE = re.compile(r'image\.tiff?', re.IGNORECASE)
_TEST_FILE = re.compile(r'.+\.tiff?', re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Case:
    """One image with its files.

    Attributes:
        name: The training folder's name, or the test file's name without suffix.
        image_path: The image.
        label_paths: 0-based class id -> that class's label map; empty for test images.
        image_id: COCO image id: the rank of the folder among all sorted names from 1 (training),
            or the id map's (test).
        image_hw: Height and width in px, from the image's header.
    """

    name: str
    image_path: Path
    label_paths: Mapping[int, Path]
    image_id: int
    image_hw: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Scan:
    """What a look at a split's folders found.

    Attributes:
        cases: The cases without a problem, sorted by name.
        problems: Sentences that forbid to go on; each names its file.
        notes: Sentences that a human should read; each names its file.
        excluded: Names of cases left out by exclude.txt, sorted.
    """

    cases: list[Case]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)


def find_cases(
    data_root: Path | str,
    split: Literal['train', 'test'],
    n_classes: int,
    *,
    exclude_names: Collection[str] | None = None,
) -> list[Case]:
    """Find all cases of a split; reads folders, image headers and the id map, no pixels.

    Args:
        data_root: The data folder.
        split: ``train`` or ``test``.
        n_classes: Number of classes; ``class{k}.tif`` with a larger k is an error.
        exclude_names: Names of cases to leave out, as ``folds.excluded_by`` gives them; None takes
            those in ``exclude.txt`` of ``data_root``, where there is one.

    Returns:
        Cases sorted by name. An id map entry without a file is no case (and is logged).

    Raises:
        DataError: All problems together: no such folder, unreadable or missing files, doubled
            class files, classes beyond ``n_classes``, a wrong id map, paths that leave the folder.
    """
    scan = scan_cases(data_root, split, n_classes, exclude_names=exclude_names)
    if scan.problems:
        raise DataError(scan.problems)
    for note in scan.notes:
        logging.getLogger(__name__).info('%s', note)
    return scan.cases


def scan_cases(
    data_root: Path | str,
    split: Literal['train', 'test'],
    n_classes: int,
    *,
    exclude_file: Path | str | None = None,
    exclude_names: Collection[str] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Scan:
    """Look at a split like :func:`find_cases`, and return problems instead of raising them.

    Args:
        data_root: The data folder.
        split: See :func:`find_cases`.
        n_classes: See :func:`find_cases`.
        exclude_file: Names of cases to leave out, one a line, ``#`` begins a comment; read in place
            of ``exclude.txt``.
        exclude_names: The names themselves; no file is read then.
        max_pixels: Most pixels (height times width) of an image that are accepted.
    """
    root = Path(data_root)
    try:
        excluded = (
            read_exclude(root, exclude_file) if exclude_names is None else frozenset(exclude_names)
        )
        if split == 'train':
            return _scan_train(root / TRAIN, n_classes, excluded, max_pixels)
        if split == 'test':
            return _scan_test(root / TEST, root / ID_MAP, excluded, max_pixels)
    except CellSegError as problem:
        return Scan([], [str(problem)])
    raise ValueError(f"split is {split!r}; expected 'train' or 'test'")


def read_exclude(data_root: Path, exclude_file: Path | str | None = None) -> frozenset[str]:
    """Return the case names listed in an exclude file; empty without such a file.

    Raises:
        DataError: A file that was asked for is missing, or a file cannot be read.
    """
    path = Path(exclude_file) if exclude_file is not None else data_root / EXCLUDE_FILE
    if exclude_file is None and not os.path.lexists(path):
        return frozenset()
    try:
        lines = regular(path).read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(
            [f'{path}: cannot be read ({problem}); expected one case name a line in UTF-8.']
        ) from problem
    names = (line.split('#', 1)[0].strip() for line in lines)
    return frozenset(name for name in names if name)


def _list_folder(folder: Path) -> list[os.DirEntry[str]]:
    """Return the visible entries of a folder sorted by name."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith('.')]
    except OSError as problem:
        raise ImageError(
            f'{folder}: cannot be listed ({problem.strerror}); expected a folder; '
            'check the path, the link and the permissions.'
        ) from problem
    for entry in visible:
        if any('\ud800' <= letter <= '\udfff' for letter in entry.name):
            raise ImageError(
                f'{folder}: the name {entry.name!a} is not valid UTF-8; '
                'expected names that can be written into files; rename it.'
            )
    return sorted(visible, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return stat.S_ISDIR(Path(entry.path).stat().st_mode)  # is_dir() is silent about loops
    except OSError as problem:
        raise ImageError(
            f'{entry.path}: cannot be followed ({problem.strerror}); expected a case folder; '
            'repair or remove the link.'
        ) from problem


def _scan_train(folder: Path, n_classes: int, excluded: frozenset[str], max_pixels: int) -> Scan:
    scan = Scan([])
    rank = 0
    for entry in _list_folder(folder):
        try:
            if not _is_folder(entry):
                scan.notes.append(f'{entry.path}: not a case folder; it is not used.')
                continue
            rank += 1  # excluded cases count, so that ids do not move when one is excluded
            if entry.name in excluded:
                scan.excluded.append(entry.name)
                continue
            case = _train_case(folder / entry.name, rank, n_classes, max_pixels, scan)
            scan.cases.append(case)
        except DataError as problem:
            scan.problems.extend(problem.problems)
        except CellSegError as problem:
            scan.problems.append(str(problem))
    if not rank and not scan.problems:
        scan.problems.append(f'{folder}: no case folder in it; expected <name>/image.tif.')
    return scan


def _train_case(folder: Path, image_id: int, n_classes: int, max_pixels: int, scan: Scan) -> Case:
    images: list[Path] = []
    labels: dict[int, list[Path]] = {}
    for entry in _list_folder(folder):
        path = folder / entry.name
        number = _CLASS_FILE.fullmatch(entry.name)
        if number:
            labels.setdefault(int(number[1]) - 1, []).append(path)
        elif _IMAGE_FILE.fullmatch(entry.name):
            images.append(path)
        else:
            scan.notes.append(f'{path}: neither an image nor a class file; it is not used.')
    problems = _file_problems(folder, images, labels, n_classes)
    image_hw = (0, 0)
    if len(images) == 1:
        try:
            image_hw = tiff.read_header(images[0], max_pixels=max_pixels, error=ImageError).hw
        except ImageError as problem:
            problems.append(str(problem))
    if problems:
        raise DataError(problems)
    label_paths = {class_id: labels[class_id][0] for class_id in sorted(labels)}
    return Case(folder.name, images[0], label_paths, image_id, image_hw)


def _file_problems(
    folder: Path, images: list[Path], labels: Mapping[int, list[Path]], n_classes: int
) -> list[str]:
    problems = []
    if not images:
        problems.append(
            f'{folder}: no image.tif in it; expected one; add it, or list the case in exclude.txt.'
        )
    groups = [('image', images)] if len(images) > 1 else []
    groups += [(f'class {k + 1}', paths) for k, paths in sorted(labels.items()) if len(paths) > 1]
    for what, paths in groups:
        names = ' and '.join(path.name for path in paths)
        problems.append(
            f'{folder}: {names} are both the {what} file; expected one; remove the wrong one.'
        )
    for class_id in sorted(labels):
        if not 0 <= class_id < n_classes:
            problems.append(
                f'{labels[class_id][0]}: class {class_id + 1}, but there are {n_classes} classes; '
                f'expected class1.tif to class{n_classes}.tif; '
                'set num_classes and the class names, or move the file away.'
            )
    return problems


@dataclass(frozen=True, slots=True)
class IdEntry:
    """One test image of the id map: file name, COCO image id, height and width in px."""

    file_name: str
    image_id: int
    image_hw: tuple[int, int]


def read_id_map(path: Path | str) -> list[IdEntry]:
    """Read and check the map from test image names to ids.

    Returns:
        Entries in the file's order.

    Raises:
        IdMapError: The file is no JSON list.
        DataError: All wrong entries together: missing or mistyped keys, names that are paths,
            names or ids that occur twice.
    """
    path = Path(path)
    items = _load_id_map(path)
    entries: list[IdEntry] = []
    problems: list[str] = []
    first_with: dict[tuple[str, str | int], int] = {}
    for index, item in enumerate(items):
        where = f'{path}: entry {index + 1}'
        try:
            entry = _id_entry(where, item)
        except IdMapError as problem:
            problems.append(str(problem))
            continue
        stem = Path(entry.file_name).stem
        for key, value in (('name', stem), ('id', entry.image_id)):
            first = first_with.setdefault((key, value), index)
            if first != index:
                problems.append(
                    f'{where}: {key} {value!r} is also that of entry {first + 1}; '
                    'expected each once; remove the wrong entry.'
                )
        entries.append(entry)
    if problems:
        raise DataError(problems)
    return entries


def _load_id_map(path: Path) -> list[object]:
    try:
        if path.stat().st_size > MAX_ID_MAP_BYTES:
            raise IdMapError(
                f'{path}: the id map is larger than {MAX_ID_MAP_BYTES >> 20} MiB; '
                'expected a list of names and ids.'
            )
        items = json.loads(regular(path).read_bytes())
    except OSError as problem:
        raise IdMapError(
            f'{path}: cannot be read ({problem.strerror}); expected the map from test image names '
            'to ids; check the path.'
        ) from problem
    except (ValueError, RecursionError) as problem:
        raise IdMapError(
            f'{path}: not valid JSON ({str(problem)[:80]}); expected a list of file_name, id, '
            'height, width; fetch the file again.'
        ) from problem
    if not isinstance(items, list) or not items:
        raise IdMapError(
            f'{path}: holds {"an empty list" if items == [] else type(items).__name__}; '
            'expected a list of objects with file_name, id, height, width; fetch the file again.'
        )
    return items


def _id_entry(where: str, item: object) -> IdEntry:
    if not isinstance(item, dict):
        raise IdMapError(f'{where}: {str(item)[:40]!r}; expected an object with file_name and id.')
    name = item.get('file_name')
    if not isinstance(name, str) or not name:
        raise IdMapError(f'{where}: file_name is {name!r}; expected the name of a test image.')
    is_plain = not set(name) & set('/\\\0') and _printable(name) == name
    if not is_plain or not _TEST_FILE.fullmatch(name):
        raise IdMapError(
            f'{where}: file_name is {name[:80]!r}; expected a plain name that ends in .tif, '
            'without folders: test images lie directly in the test folder.'
        )
    numbers = []
    for key, low in (('id', 0), ('height', 1), ('width', 1)):
        value = item.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_NUMBER:
            raise IdMapError(
                f'{where} ({name}): {key} is {_printable(str(value)[:40])}; '
                f'expected an integer from {low} to {MAX_NUMBER}.'
            )
        numbers.append(value)
    return IdEntry(name, numbers[0], (numbers[1], numbers[2]))


def _scan_test(folder: Path, id_map: Path, excluded: frozenset[str], max_pixels: int) -> Scan:
    scan = Scan([])
    files = _test_files(folder, scan)
    entries: dict[str, IdEntry] | None = None
    try:
        entries = {_composed(entry.file_name): entry for entry in read_id_map(id_map)}
    except DataError as problem:
        scan.problems.extend(problem.problems)
    except IdMapError as problem:
        scan.problems.append(str(problem))
    for name in sorted(entries or ()):
        if name not in files:
            scan.notes.append(f'{id_map}: {name} has no file in {folder}; it is not predicted.')
    for name, path in files.items():
        if path.stem in excluded:
            scan.excluded.append(path.stem)
            continue
        try:
            if entries is None:
                # List what is wrong with the files as well.
                tiff.read_header(path, max_pixels=max_pixels, error=ImageError)
            else:
                scan.cases.append(_test_case(path, entries.get(name), id_map, max_pixels))
        except CellSegError as problem:
            scan.problems.append(str(problem))
    scan.cases.sort(key=lambda case: case.name)
    return scan


def _test_files(folder: Path, scan: Scan) -> dict[str, Path]:
    """Return the TIFFs of a test folder by composed name, and report the rest to ``scan``."""
    files: dict[str, Path] = {}
    by_stem: dict[str, str] = {}
    for entry in _list_folder(folder):
        path = folder / entry.name
        if is_result(entry.name):
            scan.notes.append(f'{path}: a result of prediction, no image; it is not used.')
            continue
        if not _TEST_FILE.fullmatch(entry.name):
            scan.notes.append(f'{path}: not a TIFF; it is not used.')
            continue
        other = by_stem.setdefault(path.stem, entry.name)
        if other != entry.name:
            scan.problems.append(
                f'{path}: {other} has the same case name; expected each once; rename or remove one.'
            )
        files[_composed(entry.name)] = path
    if not files:
        scan.problems.append(f'{folder}: no TIFF in it; expected the test images.')
    return files


def _printable(text: str) -> str:
    """Return text that can be written as UTF-8; JSON can smuggle half a surrogate pair in."""
    return text.encode('utf-8', 'backslashreplace').decode()


def _composed(name: str) -> str:
    """Return one spelling of accents; macOS archives decompose them, JSON files mostly do not."""
    return unicodedata.normalize('NFC', name)


def _test_case(path: Path, entry: IdEntry | None, id_map: Path, max_pixels: int) -> Case:
    if entry is None:
        raise IdMapError(
            f'{path}: not in {id_map}; expected an entry with its id; '
            'add it, or list the case in exclude.txt.'
        )
    image_hw = tiff.read_header(path, max_pixels=max_pixels, error=ImageError).hw
    if image_hw != entry.image_hw:
        raise IdMapError(
            f'{path}: the image is {size_text(image_hw)}, '
            f'{id_map.name} says {size_text(entry.image_hw)}'
            f'{swapped_text(image_hw, entry.image_hw)}; they must match; correct the wrong one.'
        )
    return Case(path.stem, path, {}, entry.image_id, image_hw)

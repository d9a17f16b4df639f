"""From folders of TIFFs to cases, pixels and ground truth.

In: ``train/<name>/image.tif`` with ``class1.tif`` ..., ``test_release/<name>.tif`` and the map from
test image names to ids (docs/formats.md). Out: :class:`Case`, images (H, W, 3) uint8, and
:class:`LabelLayers`: every instance of every class in as few integer maps as their overlaps allow.
Invariant: a file is read whole and checked, or its name and fault are raised; nothing is guessed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cellseg_mm import tiff
from cellseg_mm.errors import CellSegError, DataError, IdMapError, ImageError, LabelMapError
from cellseg_mm.instances import InstanceSet
from cellseg_mm.tiff import DEFAULT_MAX_PIXELS

MAX_ID = 2**31 - 1
EXCLUDE_FILE = 'exclude.txt'
MAX_ID_MAP_BYTES = 64 << 20  # 64 MiB hold half a million entries

_CLASS_FILE = re.compile(r'class(\d{1,9})\.tiff?', re.IGNORECASE)
_IMAGE_FILE = re.compile(r'image\.tiff?', re.IGNORECASE)
_TEST_FILE = re.compile(r'.+\.tiff?', re.IGNORECASE)

Flat = NDArray[np.int64]


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


@dataclass(frozen=True, slots=True)
class LabelLayers:
    """All instances of one image as integer maps; N instances in L layers.

    Attributes:
        layers: (L, H, W) int32, L >= 1; 0 = background, instance i has the value i + 1 in layer
            ``layer_of[i]``. Instances of one layer do not overlap.
        layer_of: (N,) int64.
        class_ids: (N,) int64, 0-based, never falling.
        original_ids: (N,) int64, the ids in the class's file, rising within a class.
    """

    layers: NDArray[np.int32]
    layer_of: Flat
    class_ids: Flat
    original_ids: Flat

    def __len__(self) -> int:
        return len(self.class_ids)


def find_cases(
    data_root: Path | str,
    split: Literal['train', 'test'],
    n_classes: int,
    *,
    train_dir: str = 'train',
    test_dir: str = 'test_release',
    id_map: str = 'test_image_name_to_ids.json',
    exclude_file: Path | str | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> list[Case]:
    """Find all cases of a split; reads folders, image headers and the id map, no pixels.

    Args:
        data_root: The data folder.
        split: ``train`` or ``test``.
        n_classes: Number of classes; ``class{k}.tif`` with a larger k is an error.
        train_dir: Folder of training cases, below ``data_root``.
        test_dir: Folder of test images, below ``data_root``.
        id_map: File of test image names and ids, below ``data_root``.
        exclude_file: Names of cases to leave out, one a line, ``#`` begins a comment. Without it
            ``exclude.txt`` in ``data_root`` is used where there is one.
        max_pixels: Most pixels (height times width) of an image that are accepted.

    Returns:
        Cases sorted by name. An id map entry without a file is no case (and is logged).

    Raises:
        DataError: All problems together: no such folder, unreadable or missing files, doubled
            class files, classes beyond ``n_classes``, a wrong id map, paths that leave the folder.
    """
    scan = scan_cases(
        data_root,
        split,
        n_classes,
        train_dir=train_dir,
        test_dir=test_dir,
        id_map=id_map,
        exclude_file=exclude_file,
        max_pixels=max_pixels,
    )
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
    train_dir: str = 'train',
    test_dir: str = 'test_release',
    id_map: str = 'test_image_name_to_ids.json',
    exclude_file: Path | str | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Scan:
    """Look at a split like :func:`find_cases`, and return problems instead of raising them."""
    root = Path(data_root)
    try:
        excluded = read_exclude(root, exclude_file)
        if split == 'train':
            return _scan_train(root / train_dir, n_classes, excluded, max_pixels)
        if split == 'test':
            return _scan_test(root / test_dir, root / id_map, excluded, max_pixels)
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
        lines = path.read_text(encoding='utf-8').splitlines()
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
        items = json.loads(path.read_bytes())
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
    if name in ('.', '..') or set(name) & set('/\\\0') or not _TEST_FILE.fullmatch(name):
        raise IdMapError(
            f'{where}: file_name is {name[:80]!r}; expected a plain name that ends in .tif, '
            'without folders: test images lie directly in the test folder.'
        )
    numbers = []
    for key, low in (('id', 0), ('height', 1), ('width', 1)):
        value = item.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_ID:
            raise IdMapError(
                f'{where} ({name}): {key} is {str(value)[:40]}; '
                f'expected an integer from {low} to {MAX_ID}.'
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
            f'{path}: the image is {_size(image_hw)}, {id_map.name} says {_size(entry.image_hw)}'
            f'{_transposed(image_hw, entry.image_hw)}; they must match; correct the wrong one.'
        )
    return Case(path.stem, path, {}, entry.image_id, image_hw)


def _size(hw: tuple[int, int]) -> str:
    return f'{hw[0]} x {hw[1]} px'


def _transposed(first: tuple[int, int], second: tuple[int, int]) -> str:
    return ' (height and width are swapped)' if first == second[::-1] else ''


def read_image(path: Path | str, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> NDArray[np.uint8]:
    """Read an image in the channel order stored in the file.

    Grey is repeated three times, alpha is dropped, palettes are applied, white-is-zero is inverted.
    Values become 8 bit by a rule that looks at this file only: integers of up to 8 bits are scaled
    by their full range; wider integers stay as they are when none exceeds 255, and are scaled by
    the full range of their type otherwise (65535 -> 255, rounded); floats are taken as 0..1 when
    none exceeds 1, else as 0..255.

    Args:
        path: A TIFF with one page.
        max_pixels: Most pixels (height times width) that are accepted, judged on the header.

    Returns:
        (H, W, 3) uint8, C-contiguous, own memory.

    Raises:
        ImageError: The file cannot be read, is larger than ``max_pixels``, is CMYK or another
            colour space, has more than 4 values per pixel, NaN, infinite or negative values, or
            floats above 255.
    """
    path = Path(path)
    raster = tiff.read_raster(path, max_pixels=max_pixels, error=ImageError)
    _check_colours(path, raster.header)
    n_used = 3 if raster.header.n_samples >= 3 else 1
    values = raster.values[..., :n_used]
    if raster.header.photometric == 3:
        values = _apply_palette(path, raster)
    grey8 = _to_uint8(path, values, raster.header.bits)
    if raster.header.photometric == 0:
        grey8 = 255 - grey8
    if grey8.shape[2] == 1:
        return np.repeat(grey8, 3, axis=2)
    return np.ascontiguousarray(grey8)


def _check_colours(path: Path, header: tiff.Header) -> None:
    names = {5: 'CMYK', 6: 'YCbCr', 8: 'CIELAB', 9: 'ICCLAB', 10: 'ITULAB', 32803: 'CFA'}
    decoded = {6, 7, 33003, 33004, 33005, 34712}  # JPEG and JPEG 2000 codecs return RGB
    is_rgb_now = header.photometric == 6 and header.compression in decoded
    if header.photometric not in (0, 1, 2, 3) and not is_rgb_now:
        name = names.get(header.photometric, f'colour space {header.photometric}')
        raise ImageError(
            f'{path}: the colours are {name}; expected RGB or grey; convert the image to RGB.'
        )
    limit = {0: 2, 1: 3, 3: 2}.get(header.photometric, 4)
    if header.n_samples > limit or (header.photometric in (2, 6) and header.n_samples < 3):
        raise ImageError(
            f'{path}: {header.n_samples} values per pixel; expected RGB, grey, or these with '
            'alpha; save the channels to use as RGB.'
        )
    if header.orientation != 1:
        raise ImageError(
            f'{path}: the orientation tag is {header.orientation}, so viewers turn the picture; '
            'expected 1, as stored, so that label maps fit; save it turned as it should be.'
        )


def _apply_palette(path: Path, raster: tiff.Raster) -> NDArray[np.uint16]:
    index = raster.values[..., 0]
    if raster.palette.shape[1] <= int(index.max(initial=0)):
        raise ImageError(
            f'{path}: palette colour {index.max()} is used, the palette has '
            f'{raster.palette.shape[1]}; convert the image to RGB.'
        )
    return raster.palette.T[index]  # (H, W, 3) uint16


def _to_uint8(path: Path, values: NDArray, bits: int) -> NDArray[np.uint8]:
    if values.dtype == np.uint8 and bits == 8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in 'uif':
        raise ImageError(f'{path}: values of type {values.dtype}; expected integers or floats.')
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):  # NaN wins in both
        n_bad = int(values.size - np.isfinite(values).sum())
        raise ImageError(
            f'{path}: {n_bad} values are NaN or infinite; expected finite numbers; {tiff.FIX}.'
        )
    if low < 0:
        raise ImageError(f'{path}: values down to {low}; expected none below 0; {tiff.FIX}.')
    if values.dtype.kind == 'f':
        if high > 255:
            raise ImageError(
                f'{path}: float values up to {high}; expected 0..1 or 0..255; rescale the image.'
            )
        scale = 255.0 if high <= 1 else 1.0
    elif values.dtype.itemsize == 1 and values.dtype.kind == 'u':
        scale = 255 / (2**bits - 1)  # tifffile unpacks 2 and 4 bits to uint8
    elif high <= 255:
        scale = 1.0
    else:
        is_packed = values.dtype.kind == 'u' and bits < 8 * values.dtype.itemsize
        scale = 255 / (2**bits - 1 if is_packed else np.iinfo(values.dtype).max)
    return np.rint(values.astype(np.float64) * scale).astype(np.uint8)


def read_label_map(path: Path | str, image_hw: tuple[int, int] | None = None) -> NDArray[np.int32]:
    """Read one class's label map: 0 = background, k = the instance with id k.

    Args:
        path: A TIFF with one page and one channel, of any integer or float dtype.
        image_hw: Height and width that the map must have, in px.

    Returns:
        (H, W) int32.

    Raises:
        LabelMapError: The file cannot be read, has several channels or another size than
            ``image_hw``, or an id is NaN, infinite, negative, fractional or above 2**31 - 1.
    """
    path = Path(path)
    stored = _read_stored_map(path, image_hw)
    at, ids = _foreground(path, stored)
    label_map = np.zeros(stored.shape, dtype=np.int32)
    label_map.reshape(-1)[at] = ids
    return label_map


def _read_stored_map(path: Path, image_hw: tuple[int, int] | None) -> NDArray:
    n_pixels = image_hw[0] * image_hw[1] if image_hw is not None else 0
    limit = max(DEFAULT_MAX_PIXELS, n_pixels)  # an image that was let in may have its label maps
    raster = tiff.read_raster(path, max_pixels=limit, error=LabelMapError)
    header = raster.header
    if header.n_samples != 1:
        raise LabelMapError(
            f'{path}: the label map has {header.n_samples} channels; expected one with an id per '
            'pixel; export ids, not colours.'
        )
    if image_hw is not None and header.hw != tuple(image_hw):
        raise LabelMapError(
            f'{path}: the label map is {_size(header.hw)}, the image is {_size(tuple(image_hw))}'
            f'{_transposed(header.hw, tuple(image_hw))}; they must match; {tiff.FIX}.'
        )
    return raster.values[..., 0]


def _foreground(path: Path, stored: NDArray) -> tuple[NDArray[np.intp], Flat]:
    """Return the flat positions of all pixels that are not background, and their ids."""
    if stored.dtype.kind not in 'buif':
        raise LabelMapError(f'{path}: values of type {stored.dtype}; expected ids as numbers.')
    flat = np.ascontiguousarray(stored).reshape(-1)
    # Usually a third of the pixels or less; all later work is on these. Comparing first is 3 times
    # faster than the search for non-zero floats.
    at = np.flatnonzero(flat != 0)
    values = flat[at]
    if not len(values):
        return at, np.zeros(0, dtype=np.int64)
    # Python numbers compare exactly; float32 would round the limit up to an id that is too large.
    low, high = values.min().item(), values.max().item()
    if not (low >= 1 and high <= MAX_ID):  # NaN fails this too
        raise LabelMapError(_bad_ids(path, values))
    ids = values.astype(np.int64)
    if values.dtype.kind == 'f' and not np.array_equal(ids, values):
        raise LabelMapError(_bad_ids(path, values))
    return at, ids


def _bad_ids(path: Path, values: NDArray) -> str:
    """Say what is wrong with ids of which at least one is."""
    wide = values.astype(np.float64)
    finite = np.isfinite(wide)
    faults = {
        'NaN or infinite': ~finite,
        'negative': finite & (wide < 0),
        'fractional': finite & (np.floor(wide) != wide),
        f'above {MAX_ID}': finite & (wide > MAX_ID),
    }
    name, is_bad = next((name, is_bad) for name, is_bad in faults.items() if is_bad.any())
    return (
        f'{path}: {int(is_bad.sum())} pixels have an id that is {name} (such as '
        f'{values[is_bad][0]}); expected whole ids from 0 to {MAX_ID}; {tiff.FIX}.'
    )


def read_label_layers(case: Case) -> LabelLayers:
    """Read all label maps of a case as layers.

    Instances are ordered by class id, then by their id in the file. One layer holds everything
    where no two classes overlap. Otherwise each instance goes into the first layer in which it
    covers nothing, class after class: never more layers than classes with cells. An id that two
    classes use makes two instances.

    Args:
        case: A training case; a case without label maps has no instances.

    Raises:
        LabelMapError: See :func:`read_label_map`.
    """
    n_pixels = case.image_hw[0] * case.image_hw[1]
    layers = [np.zeros(n_pixels, dtype=np.int32)]
    layer_of, class_ids, original_ids = [], [], []
    n_before = 0
    for class_id in sorted(case.label_paths):
        path = case.label_paths[class_id]
        at, ids = _foreground(path, _read_stored_map(path, case.image_hw))
        unique_ids, index = _renumber(ids)
        layer_of.append(_place(layers, at, index, n_before, len(unique_ids)))
        class_ids.append(np.full(len(unique_ids), class_id, dtype=np.int64))
        original_ids.append(unique_ids)
        n_before += len(unique_ids)
    empty = [np.zeros(0, dtype=np.int64)]
    return LabelLayers(
        np.stack(layers).reshape(-1, *case.image_hw)
        if len(layers) > 1
        else layers[0].reshape(1, *case.image_hw),
        np.concatenate(layer_of or empty),
        np.concatenate(class_ids or empty),
        np.concatenate(original_ids or empty),
    )


def _renumber(ids: Flat) -> tuple[Flat, NDArray[np.int32]]:
    """Return the sorted different ids, and for each element its place among them from 0."""
    if not len(ids):
        return ids, np.zeros(0, dtype=np.int32)
    high = int(ids.max())
    if high > 4 * len(ids) + 65536:  # a table would be larger than the data: sort instead
        unique_ids, index = np.unique(ids, return_inverse=True)
        return unique_ids, index.reshape(-1).astype(np.int32)
    is_used = np.zeros(high + 1, dtype=bool)
    is_used[ids] = True
    table = np.cumsum(is_used, dtype=np.int32) - 1
    return np.flatnonzero(is_used).astype(np.int64), table[ids]


def _place(
    layers: list[NDArray[np.int32]],
    at: NDArray[np.intp],
    index: NDArray[np.int32],
    n_before: int,
    n_new: int,
) -> Flat:
    """Write one class's instances into the first layers where they cover nothing.

    Args:
        layers: Flat layers; changed, and grown where needed.
        at: Flat positions of the class's pixels.
        index: For each position the instance, 0..n_new - 1.
        n_before: Instances of earlier classes.
        n_new: Instances of this class.

    Returns:
        (n_new,) int64, the layer of each.
    """
    layer_of = np.zeros(n_new, dtype=np.int64)
    level = 0
    while len(at):
        if level == len(layers):
            layers.append(np.zeros_like(layers[0]))
        is_taken = layers[level][at] != 0
        if not is_taken.any():
            layers[level][at] = index + (n_before + 1)
            layer_of[index] = level
            break
        must_wait = np.zeros(n_new, dtype=bool)
        must_wait[index[is_taken]] = True
        waits = must_wait[index]
        layers[level][at[~waits]] = index[~waits] + (n_before + 1)
        layer_of[index[~waits]] = level
        at, index = at[waits], index[waits]
        level += 1
    return layer_of


def read_gt(case: Case) -> InstanceSet:
    """Read the ground truth of a case; empty for test images.

    Raises:
        LabelMapError: See :func:`read_label_map`.
    """
    found = read_label_layers(case)
    return InstanceSet.from_label_layers(
        case.name, case.image_id, found.layers, found.layer_of, found.class_ids
    )

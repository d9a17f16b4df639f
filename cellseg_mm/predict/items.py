"""What there is to predict: files, folders and patterns in a stated order.

In: words of a command line. Out: items. Invariant: two items never share a name.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.core.layout import is_result
from cellseg_mm.data.image_reader import SUFFIXES
from cellseg_mm.data.slides.openslide_reader import series_of
from cellseg_mm.data.slides.zarr_reader import is_zarr

DOUBLE_SUFFIX = re.compile(r'\.ome\.(?:tiff?|zarr)$', re.IGNORECASE)

LABEL_FILE = re.compile(r'class\d+\.tiff?$', re.IGNORECASE)

# Why a file of a folder is not taken for an image.
RESULTS = 'results of this program'
LABEL_MAPS = 'label maps (class1.tif ...)'
OF_A_SLIDE = 'further files of DICOM slides'
IN_OUT = 'in the folder of results'
OTHER_FILES = 'other:'


@dataclass(frozen=True, slots=True)
class Item:
    """One image to predict.

    Attributes:
        path: The file.
        name: What its results are called.
    """

    path: Path
    name: str

    @property
    def image_id(self) -> int:
        """A COCO image id that depends on the name alone."""
        return int(hashlib.sha256(self.name.encode()).hexdigest()[:8], 16) >> 1

    def fingerprint(self) -> dict[str, JsonValue]:
        """Return what changes when the file changes, or one of those that belong to it."""
        found = [path.stat() for path in (self.path, *_beside(self.path))]
        n_bytes = sum(status.st_size for status in found if not stat.S_ISDIR(status.st_mode))
        newest = max(status.st_mtime_ns for status in found)
        return {'path': str(self.path), 'bytes': n_bytes, 'mtime_ns': newest}


@dataclass(frozen=True, slots=True)
class Found:
    """What the words of a command line stand for.

    Attributes:
        items: Images, sorted by name.
        notes: Sentences about what was left out, and about names that had to change.
        refused: Message for each image whose results would be called as another's, by its path.
    """

    items: tuple[Item, ...]
    notes: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)


def look_for(inputs: Sequence[str], *, out_dir: Path | None = None) -> Found:
    """Find the images that files, folders and patterns stand for.

    Folders are searched with everything below them, except hidden files, results in ``out_dir``,
    and label maps (``class1.tif``); a Zarr store is one image. Results of this project are no
    images, wherever they lie. An ``image.tif`` is called by its folder; images that would be called
    the same get longer names.

    Raises:
        ConfigError: A folder, pattern or file stands for no image.
    """
    paths: list[Path] = []
    left_out: list[tuple[Path, str]] = []
    for word in inputs:
        candidates = _candidates(word)
        reasons = [_reason(path, Path(word), out_dir) for path in candidates]
        found = [path for path, why in zip(candidates, reasons, strict=True) if not why]
        left_out += [(p, why) for p, why in zip(candidates, reasons, strict=True) if why]
        found, further = _one_a_slide(found)
        left_out += [(path, OF_A_SLIDE) for path in further]
        if not found and candidates != [Path(word)]:
            raise ConfigError(_nothing(word, out_dir, left_out))
        paths += found
    if not paths:
        raise ConfigError(_nothing(' '.join(inputs), out_dir, left_out))
    items, notes, refused = _named(list(dict.fromkeys(paths)))
    return Found(tuple(items), (*_left_out_texts(left_out), *notes), refused)


def _candidates(word: str) -> list[Path]:
    """Return the files that a word may mean; one that is missing fails like a damaged one."""
    path = Path(word)
    if path.is_dir() and not is_zarr(path):
        return [p for p in sorted(_inside(path)) if not _is_hidden(p.relative_to(path))]
    if glob.has_magic(word) and not path.exists():
        matches = sorted(Path(p) for p in glob.glob(word, recursive=True))  # noqa: PTH207
        return [p for p in matches if is_zarr(p) or not p.is_dir()]
    return [path]


def _inside(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder; a Zarr store counts as one, whose chunks are not listed."""
    for parent, folders, files in os.walk(folder):
        stores = [name for name in folders if is_zarr(Path(parent, name))]
        folders[:] = [name for name in folders if name not in stores]
        yield from (Path(parent, name) for name in (*stores, *files))


def _beside(path: Path) -> Iterator[Path]:
    """Yield what belongs to an image of several files: a Zarr store's, or a MIRAX slide's."""
    folder = path.with_suffix('') if path.suffix.lower() == '.mrxs' else path
    if folder.is_dir():
        for parent, _, files in os.walk(folder):
            yield from (Path(parent, name) for name in files)


def _is_hidden(path: Path) -> bool:
    # macOS's notes beside files, ._x.tif, are hidden too
    return any(part.startswith('.') for part in path.parts)


def _one_a_slide(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Part the first DICOM file of each slide, and all other files, from further DICOM files."""
    seen: set[tuple[Path, str]] = set()
    first: list[Path] = []
    further: list[Path] = []
    for path in paths:
        if path.suffix.lower() != '.dcm':
            first.append(path)
            continue
        slide = (path.parent, series_of(path))
        (further if slide in seen else first).append(path)
        seen.add(slide)
    return first, further


def _reason(path: Path, word: Path, out_dir: Path | None) -> str:
    """Return why a file is not taken for an image, or nothing."""
    if is_result(path):
        return RESULTS
    if path == word:
        return ''  # named itself: it is read, or its own turn says why not
    if word.is_dir():
        if out_dir is not None and path.resolve().is_relative_to(out_dir.resolve()):
            return IN_OUT
        if LABEL_FILE.fullmatch(path.name):
            return LABEL_MAPS
    if path.suffix.lower() not in SUFFIXES and not is_zarr(path):
        return f'{OTHER_FILES}{path.suffix.lower() or "without suffix"}'
    return ''


def _nothing(word: str, out_dir: Path | None, left_out: Sequence[tuple[Path, str]]) -> str:
    path = Path(word)
    if path.is_dir() and out_dir is not None and path.resolve() == out_dir.resolve():
        return (
            f'{word}: is the folder of the results too, where nothing is taken for an image; '
            'name another folder with --out'
        )
    texts = _left_out_texts(left_out)
    return (
        f'{word}: there is no image{" (" + "; ".join(texts) + ")" if texts else ""}; expected '
        f'files ending in {", ".join(SUFFIXES)}; check the path'
    )


def _left_out_texts(left_out: Sequence[tuple[Path, str]]) -> list[str]:
    """Count files that are not images by reason, other files by suffix."""
    counts = Counter(why for _, why in dict(left_out).items() if why != IN_OUT)
    suffixes = {why: n for why, n in counts.items() if why.startswith(OTHER_FILES)}
    known = (RESULTS, LABEL_MAPS, OF_A_SLIDE)
    texts = [f'{counts[why]} {why}' for why in known if counts[why]]
    if suffixes:
        parts = [f'{n} {why.removeprefix(OTHER_FILES)}' for why, n in sorted(suffixes.items())]
        texts.append(f'files that are no images by their suffix ({", ".join(parts)})')
    return [f'left out: {text}' for text in texts]


def _names(path: Path) -> tuple[str, ...]:
    """Return what an image may be called, the best first."""
    stem = DOUBLE_SUFFIX.sub('', path.name)
    stem = path.stem if stem == path.name else stem
    folder = path.absolute().parent
    if stem.lower() == 'image' and path.suffix.lower() in ('.tif', '.tiff'):  # a case's
        return (folder.name, f'{folder.parent.name}_{folder.name}', f'{folder.name}_{path.name}')
    return (stem, path.name, f'{folder.name}_{stem}', f'{folder.name}_{path.name}')


def _key(name: str) -> str:
    # macOS and Windows take names that differ in case alone for the same file
    return unicodedata.normalize('NFC', name).casefold()


def _named(paths: Sequence[Path]) -> tuple[list[Item], list[str], dict[str, str]]:
    """Give each path a name of its own; return items, notes and refusals."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(_key(_names(path)[0]), []).append(path)
    taken = set(groups)
    items = [Item(group[0], _names(group[0])[0]) for group in groups.values() if len(group) == 1]
    notes: list[str] = []
    refused: dict[str, str] = {}
    for group in (group for group in groups.values() if len(group) > 1):
        plain = _names(group[0])[0]
        names = _longer(group, taken)
        if names:
            taken.update(map(_key, names))
            items += [Item(path, name) for path, name in zip(group, names, strict=True)]
            notes.append(
                f'{len(group)} images would be called {plain}: their results are called '
                + ', '.join(f'{n} ({p})' for p, n in zip(group, names, strict=True))
            )
            continue
        items.append(Item(group[0], plain))
        for path in group[1:]:
            refused[str(path)] = (
                f'{path}: its results would be called {plain}, like those of {group[0]}; expected '
                'different names, also without case; predict it into another folder with --out'
            )
    return sorted(items, key=lambda item: item.name), notes, refused


def _longer(group: Sequence[Path], taken: Collection[str]) -> list[str]:
    """Return longer names that tell the paths of a group apart; none if there are none."""
    n_kinds = min(len(_names(path)) for path in group)
    for kind in range(1, n_kinds):
        names = [_names(path)[kind] for path in group]
        keys = {_key(name) for name in names}
        if len(keys) == len(group) and not keys & set(taken):
            return names
    return []

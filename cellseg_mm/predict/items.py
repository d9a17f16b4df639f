"""What there is to predict: files, folders and patterns in a stated order.

In: words of a command line. Out: items. Invariant: two items never share a name.
"""

from __future__ import annotations

import glob
import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.data.image_reader import SUFFIXES

DOUBLE_SUFFIX = re.compile(r'\.ome\.tiff?$', re.IGNORECASE)

LABEL_FILE = re.compile(r'class\d+\.tiff?$', re.IGNORECASE)


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
        """Return what changes when the file changes."""
        status = self.path.stat()
        return {'path': str(self.path), 'bytes': status.st_size, 'mtime_ns': status.st_mtime_ns}


def find_items(inputs: Sequence[str], *, out_dir: Path | None = None) -> list[Item]:
    """Find the images that files, folders and patterns stand for, sorted by name.

    Folders are searched with everything below them, except hidden files, results in ``out_dir``,
    and label maps (``class1.tif``). An ``image.tif`` is called by its folder.

    Raises:
        ConfigError: A folder or pattern has no image, or two images would get one name.
    """
    paths: list[Path] = []
    for word in inputs:
        path = Path(word)
        if path.is_dir():
            found = [p for p in sorted(path.rglob('*')) if _is_image(p, path, out_dir)]
        elif glob.has_magic(word) and not path.exists():
            found = sorted(Path(p) for p in glob.glob(word, recursive=True))  # noqa: PTH207
            found = [p for p in found if p.is_file()]
        else:
            paths.append(path)  # one that is missing fails like one that is damaged
            continue
        if not found and out_dir is not None and path.resolve() == out_dir.resolve():
            raise ConfigError(
                f'{word}: is the folder of the results too, where nothing is taken for an image; '
                'name another folder with --out'
            )
        if not found:
            raise ConfigError(
                f'{word}: there is no image; expected files ending in {", ".join(SUFFIXES)}; '
                'check the path'
            )
        paths += found
    return _named(list(dict.fromkeys(paths)))


def _is_image(path: Path, root: Path, out_dir: Path | None) -> bool:
    inner = path.relative_to(root).parts
    if path.suffix.lower() not in SUFFIXES or any(part.startswith('.') for part in inner):
        return False
    if out_dir is not None and path.resolve().is_relative_to(out_dir.resolve()):
        return False
    return path.is_file() and not LABEL_FILE.fullmatch(path.name)


def _named(paths: Sequence[Path]) -> list[Item]:
    items: dict[str, Item] = {}
    for path in paths:
        stem = DOUBLE_SUFFIX.sub('', path.name)
        stem = path.stem if stem == path.name else stem
        name = path.absolute().parent.name if stem.lower() == 'image' else stem
        # macOS and Windows take names that differ in case alone for the same file
        other = items.setdefault(unicodedata.normalize('NFC', name).casefold(), Item(path, name))
        if other.path != path:
            raise ConfigError(
                f'{path}: its results would be called {name}, like those of {other.path}; '
                'expected different names, also without case; predict them into different folders '
                'with --out'
            )
    return sorted(items.values(), key=lambda item: item.name)

"""COCO JSON: which annotations belong to which image, and which class they are.

In: a JSON file and its images. Out: cells. Invariant: an annotation that cannot be used is counted
by its reason and costs no other; a path never leaves the folder of images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from cellseg_mm.core.errors import CellSegError, ImageError
from cellseg_mm.data.importing.classes import UNNAMED, Classes, build_classes, clean
from cellseg_mm.data.importing.coco_shapes import UnusableError, coco_cell
from cellseg_mm.data.importing.pairs import read_json
from cellseg_mm.data.importing.parts import tell_apart
from cellseg_mm.data.importing.pictures import read_picture
from cellseg_mm.data.importing.sources import (
    Annotated,
    Cell,
    ImportParams,
    Job,
    Tally,
    composed,
    entries,
    first_of,
)
from cellseg_mm.data.tiff import size_text, swapped_text

KEYS = ('images', 'annotations', 'categories')

Row = Mapping[str, object]
Id = int | str


@dataclass(frozen=True, slots=True)
class _Content:
    """A COCO file: its objects, the category names by id, and what was passed over."""

    images: Sequence[Row]
    annotations: Sequence[Row]
    categories: Sequence[Row]
    name_of: Mapping[Id, str]
    tally: Tally


def find_coco(source: Path, params: ImportParams) -> tuple[list[Job], Classes, list[str]]:
    """Find the images of a COCO file; see ``import_data``."""
    if params.image_dir is not None and not params.image_dir.is_dir():
        raise CellSegError(f'--images {params.image_dir}: is no folder; expected one; correct it')
    content = _read_coco(source)
    by_image: dict[Id, list[Row]] = {}
    for annotation in content.annotations:
        image_id = as_id(annotation.get('image_id'))
        if image_id is None:
            content.tally.leave_out('annotations without an image_id', _which(annotation))
        else:
            by_image.setdefault(image_id, []).append(annotation)
    classes = _classes(source, content, params)
    paths = [_path_text(entry) for entry in content.images]
    counts = Counter(PurePosixPath(path).name for path in paths)
    jobs = []
    for path, entry in sorted(zip(paths, content.images, strict=True), key=lambda pair: pair[0]):
        image_id = as_id(entry.get('id'))
        annotations = by_image.pop(image_id, []) if image_id is not None else []
        is_only = counts[PurePosixPath(path).name] == 1
        reader = _CocoReader(source, entry, annotations, content.name_of, classes, params, is_only)
        name = PurePosixPath(path).stem or str(image_id)
        folder = str(PurePosixPath(path).parent).strip('./')
        jobs.append(Job(name, Path(path or source), '', reader.read, folder))
    for image_id, rows in by_image.items():
        for row in rows:
            content.tally.leave_out(
                'annotations of images that are not listed', f'{_which(row)} of {image_id}'
            )
    return jobs, classes, _file_notes(source, content.tally, params)


def _file_notes(source: Path, tally: Tally, params: ImportParams) -> list[str]:
    notes = [f'{source}: {note}' for note in (*tally.notes(), *tally.remarks)]
    if params.strict and tally.unusable:
        raise CellSegError(
            f'{"; ".join(notes)}; expected that all can be used; correct them, or import without '
            f'--strict'
        )
    return notes


# ---- the file ----


def _read_coco(source: Path) -> _Content:
    content = read_json(source, 'a COCO file')
    tally = Tally()
    rows = {key: _rows(source, content, key, tally) for key in KEYS}
    _require_different(source, 'images', rows['images'])
    name_of = _category_names(source, rows['categories'])
    return _Content(rows['images'], rows['annotations'], rows['categories'], name_of, tally)


def _rows(source: Path, content: object, key: str, tally: Tally) -> list[Row]:
    found = content.get(key) if isinstance(content, dict) else None
    if key == 'categories' and isinstance(content, dict) and key not in content:
        return []  # cells without a class name
    if isinstance(found, dict):  # LIVECell: objects by id
        found = list(found.values())
    if not isinstance(found, list):
        keys = f'the keys {first_of(map(str, content))}' if isinstance(content, dict) else ''
        kind = keys or 'a list' * isinstance(content, list) or 'one value'
        raise CellSegError(
            f'{source}: {key} is no list of objects (the file holds {kind}); expected a COCO file '
            f'with {", ".join(KEYS)}; export it as COCO instance segmentation'
        )
    for number, row in enumerate(found):
        if not isinstance(row, dict):
            tally.leave_out(f'entries of {key} that are no objects', f'number {number}')
    return [row for row in found if isinstance(row, dict)]


def as_id(value: object) -> Id | None:
    """Return an id as one kind: 3, 3.0 and '3' are the same; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if not isinstance(value, str):
        return value
    if value.isdecimal() and value.isascii() and len(value) < 20:
        return int(value)
    return composed(value) or None


def _require_different(source: Path, key: str, rows: Sequence[Row]) -> None:
    ids = [as_id(row.get('id')) for row in rows]
    if None in ids:
        bad = rows[ids.index(None)].get('id')
        raise CellSegError(
            f'{source}: {key}: id is {bad!r}; expected a number or a text; give each its own id'
        )
    repeated = [i for i, n in Counter(ids).items() if n > 1]
    if repeated:
        raise CellSegError(
            f'{source}: {key} ids {repeated[:5]} occur more than once; expected each once; give '
            f'each its own id'
        )


def _which(row: Row) -> str:
    return composed(f'annotation {row.get("id", "without id")}')


# ---- classes ----


def _category_names(source: Path, categories: Sequence[Row]) -> dict[Id, str]:
    """Return the names by id, sorted by id; '' where there is none."""
    names: dict[Id, str] = {}
    for row in categories:
        key, name = as_id(row.get('id')), row.get('name')
        if key is None:
            raise CellSegError(
                f'{source}: categories: id is {row.get("id")!r}; expected a number or a text; give '
                f'each category its own id'
            )
        name = clean(name) if isinstance(name, str) else UNNAMED
        if names.setdefault(key, name) != name:
            raise CellSegError(
                f'{source}: categories ids [{key}] occur more than once ({names[key]} and {name}); '
                f'expected each once; give each its own id'
            )
    return {key: names[key] for key in sorted(names, key=lambda key: (isinstance(key, str), key))}


def _roots(categories: Sequence[Row], used: set[Id | None]) -> set[Id | None]:
    """Return categories without cells that only stand above others, as Roboflow writes them."""
    above = {
        clean(str(row.get('supercategory')))
        for row in categories
        if row.get('supercategory') != row.get('name')
    }
    return {
        as_id(row.get('id'))
        for row in categories
        if as_id(row.get('id')) not in used and clean(str(row.get('name'))) in above
    }


def _classes(source: Path, content: _Content, params: ImportParams) -> Classes:
    """Return the classes: categories by rising id; those of one name are one class."""
    used = {as_id(row.get('category_id')) for row in content.annotations}
    roots = _roots(content.categories, used)
    name_of = content.name_of
    named = [name for key, name in name_of.items() if key not in roots and name != UNNAMED]
    is_unnamed = not name_of or None in used or any(name_of.get(k) == UNNAMED for k in used if k)
    found = list(dict.fromkeys(name_of.values() if not is_unnamed else [*name_of.values(), '']))
    own = list(dict.fromkeys(named))
    if is_unnamed and params.single_class and clean(params.single_class) not in own:
        own.append(clean(params.single_class))
    if not own and not params.class_names:
        raise CellSegError(
            f'{source}: no category has a name; expected class names; name the class of all cells '
            f'with --class'
        )
    for name in (name for name, n in Counter(named).items() if n > 1):
        content.tally.remarks.append(
            f'several categories are named {name}: they are one class (see --classes)'
        )
    for name in (name for key, name in name_of.items() if key in roots and name not in own):
        content.tally.remarks.append(
            f'category {name} has no cells and stands above others: it is no class (see --classes)'
        )
    return build_classes(params, own, found=found, is_fixed=False)


# ---- one image ----


@dataclass(frozen=True, slots=True)
class _CocoReader:
    source: Path
    entry: Row
    annotations: Sequence[Row]
    name_of: Mapping[Id, str]
    classes: Classes
    params: ImportParams
    is_only: bool  # no other image of the file has its name

    def read(self) -> Annotated:
        tally = Tally()
        path = self._image_path(tally)
        image = read_picture(path, tally, max_pixels=self.params.max_pixels)
        image_hw = image.shape[0], image.shape[1]
        self._check_size(path, image_hw)
        cells: list[Cell] = []
        for annotation in self.annotations:
            number = self._class_number(annotation, tally)
            if number:
                self._add_cell(cells, annotation, number, image_hw, tally)
        # an annotator may join two parts of a hidden cell; a mask of all cells has many
        cells = tell_apart(str(path), cells, self.params.binary, tally, least=4)
        return Annotated(image, cells, tally)

    def _class_number(self, annotation: Row, tally: Tally) -> int:
        """Return the class of an annotation, or count why it has none, and return 0."""
        category_id = as_id(annotation.get('category_id'))
        if category_id is not None and self.name_of and category_id not in self.name_of:
            tally.leave_out(
                'annotations of categories that are not listed',
                f'{_which(annotation)} of {category_id}',
            )
            return 0
        category = UNNAMED if category_id is None else self.name_of.get(category_id, UNNAMED)
        if category == UNNAMED and UNNAMED not in self.classes.number_of:
            tally.leave_out(
                'annotations without a category (--class names one for them)', _which(annotation)
            )
            return 0
        number = self.classes.number(category, self.source)
        if annotation.get('iscrowd'):
            tally.skipped['crowd areas (iscrowd)'] += 1
            return 0
        if not number:
            tally.skipped[f'cells of class {category or "without name"}'] += 1
        return number

    def _add_cell(
        self,
        cells: list[Cell],
        annotation: Row,
        number: int,
        image_hw: tuple[int, int],
        tally: Tally,
    ) -> None:
        which = _which(annotation)
        try:
            cell, lost_parts = coco_cell(annotation.get('segmentation'), number, image_hw)
        except UnusableError as problem:
            tally.leave_out(str(problem), which)
            return
        for reason in lost_parts:
            tally.leave_out(f'parts of cells: {reason}', which)
        cells.append(cell)

    def _check_size(self, path: Path, image_hw: tuple[int, int]) -> None:
        """Refuse an image of another size than the file says; it need not say."""
        stated = self.entry.get('height'), self.entry.get('width')
        if None not in stated and stated != image_hw:
            swapped = swapped_text(image_hw, image_hw[::-1]) if stated == image_hw[::-1] else ''
            raise ImageError(
                f'{path}: the image is {size_text(image_hw)}, {self.source} says {stated[0]} x '
                f'{stated[1]}{swapped}; they must match; name the right folder with --images, or '
                f'correct the file'
            )

    def _image_path(self, tally: Tally) -> Path:
        """Return the image's file; it must lie in the folder of images."""
        folder = (self.params.image_dir or self.source.parent).resolve()
        text = _path_text(self.entry)
        candidates = [text, unquote(text)]
        alone = PurePosixPath(text).name  # where the folders are those of another computer
        if self.is_only and '..' not in PurePosixPath(text).parts:
            candidates.append(alone)
        inside = []
        for candidate in candidates:
            path = (folder / candidate).resolve() if '\0' not in candidate else folder
            if path.is_relative_to(folder) and path != folder:
                inside.append(path)
                found = path if path.exists() else _same_name(path)
                if found is not None:
                    if candidate == alone != text:
                        tally.remarks.append(f'the image was found as {alone}, without its folder')
                    return found
        below = _one_folder_down(folder, alone) if inside and self.is_only else None
        if below is not None:  # LIVECell: images lie in a folder for each line of cells
            tally.remarks.append('images were found one folder further down')
            return below
        name = self.entry.get('file_name')
        if not inside:
            raise ImageError(
                f'{self.source}: file_name is {name!r}; expected a file inside {folder}; correct '
                f'it, or name the folder of images with --images'
            )
        raise ImageError(
            f'{inside[0]}: is not there, {self.source} lists it as {name!r}; expected an image '
            f'file; name the folder of images with --images'
        )


def _one_folder_down(folder: Path, name: str) -> Path | None:
    """Return the one file of a name in the folders of a folder, None if there is none or more."""
    found = [path / name for path in entries(folder) if path.is_dir() and (path / name).is_file()]
    is_one = len(found) == 1 and found[0].resolve().is_relative_to(folder)
    return found[0] if is_one else None


def _path_text(entry: Row) -> str:
    """Return an image's path with slashes; '' if it is no text."""
    name = entry.get('file_name')
    if not isinstance(name, str):
        return ''
    name = name.encode('utf-8', 'backslashreplace').decode()  # JSON holds half surrogates
    return name if '/' in name else name.replace('\\', '/')


def _same_name(path: Path) -> Path | None:
    """Return a file that is named the same in another Unicode form."""
    if not path.parent.is_dir():
        return None
    wanted = composed(path.name)
    return next((p for p in sorted(path.parent.iterdir()) if composed(p.name) == wanted), None)

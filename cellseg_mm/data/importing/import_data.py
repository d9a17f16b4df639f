"""Turns other annotation formats into this project's folders of TIFFs.

In: MoNuSAC's own distribution, COCO JSON, one label map per image, one picture per cell.
Out: ``<out>/train/<name>/image.tif`` with ``class1.tif`` ..., and ``manifest.csv``.
Invariant: a case is written whole or not at all, and whatever could not be kept (an overlap inside
a class, a skipped class, a broken outline) is counted in the report.

A label map holds one id per pixel, so cells of one class that overlap cannot both keep contested
pixels: these go to the smaller cell (the earlier one if they are equal), because the larger one
would otherwise swallow it. Cells of different classes keep all their pixels.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import CellSegError
from cellseg_mm.core.files import write_json
from cellseg_mm.core.layout import REPLACED, TRAIN
from cellseg_mm.core.progress import track
from cellseg_mm.data.case_writer import Pixels, write_case
from cellseg_mm.data.importing.cellpose import find_cellpose
from cellseg_mm.data.importing.class_maps import find_colour_masks
from cellseg_mm.data.importing.classes import Classes
from cellseg_mm.data.importing.coco import find_coco
from cellseg_mm.data.importing.cvat import find_cvat
from cellseg_mm.data.importing.folder_notes import (
    CLASSES_FILE,
    columns_of,
    read_manifest,
    require_same_classes,
    write_manifest,
)
from cellseg_mm.data.importing.geojson import find_geojson
from cellseg_mm.data.importing.hovernet import find_hovernet
from cellseg_mm.data.importing.imagej import find_imagej
from cellseg_mm.data.importing.label_maps import find_label_maps
from cellseg_mm.data.importing.label_tables import find_label_tables
from cellseg_mm.data.importing.labelme import find_labelme
from cellseg_mm.data.importing.mask_folders import find_mask_folders
from cellseg_mm.data.importing.mat_files import find_mat_files
from cellseg_mm.data.importing.monusac import find_monusac
from cellseg_mm.data.importing.nnunet import find_nnunet
from cellseg_mm.data.importing.pannuke import find_pannuke
from cellseg_mm.data.importing.pictures import read_picture
from cellseg_mm.data.importing.run_lengths import find_run_lengths
from cellseg_mm.data.importing.sources import (
    Annotated,
    Cell,
    Format,
    ImportParams,
    Job,
    Tally,
    composed,
    first_of,
)
from cellseg_mm.data.importing.yolo import find_yolo
from cellseg_mm.data.names import safe_name
from cellseg_mm.data.origins import note_origin, origin_of
from cellseg_mm.data.pixel_size import Um, of_case

MAX_NAME_LENGTH = 150
WITH_IMAGE_DIR = (
    *('coco', 'geojson', 'imagej', 'cellpose', 'labelme', 'cvat'),
    *('consep', 'hovernet', 'run-lengths'),
)
# whose masks may hold many cells each
WITH_MASKS = ('coco', 'label-map', 'mask-folders', 'geojson', 'cellpose', 'run-lengths')


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import did.

    Attributes:
        class_names: Name of class 1, 2, ...
        rows: One row per written case, the keys are the manifest's columns.
        left_out: Reason -> how often something was left out of the written cases.
        notes: Sentences about what was left out or lost.
        problems: Sentences about cases that were not written.
        manifest_path: The table of all cases.
    """

    class_names: tuple[str, ...]
    rows: tuple[Mapping[str, str], ...]
    left_out: Mapping[str, int]
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    manifest_path: Path

    def text(self) -> str:
        """Return the report for people."""
        parts = [
            f'{sum(int(row[f"c{k}"]) for row in self.rows)} {name}'
            for k, name in enumerate(self.class_names, start=1)
        ]
        lost = sum(int(row['lost_px']) for row in self.rows)
        lines = [f'{len(self.rows)} cases written: {", ".join(parts)}; {lost} px lost to overlaps']
        lines += [f'left out: {n} {reason}' for reason, n in sorted(self.left_out.items())]
        lines += [f'note: {note}' for note in self.notes]
        lines += [f'problem: {problem}' for problem in self.problems]
        return '\n'.join(lines)


def import_data(
    source_format: Format, source: Path | str, out_dir: Path | str, params: ImportParams
) -> ImportReport:
    """Import every case that can be read, and report all that cannot.

    Args:
        source_format: ``monusac``: images (``.tif``, ``.svs`` ...) and ``.xml`` of one name, in
            folders of patients, or images and outlines in a folder each (MoNuSeg).
            ``coco``: a JSON file. ``label-map``: images with ``<name>_masks``, ``<name>_cp_masks``
            or ``masks/<name>``. ``mask-folders``: ``<name>/images/*`` and ``<name>/masks/*``.
        source: Folder or file.
        out_dir: Data folder to write into; existing cases stay, see ``ImportParams.replace``.
        params: Options.

    Raises:
        CellSegError: The source as a whole cannot be read, has no case, or the options do not fit.
        OSError: ``out_dir`` cannot be written.
    """
    source, out_dir = Path(source), Path(out_dir)
    if source_format not in FINDERS:
        raise CellSegError(f'format {source_format!r} is unknown; choose one of {sorted(FINDERS)}')
    _refuse_useless_options(source_format, params)
    jobs, classes, notes = FINDERS[source_format](source, params)
    if not jobs:
        raise CellSegError(
            f'{source}: nothing to import as {source_format}; expected images with their cells; '
            f'check the path and the format'
        )
    run = _Run(out_dir, source_format, classes, params, notes)
    manifest_path = out_dir / 'manifest.csv'
    require_same_classes(out_dir, classes.names, params)
    columns, table = read_manifest(
        manifest_path, columns_of(len(classes.names)), is_others=params.add
    )
    has_table = manifest_path.exists() or not (params.add and run.train_dir.exists())
    if not has_table:
        run.notes.append(f'{manifest_path}: not there; patients of new cases are not noted')
    names = _case_names(jobs, run.notes)
    try:
        for job, name in track(
            zip(jobs, names, strict=True), description='import', total=len(jobs)
        ):
            run.try_case(job, name)
    finally:  # cases that are there must be in the table, even after an interruption
        for row in run.rows:  # what other tools noted of a case stays
            known = {key: value for key, value in row.items() if value or not params.add}
            table[row['uuid']] = {**table.get(row['uuid'], {}), **known}
        if run.rows and has_table:
            write_manifest(manifest_path, columns, table)
        if run.rows:
            write_json(out_dir / CLASSES_FILE, {'classes': list(classes.names)})
    return ImportReport(
        classes.names,
        tuple(run.rows),
        dict(run.left_out),
        (*classes.remarks, *run.all_notes()),
        tuple(run.problems),
        manifest_path,
    )


def _refuse_useless_options(source_format: Format, params: ImportParams) -> None:
    given = [
        (f'--images {params.image_dir}', params.image_dir is not None, WITH_IMAGE_DIR),
        (f'--binary {params.binary}', bool(params.binary), WITH_MASKS),
        ('--nuclei', params.nuclei, ('geojson',)),
        ('--colour', bool(params.colours), ('colour-mask',)),
    ]
    for option, is_given, formats in given:
        if is_given and source_format not in formats:
            raise CellSegError(
                f'{option}: means nothing to {source_format}; expected it with '
                f'{", ".join(formats)} only; remove it'
            )


# ---- names ----


def _case_names(jobs: Sequence[Job], notes: list[str]) -> list[str]:
    """Return a file name per case that is safe everywhere; equal names get their folders.

    Notes say which names changed, because tables of patients may know the old ones.
    """
    names = [safe_name(composed(job.name)) for job in jobs]
    counts = Counter(name.casefold() for name in names)
    changed = []
    for i, job in enumerate(jobs):
        if counts[names[i].casefold()] > 1 and job.folder:
            names[i] = safe_name(composed(f'{job.folder}/{job.name}'))
        if names[i] != job.name:
            changed.append(f'{job.name[:80]} is {names[i][:80]}')
    if changed:
        notes.append(f'names of {len(changed)} cases were changed: {first_of(changed)}')
    return names


# ---- cases ----


class _Run:
    """One import: the cases written so far, and what is to be reported."""

    def __init__(
        self,
        out_dir: Path,
        source_format: str,
        classes: Classes,
        params: ImportParams,
        notes: Sequence[str],
    ) -> None:
        self.out_dir, self.source_format = out_dir, source_format
        self.train_dir = out_dir / TRAIN
        self.classes, self.params = classes, params
        self.rows: list[dict[str, str]] = []
        self.notes = list(notes)
        self.problems: list[str] = []
        self.left_out: Counter[str] = Counter()
        self._remarks: dict[str, list[str]] = {}
        self._taken: dict[str, Path] = {}

    def all_notes(self) -> list[str]:
        """Return all notes; what is said of several cases is said once."""
        remarks = [
            f'{where[0]}: {remark}'
            if len(where) == 1
            else f'{len(where)} cases: {remark} ({first_of(where)})'
            for remark, where in self._remarks.items()
        ]
        return self.notes + remarks

    def try_case(self, job: Job, name: str) -> None:
        """Import a case, or note why it cannot be."""
        try:
            self._claim(job, name)
            self.rows.append(self._import_case(job, name))
        except CellSegError as problem:
            self.problems.append(str(problem))
        except MemoryError:
            self.problems.append(
                f'{job.source}: does not fit into memory; expected a smaller image; cut it into '
                f'tiles'
            )

    def _claim(self, job: Job, name: str) -> None:
        """Require that a name is fit for a folder and not yet used."""
        if not name or len(name.encode()) > MAX_NAME_LENGTH:
            raise CellSegError(
                f'{job.source}: the name {job.name[:80]!r} cannot name a folder; expected 1 to '
                f'{MAX_NAME_LENGTH} bytes; rename it'
            )
        other = self._taken.setdefault(name.casefold(), job.source)
        if other is not job.source and other == job.source:
            raise CellSegError(
                f'{job.source}: is listed twice; expected once; give all its cells to one entry'
            )
        if other is not job.source:
            raise CellSegError(
                f'{job.source}: its case would be named {name}, like that of {other}; names must '
                f'differ, also without case and suffix; rename one'
            )

    def _import_case(self, job: Job, name: str) -> dict[str, str]:
        case_dir = self.train_dir / name
        if case_dir.exists() and not (self.params.replace or self.params.add):
            raise CellSegError(
                f'{case_dir}: is already there; expected a new case; choose another folder, '
                f'correct it with --add, or write it again with --replace'
            )
        annotated = job.read()
        _require_some_cell(job, annotated)
        image_hw = annotated.image.shape[:2]
        label_maps, lost_px = paint_cells(annotated.cells, image_hw)
        counts = Counter({k: len(np.unique(m[m > 0])) for k, m in label_maps.items()})
        if self.params.strict:
            _require_all(job, annotated, sum(counts.values()))
        image = annotated.image[..., ::-1] if self.params.swap_red_blue else annotated.image
        if self.params.add:
            self._correct(job, name, image, label_maps)
        else:
            _write_whole(case_dir, image, label_maps, um_per_px=_pixel_size(job))
        self.left_out += annotated.tally.counts()
        self.notes += [f'{job.source}: {note}' for note in annotated.tally.notes()]
        for remark in annotated.tally.remarks:
            self._remarks.setdefault(remark, []).append(str(job.source))
        self.notes += _loss_notes(job, annotated.cells, counts, lost_px, self.classes)
        row: dict[str, object] = {'uuid': name, 'height': image_hw[0], 'width': image_hw[1]}
        row |= {f'c{k}': counts[k] for k in range(1, len(self.classes.names) + 1)}
        row |= {'patient': job.patient, 'source': job.source.name, 'lost_px': sum(lost_px.values())}
        return {key: str(value) for key, value in row.items()}

    def _correct(
        self, job: Job, name: str, image: Pixels, label_maps: Mapping[int, NDArray[np.int32]]
    ) -> None:
        """Write a case that may be there, and note where it came from."""
        case_dir, kept = self.train_dir / name, None
        picture: Pixels | Path = image
        if case_dir.exists():
            picture = _own_picture(job, case_dir / 'image.tif', image, self.params)
            folder = self.out_dir / REPLACED / name
            folder.mkdir(parents=True, exist_ok=True)
            kept = folder / str(1 + sum(1 for _ in folder.iterdir()))
        where = None if kept is None else kept.relative_to(self.out_dir).as_posix()
        note_origin(self.out_dir, name, origin_of(job.source, self.source_format, name, where))
        _write_whole(case_dir, picture, label_maps, um_per_px=_pixel_size(job), kept=kept)


def _pixel_size(job: Job) -> Um | None:
    return None if job.image_path is None else of_case(job.image_path).um_per_px


def _own_picture(job: Job, path: Path, image: Pixels, params: ImportParams) -> Path:
    """Return a case's picture, which stays as it is, if the cells were drawn on it."""
    is_own = job.image_path is not None and path.exists() and job.image_path.samefile(path)
    if not is_own:
        there = read_picture(path, Tally(), max_pixels=params.max_pixels)
        is_own = there.shape == image.shape and bool((there == image).all())
    if not is_own:
        raise CellSegError(
            f'{job.source}: {path.parent} is there with another picture; expected cells of that '
            f'one; give --images {path.parents[1]}, or rename what is a new case'
        )
    return path


def _require_some_cell(job: Job, annotated: Annotated) -> None:
    """Refuse an image of which no cell can be used: it would be taught as one without cells."""
    tally = annotated.tally
    if not annotated.cells and tally.unusable:
        raise CellSegError(
            f'{job.source}: no cell can be used: {"; ".join(tally.notes())}; expected one that '
            f'can; correct them, or remove the image'
        )


def _require_all(job: Job, annotated: Annotated, n_kept: int) -> None:
    faults = [
        f'{len(which)} {reason} ({first_of(which)})'
        for reason, which in sorted(annotated.tally.unusable.items())
    ]
    n_gone = len(annotated.cells) - n_kept
    if n_gone:
        faults.append(f'{n_gone} cells without a pixel of their own')
    if faults:
        raise CellSegError(
            f'{job.source}: {"; ".join(faults)}; expected that all can be used; correct them, or '
            f'import without --strict'
        )


def _loss_notes(
    job: Job,
    cells: Sequence[Cell],
    counts: Mapping[int, int],
    lost_px: Mapping[int, int],
    classes: Classes,
) -> list[str]:
    n_cells = Counter(cell.class_number for cell in cells)
    notes = []
    for k in sorted(n_cells):
        n_gone = n_cells[k] - counts[k]
        if lost_px[k] or n_gone:
            notes.append(
                f'{job.source}: {lost_px[k]} px of {classes.names[k - 1]} cells overlap and went '
                f'to the smaller cell; {n_gone} of {n_cells[k]} cells have no pixel left'
            )
    if not cells:
        notes.append(f'{job.source}: has no cell')
    return notes


def paint_cells(
    cells: Sequence[Cell], image_hw: Sequence[int]
) -> tuple[dict[int, NDArray[np.int32]], Counter[int]]:
    """Paint cells into one label map per class.

    A pixel that cells of one class contest goes to the one with the smaller mask, and of equal
    masks to the earlier one. Ids are unique across classes, rise with the class and then with the
    order of ``cells``; a cell without a pixel left leaves a gap.

    Args:
        cells: Cells whose crops lie inside the image.
        image_hw: Height and width in px.

    Returns:
        Class number -> (H, W) int32 label map; and class number -> pixels lost to overlaps.
    """
    label_maps: dict[int, NDArray[np.int32]] = {}
    lost_px: Counter[int] = Counter()
    areas = [int(cell.mask.sum()) for cell in cells]
    order = sorted(range(len(cells)), key=lambda i: (cells[i].class_number, i))
    id_of = {index: number for number, index in enumerate(order, start=1)}
    for index in sorted(order, key=lambda i: (areas[i], i), reverse=True):
        cell = cells[index]
        label_map = label_maps.setdefault(
            cell.class_number, np.zeros((image_hw[0], image_hw[1]), dtype=np.int32)
        )
        height, width = cell.mask.shape
        window = label_map[cell.top : cell.top + height, cell.left : cell.left + width]
        window[cell.mask] = id_of[index]
        lost_px[cell.class_number] += areas[index]
    for class_number, label_map in label_maps.items():
        lost_px[class_number] -= int((label_map > 0).sum())
    return dict(sorted(label_maps.items())), lost_px


def _write_whole(
    case_dir: Path,
    image: Pixels | Path,
    label_maps: Mapping[int, NDArray[np.int32]],
    *,
    um_per_px: Um | None,
    kept: Path | None = None,
) -> None:
    """Write a case folder under another name first, so that it is never seen half written.

    What was there goes to ``kept``, if that is named.
    """
    case_dir.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix='.tmp-import-', dir=case_dir.parent))
    try:
        write_case(scratch / 'new', image, label_maps, um_per_px=um_per_px)
        old = kept or scratch / 'old'
        if case_dir.exists():
            case_dir.replace(old)
        try:
            (scratch / 'new').replace(case_dir)
        except OSError:
            if old.exists():
                old.replace(case_dir)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


Finder = Callable[[Path, ImportParams], tuple[list[Job], Classes, list[str]]]
FINDERS: Mapping[str, Finder] = {
    'monusac': find_monusac,
    'coco': find_coco,
    'label-map': find_label_maps,
    'mask-folders': find_mask_folders,
    'geojson': find_geojson,
    'imagej': find_imagej,
    'cellpose': find_cellpose,
    'labelme': find_labelme,
    'yolo': find_yolo,
    'cvat': find_cvat,
    'label-table': find_label_tables,
    'colour-mask': find_colour_masks,
    'pannuke': find_pannuke,
    'consep': find_mat_files,
    'hovernet': find_hovernet,
    'nnunet': find_nnunet,
    'run-lengths': find_run_lengths,
}

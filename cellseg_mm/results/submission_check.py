"""Check a submission, or show how two differ.

In: files. Out: remarks and rows. Invariant: the file is read as a stranger reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core import rle
from cellseg_mm.core.errors import PredictionError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.text_table import text_table
from cellseg_mm.data.config import N_CLASSES
from cellseg_mm.results.coco_results import (
    ImageLike,
    Records,
    box_iou,
    from_coco_results,
    image_refs,
    looks_like_xyxy,
    parse_records,
    read_results_file,
    xywh_to_xyxy,
)
from cellseg_mm.results.submission import N_EXAMPLES, RESULTS_NAME

# A detector's box and the tight box of its mask differ by a few px; less than this is no accident.
MIN_BOX_MASK_IOU = 0.3

MATCH_IOU = 0.5


@dataclass(frozen=True, slots=True)
class Remark:
    """One kind of fault of a submission.

    Attributes:
        severity: ``error``: the evaluation fails or counts wrong. ``warning``: worth a look.
        code: Kind of fault, one word.
        message: Sentence with the number of records or images and the first examples.
        count: How many records or images.
    """

    severity: Literal['error', 'warning']
    code: str
    message: str
    count: int = 1


def lint_submission(
    path: Path | str, id_map: Iterable[ImageLike], *, n_classes: int = N_CLASSES
) -> list[Remark]:
    """Check a submission of any origin.

    Args:
        path: A zip, or the JSON file itself.
        id_map: Entries of ``labels.read_id_map``.
        n_classes: Largest allowed ``category_id``.

    Returns:
        Remarks, errors first; an empty list when all is well.

    Raises:
        PredictionError: The file is no zip and no JSON list.
    """
    results = read_results_file(path)
    records = parse_records(results.records, image_refs(id_map), n_classes=n_classes)
    remarks = _name_remarks(results.inner_name, results.other_names)
    counted: dict[str, list[str]] = {}
    for problem in records.problems:
        counted.setdefault(problem.code, []).append(f'record {problem.index}: {problem.message}')
    remarks += [
        Remark('error', code, f'{len(texts)} record(s): {_examples(texts)}', len(texts))
        for code, texts in sorted(counted.items())
    ]
    remarks += _mask_remarks(records) + _box_remarks(records) + _image_remarks(records)
    return sorted(remarks, key=lambda remark: remark.severity)


def _examples(texts: Sequence[str]) -> str:
    more = '; ...' if len(texts) > N_EXAMPLES else ''
    return '; '.join(texts[:N_EXAMPLES]) + more


def _name_remarks(inner_name: str, other_names: Sequence[str]) -> list[Remark]:
    remarks = []
    if inner_name and inner_name != RESULTS_NAME:
        remarks.append(
            Remark(
                'error',
                'file-name',
                f'the file within the zip is {inner_name[:80]!r}; expected {RESULTS_NAME!r}',
            )
        )
    if other_names:
        remarks.append(
            Remark(
                'warning',
                'other-files',
                f'the zip also holds {_examples(other_names)}',
                len(other_names),
            )
        )
    return remarks


def _mask_remarks(records: Records) -> list[Remark]:
    remarks = []
    empty = records.index[records.areas == 0]
    if len(empty):
        message = f'{len(empty)} mask(s) have no pixel: {_record_list(empty)}'
        remarks.append(Remark('error', 'area', message, len(empty)))
    keys = Counter(
        zip(records.image.tolist(), records.class_ids.tolist(), records.rles, strict=True)
    )
    doubles = {key: n for key, n in keys.items() if n > 1}
    if doubles:
        n = sum(doubles.values()) - len(doubles)
        images = [
            f'image {records.refs[i].image_id} ({k} times)' for (i, _, _), k in doubles.items()
        ]
        message = f'{n} record(s) repeat mask and class of another: {_examples(images)}'
        remarks.append(Remark('warning', 'duplicate', message, n))
    return remarks


def _box_remarks(records: Records) -> list[Remark]:
    has_box = np.isfinite(records.boxes).all(axis=1)
    remarks = []
    if (~has_box).any():
        message = (
            f'{(~has_box).sum()} record(s) have no bbox: {_record_list(records.index[~has_box])}'
        )
        remarks.append(Remark('error', 'box', message, int((~has_box).sum())))
    if looks_like_xyxy(records):
        message = 'the boxes are corners (x0, y0, x1, y1); COCO wants x, y, width, height'
        return [*remarks, Remark('error', 'xyxy', message, int(has_box.sum()))]
    used = has_box & (records.areas > 0)
    boxes = xywh_to_xyxy(records.boxes[used])
    fits = box_iou(boxes, records.mask_boxes_xyxy[used]) >= MIN_BOX_MASK_IOU
    if not fits.all():
        message = (
            f'{(~fits).sum()} box(es) do not fit their mask (box IoU below {MIN_BOX_MASK_IOU}): '
            f'{_record_list(records.index[used][~fits])}'
        )
        remarks.append(Remark('warning', 'box-mask', message, int((~fits).sum())))
    hw = np.array([ref.image_hw for ref in records.refs], dtype=float).reshape(-1, 2)
    wh = hw[records.image[used]][:, ::-1]
    # 1 px: detectors do not always clip again after scaling back.
    outside = (boxes[:, :2] < -1).any(axis=1) | (boxes[:, 2:] > wh + 1).any(axis=1)
    if outside.any():
        message = (
            f'{outside.sum()} box(es) leave the image: {_record_list(records.index[used][outside])}'
        )
        remarks.append(Remark('warning', 'box-outside', message, int(outside.sum())))
    return remarks


def _record_list(index: NDArray[np.int64]) -> str:
    return _examples([f'record {i}' for i in index.tolist()])


def _image_remarks(records: Records) -> list[Remark]:
    seen = set(records.image.tolist())
    without = [ref.name for i, ref in enumerate(records.refs) if i not in seen]
    if not without:
        return []
    if not seen:
        return [Remark('error', 'images', 'no usable record for any image', len(without))]
    message = f'{len(without)} image(s) have no usable record: {_examples(without)}'
    return [Remark('warning', 'images', message, len(without))]


@dataclass(frozen=True, slots=True)
class DiffRow:
    """How two sets of instances of one image and class, or of one class, differ.

    Attributes:
        name: Case name, '' for all images.
        class_id: 0-based, -1 for all classes.
        n_first: Instances in the first file.
        n_second: Instances in the second.
        n_matched: Pairs of one class with mask IoU of at least ``MATCH_IOU``, each used once,
            highest IoU first.
        mean_iou: Mean IoU of the pairs, NaN without pairs.
        mean_score_shift: Mean of second minus first score of the pairs, NaN without pairs.
    """

    name: str
    class_id: int
    n_first: int
    n_second: int
    n_matched: int
    mean_iou: float
    mean_score_shift: float


@dataclass(frozen=True, slots=True)
class _Pairs:
    n_first: int
    n_second: int
    ious: NDArray[np.float64]
    shifts: NDArray[np.float64]

    def row(self, name: str, class_id: int) -> DiffRow:
        n = len(self.ious)
        return DiffRow(
            name,
            class_id,
            self.n_first,
            self.n_second,
            n,
            float(self.ious.mean()) if n else float('nan'),
            float(self.shifts.mean()) if n else float('nan'),
        )


def diff_submissions(
    first: Path | str,
    second: Path | str,
    id_map: Iterable[ImageLike],
) -> list[DiffRow]:
    """Compare two submissions; see :func:`diff_sets`. Boxes play no part.

    Raises:
        PredictionError: One of them cannot be read.
    """
    refs = image_refs(id_map)
    return diff_sets(
        *(from_coco_results(path, refs, boxes_from_masks=True) for path in (first, second))
    )


def diff_sets(first: Sequence[InstanceSet], second: Sequence[InstanceSet]) -> list[DiffRow]:
    """Compare instances of the same images, matched by name.

    Returns:
        A row for everything, then one per class, then one per image and class in which any
        instance occurs, in the order of ``first``.

    Raises:
        PredictionError: The two are not of the same images.
    """
    other = {s.name: s for s in second}
    if sorted(other) != sorted(s.name for s in first):
        raise PredictionError('the two files are not of the same images; expected the same; check.')
    by_image: dict[tuple[str, int], _Pairs] = {}
    for a in first:
        b = other[a.name]
        if a.image_hw != b.image_hw:
            raise PredictionError(f'{a.name}: the two files differ in image size; check the files.')
        for k in sorted({*a.class_ids.tolist(), *b.class_ids.tolist()}):
            by_image[a.name, k] = _match(a[a.class_ids == k], b[b.class_ids == k])
    classes = sorted({k for _, k in by_image})
    rows = [_sum(by_image.values()).row('', -1)]
    rows += [_sum(p for (_, c), p in by_image.items() if c == k).row('', k) for k in classes]
    return rows + [pairs.row(name, k) for (name, k), pairs in by_image.items()]


def _match(a: InstanceSet, b: InstanceSet) -> _Pairs:
    iou = rle.iou_matrix(a.rles, b.rles, a.image_hw)
    rows, columns = np.nonzero(iou >= MATCH_IOU)
    order = np.argsort(-iou[rows, columns], kind='stable')
    used_a, used_b = np.zeros(len(a), bool), np.zeros(len(b), bool)
    pairs = []
    for i, j in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if not used_a[i] and not used_b[j]:
            used_a[i] = used_b[j] = True
            pairs.append((i, j))
    i, j = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    shifts = b.scores[j].astype(np.float64) - a.scores[i]
    return _Pairs(len(a), len(b), iou[i, j], shifts)


def _sum(pairs: Iterable[_Pairs]) -> _Pairs:
    pairs = list(pairs)
    return _Pairs(
        sum(p.n_first for p in pairs),
        sum(p.n_second for p in pairs),
        np.concatenate([np.empty(0), *(p.ious for p in pairs)]),
        np.concatenate([np.empty(0), *(p.shifts for p in pairs)]),
    )


def format_diff(rows: Sequence[DiffRow], class_names: Sequence[str] = ()) -> str:
    """Return the rows of :func:`diff_sets` as a table of text."""
    head = ('image', 'class', 'first', 'second', 'matched', 'mean IoU', 'score shift')
    table = []
    for row in rows:
        known = 0 <= row.class_id < len(class_names)
        name = class_names[row.class_id] if known else str(row.class_id + 1)
        table.append(
            (
                row.name or 'all',
                'all' if row.class_id < 0 else name,
                str(row.n_first),
                str(row.n_second),
                str(row.n_matched),
                f'{row.mean_iou:.4f}',
                f'{row.mean_score_shift:+.4f}',
            )
        )
    return text_table(head, table, n_left=2)

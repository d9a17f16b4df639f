"""COCO results JSON, ours and other people's.

In: a list of records (or the file or zip that holds it) and the images it speaks of. Out:
InstanceSets, or the way back. Invariant: a record is either understood whole or a problem with a
code and a sentence; nothing is repaired in silence.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core import rle
from cellseg_mm.core.errors import PredictionError
from cellseg_mm.core.files import JsonValue, regular
from cellseg_mm.core.instances import InstanceSet

MAX_JSON_BYTES = 1 << 30
# A zip unpacks to at most this plus MAX_ZIP_RATIO times its size. Deflate reaches 1032:1; RLE in
# JSON reaches about 5:1.
FREE_BYTES = 1 << 26
MAX_ZIP_RATIO = 200
ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,  # encrypted
    struct.error,
    OSError,
    ValueError,
)


class ImageLike(Protocol):
    """What has an id and a size: ``Case``, ``InstanceSet``, ``labels.IdEntry``.

    It also has ``name``, or ``file_name`` whose stem is the name.
    """

    @property
    def image_id(self) -> int:
        """The COCO id."""
        ...

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width in px."""
        ...


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Name, COCO id and size (height, width in px) of an image that results speak of."""

    name: str
    image_id: int
    image_hw: tuple[int, int]


def image_refs(images: Iterable[ImageLike]) -> list[ImageRef]:
    """Return what results need to know of ``images``, in their order.

    Raises:
        PredictionError: A name or an id occurs twice.
    """
    refs = []
    for image in images:
        name = getattr(image, 'name', None) or PurePath(getattr(image, 'file_name', '')).stem
        height, width = image.image_hw
        refs.append(ImageRef(str(name), int(image.image_id), (int(height), int(width))))
    for key in ('name', 'image_id'):
        seen: set[object] = set()
        for ref in refs:
            value = getattr(ref, key)
            if value in seen:
                raise PredictionError(
                    f'images: {key} {value!r} occurs twice; expected each once; '
                    'give each image its own set.'
                )
            seen.add(value)
    return refs


@dataclass(frozen=True, slots=True)
class ResultsFile:
    """The records of a results file, not looked at yet.

    Attributes:
        records: What the JSON list holds.
        inner_name: Name of the JSON file within a zip, '' for a plain JSON file.
        other_names: Further files within the zip.
    """

    records: list[object]
    inner_name: str = ''
    other_names: tuple[str, ...] = ()


def read_results_file(path: Path | str) -> ResultsFile:
    """Read a results list from a ``.json`` file, or from a zip that holds one.

    Raises:
        PredictionError: Not readable, no JSON list, no or several JSON files in the zip, or more
            than ``MAX_JSON_BYTES``.
    """
    path = Path(path)
    try:
        with regular(path).open('rb') as stream:
            is_zip = stream.read(2) == b'PK'
            size = path.stat().st_size
    except OSError as problem:
        raise PredictionError(
            f'{path}: cannot be read ({problem.strerror}); expected a results file; check the path.'
        ) from problem
    if not is_zip:
        _check_size(path, size)
        return ResultsFile(_parse_json(path, path.read_bytes()))
    try:
        with zipfile.ZipFile(path) as archive:
            names = [i.filename for i in archive.infolist() if not i.is_dir()]
            json_names = [name for name in names if name.lower().endswith('.json')]
            if len(json_names) != 1:
                raise PredictionError(
                    f'{path}: the zip holds {len(json_names)} JSON files; expected one; '
                    'zip the results file alone.'
                )
            info = archive.getinfo(json_names[0])
            _check_size(path, info.file_size, packed=size)
            content = archive.read(info)
    except PredictionError:
        raise
    except ZIP_ERRORS as problem:
        raise PredictionError(
            f'{path}: not a readable zip ({str(problem)[:80]}); expected a zipped results file; '
            'write or fetch it again.'
        ) from problem
    others = tuple(name for name in names if name != json_names[0])
    return ResultsFile(_parse_json(path, content), json_names[0], others)


def _check_size(path: Path, size: int, *, packed: int | None = None) -> None:
    too_dense = packed is not None and size > FREE_BYTES + MAX_ZIP_RATIO * packed
    if size > MAX_JSON_BYTES or too_dense:
        raise PredictionError(
            f'{path}: unpacks to {size >> 20} MiB; a results file has at most '
            f'{MAX_JSON_BYTES >> 20} MiB and packs less than {MAX_ZIP_RATIO}:1; '
            'this is not one, or it must be split.'
        )


def _parse_json(path: Path, content: bytes) -> list[object]:
    try:
        records = json.loads(content)
    except (ValueError, RecursionError) as problem:
        raise PredictionError(
            f'{path}: not valid JSON ({str(problem)[:80]}); expected a list of COCO results; '
            'write or fetch it again.'
        ) from problem
    if not isinstance(records, list):
        raise PredictionError(
            f'{path}: holds a {type(records).__name__}; expected a list of COCO results '
            '(image_id, category_id, score, bbox, segmentation); this is another kind of file.'
        )
    return records


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one record: a code, the record's index, and a sentence."""

    code: str
    index: int
    message: str


@dataclass(frozen=True, slots=True)
class Records:
    """The understood records as columns, M of them, and the problems of the others.

    Attributes:
        refs: The images.
        index: (M,) int64, place in the file.
        image: (M,) int64, index into ``refs``.
        class_ids: (M,) int64, 0-based.
        scores: (M,) float64.
        boxes: (M, 4) float64, the four numbers as written (xywh if correct), NaN where absent.
        rles: M canonical COCO counts strings.
        mask_boxes_xyxy: (M, 4) float32, tight boxes of the masks; zeros for empty masks.
        areas: (M,) int64, px.
        problems: By index.
    """

    refs: tuple[ImageRef, ...]
    index: NDArray[np.int64]
    image: NDArray[np.int64]
    class_ids: NDArray[np.int64]
    scores: NDArray[np.float64]
    boxes: NDArray[np.float64]
    rles: tuple[bytes, ...]
    mask_boxes_xyxy: NDArray[np.float32]
    areas: NDArray[np.int64]
    problems: tuple[Problem, ...]


class _BadRecordError(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(slots=True)
class _Row:
    index: int
    image: int
    class_id: int
    score: float
    box: list[float]
    counts: bytes


def parse_records(
    records: Sequence[object], refs: Sequence[ImageRef], *, n_classes: int | None = None
) -> Records:
    """Check records one by one and turn the good ones into columns.

    Args:
        records: What a results list holds; anything at all.
        refs: The images that it may speak of.
        n_classes: Largest allowed ``category_id``; None allows any from 1.
    """
    image_of = {ref.image_id: i for i, ref in enumerate(refs)}
    rows: list[_Row] = []
    problems: list[Problem] = []
    for index, record in enumerate(records):
        try:
            rows.append(_parse_record(index, record, image_of, refs, n_classes))
        except _BadRecordError as bad:
            problems.append(Problem(bad.code, index, str(bad)))
    by_image: list[list[_Row]] = [[] for _ in refs]
    for row in rows:
        by_image[row.image].append(row)
    good, counts, boxes, areas = [], [], [], []
    for ref, rows_of_image in zip(refs, by_image, strict=True):
        kept, runs = _decode_rows(rows_of_image, ref, problems)
        good += kept
        counts += rle.encode_runs(runs)
        boxes.append(rle.boxes_of(runs))
        areas.append(rle.areas_of(runs))
    return Records(
        refs=tuple(refs),
        index=np.array([row.index for row in good], dtype=np.int64),
        image=np.array([row.image for row in good], dtype=np.int64),
        class_ids=np.array([row.class_id for row in good], dtype=np.int64),
        scores=np.array([row.score for row in good], dtype=np.float64),
        boxes=np.array([row.box for row in good], dtype=np.float64).reshape(-1, 4),
        rles=tuple(counts),
        mask_boxes_xyxy=np.concatenate([np.zeros((0, 4), np.float32), *boxes]),
        areas=np.concatenate([np.zeros(0, np.int64), *areas]),
        problems=tuple(sorted(problems, key=lambda problem: problem.index)),
    )


def _decode_rows(
    rows: list[_Row], ref: ImageRef, problems: list[Problem]
) -> tuple[list[_Row], rle.Runs]:
    """Decode all masks of an image; those that fail become problems."""
    try:
        return rows, rle.decode_runs([row.counts for row in rows], ref.image_hw)
    except PredictionError:
        good = []
        for row in rows:
            try:
                rle.decode_runs([row.counts], ref.image_hw)
                good.append(row)
            except PredictionError as bad:
                problems.append(Problem('rle', row.index, f'image {ref.image_id}: {bad}'))
        return good, rle.decode_runs([row.counts for row in good], ref.image_hw)


def _parse_record(
    index: int,
    record: object,
    image_of: Mapping[int, int],
    refs: Sequence[ImageRef],
    n_classes: int | None,
) -> _Row:
    if not isinstance(record, dict):
        raise _BadRecordError('record', f'is a {type(record).__name__}; expected an object')
    image_id = _integer(record, 'image_id', 'image-id')
    if image_id not in image_of:
        raise _BadRecordError('image-id', f'image_id {image_id} is not in the id map')
    category = _integer(record, 'category_id', 'category')
    if category < 1 or category > (n_classes or 2**31):
        allowed = f'1 to {n_classes}' if n_classes else '1 or more'
        raise _BadRecordError('category', f'category_id is {category}; expected {allowed}')
    score = _number(record.get('score'))
    if not 0 <= score <= 1:
        raise _BadRecordError(
            'score', f'score is {str(record.get("score"))[:40]}; expected a number in 0..1'
        )
    ref = refs[image_of[image_id]]
    counts = _counts(record.get('segmentation'), ref)
    return _Row(index, image_of[image_id], category - 1, score, _box(record), counts)


def _integer(record: Mapping[str, object], key: str, code: str) -> int:
    value = _number(record.get(key))
    if not abs(value) < 2**53 or value != int(value):  # NaN fails the first comparison
        raise _BadRecordError(code, f'{key} is {str(record.get(key))[:40]}; expected an integer')
    return int(value)


def _number(value: object) -> float:
    """Return a JSON number as float, NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _box(record: Mapping[str, object]) -> list[float]:
    box = record.get('bbox')
    if box is None:
        return [math.nan] * 4
    numbers = [_number(value) for value in box] if isinstance(box, list) else []
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise _BadRecordError('box', f'bbox is {str(box)[:60]}; expected four finite numbers')
    return numbers


def _counts(segmentation: object, ref: ImageRef) -> bytes:
    if not isinstance(segmentation, dict):
        kind = 'polygons' if isinstance(segmentation, list) else type(segmentation).__name__
        raise _BadRecordError(
            'segmentation', f'segmentation is {kind}; expected RLE with size and counts'
        )
    size, (height, width) = segmentation.get('size'), ref.image_hw
    if size != [height, width]:
        hint = ' (height and width are swapped)' if size == [width, height] else ''
        raise _BadRecordError(
            'size',
            f'RLE size is {str(size)[:40]}{hint}; image {ref.image_id} is [{height}, {width}]',
        )
    counts = segmentation.get('counts')
    if isinstance(counts, str) and counts.isascii():
        return counts.encode()
    if isinstance(counts, list):
        return _compressed(counts, ref)
    raise _BadRecordError('rle', f'RLE counts are a {type(counts).__name__}; expected ASCII text')


def _compressed(counts: list[object], ref: ImageRef) -> bytes:
    """Compress an uncompressed RLE: a list of run lengths, zeros first."""
    n_pixels = ref.image_hw[0] * ref.image_hw[1]
    lengths = [_number(value) for value in counts]
    if not all(0 <= n <= n_pixels and n == int(n) for n in lengths) or sum(lengths) != n_pixels:
        raise _BadRecordError('rle', 'RLE counts do not add up to the image')
    ends = np.cumsum(np.array(lengths, dtype=np.int64))
    ends = np.concatenate([ends, np.zeros(len(ends) % 2, np.int64) + n_pixels])
    starts, ends = ends[0::2], ends[1::2]
    filled = ends > starts
    runs = rle.runs_from_pieces(
        starts[filled], ends[filled], np.zeros(filled.sum(), np.int64), 1, ref.image_hw
    )
    return rle.encode_runs(runs)[0]


def box_iou(first_xyxy: NDArray[Any], second_xyxy: NDArray[Any]) -> NDArray[np.float64]:
    """Return the IoU of boxes pair by pair, (N,) float64; 0 where both are empty."""
    first, second = np.asarray(first_xyxy, float), np.asarray(second_xyxy, float)

    def area(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        width, height = np.maximum(boxes[:, 2:] - boxes[:, :2], 0).T
        return np.asarray(width * height, dtype=np.float64)

    low, high = np.maximum(first[:, :2], second[:, :2]), np.minimum(first[:, 2:], second[:, 2:])
    common = area(np.concatenate([low, high], axis=1))
    union = area(first) + area(second) - common
    iou: NDArray[np.float64] = np.zeros(len(first))
    np.divide(common, union, out=iou, where=union > 0)
    return iou


def xywh_to_xyxy(boxes: NDArray[Any]) -> NDArray[Any]:
    """Turn x, y, width, height into x0, y0, x1, y1, (N, 4)."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def looks_like_xyxy(records: Records) -> bool:
    """Tell whether most boxes fit their masks as corners and do not as x, y, width, height.

    The mistake of the original project: COCO wants xywh.
    """
    used = (records.areas > 0) & np.isfinite(records.boxes).all(axis=1)
    boxes, tight = records.boxes[used], records.mask_boxes_xyxy[used]
    as_corners, as_xywh = box_iou(boxes, tight), box_iou(xywh_to_xyxy(boxes), tight)
    return bool(np.sum((as_corners >= 0.5) & (as_xywh < 0.5)) * 2 > used.sum())


def from_coco_results(
    results: Path | str | Sequence[object],
    images: Iterable[ImageLike],
    *,
    n_classes: int | None = None,
    boxes_from_masks: bool = False,
) -> tuple[InstanceSet, ...]:
    """Read a COCO results list, of any origin, into one set per image.

    Args:
        results: A ``.json`` file, a zip that holds one, or the list itself.
        images: The images it may speak of: an id map, cases or sets.
        n_classes: Largest allowed ``category_id``; None allows any from 1.
        boxes_from_masks: Take the tight boxes of the masks instead of ``bbox``.

    Returns:
        A set for each of ``images``, in their order, also where nothing was found. Records without
        ``bbox`` get the tight box of their mask.

    Raises:
        PredictionError: A record is wrong, or the boxes are corners (xyxy).
    """
    if isinstance(results, str | Path):
        where, listed = str(results), read_results_file(results).records
    else:
        where, listed = 'COCO results', list(results)
    records = parse_records(listed, image_refs(images), n_classes=n_classes)
    if records.problems:
        first = records.problems[0]
        raise PredictionError(
            f'{where}: {len(records.problems)} of {len(listed)} records are wrong, first record '
            f'{first.index}: {first.message}; correct the program that wrote the file.'
        )
    if not boxes_from_masks and looks_like_xyxy(records):
        raise PredictionError(
            f'{where}: the boxes are corners (x0, y0, x1, y1); COCO results have x, y, width, '
            'height; ask for boxes from the masks, or write the file again.'
        )
    return _sets(records, boxes_from_masks=boxes_from_masks)


def _sets(records: Records, *, boxes_from_masks: bool) -> tuple[InstanceSet, ...]:
    boxes = xywh_to_xyxy(records.boxes)
    absent = np.isnan(boxes).any(axis=1) | boxes_from_masks
    boxes[absent] = records.mask_boxes_xyxy[absent]
    # Rows lie together by image; ``index`` restores the file's order within each.
    begin = np.searchsorted(records.image, np.arange(len(records.refs) + 1))
    sets = []
    for i, ref in enumerate(records.refs):
        rows = slice(begin[i], begin[i + 1])
        sets.append(
            InstanceSet(
                ref.name,
                ref.image_id,
                ref.image_hw,
                class_ids=records.class_ids[rows],
                scores=records.scores[rows].astype(np.float32),
                boxes_xyxy=boxes[rows],
                rles=records.rles[rows],
            )
        )
    return tuple(sets)


def to_coco_results(sets: Iterable[InstanceSet]) -> list[dict[str, JsonValue]]:
    """Return COCO results records: 1-based category, box as xywh px, RLE with size.

    Boxes are rounded to 1/1000 px. Scores are the shortest decimals that give the same float32.
    """
    records: list[dict[str, JsonValue]] = []
    for s in sets:
        low, high = s.boxes_xyxy[:, :2].astype(float), s.boxes_xyxy[:, 2:].astype(float)
        xywh = np.round(np.concatenate([low, high - low], axis=1), 3).tolist()
        size: list[JsonValue] = [*s.image_hw]
        for class_id, score, box, counts in zip(
            s.class_ids.tolist(), s.scores, xywh, s.rles, strict=True
        ):
            records.append(
                {
                    'image_id': s.image_id,
                    'category_id': class_id + 1,
                    'bbox': box,
                    'score': float(str(score)),
                    'segmentation': {'size': size, 'counts': counts.decode()},
                }
            )
    return records

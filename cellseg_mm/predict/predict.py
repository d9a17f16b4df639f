"""Predict any images: files, folders, whole slides; and write what other programs read.

In: image paths and a detector (one model, or an ensemble). Out: per image ``<name>.npz`` with all
instances, the formats asked for, and ``<name>.state.json``, which is written last.
Invariant: an image whose state file fits its input and the settings is never predicted again, and
a file that cannot be read costs its own result and nothing else.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import CellSegError, ConfigError, ImageError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.progress import track
from cellseg_mm.core.provenance import code_commit, versions
from cellseg_mm.data.contents import NO_CHOICE, Choice
from cellseg_mm.data.image_reader import SUFFIXES, WHOLE_PX, ImageReader, open_image
from cellseg_mm.data.intensity import ValueRange, is_nearly_black, n_lit
from cellseg_mm.fusion.settings import InferenceSettings, apply_settings, settings_for_people
from cellseg_mm.predict.items import Item
from cellseg_mm.predict.state import Journal, State
from cellseg_mm.predict.tiling import StitchParams, StitchReport, Tile, plan_tiles, stitch
from cellseg_mm.results import export
from cellseg_mm.results.formats import Look, check_words, path_of, write_formats
from cellseg_mm.results.predictions import Predictions, save_predictions

logger = logging.getLogger(__name__)

Picture = NDArray[np.uint8]

# Raise them when the same settings give other instances, or other formats.
VERSION = 1
FORMATS_VERSION = 2  # 2: formats show disjoint cells

MAX_NAME_BYTES = 255
NEARLY_BLACK = (
    'the image is nearly black: all but a thousandth of its pixels are below a tenth of 0..255; '
    'look at it'
)


class Detector(Protocol):
    """What finds cells in pictures: the port that models, and whatever else finds cells, fill.

    Attributes:
        identity: JSON values that change whenever the same picture could give other instances.
        provenance: Further JSON values for the result files.
        batch_size: Pictures that it takes at once; may change while it works.
        cap: Most instances that it returns for a picture; 0 if it has no limit.
        notes: Sentences that a person should know of the image that ``detect`` was last given,
            about all of its pictures so far; another ``name`` begins anew.
    """

    identity: Mapping[str, JsonValue]
    provenance: Mapping[str, JsonValue]
    batch_size: int
    cap: int
    notes: Sequence[str]

    def detect(self, pictures: Sequence[Picture], name: str) -> list[InstanceSet]:
        """Return the instances of each picture.

        Args:
            pictures: At most ``batch_size``, (h, w, 3) uint8 in the channel order of the files.
            name: Of the image that they are parts of.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictParams:
    """How images are cut, and what is written.

    Attributes:
        out_dir: Gets all results.
        class_names: Name of each class.
        class_colours: RGB of each class.
        formats: Words of ``FORMATS``.
        score_thr: Cells below it are left out of every format, and so is what better cells cover:
            formats show each pixel as one cell's. ``<name>.npz`` has all.
        tile_px: Side of the tiles that larger images are cut into.
        overlap_px: Least overlap of neighbouring tiles.
        whole_px: Images with no side above this are not cut.
        level: Level of image pyramids, 0 the largest.
        choice: Which image, plane and channels of files that hold several.
        red_blue_swapped: The files hold blue where red belongs.
        value_range: Of values of more than 8 bits; None decides by each file alone.
        range_from: Where ``value_range`` comes from, for people.
        n_workers: Threads that read ahead; 0 reads between predictions.
        again: Predict images that are done, too.
    """

    out_dir: Path
    class_names: tuple[str, ...]
    class_colours: tuple[tuple[int, int, int], ...]
    formats: tuple[str, ...] = ('overlay',)
    score_thr: float = 0.5
    tile_px: int = 1024
    overlap_px: int = 128
    whole_px: int = 2048
    level: int = 0
    choice: Choice = NO_CHOICE
    red_blue_swapped: bool = False
    value_range: ValueRange | None = None
    range_from: str = ''
    n_workers: int = 1
    again: bool = False

    def __post_init__(self) -> None:
        check_words(self.formats)
        if not 0 <= self.score_thr <= 1 or self.n_workers < 0:
            raise ConfigError(
                f'predict: score_thr {self.score_thr}, workers {self.n_workers}; expected a '
                'threshold in 0..1 and 0 or more workers'
            )
        plan_tiles((1, 1), self.tile_px, self.overlap_px)

    @property
    def look(self) -> Look:
        """How cells look in the formats."""
        return Look(
            class_names=self.class_names,
            class_colours=self.class_colours,
            red_blue_swapped=self.red_blue_swapped,
        )

    @property
    def how_cut(self) -> dict[str, JsonValue]:
        """What decides about the instances."""
        keys = ('tile_px', 'overlap_px', 'whole_px', 'level', 'red_blue_swapped')
        cut: dict[str, JsonValue] = {'version': VERSION}
        cut.update({key: getattr(self, key) for key in keys})
        if not self.choice.is_default:
            cut['choice'] = self.choice.to_json()
        if self.value_range is not None:  # 8-bit collections have none, and keep their results
            cut['value_range'] = self.value_range.to_json()
        return cut

    @property
    def for_people(self) -> InferenceSettings:
        """Which cells the formats show: disjoint ones from ``score_thr`` on."""
        return settings_for_people(self.class_names, score_thr=self.score_thr)

    @property
    def how_written(self) -> dict[str, JsonValue]:
        """What decides about the formats."""
        keys = ('score_thr', 'class_names', 'class_colours', 'red_blue_swapped')
        return {'version': FORMATS_VERSION, **{key: getattr(self, key) for key in keys}}


@dataclass(slots=True)
class Summary:
    """What happened; grows while the images are predicted.

    Attributes:
        predicted: Names of images that the detector looked at.
        rewritten: Names of images whose instances were there, and only formats were written.
        skipped: Names of images that were done.
        failed: Message by name.
        notes: Things that a person should know, by name.
        asides: Things that a person should know of the whole run.
        ranges: What became 0 and 255 of images with more than 8 bits, by name.
        n_empty: Cells without a pixel, which were dropped, by name.
        n_cells: Instances of the predicted and rewritten images, of any score.
        n_below: Those of them below the formats' least score.
        n_shown: Those of them in the formats; the rest is covered by better ones.
        score_thr: The formats' least score.
    """

    predicted: list[str] = field(default_factory=list)
    rewritten: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    asides: list[str] = field(default_factory=list)
    ranges: dict[str, ValueRange] = field(default_factory=dict)
    n_empty: dict[str, int] = field(default_factory=dict)
    n_cells: int = 0
    n_below: int = 0
    n_shown: int = 0
    score_thr: float = 0.0

    @property
    def exit_code(self) -> int:
        """1 when an image failed, else 0."""
        return int(bool(self.failed))

    def _cells(self) -> str:
        n_covered = self.n_cells - self.n_below - self.n_shown
        rest = [
            f'{n} {why}'
            for n, why in (
                (self.n_below, f'below the score {self.score_thr:g}'),
                (n_covered, 'that better ones cover'),
            )
            if n
        ]
        note = f' (and {", ".join(rest)}, in the npz only)' if rest else ''
        return f'{self.n_shown} cells{note}'

    def describe(self) -> str:
        """Return sentences for a terminal."""
        parts = [f'{len(self.predicted)} images predicted, {self._cells()}']
        if self.rewritten:
            parts.append(f'{len(self.rewritten)} had their formats written anew')
        if self.skipped:
            parts.append(f'{len(self.skipped)} were done already')
        lines = ['; '.join(parts) + '.', *self.asides]
        if self.n_empty:
            n = sum(self.n_empty.values())
            lines.append(f'{n} cells without a pixel were dropped, in {len(self.n_empty)} images')
        lines += [f'  {name}: {note}' for name, note in self.notes.items()]
        if self.failed:
            lines.append(f'{len(self.failed)} failed:')
            lines += [f'  {message}' for message in self.failed.values()]
        return '\n'.join(lines)


def predict(items: Sequence[Item], detector: Detector, params: PredictParams) -> Summary:
    """Predict images and write their results.

    Args:
        items: From :func:`find_items`.
        detector: What finds the cells.
        params: See :class:`PredictParams`.

    Returns:
        What happened. Files are in ``params.out_dir``; see the module's text.
    """
    run = _Run(detector, params)
    n_tiles = [run.count_tiles(item) for item in items]
    steps = run.steps(items, n_tiles)
    for _ in track(steps, description='predict (tiles)', total=sum(n_tiles)):
        pass
    run.summary.asides += _range_texts(run.summary, params)
    return run.summary


def _range_texts(summary: Summary, params: PredictParams) -> list[str]:
    """Say how values of more than 8 bits became 8."""
    ranges = list(summary.ranges.values())
    wide = f'{len(ranges)} images have more than 8 bits: '
    if params.value_range is not None:
        if ranges:
            return [f'{wide}their values {params.value_range} became 0..255 ({params.range_from})']
        if summary.predicted:
            return [
                f'the range {params.value_range} ({params.range_from}) was not needed: no image '
                'that was predicted has more than 8 bits'
            ]
    if ranges:
        highs = sorted(found.high for found in ranges)
        each = f'0..{highs[0]:.6g}' + (f' to 0..{highs[-1]:.6g}' if highs[0] < highs[-1] else '')
        return [
            f'{wide}the values of each became 0..255 by its own range ({each}, what all but a '
            'thousandth of the pixels stay within); --range LOW,HIGH takes one for all'
        ]
    return []


def is_cut(image_hw: tuple[int, int], params: PredictParams) -> bool:
    """Tell whether an image is predicted in tiles."""
    return max(image_hw) > params.whole_px


def tiles_of(image_hw: tuple[int, int], params: PredictParams) -> list[Tile]:
    """Return the tiles of an image; one if it is predicted whole."""
    if is_cut(image_hw, params):
        return plan_tiles(image_hw, params.tile_px, params.overlap_px)
    return plan_tiles(image_hw, max(*image_hw, 1), 0)


class _Run:
    """One call of :func:`predict`."""

    def __init__(self, detector: Detector, params: PredictParams) -> None:
        self.detector, self.params = detector, params
        self.summary = Summary(score_thr=params.score_thr)
        self.journal = Journal.of(
            params.out_dir,
            params.formats,
            settings={**params.how_cut, 'detector': dict(detector.identity)},
            how_written=params.how_written,
        )

    def count_tiles(self, item: Item) -> int:
        """Return how many tiles an image has, for the progress bar; 1 if it cannot be told."""
        try:
            if item.path.suffix.lower() not in SUFFIXES[:7] or self._look_up(item).is_done:
                return 1
            # whole_px=0: no pixels are read
            with self._open(item, whole_px=0) as reader:
                return len(tiles_of(reader.image_hw, self.params))
        except Exception:  # whatever it is, the image's own turn reports it
            return 1

    def steps(self, items: Sequence[Item], n_tiles: Sequence[int]) -> Iterator[None]:
        """Work through the images; one step per tile."""
        for item, n in zip(items, n_tiles, strict=True):
            n_done = 0
            try:
                for _ in self._one(item):
                    n_done += 1
                    yield
            except CellSegError as problem:
                self.summary.failed[item.name] = str(problem)
            except Exception as problem:
                # Whatever it is, the other images are not to blame; the log has the traceback.
                logger.exception('%s: failed', item.path)
                text = f'{item.path}: {type(problem).__name__}: {problem}'
                self.summary.failed[item.name] = text
            for _ in range(n - n_done):
                yield

    def _open(self, item: Item, *, whole_px: int = WHOLE_PX) -> AbstractContextManager[ImageReader]:
        params = self.params
        return open_image(
            item.path,
            level=params.level,
            choice=params.choice,
            whole_px=whole_px,
            value_range=params.value_range,
        )

    def _look_up(self, item: Item) -> State:
        return self.journal.nothing() if self.params.again else self.journal.look_up(item)

    def _one(self, item: Item) -> Iterator[None]:
        state = self._look_up(item)
        if state.is_done:
            self.summary.skipped.append(item.name)
            return
        self._check_name(item)
        instances = self.journal.load(item) if state.is_predicted else None
        was_loaded = instances is not None
        if instances is None:
            state = self.journal.nothing()
            instances = yield from self._predict(item)
        shown = apply_settings(instances, self.params.for_people)
        if state.missing:
            self._write(item, state.missing, shown)
        self.journal.close(item, state)
        self.summary.n_cells += len(instances)
        # As float32, which scores are: 0.7 means the same number on both sides.
        self.summary.n_below += int((instances.scores < np.float32(self.params.score_thr)).sum())
        self.summary.n_shown += len(shown)
        (self.summary.rewritten if was_loaded else self.summary.predicted).append(item.name)

    def _check_name(self, item: Item) -> None:
        paths = [path_of(self.params.out_dir, item.name, word) for word in self.params.formats]
        names = [f'{item.name}.state.json', *(path.name for path in paths)]
        longest = max(len(name.encode()) for name in names)
        if longest > MAX_NAME_BYTES:
            raise ImageError(
                f'{item.path}: the names of its results would have {longest} bytes; file systems '
                f'take {MAX_NAME_BYTES}; give it a shorter name'
            )

    def _predict(self, item: Item) -> Generator[None, None, InstanceSet]:
        """Predict and save one image; returns its instances."""
        self.journal.begin(item)
        found: list[tuple[InstanceSet, Tile]] = []
        n_pixels = n_lit_pixels = 0
        with self._open(item) as reader:
            tiles = tiles_of(reader.image_hw, self.params)
            for batch, pictures in self._batches(reader, tiles):
                n_pixels += sum(picture[..., 0].size for picture in pictures)
                n_lit_pixels += sum(n_lit(picture) for picture in pictures)
                sets = self.detector.detect(pictures, item.name)
                for instances, tile in zip(sets, batch, strict=True):
                    found.append((instances, tile))
                    yield
            hw, downsample = reader.image_hw, reader.downsample
            if reader.value_range is not None:
                self.summary.ranges[item.name] = reader.value_range
            self._note(item, reader.says)
        instances, report = stitch(
            found, hw, name=item.name, image_id=item.image_id, params=StitchParams()
        )
        notes = [_note_of_cap([tile_set for tile_set, _ in found], self.detector.cap)]
        self._note(item, ', '.join([*filter(None, notes), *self.detector.notes, *_seams(report)]))
        if report.n_empty:
            self.summary.n_empty[item.name] = report.n_empty
        if is_nearly_black(n_lit_pixels, n_pixels):
            self._note(item, NEARLY_BLACK)
        provenance = self._provenance(item, downsample, report)
        save_predictions(self.journal.instances_path(item), Predictions((instances,), provenance))
        return instances

    def _batches(
        self, reader: ImageReader, tiles: Sequence[Tile]
    ) -> Iterator[tuple[list[Tile], list[Picture]]]:
        """Yield tiles with their pictures; while one batch is predicted, the next is read."""
        size = max(self.detector.batch_size, 1)
        batches = [list(tiles[i : i + size]) for i in range(0, len(tiles), size)]

        def read(batch: list[Tile]) -> list[Picture]:
            return [reader.read(*tile.window_yxyx) for tile in batch]

        if not self.params.n_workers:
            yield from ((batch, read(batch)) for batch in batches)
            return
        waiting: deque[tuple[list[Tile], Future[list[Picture]]]] = deque()
        with ThreadPoolExecutor(self.params.n_workers) as pool:
            for batch in batches:
                waiting.append((batch, pool.submit(read, batch)))
                if len(waiting) > self.params.n_workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()

    def _provenance(
        self, item: Item, downsample: float, report: StitchReport
    ) -> dict[str, JsonValue]:
        return {
            'split': '',
            'class_names': list(self.params.class_names),
            'code_commit': code_commit(),
            'versions': {**versions()},
            'settings_hash': self.journal.settings_hash,
            'input': item.fingerprint(),
            'downsample': downsample,
            'tiles': {**report.to_json()},
            **self.params.how_cut,
            **self.detector.identity,
            **self.detector.provenance,
        }

    def _write(self, item: Item, words: Sequence[str], shown: InstanceSet) -> None:
        with self._open(item) as reader:
            done = write_formats(self.params.out_dir, words, shown, reader, self.params.look)
        self._note(item, export.describe(done))

    def _note(self, item: Item, note: str) -> None:
        before = self.summary.notes.get(item.name)
        if note:
            self.summary.notes[item.name] = f'{before}; {note}' if before else note


def _note_of_cap(tile_sets: Sequence[InstanceSet], cap: int) -> str:
    lowest = [float(s.scores.min()) for s in tile_sets if 0 < cap <= len(s)]
    if not lowest:
        return ''
    return (
        f'{len(lowest)} of {len(tile_sets)} tiles hit the cap of {cap} instances, whatever was '
        f'lost scored no more than {max(lowest):.4f}'
    )


def _seams(report: StitchReport) -> list[str]:
    """Return what a person should know of the seams between tiles."""
    n = report.n_left_cut
    return [f'{n} cells are cut at a tile border'] if n else []

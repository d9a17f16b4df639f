"""Predict any images: files, folders, whole slides; and write what other programs read.

In: image paths and a detector (one model, or an ensemble). Out: per image ``<name>.npz`` with all
instances, the formats asked for, and ``<name>.state.json``, which is written last.
Invariant: an image whose state file fits its input and the settings is never predicted again, nor
is a tile of a larger image that is in ``<name>.tiles``; and a file that cannot be read costs its
own result and nothing else.
"""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np

from cellseg_mm.core.errors import CellSegError, ImageError
from cellseg_mm.core.files import DISK_ERRORS, JsonValue
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.progress import track
from cellseg_mm.core.provenance import code_commit, versions
from cellseg_mm.core.windows import resize
from cellseg_mm.data.image_reader import BY_REGION
from cellseg_mm.data.intensity import ValueRange, is_nearly_black
from cellseg_mm.fusion.settings import apply_settings
from cellseg_mm.predict.items import Item
from cellseg_mm.predict.params import (
    Detector,
    PredictParams,
    share_of,
    takes_whole_images,
    tiles_of,
)
from cellseg_mm.predict.slide import Looker, Slide, grid_of, keep_map, open_at, open_slide
from cellseg_mm.predict.state import Journal, State
from cellseg_mm.predict.summary import Summary
from cellseg_mm.predict.tile_store import TileResult
from cellseg_mm.predict.tiling import StitchParams, StitchReport, Tile, stitch
from cellseg_mm.results import export
from cellseg_mm.results.formats import OVERLAY, path_of, write_formats
from cellseg_mm.results.overlay import MAX_PICTURE_PX
from cellseg_mm.results.predictions import Predictions, save_predictions

logger = logging.getLogger(__name__)

MAX_NAME_BYTES = 255
MAX_SAVING = 4  # tiles that wait for the disk
NUMBER = re.compile(r'[0-9.]+')
COCO = 'coco'
TOO_LARGE_FOR_COCO = (
    'coco: the image has more pixels than the 32-bit counts of pycocotools; this project reads the '
    'file, pycocotools does not'
)
PART = (
    'this was part {} of {}: when all are done, the same command without --part puts the images '
    'together'
)
NEARLY_BLACK = (
    'the image is nearly black: all but a thousandth of its pixels are below a tenth of 0..255; '
    'look at it'
)


def predict(items: Sequence[Item], detector: Detector, params: PredictParams) -> Summary:
    """Predict images and write their results.

    Args:
        items: From :func:`look_for`.
        detector: What finds the cells.
        params: See :class:`PredictParams`.

    Returns:
        What happened. Files are in ``params.out_dir``; see the module's text.
    """
    run = Run(detector, params)
    part = params.part
    if part is not None and takes_whole_images(len(items), part):
        items, part = share_of(items, part), None
    n_tiles = [run.count_tiles(item) for item in items]
    steps = run.steps(items, n_tiles, part)
    bar = track(steps, description='predict (tiles)', total=sum(n_tiles), note=run.cells_so_far)
    for _ in bar:
        pass
    summary = run.finish()
    if params.part is not None:
        summary.asides.append(PART.format(*params.part))
    summary.asides += summary.range_texts()
    return summary


class Run:
    """Images on their way through one detector.

    Attributes:
        summary: What happened so far.
    """

    def __init__(self, detector: Detector, params: PredictParams) -> None:
        self.detector, self.params = detector, params
        self.summary = Summary(
            score_thr=params.score_thr,
            value_range=params.value_range,
            range_from=params.range_from,
        )
        self._looker = Looker(detector, params.n_workers)
        self._start = time.perf_counter()
        self._n_seen = 0
        self.journal = Journal.of(
            params.out_dir,
            params.formats,
            settings={**params.how_cut, 'detector': dict(detector.identity)},
            how_written=params.how_written,
        )

    def finish(self) -> Summary:
        """Return what happened."""
        self.summary.seconds += time.perf_counter() - self._start
        self.summary.seconds_looking += self._looker.seconds
        return self.summary

    def cells_so_far(self) -> str:
        """Return a note for the progress bar."""
        return f'{self._n_seen:,} cells'

    def count_tiles(self, item: Item) -> int:
        """Return how many tiles an image has, for the progress bar; 1 if it cannot be told."""
        try:
            if item.path.suffix.lower() not in BY_REGION or self._look_up(item).is_done:
                return 1
            # whole_px=0: no pixels are read
            with open_at(item, self.params, whole_px=0) as reader:
                return len(tiles_of(grid_of(reader, self.params).hw, self.params))
        except Exception:  # whatever it is, the image's own turn reports it
            return 1

    def steps(
        self, items: Sequence[Item], n_tiles: Sequence[int], part: tuple[int, int] | None = None
    ) -> Iterator[None]:
        """Work through the images, or a part of their tiles; one step per tile."""
        for number, (item, n) in enumerate(zip(items, n_tiles, strict=True)):
            n_done = 0
            work = self.complete(item) if part is None else self._look_at_share(item, number, part)
            for _ in self.guarded(item, work):
                n_done += 1
                yield
            for _ in range(n - n_done):
                yield

    def guarded(self, item: Item, work: Iterable[None]) -> Iterator[None]:
        """Pass on the steps of an image's work; what goes wrong there is its own failure."""
        try:
            yield from work
        except CellSegError as problem:
            self.summary.failed[item.name] = str(problem)
        except OSError as problem:
            if problem.errno not in DISK_ERRORS:
                logger.exception('%s: failed', item.path)
            where = problem.filename or item.path
            self.summary.failed[item.name] = (
                f'{where}: cannot be written or read ({problem.strerror or problem}); expected a '
                'folder with room and permission; make room, or name another folder for the '
                'results; the same command goes on'
            )
        except Exception as problem:
            # Whatever it is, the other images are not to blame; the log has the traceback.
            logger.exception('%s: failed', item.path)
            text = f'{item.path}: {type(problem).__name__}: {problem}'
            self.summary.failed[item.name] = text

    def _look_up(self, item: Item) -> State:
        return self.journal.nothing() if self.params.again else self.journal.look_up(item)

    def complete(self, item: Item) -> Iterator[None]:
        """Do whatever is missing of an image; one step per tile."""
        state = self._look_up(item)
        if state.is_done:
            self.journal.tiles(item).remove()  # a kill may have come between
            self.summary.skipped.append(item.name)
            return
        self._check_name(item)
        instances = self.journal.load(item) if state.is_predicted else None
        was_loaded = instances is not None
        if instances is None:
            state = self.journal.nothing()
            instances = yield from self._predict(item)
            if not len(instances):
                self._note(item, 'no cell was found')
        shown = apply_settings(instances, self.params.for_people)
        if state.missing:
            self._write(item, state.missing, shown)
        self.journal.close(item, state)
        self.journal.tiles(item).remove()
        self.summary.n_cells += len(instances)
        # As float32, which scores are: 0.7 means the same number on both sides.
        self.summary.n_below += int((instances.scores < np.float32(self.params.score_thr)).sum())
        self.summary.n_shown += len(shown)
        (self.summary.rewritten if was_loaded else self.summary.predicted).append(item.name)

    def _look_at_share(self, item: Item, number: int, part: tuple[int, int]) -> Iterator[None]:
        """Look at some tiles of an image, and keep them for whoever completes it."""
        if self._look_up(item).is_predicted:
            self.summary.skipped.append(item.name)
            return
        with open_slide(item, self.params, self.journal.tiles(item)) as slide:
            share = share_of(slide.chosen, part, first=number)
            waiting = set(slide.waiting())
            yield from self.look_at(slide, [tile for tile in share if tile in waiting])

    def waiting(self, item: Item) -> list[int] | None:
        """Return the numbers of an image's tiles that are still to be looked at; None if done."""
        if self._look_up(item).is_predicted:
            return None
        with open_slide(item, self.params, self.journal.tiles(item)) as slide:
            waiting = set(slide.waiting())
            return [k for k, tile in enumerate(slide.chosen) if tile in waiting]

    def look_at_numbers(self, item: Item, numbers: Sequence[int]) -> None:
        """Look at the tiles of :meth:`waiting` that nobody looked at since, and keep them."""
        with open_slide(item, self.params, self.journal.tiles(item)) as slide:
            tiles = [slide.chosen[k] for k in numbers]
            tiles = [tile for tile in tiles if not slide.store.has(tile)]
            for _ in self.look_at(slide, tiles):
                pass

    def look_at(self, slide: Slide, tiles: Sequence[Tile]) -> Iterator[None]:
        """Look at tiles and keep what was found; one step per tile.

        Writing waits for the disk while the next tile is looked at.
        """
        saving: deque[Future[None]] = deque()
        with ThreadPoolExecutor(1) as writer:
            for tile, result in self._looker.look(slide, tiles):
                saving.append(writer.submit(slide.store.save, tile, result))
                if len(saving) > MAX_SAVING:
                    saving.popleft().result()
                self.summary.n_tiles += 1
                self._n_seen += len(result.instances)
                yield
        for future in saving:
            future.result()

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
        store = self.journal.tiles(item)
        if self.params.again:
            store.remove()
        with open_slide(item, self.params, store) as slide:
            self._note(item, slide.reader.says)
            waiting = slide.waiting()
            for _ in range(slide.n_tiles - len(waiting)):
                yield
            if slide.n_tiles > 1:
                self.summary.n_kept += len(slide.chosen) - len(waiting)
                yield from self.look_at(slide, waiting)
            told = _Told()
            pairs = told.listen(self._results(slide))
            instances, report = stitch(
                pairs, slide.grid.hw, name=item.name, image_id=item.image_id, params=StitchParams()
            )
            if slide.n_tiles == 1:
                yield
            instances = self._in_full(slide, instances)
            keep_map(slide, self.params)
            provenance = self._provenance(slide, report)
        self._tell(slide, told, report)
        save_predictions(self.journal.instances_path(item), Predictions((instances,), provenance))
        return instances

    def _results(self, slide: Slide) -> Iterator[tuple[Tile, TileResult]]:
        """Yield the tiles' results; one that is not there, or damaged, is looked at."""
        for tile in slide.chosen:
            result = slide.store.load(tile)
            if result is not None:
                yield tile, result
            else:
                yield from self._looker.look(slide, [tile])

    def _in_full(self, slide: Slide, instances: InstanceSet) -> InstanceSet:
        """Return instances in the pixels of the results, without those outside of drawn regions."""
        instances = resize(instances, slide.grid.full_hw)
        if slide.tissue is None or not slide.tissue.is_drawn:
            return instances
        inside = slide.tissue.holds(instances)
        n_outside = int((~inside).sum())
        if n_outside:
            self._note(slide.item, f'{n_outside} cells outside of the regions were left out')
        return instances[inside]

    def _tell(self, slide: Slide, told: _Told, report: StitchReport) -> None:
        """Say what a person should know of an image."""
        item, summary = slide.item, self.summary
        summary.scales.append(slide.grid.says)
        summary.n_scaled += slide.grid.hw != slide.grid.full_hw
        if told.value_range is not None:
            summary.ranges[item.name] = told.value_range
        if slide.tissue is not None:
            self._note(item, slide.tissue.describe(len(slide.chosen), slide.n_tiles))
        notes = [told.of_cap(self.detector.cap), *told.notes(), *_seams(report)]
        self._note(item, ', '.join(filter(None, notes)))
        if report.n_empty:
            summary.n_empty[item.name] = report.n_empty
        if is_nearly_black(told.n_lit, told.n_pixels):
            self._note(item, NEARLY_BLACK)

    def _provenance(self, slide: Slide, report: StitchReport) -> dict[str, JsonValue]:
        um = slide.um_per_px
        return {
            'split': '',
            'class_names': list(self.params.class_names),
            'code_commit': code_commit(),
            'versions': {**versions()},
            'settings_hash': self.journal.settings_hash,
            'input': slide.item.fingerprint(),
            'downsample': slide.downsample,
            'tiles': {**report.to_json()},
            **self.params.how_cut,
            'um_per_px': None if um is None else [*um],
            'looked_at': {'level': slide.grid.level, 'hw': [*slide.grid.hw]},
            **self.detector.identity,
            **self.detector.provenance,
        }

    def _write(self, item: Item, words: Sequence[str], shown: InstanceSet) -> None:
        with ExitStack() as stack:
            reader = stack.enter_context(open_at(item, self.params))
            small = None
            enough = [h * w >= MAX_PICTURE_PX for h, w in reader.level_hws]
            if OVERLAY in words and reader.level == 0 and sum(enough) > 1:
                small = stack.enter_context(open_at(item, self.params, sum(enough) - 1))
            done = write_formats(
                self.params.out_dir, words, shown, reader, self.params.look, small=small
            )
        self._note(item, export.describe(done))
        if COCO in words and shown.image_hw[0] * shown.image_hw[1] >= 1 << 32:
            self._note(item, TOO_LARGE_FOR_COCO)

    def _note(self, item: Item, note: str) -> None:
        before = self.summary.notes.get(item.name)
        if note:
            self.summary.notes[item.name] = f'{before}; {note}' if before else note


class _Told:
    """What the tiles of an image told on their way: pixels, caps that were hit, notes."""

    def __init__(self) -> None:
        self.n_pixels = self.n_lit = self.n_tiles = 0
        self.value_range: ValueRange | None = None
        self._sizes: list[tuple[int, float]] = []
        self._notes: dict[str, None] = {}

    def listen(
        self, results: Iterable[tuple[Tile, TileResult]]
    ) -> Iterator[tuple[InstanceSet, Tile]]:
        """Pass on the instances."""
        for tile, result in results:
            self.n_pixels += result.n_pixels
            self.n_lit += result.n_lit
            self.value_range = result.value_range or self.value_range
            self._notes.update(dict.fromkeys(result.notes))
            scores = result.instances.scores
            self._sizes.append((len(scores), float(scores.min(initial=1))))
            yield result.instances, tile

    def notes(self) -> list[str]:
        """Return what detectors noted: of notes that differ in a number alone the last of all."""
        kinds: dict[str, str] = {}
        for note in sorted(self._notes):
            kinds[NUMBER.sub('#', note)] = note
        return [*kinds.values()]

    def of_cap(self, cap: int) -> str:
        """Return a sentence if tiles hit a detector's cap."""
        lowest = [score for n, score in self._sizes if 0 < cap <= n]
        if not lowest:
            return ''
        return (
            f'{len(lowest)} of {len(self._sizes)} tiles hit the cap of {cap} instances, whatever '
            f'was lost scored no more than {max(lowest):.4f}'
        )


def _seams(report: StitchReport) -> list[str]:
    """Return what a person should know of the seams between tiles."""
    n = report.n_left_cut
    return [f'{n} cells are cut at a tile border'] if n else []

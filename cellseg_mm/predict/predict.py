"""Predict any images: files, folders, whole slides; and write what other programs read.

In: image paths and a detector (one model, or an ensemble). Out: per image ``<name>.npz`` with all
instances, the formats asked for, and ``<name>.state.json``, which is written last.
Invariant: an image whose state file fits its input and the settings is never predicted again, and
a file that cannot be read costs its own result and nothing else.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

import numpy as np

from cellseg_mm.core.errors import CellSegError, ImageError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.progress import track
from cellseg_mm.core.provenance import code_commit, versions
from cellseg_mm.data.image_reader import SUFFIXES, WHOLE_PX, ImageReader, open_image
from cellseg_mm.data.intensity import is_nearly_black, n_lit
from cellseg_mm.fusion.settings import apply_settings
from cellseg_mm.predict.items import Item
from cellseg_mm.predict.params import Detector, Picture, PredictParams, tiles_of
from cellseg_mm.predict.state import Journal, State
from cellseg_mm.predict.summary import Summary, range_texts
from cellseg_mm.predict.tiling import StitchParams, StitchReport, Tile, stitch
from cellseg_mm.results import export
from cellseg_mm.results.formats import path_of, write_formats
from cellseg_mm.results.predictions import Predictions, save_predictions

logger = logging.getLogger(__name__)

MAX_NAME_BYTES = 255
NEARLY_BLACK = (
    'the image is nearly black: all but a thousandth of its pixels are below a tenth of 0..255; '
    'look at it'
)


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
    run.summary.asides += range_texts(run.summary, params.value_range, params.range_from)
    return run.summary


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

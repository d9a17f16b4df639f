"""One image on its way to instances: opened at the right size, cut, searched tile by tile.

In: an item and what was asked for. Out: what was found in each tile. Invariant: which tiles are
looked at, and at which pixel size, depends on the image and the settings alone, never on who looks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from cellseg_mm.core.layout import TISSUE_SUFFIX
from cellseg_mm.data.image_reader import WHOLE_PX, ImageReader, open_image
from cellseg_mm.data.intensity import n_lit
from cellseg_mm.data.pixel_size import Um
from cellseg_mm.predict import tissue
from cellseg_mm.predict.items import Item
from cellseg_mm.predict.params import Detector, Picture, PredictParams, is_cut, tiles_of
from cellseg_mm.predict.scaling import Grid, ScaledReader, choose_grid
from cellseg_mm.predict.tile_store import TileResult, TileStore
from cellseg_mm.predict.tiling import Tile
from cellseg_mm.predict.tissue import TissueMap


@dataclass(frozen=True, slots=True)
class Slide:
    """An open image.

    Attributes:
        item: Which one.
        reader: Reads it in the pixels of ``grid``.
        grid: In which pixels cells are looked for.
        downsample: Pixels of the largest level per pixel of the results.
        um_per_px: Height and width of a pixel of the results; None if nobody knows.
        n_tiles: All tiles.
        chosen: Those that are looked at.
        tissue: Where cells are looked for; None is everywhere.
        store: Keeps tiles that are done.
    """

    item: Item
    reader: ImageReader
    grid: Grid
    downsample: float
    um_per_px: Um | None
    n_tiles: int
    chosen: tuple[Tile, ...]
    tissue: TissueMap | None
    store: TileStore

    def waiting(self) -> list[Tile]:
        """Return the tiles that are still to be looked at."""
        return [tile for tile in self.chosen if not self.store.has(tile)]


@contextmanager
def open_at(
    item: Item, params: PredictParams, level: int | None = None, *, whole_px: int = WHOLE_PX
) -> Iterator[ImageReader]:
    """Open an image at the level of the results, or another.

    Raises:
        CellSegError: See ``open_image``.
    """
    with open_image(
        item.path,
        level=params.level or 0 if level is None else level,
        choice=params.choice,
        whole_px=whole_px,
        value_range=params.value_range,
    ) as reader:
        if params.um_per_px is not None:
            reader.full_um_per_px = params.um_per_px
        yield reader


def grid_of(reader: ImageReader, params: PredictParams) -> Grid:
    """Return in which pixels cells are looked for."""
    return choose_grid(
        reader.level_hws,
        reader.full_um_per_px,
        params.model_um_per_px,
        level=params.level,
        where=str(reader.path),
    )


@contextmanager
def open_slide(item: Item, params: PredictParams, store: TileStore) -> Iterator[Slide]:
    """Open an image, and decide which of its tiles are looked at.

    Raises:
        CellSegError: The image or the file of its regions cannot be read.
    """
    with ExitStack() as stack:
        full = stack.enter_context(open_at(item, params))
        grid = grid_of(full, params)
        reader = full
        if grid.level != full.level:
            reader = stack.enter_context(open_at(item, params, grid.level))
        if reader.image_hw != grid.hw:
            reader = ScaledReader(reader, grid.hw)
        found = _tissue_of(full, item, params, store, is_cut=is_cut(grid.hw, params))
        tiles = tiles_of(grid.hw, params)
        chosen = tiles
        if found is not None:
            chosen = [tile for tile in tiles if found.touches(tile.window_yxyx, grid.hw)]
        yield Slide(
            item=item,
            reader=reader,
            grid=grid,
            downsample=full.downsample,
            um_per_px=full.um_per_px,
            n_tiles=len(tiles),
            chosen=tuple(chosen),
            tissue=found,
            store=store,
        )


def _tissue_of(
    full: ImageReader, item: Item, params: PredictParams, store: TileStore, *, is_cut: bool
) -> TissueMap | None:
    word = params.tissue
    if word not in ('slides', 'auto', 'off'):
        first_hw = full.level_hws[0]
        return tissue.read_regions(tissue.regions_file(word, item.name), first_hw)
    if word == 'off' or not is_cut or (word == 'slides' and len(full.level_hws) == 1):
        return None
    known = TissueMap.load(store.map_path)
    if known is not None:
        return known  # another part made it
    level = tissue.best_level(full.level_hws, tissue.MAP_PX)
    with open_at(item, params, level) as small:
        found = tissue.find_tissue(tissue.overview(small, red_blue_swapped=params.red_blue_swapped))
    found.save(store.map_path)
    return found


def keep_map(slide: Slide, params: PredictParams) -> None:
    """Write the map of the tissue beside the results."""
    path = params.out_dir / f'{slide.item.name}{TISSUE_SUFFIX}'
    if slide.tissue is None:
        path.unlink(missing_ok=True)  # of other settings
    else:
        slide.tissue.save(path)


class Looker:
    """Looks at tiles with a detector, and counts the time.

    Attributes:
        seconds: Time within the detector.
    """

    def __init__(self, detector: Detector, n_workers: int) -> None:
        self.detector, self.n_workers = detector, n_workers
        self.seconds = 0.0

    def look(self, slide: Slide, tiles: Sequence[Tile]) -> Iterator[tuple[Tile, TileResult]]:
        """Yield what is in each tile; while one batch is looked at, the next is read."""
        for batch, pictures in self._batches(slide.reader, tiles):
            start = time.perf_counter()
            sets = self.detector.detect(pictures, slide.item.name)
            self.seconds += time.perf_counter() - start
            for instances, tile, picture in zip(sets, batch, pictures, strict=True):
                yield (
                    tile,
                    TileResult(
                        instances.without_probs(),
                        picture[..., 0].size,
                        n_lit(picture),
                        tuple(self.detector.notes),
                        slide.reader.value_range,
                    ),
                )

    def _batches(
        self, reader: ImageReader, tiles: Sequence[Tile]
    ) -> Iterator[tuple[list[Tile], list[Picture]]]:
        size = max(self.detector.batch_size, 1)
        batches = [list(tiles[i : i + size]) for i in range(0, len(tiles), size)]

        def read(batch: list[Tile]) -> list[Picture]:
            return [reader.read(*tile.window_yxyx) for tile in batch]

        if not self.n_workers:
            yield from ((batch, read(batch)) for batch in batches)
            return
        waiting: deque[tuple[list[Tile], Future[list[Picture]]]] = deque()
        with ThreadPoolExecutor(self.n_workers) as pool:
            for batch in batches:
                waiting.append((batch, pool.submit(read, batch)))
                if len(waiting) > self.n_workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()

"""Tiles that are done already: one file each, until their image is whole.

In: what was found in a tile. Out: the same, in this process or another, today or after a kill.
Invariant: a file is whole or not there, and lies in a folder that is named by everything which
decides about its content, so that any number of processes may write and none reads what is stale.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from cellseg_mm.core.errors import PredictionError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.layout import TILES_SUFFIX, TISSUE_SUFFIX
from cellseg_mm.data.intensity import ValueRange
from cellseg_mm.predict.tiling import Tile
from cellseg_mm.results.predictions import Predictions, load_predictions, save_predictions


@dataclass(frozen=True, slots=True)
class TileResult:
    """What was found in a tile.

    Attributes:
        instances: In the tile's coordinates.
        n_pixels: Of the tile.
        n_lit: Pixels that are not nearly black.
        notes: What the detector noted of the image until then.
        value_range: What became 0 and 255; None for values of up to 8 bits.
    """

    instances: InstanceSet
    n_pixels: int
    n_lit: int
    notes: tuple[str, ...] = ()
    value_range: ValueRange | None = None


@dataclass(frozen=True, slots=True)
class TileStore:
    """The tiles of one image.

    Attributes:
        folder: ``<name>.tiles``, of all settings.
        key: Stands for the image and everything that decides about its instances.
    """

    folder: Path
    key: str

    @classmethod
    def of(cls, out_dir: Path, name: str, key: str) -> TileStore:
        """Return the store of an image's results."""
        return cls(out_dir / f'{name}{TILES_SUFFIX}', key)

    @property
    def map_path(self) -> Path:
        """Where the map of the tissue waits for the image to be whole."""
        return self.folder / self.key / f'map{TISSUE_SUFFIX}'

    def _path(self, tile: Tile) -> Path:
        y0, x0, _, _ = tile.window_yxyx
        return self.folder / self.key / f'{y0}_{x0}.npz'

    def has(self, tile: Tile) -> bool:
        """Tell whether a tile is there."""
        return self._path(tile).is_file()

    def save(self, tile: Tile, result: TileResult) -> None:
        """Keep a tile.

        Raises:
            OSError: The folder cannot be written, or the disk is full.
        """
        notes: list[JsonValue] = [*result.notes]
        about: dict[str, JsonValue] = {
            'window': [*tile.window_yxyx],
            'n_pixels': result.n_pixels,
            'n_lit': result.n_lit,
            'notes': notes,
        }
        if result.value_range is not None:
            about['value_range'] = result.value_range.to_json()
        instances = result.instances.without_probs()
        save_predictions(self._path(tile), Predictions((instances,), about))

    def load(self, tile: Tile) -> TileResult | None:
        """Return a tile; None if it is not there, or damaged."""
        try:
            found = load_predictions(self._path(tile))
            (instances,), about = found.sets, found.provenance
            return TileResult(
                instances,
                int(about['n_pixels']),  # type: ignore[arg-type]
                int(about['n_lit']),  # type: ignore[arg-type]
                tuple(str(note) for note in about['notes']),  # type: ignore[union-attr]
                ValueRange.from_json(about.get('value_range')),
            )
        except (PredictionError, ValueError, KeyError, TypeError):
            return None

    def remove(self) -> None:
        """Take away all tiles, also those of other settings."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder, ignore_errors=True)

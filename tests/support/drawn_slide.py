"""Drawn slides with known cells: islands of tissue on glass, as a TIFF pyramid of any size."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import tifffile

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.predict.params import PredictParams

GLASS, TISSUE, NUCLEUS = 243, (226, 186, 208), (92, 60, 130)
STEP_UM = 24.0
RADIUS_UM = (3.0, 6.0)
JITTER_UM = 3.0
SHIFT = 4  # OpenCV draws in sixteenths of a px
ISLANDS = ((0.30, 0.28, 0.05), (0.62, 0.70, 0.075), (0.75, 0.22, 0.04))  # y, x, radius; of the side


@dataclass(frozen=True)
class DrawnSlide:
    """A slide that exists as a function of place.

    Attributes:
        side: Height and width of the largest level in px.
        um_per_px: Side of its pixels.
        islands: Discs of tissue: y, x and radius as parts of the side.
        step_um: There is a cell in each square of that side.
    """

    side: int
    um_per_px: float
    islands: Sequence[tuple[float, float, float]] = ISLANDS
    step_um: float = STEP_UM

    @cached_property
    def cells(self) -> np.ndarray:
        """Centre y and x, and two radii of each cell in px, (N, 4), by y."""
        step, found = self.step_um / self.um_per_px, []
        rng = np.random.default_rng(0)
        for y, x, radius in self.islands:
            reach = radius * self.side - step  # whole cells within the tissue
            ticks = np.arange(-reach, reach, step)
            grid = np.stack(np.meshgrid(ticks, ticks, indexing='ij'), axis=-1).reshape(-1, 2)
            grid = grid[np.hypot(*grid.T) < reach]
            grid += rng.uniform(-JITTER_UM, JITTER_UM, grid.shape) / self.um_per_px
            grid += np.array([y, x]) * self.side
            radii = rng.uniform(*RADIUS_UM, grid.shape) / self.um_per_px
            found.append(np.concatenate([grid, radii], axis=1))
        cells = np.concatenate(found)
        return cells[np.argsort(cells[:, 0])]

    def draw(self, y0: int, x0: int, hw: tuple[int, int], shrink: int) -> np.ndarray:
        """Return a window of a level, RGB; the window counts in px of the level."""
        picture = np.full((*hw, 3), GLASS, dtype=np.uint8)
        h, w = hw
        for y, x, radius in np.array(self.islands) * self.side / shrink:
            near_y, near_x = np.clip(y, y0, y0 + h), np.clip(x, x0, x0 + w)
            if np.hypot(near_y - y, near_x - x) <= radius:
                self._ellipse(picture, y - y0, x - x0, (radius, radius), TISSUE)
        if (picture == GLASS).all():
            return picture
        reach = RADIUS_UM[1] / self.um_per_px
        rows = [y0 * shrink - reach, (y0 + h) * shrink + reach]
        first, last = np.searchsorted(self.cells[:, 0], rows)
        cells = self.cells[first:last] / shrink
        near = (cells[:, 0] + cells[:, 2] > y0) & (cells[:, 0] - cells[:, 2] < y0 + h)
        near &= (cells[:, 1] + cells[:, 3] > x0) & (cells[:, 1] - cells[:, 3] < x0 + w)
        for y, x, radius_y, radius_x in cells[near].tolist():
            self._ellipse(picture, y - y0, x - x0, (radius_y, radius_x), NUCLEUS)
        return picture

    @staticmethod
    def _ellipse(
        picture: np.ndarray, y: float, x: float, radii: tuple[float, float], colour: tuple
    ) -> None:
        scale = 1 << SHIFT
        # the middle of the first pixel is OpenCV's origin
        centre = (round((x - 0.5) * scale), round((y - 0.5) * scale))
        # it fills the pixels under the outline too: about half a px more
        axes = tuple(max(round((radius - 0.5) * scale), 0) for radius in radii[::-1])
        cv2.ellipse(picture, centre, axes, 0, 0, 360, colour, cv2.FILLED, cv2.LINE_8, SHIFT)

    def _tiles(self, shrink: int, tile: int) -> Iterator[np.ndarray]:
        side = self.side // shrink
        for y0 in range(0, side, tile):
            for x0 in range(0, side, tile):
                yield self.draw(y0, x0, (tile, tile), shrink)

    def write(self, path: Path, *, tile: int = 512, shrinks: Sequence[int] = (4, 16)) -> Path:
        """Write it as a TIFF whose resolution tags say the size of a pixel."""
        common = {
            'dtype': np.uint8,
            'tile': (tile, tile),
            'photometric': 'rgb',
            'compression': 'zlib',
            'compressionargs': {'level': 1},
            'resolutionunit': 'CENTIMETER',
        }
        with tifffile.TiffWriter(path, bigtiff=True) as writer:
            for shrink in (1, *shrinks):
                side = self.side // shrink
                per_cm = 1e4 / (self.um_per_px * shrink)
                writer.write(
                    self._tiles(shrink, tile),
                    shape=(side, side, 3),
                    resolution=(per_cm, per_cm),
                    subifds=len(shrinks) if shrink == 1 else None,
                    subfiletype=int(shrink > 1),
                    **common,
                )
        return path


class DarkCells:
    """Finds every dark part: a detector that takes milliseconds, and counts its calls."""

    identity = {'detector': 'dark'}
    batch_size = 1
    cap = 0
    notes = ()

    def __init__(self, um_per_px: float | None = None) -> None:
        members = [] if um_per_px is None else [{'um_per_px': um_per_px}]
        self.provenance, self.n_calls = {'members': members}, 0

    def detect(self, pictures: Sequence[np.ndarray], name: str) -> list[InstanceSet]:
        """Find them."""
        self.n_calls += len(pictures)
        return [self._find(picture[..., 1] < 120, name) for picture in pictures]

    @staticmethod
    def _find(dark: np.ndarray, name: str) -> InstanceSet:
        n, ids, stats, _ = cv2.connectedComponentsWithStats(dark.astype(np.uint8), connectivity=4)
        boxes = stats[1:, :4]
        crops = [
            ids[y : y + h, x : x + w] == k for k, (x, y, w, h) in enumerate(boxes.tolist(), start=1)
        ]
        return InstanceSet.from_crops(
            name,
            0,
            dark.shape,
            crops=crops,
            offsets_yx=boxes[:, [1, 0]].astype(np.int64),
            class_ids=np.zeros(n - 1),
            scores=np.full(n - 1, 0.9),
        )


def slide_params(out_dir: Path, **more) -> PredictParams:
    """Return parameters for one class."""
    settings = {'class_names': ('cell',), 'class_colours': ((213, 94, 0),), 'formats': ('csv',)}
    return PredictParams(**{'out_dir': out_dir, 'n_workers': 0, **settings, **more})


def recipe(out_dir: Path, um_per_px: float | None, more: dict) -> tuple[DarkCells, PredictParams]:
    """Make the detector and its parameters, in any process."""
    model_um = None if um_per_px is None else (um_per_px, um_per_px)
    return DarkCells(um_per_px), slide_params(out_dir, model_um_per_px=model_um, **more)


def results_of(folder: Path) -> dict[str, object]:
    """Return the content of all files of a folder of results by name, bytes as they are.

    Of predictions all but the commit, which moves on where people work on the code.
    """
    found: dict[str, object] = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        found[path.name] = path.read_bytes()
        if path.suffix == '.npz':
            with zipfile.ZipFile(path) as archive:
                arrays = {name: archive.read(name) for name in archive.namelist()}
            header = arrays.pop('header.npy')
            header = json.loads(header[header.index(b'{"format"') :])
            header['provenance'].pop('code_commit')
            found[path.name] = (header, arrays)
    return found

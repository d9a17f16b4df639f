"""Where on a slide there is tissue: glass and pen are not searched for cells.

In: a slide at low resolution, or regions that a person drew. Out: a :class:`TissueMap`, which tells
which tiles are looked at. Invariant: only what is bright, grey and like the slide's own glass, or
as green or blue as a marker, is left out; where no glass is found everything is tissue.

The rule (docs/slides.md), on the map's pixels:

1. Glass is grey (its channels differ by at most ``GREY``) and bright (no channel below ``BRIGHT``).
   Its level is the most frequent darkest channel of such pixels; without ``LEAST_GLASS`` of them
   nothing is left out. Grey, bright pixels that are darker than it by no more than a threshold are
   glass: Otsu's of these differences, held within ``THRESHOLDS``.
2. Pen has a green channel above its red one by ``PEN_GREEN``, and colour (``PEN_COLOUR``). Where
   more than ``MOST_PEN`` of what is no glass looks like it, it is a stain, and nothing is pen.
3. Glass within tissue of less than ``HOLE`` of the map is tissue too, and all tissue grows by
   ``GROW`` pixels of the map.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core import files
from cellseg_mm.core.errors import ConfigError, ImageError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.windows import boxes_and_areas
from cellseg_mm.data.regions import ImageReader, Picture

GREY, BRIGHT = 20, 170
LEAST_GLASS = 0.01
THRESHOLDS = (8, 25)
PEN_GREEN, PEN_COLOUR, MOST_PEN = 30, 60, 0.2
HOLE = 1e-4
GROW = 2

MAP_PX = 2048  # longest side of a map that is made of an image; 40 px of a slide of 80,000 px
REGION_MAP_PX = 4096  # the same of regions that were drawn
BLOCK_PX = 2048

GLASS, PEN, TISSUE = 0, 128, 255  # values in the picture that is kept


@dataclass(frozen=True, slots=True)
class TissueMap:
    """What is looked at of an image.

    Attributes:
        kinds: (h, w) uint8 of the whole image: GLASS, PEN or TISSUE.
        is_drawn: A person drew it: cells whose middle lies outside are left out.
    """

    kinds: NDArray[np.uint8]
    is_drawn: bool = False

    def touches(self, window_yxyx: tuple[int, int, int, int], hw: tuple[int, int]) -> bool:
        """Tell whether there is tissue in a window of the image at size ``hw``."""
        y0, x0, y1, x1 = window_yxyx
        (height, width), (h, w) = hw, self.kinds.shape
        rows = slice(y0 * h // height, -(-y1 * h // height))
        columns = slice(x0 * w // width, -(-x1 * w // width))
        return bool((self.kinds[rows, columns] == TISSUE).any())

    def holds(self, instances: InstanceSet) -> NDArray[np.bool_]:
        """Tell of which instances the middle of the mask's box lies in tissue."""
        boxes, _ = boxes_and_areas(instances)
        (height, width), (h, w) = instances.image_hw, self.kinds.shape
        y = (boxes[:, 1] + boxes[:, 3]) * h // (2 * height)
        x = (boxes[:, 0] + boxes[:, 2]) * w // (2 * width)
        inside: NDArray[np.bool_] = self.kinds[np.minimum(y, h - 1), np.minimum(x, w - 1)] == TISSUE
        return inside

    def describe(self, n_chosen: int, n_tiles: int) -> str:
        """Return a sentence for people."""
        tissue, pen = ((self.kinds == kind).mean() for kind in (TISSUE, PEN))
        tiles = f'{n_chosen} of {n_tiles} tiles were looked at'
        if self.is_drawn:
            return f'regions: {tissue:.1%} of the image; {tiles}'
        left = f' and {pen:.1%} pen' if pen else ''
        return f'tissue: {tissue:.1%} of the image ({1 - tissue - pen:.1%} glass{left}); {tiles}'

    def save(self, path: Path) -> None:
        """Write the map as a picture."""
        _, content = cv2.imencode('.png', self.kinds)
        files.write_bytes(path, content.tobytes())

    @classmethod
    def load(cls, path: Path) -> TissueMap | None:
        """Return a map that was saved; None if there is none, or it is damaged."""
        try:
            content = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        except OSError:
            return None
        kinds = cv2.imdecode(content, cv2.IMREAD_GRAYSCALE) if content.size else None
        return None if kinds is None else cls(kinds.astype(np.uint8, copy=False))


def find_tissue(picture: Picture) -> TissueMap:
    """Find tissue in a whole image at low resolution, in true colours; see the module's text."""
    low = picture.min(axis=2).astype(np.int16)
    colour = picture.max(axis=2).astype(np.int16) - low
    pale = (colour <= GREY) & (low >= BRIGHT)
    kinds = np.full(low.shape, TISSUE, dtype=np.uint8)
    if pale.mean() < LEAST_GLASS:
        return TissueMap(kinds)
    level = int(np.bincount(low[pale]).argmax())
    darker = np.clip(level - low, 0, 255).astype(np.uint8)
    otsu, _ = cv2.threshold(darker, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    is_glass = pale & (darker <= min(max(otsu, THRESHOLDS[0]), THRESHOLDS[1]))
    green = picture[..., 1].astype(np.int16) - picture[..., 0]
    is_pen = (green > PEN_GREEN) & (colour >= PEN_COLOUR)
    if is_pen.sum() > MOST_PEN * (~is_glass).sum():
        is_pen[:] = False
    is_tissue = _grown(~is_glass & ~is_pen)
    kinds[:] = np.where(is_tissue, TISSUE, np.where(is_pen, PEN, GLASS))
    return TissueMap(kinds)


def _grown(is_tissue: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Close small holes, and grow."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(
        (~is_tissue).astype(np.uint8), connectivity=4
    )
    is_small = stats[:, cv2.CC_STAT_AREA] < HOLE * is_tissue.size
    is_small[0] = True  # label 0 is the tissue itself
    side = 2 * GROW + 1
    grown = cv2.dilate(is_small[labels].astype(np.uint8), np.ones((side, side), np.uint8))
    return grown.astype(bool)


def overview(reader: ImageReader, *, red_blue_swapped: bool = False) -> Picture:
    """Return a whole image in true colours, shrunk by a whole factor to ``MAP_PX`` or less.

    Memory follows the result and one block.
    """
    height, width = reader.image_hw
    factor = max(math.ceil(max(height, width) / MAP_PX), 1)
    picture = np.empty((-(-height // factor), -(-width // factor), 3), dtype=np.uint8)
    block = max(BLOCK_PX // factor, 1) * factor
    for y0 in range(0, height, block):
        for x0 in range(0, width, block):
            pixels = reader.read(y0, x0, min(y0 + block, height), min(x0 + block, width))
            size_wh = (-(-pixels.shape[1] // factor), -(-pixels.shape[0] // factor))
            shrunk = cv2.resize(pixels, size_wh, interpolation=cv2.INTER_AREA)
            top, left = y0 // factor, x0 // factor
            picture[top : top + size_wh[1], left : left + size_wh[0]] = shrunk
    return picture[..., ::-1] if red_blue_swapped else picture


def best_level(level_hws: Sequence[tuple[int, int]], longest_px: int) -> int:
    """Return the coarsest level whose longest side is not below this, or the first."""
    return max((k for k, hw in enumerate(level_hws) if max(hw) >= longest_px), default=0)


def regions_file(word: str, name: str) -> Path:
    """Return the file of an image's regions: ``word``, or ``<name>.geojson`` in that folder."""
    path = Path(word)
    return path / f'{name}.geojson' if path.is_dir() else path


def read_regions(path: Path, full_hw: tuple[int, int]) -> TissueMap:
    """Return what lies inside the polygons of a GeoJSON file, such as annotations of QuPath.

    Args:
        path: Coordinates are px of the image's first level.
        full_hw: Height and width of that level.

    Raises:
        ImageError: The file cannot be read, has no polygon, or none that meets the image.
    """
    try:
        content = json.loads(files.regular(path).read_text(encoding='utf-8'))
        polygons = [polygon for geometry in _geometries(content) for polygon in _parts(geometry)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise ImageError(
            f'{path}: cannot be read ({str(problem)[:80]}); expected GeoJSON with the regions that '
            'are to be searched; export them from QuPath again'
        ) from problem
    shrink = max(math.ceil(max(full_hw) / REGION_MAP_PX), 1)
    kinds = np.zeros([-(-n // shrink) for n in full_hw], dtype=np.uint8)
    for rings in polygons:
        one = np.zeros_like(kinds)  # rings of one polygon by even and odd: the others are holes
        # Coordinates count from pixels' corners, OpenCV's from their middles
        corners = [np.rint((ring / shrink - 0.5) * 256).astype(np.int32) for ring in rings]
        cv2.fillPoly(one, corners, TISSUE, shift=8)
        np.maximum(kinds, one, out=kinds)
    if not kinds.any():
        raise ImageError(
            f'{path}: {len(polygons)} polygons, none within the image of {full_hw[0]} x '
            f'{full_hw[1]} px; expected at least one region in px of the full image; check that '
            'it is of this image'
        )
    return TissueMap(kinds, is_drawn=True)


def _geometries(content: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - JSON, checked by use
    if isinstance(content, list):
        return [geometry for item in content for geometry in _geometries(item)]
    if content['type'] == 'FeatureCollection':
        return _geometries(content['features'])
    if content['type'] == 'Feature':
        return _geometries(content['geometry'])
    if content['type'] == 'GeometryCollection':
        return _geometries(content['geometries'])
    return [content]


def _parts(geometry: dict[str, Any]) -> list[list[NDArray[np.float64]]]:
    kinds = {'Polygon': 1, 'MultiPolygon': 2}
    if geometry['type'] not in kinds:
        return []  # points and lines have no inside
    shapes = geometry['coordinates']
    shapes = [shapes] if geometry['type'] == 'Polygon' else shapes
    return [[np.array(ring, dtype=np.float64)[:, :2] for ring in rings] for rings in shapes]


def check_word(word: str) -> None:
    """Accept ``slides``, ``auto``, ``off``, and a file or folder that is there.

    Raises:
        ConfigError: It is none of these.
    """
    if word not in ('slides', 'auto', 'off') and not Path(word).exists():
        raise ConfigError(
            f'--tissue {word}: no such file; expected slides, auto, off, a GeoJSON file, or a '
            'folder with <name>.geojson for each image; check the path'
        )


def mark_of(word: str) -> str:
    """Return what changes when other parts of images are looked at: the word, or the files' hash.

    Raises:
        ConfigError: A file cannot be read.
    """
    path = Path(word)
    if word in ('auto', 'off'):
        return word
    found = sorted(path.glob('*.geojson')) if path.is_dir() else [path]
    try:
        texts = [f'{one.name}\n{files.regular(one).read_text(encoding="utf-8")}' for one in found]
    except (OSError, ValueError) as problem:
        raise ConfigError(
            f'--tissue {word}: cannot be read ({problem}); expected GeoJSON; check the file'
        ) from problem
    return files.text_hash('\n'.join(texts))

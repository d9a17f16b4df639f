"""Pictures that a person looks at: cells outlined in the colour of their class.

In: an RGB image, InstanceSets, and the colours of the config's metainfo. Out: (H, W, 3) uint8 RGB.
Invariant: an outline covers only pixels of its own mask, so touching cells both stay visible, and
where cells overlap the higher score is drawn last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core import files
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.windows import boxes_and_areas, crop_to
from cellseg_mm.data.intensity import ValueRange
from cellseg_mm.data.labels import read_image
from cellseg_mm.data.tiff import DEFAULT_MAX_PIXELS
from cellseg_mm.results.measure import RegionReader

Picture = NDArray[np.uint8]  # (H, W, 3) RGB
Colour = Sequence[int]

FONT = cv2.FONT_HERSHEY_SIMPLEX
STRIP_PX = 28
GAP_PX = 8
MAX_PICTURE_PX = 25_000_000  # 5000 x 5000: what viewers still open with ease
BLOCK_PX = 2048


def read_rgb(
    path: Path | str,
    *,
    red_blue_swapped: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    value_range: ValueRange | None = None,
) -> Picture:
    """Read an image in true colours.

    Args:
        path: See ``labels.read_image``.
        red_blue_swapped: The file holds blue where red belongs, as this collection's do.
        max_pixels: Most pixels that are accepted.
        value_range: See ``labels.read_image``.

    Raises:
        ImageError: See ``labels.read_image``.
    """
    stored = read_image(path, max_pixels=max_pixels, value_range=value_range)
    return np.ascontiguousarray(stored[..., ::-1]) if red_blue_swapped else stored


def draw_overlay(
    image_rgb: Picture,
    instances: InstanceSet,
    class_colours: Sequence[Colour],
    *,
    line_px: int = 2,
) -> Picture:
    """Outline every cell.

    Args:
        image_rgb: (H, W, 3) uint8; not changed.
        instances: Cells of this image.
        class_colours: RGB of each class.
        line_px: Width of the outlines, inwards from the mask's edge.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: The image has another size than the instances', or a class has no colour.
    """
    if image_rgb.shape != (*instances.image_hw, 3) or image_rgb.dtype != np.uint8:
        raise ValueError(
            f'{instances.name}: the image has shape {image_rgb.shape} and type {image_rgb.dtype}, '
            f'expected {(*instances.image_hw, 3)} uint8'
        )
    _check_classes(instances, class_colours)
    picture = np.ascontiguousarray(image_rgb).copy()
    _draw_outlines(picture, instances, class_colours, line_px)
    return picture


def _check_classes(instances: InstanceSet, class_colours: Sequence[Colour]) -> None:
    highest = int(instances.class_ids.max(initial=-1))
    if highest >= len(class_colours):
        raise ValueError(
            f'{instances.name}: class {highest} has no colour, {len(class_colours)} were given'
        )


def _draw_outlines(
    picture: Picture, instances: InstanceSet, class_colours: Sequence[Colour], line_px: int
) -> None:
    crops, offsets = instances.crops()
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    for i in np.argsort(-instances.scores, kind='stable')[::-1].tolist():
        mask = crops[i].view(np.uint8)
        if not mask.size:
            continue
        # Outside the crop is background, also at the image's edge: a cut cell gets a closed line.
        inside = cv2.erode(
            mask, cross, iterations=line_px, borderType=cv2.BORDER_CONSTANT, borderValue=0
        )
        (y, x), (h, w) = offsets[i].tolist(), mask.shape
        colour = np.asarray(class_colours[int(instances.class_ids[i])], dtype=np.uint8)
        picture[y : y + h, x : x + w][mask > inside] = colour


def draw_large(
    read: RegionReader,
    instances: InstanceSet,
    class_colours: Sequence[Colour],
    *,
    class_names: Sequence[str] = (),
    max_pixels: int = MAX_PICTURE_PX,
    line_px: int = 2,
) -> Picture:
    """Outline the cells of an image of any size, shrunk by a whole factor if it is large.

    Args:
        read: Reads regions in true colours; see ``measure.RegionReader``.
        instances: Cells of the image.
        class_colours: RGB of each class.
        class_names: Adds a legend.
        max_pixels: Most pixels of the picture.
        line_px: Width of the outlines in the picture.

    Returns:
        (H / f, W / f, 3) uint8, rounded up, with the least f that ``max_pixels`` allows. Memory
        follows the picture and one block of the image.
    """
    height, width = instances.image_hw
    factor = max(math.ceil(math.sqrt(height * width / max_pixels)), 1)
    if factor == 1:
        picture = draw_overlay(read(0, 0, height, width), instances, class_colours, line_px=line_px)
    else:
        picture = _draw_blocks(read, instances, class_colours, factor, line_px * factor)
    if not class_names:
        return picture
    counts = np.bincount(instances.class_ids, minlength=len(class_names)).tolist()
    strip = draw_legend(picture.shape[1], class_colours, class_names, counts=counts)
    return np.concatenate([picture, strip])


def _draw_blocks(
    read: RegionReader,
    instances: InstanceSet,
    class_colours: Sequence[Colour],
    factor: int,
    line_px: int,
) -> Picture:
    height, width = instances.image_hw
    picture = np.empty((-(-height // factor), -(-width // factor), 3), dtype=np.uint8)
    left, top, right, bottom = boxes_and_areas(instances)[0].T
    block = max(BLOCK_PX // factor, 1) * factor
    for y0 in range(0, height, block):
        for x0 in range(0, width, block):
            y1, x1 = min(y0 + block, height), min(x0 + block, width)
            # A margin, so that a cell that goes on beyond the block gets no line at its edge
            window = (
                max(y0 - line_px, 0),
                max(x0 - line_px, 0),
                min(y1 + line_px, height),
                min(x1 + line_px, width),
            )
            near = (left < window[3]) & (right > window[1])
            near &= (top < window[2]) & (bottom > window[0])
            cells = crop_to(instances[near], window)
            drawn = draw_overlay(read(*window), cells, class_colours, line_px=line_px)
            drawn = drawn[y0 - window[0] : y1 - window[0], x0 - window[1] : x1 - window[1]]
            # Whole squares only, so that every pixel of the picture averages factor^2 pixels
            rest = (-(y1 - y0) % factor, -(x1 - x0) % factor)
            drawn = np.pad(drawn, ((0, rest[0]), (0, rest[1]), (0, 0)), mode='edge')
            size_wh = (drawn.shape[1] // factor, drawn.shape[0] // factor)
            shrunk = cv2.resize(drawn, size_wh, interpolation=cv2.INTER_AREA)
            top_out, left_out = y0 // factor, x0 // factor
            picture[top_out : top_out + size_wh[1], left_out : left_out + size_wh[0]] = shrunk
    return picture


def draw_legend(
    width_px: int,
    class_colours: Sequence[Colour],
    class_names: Sequence[str],
    *,
    counts: Sequence[int] = (),
) -> Picture:
    """Draw white strips of ``width_px`` that say which colour is which class.

    As many as the names need below each other; a name that is wider than a strip is cut.
    """
    texts = [f'{n} {counts[k]}' if len(counts) else n for k, n in enumerate(class_names)]
    ends = [18 + cv2.getTextSize(text, FONT, 0.42, 1)[0][0] for text in texts]
    x, y, places = GAP_PX, 0, []
    for end in ends:
        if x > GAP_PX and x + end > width_px:
            x, y = GAP_PX, y + STRIP_PX
        places.append((x, y))
        x += end + 2 * GAP_PX
    strips = np.full((y + STRIP_PX, width_px, 3), 255, dtype=np.uint8)
    for text, (x, y), colour in zip(texts, places, class_colours, strict=False):
        rgb = tuple(int(value) for value in colour)
        cv2.rectangle(strips, (x, y + 8), (x + 12, y + 20), rgb, cv2.FILLED)
        cv2.putText(strips, text, (x + 18, y + 19), FONT, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    return strips


def draw_title(picture: Picture, title: str) -> Picture:
    """Return the picture below a white strip with one line of text."""
    strip = np.full((STRIP_PX, picture.shape[1], 3), 255, dtype=np.uint8)
    cv2.putText(strip, title, (GAP_PX, 19), FONT, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([strip, picture])


def draw_pair(
    image_rgb: Picture,
    gt: InstanceSet,
    pred: InstanceSet,
    class_colours: Sequence[Colour],
    *,
    class_names: Sequence[str] = (),
    score_thr: float = 0.0,
) -> Picture:
    """Draw ground truth and prediction side by side, each under a title with its number of cells.

    Args:
        image_rgb: (H, W, 3) uint8.
        gt: Ground truth of the image.
        pred: Prediction; cells below ``score_thr`` are not drawn, and not counted in the title.
        class_colours: RGB of each class.
        class_names: Adds a legend below, which counts the predicted cells.
        score_thr: Least score.

    Raises:
        ValueError: See :func:`draw_overlay`.
    """
    shown = pred[pred.scores >= score_thr]
    left = draw_overlay(image_rgb, gt, class_colours)
    right = draw_overlay(image_rgb, shown, class_colours)
    above = f', score >= {score_thr:g}' if score_thr > 0 else ''
    left = draw_title(left, f'ground truth: {len(gt)} cells')
    right = draw_title(right, f'prediction: {len(shown)} cells{above}')
    gap = np.full((left.shape[0], GAP_PX, 3), 255, dtype=np.uint8)
    pair = np.concatenate([left, gap, right], axis=1)
    if not class_names:
        return pair
    counts = np.bincount(shown.class_ids, minlength=len(class_names)).tolist()
    return np.concatenate(
        [pair, draw_legend(pair.shape[1], class_colours, class_names, counts=counts)]
    )


@dataclass(frozen=True, slots=True)
class SheetParams:
    """How a contact sheet is laid out.

    Attributes:
        n_columns: Pictures per row.
        cell_px: Longest side of each picture; larger ones are shrunk, none is enlarged.
    """

    n_columns: int = 4
    cell_px: int = 480


def draw_contact_sheet(
    pictures: Sequence[Picture], titles: Sequence[str], params: SheetParams | None = None
) -> Picture:
    """Lay pictures out in rows, each under its title.

    Raises:
        ValueError: There is no picture, or not one title for each.
    """
    params = params or SheetParams()
    if not len(pictures) or len(titles) != len(pictures):
        raise ValueError(f'a sheet of {len(pictures)} pictures with {len(titles)} titles')
    cells = [
        draw_title(_shrink(p, params.cell_px), t) for p, t in zip(pictures, titles, strict=True)
    ]
    n_columns = min(params.n_columns, len(cells))
    rows = [cells[i : i + n_columns] for i in range(0, len(cells), n_columns)]
    width = max(cell.shape[1] for cell in cells) + GAP_PX
    heights = [max(cell.shape[0] for cell in row) + GAP_PX for row in rows]
    sheet = np.full((sum(heights), width * n_columns, 3), 255, dtype=np.uint8)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for k, cell in enumerate(row):
            sheet[top : top + cell.shape[0], k * width : k * width + cell.shape[1]] = cell
        top += height
    return sheet


def _shrink(picture: Picture, longest_px: int) -> Picture:
    factor = longest_px / max(picture.shape[:2])
    if factor >= 1:
        return picture
    size_wh = [max(round(n * factor), 1) for n in picture.shape[1::-1]]
    return cv2.resize(picture, size_wh, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def write_png(path: Path | str, picture: Picture) -> None:
    """Write a picture in one step; equal pictures give equal bytes."""
    _, content = cv2.imencode('.png', cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    files.write_bytes(path, content.tobytes())

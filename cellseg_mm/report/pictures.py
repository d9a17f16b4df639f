"""Images and outlines small enough to lie inside one HTML file.

In: image files and InstanceSets. Out: WebP data URIs, SVG path data, and the viewer's entries.
Invariant: outlines are in px of the original image, whatever size the thumbnail has.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cellseg_mm.core.files import JsonValue
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.scores.matching import Compared
from cellseg_mm.scores.mistakes import match_in_class

LONG_SIDE_PX = 900  # of a viewer image; a cell of 16 px in a 1300 px image is still 11 px
CROP_SIDE_PX = 132
QUALITY = 72
TOLERANCE_PX = 0.7  # most that a simplified outline is off
EMBED_SCORE_THR = 0.05  # predictions below are not embedded


def data_uri(image: NDArray[np.uint8], long_side_px: int) -> str:
    """Return the image, shrunk to ``long_side_px``, as a WebP data URI."""
    picture = Image.fromarray(image)
    factor = long_side_px / max(picture.size)
    if factor < 1:
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, 'WEBP', quality=QUALITY, method=4)
    return 'data:image/webp;base64,' + base64.b64encode(stream.getvalue()).decode()


def outline_paths(instances: InstanceSet) -> list[str]:
    """Return SVG path data of each instance's outline, in whole px with relative steps.

    Outlines run through the centres of border pixels; draw them shifted by half a pixel.
    """
    crops, offsets = instances.crops()
    return [
        outline_path(crop, (int(x), int(y)), TOLERANCE_PX)
        for crop, (y, x) in zip(crops, offsets.tolist(), strict=True)
    ]


def outline_path(crop: NDArray[np.bool_], offset_xy: tuple[int, int], tolerance_px: float) -> str:
    """Return the outline of one tight mask, all its parts, holes left out."""
    found, _ = cv2.findContours(
        crop.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE, offset=offset_xy
    )
    parts = []
    for contour in found:
        simple = cv2.approxPolyDP(contour, tolerance_px, True)
        if len(simple) < 3:  # a dot or a line has no inside: take the pixels' own border
            x, y, w, h = cv2.boundingRect(contour)
            parts.append(f'M{x - 0.5:g} {y - 0.5:g}h{w}v{h}h-{w}z')
            continue
        points = simple[:, 0, :].astype(np.int64)
        steps = np.diff(points, axis=0)
        text = ''.join(f'l{dx} {dy}' for dx, dy in steps.tolist())
        parts.append(f'M{points[0, 0]} {points[0, 1]}{text}z'.replace(' -', '-'))
    return ''.join(parts)


def viewer_entry(
    detected: Compared,
    cells: Compared,
    image: NDArray[np.uint8],
    *,
    facts: str,
    group: str,
) -> dict[str, JsonValue]:
    """Return what the viewer needs of one image with ground truth.

    Each label carries the score of the detection and of the cell that found it, each prediction
    whether it is a true positive, so that the page can count for any score threshold without
    comparing masks.

    Args:
        detected: All detections.
        cells: What is left of them at the settings for people.
        image: (H, W, 3) uint8 RGB.
        facts: Shown with the image.
        group: Part of the list of images.
    """
    by_detection, by_cell = match_in_class(detected), match_in_class(cells)
    labels = zip(
        detected.gt.class_ids.tolist(),
        outline_paths(detected.gt),
        by_detection[1].tolist(),
        by_cell[1].tolist(),
        strict=True,
    )
    return {
        **_frame(detected.pred, image, facts=facts, group=group),
        'gt': [[k, path, floored(first), floored(second)] for k, path, first, second in labels],
        'pred': _rows(detected.pred, by_detection[0] >= 0),
        'cells': _rows(cells.pred, by_cell[0] >= 0),
    }


def prediction_entry(
    pred: InstanceSet, cells: InstanceSet, image: NDArray[np.uint8], *, facts: str, group: str
) -> dict[str, JsonValue]:
    """Return what the viewer needs of one image without ground truth; see :func:`viewer_entry`."""
    return {
        **_frame(pred, image, facts=facts, group=group),
        'gt': None,
        'pred': _rows(pred.by_score(), None),
        'cells': _rows(cells.by_score(), None),
    }


def _frame(
    pred: InstanceSet, image: NDArray[np.uint8], *, facts: str, group: str
) -> dict[str, JsonValue]:
    return {
        'name': pred.name,
        'group': group,
        'facts': facts,
        'h': pred.image_hw[0],
        'w': pred.image_hw[1],
        'src': data_uri(image, LONG_SIDE_PX),
        'left_out': int((pred.scores < EMBED_SCORE_THR).sum()),
    }


def _rows(pred: InstanceSet, is_right: NDArray[np.bool_] | None) -> list[JsonValue]:
    """Return class, outline, score and 1 for right, 0 for wrong, -1 for unknown of each."""
    keep = np.flatnonzero(pred.scores >= EMBED_SCORE_THR)
    kept = pred[keep]
    right = np.full(len(kept), -1) if is_right is None else is_right[keep].astype(np.int64)
    rows = zip(
        kept.class_ids.tolist(),
        outline_paths(kept),
        kept.scores.tolist(),
        right.tolist(),
        strict=True,
    )
    return [[k, path, floored(score), flag] for k, path, score, flag in rows]


def floored(score: float) -> float:
    """Return a score with four digits; -1 for none."""
    # Rounding up would let an instance pass a threshold that its score does not reach.
    return math.floor(score * 1e4 + 1e-3) / 1e4 if score >= 0 else -1.0


def crop_figure(
    image: NDArray[np.uint8],
    box_xyxy: Sequence[float],
    outlines: Sequence[tuple[str, str]],
    *,
    label: str,
) -> str:
    """Return a cell and its surroundings as a figure.

    Args:
        image: (H, W, 3) uint8 RGB.
        box_xyxy: The cell.
        outlines: (path data, CSS class and style attributes) to draw over it, in order.
        label: What it shows, for readers who do not see it; escaped here.
    """
    x1, y1, x2, y2 = _window(box_xyxy, (image.shape[0], image.shape[1]))
    uri = data_uri(np.ascontiguousarray(image[y1:y2, x1:x2]), CROP_SIDE_PX)
    paths = ''.join(f'<path {attributes} d="{path}"/>' for path, attributes in outlines)
    return (
        f'<svg class="crop" viewBox="{x1} {y1} {x2 - x1} {y2 - y1}" role="img" '
        f'aria-label="{escape(label, quote=True)}"><image href="{uri}" x="{x1}" y="{y1}" '
        f'width="{x2 - x1}" height="{y2 - y1}"/>'
        f'<g transform="translate(.5 .5)">{paths}</g></svg>'
    )


def _window(box_xyxy: Sequence[float], image_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return a square of 2.5 times the box, at least 48 px, moved or cut to fit the image."""
    x1, y1, x2, y2 = (float(v) for v in box_xyxy)
    side = round(max(48.0, 2.5 * max(x2 - x1, y2 - y1)))
    limits = []
    for low, high, size in ((x1, x2, image_hw[1]), (y1, y2, image_hw[0])):
        span = min(side, size)
        start = min(max(0, round((low + high) / 2 - span / 2)), size - span)
        limits.append((start, start + span))
    (left, right), (top, bottom) = limits
    return left, top, right, bottom

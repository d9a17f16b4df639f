"""Outlines enclose their masks."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cellseg_mm.report.pictures import outline_path


@pytest.mark.parametrize('seed', range(10))
def test_outline_encloses_the_mask(seed: int) -> None:
    import cv2

    rng = np.random.default_rng(seed)
    mask = np.zeros((40, 50), dtype=np.uint8)
    centre = tuple(int(v) for v in rng.integers(15, 25, 2))
    axes = tuple(int(v) for v in rng.integers(4, 14, 2))
    cv2.ellipse(mask, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
    path = outline_path(mask.astype(bool), (100, 200), 0.7)
    filled = np.zeros_like(mask)
    cv2.fillPoly(filled, [np.array(corners_of(path)) - (100, 200)], 1)
    iou = (filled & mask).sum() / (filled | mask).sum()
    assert iou > 0.9
    assert len(path) < 200


def corners_of(path: str) -> list[tuple[int, int]]:
    """Read 'M x y l dx dy ... z' back, as a slow reference."""
    words = re.findall(r'[Mlz]|-?\d+', path)
    assert (words[0], words[-1]) == ('M', 'z')
    x, y = int(words[1]), int(words[2])
    corners = [(x, y)]
    steps = [int(word) for word in words[3:-1] if word != 'l']
    for dx, dy in zip(steps[::2], steps[1::2], strict=True):
        x, y = x + dx, y + dy
        corners.append((x, y))
    return corners


def test_outline_of_one_pixel_is_that_pixel() -> None:
    assert outline_path(np.ones((1, 1), dtype=bool), (7, 3), 0.7) == 'M6.5 2.5h1v1h-1z'

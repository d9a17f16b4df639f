"""Draw one cell of each class.

In: a random generator. Out: a :class:`Sprite`, a cell in its own small square. Invariant: the
mask holds the pixels that the label map will, and the halo none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
Mask = NDArray[np.bool_]
Rng = np.random.Generator
Point = NDArray[np.float64]  # (2,) row and column in px


@dataclass(frozen=True, slots=True)
class Sprite:
    """One cell drawn in its own small square.

    Attributes:
        class_number: 1 to 4.
        mask: (P, P) bool, the pixels that the label map will hold.
        body_alpha: (P, P) float32 in 0..1, how much of what is below the cell hides.
        body: (3, P, P) float32, amounts of haematoxylin, eosin and blood in the cell.
        halo_alpha: (P, P) float32 in 0..1, surroundings that belong to no label (cytoplasm, gap).
        halo: (3,) amounts of the three dyes around the cell.
        radius: Radius in px of a circle as large as the cell.
    """

    class_number: int
    mask: Mask
    body_alpha: Field
    body: Field
    halo_alpha: Field
    halo: tuple[float, float, float]
    radius: float


def smooth_noise(rng: Rng, hw: tuple[int, int], scale_px: float) -> Field:
    """Return (H, W) float32 noise of mean 0 and deviation about 1 with blobs of ``scale_px``.

    Catmull-Rom splines through white noise, as four shifted sums per axis: exact element by
    element, so the bytes do not depend on the number of threads as a matrix product's would.
    """
    coarse = tuple(int(np.ceil(n / scale_px)) + 5 for n in hw)
    noise = rng.standard_normal(coarse).astype(np.float32)
    for axis, n in enumerate(hw):
        where = np.arange(n, dtype=np.float32) / np.float32(scale_px) + np.float32(rng.random())
        first = where.astype(np.int64)
        t = where - first
        weights = (
            (-t + 2 * t**2 - t**3) / 2,
            (2 - 5 * t**2 + 3 * t**3) / 2,
            (t + 4 * t**2 - 3 * t**3) / 2,
            (-(t**2) + t**3) / 2,
        )
        shape = (-1, 1) if axis == 0 else (1, -1)
        noise = sum(w.reshape(shape) * noise.take(first + k, axis) for k, w in enumerate(weights))
    return noise / np.float32(0.8)  # the splines keep about 0.8 of the deviation


def step(field: Field, width: float) -> Field:
    """Map 0 to 0.5 with a soft edge that is ``width`` wide."""
    return np.clip(field / width + 0.5, 0, 1)


def _grid(size: int) -> tuple[Field, Field]:
    """Return y and x in px from the centre of a square."""
    axis = np.arange(size, dtype=np.float32) - (size - 1) / 2
    return axis[:, None], axis[None, :]


def blob(
    rng: Rng, size: int, radius: float, *, stretch: float = 1.0, wobble: float = 0.03
) -> Field:
    """Return an approximate distance in px to a wavy ellipse's outline, positive inside.

    Args:
        rng: Draws the angle and the waves.
        size: Side of the square in px.
        radius: Radius in px of a circle as large as the shape.
        stretch: Long axis divided by short axis.
        wobble: Height of the waves relative to the radius.
    """
    y, x = _grid(size)
    angle = rng.uniform(0, np.pi)
    u = (x * np.cos(angle) + y * np.sin(angle)) / np.sqrt(stretch)
    v = (y * np.cos(angle) - x * np.sin(angle)) * np.sqrt(stretch)
    theta = np.arctan2(v, u)
    outline = np.full_like(theta, radius)
    for k in (2, 3, 4, 5):
        outline += radius * wobble * rng.normal() * np.cos(k * theta + rng.uniform(0, 2 * np.pi))
    inside: Field = (outline - np.hypot(u, v)).astype(np.float32)
    return inside


def _disc(size: int, centre_yx: Point, radius: float) -> Field:
    """Return the distance in px to a circle's outline, positive inside."""
    y, x = _grid(size)
    inside: Field = (radius - np.hypot(y - centre_yx[0], x - centre_yx[1])).astype(np.float32)
    return inside


def _strand(size: int, start: Point, end: Point, half_width: float) -> Field:
    """Return the distance in px to a thick line's outline, positive inside."""
    y, x = _grid(size)
    line = np.asarray(end) - start
    along = ((y - start[0]) * line[0] + (x - start[1]) * line[1]) / max(line @ line, 1e-6)
    along = np.clip(along, 0, 1)
    away = np.hypot(y - start[0] - along * line[0], x - start[1] - along * line[1])
    inside: Field = (half_width - away).astype(np.float32)
    return inside


def _epithelial(rng: Rng) -> Sprite:
    """Large oval nucleus, pale and vesicular, with a rim and one or two nucleoli."""
    radius = rng.uniform(9.5, 13.0)
    size = int(4.2 * radius) | 1
    inside = blob(rng, size, radius, stretch=rng.uniform(1.15, 1.7), wobble=0.03)
    chromatin = smooth_noise(rng, (size, size), 2.6)
    rim = np.exp(-(((inside - 1.2) / 1.1) ** 2))
    blue = 0.62 + 0.14 * chromatin + 0.75 * rim
    for _ in range(rng.integers(1, 3)):
        centre = rng.uniform(-0.35, 0.35, 2) * radius
        blue = np.maximum(blue, 1.75 * step(_disc(size, centre, rng.uniform(1.5, 2.2)), 1.5))
    body = np.stack([blue, 0.14 + 0.03 * chromatin, np.zeros_like(blue)])
    halo = 0.85 * step(inside + rng.uniform(5, 8), 4)
    return _sprite(1, inside, body, halo, (0.20, 0.34, 0.0), radius)


def _lymphocyte(rng: Rng) -> Sprite:
    """Small round nucleus, dark with clumps, in a thin pale gap."""
    radius = rng.uniform(6.0, 8.0)
    size = int(4 * radius) | 1
    inside = blob(rng, size, radius, stretch=rng.uniform(1.0, 1.2), wobble=0.025)
    clumps = smooth_noise(rng, (size, size), 2.4)
    blue = 2.05 + 0.32 * clumps + 0.2 * np.exp(-((inside - 1) ** 2))
    body = np.stack([blue, 0.15 + np.zeros_like(blue), np.zeros_like(blue)])
    halo = rng.uniform(0.2, 0.8) * step(inside + 2.2, 2.5)
    return _sprite(2, inside, body, halo, (0.05, 0.10, 0.0), radius)


def _neutrophil(rng: Rng) -> Sprite:
    """Three or four dark lobes on an arc, joined by strands, in a pink cell without label."""
    n_lobes = int(rng.integers(3, 5))
    arc_radius = rng.uniform(4.4, 5.6)
    size = 45
    angles = rng.uniform(0, 2 * np.pi) + np.arange(n_lobes) * rng.uniform(1.25, 1.55)
    centres = arc_radius * np.stack([np.sin(angles), np.cos(angles)], axis=1)
    centres += rng.normal(0, 0.4, centres.shape)
    lobes = [_disc(size, centre, rng.uniform(2.9, 3.7)) for centre in centres]
    strands = [_strand(size, a, b, rng.uniform(1.0, 1.5)) for a, b in pairwise(centres)]
    inside = np.maximum.reduce(lobes + strands)
    clumps = smooth_noise(rng, (size, size), 2.2)
    blue = 1.75 + 0.22 * clumps + 0.12 * np.clip(inside, 0, 3)
    body = np.stack([blue, 0.3 + np.zeros_like(blue), np.zeros_like(blue)])
    cell = blob(rng, size, arc_radius + rng.uniform(5.0, 6.5), wobble=0.05)
    halo = 0.9 * step(cell, 2.0)
    radius = float(np.sqrt((inside > 0).sum() / np.pi))
    return _sprite(3, inside, body, halo, (0.10, rng.uniform(0.5, 0.75), 0.0), radius + 2)


def _macrophage(rng: Rng) -> Sprite:
    """Large irregular cell: foamy pale cytoplasm with a kidney-shaped nucleus at one side."""
    radius = rng.uniform(13.0, 16.5)
    size = int(3.4 * radius) | 1
    inside = blob(rng, size, radius, stretch=rng.uniform(1.0, 1.35), wobble=0.055)
    foam = smooth_noise(rng, (size, size), 2.1)
    edge = np.exp(-(((inside - 0.8) / 1.0) ** 2))
    pink = 0.34 - 0.16 * np.clip(foam, -1.5, 1.5) + 0.28 * edge
    blue = 0.24 - 0.11 * np.clip(foam, -1.5, 1.5) + 0.22 * edge
    direction = rng.uniform(0, 2 * np.pi)
    towards = np.array([np.sin(direction), np.cos(direction)])
    nucleus_radius = 0.46 * radius
    bean = np.minimum(
        _disc(size, towards * 0.36 * radius, nucleus_radius),
        -_disc(size, towards * -0.12 * radius, 0.55 * nucleus_radius),
    )
    nucleus = step(np.minimum(bean, inside - 1.5), 1.5)
    texture = smooth_noise(rng, (size, size), 2.8)
    blue = blue + nucleus * (1.15 + 0.16 * texture - blue)
    body = np.stack([blue, np.clip(pink, 0.04, None), np.zeros_like(blue)])
    halo = 0.6 * step(inside + 1.8, 2.0)
    return _sprite(4, inside, np.clip(body, 0, None), halo, (0.02, 0.08, 0.0), radius)


def _sprite(
    class_number: int,
    inside: Field,
    body: NDArray[np.floating],
    halo_alpha: Field,
    halo: tuple[float, float, float],
    radius: float,
) -> Sprite:
    alpha = step(inside, 1.4)
    return Sprite(class_number, inside > 0, alpha, np.clip(body, 0, None), halo_alpha, halo, radius)


DRAW: tuple[Callable[[Rng], Sprite], ...] = (_epithelial, _lymphocyte, _neutrophil, _macrophage)

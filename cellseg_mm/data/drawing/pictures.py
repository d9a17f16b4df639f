"""Draw one H&E-like picture with cells whose masks are known.

In: a seed and a scene. Out: pixels and label maps. Invariant: the same seed gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from cellseg_mm.data.config import N_CLASSES
from cellseg_mm.data.drawing.cells import DRAW, Field, Mask, Rng, Sprite, blob, smooth_noise, step

LEAST_PIXELS = 14  # a cell that the border or a neighbour leaves less of is not drawn

LEAST_VISIBLE = 0.6  # share of a cell that later cells must leave visible

N_TRIES = 12  # places tried for one cell

# Optical density per unit of dye in R, G, B, measured by eye on public slides and rounded.
HAEMATOXYLIN, EOSIN, BLOOD = (0.58, 0.72, 0.34), (0.12, 0.88, 0.46), (0.10, 0.78, 0.70)


@dataclass(frozen=True, slots=True)
class Scene:
    """What an image shows.

    Attributes:
        background: ``stroma``, ``airy``, ``fluid`` or ``blood``.
        cells_per_10k: Cells of each class per 10,000 px.
        gap: Share of the image without tissue.
    """

    background: str
    cells_per_10k: tuple[float, float, float, float]
    gap: float


SCENES = (
    Scene('stroma', (9.0, 1.2, 0.3, 0.0), 0.10),
    Scene('stroma', (6.0, 5.0, 0.0, 0.8), 0.15),
    Scene('stroma', (0.6, 16.0, 0.4, 0.3), 0.04),
    Scene('airy', (1.0, 3.0, 4.0, 2.2), 0.45),
    Scene('fluid', (0.0, 2.0, 5.0, 2.5), 0.06),
    Scene('blood', (1.5, 2.5, 6.0, 0.6), 0.20),
    Scene('airy', (4.0, 2.0, 0.0, 2.5), 0.35),
)

DENSE_SCENE = Scene('stroma', (1.0, 32.0, 0.5, 0.2), 0.02)


@dataclass(frozen=True, slots=True)
class Stain:
    """How one patient's slide was dyed and scanned.

    Attributes:
        matrix: (3, 3), optical density in R, G, B of each dye.
        strength: (3,), amount of each dye relative to the average slide.
        white: (3,), light level of an empty slide.
        blur_px: Sigma of the scanner's blur.
    """

    matrix: NDArray[np.float64]
    strength: NDArray[np.float64]
    white: NDArray[np.float64]
    blur_px: float

    @classmethod
    def random(cls, rng: Rng) -> Stain:
        """Draw a slide."""
        matrix = np.array([HAEMATOXYLIN, EOSIN, BLOOD]) * rng.uniform(0.9, 1.1, (3, 3))
        strength = np.array([rng.uniform(0.8, 1.2), rng.uniform(0.7, 1.35), rng.uniform(0.8, 1.1)])
        return cls(matrix, strength, rng.uniform(238, 250, 3), rng.uniform(0.45, 0.8))


@dataclass(slots=True)
class Placed:
    """Cells placed so far.

    Attributes:
        labels: (H, W) int32, index + 1 of the topmost cell.
        sprites: The cells, in the order of placing.
        corners_yx: Row and column of each sprite's first pixel; may be negative.
        n_pixels: Pixels of each cell inside the image before others covered it.
    """

    labels: NDArray[np.int32]
    sprites: list[Sprite]
    corners_yx: list[tuple[int, int]]
    n_pixels: list[int]

    def centre_of(self, index: int) -> NDArray[np.float64]:
        """Return the centre row and column of a placed cell."""
        half = self.sprites[index].mask.shape[0] / 2
        return np.asarray(self.corners_yx[index]) + half


def _window(
    corner_yx: tuple[int, int], size: int, hw: Sequence[int]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return where a square lies in the image, and which part of the square that is."""
    image, own = [], []
    for corner, length in zip(corner_yx, hw, strict=True):
        low, high = max(corner, 0), max(min(corner + size, length), max(corner, 0))
        image.append(slice(low, high))
        own.append(slice(low - corner, high - corner))
    return (image[0], image[1]), (own[0], own[1])


def _is_connected(mask: Mask) -> bool:
    return bool(ndimage.label(mask)[1] == 1)


def _try_place(placed: Placed, sprite: Sprite, centre_yx: NDArray[np.float64]) -> bool:
    """Put a cell on top of the others if it and those below stay connected and visible."""
    size = sprite.mask.shape[0]
    corner = (round(float(centre_yx[0]) - size / 2), round(float(centre_yx[1]) - size / 2))
    image, own = _window(corner, size, placed.labels.shape)
    mask = sprite.mask[own]
    n_pixels = int(mask.sum())
    if n_pixels < LEAST_PIXELS or not _is_connected(mask):
        return False
    window = placed.labels[image]
    before = window.copy()
    window[mask] = len(placed.sprites) + 1
    covered = np.unique(before[mask])
    if not all(_is_intact(placed, label) for label in covered[covered > 0].tolist()):
        window[:] = before
        return False
    placed.sprites.append(sprite)
    placed.corners_yx.append(corner)
    placed.n_pixels.append(n_pixels)
    return True


def _is_intact(placed: Placed, label: int) -> bool:
    """Say whether enough of a partly covered cell is visible, in one piece."""
    area, _ = _window(
        placed.corners_yx[label - 1], placed.sprites[label - 1].mask.shape[0], placed.labels.shape
    )
    visible = placed.labels[area] == label
    least = max(LEAST_PIXELS, LEAST_VISIBLE * placed.n_pixels[label - 1])
    return int(visible.sum()) >= least and _is_connected(visible)


def _propose(rng: Rng, placed: Placed, sprite: Sprite, tissue: Field) -> NDArray[np.float64]:
    """Draw a centre: beside a cell of the same class (clusters, contact), or anywhere in tissue."""
    same = [i for i, s in enumerate(placed.sprites) if s.class_number == sprite.class_number]
    near = {1: 0.8, 2: 0.55, 3: 0.35, 4: 0.2}[sprite.class_number]
    if same and rng.random() < near:
        index = int(rng.choice(same))
        reach = (sprite.radius + placed.sprites[index].radius) * rng.uniform(0.9, 1.5)
        angle = rng.uniform(0, 2 * np.pi)
        return placed.centre_of(index) + reach * np.array([np.sin(angle), np.cos(angle)])
    centre = rng.uniform(0, 1, 2) * placed.labels.shape
    for _ in range(4):
        if tissue[int(centre[0]), int(centre[1])] > 0.5 or sprite.class_number in (3, 4):
            break
        centre = rng.uniform(0, 1, 2) * placed.labels.shape
    return centre


def _place_cells(rng: Rng, scene: Scene, tissue: Field, *, sparse: bool) -> Placed:
    hw = tissue.shape
    placed = Placed(np.zeros(hw, dtype=np.int32), [], [], [])
    expected = np.array(scene.cells_per_10k) * hw[0] * hw[1] / 1e4 * (0.15 if sparse else 1.0)
    numbers = np.repeat(np.arange(1, N_CLASSES + 1), rng.poisson(expected))
    rng.shuffle(numbers)
    for class_number in numbers.tolist():
        sprite = DRAW[class_number - 1](rng)
        for _ in range(N_TRIES):
            if _try_place(placed, sprite, _propose(rng, placed, sprite, tissue)):
                break
    while not placed.sprites:  # no real image is without any cell
        class_number = int(np.argmax(scene.cells_per_10k)) + 1
        _try_place(placed, DRAW[class_number - 1](rng), rng.uniform(0.3, 0.7, 2) * hw)
    return placed


def _fibres(rng: Rng, hw: tuple[int, int]) -> Field:
    """Return (H, W) float32 in about -2..2: wavy bundles of parallel fibres."""
    texture = rng.standard_normal((192, 192)).astype(np.float32)
    texture = ndimage.gaussian_filter(texture, (1.1, 16), mode='wrap')
    texture /= texture.std()
    angle = rng.uniform(0, np.pi)
    y, x = np.mgrid[: hw[0], : hw[1]].astype(np.float32)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    across = across + 14 * smooth_noise(rng, hw, 70) + 3 * smooth_noise(rng, hw, 22)
    fibres: Field = ndimage.map_coordinates(texture, [across, along], order=1, mode='grid-wrap')
    return fibres


def _tissue(rng: Rng, hw: tuple[int, int], scene: Scene) -> Field:
    """Return (H, W) float32 in 0..1: 1 where there is tissue, 0 in gaps, with soft edges."""
    shape = smooth_noise(rng, hw, 60) + 0.35 * smooth_noise(rng, hw, 18)
    return step(shape - np.float32(np.quantile(shape, scene.gap)), 0.22)


def _paint_background(rng: Rng, hw: tuple[int, int], scene: Scene, tissue: Field) -> Field:
    """Return (3, H, W) float32 amounts of dye of tissue without cells."""
    dye = np.zeros((3, *hw), dtype=np.float32)
    broad = smooth_noise(rng, hw, 45)
    fine = smooth_noise(rng, hw, 3)
    if scene.background == 'fluid':  # protein-rich fluid: even pink with small bubbles
        dye[1] = 0.75 + 0.05 * broad + 0.02 * fine
        for _ in range(int(hw[0] * hw[1] / 2500) + 1):
            _spot(rng, dye, hw, radius=rng.uniform(1.5, 4), amounts=(0.0, 0.35, 0.0), alpha=0.7)
    elif scene.background == 'airy':  # a thin web between large gaps
        web = np.exp(-((smooth_noise(rng, hw, 13) / 0.25) ** 2))
        dye[1] = 0.16 + 0.3 * web * (1 + 0.2 * fine) + 0.05 * broad
        dye[0] = 0.04 + 0.04 * web
    else:
        fibres = _fibres(rng, hw)
        contrast = 0.04 + 0.09 * step(smooth_noise(rng, hw, 40), 2)  # bundles come and go
        dye[1] = 0.5 + contrast * fibres + 0.1 * broad + 0.04 * fine
        dye[0] = 0.07 + 0.03 * fibres + 0.02 * broad
    edge = np.exp(-(((tissue - 0.5) / 0.25) ** 2))
    dye *= tissue
    dye[1] += 0.15 * edge
    return np.clip(dye, 0, None)


def _spot(
    rng: Rng,
    dye: Field,
    hw: tuple[int, int],
    *,
    radius: float,
    amounts: tuple[float, float, float],
    alpha: float,
    softness: float = 1.5,
    stretch: float = 1.0,
    wobble: float = 0.06,
) -> None:
    """Blend one unlabelled blob into ``dye`` at a random place."""
    size = int(2 * (radius * np.sqrt(stretch) * 1.3 + softness) + 3) | 1
    corner = (int(rng.integers(-size // 2, hw[0])), int(rng.integers(-size // 2, hw[1])))
    image, own = _window(corner, size, hw)
    inside = blob(rng, size, radius, stretch=stretch, wobble=wobble)
    cover = alpha * step(inside, softness)[own]
    for channel, amount in enumerate(amounts):
        target = dye[channel][image]
        target += cover * (amount - target)


def _paint_bystanders(rng: Rng, dye: Field, hw: tuple[int, int], scene: Scene) -> None:
    """Add what is not a cell of the four classes: blood, spindles, ghosts, debris, stain."""
    area = hw[0] * hw[1] / 1e4
    if scene.background in ('stroma', 'blood'):
        for _ in range(rng.poisson(1.2 * area)):  # thin spindle nuclei of the stroma
            _spot(
                rng,
                dye,
                hw,
                radius=rng.uniform(3.0, 4.2),
                stretch=rng.uniform(4, 6),
                amounts=(0.85, 0.3, 0.0),
                alpha=0.8,
            )
    n_red = rng.poisson((14 if scene.background == 'blood' else 0.7) * area)
    for _ in range(n_red):
        amounts = (0.0, 0.15, rng.uniform(1.1, 1.9))
        shape = {'radius': rng.uniform(5, 6.5), 'stretch': rng.uniform(1, 1.5), 'wobble': 0.02}
        _spot(rng, dye, hw, amounts=amounts, alpha=0.95, **shape)
    for _ in range(rng.poisson(0.8 * area)):  # ghosts: pink, without nucleus
        amounts = (0.1, rng.uniform(0.4, 0.7), 0.0)
        _spot(rng, dye, hw, radius=rng.uniform(4, 9), amounts=amounts, alpha=0.6, softness=4)


def _paint_debris(rng: Rng, dye: Field, hw: tuple[int, int]) -> None:
    """Add out-of-focus debris and grains of precipitated stain, on top of everything."""
    area = hw[0] * hw[1] / 1e4
    for _ in range(rng.poisson(0.35 * area)):
        amounts = (rng.uniform(0.4, 0.8), 0.3, 0.0)
        _spot(rng, dye, hw, radius=rng.uniform(3, 8), amounts=amounts, alpha=0.4, softness=9)
    for _ in range(rng.poisson(1.0 * area)):
        _spot(rng, dye, hw, radius=rng.uniform(0.8, 1.7), amounts=(1.8, 0.3, 0.0), alpha=0.8)


def _paint_cells(dye: Field, placed: Placed) -> None:
    """Paint all surroundings first, then the cells in the order in which they hide each other."""
    hw = placed.labels.shape
    pairs = list(zip(placed.sprites, placed.corners_yx, strict=True))
    for sprite, corner in pairs:
        image, own = _window(corner, sprite.mask.shape[0], hw)
        for channel, amount in enumerate(sprite.halo):
            target = dye[channel][image]
            target += sprite.halo_alpha[own] * (amount - target)
    for sprite, corner in pairs:
        image, own = _window(corner, sprite.mask.shape[0], hw)
        target = dye[(slice(None), *image)]
        target += sprite.body_alpha[own] * (sprite.body[(slice(None), *own)] - target)


def _develop(rng: Rng, dye: Field, stain: Stain) -> NDArray[np.uint8]:
    """Turn amounts of dye into an (H, W, 3) uint8 RGB picture."""
    per_dye = (stain.matrix * stain.strength[:, None]).astype(np.float32)
    density = sum(amount[..., None] * rgb for amount, rgb in zip(dye, per_dye, strict=True))
    light = stain.white.astype(np.float32) * np.exp(-density)
    light = ndimage.gaussian_filter(light, (stain.blur_px, stain.blur_px, 0))
    light += rng.standard_normal(light.shape).astype(np.float32) * 2.2
    picture: NDArray[np.uint8] = np.clip(np.rint(light), 0, 255).astype(np.uint8)
    return picture


@dataclass(frozen=True, slots=True)
class Picture:
    """One drawn image.

    Attributes:
        image: (H, W, 3) uint8, true RGB.
        label_maps: Class number 1 to 4 to (H, W) int32 with ids unique across classes; classes
            without a cell are absent.
    """

    image: NDArray[np.uint8]
    label_maps: Mapping[int, NDArray[np.int32]]


def draw_picture(
    rng: Rng,
    image_hw: tuple[int, int],
    scene: Scene,
    stain: Stain,
    *,
    sparse: bool = False,
    gaps: bool = False,
) -> Picture:
    """Draw one image and its label maps.

    Args:
        rng: Draws everything that the other arguments leave open.
        image_hw: Height and width in px.
        scene: What to show.
        stain: The patient's slide.
        sparse: Draw only a few cells.
        gaps: Leave some ids out.
    """
    tissue = _tissue(rng, image_hw, scene)
    placed = _place_cells(rng, scene, tissue, sparse=sparse)
    dye = _paint_background(rng, image_hw, scene, tissue)
    _paint_bystanders(rng, dye, image_hw, scene)
    _paint_cells(dye, placed)
    _paint_debris(rng, dye, image_hw)
    return Picture(_develop(rng, dye, stain), _label_maps(rng, placed, gaps=gaps))


def _label_maps(rng: Rng, placed: Placed, *, gaps: bool) -> dict[int, NDArray[np.int32]]:
    """Number cells class by class, as the real files do."""
    numbers = np.array([sprite.class_number for sprite in placed.sprites])
    order = np.argsort(numbers, kind='stable')
    steps = np.ones(len(numbers), dtype=np.int64)
    if gaps:
        steps[0] = 2
        steps += rng.random(len(numbers)) < 0.3
    id_of = np.zeros(len(numbers) + 1, dtype=np.int32)
    id_of[1 + order] = np.cumsum(steps)
    ids = id_of[placed.labels]
    class_of = np.concatenate([[0], numbers])[placed.labels]
    return {k: np.where(class_of == k, ids, 0) for k in np.unique(numbers).tolist()}

"""data.preparing.likeness: what is in the picture counts, not the lamp that it was taken with."""

from __future__ import annotations

import numpy as np
import pytest

from cellseg_mm.data.preparing.case_checks import CaseFacts
from cellseg_mm.data.preparing.likeness import (
    detail_of,
    near_duplicates,
    thumb_of,
    unpacked_detail,
)

HW = (96, 96)
Y, X = np.mgrid[: HW[0], : HW[1]]
RADIUS = np.hypot(Y - 48, X - 48) / 48
LIGHTS = {
    'lamp in the middle': 120 + 100 * np.exp(-(RADIUS**2) / 1.4),
    'slope': 80 + 120 * X / 96,
    'round field': np.where(RADIUS < 0.95, 200.0, 8.0),
    'dust': 120 + 100 * np.exp(-(RADIUS**2) / 1.4) - 40 * ((X % 31 < 2) & (Y % 23 < 2)),
}


def image_of(light: np.ndarray, seed: int, n_cells: int = 12) -> np.ndarray:
    """Dark discs of 5 px under a light, with noise; (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    image = light + rng.normal(0, 1, HW)
    for _ in range(n_cells):
        y, x = rng.integers(10, 86, 2)
        image[(Y - y) ** 2 + (X - x) ** 2 < 6] -= 40
    return np.repeat(np.clip(image, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def facts(images: list[np.ndarray]) -> list[CaseFacts]:
    return [
        CaseFacts(str(i), one.shape[:2], (1,), (1,), str(i), thumb_of(one), detail_of(one))
        for i, one in enumerate(images)
    ]


@pytest.mark.parametrize('light', LIGHTS)
def test_one_lamp_makes_no_pair(light: str) -> None:
    images = [image_of(LIGHTS[light], seed) for seed in range(10)]
    by_thumbs = near_duplicates(facts(images), least_detail=-1)
    assert len(by_thumbs) > 20  # the small picture alone would take them for one
    assert near_duplicates(facts(images)) == []


@pytest.mark.parametrize('light', LIGHTS)
def test_copies_under_one_lamp_are_still_found(light: str) -> None:
    images = [image_of(LIGHTS[light], seed) for seed in range(10)]
    images.append(np.rot90(images[3], 2).copy() if light != 'slope' else images[3])
    dimmed = (images[5] * 0.9).astype(np.uint8)
    pairs = near_duplicates(facts([*images, dimmed]))
    assert (5, 11) in pairs
    assert {pair for pair in pairs if 11 not in pair} <= {(3, 10)}
    if light != 'dust':  # which is no longer where the others have it
        assert (3, 10) in pairs


def test_a_smooth_lamp_without_cells_is_no_likeness() -> None:
    for light in ('lamp in the middle', 'slope'):
        images = [image_of(LIGHTS[light], seed, n_cells=0) for seed in range(4)]
        assert near_duplicates(facts(images), least_detail=-1) != []
        assert near_duplicates(facts(images)) == []


def test_a_collection_of_copies_is_one() -> None:
    first = image_of(LIGHTS['round field'], 0)
    images = [(first * (1 - i / 100)).astype(np.uint8) for i in range(10)]
    assert len(near_duplicates(facts(images))) == 45


def test_detail_by_hand() -> None:
    image = np.full((64, 64, 3), 100, dtype=np.uint8)
    image[10, 20] = 130  # 30 above 100; its surroundings are 30 / 25 = 1.2 above, below the step
    image[40, 50] = 20
    signs = unpacked_detail(detail_of(image))
    assert signs[10, 20] == 1
    assert signs[40, 50] == -1
    # 80 / 25 = 3.2 grey levels: all 24 around the dark one stand out from their mean
    assert (signs == 1).sum() == 1 + 24
    assert (signs == -1).sum() == 1
    with pytest.raises(ValueError, match='reshape'):
        unpacked_detail('00')

"""pipeline.colour: stains, blur and noise by hand; nothing at strength 0."""

from __future__ import annotations

import numpy as np
import pytest

from cellseg_mm.pipeline.colour import STAINS_RGB, BlurNoise, HEDJitter, RandomBlurNoise, restain
from tests.support.moving_samples import sample

pytestmark = pytest.mark.mm


def test_restain_is_the_identity_without_a_change() -> None:
    values = np.arange(256, dtype=np.uint8)
    img = np.stack([values, values[::-1], np.roll(values, 99)], axis=1)[None]
    np.testing.assert_array_equal(restain(img, np.ones(3), np.zeros(3)), img)


def test_restain_by_hand() -> None:
    # A pixel that is pure haematoxylin of amount 1; twice as much must square its transmission.
    stain = STAINS_RGB[0] / np.linalg.norm(STAINS_RGB[0])
    pixel_rgb = np.rint(256 * np.exp(-stain) - 1)
    wanted_rgb = 256 * np.exp(-2 * stain) - 1
    got = restain(pixel_rgb[None, None, ::-1].astype(np.uint8), np.array([2.0, 1, 1]), np.zeros(3))
    assert np.abs(got[0, 0, ::-1] - wanted_rgb).max() <= 2  # the input was rounded
    more_eosin = restain(got, np.ones(3), np.array([0, 0.3, 0]))
    loss = np.log((got[0, 0, ::-1] + 1.0) / (more_eosin[0, 0, ::-1] + 1.0))
    eosin = STAINS_RGB[1] / np.linalg.norm(STAINS_RGB[1])
    np.testing.assert_allclose(loss, 0.3 * eosin, atol=0.02)
    assert loss[1] > loss[0]  # eosin takes green: channels are not swapped


def test_hed_jitter_draws_within_sigma_and_nothing_at_zero() -> None:
    rng = np.random.default_rng(0)
    drawn = [HEDJitter(prob=1.0, sigma=0.1).draw(rng) for _ in range(50)]
    scales, shifts = np.array([d[0] for d in drawn]), np.array([d[1] for d in drawn])
    assert 0.08 < np.abs(scales - 1).max() <= 0.1
    assert 0.08 < np.abs(shifts).max() <= 0.1
    results = sample(1)
    img = results['img']
    assert HEDJitter(prob=0.0)(results)['img'] is img
    assert (HEDJitter(prob=1.0, sigma=0.2)(results)['img'] != img).any()


def test_blur_and_noise_have_the_stated_strength() -> None:
    img = np.full((200, 200, 3), 128, np.uint8)
    noisy = RandomBlurNoise.degrade(img, BlurNoise(0, 5.0, seed=3))
    assert abs(noisy.std() - 5.0) < 0.2
    assert abs(noisy.mean() - 128) < 0.2
    np.testing.assert_array_equal(noisy, RandomBlurNoise.degrade(img, BlurNoise(0, 5.0, seed=3)))
    dot = np.zeros((41, 41, 3), np.uint8)
    dot[20, 20] = 255
    spread = RandomBlurNoise.degrade(dot, BlurNoise(2.0, 0, seed=0))[20, 20, 0]
    assert abs(spread - 255 / (2 * np.pi * 2.0**2)) < 1  # height of a Gaussian of sigma 2
    assert RandomBlurNoise.degrade(img, BlurNoise(0, 0, seed=0)) is img


def test_blur_noise_probabilities() -> None:
    rng = np.random.default_rng(0)
    never = [RandomBlurNoise(blur_prob=0, noise_prob=0).draw(rng) for _ in range(20)]
    assert {(d.blur_sigma, d.noise_sigma) for d in never} == {(0.0, 0.0)}
    step = RandomBlurNoise(blur_prob=1, noise_prob=1, blur_sigma=(1, 2), noise_sigma=(3, 4))
    always = [step.draw(rng) for _ in range(20)]
    assert all(1 <= d.blur_sigma <= 2 and 3 <= d.noise_sigma <= 4 for d in always)
    assert (step(sample(0))['img'] != sample(0)['img']).any()

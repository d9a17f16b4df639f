"""Colour, stain, blur and noise of training samples.

In: pixels. Out: pixels. Invariant: masks are never touched.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS
from numpy.typing import NDArray

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.pipeline.samples import require_share, sample_rng

# Optical densities (red, green, blue) of haematoxylin, eosin and DAB, unit length.
# Source: Ruifrok & Johnston, Anal. Quant. Cytol. Histol. 23 (2001) 291-299, rounded as printed.
STAINS_RGB = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


@TRANSFORMS.register_module()
class HEDJitter(BaseTransform):
    """Change how strongly haematoxylin, eosin and DAB have stained the slide.

    The amount a of each stain becomes a * scale + shift, with scale drawn evenly from
    1 - sigma .. 1 + sigma and shift from -sigma .. sigma. Amounts are optical densities,
    ln(256 / (value + 1)). Expects BGR, which ``LoadCellImage`` gives.

    Required and modified key: img ((H, W, 3) uint8 BGR).

    Args:
        prob: Share of samples that are changed.
        sigma: Half width of both ranges.

    Raises:
        ConfigError: ``prob`` is not in 0..1 or ``sigma`` is below 0.

    Source: Tellez et al., IEEE TMI 37 (2018) 2126-2136, section on H&E augmentation.
    """

    def __init__(self, *, prob: float = 0.5, sigma: float = 0.05) -> None:
        require_share('HEDJitter.prob', prob)
        if sigma < 0:
            raise ConfigError(f'HEDJitter.sigma: {sigma}; expected 0 or more')
        self.prob = prob
        self.sigma = sigma

    def draw(self, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return scale (3,) and shift (3,) of the amounts of the three stains."""
        sigma = self.sigma if rng.random() < self.prob else 0.0
        return rng.uniform(1 - sigma, 1 + sigma, 3), rng.uniform(-sigma, sigma, 3)

    def transform(self, results: dict) -> dict:
        """Change the stains at random."""
        scale, shift = self.draw(sample_rng())
        if (scale != 1).any() or (shift != 0).any():
            results['img'] = restain(results['img'], scale, shift)
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(prob={self.prob}, sigma={self.sigma})'


def restain(
    img_bgr: NDArray[np.uint8], scale: NDArray[np.float64], shift: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """Scale and shift the amounts of haematoxylin, eosin and DAB.

    Args:
        img_bgr: (H, W, 3) uint8, blue first.
        scale: (3,) factor of each stain.
        shift: (3,) added to each stain.

    Returns:
        (H, W, 3) uint8 BGR, rounded and clipped; the same image for scale 1 and shift 0.
    """
    stains = STAINS_RGB[:, ::-1]
    stains = stains / np.linalg.norm(stains, axis=1, keepdims=True)  # (stain, BGR)
    density_of = -np.log((np.arange(256) + 1) / 256).astype(np.float32)
    density = cv2.LUT(img_bgr, density_of)  # (H, W, 3)
    # density' = ((density @ inv(S)) * scale + shift) @ S: one affine map of the three channels.
    mix = np.linalg.inv(stains) @ np.diag(scale) @ stains
    affine = np.concatenate([mix.T, (shift @ stains)[:, None]], axis=1).astype(np.float32)
    changed = cv2.exp(-cv2.transform(density, affine)) * 256 - 1
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class BlurNoise:
    """What RandomBlurNoise drew.

    Attributes:
        blur_sigma: Standard deviation of the Gaussian in px; 0 = none.
        noise_sigma: Standard deviation of the noise in grey levels; 0 = none.
        seed: Seed of the noise.
    """

    blur_sigma: float
    noise_sigma: float
    seed: int


@TRANSFORMS.register_module()
class RandomBlurNoise(BaseTransform):
    """Blur as a lens out of focus does, and add noise as a camera does.

    Required and modified key: img ((H, W, 3) uint8).

    Args:
        blur_prob: Share of samples that are blurred.
        blur_sigma: Range of the Gaussian's standard deviation in px.
        noise_prob: Share of samples that get noise, drawn apart from the blur.
        noise_sigma: Range of the noise's standard deviation in grey levels.

    Raises:
        ConfigError: A probability is not in 0..1, or a range is not 0 <= low <= high.
    """

    def __init__(
        self,
        *,
        blur_prob: float = 0.2,
        blur_sigma: tuple[float, float] = (0.3, 1.5),
        noise_prob: float = 0.2,
        noise_sigma: tuple[float, float] = (1.0, 8.0),
    ) -> None:
        require_share('RandomBlurNoise.blur_prob', blur_prob)
        require_share('RandomBlurNoise.noise_prob', noise_prob)
        for name, bounds in (('blur_sigma', blur_sigma), ('noise_sigma', noise_sigma)):
            if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1]:
                raise ConfigError(f'RandomBlurNoise.{name}: {bounds}; expected 0 <= low <= high')
        self.blur_prob = blur_prob
        self.blur_sigma = tuple(blur_sigma)
        self.noise_prob = noise_prob
        self.noise_sigma = tuple(noise_sigma)

    def draw(self, rng: np.random.Generator) -> BlurNoise:
        """Draw what to do."""
        blur = float(rng.uniform(*self.blur_sigma)) if rng.random() < self.blur_prob else 0.0
        noise = float(rng.uniform(*self.noise_sigma)) if rng.random() < self.noise_prob else 0.0
        return BlurNoise(blur, noise, int(rng.integers(2**63)))

    def transform(self, results: dict) -> dict:
        """Blur and add noise at random."""
        results['img'] = self.degrade(results['img'], self.draw(sample_rng()))
        return results

    @staticmethod
    def degrade(img: NDArray[np.uint8], drawn: BlurNoise) -> NDArray[np.uint8]:
        """Blur ``img`` and add noise to it; the same array where nothing was drawn."""
        if drawn.blur_sigma > 0:
            img = cv2.GaussianBlur(np.ascontiguousarray(img), (0, 0), drawn.blur_sigma)
        if drawn.noise_sigma > 0:
            noise = np.random.default_rng(drawn.seed).standard_normal(img.shape, np.float32)
            img = np.clip(np.rint(img + drawn.noise_sigma * noise), 0, 255).astype(np.uint8)
        return img

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(blur_prob={self.blur_prob}, blur_sigma={self.blur_sigma}, '
            f'noise_prob={self.noise_prob}, noise_sigma={self.noise_sigma})'
        )

"""How a picture becomes what a model wants to see, without torch and mm*.

In: a picture, and the resizing step of a test pipeline as the model's file has it. Out: the picture
resized. Invariant: the same pixels as mmcv's ``Resize`` and our ``ScaleBy`` give, by the same
library (Pillow or OpenCV).

Source: ``rescale_size``, ``imresize`` and ``Resize`` of mmcv 2.x (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import ConfigError

Picture = NDArray[np.uint8]

STEPS: dict[str, tuple[str, ...]] = {
    'Resize': ('scale', 'scale_factor', 'keep_ratio', 'backend', 'interpolation'),
    'ScaleBy': ('factor', 'max_side_px', 'backend', 'interpolation'),
}
CV2_NAMES = {
    'nearest': 'NEAREST',
    'bilinear': 'LINEAR',
    'bicubic': 'CUBIC',
    'area': 'AREA',
    'lanczos': 'LANCZOS4',
}
BACKENDS: dict[str, tuple[str, ...]] = {
    'cv2': tuple(CV2_NAMES),
    'pillow': ('nearest', 'bilinear', 'bicubic', 'lanczos'),
}


def check_step(step: Mapping[str, Any], where: str) -> None:
    """Refuse a step that cannot be followed here.

    Raises:
        ConfigError: Its type, a setting or the library is another than known.
    """
    kind = step.get('type')
    if kind not in STEPS:
        raise ConfigError(
            f'{where}: the test pipeline has the step {kind}; a model file knows '
            f'{" and ".join(STEPS)}; use one of these'
        )
    odd = sorted(set(step) - {'type', *STEPS[kind]})
    backend, how = step.get('backend', 'cv2'), step.get('interpolation', 'bilinear')
    if odd or how not in BACKENDS.get(backend, ()):
        found = ', '.join(odd) or f'backend {backend}, interpolation {how}'
        raise ConfigError(
            f'{where}: {kind} in the test pipeline has {found}; a model file knows '
            f'{", ".join(STEPS[kind])}, with backend cv2 or pillow; leave it out'
        )


def target_wh(image_hw: tuple[int, int], step: Mapping[str, Any]) -> tuple[int, int]:
    """Return the width and height that a step makes of an image."""
    height, width = image_hw
    if step['type'] == 'ScaleBy':
        factor = min(float(step['factor']), int(step['max_side_px']) / max(height, width))
        return max(1, round(width * factor)), max(1, round(height * factor))
    scale = step.get('scale')
    if scale is None:
        factors = _pair(step['scale_factor'])
        scale = tuple(
            int(side * float(f) + 0.5) for side, f in zip((width, height), factors, strict=True)
        )
    scale = _pair(scale)
    if not step.get('keep_ratio', False):
        return int(scale[0]), int(scale[1])
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return int(width * factor + 0.5), int(height * factor + 0.5)


def _pair(value: float | Sequence[float]) -> tuple[float, float]:
    return (value, value) if isinstance(value, (int, float)) else (value[0], value[1])


def resize(image: Picture, step: Mapping[str, Any] | None) -> Picture:
    """Return an image as a step resizes it; None leaves it as it is."""
    if step is None:
        return image
    size = target_wh((image.shape[0], image.shape[1]), step)
    how = str(step.get('interpolation', 'bilinear'))
    if step.get('backend', 'cv2') == 'pillow':
        from PIL import Image

        resampling = Image.Resampling[how.upper()]
        return np.asarray(Image.fromarray(image).resize(size, resampling))
    import cv2

    code = getattr(cv2, f'INTER_{CV2_NAMES[how]}')
    resized: Picture = np.asarray(cv2.resize(image, size, interpolation=code), dtype=np.uint8)
    return resized

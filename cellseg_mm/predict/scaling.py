"""At which pixel size cells are looked for, and how they come back to the image's own pixels.

In: the sizes of an image's levels, and pixel sizes of the image and of the model. Out: a grid to
work in, and a reader of it; ``windows.resize`` brings instances back. Invariant: what is read, and
how it is resized, depends on these sizes alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cellseg_mm.core.errors import ConfigError, ImageError
from cellseg_mm.data.pixel_size import Um, stated, um_text
from cellseg_mm.data.regions import ImageReader, Picture

SAME_SCALE = 0.1  # up to a tenth is what training with random scales covers many times over
MOST_SCALE = 16  # beyond, one of the two pixel sizes is wrong
AS_IT_IS = 'as it is'


@dataclass(frozen=True, slots=True)
class Grid:
    """The pixels in which cells are looked for.

    Attributes:
        level: The level of the image that is read.
        hw: Height and width of the grid; another than the level's means that it is resized.
        full_hw: Height and width of the image that the results are of.
        says: What is done, for people; the same for all images that are treated alike.
    """

    level: int
    hw: tuple[int, int]
    full_hw: tuple[int, int]
    says: str


def choose_grid(
    level_hws: Sequence[tuple[int, int]],
    full_um: Um | None,
    model_um: Um | None,
    *,
    level: int | None = None,
    where: str = '',
) -> Grid:
    """Choose what is read, so that its pixels are as large as those of the training images.

    The coarsest level that is not coarser than these is read, and resized where it is finer by more
    than ``SAME_SCALE``.

    Args:
        level_hws: Sizes of the levels, largest first.
        full_um: Pixel size of the first level; None if it is not known.
        model_um: Pixel size of the model; None if it is not known.
        level: This level is read as it is, whatever its pixels, and the results are of it.
        where: Name of the image, for a message.

    Raises:
        ImageError: The sizes are further apart than any mixture of magnifications.
    """
    if level is not None or full_um is None or model_um is None:
        hw = level_hws[level or 0]
        return Grid(level or 0, hw, hw, AS_IT_IS if level is not None else _unknown(model_um))
    full_hw = level_hws[0]
    scale = (full_um[0] / model_um[0], full_um[1] / model_um[1])
    if not all(1 / MOST_SCALE <= s <= MOST_SCALE for s in scale):
        raise ImageError(
            f'{where}: its pixels are {um_text(full_um)}, those of the model {um_text(model_um)}; '
            f'expected sizes within a factor of {MOST_SCALE}; correct one of them (--um-per-px)'
        )
    wanted = [n * s for n, s in zip(full_hw, scale, strict=True)]
    least = [n * (1 - SAME_SCALE) for n in wanted]
    fits = [k for k, hw in enumerate(level_hws) if hw[0] >= least[0] and hw[1] >= least[1]]
    best = fits[-1] if fits else 0
    hw = level_hws[best]
    if any(abs(n / w - 1) > SAME_SCALE for n, w in zip(hw, wanted, strict=True)):
        hw = (max(round(wanted[0]), 1), max(round(wanted[1]), 1))
    return Grid(best, hw, full_hw, f'with the {um_text(model_um)} per px of the model')


def _unknown(model_um: Um | None) -> str:
    return 'the model' if model_um is None else 'the images'


def scale_text(says: Sequence[str], n_scaled: int) -> str:
    """Say once how the images of a run were scaled.

    Args:
        says: ``Grid.says`` of each image that was looked at.
        n_scaled: Of how many the grid has other pixels than the image.
    """
    n_images, n_model = says.count('the images'), says.count('the model')
    parts = []
    if n_scaled:
        kinds = sorted({text for text in says if text.startswith('with the ')})
        parts.append(f'{n_scaled} images were looked at {" and ".join(kinds)}')
    if n_images:
        parts.append(f'{n_images} images do not say how large their pixels are (--um-per-px does)')
    if n_model:
        parts.append('the model does not say how large the pixels of its training images were')
    nothing = ': nothing was scaled' if parts and not n_scaled else ''
    return f'{"; ".join(parts)}{nothing}.' if parts else ''


def stated_um(word: float | None) -> Um | None:
    """Return what ``--um-per-px`` says of the images.

    Raises:
        ConfigError: It is no plausible size.
    """
    return None if word is None else stated(word, '--um-per-px')


def um_of_members(members: object) -> Um | None:
    """Return the pixel size that a detector's models were trained at; None if none says it.

    Args:
        members: What the detector's provenance says of its models.

    Raises:
        ConfigError: The models were trained at different sizes.
    """
    records = members if isinstance(members, list) else []
    values = [record.get('um_per_px') for record in records if isinstance(record, dict)]
    sizes = {size for value in values if (size := stated(value, 'the model')) is not None}
    if len(sizes) > 1:
        texts = ' and '.join(um_text(size) for size in sorted(sizes))
        raise ConfigError(
            f'members: were trained with pixels of {texts}; expected one size; predict with each '
            'alone, and merge the files (docs/fusion.md)'
        )
    return next(iter(sizes), None)


class ScaledReader(ImageReader):
    """Another image, resized as a whole, by region.

    Bilinear, with the filter as wide as a pixel of the result where it shrinks, so that nothing is
    left out between samples. Regions are those of the whole resized image up to rounding.
    """

    def __init__(self, source: ImageReader, hw: tuple[int, int]) -> None:
        super().__init__(source.path, [hw], 0, source.value_range, source.says)
        self._source = source

    def _read(self, y0: int, x0: int, y1: int, x1: int) -> Picture:
        (height, width), (source_h, source_w) = self.image_hw, self._source.image_hw
        fy, fx = source_h / height, source_w / width
        # Pillow's filter reaches one pixel of the coarser of the two images
        top, left = max(math.floor(y0 * fy - fy - 1), 0), max(math.floor(x0 * fx - fx - 1), 0)
        bottom = min(math.ceil(y1 * fy + fy + 1), source_h)
        right = min(math.ceil(x1 * fx + fx + 1), source_w)
        pixels = self._source.read(top, left, bottom, right)
        self.value_range = self._source.value_range
        box = (x0 * fx - left, y0 * fy - top, x1 * fx - left, y1 * fy - top)
        box = (box[0], box[1], min(box[2], right - left), min(box[3], bottom - top))
        resized = Image.fromarray(pixels).resize(
            (x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box=box
        )
        return np.asarray(resized)

"""Reads regions of one image: what all kinds of files have in common.

In: what opened the file. Out: (h, w, 3) uint8 of any region. Invariant: a region inside the image
is read whole, or it is an error.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.data import intensity
from cellseg_mm.data.intensity import ValueRange
from cellseg_mm.data.pixel_size import PixelSize, Um

Picture = NDArray[np.uint8]
Values = NDArray[Any]
Region = tuple[int, int, int, int]


class ImageReader:
    """Reads regions of one image.

    Attributes:
        path: The file.
        image_hw: Height and width of the level in px.
        level_hws: Sizes of all levels of a pyramid, largest first.
        level: The level that is read.
        value_range: What became 0 and 255; None for values of up to 8 bits, which are as stored,
            and where a large image was not looked at yet.
        says: Which of several images, levels, planes and channels these are, and what else a
            person should know of them; empty where there is nothing to say.
        full_um_per_px: Height and width of a pixel of the largest level in micrometres; None
            where the file does not say, or says what no microscope does.
    """

    def __init__(
        self,
        path: Path,
        level_hws: list[tuple[int, int]],
        level: int,
        value_range: ValueRange | None = None,
        says: str = '',
    ) -> None:
        self.path, self.level_hws, self.level = path, level_hws, level
        self.image_hw = level_hws[level]
        self.value_range = value_range
        self.says = says
        self.full_um_per_px: Um | None = None

    def set_pixel_size(self, size: PixelSize) -> None:
        """Note what the file says of the size of its pixels."""
        self.full_um_per_px = size.um_per_px
        self.says = '; '.join(filter(None, (self.says, size.says)))

    @property
    def um_per_px(self) -> Um | None:
        """Height and width in micrometres of a pixel of the level that is read."""
        return self.level_um_per_px(self.level)

    def level_um_per_px(self, level: int) -> Um | None:
        """Height and width in micrometres of a pixel of any level."""
        if self.full_um_per_px is None:
            return None
        (full_h, full_w), (height, width) = self.level_hws[0], self.level_hws[level]
        return self.full_um_per_px[0] * full_h / height, self.full_um_per_px[1] * full_w / width

    @property
    def downsample(self) -> float:
        """Pixels of the largest level per pixel of this one, along the height."""
        return self.level_hws[0][0] / self.image_hw[0]

    def read(self, y0: int, x0: int, y1: int, x1: int) -> Picture:
        """Return rows y0 to y1 and columns x0 to x1, half-open; own memory.

        Raises:
            ValueError: The region is empty or leaves the image.
            ImageError: The file is damaged there.
        """
        if not (0 <= y0 < y1 <= self.image_hw[0] and 0 <= x0 < x1 <= self.image_hw[1]):
            raise ValueError(f'{self.path}: no region {y0, x0, y1, x1} in {self.image_hw} px')
        return self._read(y0, x0, y1, x1)

    def _read(self, y0: int, x0: int, y1: int, x1: int) -> Picture:
        raise NotImplementedError


class WholeImage(ImageReader):
    """An image that is in memory."""

    def __init__(
        self, path: Path, pixels: Picture, value_range: ValueRange | None, says: str = ''
    ) -> None:
        height, width = pixels.shape[:2]
        super().__init__(path, [(height, width)], 0, value_range, says)
        self._pixels = pixels

    def _read(self, y0: int, x0: int, y1: int, x1: int) -> Picture:
        return self._pixels[y0:y1, x0:x1].copy()


class StoredRegions(ImageReader):
    """An image whose values may have more than 8 bits, and are read by region.

    Attributes:
        bits: Bits per value in the file.
        block_hw: What is decoded at once, at least: the range of values is looked for in steps of
            it.
    """

    bits = 8
    block_hw = (1024, 1024)

    def take_range(self, dtype: np.dtype[Any], bits: int, given: ValueRange | None) -> None:
        """Note how wide the values are, and their range; without one the image is looked at."""
        self.bits = bits
        is_wide = intensity.is_wide(np.empty(0, dtype), bits)
        self.value_range = given if is_wide else None
        self._has_range = given is not None or not is_wide
        self._range_lock = threading.Lock()

    def _stored(self, region: Region) -> Values:
        """Return the chosen channels of a region in the stored type, (h, w, 1 or 3)."""
        raise NotImplementedError

    def _read(self, y0: int, x0: int, y1: int, x1: int) -> Picture:
        values = self._stored((y0, x0, y1, x1))
        self._know_range()
        picture = intensity.to_uint8(self.path, values, self.bits, self.value_range)
        if picture.shape[2] == 1:
            return np.repeat(picture, 3, axis=2)
        return np.array(picture, order='C')

    def _know_range(self) -> None:
        """Look at all values of the level, once, if nothing else says what their range is."""
        with self._range_lock:
            if not self._has_range:
                self.value_range = self._find_range()
                self._has_range = True

    def _find_range(self) -> ValueRange:
        height, width = self.image_hw
        down, across = self.block_hw
        brightest = intensity.Brightest(self.path, height * width)
        for y0 in range(0, height, down):
            for x0 in range(0, width, across):
                region = (y0, x0, min(y0 + down, height), min(x0 + across, width))
                brightest.add(self._stored(region))
        return brightest.value_range()

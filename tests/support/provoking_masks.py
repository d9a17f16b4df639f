"""Label-map masks that provoke: overlaps, parts, corners, holes in the ids, one without a pixel."""

from __future__ import annotations

import numpy as np
import torch
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks

from cellseg_mm.pipeline.label_map_masks import LabelMapMasks

SEEDS = range(8)
HW = (37, 29)  # odd and not square: a transposition cannot pass


def f_shape(size: int) -> np.ndarray:
    """An F: no symmetry, so a wrong flip or rotation shows."""
    shape = np.zeros((size, size), dtype=bool)
    shape[:, 0] = shape[0, :] = True
    shape[size // 2, : size - 1] = True
    return shape


def some_masks(seed: int, hw: tuple[int, int] = HW, n: int = 9) -> LabelMapMasks:
    """Overlapping, touching, border and 1-px instances, one in two parts, one without a pixel."""
    rng = np.random.default_rng(seed)
    bitmaps = np.zeros((n + 3, *hw), dtype=np.uint8)
    for bitmap in bitmaps[:n]:
        size = int(rng.integers(3, 12))
        y, x = rng.integers(-size // 2, hw[0] - 2), rng.integers(-size // 2, hw[1] - 2)
        shape = f_shape(size) if rng.random() < 0.5 else np.ones((size, size), bool)
        top, left = max(y, 0), max(x, 0)
        part = shape[top - y : hw[0] - y, left - x : hw[1] - x]
        bitmap[top : top + part.shape[0], left : left + part.shape[1]] = part
    bitmaps[n, 0, hw[1] - 1] = 1  # 1 px in a corner
    bitmaps[n + 1, 2:5, 2:5] = bitmaps[n + 1, -5:-3, -6:-3] = 1  # two parts
    return shuffled_ids(LabelMapMasks.from_bitmaps(bitmaps), rng)  # the last one stays empty


def shuffled_ids(masks: LabelMapMasks, rng: np.random.Generator) -> LabelMapMasks:
    """Give the same masks ids with gaps, in no order, some above 65535."""
    new_ids = rng.permutation(np.arange(1, 2 * len(masks) + 1) * 9001)[: len(masks)]
    layers = np.zeros_like(masks.layers)
    for old, new, k in zip(masks.ids, new_ids, masks.layer_of, strict=True):
        layers[k][masks.layers[k] == old] = new
    return LabelMapMasks(layers, new_ids, masks.layer_of)


def stock(masks: LabelMapMasks) -> BitmapMasks:
    """The same instances as mmdet holds them, decoded by the slowest possible comparison."""
    bitmaps = [masks.layers[k] == i for k, i in zip(masks.layer_of, masks.ids, strict=True)]
    array = np.array(bitmaps, dtype=np.uint8).reshape(-1, masks.height, masks.width)
    return BitmapMasks(array, masks.height, masks.width)


def assert_same(got: LabelMapMasks, wanted: BitmapMasks) -> None:
    assert (got.height, got.width) == (wanted.height, wanted.width)
    assert len(got) == len(wanted)
    np.testing.assert_array_equal(got.to_ndarray(), wanted.to_ndarray())
    np.testing.assert_array_equal(got.areas, wanted.areas)
    boxes = wanted.get_bboxes('hbox').tensor
    assert torch.equal(got.get_bboxes(HorizontalBoxes).tensor, boxes)

"""Paste cells of one image into another.

In: two samples. Out: one. Invariant: no two cells share a pixel.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS
from numpy.typing import NDArray

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.pipeline.label_map_masks import LabelMapMasks
from cellseg_mm.pipeline.samples import (
    class_weights,
    keep_instances,
    label_masks,
    require_share,
    sample_rng,
)


@dataclass(frozen=True, slots=True)
class Paste:
    """One cell to paste: instance ``row`` of the source, its box's ``top`` and ``left`` px."""

    row: int
    top: int
    left: int


@TRANSFORMS.register_module()
class LabelMapCopyPaste(BaseTransform):
    """Paste whole cells of this or another image at random places.

    A pasted cell hides what it covers: other cells lose these pixels, and those that keep less
    than ``min_share`` of their pixels are dropped. Cells are drawn with a weight of 1 / number of
    cells of their class in the source, so rare classes are pasted as often as common ones. A cell
    that does not fit into the image is left out.

    Required keys: img, gt_masks (LabelMapMasks), gt_bboxes_labels, gt_ignore_flags; and mix_results
    with one sample of the same keys when ``source`` is ``other``, which mmdet's
    ``MultiImageMixDataset`` adds.
    Modified keys: img, gt_masks, gt_bboxes (tight), gt_bboxes_labels, gt_ignore_flags.
    Added keys: n_pasted, n_covered (cells dropped).

    Args:
        source: ``same`` takes the cells from the image itself, ``other`` from mix_results.
        max_pasted: Most cells pasted; the number is drawn evenly from 0 to this.
        min_share: Share of its pixels that a cell must keep.

    Raises:
        ConfigError: A setting is out of range, the masks are not LabelMapMasks, or mix_results is
            missing.

    Source: the idea is Ghiasi et al., CVPR 2021 (Simple Copy-Paste).
    """

    def __init__(
        self, *, source: str = 'same', max_pasted: int = 20, min_share: float = 0.3
    ) -> None:
        require_share('LabelMapCopyPaste.min_share', min_share)
        if source not in ('same', 'other'):
            raise ConfigError(f'LabelMapCopyPaste.source: {source!r}; expected same or other')
        if max_pasted < 0:
            raise ConfigError(f'LabelMapCopyPaste.max_pasted: {max_pasted}; expected 0 or more')
        self.source = source
        self.max_pasted = max_pasted
        self.min_share = min_share

    def get_indexes(self, dataset: Sequence) -> list[int]:
        """Return which samples MultiImageMixDataset must add as mix_results."""
        return [random.randrange(len(dataset))] if self.source == 'other' else []

    def draw(
        self,
        rng: np.random.Generator,
        image_hw: tuple[int, int],
        class_ids: NDArray[np.int64],
        boxes_xyxy: NDArray[np.int64],
    ) -> list[Paste]:
        """Draw cells of the source and their places in an image of ``image_hw`` px."""
        sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]  # (N, 2) width, height
        fits = (sides > 0).all(axis=1) & (sides <= np.array(image_hw)[::-1]).all(axis=1)
        usable = np.flatnonzero(fits)
        n = min(int(rng.integers(self.max_pasted + 1)), len(usable))
        if n == 0:
            return []
        weights = class_weights(class_ids[usable], power=1)
        rows = rng.choice(usable, n, replace=False, p=weights)
        limits = np.array(image_hw)[None, ::-1] - sides[rows]
        places = rng.integers(0, limits + 1)
        return [
            Paste(int(row), int(top), int(left))
            for row, (left, top) in zip(rows, places, strict=True)
        ]

    def transform(self, results: dict) -> dict:
        """Paste random cells."""
        source = results
        if self.source == 'other':
            if not results.get('mix_results'):
                raise ConfigError(
                    'LabelMapCopyPaste: no mix_results in the sample; expected one with '
                    "source='other'; wrap the data set in MultiImageMixDataset"
                )
            source = results['mix_results'][0]
        masks = label_masks(source, 'LabelMapCopyPaste')
        image_hw, class_ids = results['img'].shape[:2], source['gt_bboxes_labels']
        pastes = self.draw(sample_rng(), image_hw, class_ids, masks.boxes_xyxy)
        return self.paste(results, source, pastes)

    def paste(self, results: dict, source: dict, pastes: Sequence[Paste]) -> dict:
        """Paste cells of ``source`` in the given order; later ones cover earlier ones."""
        masks = label_masks(results, 'LabelMapCopyPaste')
        from_masks = label_masks(source, 'LabelMapCopyPaste')
        from_img = source['img'].copy() if source is results else source['img']
        img = results['img'].copy()
        # Copied, because selections of these masks share their layers; at least one, to paste on.
        layers = np.zeros((max(len(masks.layers), 1), masks.height, masks.width), dtype=np.int32)
        layers[: len(masks.layers)] = masks.layers
        new_ids = int(masks.ids.max(initial=0)) + 1 + np.arange(len(pastes))
        for paste, new_id in zip(pastes, new_ids.tolist(), strict=True):
            window, cell = _tight_crop(from_masks, paste.row)
            height, width = cell.shape
            there = np.s_[paste.top : paste.top + height, paste.left : paste.left + width]
            img[there][cell] = from_img[window][cell]
            layers[(slice(None), *there)][:, cell] = 0
            layers[0][there][cell] = new_id
        results['img'] = img
        rows = np.array([paste.row for paste in pastes], dtype=np.int64)
        results['gt_masks'] = LabelMapMasks(
            layers,
            np.concatenate([masks.ids, new_ids]),
            np.concatenate([masks.layer_of, np.zeros(len(pastes), dtype=np.int64)]),
        )
        for key in ('gt_bboxes_labels', 'gt_ignore_flags'):
            results[key] = np.concatenate([results[key], source[key][rows]])
        whole = np.concatenate([masks.areas, from_masks.areas[rows]])
        return self._drop_covered(results, whole, len(pastes))

    def _drop_covered(self, results: dict, whole: NDArray[np.int64], n_pasted: int) -> dict:
        masks = results['gt_masks']
        keep = (masks.areas > 0) & (masks.areas >= self.min_share * whole)
        results['n_pasted'] = results.get('n_pasted', 0) + n_pasted
        results['n_covered'] = results.get('n_covered', 0) + int((~keep).sum())
        results['gt_bboxes'] = masks.get_bboxes()
        return keep_instances(results, keep)

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(source={self.source!r}, max_pasted={self.max_pasted}, '
            f'min_share={self.min_share})'
        )


def _tight_crop(masks: LabelMapMasks, row: int) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """Return where one cell's box lies, and its mask inside (h, w) bool."""
    x1, y1, x2, y2 = masks.boxes_xyxy[row].tolist()
    window = (slice(y1, y2), slice(x1, x2))
    return window, masks.layers[masks.layer_of[row]][window] == masks.ids[row]

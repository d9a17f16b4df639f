"""What happens to a training sample between the files and the detector, beyond mmdet's transforms.

In: mmdet's ``results`` dict with ``img_path`` and ``label_paths``. Out: ``img`` (H, W, 3) uint8 BGR
and ground truth whose masks are :class:`LabelMapMasks`. Invariant: image, masks and boxes move
together; the loading transforms draw nothing, and each of the others draws its parameters in one
method and applies them in another.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from mmcv.transforms import BaseTransform
from mmdet.datasets.transforms import Resize
from mmdet.registry import TRANSFORMS
from mmdet.structures.bbox import HorizontalBoxes
from numpy.typing import NDArray

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.pipeline.samples import (
    class_weights,
    keep_instances,
    label_masks,
    record_homography,
    require_share,
    sample_rng,
)

# ---- geometry


@TRANSFORMS.register_module()
class RandomScale(Resize):
    """Resize by a random factor of the file's own resolution.

    Cells have the same size in px whatever the size of their image, so small recipes train on crops
    at the file's resolution; MMDetection's RandomResize fits the whole image into a box instead.

    Args:
        ratio_range: Smallest and largest factor; drawn uniformly on a log scale, so that halving
            and doubling are equally likely.
        **kwargs: Options of ``Resize`` other than the scale.

    Raises:
        ConfigError: ``ratio_range`` is not two rising positive numbers.
    """

    def __init__(self, *, ratio_range: tuple[float, float], **kwargs: object) -> None:
        if not 0 < ratio_range[0] <= ratio_range[1]:
            raise ConfigError(
                f'RandomScale.ratio_range: found {ratio_range}; expected two positive numbers, '
                'the smaller first'
            )
        super().__init__(scale_factor=1.0, keep_ratio=True, **kwargs)
        self.ratio_range = (float(ratio_range[0]), float(ratio_range[1]))

    def draw(self, rng: np.random.Generator) -> float:
        """Return a factor."""
        return float(np.exp(rng.uniform(*np.log(self.ratio_range))))

    def transform(self, results: dict) -> dict:
        """Resize by a random factor."""
        return self.resize_by(results, self.draw(sample_rng()))

    def resize_by(self, results: dict, factor: float) -> dict:
        """Resize image, boxes and masks by ``factor``."""
        height, width = results['img'].shape[:2]
        hw = [max(1, round(side * factor)) for side in (height, width)]
        self.scale = (hw[1], hw[0])
        self.keep_ratio = False  # the rounded size is exact already
        return super().transform(results)


@TRANSFORMS.register_module()
class ScaleBy(Resize):
    """Resize by a fixed factor of the file's own resolution, up to a largest side.

    The test-time counterpart of :class:`RandomScale`.

    Args:
        factor: Factor of both sides.
        max_side_px: An image whose longer side would become larger is scaled to this instead, which
            bounds memory; use tools/predict.py to see such an image at full scale in tiles.
        **kwargs: Options of ``Resize`` other than the scale.

    Raises:
        ConfigError: ``factor`` or ``max_side_px`` is not positive.
    """

    def __init__(self, *, factor: float, max_side_px: int, **kwargs: object) -> None:
        if factor <= 0 or max_side_px <= 0:
            raise ConfigError(
                f'ScaleBy: found factor {factor}, max_side_px {max_side_px}; expected two positive '
                'numbers'
            )
        super().__init__(scale_factor=float(factor), keep_ratio=True, **kwargs)
        self.factor = float(factor)
        self.max_side_px = int(max_side_px)

    def transform(self, results: dict) -> dict:
        """Resize by the factor, or less for a very large image."""
        height, width = results['img'].shape[:2]
        factor = min(self.factor, self.max_side_px / max(height, width))
        hw = [max(1, round(side * factor)) for side in (height, width)]
        self.scale = (hw[1], hw[0])
        self.keep_ratio = False  # the rounded size is exact already
        return super().transform(results)


@TRANSFORMS.register_module()
class RandomRotate90(BaseTransform):
    """Turn the sample by 90, 180 or 270 degrees; exact for image, masks and boxes.

    Required keys: img. Modified keys: img, img_shape, gt_bboxes, gt_masks, homography_matrix.

    Args:
        prob: Share of samples that are turned; the three angles are equally likely.

    Raises:
        ConfigError: ``prob`` is not in 0..1, or the masks are not LabelMapMasks.
    """

    def __init__(self, *, prob: float = 0.75) -> None:
        require_share('RandomRotate90.prob', prob)
        self.prob = prob

    def draw(self, rng: np.random.Generator) -> int:
        """Return the number of quarter turns, counter-clockwise; 0 = none."""
        return int(rng.integers(1, 4)) if rng.random() < self.prob else 0

    def transform(self, results: dict) -> dict:
        """Turn by a random number of quarter turns."""
        return self.turn(results, self.draw(sample_rng()))

    def turn(self, results: dict, k: int) -> dict:
        """Turn by ``k`` quarter turns counter-clockwise."""
        for _ in range(k % 4):
            self._turn_boxes(results)
        if k % 4:
            results['img'] = np.ascontiguousarray(np.rot90(results['img'], k))
            results['img_shape'] = results['img'].shape[:2]
            if 'gt_masks' in results:
                results['gt_masks'] = label_masks(results, 'RandomRotate90').rotate90(k)
        return results

    @staticmethod
    def _turn_boxes(results: dict) -> None:
        # One quarter turn takes the point (x, y) of an image of width W to (y, W - x).
        height, width = results['img_shape'][:2]
        turn = np.array([[0, 1, 0], [-1, 0, width], [0, 0, 1]], dtype=np.float32)
        record_homography(results, turn)
        results['img_shape'] = (width, height)
        if 'gt_bboxes' in results:
            boxes = results['gt_bboxes'].tensor
            turned = boxes[:, [1, 2, 3, 0]]
            turned[:, [1, 3]] = width - turned[:, [1, 3]]
            results['gt_bboxes'] = HorizontalBoxes(turned)

    def __repr__(self) -> str:
        return f'{type(self).__name__}(prob={self.prob})'


@TRANSFORMS.register_module()
class ClassAwareCrop(BaseTransform):
    """Cut a crop of fixed size that rare classes survive.

    One class among those in the image is drawn with a weight of 1 / its number of cells, then one
    of its cells, and the crop is laid at random so that the cell's centre is inside. Without cells,
    or in a share of ``1 - class_aware_prob`` of the samples, it is a plain random crop. An image
    smaller than the crop is kept whole along that side (nothing is padded).

    Required keys: img, gt_masks (LabelMapMasks), gt_bboxes_labels.
    Modified keys: img, img_shape, gt_masks, gt_bboxes (tight boxes of the cut masks),
    gt_bboxes_labels, gt_ignore_flags, homography_matrix. Cells without a pixel are dropped.

    Args:
        crop_size: Height and width of the crop in px, or one number for both.
        class_aware_prob: Share of samples where a class is drawn.

    Raises:
        ConfigError: A setting is out of range, or the masks are not LabelMapMasks.
    """

    def __init__(self, *, crop_size: int | tuple[int, int], class_aware_prob: float = 1.0) -> None:
        require_share('ClassAwareCrop.class_aware_prob', class_aware_prob)
        self.crop_hw = (crop_size, crop_size) if isinstance(crop_size, int) else tuple(crop_size)
        if len(self.crop_hw) != 2 or min(self.crop_hw) < 1:
            raise ConfigError(
                f'ClassAwareCrop.crop_size: {crop_size}; expected (height, width) above 0 px'
            )
        self.class_aware_prob = class_aware_prob

    def draw(
        self,
        rng: np.random.Generator,
        image_hw: tuple[int, int],
        class_ids: NDArray[np.int64],
        boxes_xyxy: NDArray[np.int64],
    ) -> tuple[int, int]:
        """Return the crop's top and left in px.

        Args:
            rng: Source of chance.
            image_hw: Height and width in px.
            class_ids: (N,) int64.
            boxes_xyxy: (N, 4) tight boxes in px; those without area are not drawn.
        """
        low = np.zeros(2, dtype=np.int64)
        high = np.maximum(np.array(image_hw) - self.crop_hw, 0)  # margin of top and left
        usable = np.flatnonzero(boxes_xyxy[:, 2] > boxes_xyxy[:, 0])
        if len(usable) and rng.random() < self.class_aware_prob:
            # A class has n cells: 1 / n for the class, times 1 / n for each cell of it.
            wanted = rng.choice(usable, p=class_weights(class_ids[usable], power=2))
            x1, y1, x2, y2 = boxes_xyxy[wanted].tolist()
            centre = np.array([(y1 + y2) // 2, (x1 + x2) // 2])
            low = np.clip(centre - self.crop_hw + 1, 0, high)
            high = np.clip(centre, 0, high)
        top, left = rng.integers(low, high + 1).tolist()
        return top, left

    def transform(self, results: dict) -> dict:
        """Cut a random crop."""
        masks = label_masks(results, 'ClassAwareCrop')
        image_hw, class_ids = results['img'].shape[:2], results['gt_bboxes_labels']
        top, left = self.draw(sample_rng(), image_hw, class_ids, masks.boxes_xyxy)
        return self.cut(results, top, left)

    def cut(self, results: dict, top: int, left: int) -> dict:
        """Cut the crop whose first pixel is (``top``, ``left``)."""
        bottom, right = top + self.crop_hw[0], left + self.crop_hw[1]
        results['img'] = results['img'][top:bottom, left:right]
        results['img_shape'] = results['img'].shape[:2]
        shift = np.array([[1, 0, -left], [0, 1, -top], [0, 0, 1]], dtype=np.float32)
        record_homography(results, shift)
        masks = label_masks(results, 'ClassAwareCrop')
        results['gt_masks'] = masks.crop(np.array([left, top, right, bottom]))
        results['gt_bboxes'] = results['gt_masks'].get_bboxes()
        return keep_instances(results, results['gt_masks'].areas > 0)

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(crop_size={self.crop_hw}, '
            f'class_aware_prob={self.class_aware_prob})'
        )


@TRANSFORMS.register_module()
class DropTruncatedInstances(BaseTransform):
    """Run a crop and drop the cells of which it left only a sliver.

    Required keys: those of the crop, and gt_masks (LabelMapMasks).
    Added keys: n_truncated (cells dropped or ignored so far in this sample).

    Args:
        crop: A transform that cuts or shifts without scaling, such as ``RandomCrop``.
        min_share: Cells that keep less than this share of their pixels are dropped. Cells that the
            crop itself removed are not counted.
        as_ignored: Keep them with gt_ignore_flags set instead, for assigners with
            ``ignore_iof_thr``: the sliver's pixels are then no background.

    Raises:
        ConfigError: ``min_share`` is not in 0..1, or the masks are not LabelMapMasks.
    """

    def __init__(self, *, crop: Mapping, min_share: float = 0.2, as_ignored: bool = False) -> None:
        require_share('DropTruncatedInstances.min_share', min_share)
        self.crop = TRANSFORMS.build(crop)
        self.min_share = min_share
        self.as_ignored = as_ignored

    def transform(self, results: dict) -> dict | None:
        """Crop and drop; None where the crop gives None."""
        before = label_masks(results, 'DropTruncatedInstances')
        cropped = self.crop(results)
        if cropped is None:
            return None
        after = label_masks(cropped, 'DropTruncatedInstances')
        # A crop keeps ids and layers, so they name the same cell before and after.
        area_of = dict(
            zip(
                zip(before.layer_of.tolist(), before.ids.tolist(), strict=True),
                before.areas.tolist(),
                strict=True,
            )
        )
        whole = [
            area_of[key] for key in zip(after.layer_of.tolist(), after.ids.tolist(), strict=True)
        ]
        keep = after.areas >= self.min_share * np.array(whole, dtype=np.float64)
        cropped['n_truncated'] = cropped.get('n_truncated', 0) + int((~keep).sum())
        if self.as_ignored:
            cropped['gt_ignore_flags'] = cropped['gt_ignore_flags'] | ~keep
            return cropped
        return keep_instances(cropped, keep)

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(crop={self.crop}, min_share={self.min_share}, '
            f'as_ignored={self.as_ignored})'
        )


# ---- colour


# ---- copy-paste


# ---- packing


# ---- shared by the transforms above

"""What happens to a training sample between the files and the detector, beyond mmdet's transforms.

In: mmdet's ``results`` dict with ``img_path`` and ``label_paths``. Out: ``img`` (H, W, 3) uint8 BGR
and ground truth whose masks are :class:`LabelMapMasks`. Invariant: image, masks and boxes move
together; the loading transforms draw nothing, and each of the others draws its parameters in one
method and applies them in another.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS

from cellseg_mm.label_map_masks import LabelMapMasks
from cellseg_mm.labels import Case, read_image, read_label_layers


@TRANSFORMS.register_module()
class LoadCellImage(BaseTransform):
    """Read the image as mmdet expects it: blue, green, red.

    Required keys: img_path.
    Added keys: img ((H, W, 3) uint8 BGR, or float32 with ``to_float32``), img_shape and ori_shape
    (H, W).

    Args:
        red_blue_swapped: The files store blue where red belongs, as the MoNuSAC images of this
            project's data do; without it ``img`` would be RGB for them.
        to_float32: Convert to float32; values stay 0..255.

    Raises:
        ImageError: The file cannot be used, see ``labels.read_image``.
    """

    def __init__(self, *, red_blue_swapped: bool = False, to_float32: bool = False) -> None:
        self.red_blue_swapped = red_blue_swapped
        self.to_float32 = to_float32

    def transform(self, results: dict) -> dict:
        """Add the image."""
        stored = read_image(results['img_path'])
        # Files are red first as a rule. Where red and blue are swapped they are blue first already.
        img = stored if self.red_blue_swapped else np.ascontiguousarray(stored[..., ::-1])
        results['img'] = img.astype(np.float32) if self.to_float32 else img
        results['img_shape'] = results['ori_shape'] = img.shape[:2]
        return results

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(red_blue_swapped={self.red_blue_swapped}, '
            f'to_float32={self.to_float32})'
        )


@TRANSFORMS.register_module()
class LoadLabelMaps(BaseTransform):
    """Read one label map per class and turn it into mmdet ground truth.

    Required keys: label_paths (0-based class id -> path), img_path, and the image's size as
    ori_shape or else height and width.
    Added keys: gt_masks (LabelMapMasks, N), gt_bboxes (HorizontalBoxes, N x 4, float32 xyxy px,
    tight), gt_bboxes_labels (N, int64, 0-based), gt_ignore_flags (N, bool, all False).

    Raises:
        LabelMapError: A map cannot be used or has another size, see ``labels.read_label_layers``.
    """

    def transform(self, results: dict) -> dict:
        """Add the ground truth."""
        image_hw = results.get('ori_shape') or (results['height'], results['width'])
        case = Case(
            name=Path(results['img_path']).parent.name,
            image_path=Path(results['img_path']),
            label_paths={int(k): Path(path) for k, path in results['label_paths'].items()},
            image_id=int(results.get('img_id', 0)),
            image_hw=(int(image_hw[0]), int(image_hw[1])),
        )
        found = read_label_layers(case)
        ids = np.arange(1, len(found) + 1, dtype=np.int32)
        masks = LabelMapMasks(found.layers, ids, found.layer_of)
        results['gt_masks'] = masks
        results['gt_bboxes'] = masks.get_bboxes()
        results['gt_bboxes_labels'] = found.class_ids
        results['gt_ignore_flags'] = np.zeros(len(masks), dtype=bool)
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}()'

"""Views of a picture for test-time augmentation: flips, quarter turns, scales.

In: a spec such as ``d4,scales=0.8/1.25``. Out: the views, a test pipeline that makes them, and each
view's instances in the picture's own coordinates. Invariant: a turn is a permutation of pixels, and
so is the way back; masks, boxes and mask probabilities of a turned view come back without any
interpolation, exact to the pixel edge.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core import rle
from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.layout import augmented_name
from cellseg_mm.fusion import fuse as fusion

DEFAULT_RULE = 'soft_mask'
RESIZES = ('Resize', 'FixScaleResize', 'FixShapeResize')


@dataclass(frozen=True, slots=True)
class View:
    """One of the eight ways in which a picture can lie: first transposed, then flipped.

    Attributes:
        transpose: Rows become columns.
        flip_y: The last row comes first.
        flip_x: The last column comes first.
    """

    transpose: bool = False
    flip_y: bool = False
    flip_x: bool = False

    def turn(self, image: NDArray[Any]) -> NDArray[Any]:
        """Return an image (H, W, ...) as this view shows it, C-contiguous."""
        turned = image.swapaxes(0, 1) if self.transpose else image
        return np.ascontiguousarray(self._flip(turned))

    def turn_back(self, image: NDArray[Any]) -> NDArray[Any]:
        """Undo :meth:`turn`."""
        flipped = self._flip(image)
        return np.ascontiguousarray(flipped.swapaxes(0, 1) if self.transpose else flipped)

    def _flip(self, image: NDArray[Any]) -> NDArray[Any]:
        image = image[::-1] if self.flip_y else image
        return image[:, ::-1] if self.flip_x else image

    def original_hw(self, view_hw: tuple[int, int]) -> tuple[int, int]:
        """Return the height and width of the image whose view has ``view_hw``."""
        return (view_hw[1], view_hw[0]) if self.transpose else view_hw

    def boxes_back(
        self, boxes_xyxy: NDArray[np.float32], view_hw: tuple[int, int]
    ) -> NDArray[np.float32]:
        """Return boxes (N, 4) of the view in the original image's coordinates."""
        x0, y0, x1, y1 = np.asarray(boxes_xyxy, dtype=np.float32).reshape(-1, 4).T
        height, width = view_hw
        if self.flip_y:
            y0, y1 = height - y1, height - y0
        if self.flip_x:
            x0, x1 = width - x1, width - x0
        if self.transpose:
            x0, y0, x1, y1 = y0, x0, y1, x1
        return np.stack([x0, y0, x1, y1], axis=1)

    @property
    def key(self) -> tuple[bool, bool, bool]:
        """What a data sample's meta information carries."""
        return self.transpose, self.flip_y, self.flip_x


IDENTITY = View()
FLIPS = tuple(View(False, y, x) for y in (False, True) for x in (False, True))
D4 = tuple(View(t, y, x) for t in (False, True) for y in (False, True) for x in (False, True))
NAMED_VIEWS: dict[str, tuple[View, ...]] = {
    'none': (IDENTITY,),
    'hflip': (IDENTITY, View(flip_x=True)),
    'flips': FLIPS,
    'd4': D4,
}


def map_back(instances: InstanceSet, view: View) -> InstanceSet:
    """Return a view's instances in the coordinates of the original image.

    Args:
        instances: Instances of the turned image; ``extra`` may have ``mask_probs``, ``mask_boxes``.
        view: How the image had been turned.
    """
    if view == IDENTITY:
        return instances
    view_hw, image_hw = instances.image_hw, view.original_hw(instances.image_hw)
    crops, offsets = instances.crops()
    sizes = np.array([crop.shape for crop in crops], dtype=np.int64).reshape(-1, 2)
    frames = np.concatenate([offsets, offsets + sizes], axis=1)[:, [1, 0, 3, 2]]
    x0, y0 = _integer_boxes_back(view, frames, view_hw)[:, :2].T
    turned = [view.turn_back(crop) for crop in crops]
    extra = dict(instances.extra)
    if 'mask_probs' in extra:
        extra['mask_probs'] = _probs_back(view, extra['mask_probs'])
    if 'mask_boxes' in extra:
        extra['mask_boxes'] = view.boxes_back(extra['mask_boxes'], view_hw)
    filled = sizes.prod(axis=1) > 0
    corners = np.where(filled[:, None], np.stack([y0, x0], axis=1), 0)
    return replace(
        instances,
        image_hw=image_hw,
        boxes_xyxy=view.boxes_back(instances.boxes_xyxy, view_hw),
        rles=tuple(rle.encode_crops(turned, corners, image_hw)),
        extra=extra,
    )


def _integer_boxes_back(
    view: View, boxes: NDArray[np.int64], view_hw: tuple[int, int]
) -> NDArray[np.int64]:
    return np.rint(view.boxes_back(boxes.astype(np.float32), view_hw)).astype(np.int64)


def _probs_back(view: View, probs: NDArray[Any]) -> NDArray[Any]:
    """Turn (N, S, S) grids back."""
    return np.moveaxis(view.turn_back(np.moveaxis(probs, 0, -1)), -1, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TtaSpec:
    """Which views are predicted, and how they are fused.

    Attributes:
        views: At least one; the first is the image as it is.
        scales: Factors of the test pipeline's size; the first is 1.
        rule: Fusion rule, as on the command line.
        post: Post-processing, as on the command line.
    """

    views: tuple[View, ...] = (IDENTITY,)
    scales: tuple[float, ...] = (1.0,)
    rule: str = DEFAULT_RULE
    post: str = ''

    def __post_init__(self) -> None:
        if not self.views or self.views[0] != IDENTITY or self.scales[:1] != (1.0,):
            raise ConfigError('tta: expected the image as it is as first view, at scale 1')
        if len(set(self.scales)) < len(self.scales) or not all(0.1 <= s <= 10 for s in self.scales):
            raise ConfigError(
                f'tta: scales {"/".join(map(str, self.scales))}; expected different numbers from '
                '0.1 to 10, without 1, which is always there; for example scales=0.8/1.25'
            )
        fusion.from_spec(self.rule)
        fusion.post_from_spec(self.post)

    def __len__(self) -> int:
        return len(self.views) * len(self.scales)

    def tta_pipeline(self, test_pipeline: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return a pipeline that makes all views, for ``tta_pipeline``.

        Args:
            test_pipeline: Loading first, ``PackDetInputs`` last.

        Raises:
            ConfigError: Scales are asked for and nothing resizes.
        """
        steps = [copy.deepcopy(dict(step)) for step in test_pipeline]
        for step in steps:
            if step.get('type') in ('PackDetInputs', 'PackCellInputs'):
                keys = step.get('meta_keys', ('img_id', 'img_path', 'ori_shape', 'img_shape'))
                step['meta_keys'] = (*keys, *(k for k in ('view', 'scale_factor') if k not in keys))
        resize_at = [i for i, step in enumerate(steps) if step.get('type') in RESIZES]
        if not resize_at and len(self.scales) > 1:
            raise ConfigError(
                'tta: scales need a Resize in the test pipeline; there is none; add '
                "dict(type='Resize', scale_factor=1.0, keep_ratio=True), or leave the scales out"
            )
        turns = [{'type': 'TurnImage', 'view': list(view.key)} for view in self.views]
        transforms: list[list[dict[str, Any]]] = [turns]
        for i, step in enumerate(steps[1:], start=1):
            is_resize = resize_at[:1] == [i]
            transforms.append([scaled(step, s) for s in self.scales] if is_resize else [step])
        return [steps[0], {'type': 'TestTimeAug', 'transforms': transforms}]

    def tta_model(self) -> dict[str, Any]:
        """Return settings for ``tta_model``; a hook or an ensemble adds the module."""
        return {'type': 'CellTTAModel', 'rule': self.rule, 'post': self.post}


def scaled(step: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Return a resizing step whose target is ``factor`` times as large."""
    if factor == 1:
        return dict(step)
    changed = dict(step)
    if changed.get('scale') is not None:
        scale = changed['scale']
        sides = (scale, scale) if isinstance(scale, (int, float)) else scale
        changed['scale'] = tuple(max(round(side * factor), 1) for side in sides)
    elif changed.get('scale_factor') is not None:
        given = changed['scale_factor']
        is_pair = isinstance(given, (tuple, list))
        changed['scale_factor'] = tuple(g * factor for g in given) if is_pair else given * factor
    else:
        raise ConfigError(
            f'tta: {changed.get("type")} has neither scale nor scale_factor; scales need one'
        )
    return changed


def from_spec(text: str, *, rule: str = DEFAULT_RULE, post: str = '') -> TtaSpec:
    """Read test-time augmentation from the command line.

    ``none``, ``hflip`` (2 views), ``flips`` (4) or ``d4`` (8: flips and quarter turns), and
    ``scales=0.8/1.25`` besides the size as it is; joined by a comma: ``d4,scales=0.8/1.25``.

    Args:
        text: The spec.
        rule: Fusion rule.
        post: Post-processing of the fused instances.

    Raises:
        ConfigError: A word or a number is not known; the message lists what is.
    """
    views: tuple[View, ...] = (IDENTITY,)
    scales: tuple[float, ...] = (1.0,)
    for item in (part.strip() for part in text.split(',')):
        key, equals, value = item.partition('=')
        if key == 'scales' and equals:
            if not re.fullmatch(r'[0-9.]+(/[0-9.]+)*', value) or '..' in value:
                raise ConfigError(f'tta {text!r}: scales {value!r}; write them as 0.8/1.25')
            scales = (1.0, *(float(number) for number in value.split('/')))
        elif item in NAMED_VIEWS:
            views = NAMED_VIEWS[item]
        else:
            raise ConfigError(
                f'tta {text!r}: no setting {item!r}; known are {", ".join(NAMED_VIEWS)} and '
                'scales=0.8/1.25'
            )
    return TtaSpec(views=views, scales=scales, rule=rule, post=post)


def file_name(text: str) -> str:
    """Return a spec as a part of a file's name: letters, digits and hyphens.

    Raises:
        ConfigError: The spec is wrong, or no augmentation.
    """
    if len(from_spec(text)) == 1:
        raise ConfigError(f'tta {text!r}: makes one view; expected more, for example flips')
    return augmented_name(text)

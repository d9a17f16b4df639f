"""Test-time augmentation for masks: flips, quarter turns, scales.

In: a test pipeline, and a spec such as ``d4,scales=0.8/1.25``. Out: a pipeline that makes the
views, and a model in mmengine's TTA idiom that maps each view's instances back and fuses them.
Invariant: a turn is a permutation of pixels, and so is the way back; masks, boxes and mask
probabilities of a turned view come back without any interpolation, exact to the pixel edge.

An image is turned before it is resized, so the resized view is what the detector would see if the
file had been scanned that way, and MMDetection's own rescaling applies as it is. Views are fused
like the members of an ensemble (``fusion``), where MMDetection asserts that masks are unsupported.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from mmcv.transforms import BaseTransform
from mmdet.registry import MODELS, TRANSFORMS
from mmdet.structures import DetDataSample
from mmengine.model import BaseTTAModel
from numpy.typing import NDArray
from torch import nn

from cellseg_mm.core import rle
from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import PROB_KEYS, InstanceSet
from cellseg_mm.core.layout import augmented_name
from cellseg_mm.fusion import fuse as fusion
from cellseg_mm.model.detections import to_instance_set, to_pred_instances

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

    def turn(self, image: NDArray) -> NDArray:
        """Return an image (H, W, ...) as this view shows it, C-contiguous."""
        turned = image.swapaxes(0, 1) if self.transpose else image
        return np.ascontiguousarray(self._flip(turned))

    def turn_back(self, image: NDArray) -> NDArray:
        """Undo :meth:`turn`."""
        flipped = self._flip(image)
        return np.ascontiguousarray(flipped.swapaxes(0, 1) if self.transpose else flipped)

    def _flip(self, image: NDArray) -> NDArray:
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


def _probs_back(view: View, probs: NDArray) -> NDArray:
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

    def tta_pipeline(self, test_pipeline: Sequence[Mapping]) -> list[dict]:
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
        transforms: list[list[dict]] = [turns]
        for i, step in enumerate(steps[1:], start=1):
            is_resize = resize_at[:1] == [i]
            transforms.append([_scaled(step, s) for s in self.scales] if is_resize else [step])
        return [steps[0], {'type': 'TestTimeAug', 'transforms': transforms}]

    def tta_model(self) -> dict:
        """Return settings for ``tta_model``; a hook or an ensemble adds the module."""
        return {'type': 'CellTTAModel', 'rule': self.rule, 'post': self.post}


def _scaled(step: Mapping, factor: float) -> dict:
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


@TRANSFORMS.register_module()
class TurnImage(BaseTransform):
    """Turn the image, for one view of a test-time augmentation.

    Put it before resizing. ``ori_shape`` becomes that of the turned image, because the detector
    works in its frame; ``CellTTAModel`` maps back.

    Required keys: img. Changed keys: img, img_shape, ori_shape. Added keys: view (three bool:
    transposed, then rows flipped, columns flipped).

    Args:
        view: The three.
    """

    def __init__(self, view: Sequence[bool] = (False, False, False)) -> None:
        self.view = View(*(bool(flag) for flag in view))

    def transform(self, results: dict) -> dict:
        """Turn the image."""
        results['img'] = self.view.turn(results['img'])
        results['img_shape'] = results['ori_shape'] = results['img'].shape[:2]
        results['view'] = self.view.key
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(view={self.view.key})'


def view_of(data_sample: DetDataSample) -> View:
    """Return how a sample's image lies: ``view`` from TurnImage, or MMDetection's ``flip``.

    Raises:
        ConfigError: The sample says neither.
    """
    meta = data_sample.metainfo
    if 'view' in meta:
        return View(*meta['view'])
    if 'flip' not in meta:
        raise ConfigError(
            "tta_pipeline: samples say neither 'view' nor 'flip'; both tell how the image lies; "
            'add them to meta_keys of PackDetInputs, or make the pipeline with tta.from_spec'
        )
    direction = meta.get('flip_direction') if meta['flip'] else None
    return View(
        flip_y=direction in ('vertical', 'diagonal'), flip_x=direction in ('horizontal', 'diagonal')
    )


@MODELS.register_module()
class CellTTAModel(BaseTTAModel):
    """Fuses the predictions of several views of an image, masks included.

    Works with mmengine's ``PrepareTTAHook`` and with our ensembles: set ``tta_model`` and
    ``tta_pipeline`` in a config (``from_spec(...).tta_model()`` and ``.tta_pipeline(...)``).
    Mask probabilities are averaged where the module's mask head can give them.

    Args:
        module: The detector, or its settings.
        rule: Fusion rule, as on the command line; views are its members.
        post: Post-processing, as on the command line. Without a ``max_instances`` the detector's
            own ``test_cfg.rcnn.max_per_img`` holds.
        data_preprocessor: See ``BaseTTAModel``.
    """

    def __init__(
        self,
        module: Mapping | nn.Module,
        rule: str = DEFAULT_RULE,
        post: str = '',
        data_preprocessor: Mapping | nn.Module | None = None,
    ) -> None:
        super().__init__(module, data_preprocessor)
        # The fused masks are cut where the detector cuts its own.
        self.rule = fusion.cut_at(fusion.from_spec(rule), self._rcnn_cfg().get('mask_thr_binary'))
        self.post = fusion.post_from_spec(post)
        cap = self._rcnn_cfg().get('max_per_img', -1)
        if not self.post.max_instances and cap > 0:
            self.post = replace(self.post, max_instances=cap)

    def _rcnn_cfg(self) -> Mapping:
        found = getattr(getattr(self.module, 'roi_head', None), 'test_cfg', None)
        return {} if found is None else found

    @contextmanager
    def _with_probs(self) -> Iterator[bool]:
        """Let the mask head keep probabilities; gives whether it would have anyway."""
        cfg = self._rcnn_cfg()
        head = getattr(getattr(self.module, 'roi_head', None), 'mask_head', None)
        if not hasattr(head, 'keep_mask_probs'):
            yield False
            return
        was_set, before = 'keep_mask_probs' in cfg, cfg.get('keep_mask_probs')
        cfg['keep_mask_probs'] = True
        try:
            yield bool(before if was_set else head.keep_mask_probs)
        finally:
            if was_set:
                cfg['keep_mask_probs'] = before
            else:
                del cfg['keep_mask_probs']

    def test_step(self, data: dict | Sequence) -> list[DetDataSample]:
        """Predict all views and fuse; see ``BaseTTAModel.test_step``."""
        with self._with_probs() as wanted:
            merged = super().test_step(data)
        if not wanted:
            for sample in merged:
                for key in PROB_KEYS:
                    sample.pred_instances.pop(key, None)
        return merged

    def merge_preds(self, data_samples_list: Sequence[Sequence[DetDataSample]]) -> list:
        """Fuse the views of each image.

        Args:
            data_samples_list: For each image its views' samples.

        Returns:
            One sample per image in the frame of the image as it is.
        """
        return [self._merge_views(samples) for samples in data_samples_list]

    def _merge_views(self, samples: Sequence[DetDataSample]) -> DetDataSample:
        sets = [map_back(to_instance_set(sample), view_of(sample)) for sample in samples]
        fused = fusion.fuse(sets, self.rule, self.post)
        merged = samples[0].new()
        merged.set_metainfo({'ori_shape': fused.image_hw})
        merged.pred_instances = to_pred_instances(fused)
        return merged

"""Test-time augmentation for masks: flips, quarter turns, scales.

In: a test pipeline that ``fusion.views`` made. Out: its step that turns a picture, and a model in
mmengine's TTA idiom that maps each view's instances back and fuses them.
Invariant: the views and the way back are those of ``fusion.views``, which needs no torch.

An image is turned before it is resized, so the resized view is what the detector would see if the
file had been scanned that way, and MMDetection's own rescaling applies as it is. Views are fused
like the members of an ensemble (``fusion``), where MMDetection asserts that masks are unsupported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from mmcv.transforms import BaseTransform
from mmdet.registry import MODELS, TRANSFORMS
from mmdet.structures import DetDataSample
from mmengine.model import BaseTTAModel
from torch import nn

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import PROB_KEYS
from cellseg_mm.fusion import fuse as fusion
from cellseg_mm.fusion.views import DEFAULT_RULE, View, map_back
from cellseg_mm.model.detections import to_instance_set, to_pred_instances


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

"""A trained model, or an ensemble of them, as something that finds cells in pictures.

In: configs with their checkpoints. Out: :class:`ModelDetector`, which ``predict`` calls.
Invariant: a picture passes the config's own test pipeline, from the step after loading on, so the
model sees what it saw when it was scored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmengine.logging import print_log
from mmengine.registry import DefaultScope
from numpy.typing import NDArray
from torch import nn

from cellseg_mm.core import files
from cellseg_mm.core.errors import CellSegError, ConfigError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.proposals import notes_of_proposals
from cellseg_mm.data.config import DataSettings, dataset_settings
from cellseg_mm.detectors.fold_ensemble import FoldEnsembleModel
from cellseg_mm.detectors.member_models import (
    Loaded,
    MemberModels,
    MemberSource,
    Placement,
    check_same_pipeline,
    load_members,
)
from cellseg_mm.ensemble.fuse_files import settings_origin
from cellseg_mm.fusion import views
from cellseg_mm.fusion.settings import InferenceSettings
from cellseg_mm.model.caps import watch_proposals
from cellseg_mm.model.detections import to_instance_set

Picture = NDArray[np.uint8]

BATCH_SIZE = {'cpu': 1, 'cuda': 4}


class ModelDetector:
    """Finds cells with a model; see ``predict.Detector``.

    Args:
        model: With ``test_step``; in evaluation mode, on its device.
        pipeline: Settings of the test pipeline without its loading step.
        red_blue_swapped: The pictures hold blue where red belongs.
        identity: What the results depend on, JSON values.
        provenance: Further JSON values for the result files.
        batch_size: Pictures per batch; halved for good when the device's memory does not suffice.
        cap: ``test_cfg.rcnn.max_per_img``; 0 where nothing is capped.
    """

    def __init__(
        self,
        model: nn.Module,
        pipeline: Sequence[Mapping],
        *,
        red_blue_swapped: bool,
        identity: Mapping,
        provenance: Mapping | None = None,
        batch_size: int = 1,
        cap: int = 0,
    ) -> None:
        self.model, self.batch_size, self.cap = model, batch_size, cap
        self._name, self._proposal_cut = '', 0.0
        self.provenance = dict(provenance or {})
        self.red_blue_swapped, self.identity = red_blue_swapped, dict(identity)
        with DefaultScope.overwrite_default_scope('mmdet'):
            self.pipeline = Compose(list(pipeline))

    def detect(self, pictures: Sequence[Picture], name: str) -> list[InstanceSet]:
        """Return the instances of each picture, without mask probabilities.

        Args:
            pictures: (h, w, 3) uint8 in the channel order of the files.
            name: Name of the image that they are of.

        Raises:
            CellSegError: Not even one picture fits into the device's memory.
        """
        if name != self._name:
            self._name, self._proposal_cut = name, 0.0
        found: list[InstanceSet] = []
        start = 0
        while start < len(pictures):
            batch = pictures[start : start + self.batch_size]
            try:
                found += self._detect_batch(batch, name)
            except torch.cuda.OutOfMemoryError as problem:
                self._use_less_memory(len(batch), batch[0].shape, problem)
                continue
            start += len(batch)
        return found

    @property
    def notes(self) -> list[str]:
        """What a person should know of the image that was looked at last."""
        return notes_of_proposals(self._proposal_cut)

    def _use_less_memory(self, n_pictures: int, shape: tuple[int, ...], problem: Exception) -> None:
        torch.cuda.empty_cache()
        if n_pictures == 1:
            height, width = shape[:2]
            raise CellSegError(
                f'device memory: one picture of {height} x {width} px does not fit; expected at '
                'least one to fit; use smaller tiles, fewer proposals '
                '(model.test_cfg.rpn.max_per_img=500), members that take turns, or the CPU'
            ) from problem
        self.batch_size = n_pictures // 2
        print_log(f'device memory is short: {self.batch_size} pictures per batch now', 'current')

    @torch.no_grad()
    def _detect_batch(self, pictures: Sequence[Picture], name: str) -> list[InstanceSet]:
        data = pseudo_collate([self._prepare(picture, name) for picture in pictures])
        with watch_proposals(self.model) as cuts:
            sets = [to_instance_set(sample) for sample in self.model.test_step(data)]
        self._proposal_cut = max(self._proposal_cut, *cuts.read(), 0.0)
        return [instances.without_probs() for instances in sets]

    def _prepare(self, picture: Picture, name: str) -> dict:
        # The detector's order is blue first; files are red first unless they are swapped.
        img = picture if self.red_blue_swapped else np.ascontiguousarray(picture[..., ::-1])
        height, width = img.shape[:2]
        results = {'img': img, 'img_shape': (height, width), 'ori_shape': (height, width)}
        meta = {'img_id': 0, 'name': name, 'img_path': name, 'label_paths': {}, 'instances': []}
        return self.pipeline({**results, **meta, 'height': height, 'width': width})


def choose_device(name: str = 'auto') -> torch.device:
    """Return the device of that name; ``auto`` is CUDA where there is one.

    Raises:
        ConfigError: There is no such device.
    """
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(name)
    except RuntimeError as problem:
        raise ConfigError(
            f'device {name}: no such kind of device; expected auto, cpu, cuda or cuda:1'
        ) from problem
    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == 'cuda' and (device.index or 0) >= n_devices:
        raise ConfigError(
            f'device {name}: {n_devices} CUDA devices are visible; expected one of that number; '
            'check CUDA_VISIBLE_DEVICES and the driver, or use the device cpu'
        )
    return device


def build_detector(
    sources: Sequence[MemberSource],
    *,
    how: InferenceSettings | None = None,
    tta_spec: str | None = None,
    device: torch.device | str = 'cpu',
    batch_size: int | None = None,
    placement: Placement = 'auto',
    red_blue_swapped: bool | None = None,
) -> ModelDetector:
    """Load models and make one detector of them.

    Args:
        sources: One per member; several make an ensemble.
        how: How members are fused and what is done afterwards; None leaves one model's own
            answer, and fuses several by the defaults.
        tta_spec: See ``views.from_spec``; ``config`` takes ``tta_model`` and ``tta_pipeline`` of
            the first config, ``none`` neither. None takes ``how.tta``.
        device: Where to compute.
        batch_size: Pictures per batch; None is 1 on a CPU and 4 on a GPU.
        placement: See ``MemberModels``.
        red_blue_swapped: Whether the pictures are; None takes it from the first config's pipeline.

    Raises:
        CellSegError: Checkpoints, classes or pipelines that do not fit; see ``member_models``.
    """
    check_same_pipeline(sources)
    data = DataSettings.from_config(sources[0].cfg, 'test_dataloader')
    settings = how or InferenceSettings()
    spec = settings.tta if tta_spec is None else tta_spec
    pipeline, tta_model = _views(sources[0], None if spec == 'none' else spec)
    loaded = load_members(sources, data.class_names, mask_thr=settings.mask_cut)
    is_plain = len(loaded) == 1 and how is None
    device = torch.device(device)
    if is_plain:
        model = _one_model(loaded[0], device, tta_model)
    else:
        members = MemberModels(loaded, device, placement)
        model = FoldEnsembleModel(members, settings.rule, settings.post, tta_model=tta_model)
    if red_blue_swapped is None:
        red_blue_swapped = data.red_blue_swapped
    seen = {'tta': spec, 'tta_model': json.loads(json.dumps(tta_model, default=str))}
    return ModelDetector(
        model.eval(),
        pipeline[1:],
        red_blue_swapped=red_blue_swapped,
        identity={
            **_identity(loaded, sources, pipeline),
            **_fusion(settings, is_plain),
            **seen,
        },
        provenance=_provenance(loaded),
        batch_size=BATCH_SIZE.get(device.type, 1) if batch_size is None else batch_size,
        cap=_cap(sources[0].cfg) if is_plain else 0,
    )


def _one_model(loaded: Loaded, device: torch.device, tta_model: Mapping | None) -> nn.Module:
    model = loaded.model.to(device)
    if tta_model is None:
        return model
    # another scope may be in force where a tool has not set MMDetection's
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build({**tta_model, 'module': model})


def _identity(
    loaded: Sequence[Loaded], sources: Sequence[MemberSource], pipeline: Sequence[Mapping]
) -> dict[str, JsonValue]:
    """Return what the results depend on in the models and in how they see a picture."""
    recipes = [source.cfg.to_dict().get('model') for source in sources]
    return {
        'checkpoint_hashes': [item.member.source_hash for item in loaded],
        'model_hash': files.text_hash(json.dumps(recipes, sort_keys=True, default=str)),
        'pipeline_hash': files.text_hash(json.dumps(pipeline, sort_keys=True, default=str)),
    }


def _fusion(settings: InferenceSettings, is_plain: bool) -> dict[str, JsonValue]:
    """Return what the results depend on in how members are fused."""
    origin = settings_origin(settings)
    return {
        'fusion': '' if is_plain else origin['fusion'],
        'post': origin['post'],
        'mask_thr': origin['mask_thr'],
    }


def _provenance(loaded: Sequence[Loaded]) -> dict[str, JsonValue]:
    first = loaded[0].member
    trained = {
        'fold': first.fold,
        'fold_hash': first.fold_hash,
        'excluded_folds': list(first.excluded_folds),
    }
    return {
        'members': [item.member.to_json() for item in loaded],
        'trained': trained if len(loaded) == 1 else {},
    }


def _cap(cfg: Config) -> int:
    rcnn = cfg.model.get('test_cfg', {}).get('rcnn') or {}
    return max(int(rcnn.get('max_per_img', 0)), 0)


def _views(source: MemberSource, spec: str | None) -> tuple[list[dict], Mapping | None]:
    """Return the pipeline, and the settings of a TTA model if there is augmentation."""
    cfg: Config = source.cfg
    settings = dataset_settings(cfg, 'test_dataloader')
    pipeline = [dict(step) for step in ConfigDict({'p': settings.pipeline}).to_dict()['p']]
    if spec is None:
        return pipeline, None
    if spec != 'config':
        chosen = views.from_spec(spec)
        return chosen.tta_pipeline(pipeline), chosen.tta_model()
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        raise ConfigError(
            f'{source.config_path}: has no tta_model and tta_pipeline; expected them for '
            'test-time augmentation "config"; add them, or choose views by words, such as flips'
        )
    return list(cfg.to_dict()['tta_pipeline']), cfg.to_dict()['tta_model']

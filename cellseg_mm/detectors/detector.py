"""A trained model, or an ensemble of them, as something that finds cells in pictures.

In: configs with their checkpoints. Out: :class:`ModelDetector`, which ``predict`` calls.
Invariant: a picture passes the config's own test pipeline, from the step after loading on, so the
model sees what it saw when it was scored.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmengine.logging import print_log
from mmengine.registry import DefaultScope
from numpy.typing import NDArray
from torch import nn

from cellseg_mm import components  # noqa: F401 - components registers
from cellseg_mm.core import files
from cellseg_mm.core.errors import CellSegError, ConfigError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.layout import work_dirs_of
from cellseg_mm.data.config import dataset_settings
from cellseg_mm.detectors.fold_ensemble import FoldEnsembleModel
from cellseg_mm.detectors.member_models import (
    MemberModels,
    Placement,
    Source,
    check_same_pipeline,
    load_members,
)
from cellseg_mm.detectors.run_ensemble import pair_sources
from cellseg_mm.fusion import fuse as fusion
from cellseg_mm.fusion.settings import Fusion, choose_fusion
from cellseg_mm.model import tta
from cellseg_mm.model.caps import watch_proposals
from cellseg_mm.model.detections import to_instance_set
from cellseg_mm.predict.predict import PredictParams
from cellseg_mm.results.overlay import default_colours
from cellseg_mm.weights.find import find_checkpoints

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
        self.proposal_cut = 0.0
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

    def _use_less_memory(self, n_pictures: int, shape: tuple[int, ...], problem: Exception) -> None:
        torch.cuda.empty_cache()
        if n_pictures == 1:
            height, width = shape[:2]
            raise CellSegError(
                f'device memory: one picture of {height} x {width} px does not fit; expected at '
                'least one to fit; use --tile with a smaller number, fewer proposals '
                '(--cfg-options model.test_cfg.rpn.max_per_img=500), --placement turns for an '
                'ensemble, or --device cpu'
            ) from problem
        self.batch_size = n_pictures // 2
        print_log(f'device memory is short: {self.batch_size} pictures per batch now', 'current')

    @torch.no_grad()
    def _detect_batch(self, pictures: Sequence[Picture], name: str) -> list[InstanceSet]:
        data = pseudo_collate([self._prepare(picture, name) for picture in pictures])
        with watch_proposals(self.model) as cuts:
            sets = [to_instance_set(sample) for sample in self.model.test_step(data)]
        self.proposal_cut = max(self.proposal_cut, *cuts, 0.0)
        return [_without_probs(instances) for instances in sets]

    def _prepare(self, picture: Picture, name: str) -> dict:
        # The detector's order is blue first; files are red first unless they are swapped.
        img = picture if self.red_blue_swapped else np.ascontiguousarray(picture[..., ::-1])
        height, width = img.shape[:2]
        results = {'img': img, 'img_shape': (height, width), 'ori_shape': (height, width)}
        meta = {'img_id': 0, 'name': name, 'img_path': name, 'label_paths': {}, 'instances': []}
        return self.pipeline({**results, **meta, 'height': height, 'width': width})


def _without_probs(instances: InstanceSet) -> InstanceSet:
    kept = {k: v for k, v in instances.extra.items() if k not in ('mask_probs', 'mask_boxes')}
    return replace(instances, extra=kept)


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
            f'--device {name}: no such kind of device; expected auto, cpu, cuda or cuda:1'
        ) from problem
    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == 'cuda' and (device.index or 0) >= n_devices:
        raise ConfigError(
            f'--device {name}: {n_devices} CUDA devices are visible; expected one of that number; '
            'check CUDA_VISIBLE_DEVICES and the driver, or use --device cpu'
        )
    return device


def build_detector(
    sources: Sequence[Source],
    *,
    how: Fusion | None = None,
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
            answer, and fuses several by ``Fusion()``.
        tta_spec: See ``tta.from_spec``; ``config`` takes ``tta_model`` and ``tta_pipeline`` of the
            first config. None takes ``how.tta``.
        device: Where to compute.
        batch_size: Pictures per batch; None is 1 on a CPU and 4 on a GPU.
        placement: See ``MemberModels``.
        red_blue_swapped: Whether the pictures are; None takes it from the first config's pipeline.

    Raises:
        CellSegError: Checkpoints, classes or pipelines that do not fit; see ``member_models``.
    """
    check_same_pipeline(sources)
    settings = dataset_settings(sources[0].cfg, 'test_dataloader')
    classes = tuple(settings.metainfo.classes)
    chosen = how or Fusion()
    spec = tta_spec if tta_spec is not None else chosen.tta
    pipeline, tta_model = _views(sources[0], settings, None if spec == 'none' else spec)
    loaded = load_members(sources, classes, mask_thr=chosen.mask_thr)
    device = torch.device(device)
    model: nn.Module
    is_plain = len(loaded) == 1 and how is None
    if is_plain:
        model = loaded[0].model.to(device)
        if tta_model is not None:
            # another scope may be in force where a tool has not set MMDetection's
            with DefaultScope.overwrite_default_scope('mmdet'):
                model = MODELS.build({**tta_model, 'module': model})
    else:
        models = MemberModels(loaded, device, placement)
        post = chosen.post_process if chosen.post else None
        model = FoldEnsembleModel(models, chosen.merging, post, tta_model=tta_model)
    loading = pipeline[0]
    swapped = red_blue_swapped
    if swapped is None:
        swapped = bool(loading.get('red_blue_swapped', False))
    recipes = [source.cfg.to_dict().get('model') for source in sources]
    identity = {
        'checkpoint_hashes': [item.member.source_hash for item in loaded],
        'model_hash': files.text_hash(json.dumps(recipes, sort_keys=True, default=str)),
        'pipeline_hash': files.text_hash(json.dumps(pipeline, sort_keys=True, default=str)),
        'fusion': '' if is_plain else fusion.to_spec(chosen.merging),
        'post': chosen.post,
        'mask_thr': chosen.mask_thr,
        'tta': spec,
        'tta_model': json.loads(json.dumps(tta_model, default=str)),
    }
    return ModelDetector(
        model.eval(),
        pipeline[1:],
        red_blue_swapped=swapped,
        identity=identity,
        provenance={
            'members': [item.member.to_json() for item in loaded],
            'trained': _trained(loaded) if len(loaded) == 1 else {},
        },
        batch_size=BATCH_SIZE.get(device.type, 1) if batch_size is None else batch_size,
        cap=_cap(sources[0].cfg) if is_plain else 0,
    )


def _cap(cfg: Config) -> int:
    rcnn = cfg.model.get('test_cfg', {}).get('rcnn') or {}
    return max(int(rcnn.get('max_per_img', 0)), 0)


def _trained(loaded: Sequence) -> dict:
    member = loaded[0].member
    return {
        'fold': member.fold,
        'fold_hash': member.fold_hash,
        'excluded_folds': list(member.excluded_folds),
    }


def _views(
    source: Source, settings: ConfigDict, spec: str | None
) -> tuple[list[dict], Mapping | None]:
    """Return the pipeline, and the settings of a TTA model if there is augmentation."""
    cfg: Config = source.cfg
    pipeline = [dict(step) for step in ConfigDict({'p': settings.pipeline}).to_dict()['p']]
    if spec is None:
        return pipeline, None
    if spec != 'config':
        chosen = tta.from_spec(spec)
        return chosen.tta_pipeline(pipeline), chosen.tta_model()
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        raise ConfigError(
            f'{source.config_path}: has no tta_model and tta_pipeline; expected them for --tta '
            'config; add them, or choose views by words: --tta flips'
        )
    return list(cfg.to_dict()['tta_pipeline']), cfg.to_dict()['tta_model']


def from_command_line(
    configs: Mapping[str, Config], args: argparse.Namespace
) -> tuple[ModelDetector, PredictParams]:
    """Make what ``predict.predict`` needs from the options of tools/predict.py.

    Args:
        configs: From ``launch.load_config``, by path.
        args: ``checkpoints`` (paths; empty or ``best`` for the best of each work folder),
            ``work_root``, ``settings``, ``fusion``, ``post``, ``tta``, ``device``, ``placement``,
            ``batch_size``, ``red_blue``, ``out``, ``format``, ``score_thr``, ``tile``,
            ``overlap``, ``level``, ``workers``, ``again``.

    Raises:
        CellSegError: Options that do not fit; see the message.
    """
    metainfo = dataset_settings(next(iter(configs.values())), 'test_dataloader').metainfo
    classes = tuple(metainfo.classes)
    checkpoints = [path for path in args.checkpoints if path != 'best']
    if not checkpoints:
        checkpoints = find_checkpoints(work_dirs_of(list(configs), args.work_root))
    is_plain = args.settings is None and args.fusion is None and args.post is None
    how = choose_fusion(
        rule=args.fusion,
        post=args.post,
        tta=None,
        settings=args.settings,
        class_names=classes,
        profile='instances',
    )
    detector = build_detector(
        pair_sources(configs, checkpoints),
        how=None if is_plain else how,
        tta_spec=args.tta,
        device=choose_device(args.device),
        batch_size=args.batch_size,
        placement=args.placement,
        red_blue_swapped={'normal': False, 'swapped': True}.get(args.red_blue),
    )
    palette = metainfo.get('palette') or default_colours(len(classes))
    # Settings that were found on held-out images bring their own thresholds.
    default_thr = 0.5 if args.settings is None else 0.0
    cut = {} if args.tile is None else {'tile_px': args.tile, 'whole_px': args.tile}
    params = PredictParams(
        out_dir=args.out,
        class_names=classes,
        class_colours=tuple(tuple(int(v) for v in colour) for colour in palette),
        formats=tuple(word for given in args.format for word in given.split(',') if word),
        score_thr=default_thr if args.score_thr is None else args.score_thr,
        overlap_px=args.overlap,
        level=args.level,
        red_blue_swapped=detector.red_blue_swapped,
        n_workers=args.workers,
        again=args.again,
        **cut,
    )
    return detector, params

"""Run a fold ensemble of models over a split, on one process or many.

In: configs, their checkpoints, how to fuse. Out: the same files as ``ensemble.ensemble_files``.
Invariant: nothing about the result depends on the number of processes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import barrier
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from cellseg_mm.core.layout import predictions_path
from cellseg_mm.data.config import dataset_settings
from cellseg_mm.data.images import Images
from cellseg_mm.detectors.hook import FoldEnsembleHook
from cellseg_mm.detectors.member_models import MemberSource, Placement
from cellseg_mm.ensemble.fuse_files import Merged
from cellseg_mm.fusion import views
from cellseg_mm.fusion.fuse import to_spec
from cellseg_mm.fusion.settings import InferenceSettings
from cellseg_mm.scores.records import COCO_NAMES


def ensemble_models(
    cfg: Config,
    sources: Sequence[MemberSource],
    images: Images,
    settings: InferenceSettings,
    out_dir: Path | str,
    *,
    placement: Placement = 'auto',
    amp: bool = False,
    leave_out_seen: bool = False,
) -> Merged:
    """Predict a split with all members and fuse; every process calls this.

    Args:
        cfg: From :func:`cellseg_mm.training.load_config.load_config`; its data loader is used.
        sources: The members, in any order.
        images: The split.
        settings: How to fuse, and what is done afterwards.
        out_dir: Gets ``<split>.predictions.npz``, with ground truth ``<split>.scores.json``, and
            the log.
        placement: See ``MemberModels``.
        amp: Use automatic mixed precision.
        leave_out_seen: On training images use only the members that never saw them.

    Raises:
        CellSegError: See ``FoldEnsembleHook``.
    """
    cfg = copy.deepcopy(cfg)  # often a member's own config, which must stay as it was trained
    _prepare(cfg, images, Path(out_dir), amp=amp)
    if settings.tta:
        data = dataset_settings(cfg, 'test_dataloader')
        data.pipeline = views.from_spec(settings.tta).tta_pipeline(data.pipeline)
    hook = FoldEnsembleHook(
        sources,
        rule=settings.rule,
        post=to_spec(settings.post),
        mask_thr=settings.mask_cut,
        placement=placement,
        leave_out_seen=leave_out_seen,
        tta=settings.tta,
    )
    runner = Runner.from_cfg(cfg) if 'runner_type' not in cfg else RUNNERS.build(cfg)
    runner.register_hook(hook)
    metrics = runner.test()
    barrier()
    headline = {key.removeprefix('cell/'): value for key, value in metrics.items()}
    return Merged(
        predictions_path(out_dir, images.split),
        hook.members,
        dict(sorted(hook.member_counts.items())),
        hook.report,
        settings,
        _own_names(headline) if images.split != 'test' else {},
    )


def _prepare(cfg: Config, images: Images, out_dir: Path, *, amp: bool) -> None:
    settings = dataset_settings(cfg, 'test_dataloader')
    settings.split = images.split
    if images.fold is not None:
        settings.fold = images.fold
    cfg.load_from, cfg.resume, cfg.work_dir = None, False, str(out_dir)
    if images.split == 'test':
        path = str(predictions_path(out_dir, 'test'))
        cfg.test_evaluator = {'type': 'SaveInstances', 'path': path}
    else:
        cfg.test_evaluator.outfile_prefix = str(out_dir / images.split)
        # A cap on each member says nothing about what was fused.
        cfg.test_evaluator.max_per_img = None
    if amp:
        cfg.test_cfg.fp16 = True


def _own_names(headline: Mapping[str, float]) -> dict[str, float]:
    names = {theirs: ours for ours, theirs in COCO_NAMES.items()}
    return {names.get(key, key): value for key, value in headline.items()}

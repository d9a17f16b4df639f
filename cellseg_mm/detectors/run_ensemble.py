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

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.data.config import dataset_settings
from cellseg_mm.data.images import Images
from cellseg_mm.detectors.hook import FoldEnsembleHook
from cellseg_mm.detectors.member_models import Placement, Source
from cellseg_mm.ensemble.fuse_files import Merged
from cellseg_mm.fusion.settings import Fusion
from cellseg_mm.model import tta


def pair_sources(configs: Mapping[str, Config], checkpoints: Sequence[Path | str]) -> list[Source]:
    """Give each checkpoint its config: one for all, or one each.

    Raises:
        ConfigError: Their numbers do not fit.
    """
    paths = list(configs)
    if len(paths) not in (1, len(checkpoints)):
        raise ConfigError(
            f'--checkpoints: {len(checkpoints)} checkpoints and {len(paths)} configs; give one '
            'config for all of them, or one for each in the same order'
        )
    paths = paths * len(checkpoints) if len(paths) == 1 else paths
    pairs = zip(paths, checkpoints, strict=True)
    return [Source(configs[path], path, Path(checkpoint)) for path, checkpoint in pairs]


def ensemble_models(
    cfg: Config,
    sources: Sequence[Source],
    images: Images,
    fusion: Fusion,
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
        fusion: How to fuse.
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
    if fusion.tta:
        settings = dataset_settings(cfg, 'test_dataloader')
        settings.pipeline = tta.from_spec(fusion.tta).tta_pipeline(settings.pipeline)
    hook = FoldEnsembleHook(
        [
            {
                'config': source.cfg,
                'config_path': source.config_path,
                'checkpoint': source.checkpoint,
            }
            for source in sources
        ],
        rule=fusion.rule,
        post=fusion.post,
        mask_thr=fusion.mask_thr,
        placement=placement,
        leave_out_seen=leave_out_seen,
        tta=fusion.tta,
    )
    runner = Runner.from_cfg(cfg) if 'runner_type' not in cfg else RUNNERS.build(cfg)
    runner.register_hook(hook)
    metrics = runner.test()
    barrier()
    headline = {key.removeprefix('cell/'): value for key, value in metrics.items()}
    return Merged(
        Path(out_dir) / f'{images.split}.predictions.npz',
        hook.members,
        dict(sorted(hook.member_counts.items())),
        hook.report,
        fusion,
        _own_names(headline) if images.split != 'test' else {},
    )


def _prepare(cfg: Config, images: Images, out_dir: Path, *, amp: bool) -> None:
    settings = dataset_settings(cfg, 'test_dataloader')
    settings.split = images.split
    if images.fold is not None:
        settings.fold = images.fold
    cfg.load_from, cfg.resume, cfg.work_dir = None, False, str(out_dir)
    if images.split == 'test':
        path = str(out_dir / 'test.predictions.npz')
        cfg.test_evaluator = {'type': 'SaveInstances', 'path': path}
    else:
        cfg.test_evaluator.outfile_prefix = str(out_dir / images.split)
        # A cap on each member says nothing about what was fused.
        cfg.test_evaluator.max_per_img = None
    if amp:
        cfg.test_cfg.fp16 = True


def _own_names(headline: Mapping[str, float]) -> dict[str, float]:
    from cellseg_mm.training.metric import COCO_NAMES

    names = {theirs: ours for ours, theirs in COCO_NAMES.items()}
    return {names.get(key, key): value for key, value in headline.items()}

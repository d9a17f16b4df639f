"""Train a fold and score it: what tools/train.py and tools/test.py call.

In: a config from ``load_config``. Out: checkpoints, and a fold's scores and instances.
Invariant: a run that was cut at any moment goes on from its newest intact checkpoint and ends with
the same weights as a run that was never cut.
"""

from __future__ import annotations

import logging
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.dist import barrier, broadcast_object_list, is_main_process
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from cellseg_mm.core.errors import CheckpointError, ConfigError, FoldError
from cellseg_mm.core.layout import FOLDS, STARTED, result_name
from cellseg_mm.data.config import DataSettings, dataset_settings
from cellseg_mm.data.preparing import prepare
from cellseg_mm.data.preparing.groups import GroupRule
from cellseg_mm.data.preparing.records import PrepareParams
from cellseg_mm.data.preparing.text import screen_text
from cellseg_mm.fusion import views
from cellseg_mm.training.marks import (
    MARK_VERSION,
    fold_hash_of,
    mark_start,
    recipe_hash,
    recipe_parts,
    refuse_changed_settings,
    write_finished,
)
from cellseg_mm.weights.find import best_checkpoint, last_good_checkpoint, remove_leftovers


def train(
    cfg: Config,
    *,
    resume: str | None = None,
    amp: bool = False,
    auto_scale_lr: bool = False,
    deterministic: bool = False,
) -> Path:
    """Train one fold.

    Args:
        cfg: From :func:`cellseg_mm.training.load_config.load_config`.
        resume: ``'auto'`` for the newest intact checkpoint of the work folder, or a path.
        amp: Use automatic mixed precision.
        auto_scale_lr: Scale the learning rate by batch size / ``auto_scale_lr.base_batch_size``.
        deterministic: Use only deterministic algorithms.

    Returns:
        The best checkpoint, or the newest where no validation has run.

    Raises:
        CellSegError: Wrong data, folds, weights or settings, or other settings than the training
            that is resumed began with; see the message.
    """
    ensure_folds(cfg)
    _apply_options(cfg, amp=amp, auto_scale_lr=auto_scale_lr, deterministic=deterministic)
    state = {
        'version': MARK_VERSION,
        'recipe': recipe_hash(cfg),
        'parts': recipe_parts(cfg),
        'fold_hash': fold_hash_of(cfg),
    }
    is_new = not resume or not _set_resume(cfg, resume)
    if not is_new:
        refuse_changed_settings(Path(cfg.load_from).parent / STARTED, state)
    if is_main_process():
        mark_start(Path(cfg.work_dir), state, is_new=is_new)
        remove_leftovers(cfg.work_dir)
    _runner(cfg).train()
    # The main process alone writes checkpoints; others that look may come too early.
    best: list[Path | None] = [None]
    if is_main_process():
        best[0] = best_checkpoint(cfg.work_dir)
        write_finished(cfg.work_dir, best[0], state)
    broadcast_object_list(best)
    return best[0]


def _apply_options(cfg: Config, *, amp: bool, auto_scale_lr: bool, deterministic: bool) -> None:
    """Set in the config what MMDetection's training options mean."""
    if amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if cfg.optim_wrapper.get('type') == 'AmpOptimWrapper' and get_device() in ('cpu', 'mps'):
        raise ConfigError(
            f'mixed precision (--amp, or type="AmpOptimWrapper"): found device {get_device()}, '
            'expected a CUDA device; leave it out'
        )
    if auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise ConfigError(
                '--auto-scale-lr: the config has no auto_scale_lr.base_batch_size; '
                'set it to the batch size that the learning rate was chosen for'
            )
        cfg.auto_scale_lr.enable = True
    if deterministic:
        cfg.setdefault('randomness', ConfigDict()).deterministic = True


def _set_resume(cfg: Config, resume: str) -> bool:
    """Set what to resume from; tell whether there is anything."""
    if resume != 'auto':
        if '://' not in resume and not Path(resume).is_file():  # before anything is changed
            raise CheckpointError(f'{resume}: there is no such checkpoint; check the path')
        cfg.resume, cfg.load_from = True, resume
        return True
    newest, skipped = last_good_checkpoint(cfg.work_dir)
    for reason in skipped:
        print_log(f'{reason}; going back to the one before', 'current', level=logging.WARNING)
    if newest is None:
        print_log(f'{cfg.work_dir}: no checkpoint to resume from, starting anew', 'current')
        return False
    cfg.resume, cfg.load_from = True, str(newest)
    return True


def _runner(cfg: Config) -> Runner:
    return Runner.from_cfg(cfg) if 'runner_type' not in cfg else RUNNERS.build(cfg)


def ensure_folds(cfg: Config) -> None:
    """Verify the data and write the folds file if there is none yet.

    A ``manifest.csv`` of the data folder with the columns ``uuid`` and ``patient`` is taken for the
    groups; for anything else run tools/prepare_data.py first.

    Raises:
        DataError: The data have errors.
        FoldError: There is no such file, and none could be made under its name.
    """
    data = DataSettings.from_config(cfg)
    data_root, path = data.data_root, data.folds_path
    if not path.is_file() and path.name != FOLDS:
        raise FoldError(
            f'{path}: no such file; expected folds; prepare_data.py writes them as folds.json '
            'into the folder of --out; correct CELLSEG_FOLDS (or folds_file), or rename the file'
        )
    if is_main_process() and not path.is_file():
        print_log(f'{path}: not there yet; verifying {data_root} and making folds', 'current')
        manifest = data_root / 'manifest.csv'
        params = PrepareParams(
            class_names=data.class_names,
            out_dir=None if path.parent == data_root else path.parent,
            groups=GroupRule(csv_path=manifest if manifest.is_file() else None),
        )
        report = prepare.prepare(data_root, params)
        report.raise_for_errors()
        print_log(screen_text(report), 'current')
    barrier()


def score_checkpoint(
    cfg: Config,
    *,
    checkpoint: str | None = None,
    out_dir: Path | str | None = None,
    amp: bool = False,
    tta_spec: str | None = None,
) -> dict[str, float]:
    """Score a checkpoint on ``cfg.test_dataloader``, by default the fold's validation split.

    Writes ``<split>.predictions.npz`` and ``<split>.scores.json`` into ``out_dir``; with test-time
    augmentation ``<split>.<name>.predictions.npz`` and so on, where ``find_best`` looks for them.

    Args:
        cfg: From :func:`cellseg_mm.training.load_config.load_config`.
        checkpoint: Path; ``None`` or ``'best'`` for the best of the work folder.
        out_dir: ``None`` for the work folder.
        amp: Use automatic mixed precision.
        tta_spec: Test-time augmentation, see ``views.from_spec``.

    Returns:
        The flat scores of CellMetric.

    Raises:
        CellSegError: No such checkpoint, or it has seen these images; see the message.
    """
    path = Path(checkpoint) if checkpoint not in (None, 'best') else best_checkpoint(cfg.work_dir)
    cfg.load_from, cfg.resume = str(path), False
    split = DataSettings.from_config(cfg, 'test_dataloader').split
    named = result_name(split, views.file_name(tta_spec) if tta_spec else '')
    _metric_of(cfg).outfile_prefix = str(Path(out_dir or cfg.work_dir) / named)
    if tta_spec:
        _augment_test(cfg, tta_spec)
    if amp:
        cfg.test_cfg.fp16 = True
    print_log(f'scoring {path} on {split}', 'current')
    return _runner(cfg).test()


def _augment_test(cfg: Config, tta_spec: str) -> None:
    """Test with views, in mmengine's idiom; the predictions file says which."""
    spec = views.from_spec(tta_spec)
    settings = dataset_settings(cfg, 'test_dataloader')
    settings.pipeline = spec.tta_pipeline(settings.pipeline)
    metric = _metric_of(cfg)
    metric.provenance = {**(metric.get('provenance') or {}), 'tta': tta_spec}
    cfg.custom_hooks = [
        *(cfg.get('custom_hooks') or []),
        {'type': 'PrepareTTAHook', 'tta_cfg': spec.tta_model()},
    ]


def _metric_of(cfg: Config) -> ConfigDict:
    """Return the settings of the test evaluator's CellMetric, which may be one of several."""
    evaluators = cfg.test_evaluator
    for one in [evaluators] if isinstance(evaluators, dict) else evaluators:
        if one.get('type') == 'CellMetric':
            return one
    raise ConfigError('test_evaluator: found no CellMetric; expected one; it writes the results')

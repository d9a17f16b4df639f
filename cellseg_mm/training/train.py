"""Train a fold and score it: what tools/train.py and tools/test.py call.

In: a config from ``load_config``. Out: checkpoints, and a fold's scores and instances.
Invariant: a run that was cut at any moment goes on from its newest intact checkpoint and ends with
the same weights as a run that was never cut.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.dist import barrier, broadcast_object_list, is_main_process
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from cellseg_mm.core import trainings
from cellseg_mm.core.errors import CellSegError, CheckpointError, ConfigError, FoldError
from cellseg_mm.core.layout import FOLDS, result_name
from cellseg_mm.core.trainings import RECORD_KEYS
from cellseg_mm.data.config import DataSettings, dataset_settings
from cellseg_mm.data.preparing import prepare
from cellseg_mm.data.preparing.records import PrepareParams
from cellseg_mm.data.preparing.text import screen_text
from cellseg_mm.fusion import views
from cellseg_mm.training.fold_guard import ProvenanceHook
from cellseg_mm.training.marks import (
    alone,
    mark_start,
    recipe_parts,
    refuse_changed_settings,
    refuse_other_training,
    training_state,
    write_finished,
)
from cellseg_mm.weights.checkpoints import load_checkpoint_file
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
    given = recipe_parts(cfg)
    _apply_options(cfg, amp=amp, auto_scale_lr=auto_scale_lr, deterministic=deterministic)
    work_dir, state = Path(cfg.work_dir), training_state(cfg, given)
    with _alone_on_main_process(work_dir):
        goes_on = bool(resume) and _set_resume(cfg, resume)
        if goes_on:
            refuse_changed_settings(Path(cfg.load_from), state)
        refuse_other_training(work_dir, state, goes_on=goes_on)
        barrier()  # before the first file changes, all have seen what is there
        if is_main_process():
            mark_start(work_dir, state)
            remove_leftovers(work_dir)
        runner = _runner(cfg)
        for hook in runner.hooks:
            if isinstance(hook, ProvenanceHook):
                hook.record = {key: state[key] for key in RECORD_KEYS}
        runner.train()
        # The main process alone writes checkpoints; others that look may come too early.
        best: list[Path | None] = [None]
        if is_main_process():
            best[0] = best_checkpoint(work_dir)
            write_finished(work_dir, best[0], state)
    broadcast_object_list(best)
    return best[0]


@contextmanager
def _alone_on_main_process(work_dir: Path) -> Iterator[None]:
    """Hold the work folder's lock once for all processes; where it is taken, all of them stop."""
    with ExitStack() as held:
        problem: list[str] = ['']
        if is_main_process():
            try:
                held.enter_context(alone(work_dir))
            except CellSegError as error:
                problem[0] = str(error)
        broadcast_object_list(problem)
        if problem[0]:
            raise CellSegError(problem[0])
        yield


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
        params = PrepareParams(
            class_names=data.class_names,
            out_dir=None if path.parent == data_root else path.parent,
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
    is_best = checkpoint in (None, 'best')
    path = best_checkpoint(cfg.work_dir) if is_best else Path(str(checkpoint))
    _check_whose(path, cfg, is_best=is_best)
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


def _check_whose(path: Path, cfg: Config, *, is_best: bool) -> None:
    """Refuse a work folder's checkpoint of another recipe; one that was named is only said."""
    if not path.is_file():  # a published one, which the Runner fetches
        return
    content, settings = load_checkpoint_file(path), cfg.to_dict()
    trained = trainings.trained_record(content)
    names = DataSettings.from_config(cfg, 'test_dataloader').class_names
    trainings.refuse_other_classes(path, content, names)
    trainings.refuse_other_network(path, trained, settings)
    if is_best:
        trainings.refuse_other_recipe(path, trained, settings)
    elif changed := trainings.other_parts(path, trained, settings):
        print_log(
            f'{path}: was trained with other values of {", ".join(changed)} than the config and '
            'its options have now; the scores are those of its own recipe',
            'current',
            level=logging.WARNING,
        )


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

"""Train a fold and score it: what tools/train.py and tools/test.py call.

In: a config made ready by ``launch``. Out: checkpoints, and a fold's scores and instances.
Invariant: a run that was cut at any moment goes on from its newest intact checkpoint and ends with
the same weights as a run that was never cut.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.dist import barrier, broadcast_object_list, is_main_process
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from cellseg_mm.core import files
from cellseg_mm.core.errors import CheckpointError, ConfigError, FoldError
from cellseg_mm.data.folds import load_folds
from cellseg_mm.data.preparing import prepare
from cellseg_mm.model import tta
from cellseg_mm.weights import checkpoints


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
    state = {
        'version': MARK_VERSION,
        'recipe': recipe_hash(cfg),
        'parts': recipe_parts(cfg),
        'fold_hash': fold_hash_of(cfg),
    }
    is_new = not resume or not _set_resume(cfg, resume)
    if not is_new:
        _refuse_changed_settings(Path(cfg.load_from).parent / STARTED, state)
    if is_main_process():
        _mark_start(Path(cfg.work_dir), state, is_new=is_new)
        checkpoints.remove_leftovers(cfg.work_dir)
    _runner(cfg).train()
    # The main process alone writes checkpoints; others that look may come too early.
    best: list[Path | None] = [None]
    if is_main_process():
        best[0] = checkpoints.best_checkpoint(cfg.work_dir)
        write_finished(cfg.work_dir, best[0], state)
    broadcast_object_list(best)
    return best[0]


def _set_resume(cfg: Config, resume: str) -> bool:
    """Set what to resume from; tell whether there is anything."""
    if resume != 'auto':
        if '://' not in resume and not Path(resume).is_file():  # before anything is changed
            raise CheckpointError(f'{resume}: there is no such checkpoint; check the path')
        cfg.resume, cfg.load_from = True, resume
        return True
    newest, skipped = checkpoints.last_good_checkpoint(cfg.work_dir)
    for reason in skipped:
        print_log(f'{reason}; going back to the one before', 'current', level=logging.WARNING)
    if newest is None:
        print_log(f'{cfg.work_dir}: no checkpoint to resume from, starting anew', 'current')
        return False
    cfg.resume, cfg.load_from = True, str(newest)
    return True


def _runner(cfg: Config) -> Runner:
    return Runner.from_cfg(cfg) if 'runner_type' not in cfg else RUNNERS.build(cfg)


def dataset_settings(cfg: Config, loader: str = 'train_dataloader') -> ConfigDict:
    """Return the CellDataset settings inside any wrappers of a data loader's data set.

    Raises:
        ConfigError: There is no CellDataset.
    """
    node = cfg.get(loader, {}).get('dataset')
    while isinstance(node, dict) and node.get('type') != 'CellDataset':
        node = node.get('dataset')
    if not isinstance(node, dict):
        raise ConfigError(
            f'{loader}.dataset: found no CellDataset; expected one inside the wrappers'
        )
    return node


def ensure_folds(cfg: Config) -> None:
    """Verify the data and write the folds file if there is none yet.

    A ``manifest.csv`` of the data folder with the columns ``uuid`` and ``patient`` is taken for the
    groups; for anything else run tools/prepare_data.py first.

    Raises:
        DataError: The data have errors.
        FoldError: There is no such file, and none could be made under its name.
    """
    settings = dataset_settings(cfg)
    data_root = Path(settings.data_root)
    path = folds_path(settings)
    if not path.is_file() and path.name != 'folds.json':
        raise FoldError(
            f'{path}: no such file; expected folds; prepare_data.py writes them as folds.json '
            'into the folder of --out; correct CELLSEG_FOLDS (or folds_file), or rename the file'
        )
    if is_main_process() and not path.is_file():
        print_log(f'{path}: not there yet; verifying {data_root} and making folds', 'current')
        manifest = data_root / 'manifest.csv'
        params = prepare.PrepareParams(
            class_names=tuple(settings.metainfo.classes),
            out_dir=None if path.parent == data_root else path.parent,
            groups=prepare.GroupRule(csv_path=manifest if manifest.is_file() else None),
        )
        report = prepare.prepare(data_root, params)
        report.raise_for_errors()
        print_log(prepare.screen_text(report), 'current')
    barrier()


def folds_path(settings: ConfigDict) -> Path:
    """Return where a CellDataset's settings say the folds are."""
    named = settings.get('folds_file', 'auto')
    return Path(settings.data_root) / 'folds.json' if named in (None, 'auto') else Path(named)


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
        tta_spec: Test-time augmentation, see ``tta.from_spec``.

    Returns:
        The flat scores of CellMetric.

    Raises:
        CellSegError: No such checkpoint, or it has seen these images; see the message.
    """
    path = (
        Path(checkpoint)
        if checkpoint not in (None, 'best')
        else checkpoints.best_checkpoint(cfg.work_dir)
    )
    cfg.load_from, cfg.resume = str(path), False
    split = dataset_settings(cfg, 'test_dataloader').split
    named = f'{split}.{tta.file_name(tta_spec)}' if tta_spec else split
    _metric_of(cfg).outfile_prefix = str(Path(out_dir or cfg.work_dir) / named)
    if tta_spec:
        _augment_test(cfg, tta_spec)
    if amp:
        cfg.test_cfg.fp16 = True
    print_log(f'scoring {path} on {split}', 'current')
    return _runner(cfg).test()


def _augment_test(cfg: Config, tta_spec: str) -> None:
    """Test with views, in mmengine's idiom; the predictions file says which."""
    spec = tta.from_spec(tta_spec)
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


STARTED = 'started.json'
FINISHED = 'finished.json'
MARK_VERSION = 2
# What decides the weights. Where things are, launcher, loading and logging do not.
RECIPE_KEYS = (
    *('model', 'train_dataloader', 'optim_wrapper', 'param_scheduler', 'train_cfg'),
    *('randomness', 'custom_hooks'),
)
NOT_RECIPE_KEYS = {
    *('data_root', 'folds_file', 'num_workers', 'persistent_workers', 'pin_memory'),
    *('prefetch_factor', 'timeout'),
}


def recipe_hash(cfg: Config) -> str:
    """Return 16 hex digits over the settings that decide the weights.

    The same for a config as it is read and as ``launch`` adapts it to a machine.
    """
    parts = {**_recipe(cfg), 'load_from': Path(cfg.get('load_from') or '').name}
    return files.text_hash(json.dumps(parts, sort_keys=True, default=str))


def recipe_parts(cfg: Config) -> dict[str, str]:
    """Return a hash of each of the settings that decide the weights, to name what differs."""
    return {
        key: files.text_hash(json.dumps(part, sort_keys=True, default=str))
        for key, part in _recipe(cfg).items()
    }


def _recipe(cfg: Config) -> dict:
    settings = cfg.to_dict()
    parts = {key: _recipe_part(settings.get(key)) for key in RECIPE_KEYS}
    parts['model'] = {k: v for k, v in (parts['model'] or {}).items() if k != 'test_cfg'}
    return parts


def _recipe_part(node: object) -> object:
    if isinstance(node, dict):
        kept = {k: _recipe_part(v) for k, v in node.items() if k not in NOT_RECIPE_KEYS}
        if kept.get('type') == 'SyncBN':  # what launch makes of it where there is no kernel
            kept['type'] = 'BN'
        return kept
    return [_recipe_part(v) for v in node] if isinstance(node, (list, tuple)) else node


def fold_hash_of(cfg: Config) -> str:
    """Return the hash of the folds in force, '' if there are none yet."""
    path = folds_path(dataset_settings(cfg))
    return load_folds(path).hash if path.is_file() else ''


def _refuse_changed_settings(path: Path, state: dict) -> None:
    """Raise ConfigError where training would not go on as it began; only its length may differ.

    A checkpoint brings the optimizer's rates and the schedule along: other ones would be ignored.
    """
    began = read_mark(path)
    before = began.get('parts', {})
    changed = [key for key, value in state['parts'].items() if before.get(key, value) != value]
    if began and not before and began['recipe'] != state['recipe']:
        changed = ['settings']  # an older mark does not say which
    if changed == ['train_cfg']:
        print_log(f'{path}: training began with another train_cfg; going on with this', 'current')
    elif changed:
        raise ConfigError(
            f'{path}: training began with other values of {", ".join(changed)} than the config and '
            'the options (--amp and --deterministic too) have now; going on would mix the two or '
            'ignore the new ones; restore them, or train anew in another --work-dir, from these '
            'weights with --cfg-options load_from=CHECKPOINT'
        )


def _mark_start(work_dir: Path, state: dict, *, is_new: bool) -> None:
    """Take back the mark of an earlier end, and note what is trained from the start."""
    (work_dir / FINISHED).unlink(missing_ok=True)
    if is_new or not (work_dir / STARTED).is_file():
        files.write_json(work_dir / STARTED, state)


def write_finished(work_dir: Path | str, best: Path, state: dict) -> None:
    """Leave the mark that training has come to its end, with what belongs to it."""
    known = {'best': best.name, 'best_hash': files.file_hash(best)[:16]}
    files.write_json(Path(work_dir) / FINISHED, {**known, **state})


def finished_state(cfg: Config, work_dir: Path | str) -> tuple[bool, str]:
    """Tell whether a fold's training is complete, and why or why not.

    Args:
        cfg: The config with the options of this training merged in.
        work_dir: The fold's work folder.

    Raises:
        ConfigError: It was trained, or begun, with other settings or folds than those in force.
    """
    work_dir = Path(work_dir)
    finished, started = read_mark(work_dir / FINISHED), read_mark(work_dir / STARTED)
    if finished:
        _refuse_other_recipe(work_dir / FINISHED, finished, cfg)
    if not finished:
        if not any(work_dir.glob('*_*.pth')):
            return False, f'{work_dir}: not begun'
        if started:  # without a checkpoint training starts anew, and nothing can be mixed
            _refuse_other_recipe(work_dir / STARTED, started, cfg)
        return False, f'{work_dir / FINISHED} is not there'
    best = work_dir / finished['best']
    if not best.is_file():
        return False, f'{best} is gone'
    if files.file_hash(best)[:16] != finished['best_hash']:
        return False, f'{best} is not the file that training ended with'
    return True, str(best)


def read_mark(path: Path) -> dict:
    """Return what a mark says; empty if it is missing, damaged or of another version."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}
    is_ours = isinstance(content, dict) and content.get('version') == MARK_VERSION
    return content if is_ours else {}


def _refuse_other_recipe(path: Path, mark: dict, cfg: Config) -> None:
    folds = fold_hash_of(cfg)
    if folds and mark['fold_hash'] and mark['fold_hash'] != folds:
        raise ConfigError(
            f'{path}: trained with folds {mark["fold_hash"]}, now there are folds {folds}; delete '
            f'{path.parent} to train it again, or restore the folds file'
        )
    if mark['recipe'] != recipe_hash(cfg):
        raise ConfigError(
            f'{path}: trained with other settings than the config and its options have now; '
            f'delete {path.parent} to train it again, or restore the settings'
        )

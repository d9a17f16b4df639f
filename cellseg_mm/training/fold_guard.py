"""Keep a model with the folds, classes and data that it was trained on.

In: configs and checkpoints. Out: provenance in checkpoints, or a refusal. Invariant: a model is
never scored on images that it has seen.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, Runner
from torch import nn

from cellseg_mm.core import files, provenance, trainings
from cellseg_mm.core.errors import CheckpointError, ConfigError, FoldError
from cellseg_mm.data.folds import load_folds
from cellseg_mm.data.pixel_size import Um, stated
from cellseg_mm.pipeline.dataset import CellDataset, base_dataset, log_parts
from cellseg_mm.training.marks import recipe_record

HEAD = re.compile(r'(?:^|\.)(?:bbox_head|mask_head)(?:\.\d+)?$')  # numbered in cascades

# What a result file says about the checkpoint that made it.
TRAINED_KEYS = (
    *('fold', 'fold_hash', 'excluded_folds', 'commit', 'class_names'),
    *('recipe', 'parts', 'config_parts', 'file_parts'),
)


def run_provenance(runner: Runner, dataset: CellDataset | None) -> dict:
    """Return what a checkpoint or result of this run must carry, as plain JSON values."""
    classes = dataset.metainfo.get('classes', ()) if dataset else ()
    has_range = dataset is not None and dataset.value_range is not None
    size = dataset_um(runner, dataset)
    return {
        **({'value_range': dataset.value_range.to_json()} if has_range else {}),
        **({'um_per_px': [*size]} if size else {}),
        'fold': dataset.fold if dataset and dataset.split in ('train', 'val') else None,
        'split': dataset.split if dataset else '',
        'fold_hash': dataset.fold_hash if dataset else '',
        'excluded_folds': list(dataset.exclude_folds) if dataset else [],
        'data_hash': dataset.data_hash if dataset else '',
        'data_root': str(dataset.data_root) if dataset else '',
        'class_names': [str(name) for name in classes],
        'commit': provenance.code_commit(),
        'versions': provenance.versions(),
        'seed': int(runner.seed) if runner.seed is not None else None,
        'config_hash': files.text_hash(runner.cfg.pretty_text),
        'experiment': runner.experiment_name,
    }


def dataset_um(runner: Runner, dataset: CellDataset | None) -> Um | None:
    """Return height and width of a pixel: what the config says, else what is recorded."""
    said = stated(runner.cfg.get('um_per_px'), 'config')
    return said or (dataset.settings.um_per_px() if dataset else None)


def groups_of(dataset: CellDataset | None) -> dict[str, str]:
    """Return the group (patient, slide) of each training case by name, as far as folds know it."""
    is_labelled = dataset is not None and dataset.split != 'test'
    if not is_labelled or not dataset.folds_file.is_file():
        return {}
    return dict(load_folds(dataset.folds_file).groups)


@HOOKS.register_module()
class ProvenanceHook(Hook):
    """Write fold, data and code identity into every checkpoint, and check them when one is loaded.

    Args:
        allow_other_folds: Accept a checkpoint of other folds when fine-tuning, resuming or scoring
            a fold's validation split. Scores are then not out of fold.

    Raises:
        FoldError: The loaded checkpoint was trained with other folds, or on another fold.
        CheckpointError: It was trained for other classes or for another network, or what is
            resumed by another recipe.
        ConfigError: A head of the model knows another number of classes than the data set.
    """

    priority = 'VERY_HIGH'

    def __init__(self, allow_other_folds: bool = False) -> None:
        self.allow_other_folds = allow_other_folds
        self.record: dict = {}  # of the recipe; what tools/train.py knows beyond the config
        self._loaded: dict = {}  # meta['cellseg'] of the checkpoint in use

    def before_train(self, runner: Runner) -> None:
        """Log what is trained and validated on."""
        loops = [runner.train_loop, runner.val_loop]
        for loop in loops:
            dataset = base_dataset(loop.dataloader.dataset) if loop is not None else None
            if dataset is not None:
                refuse_other_class_count(runner.model, dataset.metainfo.get('classes', ()))
                log_parts(dataset)

    def before_test(self, runner: Runner) -> None:
        """Give the metrics what their prediction files must say."""
        dataset = base_dataset(runner.test_loop.dataloader.dataset)
        if dataset is not None:
            refuse_other_class_count(runner.model, dataset.metainfo.get('classes', ()))
        source = runner._load_from
        is_file = bool(source) and Path(source).is_file()
        known = {
            **run_provenance(runner, dataset),
            'checkpoint': str(source or ''),
            'checkpoint_hash': files.file_hash(source)[:16] if is_file else '',
            'trained': {key: self._loaded.get(key) for key in TRAINED_KEYS},
        }
        groups = groups_of(dataset)
        for metric in runner.test_loop.evaluator.metrics:
            if hasattr(metric, 'provenance'):
                metric.provenance = {**known, **metric.provenance}
            if hasattr(metric, 'groups'):
                metric.groups = groups

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add ``meta['cellseg']``."""
        dataset = base_dataset(runner.train_loop.dataloader.dataset)
        self.record = self.record or recipe_record(runner.cfg)
        checkpoint['meta']['cellseg'] = {**run_provenance(runner, dataset), **self.record}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse a checkpoint that saw images which it would be scored on, or of other classes."""
        trained = trainings.trained_record(checkpoint)
        self._loaded = trained
        # A loop that is not in use is still its config, or None.
        loops = [runner._train_loop, runner._test_loop, runner._val_loop]
        loop = next((loop for loop in loops if isinstance(loop, BaseLoop)), None)
        dataset = base_dataset(loop.dataloader.dataset) if loop is not None else None
        if dataset is None:
            return
        is_fine_tuning = dataset.split == 'train' and not runner._resume
        source = str(runner._load_from or 'checkpoint')
        check_classes(checkpoint, dataset, source, is_fine_tuning=is_fine_tuning)
        if not is_fine_tuning:
            trainings.refuse_other_network(source, trained, runner.cfg.to_dict())
        if runner._resume:
            refuse_resuming(source, trained, self.record or recipe_record(runner.cfg))
        if not trained or dataset.split not in ('train', 'val') or self.allow_other_folds:
            return
        check = refuse_seen_start if is_fine_tuning else refuse_other_folds
        check(trained, dataset)


def check_classes(
    checkpoint: Mapping, dataset: CellDataset, source: str, *, is_fine_tuning: bool
) -> None:
    """Compare the classes that stand in a checkpoint with those of the data set.

    Raises:
        CheckpointError: Names or their order differ; scores would be called by wrong names. Weights
            to begin with may be of other classes, which is said.
    """
    known = trainings.class_names_of(checkpoint)
    now = tuple(map(str, dataset.metainfo.get('classes') or ()))
    if not is_fine_tuning:
        trainings.refuse_other_classes(source, checkpoint, now)
    if not known or not now or known == now:
        return
    heads = 'begin as' if len(known) == len(now) else 'do not fit and begin anew, not as'
    print_log(
        f'{source}: its classes are {trainings.listed(known)}; the config has '
        f'{trainings.listed(now)}; the heads of boxes and masks {heads} those of the other '
        'classes, in this order',
        'current',
        level=logging.WARNING,
    )


def refuse_resuming(source: str, trained: Mapping, record: Mapping) -> None:
    """Raise CheckpointError where a run would go on with another recipe than its checkpoint's."""
    changed = trainings.differing(record['parts'], trained.get('parts') or {})
    if changed := [key for key in changed if key not in ('train_cfg', 'load_from')]:
        raise CheckpointError(
            f'{source}: was trained with other values of {", ".join(changed)} than the config and '
            'the options have now; going on would mix the two; restore them, or train anew in '
            'another --work-dir'
        )


def refuse_other_class_count(model: nn.Module, class_names: Sequence[str]) -> None:
    """Raise ConfigError unless each head of ``model`` has as many classes as there are names.

    Too many would be trained and scored in silence, too few end in an assertion of the device.
    """
    inner = model.module if is_model_wrapper(model) else model
    wrong = [
        f'model.{name}.num_classes={head.num_classes}'
        for name, head in inner.named_modules()
        if HEAD.search(name)
        and isinstance(getattr(head, 'num_classes', None), int)
        and not getattr(head, 'class_agnostic', False)
        and head.num_classes != len(class_names)
    ]
    if wrong and class_names:
        raise ConfigError(
            f'{", ".join(wrong)}: the data set names {len(class_names)} classes '
            f'({", ".join(map(str, class_names))}); expected as many; set it in every head'
        )


def refuse_other_folds(trained: dict, dataset: CellDataset) -> None:
    """Raise FoldError unless ``trained`` (``meta['cellseg']``) belongs to the data set's fold."""
    if trained.get('split') == 'all':
        raise FoldError(
            'checkpoint: was trained on all images of its data (--all-folds), so that none is left '
            'to score it on; score the folds of its recipe, and use it for new images'
        )
    # A model of folds that were extended since has seen no more than then; see Folds.lineage.
    earlier = () if dataset.split == 'train' else dataset.fold_lineage
    if trained['fold_hash'] not in (dataset.fold_hash, *earlier):
        raise FoldError(
            f'checkpoint: trained with folds {trained["fold_hash"]}, {dataset.folds_file} now has '
            f'folds {dataset.fold_hash}; its validation images may have been trained on; restore '
            'the old folds file or train again'
        )
    excluded = list(trained.get('excluded_folds', ()))
    if dataset.split == 'train':  # resuming: the same images must follow
        is_same = (trained['fold'], excluded) == (dataset.fold, list(dataset.exclude_folds))
    else:
        is_same = dataset.fold in (trained['fold'], *excluded)
    if not is_same:
        raise FoldError(
            f'checkpoint: trained for fold {trained["fold"]} without folds {excluded}, the config '
            f'is fold {dataset.fold} without {list(dataset.exclude_folds)}; it has seen images '
            'that this config holds out; use the config of its own fold'
        )


def refuse_seen_start(trained: dict, dataset: CellDataset) -> None:
    """Raise FoldError if weights to begin with have seen images that this training holds out.

    Their scores would not be out of fold, and no later checkpoint would tell. Weights of other data
    are welcome; those of folds that were extended since are of these data.
    """
    held_out = {dataset.fold, *dataset.exclude_folds}
    clean: set = set()
    # corrections change the data's hash, not what a model of all its images has seen
    saw_all = trained.get('split') == 'all' and trained.get('data_root') == str(dataset.data_root)
    if trained.get('fold_hash') in (dataset.fold_hash, *dataset.fold_lineage):
        clean = {trained.get('fold'), *(trained.get('excluded_folds') or ())}
    elif trained.get('data_hash') != dataset.data_hash and not saw_all:
        return
    if seen := sorted(held_out - clean):
        raise FoldError(
            f'load_from: the checkpoint was trained for fold {trained.get("fold")} of folds '
            f'{trained.get("fold_hash") or "unknown"} and has seen images of fold '
            f'{", ".join(map(str, seen))} of {dataset.folds_file}, which this training holds out; '
            'begin with weights of other data or of the same fold, or with load_from=None'
        )

"""Out-of-fold predictions: each training image, predicted by the one member that never saw it.

In: the prediction files of the folds' validation splits, the folds file, the data. Out: one pool of
predictions and ground truth, in the order of the names. Invariant: an image is in the pool once, by
the fold that held it out, and all files name the same folds; anything else is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cellseg_mm.core.errors import FoldError, PredictionError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.layout import on_fold_dir, predictions_path
from cellseg_mm.core.progress import track
from cellseg_mm.core.provenance import code_commit, versions
from cellseg_mm.core.text_table import text_table
from cellseg_mm.core.trainings import refuse_other_recipe
from cellseg_mm.data.folds import Folds
from cellseg_mm.data.labels import Case, find_cases, read_gt
from cellseg_mm.ensemble.members import list_of
from cellseg_mm.fusion.fuse import from_spec, fuse
from cellseg_mm.results.predictions import Predictions, load_predictions, save_predictions
from cellseg_mm.results.whose import refuse_foreign
from cellseg_mm.scores.records import ScoreParams, Scores
from cellseg_mm.scores.score import score

logger = logging.getLogger(__name__)

COLUMNS = {'AP50': 'segm_AP50', 'AP': 'segm_AP', 'mPQ': 'mPQ'}
NO_PART = '(not in the table)'
FOLDS_PART = 'train_dataloader'  # of a recipe; it names the fold
MEMBER_KEYS = ('checkpoint', 'checkpoint_hash', 'code_commit')


@dataclass(frozen=True, slots=True)
class OofPool:
    """Out-of-fold predictions beside the truth.

    Attributes:
        pred_sets: One per image, sorted by name.
        gt_sets: The ground truth of the same images, same order.
        fold_of: Fold that held the image out, same order.
        class_names: Names of the classes.
        fold_hash: Hash of the folds that all members share.
        n_folds: Number of folds there are; the pool may hold fewer.
        provenance: The files' provenance, by fold; empty if other pools were fused into this one.
        groups: Group (patient, slide) by image name, where one is known.
        fused: The pools of several recipes that were fused into this one; see :func:`fuse_pools`.
    """

    pred_sets: tuple[InstanceSet, ...]
    gt_sets: tuple[InstanceSet, ...]
    fold_of: tuple[int, ...]
    class_names: tuple[str, ...]
    fold_hash: str
    n_folds: int
    provenance: dict[int, dict[str, JsonValue]]
    groups: Mapping[str, str] = field(default_factory=dict)
    fused: tuple[OofPool, ...] = ()

    @property
    def origins(self) -> list[dict[str, JsonValue]]:
        """The provenance of all files, recipe by recipe and by fold."""
        return [origin for pool in self.fused or (self,) for origin in pool.provenance.values()]

    @property
    def folds(self) -> tuple[int, ...]:
        """The folds in the pool, rising."""
        return tuple(sorted(set(self.fold_of)))


def pool_predictions(
    paths: Sequence[Path | str], folds: Folds, data_root: Path | str, *, folds_path: Path | str = ''
) -> OofPool:
    """Join the validation predictions of several folds.

    Args:
        paths: One prediction file per fold, any order.
        folds: The folds now in force.
        data_root: Data folder, for the ground truth.
        folds_path: Where ``folds`` came from, for messages.

    Raises:
        FoldError: A file belongs to other folds, two files to one fold, or a file does not hold
            exactly its fold's validation images, or an image is not in the data folder.
        PredictionError: A file cannot be read or is not of the checkpoint that counts in its work
            folder, the files name different classes, or the data have changed since.
    """
    if not paths:
        raise PredictionError(
            'out of fold: no prediction files given; test at least one fold first'
        )
    by_fold: dict[int, Predictions] = {}
    for path in paths:
        predictions = load_predictions(path)
        refuse_foreign(path, predictions.provenance)
        fold = _checked_fold(Path(path), predictions, folds, folds_path)
        if fold in by_fold:
            raise FoldError(f'{path}: fold {fold} is given twice; give each fold once')
        by_fold[fold] = predictions
    names = {tuple(map(str, list_of(p.provenance.get('class_names')))) for p in by_fold.values()}
    if len(names) > 1 or () in names:
        raise PredictionError(
            f'out of fold: the folds name different classes, or none, {sorted(names)}; expected '
            'the same in each file; test the folds with one config'
        )
    rows = sorted((s.name, fold, s) for fold, p in by_fold.items() for s in p.sets)
    class_names = names.pop()
    found = find_cases(data_root, 'train', len(class_names), exclude_names=folds.excluded)
    cases = {case.name: case for case in found}
    for name, fold, predicted in rows:
        _check_case(cases.get(name), predicted, fold, data_root)
    gt = [read_gt(cases[name]) for name, _, _ in track(rows, description='ground truth')]
    return OofPool(
        pred_sets=tuple(row[2] for row in rows),
        gt_sets=tuple(gt),
        fold_of=tuple(row[1] for row in rows),
        class_names=class_names,
        fold_hash=folds.hash,
        n_folds=folds.n_folds,
        provenance={fold: dict(p.provenance) for fold, p in sorted(by_fold.items())},
        groups=dict(folds.groups),
    )


def fuse_pools(pools: Mapping[str, OofPool], rule: str) -> OofPool:
    """Fuse several recipes' answers; each image has one member a recipe, and none has seen it.

    Args:
        pools: By recipe, of the same folds; one alone is returned as it is.
        rule: Spec of the fusion rule.

    Raises:
        PredictionError: The recipes were tested on other folds, or name other classes.
        ConfigError: The rule is not known.
    """
    (name, first), *others = pools.items()
    if not others:
        return first
    for other, pool in others:
        refuse_other_classes(pool, first.class_names)
        if pool.folds != first.folds:
            raise PredictionError(
                f'out of fold: {name} was tested on the folds {first.folds}, {other} on '
                f'{pool.folds}; expected the same, so that each image has all members; test the '
                'others, or leave their configs out'
            )
    how = from_spec(rule)
    together = zip(*(pool.pred_sets for pool in pools.values()), strict=True)
    sets = tuple(fuse(members, how) for members in track(list(together), description='fused'))
    return replace(first, pred_sets=sets, provenance={}, fused=tuple(pools.values()))


def refuse_other_classes(pool: OofPool, class_names: Sequence[str]) -> None:
    """Refuse a pool whose classes are not those of the config, in this order.

    Raises:
        PredictionError: They differ.
    """
    if pool.class_names != tuple(class_names):
        raise PredictionError(
            f'out of fold: the classes of the predictions are {", ".join(pool.class_names)}, the '
            f'config has {", ".join(class_names)}; scores and thresholds are per class; test the '
            'folds again'
        )


def refuse_other_recipes(pool: OofPool, settings: Mapping[int | None, Mapping[str, Any]]) -> None:
    """Refuse folds that were trained by another recipe than that of their config.

    Args:
        pool: The folds.
        settings: By fold its config, as a dict; folds without one are not compared.

    Raises:
        CheckpointError: A fold's config or its options have other values now.
    """
    parts: dict[str, set[str]] = {}
    for fold, origin in pool.provenance.items():
        trained: Any = origin.get('trained')
        if not isinstance(trained, dict):
            continue
        if fold in settings:
            refuse_other_recipe(Path(str(origin.get('checkpoint'))), trained, settings[fold])
        for key, value in (trained.get('parts') or {}).items():
            parts.setdefault(key, set()).add(value)
    mixed = [key for key, values in parts.items() if len(values) > 1 and key != FOLDS_PART]
    if mixed:
        logger.warning(
            'out of fold: the folds were trained with different values of %s; the score is that of '
            'no one recipe; train them with the same options',
            ', '.join(mixed),
        )


def score_pool(pool: OofPool, params: ScoreParams | None = None) -> Scores:
    """Score a pool; intervals resample groups of images where the folds know any."""
    return score(pool.gt_sets, pool.pred_sets, pool.class_names, params, groups=pool.groups)


def table_of_parts(pool: OofPool, part_of: Mapping[str, str]) -> str:
    """Return the scores of each part of the images: of each organ, scanner or stain.

    Args:
        pool: From :func:`pool_predictions`.
        part_of: Part by image name; images without one are a part of their own.
    """
    parts: dict[str, list[int]] = {}
    for i, gt in enumerate(pool.gt_sets):
        parts.setdefault(part_of.get(gt.name, NO_PART), []).append(i)
    rows = []
    for name, index in sorted(parts.items()):
        gts = [pool.gt_sets[i] for i in index]
        scores = score(
            gts, [pool.pred_sets[i] for i in index], pool.class_names, ScoreParams(n_bootstrap=0)
        )
        headline = scores.headline()
        values = [*(headline[key] for key in COLUMNS.values()), *scores.segm.ap50[:, 0]]
        numbers = [str(len(gts)), str(sum(map(len, gts))), *(f'{value:.3f}' for value in values)]
        rows.append([name, *numbers])
    return text_table(['', 'images', 'cells', *COLUMNS, *pool.class_names], rows)


def _check_case(
    case: Case | None, predicted: InstanceSet, fold: int, data_root: Path | str
) -> None:
    """Refuse data that are not those the fold was tested on: scores pair images by their ids."""
    if case is None:
        raise FoldError(
            f'{data_root}: image {predicted.name} of fold {fold} is not there, or is excluded; '
            'the data must be those that the folds were made of; restore it or make folds again'
        )
    if (case.image_id, case.image_hw) != (predicted.image_id, predicted.image_hw):
        raise PredictionError(
            f'image {predicted.name} of fold {fold}: predicted with id {predicted.image_id} and '
            f'size {predicted.image_hw}, {data_root} has {case.image_id} and {case.image_hw}; the '
            'data have changed since; test the fold again'
        )


def _checked_fold(
    path: Path, predictions: Predictions, folds: Folds, folds_path: Path | str
) -> int:
    provenance = predictions.provenance
    fold, fold_hash = provenance.get('fold'), provenance.get('fold_hash')
    if provenance.get('split', 'val') != 'val':
        raise FoldError(
            f'{path}: is of the split {provenance["split"]}; expected the predictions of a '
            'validation split; make them with tools/test.py'
        )
    if not isinstance(fold, int) or isinstance(fold, bool) or not 0 <= fold < folds.n_folds:
        raise FoldError(
            f'{path}: names fold {fold!r}; expected the predictions of a validation split, '
            f'fold 0 to {folds.n_folds - 1}; make them with tools/test.py'
        )
    if fold_hash != folds.hash:
        raise FoldError(
            f'{path}: made with folds {fold_hash}, {folds_path or "the folds file"} has '
            f'{folds.hash}; the member may have trained on these images; restore the folds file '
            'or train again'
        )
    _check_trained(path, provenance.get('trained'), fold, folds)
    has, wanted = {s.name for s in predictions.sets}, set(folds.val_names(fold))
    if has != wanted:
        raise FoldError(
            f'{path}: fold {fold} has {len(wanted)} validation images, the file has {len(has)} '
            f'({len(wanted - has)} missing, {len(has - wanted)} of other folds); test it again'
        )
    return fold


def _check_trained(path: Path, trained: object, fold: int, folds: Folds) -> None:
    """Refuse a file whose checkpoint is not known to have held the fold out."""
    if not isinstance(trained, dict):  # made elsewhere: the file's own word has to do
        return
    clean = (trained.get('fold'), *(trained.get('excluded_folds') or ()))
    if trained.get('fold_hash') not in (folds.hash, *folds.lineage) or fold not in clean:
        raise FoldError(
            f'{path}: its checkpoint was trained for fold {trained.get("fold")} of folds '
            f'{trained.get("fold_hash") or "unknown"}, the images are those of fold {fold} of '
            f'folds {folds.hash}; it may have seen them; test the checkpoint of fold {fold}'
        )


def describe(pool: OofPool, scores: Scores, data_root: Path | str) -> str:
    """Return the headline and what it rests on, for a terminal."""
    value = scores.headline()['segm_AP50']
    low, high = scores.intervals.get('segm_AP50', (float('nan'), float('nan')))
    drawn = f'{scores.n_interval_units} {scores.interval_unit}'
    interval = f' (95 % interval {low:.4f} to {high:.4f}, {drawn})' if scores.intervals else ''
    held_out = ', '.join(map(str, pool.folds))
    partial = '' if len(pool.folds) == pool.n_folds else ' ONLY'
    views = sorted({str(origin['tta']) for origin in pool.origins if origin.get('tta')})
    augmented = f' with test-time augmentation {"; ".join(views)}' if views else ''
    together = f' of {len(pool.fused)} recipes fused' if pool.fused else ''
    return (
        f'out-of-fold mask AP50{together}{augmented} {value:.4f}{interval}\n'
        f'data {data_root}, {len(pool.pred_sets)} images of folds {held_out}{partial} '
        f'(of {pool.n_folds}, folds {pool.fold_hash}), at most {scores.cap} detections per class '
        f'and image, commit {code_commit() or "unknown"}'
    )


def save_pool(path: Path | str, pool: OofPool) -> None:
    """Write the pooled predictions as one prediction file; see docs/formats.md."""
    members: dict[str, JsonValue] = {}
    for fold in pool.folds:
        of_fold = [one.provenance[fold] for one in pool.fused or (pool,)]
        named = [{key: origin.get(key) for key in MEMBER_KEYS} for origin in of_fold]
        members[str(fold)] = list(named) if pool.fused else named[0]
    keys = [set(s.extra) for s in pool.pred_sets if len(s)]
    kept = set.intersection(*keys) if keys else set()
    sets = tuple(
        replace(s, extra={k: v for k, v in s.extra.items() if k in kept}) for s in pool.pred_sets
    )
    provenance: dict[str, JsonValue] = {
        **pool_origin(pool),
        'fold_of': {s.name: fold for s, fold in zip(pool.pred_sets, pool.fold_of, strict=True)},
        'members': members,
    }
    save_predictions(path, Predictions(sets, provenance))


def pool_origin(pool: OofPool) -> dict[str, JsonValue]:
    """Return where a pool's predictions and scores come from, as JSON values without paths."""
    hashes = {str(origin.get('data_hash') or '') for origin in pool.origins}
    return {
        'split': 'oof',
        'fold': None,
        'folds': list(pool.folds),
        'fold_hash': pool.fold_hash,
        'data_hash': hashes.pop() if len(hashes) == 1 else '',
        'class_names': list(pool.class_names),
        'code_commit': code_commit(),
        'versions': {**versions()},
    }


def validation_files(
    configs: Sequence[str], work_dirs: Sequence[Path], *, tta: str = ''
) -> list[Path]:
    """Return where each fold's tested predictions are.

    Args:
        configs: One config per fold.
        work_dirs: Their work folders.
        tta: The test-time augmentation they were tested with, as on the command line; '' for none.

    Raises:
        PredictionError: Some are missing; names the commands that make them.
    """
    return _existing(
        [predictions_path(work_dir, 'val', tta) for work_dir in work_dirs],
        [
            f'python tools/test.py {config} --work-dir {work_dir}'
            + (f' --tta {tta}' if tta else '')
            for config, work_dir in zip(configs, work_dirs, strict=True)
        ],
    )


def held_out_files(configs: Sequence[str], work_dirs: Sequence[Path], fold: int) -> list[Path]:
    """Return where each member's predictions of a held-out fold are.

    Raises:
        PredictionError: Some are missing; names the commands that make them.
    """
    return _existing(
        [predictions_path(on_fold_dir(work_dir, fold), 'val') for work_dir in work_dirs],
        [
            f'python tools/test.py {config} --work-dir {work_dir} '
            f'--out {on_fold_dir(work_dir, fold)} '
            f'--cfg-options test_dataloader.dataset.fold={fold}'
            for config, work_dir in zip(configs, work_dirs, strict=True)
        ],
    )


def _existing(paths: list[Path], commands: Sequence[str]) -> list[Path]:
    missing = [i for i, path in enumerate(paths) if not path.is_file()]
    if missing:
        raise PredictionError(
            f'{paths[missing[0]]}: {len(missing)} of {len(paths)} prediction files are missing; '
            f'make them with: {"; ".join(commands[i] for i in missing)}'
        )
    return paths

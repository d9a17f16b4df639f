"""Gathers what a report is made of: configs, logs, prediction files and ground truth.

In: configs of folds, or one work folder. Out: :class:`ReportInputs`. Invariant: what is missing is
a sentence in ``notes`` or in a run's ``missing``, for the reader; what contradicts itself (folds of
another data set, two files of one fold) is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cellseg_mm.core.errors import ConfigError, DataError, PredictionError
from cellseg_mm.core.layout import FINISHED, ensemble_dir, predictions_path, work_dir_of
from cellseg_mm.data.cases import Case
from cellseg_mm.data.config import DataSettings, Rgb, default_colours
from cellseg_mm.data.folds import load_folds
from cellseg_mm.data.images import cases_of
from cellseg_mm.data.intensity import ValueRange
from cellseg_mm.ensemble.oof import (
    OofPool,
    pool_predictions,
    refuse_other_classes,
    refuse_other_recipes,
)
from cellseg_mm.report.logs import TrainingLog, read_training_log, step_of_checkpoint
from cellseg_mm.results.predictions import Predictions, load_predictions
from cellseg_mm.results.whose import why_foreign

if TYPE_CHECKING:
    from mmengine.config import Config


@dataclass(frozen=True, slots=True)
class FoldRun:
    """One work folder.

    Attributes:
        name: What the report calls it, for example ``fold 0``.
        work_dir: The folder.
        config_text: The settings it was trained with; the config's where it has not started.
        log: Curves.
        best_name: File of the chosen checkpoint, '' when training has not finished.
        best_hash: Its hash.
        best_step: Its iteration.
        predictions_path: Its validation predictions, or None.
        missing: What is not there yet and the command that makes it, '' when complete.
    """

    name: str
    work_dir: Path
    config_text: str
    log: TrainingLog
    best_name: str
    best_hash: str
    best_step: int | None
    predictions_path: Path | None
    missing: str


@dataclass(frozen=True, slots=True)
class ReportInputs:
    """Everything the report shows, before any of it is computed.

    Attributes:
        title: Of the page.
        runs: Work folders, by fold; empty for an ensemble folder alone.
        class_names: K names.
        palette: K colours.
        red_blue_swapped: The image files hold blue where red belongs.
        value_range: Of images with more than 8 bits; None where none is recorded.
        data_root: Data folder; None when unknown.
        pool: Out-of-fold predictions beside the truth; None when no fold is scored.
        ensemble: Predictions for the test images; None when there are none.
        ensemble_path: Where they were looked for.
        notes: What the reader must know about what is not here.
        test_paths: Test image name to its file; empty when unknown.
        train_paths: Training case name to its image file.
    """

    title: str
    runs: tuple[FoldRun, ...]
    class_names: tuple[str, ...]
    palette: tuple[Rgb, ...]
    red_blue_swapped: bool
    value_range: ValueRange | None
    data_root: Path | None
    pool: OofPool | None
    ensemble: Predictions | None
    ensemble_path: Path
    notes: tuple[str, ...] = ()
    test_paths: dict[str, Path] = field(default_factory=dict)
    train_paths: dict[str, Path] = field(default_factory=dict)

    @property
    def why_no_scores(self) -> str:
        """Why nothing can be compared with labels, when ``pool`` is None."""
        if not self.runs:
            return (
                'An ensemble folder alone holds no predictions for labelled images. For scores '
                'make the report from the configs: python tools/report.py CONFIGS'
            )
        return (
            'No fold has validation predictions yet, so nothing can be compared with the labels. '
            'Make them with: python tools/test.py CONFIG'
        )


def from_configs(
    config_paths: Sequence[Path | str],
    *,
    work_root: Path | str | None = None,
    out_dir: Path | str | None = None,
) -> ReportInputs:
    """Gather the folds of ``configs`` and the ensemble folder beside them.

    Args:
        config_paths: One config per fold.
        work_root: Folder of the work folders; None for MMDetection's ``work_dirs``.
        out_dir: Folder of the ensemble; None for ``ensemble`` beside the work folders.

    Raises:
        CellSegError: No config, a config does not exist, or the folds contradict each other.
    """
    from mmengine.config import Config

    if not config_paths:
        raise ConfigError('report: no configs given; expected for example configs/*.py')
    runs, configs = [], []
    for path in sorted(map(str, config_paths)):
        if not Path(path).is_file():
            raise ConfigError(f'{path}: no such config file; check the path')
        cfg = Config.fromfile(path)
        configs.append(cfg)
        runs.append(_fold_run(cfg, work_dir_of(path, work_root), path))
    ensemble = Path(out_dir) if out_dir is not None else ensemble_dir([r.work_dir for r in runs])
    names = sorted({run.work_dir.parent.name for run in runs} - {'work_dirs', ''})
    title = f'Report on {len(runs)} folds' + (f' of {", ".join(names)}' if names else '')
    data = DataSettings.from_config(configs[0], 'val_dataloader')
    found = _gathered(title, runs, data, ensemble)
    if found.pool is not None:
        settings = {DataSettings.from_config(cfg).fold: cfg.to_dict() for cfg in configs}
        refuse_other_recipes(found.pool, settings)
    return found


def from_work_dir(work_dir: Path | str) -> ReportInputs:
    """Gather one fold's work folder, or an ensemble folder.

    Raises:
        CellSegError: There is neither a config nor a prediction file, or they contradict.
    """
    from mmengine.config import Config

    work_dir = Path(work_dir)
    own = _newest_config(work_dir)
    if own is None and not predictions_path(work_dir, 'test').is_file():
        raise ConfigError(
            f'{work_dir}: found neither a config (*.py) nor '
            f'{predictions_path(work_dir, "test").name}; expected the work folder '
            'of a fold or of an ensemble; check the path'
        )
    if own is not None and not _is_ensemble(work_dir):
        cfg = Config.fromfile(own)
        run = _fold_run(cfg, work_dir, str(own))
        data = DataSettings.from_config(cfg, 'val_dataloader')
        return _gathered(f'Report on {run.name} in {work_dir}', [run], data, work_dir)
    # The ensemble's runner may have left a member's config; else the members lie beside it.
    beside = [own] + [
        _newest_config(p) for p in sorted(work_dir.resolve().parent.glob('*')) if p.is_dir()
    ]
    found = next((path for path in beside if path is not None), None)
    cfg = Config.fromfile(found) if found else None
    beside_it = DataSettings.from_config(cfg, 'val_dataloader') if cfg else None
    return _gathered(f'Report on the ensemble in {work_dir}', [], beside_it, work_dir)


def _is_ensemble(folder: Path) -> bool:
    marks = (folder / FINISHED, folder / 'last_checkpoint', predictions_path(folder, 'val'))
    is_fused = predictions_path(folder, 'test').is_file()
    return is_fused and not any(mark.exists() for mark in marks)


def _newest_config(folder: Path) -> Path | None:
    paths = sorted(folder.glob('*.py'), key=lambda path: (path.stat().st_mtime_ns, path.name))
    return paths[-1] if paths else None


def _fold_run(cfg: Config, work_dir: Path, config_path: str) -> FoldRun:
    fold = DataSettings.from_config(cfg).fold
    dumped = _newest_config(work_dir) if work_dir.is_dir() else None
    mark = work_dir / FINISHED
    finished = json.loads(mark.read_text()) if mark.is_file() else {}
    best = str(finished.get('best', ''))
    predictions = predictions_path(work_dir, 'val')
    missing = ''
    if not mark.is_file():
        missing = f'training has not finished: python tools/train.py {config_path} --resume'
    elif not predictions.is_file():
        missing = f'not scored yet: python tools/test.py {config_path}'
    if missing and not predictions.is_file():
        missing += f' --work-dir {work_dir}'
    return FoldRun(
        name=f'fold {"?" if fold is None else fold}',
        work_dir=work_dir,
        config_text=dumped.read_text(encoding='utf-8') if dumped else cfg.pretty_text,
        log=read_training_log(work_dir, val_interval=cfg.get('train_cfg', {}).get('val_interval')),
        best_name=best,
        best_hash=str(finished.get('best_hash', '')),
        best_step=step_of_checkpoint(best),
        predictions_path=predictions if predictions.is_file() else None,
        missing=missing,
    )


def _gathered(
    title: str, runs: Sequence[FoldRun], data: DataSettings | None, out_dir: Path
) -> ReportInputs:
    ensemble_path = predictions_path(out_dir, 'test')
    ensemble = load_predictions(ensemble_path) if ensemble_path.is_file() else None
    runs, notes = _without_foreign(runs)
    notes += [f'{run.name}: {run.missing}' for run in runs if run.missing]
    class_names = _names_in(ensemble) if data is None else data.class_names
    if data is None:
        notes.append(
            f'No config beside {out_dir}: the data folder is unknown, so no picture is shown, '
            'and colours are the default ones.'
        )
    pool = None if data is None else _pool(runs, data)
    if pool is not None and data is not None:
        refuse_other_classes(pool, data.class_names)
    train_paths: dict[str, Path] = {}
    test_paths: dict[str, Path] = {}
    if data is not None and pool is not None:
        train_paths = _image_paths(cases_of(data, 'train'))
    if data is not None and ensemble is not None:
        try:
            test_paths = _image_paths(cases_of(data, 'test'))
        except DataError as problem:
            notes.append(f'Test images are not shown. {problem}')
    return ReportInputs(
        title=title,
        runs=tuple(runs),
        class_names=class_names,
        palette=tuple(default_colours(len(class_names))) if data is None else data.palette,
        red_blue_swapped=data is not None and data.red_blue_swapped,
        value_range=None if data is None else data.value_range(),
        data_root=None if data is None else data.data_root,
        pool=pool,
        ensemble=ensemble,
        ensemble_path=ensemble_path,
        notes=tuple(notes),
        test_paths=test_paths,
        train_paths=train_paths,
    )


def _without_foreign(runs: Sequence[FoldRun]) -> tuple[list[FoldRun], list[str]]:
    """Leave out predictions that are not of the checkpoint that counts, and say why."""
    kept, notes = [], []
    for run in runs:
        path = run.predictions_path
        why = '' if path is None else why_foreign(path, load_predictions(path).provenance)
        if why:
            notes.append(
                f'{run.name}: its predictions are left out: {path} {why}; score it again: '
                f'python tools/test.py CONFIG --work-dir {run.work_dir}'
            )
        kept.append(replace(run, predictions_path=None) if why else run)
    return kept, notes


def _image_paths(cases: Iterable[Case]) -> dict[str, Path]:
    return {case.name: case.image_path for case in cases}


def _names_in(ensemble: Predictions | None) -> tuple[str, ...]:
    """Return the class names that a prediction file carries."""
    found = ensemble.provenance.get('class_names') if ensemble else None
    names = tuple(map(str, found)) if isinstance(found, list) else ()
    if not names:
        raise PredictionError(
            'report: the prediction file names no classes and there is no config; expected '
            'one of them; predict again with tools/ensemble.py'
        )
    return names


def _pool(runs: Sequence[FoldRun], data: DataSettings) -> OofPool | None:
    paths = [run.predictions_path for run in runs if run.predictions_path is not None]
    if not paths:
        return None
    folds = load_folds(data.folds_path)
    return pool_predictions(paths, folds, data.data_root, folds_path=data.folds_path)

"""What training on from a model has changed, on images that neither model was taught.

In: a fold's config, the model that training began with and the one that it ended with. Out: a
sentence, and ``against_start.json`` in the work folder. Invariant: only held-out images count whose
cells nobody corrected: corrections of a model's own predictions would speak for it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import is_main_process

from cellseg_mm.core.errors import CellSegError, CheckpointError
from cellseg_mm.core.files import file_hash, write_json
from cellseg_mm.core.layout import AGAINST_START, predictions_path
from cellseg_mm.data.config import DataSettings
from cellseg_mm.data.folds import load_folds
from cellseg_mm.data.images import find_images
from cellseg_mm.data.labels import read_gt
from cellseg_mm.data.origins import read_origins
from cellseg_mm.results.predictions import load_predictions
from cellseg_mm.scores.change import changes
from cellseg_mm.scores.records import ScoreParams
from cellseg_mm.training.train import score_checkpoint

START_FOLDER = 'start'  # in the work folder: predictions of the model that training began with


def begin_with(cfg: Config, checkpoint: str) -> None:
    """Let a config's training begin with the weights of a checkpoint.

    Raises:
        CheckpointError: There is no such file.
    """
    if not Path(checkpoint).is_file():
        raise CheckpointError(f'{checkpoint}: there is no such checkpoint; check the path')
    cfg.load_from = checkpoint


def compare_with_start(read: Callable[[], Config], start: str, best: Path) -> str:
    """Score both models on the fold's held-out images and compare them where nobody corrected.

    Args:
        read: Reads the config of the training anew; a Runner changes the one that it gets.
        start: The checkpoint that training began with.
        best: The one that it ended with.

    Returns:
        A sentence; '' on other processes than the first.

    Raises:
        CellSegError: The new model cannot be scored.
    """
    cfg = read()
    work_dir, data = Path(cfg.work_dir), DataSettings.from_config(cfg, 'val_dataloader')
    try:
        score_checkpoint(read(), checkpoint=start, out_dir=work_dir / START_FOLDER)
    except CellSegError as problem:  # weights of other data or classes may be a start
        return f'not compared with {start}: {problem}'
    score_checkpoint(read(), checkpoint=str(best))
    return _compare(work_dir, data, start, best) if is_main_process() else ''


def _compare(work_dir: Path, data: DataSettings, start: str, best: Path) -> str:
    images = find_images(
        data.data_root, 'val', data.class_names, folds_path=data.folds_path, fold=data.fold
    )
    corrected = read_origins(data.data_root)
    cases = [case for case in images.cases if case.name not in corrected]
    left_out = [case.name for case in images.cases if case.name in corrected]
    if not cases:
        return (
            f'not compared: all {len(left_out)} held-out images of fold {data.fold} were corrected '
            'or added; expected some that were not'
        )
    before, after = (
        {one.name: one for one in load_predictions(predictions_path(folder, 'val')).sets}
        for folder in (work_dir / START_FOLDER, work_dir)
    )
    folds = load_folds(data.folds_path)
    found, unit, n_units = changes(
        [read_gt(case) for case in cases],
        [before[case.name] for case in cases],
        [after[case.name] for case in cases],
        data.class_names,
        ScoreParams(),
        groups=folds.groups,
    )
    path = work_dir / AGAINST_START
    write_json(
        path,
        {
            'version': 1,
            'before': {'checkpoint': start, 'hash': file_hash(start)[:16]},
            'after': {'checkpoint': str(best), 'hash': file_hash(best)[:16]},
            'fold': data.fold,
            'fold_hash': folds.hash,
            'images': [case.name for case in cases],
            'left_out': left_out,
            'interval_unit': unit,
            'n_interval_units': n_units,
            'changes': {change.name: change.to_json() for change in found},
        },
    )
    more = f'; {len(left_out)} held-out images that were corrected or added are left out'
    return (
        f'on {len(cases)} images ({n_units} {unit}) that were neither corrected nor trained on: '
        f'{", ".join(change.text() for change in found)}{more if left_out else ""}; written: {path}'
    )

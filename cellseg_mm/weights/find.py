"""Find a work folder's checkpoints.

In: a folder. Out: the newest or best file that is whole. Invariant: a torn file is passed over
and said.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cellseg_mm.core.errors import CheckpointError
from cellseg_mm.core.trainings import (
    best_files,
    finished_best,
    newest_first,
    refuse_mixed_folder,
    regular_files,
    trained_record,
)
from cellseg_mm.weights.checkpoints import load_checkpoint_file, logger


def find_checkpoints(work_dirs: Sequence[Path]) -> list[Path]:
    """Return each fold's best checkpoint.

    Raises:
        CheckpointError: Folds have none; names all of them.
    """
    found, problems = [], []
    for work_dir in work_dirs:
        try:
            found.append(best_checkpoint(work_dir))
        except CheckpointError as problem:
            problems.append(str(problem))
    if len(problems) == 1:
        raise CheckpointError(problems[0])
    if problems:
        raise CheckpointError(
            f'{len(problems)} of {len(work_dirs)} members are missing: ' + '; '.join(problems)
        )
    return found


def last_good_checkpoint(work_dir: Path | str) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint to resume from that opens.

    ``last_checkpoint``, mmengine's note of the newest, is not used: a run that is killed leaves it
    empty or one behind. The newest is the one written last; after a restart from scratch in an old
    folder that is not the one with the largest number.

    Returns:
        The path, ``None`` if there is none, and one sentence for every newer one that was skipped.
    """
    return _first_good(regular_files(work_dir))


def best_checkpoint(work_dir: Path | str) -> Path:
    """Find the checkpoint of the best validation, or the newest if none was validated.

    Of a finished training it is the file that its mark names, whatever the files' times say.

    Raises:
        CheckpointError: There is none, or none that opens, or it is not of the training that the
            folder's marks name.
    """
    named = finished_best(work_dir)
    best, skipped = _first_good(best_files(work_dir) if named is None else [named])
    if best is None and not skipped:
        best, skipped = last_good_checkpoint(work_dir)
        if best is not None:
            logger.warning(
                '%s: no best_*.pth, no validation has run; using %s', work_dir, best.name
            )
    if best is None:
        found = '; '.join(skipped) or 'has no checkpoint (best_*.pth, iter_*.pth or epoch_*.pth)'
        raise CheckpointError(f'{work_dir}: {found}; train first, or give the path of a checkpoint')
    for reason in skipped:
        logger.warning('%s; using %s', reason, best.name)
    _refuse_strangers(best)
    return best


def _refuse_strangers(best: Path) -> None:
    """Refuse a checkpoint, and newer ones that claim to be the best, of another training."""
    claims = best_files(best.parent) if best.name.startswith('best_') else []
    newer = claims[: claims.index(best)] if best in claims else []
    for path in (best, *newer):
        try:
            trained = trained_record(load_checkpoint_file(path))
        except CheckpointError:
            continue  # a torn one, which was said
        refuse_mixed_folder(path, trained)


def _first_good(paths: list[Path]) -> tuple[Path | None, list[str]]:
    """Return the newest file that loads and has weights, and why newer ones were skipped."""
    skipped = []
    for path in newest_first(paths):
        try:
            if 'state_dict' in load_checkpoint_file(path):
                return path, skipped
            skipped.append(f'{path}: has no state_dict')
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def remove_leftovers(work_dir: Path | str) -> list[Path]:
    """Delete unfinished checkpoints of killed runs; call it before a run starts to write.

    Returns:
        What was deleted: files that :func:`cellseg_mm.core.files.atomic_path` had not renamed yet.
    """
    leftovers = sorted(Path(work_dir).glob('.tmp-*.pth'))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers

"""Find a work folder's checkpoints.

In: a folder. Out: the newest or best file that is whole. Invariant: a torn file is passed over
and said.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from cellseg_mm.core.errors import CheckpointError
from cellseg_mm.weights.checkpoints import load_checkpoint_file, logger


def find_checkpoints(work_dirs: Sequence[Path]) -> list[Path]:
    """Return each fold's best checkpoint.

    Raises:
        CheckpointError: Folds have none; names all of them.
    """
    pass

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


REGULAR_NAME = re.compile(r'(?:iter|epoch)_(\d+)\.pth')


def last_good_checkpoint(work_dir: Path | str) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint to resume from that opens.

    ``last_checkpoint``, mmengine's note of the newest, is not used: a run that is killed leaves it
    empty or one behind. The newest is the one written last; after a restart from scratch in an old
    folder that is not the one with the largest number.

    Returns:
        The path, ``None`` if there is none, and one sentence for every newer one that was skipped.
    """
    files = [path for path in Path(work_dir).glob('*_*.pth') if REGULAR_NAME.fullmatch(path.name)]
    return _first_good(files)


def best_checkpoint(work_dir: Path | str) -> Path:
    """Find the checkpoint of the best validation, or the newest if none was validated.

    Raises:
        CheckpointError: There is none, or none that opens.
    """
    best, skipped = _first_good(list(Path(work_dir).glob('best_*.pth')))
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
    return best


def _first_good(paths: list[Path]) -> tuple[Path | None, list[str]]:
    """Return the newest file that loads and has weights, and why newer ones were skipped."""
    skipped = []
    for path in sorted(paths, key=_age, reverse=True):
        try:
            if 'state_dict' in load_checkpoint_file(path):
                return path, skipped
            skipped.append(f'{path}: has no state_dict')
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def _age(path: Path) -> tuple[int, int, str]:
    """Sort by time of writing, then by step number (coarse clocks), then by name."""
    number = re.search(r'(\d+)\.pth$', path.name)
    return path.stat().st_mtime_ns, int(number.group(1)) if number else -1, path.name


def remove_leftovers(work_dir: Path | str) -> list[Path]:
    """Delete unfinished checkpoints of killed runs; call it before a run starts to write.

    Returns:
        What was deleted: files that :func:`cellseg_mm.core.files.atomic_path` had not renamed yet.
    """
    leftovers = sorted(Path(work_dir).glob('.tmp-*.pth'))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers

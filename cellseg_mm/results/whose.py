"""Whose predictions are these? A file in a work folder is of the checkpoint that counts there.

In: a prediction file's path and what stands inside it. Out: why it is another's, or ''. Invariant:
no weights are opened, so that all can ask; a file outside of work folders is taken at its word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cellseg_mm.core.errors import CheckpointError, PredictionError
from cellseg_mm.core.layout import (
    FINISHED,
    PREDICTIONS_SUFFIX,
    SCORES_SUFFIX,
    STARTED,
    augmented_name,
    result_name,
)
from cellseg_mm.core.trainings import differing, hash_in_force, read_mark, say_once


def refuse_foreign(path: Path | str, provenance: Mapping[str, object]) -> None:
    """Refuse predictions that are not of what they seem to be.

    Raises:
        PredictionError: See :func:`why_foreign`.
    """
    if why := why_foreign(path, provenance):
        raise PredictionError(
            f'{path}: {why}; expected predictions of the checkpoint that counts there; test it '
            'again with tools/test.py'
        )


def why_foreign(path: Path | str, provenance: Mapping[str, object]) -> str:
    """Return why a file of predictions or scores is not what its place and name say; '' if it is.

    Compared are the classes with those of its checkpoint, and in a work folder also split,
    augmentation, checkpoint, fold and recipe with the file's name and the folder's marks.
    """
    path = Path(path)
    trained = provenance.get('trained')
    trained = trained if isinstance(trained, Mapping) else {}
    names, its = (_names(said.get('class_names')) for said in (provenance, trained))
    if names and its and names != its:
        return f'calls its classes {", ".join(names)}, its checkpoint has {", ".join(its)}'
    folder = path.parent.parent if path.parent.name.startswith('on_fold') else path.parent
    try:
        known = hash_in_force(folder)
    except CheckpointError as problem:
        return f'lies beside a checkpoint that is not the right one ({problem})'
    marks = [mark for name in (FINISHED, STARTED) if (mark := read_mark(folder / name))]
    if 'members' in provenance or not (marks or known[1]):  # fused, or no work folder
        return ''
    return (
        _why_misnamed(path, provenance)
        or _why_other_weights(path, provenance, *known)
        or next((why for mark in marks if (why := _why_other_training(names, trained, mark))), '')
    )


def _names(value: object) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, (list, tuple)) else ()


def _why_misnamed(path: Path, provenance: Mapping[str, object]) -> str:
    suffix = next((s for s in (PREDICTIONS_SUFFIX, SCORES_SUFFIX) if path.name.endswith(s)), '')
    split, tta = provenance.get('split'), str(provenance.get('tta') or '')
    if not suffix or not split:
        return ''
    own = path.name.removesuffix(suffix)
    wanted = result_name(str(split), tta)
    if own in (wanted, result_name(str(split), augmented_name(tta))):
        return ''
    return f'is of {wanted} by what stands inside, and is called {own}'


def _why_other_weights(
    path: Path, provenance: Mapping[str, object], name: str, hash_now: str
) -> str:
    made_by = provenance.get('checkpoint_hash')
    if not made_by and hash_now:
        say_once(path, 'does not say which checkpoint made it; that is not compared')
    if not made_by or not hash_now or made_by == hash_now:
        return ''
    return f'is of another checkpoint ({made_by}) than {name} ({hash_now}), which is there now'


def _why_other_training(
    names: tuple[str, ...], trained: Mapping[str, object], mark: Mapping[str, object]
) -> str:
    parts, theirs = trained.get('parts'), mark.get('parts')
    if isinstance(parts, Mapping) and isinstance(theirs, Mapping):
        changed = [key for key in differing(parts, theirs) if key != 'train_cfg']
        if changed:
            return f'is of a training with other values of {", ".join(changed)} than the folder has'
    folds = (trained.get('fold'), mark.get('fold'))
    if None not in folds and folds[0] != folds[1]:
        return f'is of a model of fold {folds[0]}, the folder is that of fold {folds[1]}'
    own = _names(mark.get('class_names'))
    if names and own and names != own:
        return f'calls its classes {", ".join(names)}, the folder has {", ".join(own)}'
    return ''

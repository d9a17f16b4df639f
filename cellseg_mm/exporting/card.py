"""What a ``.cellseg`` file tells people: who may use it, how good it is, how it was made.

In: the members and their trainings, out-of-fold scores, and a person's words. Out: the card, JSON
values, which ``light.card`` shows. Invariant: a score is one that the recipe's folds were given on
images that they never saw, by the same folds as the members'; nothing is guessed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.core.layout import (
    OOF,
    OOF_NEW_SCORES,
    SCORES_SUFFIX,
    ensemble_dir,
    scores_path,
    work_dir_of,
)
from cellseg_mm.core.trainings import trained_record
from cellseg_mm.data.config import DataSettings
from cellseg_mm.data.folds import load_folds
from cellseg_mm.data.images import cases_of
from cellseg_mm.detectors.member_models import MemberSource
from cellseg_mm.light.card import SAID, SIZES
from cellseg_mm.light.model_file import ModelRecord
from cellseg_mm.weights.checkpoints import load_checkpoint_file


def read_said(path: Path) -> dict[str, Any]:
    """Read what a person says of a model: a JSON object of some of ``SAID``.

    Raises:
        ConfigError: The file is missing or damaged, a key is none, or a value makes no sense.
    """
    said = _read(path, 'a JSON object, for example {"licence": "CC BY 4.0"}')
    for key, value in said.items():
        if key not in SAID:
            near = difflib.get_close_matches(key, SAID, n=1)
            hint = f' (the nearest is {near[0]})' if near else ''
            raise ConfigError(
                f'{path}: {key} is no part of a card{hint}; expected some of {", ".join(SAID)}; '
                'correct the key'
            )
        if not _makes_sense(key, value):
            kind = SIZES.get(key, 'a text')
            raise ConfigError(f'{path}: {key} is {value!r}; expected {kind}; correct it')
    return said


def _makes_sense(key: str, value: object) -> bool:
    if key not in SIZES:
        return isinstance(value, str) and bool(value)
    if key == 'tile_px':  # half a tile must hold predict's overlap
        return type(value) is int and value >= 256
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def make_card(
    sources: Sequence[MemberSource],
    records: Sequence[ModelRecord],
    *,
    said: Mapping[str, Any],
    scores: Mapping[str, Any] | None,
) -> dict[str, JsonValue]:
    """Return the card of members, in their order in the file.

    Raises:
        ConfigError: The scores are of other classes, folds or data than the members'.
    """
    first = records[0]
    training = [training_of(source) for source in sources]
    if scores is not None:
        for source, one in zip(sources, training, strict=True):
            check_scores(source.config_path, scores, {**one, 'class_names': first.class_names})
    return {
        **said,
        'class_names': list(first.class_names),
        'red_blue_swapped': first.red_blue_swapped,
        'um_per_px': first.um_per_px,
        'half': first.half,
        'scores': None if scores is None else dict(scores),
        'members': [dict(record.member) for record in records],
        'training': training,
        'made_with': dict(first.made_with),
    }


def training_of(source: MemberSource) -> dict[str, Any]:
    """Return how a member was trained, as its checkpoint says; None and '' where it does not."""
    content = load_checkpoint_file(source.checkpoint)
    trained = trained_record(content)
    meta = content.get('meta')
    data = DataSettings.from_config(source.cfg)
    parts = Path(source.config_path).parts
    at = len(parts) - 1 - parts[::-1].index('configs') if 'configs' in parts else len(parts) - 1
    return {
        'config': '/'.join(parts[at:]),
        'iterations': meta.get('iter') if isinstance(meta, dict) else None,
        'seed': trained.get('seed'),
        'split': trained.get('split') or '',
        'n_images': _n_images(data, trained),
        'red_blue_swapped': data.red_blue_swapped,
        'fold_hash': trained.get('fold_hash') or '',
        'data_hash': trained.get('data_hash') or '',
        'commit': trained.get('commit') or '',
    }


def _n_images(data: DataSettings, trained: Mapping[str, Any]) -> int | None:
    """Return how many images a member was trained on; None if the data are others by now."""
    if trained.get('split') == 'all':
        return len(cases_of(data, 'train'))
    fold = trained.get('fold')
    if not isinstance(fold, int) or not data.folds_path.is_file():
        return None
    folds = load_folds(data.folds_path)
    if folds.hash != trained.get('fold_hash'):
        return None
    unseen = {
        name for k in (fold, *trained.get('excluded_folds', ())) for name in folds.val_names(k)
    }
    return len(set(folds.names) - unseen)


def find_scores(
    config_path: str, work_root: str | None, tta: str | None, *, new_scores: bool = False
) -> Path:
    """Return where a recipe's out-of-fold scores with these views lie, if there are any.

    With ``new_scores`` those of ``tools/score_oof.py --new-scores``, where these were made.
    """
    folder = ensemble_dir([work_dir_of(config_path, work_root)])
    anew = scores_path(folder, OOF_NEW_SCORES, tta or '')
    return anew if new_scores and anew.is_file() else scores_path(folder, OOF, tta or '')


def read_scores(path: Path) -> dict[str, Any]:
    """Read what a card says of a file of out-of-fold scores.

    Raises:
        ConfigError: The file is missing or damaged, or of images that models may have seen.
    """
    wanted = 'scores of tools/score_oof.py (oof.scores.json)'
    content = _read(path, wanted)
    provenance = content.get('provenance')
    is_whole = all(content.get(key) for key in ('headline', 'per_image', 'cap', 'class_names'))
    if not is_whole or not isinstance(provenance, dict) or provenance.get('split') != 'oof':
        raise ConfigError(
            f'{path}: these are no scores of images outside the training; expected {wanted}; name '
            'such a file with --scores'
        )
    kept = ('headline', 'interval_unit', 'n_interval_units', 'cap', 'class_names')
    name = path.name.removesuffix(SCORES_SUFFIX)
    is_anew = name.startswith(OOF_NEW_SCORES)
    return {
        **{key: content.get(key) for key in kept},
        'intervals': content.get('intervals') or {},
        'n_images': len(content['per_image']['names']),
        'tta': name.removeprefix(OOF_NEW_SCORES if is_anew else OOF).removeprefix('.'),
        'new_scores': is_anew,
        **{key: provenance.get(key) for key in ('folds', 'fold_hash', 'data_hash', 'code_commit')},
    }


def check_scores(where: str, scores: Mapping[str, Any], member: Mapping[str, Any]) -> None:
    """Refuse scores that were given to other models than the member's recipe and folds."""
    for key, what in (('class_names', 'classes'), ('fold_hash', 'folds'), ('data_hash', 'data')):
        ours, theirs = member[key], scores[key]
        if ours and theirs and list(ours) != list(theirs):
            raise ConfigError(
                f'{where}: the out-of-fold scores are of other {what} ({theirs}) than the model '
                f'({ours}); expected those of its recipe; name them with --scores'
            )


def _read(path: Path, wanted: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as problem:
        raise ConfigError(
            f'{path}: cannot be read ({str(problem)[:80]}); expected {wanted}; correct the path or '
            'the file'
        ) from problem
    if not isinstance(content, dict):
        raise ConfigError(f'{path}: holds no JSON object; expected {wanted}; correct it')
    return content

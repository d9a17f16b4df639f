"""The card of a model: what people should know before they use it.

In: a model's file. Out: markdown, and the sentence that every run says. Invariant: the card rides
in the file, as ``exporting.card`` wrote it; what is not in it is said to be unknown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cellseg_mm.core.errors import CheckpointError
from cellseg_mm.fusion.settings import RESCORING
from cellseg_mm.light.model_file import ModelFile

# What a person says of a model; the rest of a card is measured or recorded.
SIZES = {'um_per_px': 'micrometres above 0', 'tile_px': 'whole px, 256 or more'}
SAID = ('summary', 'authors', 'stain', *SIZES, 'licence', 'data', 'attribution', 'not_for')
HAEMATOXYLIN = 'H&E'  # the stain whose nuclei tell whether red and blue are swapped
NO_DEVICE = 'no medical device: not for diagnosis'
UNKNOWN = 'not said'
MEASURES = {'AP50': 'segm_AP50', 'AP': 'segm_AP', 'PQ': 'mPQ'}  # of all classes
OF_CLASS = {'AP50': 'segm_AP50_{}', 'AP': 'segm_AP_{}', 'PQ': 'PQ_{}'}


def notice(file: ModelFile) -> str:
    """Return the sentence that every prediction says; '' of a file without a card."""
    if not file.card:
        return ''
    data = _text(file.card, 'attribution')
    trained = f', trained on {data}' if data != UNKNOWN else ''
    return (
        f'{file.path.stem}: licence of the weights: {_text(file.card, "licence")}{trained}; '
        f'{NO_DEVICE}; --card shows more'
    )


def describe(file: ModelFile) -> str:
    """Return the card as markdown.

    Raises:
        CheckpointError: The file has no card.
    """
    if not file.card:
        raise CheckpointError(
            f'{file.path}: has no card; expected a .cellseg file; export the model as one'
        )
    card = file.card
    try:
        lines = [f'# {file.path.stem}', '', *_said(card), '', *_scores(card), '', *_made(card)]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as problem:
        raise CheckpointError(
            f'{file.path}: its card is damaged or of older code ({problem!r:.100}); expected that '
            'of tools/export.py; export the model again'
        ) from problem
    return '\n'.join([*lines, *_settings(file)])


def _text(card: Mapping[str, Any], key: str) -> str:
    return str(card.get(key) or UNKNOWN)


def _said(card: Mapping[str, Any]) -> Iterator[str]:
    if card.get('summary'):
        yield from (str(card['summary']), '')
    order = 'red and blue swapped' if card['red_blue_swapped'] else 'RGB in the natural order'
    um = card.get('um_per_px')
    size = f'{um:g} µm a pixel' if um else 'size of a pixel not said'
    if card.get('authors'):
        yield f'- By: {card["authors"]}'
    yield f'- Classes: {", ".join(card["class_names"])}'
    yield f'- Pictures: {order}, {size}, stain {_text(card, "stain")}'
    yield f'- Licence of the weights: {_text(card, "licence")} (the code is Apache-2.0)'
    yield f'- Trained on: {_text(card, "data")}'
    yield f'- To be named: {_text(card, "attribution")}'
    yield f'- What it is not for: it is {NO_DEVICE}. {card.get("not_for") or ""}'.rstrip()


def _scores(card: Mapping[str, Any]) -> Iterator[str]:
    yield from ('## How good', '')
    scores = card.get('scores')
    if scores:
        views = f', views {scores["tta"]}' if scores['tta'] else ''
        if scores.get('new_scores'):
            views += ', scored anew by weights of the other folds'
        yield (
            f'Models of this recipe, each on the images of a fold that it never saw: '
            f'{scores["n_images"]} images, {len(scores["folds"])} folds ({scores["fold_hash"]}), '
            f'at most {scores["cap"]} cells of a class in a picture{views}. In brackets 95 % '
            f'intervals over {scores["n_interval_units"]} {scores["interval_unit"]}.'
        )
        yield ''
        yield from table_of_scores(card['class_names'], scores)
        yield ''
    else:
        yield 'No scores of images outside its training are known.'
    for i, member in enumerate(card['training']):
        yield f'- Model {i}: {_seen(member, card["members"][i])}'


def table_of_scores(class_names: Sequence[str], scores: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a markdown table: a row for each class, then one for all."""
    head, intervals = scores['headline'], scores['intervals']
    yield f'| class | {" | ".join(MEASURES)} |'
    yield f'| --- |{" --- |" * len(MEASURES)}'
    rows = [
        (name, {short: key.format(name) for short, key in OF_CLASS.items()}) for name in class_names
    ]
    for name, keys in [*rows, ('all', MEASURES)]:
        cells = [_score(head.get(key), intervals.get(key)) for key in keys.values()]
        yield f'| {name} | {" | ".join(cells)} |'


def _score(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return '-'
    return f'{value:.3f}' + (f' ({interval[0]:.3f} to {interval[1]:.3f})' if interval else '')


def _seen(training: Mapping[str, Any], member: Mapping[str, Any]) -> str:
    if training['split'] == 'all':
        return 'trained on all images, so that none is left to score it on'
    if member.get('fold') is None:
        return 'nobody wrote down what it was trained on'
    score = member.get('score')
    own = f', AP50 {score:.3f} there' if isinstance(score, float) else ''
    return f'trained without fold {member["fold"]}{own}'


def _made(card: Mapping[str, Any]) -> Iterator[str]:
    yield from ('## How it was made', '')
    for i, one in enumerate(card['training']):
        order = 'with red and blue swapped (put right)' if one['red_blue_swapped'] else 'in RGB'
        folds = 'all' if one['split'] == 'all' else one['fold_hash'] or '?'
        yield (
            f'- Model {i}: {one["config"]}, {one["iterations"] or "?"} iterations, seed '
            f'{one["seed"]}, {one["n_images"] or "?"} images in files {order}, data '
            f'{one["data_hash"] or "?"}, folds {folds}, commit '
            f'{one["commit"] or "?"}; checkpoint {card["members"][i]["source_hash"]}'
        )
    made = card['made_with']
    used = ', '.join(
        f'{name} {made["versions"].get(name) or "-"}' for name in ('torch', 'onnxruntime')
    )
    bits = 16 if card['half'] else 32
    yield f'- Written with commit {made["code_commit"] or "?"}, {used}; weights of {bits} bits'


def _settings(file: ModelFile) -> Iterator[str]:
    chosen = ((file.settings or {}).get('profiles') or {}).get('instances')
    if isinstance(chosen, dict):
        parts = [f'{key} {value}' for key, value in chosen.items() if key != RESCORING]
        if chosen.get(RESCORING):
            parts.append('scores made anew: a score is a probability')
        yield f'- Settings: {", ".join(parts)}'

"""Cards: what people read, and the sentence of every run."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellseg_mm.core.errors import CheckpointError
from cellseg_mm.light.card import describe, notice
from cellseg_mm.light.model_file import ModelFile

CARD = {
    'summary': 'Finds a and b.',
    'licence': 'CC BY-NC-SA 4.0',
    'attribution': 'MoNuSAC 2020',
    'class_names': ['a', 'b'],
    'red_blue_swapped': False,
    'um_per_px': 0.25,
    'half': True,
    'scores': {
        'headline': {'segm_AP50_a': 0.5, 'segm_AP50': 0.75, 'mPQ': 0.4},
        'intervals': {'segm_AP50_a': [0.25, 0.6251]},
        'interval_unit': 'groups',
        'n_interval_units': 7,
        'cap': 500,
        'n_images': 12,
        'tta': 'flips',
        'folds': [0, 1],
        'fold_hash': 'abc',
    },
    'members': [{'fold': 1, 'score': 0.7, 'source_hash': 'x'}, {'fold': None, 'source_hash': 'y'}],
    'training': [
        {
            'config': 'configs/fold1.py',
            'iterations': 400,
            'seed': 3,
            'split': split,
            'n_images': 9,
            'red_blue_swapped': True,
            'fold_hash': 'abc',
            'data_hash': 'd',
            'commit': '',
        }
        for split in ('train', 'all')
    ],
    'made_with': {'code_commit': 'c0ffee', 'versions': {'torch': '2.13'}},
}


def file_with(card: dict, settings: dict | None = None) -> ModelFile:
    return ModelFile(Path('box/he4.cellseg'), (), settings, card)


def test_what_people_read() -> None:
    profile = {'score_thr': {'a': 0.2}, 'tta': 'flips'}
    text = describe(file_with(CARD, {'profiles': {'instances': profile}}))
    assert text.startswith('# he4\n\nFinds a and b.\n')
    for part in (
        '- Pictures: RGB in the natural order, 0.25 µm a pixel, stain not said',
        '- Licence of the weights: CC BY-NC-SA 4.0 (the code is Apache-2.0)',
        '- Trained on: not said',
        'no medical device',
        '12 images, 2 folds (abc), at most 500 cells of a class in a picture, views flips',
        'intervals over 7 groups',
        '| class | AP50 | AP | PQ |\n| --- | --- | --- | --- |\n| a | 0.500 (0.250 to 0.625) |',
        '| all | 0.750 | - | 0.400 |',
        '- Model 0: trained without fold 1, AP50 0.700 there',
        '- Model 1: trained on all images, so that none is left to score it on',
        'configs/fold1.py, 400 iterations, seed 3, 9 images in files with red and blue swapped',
        'commit ?; checkpoint x',
        "- Settings: score_thr {'a': 0.2}, tta flips",
    ):
        assert part in text


def test_new_scores_are_said_without_their_numbers() -> None:
    scores = {**CARD['scores'], 'new_scores': True}
    profile = {'tta': 'flips', 'rescoring': {'features': ['logit']}}
    text = describe(file_with({**CARD, 'scores': scores}, {'profiles': {'instances': profile}}))
    assert 'views flips, scored anew by weights of the other folds. In brackets' in text
    assert '- Settings: tta flips, scores made anew: a score is a probability' in text
    assert 'logit' not in text


def test_without_scores() -> None:
    text = describe(file_with({**CARD, 'scores': None, 'um_per_px': None}))
    assert 'No scores of images outside its training are known.' in text
    assert 'size of a pixel not said' in text
    assert '| class |' not in text


def test_the_sentence_of_every_run() -> None:
    said = notice(file_with(CARD))
    assert said.startswith('he4: licence of the weights: CC BY-NC-SA 4.0, trained on MoNuSAC 2020;')
    assert 'licence of the weights: not said; no medical' in notice(file_with({'class_names': []}))
    assert notice(file_with({})) == ''


@pytest.mark.parametrize('lost', ['members', 'training', 'made_with', 'class_names'])
def test_cards_that_are_none(lost: str) -> None:
    with pytest.raises(CheckpointError, match='its card is damaged or of older code'):
        describe(file_with({key: value for key, value in CARD.items() if key != lost}))
    with pytest.raises(CheckpointError, match='has no card'):
        describe(file_with({}))

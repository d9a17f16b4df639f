"""What is measured and said of a model comes into its card, and nothing that does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip('torch')
pytest.importorskip('mmdet')

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.exporting.card import check_scores, find_scores, read_said, read_scores

pytestmark = pytest.mark.mm

SCORES = {
    'headline': {'segm_AP50': 0.7, 'bbox_AP': 0.4},
    'intervals': {'segm_AP50': [0.6, 0.8]},
    'interval_unit': 'groups',
    'n_interval_units': 7,
    'cap': 500,
    'class_names': ['a', 'b'],
    'per_image': {'names': ['x', 'y', 'z']},
    'provenance': {'split': 'oof', 'folds': [0, 1], 'fold_hash': 'f', 'data_hash': 'd'},
}


def written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_scores_are_those_of_images_outside_the_training(tmp_path: Path) -> None:
    found = read_scores(written(tmp_path / 'oof.flips.scores.json', SCORES))
    assert (found['tta'], found['n_images'], found['folds']) == ('flips', 3, [0, 1])
    assert found['headline']['segm_AP50'] == 0.7
    assert read_scores(written(tmp_path / 'oof.scores.json', SCORES))['tta'] == ''
    seen = {**SCORES, 'provenance': {**SCORES['provenance'], 'split': 'train'}}
    for content in (seen, {}):
        path = written(tmp_path / 'a.json', content)
        with pytest.raises(ConfigError, match='no scores of images outside the training'):
            read_scores(path)
    for text in ('[]', '{', ''):
        (tmp_path / 'c.json').write_text(text)
        with pytest.raises(ConfigError, match=r'expected scores of tools/score_oof\.py'):
            read_scores(tmp_path / 'c.json')


def test_new_scores_are_taken_where_they_are_used_and_known(tmp_path: Path) -> None:
    folder = tmp_path / 'laptop' / 'ensemble'
    folder.mkdir(parents=True)
    plain = folder / 'oof.flips.scores.json'
    assert find_scores('configs/laptop/fold0.py', str(tmp_path), 'flips', new_scores=True) == plain
    anew = written(folder / 'oof.new_scores.flips.scores.json', SCORES)
    assert find_scores('configs/laptop/fold0.py', str(tmp_path), 'flips', new_scores=True) == anew
    assert find_scores('configs/laptop/fold0.py', str(tmp_path), 'flips') == plain
    found = read_scores(anew)
    assert (found['tta'], found['new_scores']) == ('flips', True)
    assert not read_scores(written(plain, SCORES))['new_scores']


def test_scores_lie_beside_the_work_folders() -> None:
    for config in ('configs/laptop/fold0.py', 'configs/laptop/all.py'):
        path = find_scores(config, 'runs', 'flips')
        assert path == Path('runs/laptop/ensemble/oof.flips.scores.json')


@pytest.mark.parametrize(
    ('changes', 'what'),
    [
        ({'class_names': ['a', 'c']}, 'other classes'),
        ({'fold_hash': 'g'}, 'other folds'),
        ({'data_hash': 'e'}, 'other data'),
    ],
)
def test_scores_of_another_model(changes: dict, what: str) -> None:
    scores = {'class_names': ['a', 'b'], 'fold_hash': 'f', 'data_hash': 'd'}
    member = {'class_names': ('a', 'b'), 'fold_hash': 'f', 'data_hash': ''}
    check_scores('x.py', scores, member)
    with pytest.raises(ConfigError, match=what):
        check_scores('x.py', scores, {**member, **changes})


@pytest.mark.parametrize(
    ('said', 'part'),
    [
        ({'license': 'CC0'}, 'license is no part of a card (the nearest is licence)'),
        ({'um_per_px': 'small'}, 'expected micrometres above 0'),
        ({'um_per_px': True}, 'expected micrometres above 0'),
        ({'tile_px': 512.0}, 'expected whole px, 256 or more'),
        ({'tile_px': 255}, 'expected whole px, 256 or more'),
        ({'licence': 3}, 'licence is 3; expected a text'),
        ([], 'holds no JSON object'),
    ],
)
def test_what_a_person_says(tmp_path: Path, said: object, part: str) -> None:
    fine = {'licence': 'CC0', 'um_per_px': 0.5, 'tile_px': 512}
    assert read_said(written(tmp_path / 'card.json', fine)) == fine
    with pytest.raises(ConfigError) as caught:
        read_said(written(tmp_path / 'card.json', said))
    assert part in str(caught.value)

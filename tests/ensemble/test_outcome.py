"""What an ensemble leaves: exports for people, a submission for AP, and what is said of them."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data.drawing.sample import make_sample
from cellseg_mm.data.images import Images, find_images
from cellseg_mm.ensemble.fuse_files import ensemble_files
from cellseg_mm.ensemble.outcome import Exports, finish, outcome_text
from cellseg_mm.fusion.settings import (
    InferenceSettings,
    default_settings,
    settings_for_people,
)
from cellseg_mm.results.formats import Look
from cellseg_mm.results.predictions import Predictions, save_predictions

CLASSES = ('epithelial', 'lymphocyte', 'neutrophil', 'macrophage')
LOOK = Look(class_names=CLASSES, class_colours=((9, 9, 9),) * 4)


@pytest.fixture(scope='module')
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    root = make_sample(tmp_path_factory.mktemp('sample') / 'data', n_train=2, n_test=2)
    return find_images(root, 'test', CLASSES, folds_path=root / 'folds.json')


@pytest.fixture
def file(images: Images, tmp_path: Path) -> Path:
    """Per image: a cell, its double a pixel aside, one that shares a corner, one of score 0.3."""
    sets = []
    for case in images.cases:
        made = InstanceSet.from_crops(
            case.name,
            case.image_id,
            case.image_hw,
            crops=[np.ones((10, 8), dtype=bool)] * 4,
            offsets_yx=np.array([[5, 5], [6, 5], [13, 11], [40, 40]]),
            class_ids=np.array([0, 0, 1, 2]),
            scores=np.array([0.9, 0.8, 0.7, 0.3]),
        )
        sets.append(made)
    save_predictions(tmp_path / 'a.npz', Predictions(tuple(sets), {}))
    return tmp_path / 'a.npz'


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline='', encoding='utf-8') as stream:
        return list(csv.DictReader(stream))


def test_people_see_each_cell_once_and_ap_keeps_all(images: Images, file: Path) -> None:
    merged = ensemble_files([file], images, default_settings('submission', CLASSES), file.parent)
    exports = Exports(
        formats=('csv', 'coco'), n_overlays=1, settings=settings_for_people(CLASSES), look=LOOK
    )
    outcome = finish(merged, images, file.parent, exports)
    assert outcome.exported is not None
    assert outcome.exported.n_files == 2 * 2 + 1
    for case in images.cases:
        assert len(table(outcome.exported.folder / f'{case.name}.cells.csv')) == 2
        cells = json.loads((outcome.exported.folder / f'{case.name}.coco.json').read_text())
        assert len(cells) == 2
    assert outcome.submitted is not None
    assert outcome.submitted.n_instances == 4 * 2
    text = outcome_text(outcome)
    assert f'exports: 5 files in {outcome.exported.folder} (score_thr=0.5,disjoint=true)' in text
    assert '2 images: 8 instances in, 8 out' in text
    assert f'submission: {outcome.submitted.path} (8 instances)' in text


def test_the_least_score_can_be_chosen_and_the_file_has_its_own(
    images: Images, file: Path, tmp_path: Path
) -> None:
    found = replace(
        default_settings('instances', CLASSES),
        score_thr=(0.95, 0.1, 0.1, 0.1),
        mask_thr=0.4,
        fusion='nms',
    )
    profiles = {'instances': found.to_json(), 'submission': found.to_json()}
    content = {'version': 1, 'class_names': list(CLASSES), 'profiles': profiles}
    (tmp_path / 'inference.json').write_text(json.dumps(content))
    own = settings_for_people(CLASSES, path=tmp_path / 'inference.json')
    assert (own.score_thr, own.disjoint, own.mask_cut) == ((0.95, 0.1, 0.1, 0.1), True, None)
    merged = ensemble_files([file], images, InferenceSettings(), tmp_path)
    shown = {}
    for key, settings in {
        'own': own,
        'all': settings_for_people(CLASSES, score_thr=0.0),
        'best': settings_for_people(CLASSES, path=tmp_path / 'inference.json', score_thr=0.85),
    }.items():
        exports = Exports(formats=('csv',), settings=settings, look=LOOK)
        exported = finish(merged, images, tmp_path / key, exports).exported
        assert exported is not None
        rows = table(exported.folder / f'{images.cases[0].name}.cells.csv')
        shown[key] = [row['class'] for row in rows]
    assert shown == {
        'own': ['lymphocyte', 'neutrophil'],
        'all': ['epithelial', 'lymphocyte', 'neutrophil'],
        'best': ['epithelial'],
    }


def test_nothing_is_exported_unasked_and_wrong_words_are_refused(
    images: Images, file: Path
) -> None:
    merged = ensemble_files([file], images, InferenceSettings(), file.parent)
    assert finish(merged, images, file.parent).exported is None
    assert not (file.parent / 'exports').exists()
    with pytest.raises(ConfigError, match=r'found qupath; expected some of .*geojson'):
        Exports(formats=('qupath',), settings=InferenceSettings(), look=LOOK)
    with pytest.raises(ConfigError, match=r'score_thr has 2'):
        settings_for_people(CLASSES, score_thr=2.0)

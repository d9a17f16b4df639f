"""selection.find_best: settings that are written load again, and hold for these classes alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cellseg_mm.core.errors import ConfigError, PredictionError
from cellseg_mm.core.instances import InstanceSet, concatenate
from cellseg_mm.data.config import CLASS_NAMES
from cellseg_mm.data.drawing.sample import make_sample
from cellseg_mm.data.folds import load_folds, make_folds, save_folds
from cellseg_mm.data.labels import find_cases, read_gt
from cellseg_mm.fusion import settings as fusion_settings
from cellseg_mm.fusion.settings import DEFAULT_FUSION
from cellseg_mm.results.predictions import Predictions, load_predictions, save_predictions
from cellseg_mm.selection.find_best import Inputs, describe, find_best, read_samples


@pytest.fixture(scope='module')
def tested_folds(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Three folds of drawn images with their 'tested' predictions: the truth and displaced junk."""
    root = tmp_path_factory.mktemp('find_best')
    make_sample(root / 'data', n_train=6, n_test=2)
    cases = find_cases(root / 'data', 'train', len(CLASS_NAMES))
    gts = {case.name: read_gt(case) for case in cases}
    counts = [np.bincount(gt.class_ids, minlength=len(CLASS_NAMES)) for gt in gts.values()]
    folds = make_folds(list(gts), np.array(counts), n_folds=3)
    save_folds(root / 'folds.json', folds)
    rng = np.random.default_rng(0)

    def predict(name: str) -> InstanceSet:
        gt = gts[name]
        crops, offsets = gt.crops()
        shifted = np.maximum(offsets - 4, 0)
        junk = InstanceSet.from_crops(
            gt.name, gt.image_id, gt.image_hw, crops=crops, offsets_yx=shifted,
            class_ids=gt.class_ids, scores=0.5 + 0.1 * rng.random(len(gt)),
        )  # fmt: skip
        return concatenate([replace(gt, scores=0.9 + 0.1 * rng.random(len(gt))), junk])

    work_dirs = []
    for fold in range(3):
        work_dirs.append(root / f'fold{fold}')
        common = {'class_names': list(CLASS_NAMES), 'fold_hash': folds.hash, 'split': 'val'}
        save_predictions(
            work_dirs[-1] / 'val.predictions.npz',
            Predictions([predict(n) for n in folds.val_names(fold)], {**common, 'fold': fold}),
        )
    return Inputs(
        configs=tuple(f'configs/fold{k}.py' for k in range(3)),
        work_dirs=tuple(work_dirs),
        data_root=root / 'data',
        folds_path=root / 'folds.json',
        class_names=CLASS_NAMES,
    )


def test_find_best_writes_settings_that_load(tested_folds: Inputs, tmp_path: Path) -> None:
    found = find_best(tested_folds, tmp_path, commands=['use it'])
    text = describe(found)
    assert found.path == tmp_path / 'inference.json'
    record = json.loads((tmp_path / 'inference.json').read_text())
    evidence = record['evidence']['instances']
    assert evidence['nested_gain'] > 0
    assert evidence['used']
    settings = fusion_settings.load_settings(tmp_path / 'inference.json', 'instances', CLASS_NAMES)
    assert all(0.55 <= thr <= 0.9 for thr in settings.score_thr)
    low = fusion_settings.load_settings(tmp_path / 'inference.json', 'submission', CLASS_NAMES)
    assert set(low.score_thr) == {0.0}
    assert 'one clean member' in record['notes']['fusion']
    assert 'mask_thr' in record['notes']
    assert 'honest gain' in text
    again = find_best(tested_folds, tmp_path / 'again')
    assert describe(again) == text
    assert again.settings == found.settings
    assert (
        record['evidence']
        == json.loads((tmp_path / 'again/inference.json').read_text())['evidence']
    )


@pytest.mark.parametrize(
    ('more', 'says'),
    [
        pytest.param({}, '', id='comparable'),
        pytest.param({'checkpoint_hash': 'old'}, 'fold 1 was tested with checkpoint old', id='old'),
        pytest.param({'tta': 'd4'}, r'different ways \(d4; flips\)', id='other views'),
    ],
)
def test_augmentation_is_compared_on_the_same_models(
    tested_folds: Inputs, tmp_path: Path, more: dict, says: str
) -> None:
    work_dirs = []
    for fold, source in enumerate(tested_folds.work_dirs):
        found = load_predictions(source / 'val.predictions.npz')
        plain = {**found.provenance, 'checkpoint_hash': f'c{fold}'}
        augmented = {**plain, 'tta': 'flips', **(more if fold == 1 else {})}
        work_dirs.append(tmp_path / f'fold{fold}')
        for name, origin in (('val', plain), ('val.flips', augmented)):
            path = work_dirs[-1] / f'{name}.predictions.npz'
            save_predictions(path, Predictions(found.sets, origin))
    inputs = replace(tested_folds, work_dirs=tuple(work_dirs))
    samples, notes = read_samples(inputs, load_folds(inputs.folds_path))
    assert (('flips', DEFAULT_FUSION) in samples.views) == (not says)
    assert re.search(says, notes.get('tta flips', ''))
    assert ('tta flips' in notes) == bool(says)


def test_thresholds_are_never_given_to_other_classes(tested_folds: Inputs) -> None:
    inputs = replace(tested_folds, class_names=tuple(reversed(CLASS_NAMES)))
    with pytest.raises(PredictionError, match='scores and thresholds are per class'):
        read_samples(inputs, load_folds(inputs.folds_path))


def test_fusion_is_chosen_where_members_share_a_fold(tested_folds: Inputs, tmp_path: Path) -> None:
    # Members agree on the truth; each has false alarms of its own with higher scores. Only a rule
    # that counts votes ranks the truth first.
    folds = load_folds(tested_folds.folds_path)
    folds_dirs = []
    rng = np.random.default_rng(1)
    cases = {c.name: c for c in find_cases(tested_folds.data_root, 'train', len(CLASS_NAMES))}
    for k, work_dir in enumerate(tested_folds.work_dirs):
        folds_dirs.append(tmp_path / f'fold{k}')
        (tmp_path / f'fold{k}').mkdir()
        source = work_dir / 'val.predictions.npz'
        (folds_dirs[-1] / 'val.predictions.npz').write_bytes(source.read_bytes())
        sets = []
        for name in folds.val_names(2):
            gt = read_gt(cases[name])
            n = 20
            alarms = InstanceSet.from_crops(
                gt.name, gt.image_id, gt.image_hw,
                crops=[np.ones((9, 9), bool)] * n,
                offsets_yx=np.stack([rng.integers(0, size - 9, n) for size in gt.image_hw], 1),
                class_ids=rng.integers(0, len(CLASS_NAMES), n),
                scores=0.8 + 0.2 * rng.random(n),
            )  # fmt: skip
            sets.append(concatenate([replace(gt, scores=np.full(len(gt), 0.7 - k / 100)), alarms]))
        trained = {'fold': k, 'fold_hash': folds.hash, 'excluded_folds': [2]}
        common = {'class_names': list(CLASS_NAMES), 'fold_hash': folds.hash, 'split': 'val'}
        save_predictions(
            folds_dirs[-1] / 'on_fold2/val.predictions.npz',
            Predictions(sets, {**common, 'fold': 2, 'trained': trained}),
        )
    inputs = replace(tested_folds, work_dirs=tuple(folds_dirs))
    find_best(inputs, tmp_path)
    record = json.loads((tmp_path / 'inference.json').read_text())
    assert record['profiles']['submission']['fusion'] in ('soft_mask', 'wbf')
    # The default counts votes already: nothing is gained over it, and ties go to it.
    assert record['fusion_evidence']['submission']['nested_gain'] == 0.0
    assert 'no member saw' in record['notes']['fusion']


def test_a_cap_is_recorded_and_one_below_1_is_refused(tested_folds: Inputs, tmp_path: Path) -> None:
    found = find_best(tested_folds, tmp_path, cap=2)
    evidence = json.loads(found.path.read_text())['evidence']
    assert evidence['submission']['objective'] == 'segm_AP50 at cap 2'
    assert evidence['instances']['objective'] == 'mPQ'
    with pytest.raises(ConfigError, match='--cap: 0'):
        find_best(tested_folds, tmp_path, cap=0)

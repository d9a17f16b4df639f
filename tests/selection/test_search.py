"""Settings are chosen out of fold, and the reported gain took no part in the choice."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cellseg_mm.core.errors import PredictionError
from cellseg_mm.core.instances import InstanceSet, concatenate
from cellseg_mm.data.config import CLASS_NAMES
from cellseg_mm.data.drawing.sample import make_sample
from cellseg_mm.data.folds import load_folds, make_folds, save_folds
from cellseg_mm.data.labels import find_cases, read_gt
from cellseg_mm.fusion import settings as selection
from cellseg_mm.fusion.settings import DEFAULT_FUSION
from cellseg_mm.results.predictions import Predictions, load_predictions, save_predictions
from cellseg_mm.scores.records import ScoreParams
from cellseg_mm.scores.score import score
from cellseg_mm.selection import search as selection_search
from cellseg_mm.selection.find_best import Inputs, describe, find_best, read_samples
from cellseg_mm.selection.objectives import Ap50, Mpq, Samples

HW = (47, 61)
CLASSES = ('a', 'b', 'c')
PLAIN = (None, DEFAULT_FUSION)
QUICK = ScoreParams(n_bootstrap=0, pq_score_thr=0.0, min_left_px=0)


def random_set(
    rng: np.random.Generator, image_id: int, n: int, *, is_gt: bool = False
) -> InstanceSet:
    """Overlapping blobs; scores in tenths, so that ties occur; some masks one pixel, some holed."""
    crops, offsets = [], []
    for _ in range(n):
        h, w = rng.integers(1, 14, size=2)
        crop = rng.random((h, w)) < 0.85
        crop[rng.integers(h), rng.integers(w)] = True
        crops.append(crop)
        offsets.append((rng.integers(0, HW[0] - h + 1), rng.integers(0, HW[1] - w + 1)))
    # the third class never occurs in the ground truth
    class_ids = rng.integers(0, 2 if is_gt else 3, size=n)
    scores = np.ones(n) if is_gt else rng.integers(0, 11, size=n) / 10
    return InstanceSet.from_crops(
        f'image{image_id}',
        image_id,
        HW,
        crops=crops,
        offsets_yx=np.array(offsets).reshape(-1, 2),
        class_ids=class_ids,
        scores=scores.astype(np.float32),
    )


def near(rng: np.random.Generator, gt: InstanceSet, extra: InstanceSet) -> InstanceSet:
    """Predictions: the ground truth shifted by up to a pixel, some twice, and false alarms."""
    crops, offsets = gt.crops()
    picked = rng.integers(0, len(gt), size=len(gt) + 3) if len(gt) else np.empty(0, np.int64)
    moved = np.clip(
        offsets[picked] + rng.integers(-1, 2, size=(len(picked), 2)),
        0,
        np.array([np.array(HW) - crops[i].shape for i in picked]).reshape(-1, 2),
    )
    shifted = InstanceSet.from_crops(
        gt.name,
        gt.image_id,
        HW,
        crops=[crops[i] for i in picked],
        offsets_yx=moved,
        class_ids=np.where(rng.random(len(picked)) < 0.8, gt.class_ids[picked], 2),
        scores=(rng.integers(0, 11, size=len(picked)) / 10).astype(np.float32),
    )
    return concatenate([shifted, extra])


def random_samples(seed: int, n_images: int = 6, n_folds: int = 3) -> Samples:
    rng = np.random.default_rng(seed)
    gts = [random_set(rng, i, int(rng.integers(3, 12)), is_gt=True) for i in range(n_images)]
    preds = [near(rng, gt, random_set(rng, gt.image_id, int(rng.integers(0, 9)))) for gt in gts]
    return Samples(tuple(gts), {PLAIN: tuple(preds)}, np.arange(n_images) % n_folds, CLASSES)


def junk_below(score_of_junk: float, *, n_images: int = 9, seed: int = 0):
    """Ground truth found with score 0.8 and displaced copies with another score."""
    rng = np.random.default_rng(seed)
    gts, preds = [], []
    for i in range(n_images):
        offsets = np.array([(y, x) for y in (2, 18, 34) for x in (2, 18, 34)])[: 5 + i % 4]
        n = len(offsets)
        cells = {
            'crops': [np.ones((8, 8), bool)] * n,
            'class_ids': np.arange(n) % 2,
            'scores': np.full(n, 0.8),
        }
        gt = InstanceSet.from_crops(f'image{i}', i, HW, offsets_yx=offsets, **cells)
        junk = {**cells, 'scores': score_of_junk + rng.random(n) * 0.05}
        gts.append(gt)
        preds.append(
            concatenate(
                [gt, InstanceSet.from_crops(f'image{i}', i, HW, offsets_yx=offsets + 5, **junk)]
            )
        )
    return Samples(tuple(gts), {PLAIN: tuple(preds)}, np.arange(n_images) % 3, ('a', 'b'))


def chosen_for(profile: str, samples: Samples) -> selection_search.Choice:
    objective, steps = {
        'submission': (Ap50, selection_search.AP_STEPS),
        'instances': (Mpq, selection_search.PQ_STEPS),
    }[profile]
    start = selection.default_settings(profile, samples.class_names)
    return selection_search.Search(objective(samples), steps).choose(start)


@pytest.mark.parametrize('seed', range(5))
def test_values_are_those_of_apply_settings_and_score(seed: int) -> None:
    samples = random_samples(seed)
    everything = np.ones((1, 6), dtype=np.int64)
    some = np.array([[1, 0, 1, 1, 0, 1]])
    for profile, objective, name in (
        ('submission', Ap50(samples), 'segm_AP50'),
        ('instances', Mpq(samples), 'mPQ'),
    ):
        settings = replace(
            selection.default_settings(profile, CLASSES),
            min_area_px=20,
            **({'score_thr': (0.3, 0.6, 0.5)} if profile == 'instances' else {}),
        )
        done = [selection.apply_settings(s, settings) for s in samples.views[PLAIN]]
        for weights in (everything, some):
            picked = np.flatnonzero(weights[0])
            wanted = score(
                [samples.gt_sets[i] for i in picked], [done[i] for i in picked], CLASSES, QUICK
            ).headline()[name]
            got = objective.measure(settings).values(weights)[0]
            assert got == pytest.approx(wanted, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize('seed', range(5))
def test_images_with_different_settings_pool_like_their_predictions(seed: int) -> None:
    samples = random_samples(seed)
    part_of = np.array([0, 1, 1, 0, 2, 1])
    for profile, objective, name in (
        ('submission', Ap50(samples), 'segm_AP50'),
        ('instances', Mpq(samples), 'mPQ'),
    ):
        start = selection.default_settings(profile, CLASSES)
        settings = [start, replace(start, min_area_px=30), replace(start, min_area_px=80)]
        mixed = objective.mixed([objective.measure(s) for s in settings], part_of)
        done = [
            selection.apply_settings(samples.views[PLAIN][i], settings[part])
            for i, part in enumerate(part_of)
        ]
        wanted = score(samples.gt_sets, done, CLASSES, QUICK).headline()[name]
        assert mixed.values(np.ones((1, 6)))[0] == pytest.approx(wanted, rel=1e-9)


def test_a_threshold_that_helps_everywhere_is_kept() -> None:
    choice = chosen_for('instances', junk_below(0.55))
    assert choice.settings.score_thr == (0.6, 0.6)  # the nearest that drops all scores up to 0.6
    assert choice.nested_gain == pytest.approx(1 - choice.default)
    assert choice.interval[0] <= choice.nested_gain <= choice.interval[1]
    assert choice.interval[0] > 0


def test_what_the_default_already_does_is_not_changed() -> None:
    samples = junk_below(0.2)
    for profile in ('instances', 'submission'):
        choice = chosen_for(profile, samples)
        start = selection.default_settings(profile, samples.class_names)
        assert choice.settings == choice.found == start
        assert choice.nested_gain == 0
        assert choice.default == choice.naive == pytest.approx(1)


def test_folds_that_disagree_keep_the_default() -> None:
    # In one fold the cells score 0.52 and nothing is wrong; in the other the junk scores 0.55 to
    # 0.6. What drops the junk drops those cells, so a choice without the first fold fails on it.
    samples = junk_below(0.55, n_images=8)
    views = list(samples.views[PLAIN])
    for i in range(4):
        views[i] = replace(samples.gt_sets[i], scores=np.full(len(samples.gt_sets[i]), 0.52))
    samples = replace(samples, views={PLAIN: tuple(views)}, fold_of=np.arange(8) // 4)
    choice = chosen_for('instances', samples)
    start = selection.default_settings('instances', samples.class_names)
    assert choice.by_fold[0][1] < -0.9
    assert choice.by_fold[1][1] == 0
    assert choice.nested_gain < 0
    assert choice.settings == start


@pytest.mark.parametrize('profile', ['submission', 'instances'])
@pytest.mark.parametrize('seed', range(3))
def test_a_folds_images_take_no_part_in_its_settings(seed: int, profile: str) -> None:
    samples = random_samples(seed, n_images=9)
    other = random_samples(seed + 100, n_images=9)
    swapped = replace(
        samples,
        gt_sets=tuple(
            replace(b, name=a.name) if f == 1 else a
            for a, b, f in zip(samples.gt_sets, other.gt_sets, samples.fold_of, strict=True)
        ),
    )
    before, after = chosen_for(profile, samples), chosen_for(profile, swapped)
    assert before.by_fold[1][0] == after.by_fold[1][0]
    assert before.default != after.default


def test_resampling_draws_the_images_of_a_group_together() -> None:
    samples = random_samples(4, n_images=9)
    alone = chosen_for('instances', samples)
    assert alone.interval_unit == 'images'
    own = {gt.name: f'group of {gt.name}' for gt in samples.gt_sets}
    assert chosen_for('instances', replace(samples, groups=own)).interval == alone.interval
    pairs = {gt.name: str(gt.image_id % 3) for gt in samples.gt_sets}  # one per fold
    grouped = replace(samples, groups=pairs)
    assert grouped.interval_unit == 'groups'
    search = selection_search.Search(Mpq(grouped), {})
    drawn = search._drawn((0, 2), 40)
    assert (drawn[:, grouped.fold_of == 1] == 0).all()
    for fold in (0, 2):
        weights = drawn[:, grouped.fold_of == fold]
        assert (weights == weights[:, :1]).all()
    assert set(drawn[:, 0].tolist()) == {0, 1, 2}
    assert (drawn.sum(axis=1) == 6).all()


def test_one_fold_chooses_nothing() -> None:
    samples = replace(junk_below(0.55), fold_of=np.zeros(9))
    choice = chosen_for('instances', samples)
    assert choice.settings == selection.default_settings('instances', samples.class_names)
    assert np.isnan(choice.nested_gain)


def test_better_augmentation_and_mask_threshold_are_found() -> None:
    samples = junk_below(0.2)
    gts = samples.gt_sets
    # Plain predictions are shifted by half a cell; the augmented ones are right at a mask
    # threshold of 0.4 and nothing at 0.5.
    moved = []
    for gt in gts:
        crops, offsets = gt.crops()
        moved.append(
            InstanceSet.from_crops(
                gt.name, gt.image_id, HW, crops=crops, offsets_yx=offsets + 3,
                class_ids=gt.class_ids, scores=gt.scores,
            )
        )  # fmt: skip
    probs = [np.full((len(gt), 4, 4), 0.42, dtype=np.float16) for gt in gts]
    faint = [
        replace(m, boxes_xyxy=gt.boxes_xyxy, extra={'mask_probs': p})
        for m, gt, p in zip(moved, gts, probs, strict=True)
    ]
    exact = tuple(
        replace(gt, extra={'mask_probs': (p > 0).astype(np.float16)})
        for gt, p in zip(gts, probs, strict=True)
    )
    views = {PLAIN: tuple(moved), ('flips', DEFAULT_FUSION): exact}
    for profile in ('submission', 'instances'):
        assert chosen_for(profile, replace(samples, views=views)).settings.tta == 'flips'
        choice = chosen_for(profile, replace(samples, views={PLAIN: tuple(faint)}))
        assert choice.settings.mask_thr < 0.42
        assert choice.nested_gain > 0.5


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
    settings = selection.load_settings(tmp_path / 'inference.json', 'instances', CLASS_NAMES)
    assert all(0.55 <= thr <= 0.9 for thr in settings.score_thr)
    low = selection.load_settings(tmp_path / 'inference.json', 'submission', CLASS_NAMES)
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
    with pytest.raises(PredictionError, match='thresholds are per class'):
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

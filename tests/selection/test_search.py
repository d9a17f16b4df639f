"""selection.search: settings are chosen out of fold; the gain took no part in the choice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cellseg_mm.core.instances import InstanceSet, concatenate
from cellseg_mm.fusion import settings as fusion_settings
from cellseg_mm.fusion.settings import DEFAULT_FUSION
from cellseg_mm.scores.score import score
from cellseg_mm.selection import search as search_module
from cellseg_mm.selection.objectives import Ap50, Mpq, Samples
from tests.support.random_samples import CLASSES, HW, PLAIN, QUICK, random_samples


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


def chosen_for(profile: str, samples: Samples) -> search_module.SettingsChoice:
    objective, steps = {
        'submission': (Ap50, search_module.AP_STEPS),
        'instances': (Mpq, search_module.PQ_STEPS),
    }[profile]
    start = fusion_settings.default_settings(profile, samples.class_names)
    return search_module.Search(objective(samples), steps).choose(start)


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
            fusion_settings.default_settings(profile, CLASSES),
            min_area_px=20,
            **({'score_thr': (0.3, 0.6, 0.5)} if profile == 'instances' else {}),
        )
        done = [fusion_settings.apply_settings(s, settings) for s in samples.views[PLAIN]]
        for weights in (everything, some):
            picked = np.flatnonzero(weights[0])
            wanted = score(
                [samples.gt_sets[i] for i in picked], [done[i] for i in picked], CLASSES, QUICK
            ).headline()[name]
            got = objective.measure(settings).values(weights)[0]
            assert got == pytest.approx(wanted, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize('cap', [1, 3])
def test_a_board_with_a_small_cap_is_counted_as_score_counts_it(cap: int) -> None:
    samples = random_samples(2)
    start = fusion_settings.default_settings('submission', CLASSES)
    wanted = score(
        samples.gt_sets, samples.sets(start), CLASSES, replace(QUICK, cap=cap)
    ).headline()['segm_AP50']
    got = Ap50(samples, cap).measure(start).values(np.ones((1, 6), dtype=np.int64))[0]
    assert got == pytest.approx(wanted, rel=1e-9)
    assert got < Ap50(samples).measure(start).values(np.ones((1, 6), dtype=np.int64))[0]


@pytest.mark.parametrize('seed', range(5))
def test_images_with_different_settings_pool_like_their_predictions(seed: int) -> None:
    samples = random_samples(seed)
    part_of = np.array([0, 1, 1, 0, 2, 1])
    for profile, objective, name in (
        ('submission', Ap50(samples), 'segm_AP50'),
        ('instances', Mpq(samples), 'mPQ'),
    ):
        start = fusion_settings.default_settings(profile, CLASSES)
        settings = [start, replace(start, min_area_px=30), replace(start, min_area_px=80)]
        mixed = objective.mixed([objective.measure(s) for s in settings], part_of)
        done = [
            fusion_settings.apply_settings(samples.views[PLAIN][i], settings[part])
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
        start = fusion_settings.default_settings(profile, samples.class_names)
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
    start = fusion_settings.default_settings('instances', samples.class_names)
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
    search = search_module.Search(Mpq(grouped), {})
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
    assert choice.settings == fusion_settings.default_settings('instances', samples.class_names)
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

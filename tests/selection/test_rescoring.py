"""selection.rescoring: new scores are fitted without the images that they are judged on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cellseg_mm.core.errors import PredictionError
from cellseg_mm.core.files import write_json
from cellseg_mm.core.instances import InstanceSet, concatenate
from cellseg_mm.fusion.settings import default_settings, load_settings
from cellseg_mm.scores.score import score
from cellseg_mm.selection.objectives import Ap50, Mpq, Samples
from cellseg_mm.selection.rescoring import choose_rescoring, cross_scored, fit, tabulate

CLASSES = ('round', 'rare')
HW = (300, 300)


def squares(name: int, at: np.ndarray, sides: np.ndarray, scores: np.ndarray) -> InstanceSet:
    return InstanceSet.from_crops(
        f'i{name}', name, HW,
        crops=[np.ones((s, s), dtype=bool) for s in sides.tolist()],
        offsets_yx=at, class_ids=np.zeros(len(at), dtype=np.int64),
        scores=scores.astype(np.float32),
    )  # fmt: skip


@pytest.fixture(scope='module')
def samples() -> Samples:
    """True cells have 12 px, wrong ones 5 px, and scores say nothing of it."""
    rng = np.random.default_rng(3)
    gts, preds = [], []
    grid = np.stack(np.meshgrid(np.arange(7), np.arange(7)), -1).reshape(-1, 2) * 40 + 10
    for name in range(12):
        places = rng.permutation(grid)[:24]
        true, wrong = places[:12], places[12:]
        gts.append(squares(name, true, np.full(12, 12), np.ones(12)))
        both = [
            squares(name, true, np.full(12, 12), rng.uniform(0.3, 0.7, 12)),
            squares(name, wrong, np.full(12, 5), rng.uniform(0.3, 0.7, 12)),
        ]
        preds.append(concatenate(both).by_score())
    views = {(None, 'soft_mask'): tuple(preds)}
    return Samples(tuple(gts), views, np.arange(12) % 3, CLASSES)


@pytest.mark.parametrize('profile', ['submission', 'instances'])
def test_size_tells_what_scores_do_not(samples: Samples, profile, tmp_path) -> None:
    settings = default_settings(profile, CLASSES)
    objective = Ap50(samples) if profile == 'submission' else Mpq(samples)
    found = choose_rescoring(objective, settings)
    assert found.is_worth_it
    assert found.interval[0] > 0.1
    assert found.after.brier < 0.1 < found.before.brier
    rescoring = found.settings.rescoring
    assert rescoring is not None
    anew = [rescoring.apply(one) for one in samples.views[None, 'soft_mask']]
    after = score(samples.gt_sets, anew, CLASSES).headline()['segm_AP50']
    before = score(samples.gt_sets, samples.views[None, 'soft_mask'], CLASSES)
    assert after == pytest.approx(1.0)
    if profile == 'submission':
        assert found.gain == pytest.approx(after - before.headline()['segm_AP50'])
        assert set(found.settings.score_thr) == {0.0}
    else:
        kept = [(one.scores >= found.settings.score_thr[0]).sum() for one in anew]
        assert kept == [12] * 12
        assert found.settings.score_thr[1] == 0.5  # nothing is known of a class without cells
    profiles = dict.fromkeys(('submission', 'instances'), found.settings.to_json())
    record = {'version': 1, 'class_names': list(CLASSES), 'profiles': profiles}
    write_json(tmp_path / 'inference.json', record)
    assert load_settings(tmp_path / 'inference.json', profile, CLASSES) == found.settings


def test_a_fold_is_judged_by_weights_that_never_saw_it(samples: Samples) -> None:
    """In one fold big is wrong and small is right: it loses, whatever its own images would say."""
    gts, views = list(samples.gt_sets), samples.views[None, 'soft_mask']
    for i in np.flatnonzero(samples.fold_of == 1).tolist():
        small = views[i][views[i].areas < 100]
        gts[i] = replace(small, scores=np.ones(len(small)))
    turned = replace(samples, gt_sets=tuple(gts))
    found = choose_rescoring(Ap50(turned), default_settings('submission', CLASSES))
    table = tabulate(turned.gt_sets, views, 2)
    without = fit(table, CLASSES, turned.fold_of != 1)
    anew = without.scores(table.values, table.class_ids)
    at_fold = turned.fold_of[table.image] == 1
    assert anew[at_fold & table.is_right].max() < anew[at_fold & ~table.is_right].min()
    own = fit(table, CLASSES, turned.fold_of == 1).scores(table.values, table.class_ids)
    assert own[at_fold & table.is_right].min() > own[at_fold & ~table.is_right].max()
    assert found.after.brier > found.before.brier
    assert not found.is_worth_it


def test_each_fold_is_scored_by_the_others_in_any_order(samples: Samples) -> None:
    views = samples.views[None, 'soft_mask']
    anew = cross_scored(samples.gt_sets, views, samples.fold_of, CLASSES)
    table = tabulate(samples.gt_sets, views, 2)
    for i, (one, before) in enumerate(zip(anew, views, strict=True)):
        wanted = fit(table, CLASSES, samples.fold_of != samples.fold_of[i]).apply(before)
        np.testing.assert_array_equal(one.scores, wanted.scores)
    shuffled = tuple(one[::-1] for one in views)
    again = cross_scored(samples.gt_sets, shuffled, samples.fold_of, CLASSES)
    for one, other in zip(anew, again, strict=True):
        np.testing.assert_allclose(np.sort(one.scores), np.sort(other.scores), rtol=1e-6)
    with pytest.raises(PredictionError, match='fold 2 only; expected two folds'):
        cross_scored(samples.gt_sets, views, np.full(12, 2), CLASSES)


def test_a_class_with_few_examples_keeps_its_scores(samples: Samples) -> None:
    table = tabulate(samples.gt_sets, samples.views[None, 'soft_mask'], 2)
    rare = fit(replace(table, class_ids=np.ones_like(table.class_ids)), CLASSES, np.ones(12, bool))
    kept = rare.scores(table.values, np.zeros_like(table.class_ids))
    np.testing.assert_allclose(kept, table.scores, atol=1e-6)

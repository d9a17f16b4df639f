"""ensemble.fusion_gain: equal to slow scores; never measured on seen images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cellseg_mm.core.errors import FoldError, PredictionError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data.folds import Folds, save_folds
from cellseg_mm.data.images import find_images
from cellseg_mm.ensemble.fusion_gain import fusion_gain
from cellseg_mm.fusion.fuse import from_spec, fuse
from cellseg_mm.results.predictions import load_predictions
from cellseg_mm.scores.records import ScoreParams
from cellseg_mm.scores.score import score
from tests.support.drawn_world import CLASSES, World, trained_for, write


def test_gain_of_fusion_draws_the_folds_groups(world: World, tmp_path: Path) -> None:
    """One patient in the whole fold: there is nothing else to draw."""
    groups = dict.fromkeys(world.folds.val_names(2), 'one patient')
    save_folds(tmp_path / 'folds.json', Folds(world.folds.names_by_fold, groups))
    paths = [
        write(world, tmp_path / f'{k}.npz', fold=2, seed=k, trained=trained_for(world, k, 2))
        for k in (0, 1)
    ]
    images = find_images(
        world.data_root, 'val', CLASSES, folds_path=tmp_path / 'folds.json', fold=2
    )
    got = fusion_gain(paths, images, ['nms'], n_bootstrap=20)
    assert (got.interval_unit, got.n_interval_units) == ('groups', 1)
    (rule,) = got.rules
    assert rule.interval == pytest.approx((rule.gain, rule.gain), rel=1e-9)
    assert 'intervals over 1 groups' in got.table()


def test_gain_of_fusion_equals_slow_scores(world: World, tmp_path: Path) -> None:
    paths = [
        write(world, tmp_path / f'{k}.npz', fold=2, seed=k, trained=trained_for(world, k, 2))
        for k in (0, 1)
    ]
    images = find_images(
        world.data_root, 'val', CLASSES, folds_path=world.data_root / 'folds.json', fold=2
    )
    rules = ['nms', 'soft_mask:iou_thr=0.4']
    got = fusion_gain(paths, images, rules, n_bootstrap=30)
    sets = [load_predictions(path).sets for path in paths]
    gt = [world.gt[case.name] for case in images.cases]

    def ap50(predicted: list[InstanceSet]) -> float:
        params = ScoreParams(n_bootstrap=0, cap=got.cap)
        return score(gt, predicted, CLASSES, params).headline()['segm_AP50']

    single = {str(path): ap50(list(s)) for path, s in zip(paths, sets, strict=True)}
    assert got.member_ap50 == pytest.approx(single, rel=1e-9)
    for rule, found in zip(rules, got.rules, strict=True):
        fused = ap50([fuse(list(pair), from_spec(rule)) for pair in zip(*sets, strict=True)])
        assert found.rule == rule
        assert found.ap50 == pytest.approx(fused, rel=1e-9)
        assert found.gain == pytest.approx(fused - np.mean(list(single.values())), rel=1e-9)
        assert found.gain_over_best == pytest.approx(fused - max(single.values()), rel=1e-9)
        assert found.interval[0] <= found.interval[1]
    assert 'none of 2 members saw' in got.table()
    assert fusion_gain(paths[::-1], images, rules, n_bootstrap=30) == got


def test_gain_is_never_measured_on_seen_images(world: World, tmp_path: Path) -> None:
    clean = write(world, tmp_path / 'a.npz', fold=2, seed=0, trained=trained_for(world, 0, 2))
    seen = write(world, tmp_path / 'b.npz', fold=2, seed=1, trained=trained_for(world, 1))
    images = find_images(
        world.data_root, 'val', CLASSES, folds_path=world.data_root / 'folds.json', fold=2
    )
    with pytest.raises(FoldError, match=f'has trained on image .*{world.folds.hash}'):
        fusion_gain([clean, seen], images, ['nms'])
    with pytest.raises(PredictionError, match='at least 2'):
        fusion_gain([clean], images, ['nms'])

"""Out of fold: pooled once per image, strangers refused; fusion's gain against slow scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from cellseg_mm.core.errors import FoldError, PredictionError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data.drawing.sample import make_sample
from cellseg_mm.data.folds import Folds, save_folds
from cellseg_mm.data.images import find_images
from cellseg_mm.data.labels import find_cases, read_gt
from cellseg_mm.ensemble import oof
from cellseg_mm.ensemble.fusion_gain import fusion_gain
from cellseg_mm.fusion.fuse import from_spec, fuse
from cellseg_mm.results.predictions import Predictions, load_predictions, save_predictions
from cellseg_mm.scores.records import ScoreParams
from cellseg_mm.scores.score import score

CLASSES = ('epithelial', 'lymphocyte', 'neutrophil', 'macrophage')


@dataclass(frozen=True)
class World:
    """Six drawn images in three folds, and their truth."""

    root: Path
    data_root: Path
    folds: Folds
    gt: dict[str, InstanceSet]


@pytest.fixture(scope='module')
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp('oof')
    data_root = make_sample(root / 'data', n_train=6, n_test=2)
    cases = find_cases(data_root, 'train', 4)
    names = [case.name for case in cases]
    folds = Folds((tuple(names[:2]), tuple(names[2:4]), tuple(names[4:])))
    save_folds(data_root / 'folds.json', folds)
    return World(root, data_root, folds, {case.name: read_gt(case) for case in cases})


def noisy(gt: InstanceSet, rng: np.random.Generator) -> InstanceSet:
    """Some of the true cells, with scores and a few wrong classes."""
    kept = gt[rng.random(len(gt)) < 0.7]
    scores = rng.uniform(0.05, 1, len(kept)).astype(np.float32)
    wrong = rng.random(len(kept)) < 0.15
    class_ids = np.where(wrong, (kept.class_ids + 1) % 4, kept.class_ids)
    return replace(kept, scores=scores, class_ids=class_ids).by_score()


def write(
    world: World, path: Path, *, fold: int, seed: int = 0, trained: dict | None = None, **more
) -> Path:
    """Write a fold's validation predictions as tools/test.py does."""
    rng = np.random.default_rng(seed)
    sets = [noisy(world.gt[name], rng) for name in world.folds.val_names(fold)]
    provenance = {
        'split': 'val',
        'fold': fold,
        'fold_hash': world.folds.hash,
        'class_names': list(CLASSES),
        **more,
    }
    if trained is not None:
        provenance['trained'] = trained
    path.parent.mkdir(parents=True, exist_ok=True)
    save_predictions(path, Predictions(tuple(sets), provenance))
    return path


def trained_for(world: World, fold: int, *excluded: int) -> dict:
    return {'fold': fold, 'fold_hash': world.folds.hash, 'excluded_folds': list(excluded)}


def pool(world: World, paths: list[Path]) -> oof.Pool:
    return oof.pool_predictions(paths, world.folds, world.data_root)


def test_pool_holds_each_image_once_by_its_own_fold(world: World, tmp_path: Path) -> None:
    paths = [
        write(world, tmp_path / f'{k}.npz', fold=k, seed=k, trained=trained_for(world, k))
        for k in range(3)
    ]
    first, second = pool(world, paths), pool(world, paths[::-1])
    assert [s.name for s in first.pred_sets] == list(world.folds.names)
    fold_of = world.folds.fold_of()
    assert list(first.fold_of) == [fold_of[s.name] for s in first.pred_sets]
    assert first.folds == (0, 1, 2)
    for made in (first, second):
        oof.save_pool(tmp_path / 'oof.npz', made)
    loaded = load_predictions(tmp_path / 'oof.npz')
    assert [len(s) for s in loaded.sets] == [len(s) for s in first.pred_sets]
    assert loaded.provenance['fold_of'] == fold_of
    scores = score(first.gt_sets, first.pred_sets, CLASSES, ScoreParams(n_bootstrap=20))
    text = oof.describe(first, scores, world.data_root)
    assert f'AP50 {scores.headline()["segm_AP50"]:.4f}' in text
    assert 'folds 0, 1, 2 (of 3' in text
    assert 'ONLY' not in text


def test_intervals_draw_the_folds_groups(world: World, tmp_path: Path) -> None:
    paths = [write(world, tmp_path / f'{k}.npz', fold=k, seed=k) for k in range(3)]
    params = ScoreParams(n_bootstrap=50)
    names = world.folds.names
    grouped = Folds(world.folds.names_by_fold, dict.fromkeys(names[2:4], 'one patient'))
    assert grouped.hash == world.folds.hash
    made = oof.pool_predictions(paths, grouped, world.data_root)
    scores = oof.score_pool(made, params)
    assert (scores.interval_unit, scores.n_interval_units) == ('groups', 5)
    assert '5 groups)' in oof.describe(made, scores, world.data_root)
    views = replace(made, provenance={k: {**v, 'tta': 'd4'} for k, v in made.provenance.items()})
    assert 'AP50 with test-time augmentation d4 0.' in oof.describe(views, scores, world.data_root)
    wanted = score(made.gt_sets, made.pred_sets, CLASSES, params, groups=grouped.groups)
    assert scores.intervals == wanted.intervals
    alone = oof.score_pool(pool(world, paths), params)
    assert (alone.interval_unit, alone.n_interval_units) == ('images', 6)
    assert alone.headline() == pytest.approx(scores.headline(), nan_ok=True)
    assert alone.intervals != scores.intervals


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


def test_part_of_the_folds_is_said_to_be_a_part(world: World, tmp_path: Path) -> None:
    made = pool(world, [write(world, tmp_path / '1.npz', fold=1)])
    scores = score(made.gt_sets, made.pred_sets, CLASSES, ScoreParams(n_bootstrap=0))
    assert 'folds 1 ONLY (of 3' in oof.describe(made, scores, world.data_root)


@pytest.mark.parametrize(
    ('trained', 'accepted'),
    [
        pytest.param((1,), False, id='other fold'),
        pytest.param((1, 0), True, id='other fold without this one'),
        pytest.param((0,), True, id='own fold'),
    ],
)
def test_the_checkpoint_must_have_held_the_images_out(
    world: World, tmp_path: Path, trained: tuple[int, ...], accepted: bool
) -> None:
    path = write(world, tmp_path / 'x.npz', fold=0, trained=trained_for(world, *trained))
    if accepted:
        assert pool(world, [path]).folds == (0,)
    else:
        with pytest.raises(FoldError, match=r'trained for fold 1 .* may have seen them'):
            pool(world, [path])


def test_unknown_checkpoints_doubles_and_foreign_folds_are_refused(
    world: World, tmp_path: Path
) -> None:
    unknown = write(world, tmp_path / 'u.npz', fold=0, trained={'fold': None, 'fold_hash': None})
    with pytest.raises(FoldError, match='folds unknown'):
        pool(world, [unknown])
    a, b = write(world, tmp_path / 'a.npz', fold=0), write(world, tmp_path / 'b.npz', fold=0)
    with pytest.raises(FoldError, match='fold 0 is given twice'):
        pool(world, [a, b])
    foreign = write(world, tmp_path / 'f.npz', fold=0, fold_hash='0' * 16)
    with pytest.raises(FoldError, match='made with folds 0000'):
        pool(world, [foreign])
    with pytest.raises(PredictionError, match='no prediction files'):
        pool(world, [])


def test_data_that_changed_after_the_test_are_refused(world: World, tmp_path: Path) -> None:
    path = write(world, tmp_path / '0.npz', fold=0)
    predictions = load_predictions(path)
    name = predictions.sets[0].name
    for change, says in (
        ({'image_id': 90}, rf'image {name} of fold 0: predicted with id 90 .* changed since'),
        ({'image_hw': (5, 6)}, rf'{name} of fold 0.* size \(5, 6\)'),
    ):
        odd = replace(InstanceSet.empty(name, predictions.sets[0].image_id, (5, 5)), **change)
        sets = (odd, *predictions.sets[1:])
        save_predictions(tmp_path / 'odd.npz', Predictions(sets, predictions.provenance))
        with pytest.raises(PredictionError, match=says):
            pool(world, [tmp_path / 'odd.npz'])
    without = replace(world.folds, excluded=(name,))
    with pytest.raises(FoldError, match=f'image {name} of fold 0 is not there, or is excluded'):
        oof.pool_predictions([path], without, world.data_root)
    nameless = {k: v for k, v in predictions.provenance.items() if k != 'class_names'}
    save_predictions(tmp_path / 'nameless.npz', Predictions(predictions.sets, nameless))
    with pytest.raises(PredictionError, match='different classes, or none'):
        pool(world, [tmp_path / 'nameless.npz'])


def test_missing_files_name_the_commands(tmp_path: Path) -> None:
    with pytest.raises(PredictionError, match=r'2 of 2 .*tools/test.py c0.py --work-dir .*w0'):
        oof.validation_files(['c0.py', 'c1.py'], [tmp_path / 'w0', tmp_path / 'w1'])
    spec = 'd4,scales=0.8'
    with pytest.raises(PredictionError, match=f'--tta {spec}'):
        oof.validation_files(['c0.py'], [tmp_path], tta=spec)
    augmented = tmp_path / 'val.d4-scales-0-8.predictions.npz'
    augmented.touch()
    assert oof.validation_files(['c0.py'], [tmp_path], tta=spec) == [augmented]
    with pytest.raises(PredictionError, match=r'test_dataloader.dataset.fold=2'):
        oof.held_out_files(['c0.py'], [tmp_path / 'w0'], 2)


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

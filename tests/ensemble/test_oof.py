"""ensemble.oof: pooled once per image, strangers and stale files are refused."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from cellseg_mm.core import files
from cellseg_mm.core.errors import CheckpointError, FoldError, PredictionError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.trainings import recipe_parts
from cellseg_mm.data.folds import Folds
from cellseg_mm.ensemble import oof
from cellseg_mm.fusion.fuse import from_spec, fuse
from cellseg_mm.results.predictions import Predictions, load_predictions, save_predictions
from cellseg_mm.scores.records import ScoreParams
from cellseg_mm.scores.score import score
from tests.support.drawn_world import CLASSES, World, trained_for, write
from tests.support.fusion_members import assert_identical
from tools import score_oof


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


def test_each_part_of_the_images_is_scored_as_if_alone(world: World, tmp_path: Path) -> None:
    made = pool(world, [write(world, tmp_path / f'{k}.npz', fold=k, seed=k) for k in range(3)])
    names = world.folds.names
    table = oof.table_of_parts(made, dict.fromkeys(names[:2], 'lung') | {names[2]: 'breast'})
    rows = {line.split('  ')[0]: line.split() for line in table.splitlines()[1:]}
    assert list(rows) == [oof.NO_PART, 'breast', 'lung']
    index = [i for i, gt in enumerate(made.gt_sets) if gt.name in names[:2]]
    gts, preds = ([sets[i] for i in index] for sets in (made.gt_sets, made.pred_sets))
    alone = score(gts, preds, CLASSES, ScoreParams(n_bootstrap=0)).headline()
    assert rows['lung'][1:4] == ['2', str(sum(map(len, gts))), f'{alone["segm_AP50"]:.3f}']


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


def test_checkpoints_of_folds_that_were_extended_count_by_their_own_fold(
    world: World, tmp_path: Path
) -> None:
    last = world.folds.names[-1]  # as if it had been added
    longer = replace(world.folds, added={last: 1})
    fold = next(k for k in range(3) if last not in longer.val_names(k))
    earlier = {'fold_hash': longer.lineage[0], 'excluded_folds': []}
    path = tmp_path / 'x.npz'
    write(world, path, fold=fold, trained={**earlier, 'fold': fold})
    assert oof.pool_predictions([path], longer, world.data_root).folds == (fold,)
    with pytest.raises(FoldError, match='may have seen them'):  # as other folds they are unknown
        pool(world, [path])
    write(world, path, fold=fold, trained={**earlier, 'fold': (fold + 1) % 3})
    with pytest.raises(FoldError, match='may have seen them'):
        oof.pool_predictions([path], longer, world.data_root)


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


def test_folds_are_of_the_recipe_of_their_config(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipes = {k: {'optim_wrapper': {'lr': 0.1}, 'train_dataloader': {'fold': k}} for k in range(3)}

    def made(rates: dict[int, float]) -> oof.OofPool:
        paths = []
        for k in rates:
            trained = {**recipes[k], 'optim_wrapper': {'lr': rates[k]}}
            said = {**trained_for(world, k), 'parts': recipe_parts(trained)}
            said['file_parts'] = recipe_parts(
                {**trained, 'optim_wrapper': {'lr': min(0.1, rates[k])}}
            )
            paths.append(write(world, tmp_path / f'{k}.npz', fold=k, trained=said))
        return pool(world, paths)

    oof.refuse_other_recipes(made({0: 0.1, 1: 0.1}), recipes)
    assert caplog.messages == []
    # The second fold was given its rate as an option: its config says 0.1 as ever.
    oof.refuse_other_recipes(made({0: 0.1, 1: 0.7}), recipes)
    assert 'trained with different values of optim_wrapper; the score' in caplog.text
    with pytest.raises(CheckpointError, match='was trained with other values of optim_wrapper'):
        oof.refuse_other_recipes(made({0: 0.05}), recipes)


def test_classes_are_those_of_the_config_in_its_order(world: World, tmp_path: Path) -> None:
    made = pool(world, [write(world, tmp_path / '0.npz', fold=0)])
    oof.refuse_other_classes(made, CLASSES)
    with pytest.raises(PredictionError, match='the config has macrophage, neutrophil'):
        oof.refuse_other_classes(made, CLASSES[::-1])


def test_a_fold_that_was_trained_anew_is_tested_before_it_is_pooled(
    world: World, tmp_path: Path
) -> None:
    best = tmp_path / 'best_x_iter_2.pth'
    with zipfile.ZipFile(best, 'w') as archive:
        archive.writestr('data.pkl', 'weights')
    path = tmp_path / 'val.predictions.npz'
    now = files.file_hash(best)[:16]
    assert pool(world, [write(world, path, fold=0, checkpoint_hash=now)]).folds == (0,)
    write(world, path, fold=0, checkpoint_hash='0' * 16)
    with pytest.raises(
        PredictionError, match=rf'of another checkpoint .*best_x_iter_2.*{now}.*aga'
    ):
        pool(world, [path])
    write(world, path, fold=0, split='train')
    with pytest.raises(PredictionError, match=r'is of train .*is called val'):
        pool(world, [path])
    write(world, tmp_path / 'elsewhere/x.npz', fold=0, split='all')
    with pytest.raises(FoldError, match='is of the split all; expected'):
        pool(world, [tmp_path / 'elsewhere/x.npz'])


def test_recipes_are_fused_fold_by_fold(world: World, tmp_path: Path) -> None:
    """Against the slow way: each image's answers taken by name from the files, and fused."""
    pools, files_of = {}, {}
    for recipe, seed in (('a', 1), ('b', 20)):
        files_of[recipe] = [
            write(world, tmp_path / f'{recipe}{k}.npz', fold=k, seed=seed + k, data_hash='d')
            for k in range(3)
        ]
        pools[recipe] = pool(world, files_of[recipe])
    fused = oof.fuse_pools(pools, 'soft_mask')
    fold_of = world.folds.fold_of()
    for found, gt in zip(fused.pred_sets, fused.gt_sets, strict=True):
        answers = [
            next(s for s in load_predictions(paths[fold_of[gt.name]]).sets if s.name == gt.name)
            for paths in files_of.values()
        ]
        assert_identical(found, fuse(answers, from_spec('soft_mask')))
        assert found.extra['n_votes'].max(initial=0) <= 2
    assert {2} <= {int(v) for s in fused.pred_sets for v in s.extra['n_votes']}
    assert (fused.fold_of, fused.groups) == (pools['a'].fold_of, pools['a'].groups)
    scores = oof.score_pool(fused, ScoreParams(n_bootstrap=0))
    assert 'AP50 of 2 recipes fused 0.' in oof.describe(fused, scores, world.data_root)
    assert oof.pool_origin(fused)['data_hash'] == 'd'
    oof.save_pool(tmp_path / 'oof.npz', fused)
    members = load_predictions(tmp_path / 'oof.npz').provenance['members']
    assert [len(members[str(k)]) for k in range(3)] == [2, 2, 2]
    assert oof.fuse_pools({'a': pools['a']}, 'soft_mask') is pools['a']


def test_recipes_of_other_folds_or_classes_are_not_fused(world: World, tmp_path: Path) -> None:
    whole = pool(world, [write(world, tmp_path / f'{k}.npz', fold=k) for k in range(3)])
    part = pool(world, [tmp_path / '0.npz', tmp_path / '2.npz'])
    with pytest.raises(PredictionError, match=r'a was tested on .*\(0, 1, 2\), b on \(0, 2\)'):
        oof.fuse_pools({'a': whole, 'b': part}, 'soft_mask')
    other = replace(whole, class_names=CLASSES[::-1])
    with pytest.raises(PredictionError, match='the classes of the predictions are macrophage'):
        oof.fuse_pools({'a': whole, 'b': other}, 'soft_mask')


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (['a/fold0.py', '--fusion', 'nms'], 'found 1 rule(s) for 1 recipe(s)'),
        (['a/fold0.py', 'b/fold0.py', '--fusion', 'nms', 'wbf'], 'found 2 rule(s) for 2 recipe(s)'),
        (['a/fold0.py', 'b/fold0.py', '--post', 'disjoint'], '--post is for --held-out'),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        score_oof.parse_args(words)
    assert said in capsys.readouterr().err
    assert score_oof.parse_args([*words, '--held-out', '0']).held_out == 0

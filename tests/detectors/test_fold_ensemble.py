"""The fold ensemble in a real Runner: one answer, any order, the model back, nothing leaked."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cellseg_mm  # noqa: F401  (makes mmdet importable where mmcv has no compiled ops)

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

from mmdet.registry import MODELS  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402
from mmengine.runner import IterBasedTrainLoop, Runner  # noqa: E402

from cellseg_mm.core.errors import CheckpointError, ConfigError, FoldError, PredictionError  # noqa: E402
from cellseg_mm.core.instances import InstanceSet  # noqa: E402
from cellseg_mm.data.folds import Folds, save_folds  # noqa: E402
from cellseg_mm.detectors.fold_ensemble import FoldEnsembleModel  # noqa: E402
from cellseg_mm.detectors.hook import FoldEnsembleHook  # noqa: E402
from cellseg_mm.detectors.member_models import Loaded, MemberModels, MemberSource, load_members  # noqa: E402
from cellseg_mm.fusion import views  # noqa: E402
from cellseg_mm.fusion.fuse import from_spec, fuse, post_from_spec  # noqa: E402
from cellseg_mm.model.detections import to_instance_set  # noqa: E402
from cellseg_mm.pipeline.dataset import CellDataset  # noqa: E402
from cellseg_mm.results.predictions import load_predictions  # noqa: E402
from cellseg_mm.training.fold_guard import ProvenanceHook, refuse_other_folds  # noqa: E402
from tests.support.tiny_folds import TinyFolds, make_tiny_folds, random_model, save_checkpoint  # noqa: E402

pytestmark = pytest.mark.mm

RUNNERS = itertools.count()
CLASSES = ('epithelial', 'lymphocyte', 'neutrophil', 'macrophage')


@pytest.fixture(scope='module')
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyFolds]:
    root = tmp_path_factory.mktemp('tiny')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('CELLSEG_DATA', str(root / 'data'))
        yield make_tiny_folds(root)


def make_runner(
    tiny: TinyFolds,
    out: Path,
    *,
    split: str = 'test',
    fold: int = 0,
    batch_size: int = 1,
    folds_file: Path | str = 'auto',
) -> Runner:
    cfg = Config.fromfile(tiny.configs[0])
    cfg.work_dir, cfg.load_from = str(out), None
    cfg.visualizer.name = f'{out}-{next(RUNNERS)}'  # mmengine keeps visualisers by name
    cfg.test_dataloader.batch_size = batch_size
    cfg.test_dataloader.dataset.split = split
    cfg.test_dataloader.dataset.fold = fold
    cfg.test_dataloader.dataset.folds_file = str(folds_file)
    if split == 'test':
        path = str(out / 'test.predictions.npz')
        cfg.test_evaluator = {'type': 'SaveInstances', 'path': path}
    else:
        cfg.test_evaluator.outfile_prefix = str(out / split)
    return Runner.from_cfg(cfg)


def members_of(tiny: TinyFolds, folds: tuple[int, ...] = (0, 1, 2)) -> list[dict]:
    return [{'config': tiny.configs[k], 'checkpoint': str(tiny.checkpoints[k])} for k in folds]


def source(tiny: TinyFolds, fold: int) -> MemberSource:
    return MemberSource(
        Config.fromfile(tiny.configs[fold]), f'fold{fold}.py', tiny.checkpoints[fold]
    )


@pytest.fixture(scope='module')
def loaded(tiny: TinyFolds) -> list[Loaded]:
    """The three members by fold."""
    members = load_members([source(tiny, fold) for fold in range(3)], CLASSES)
    return sorted(members, key=lambda item: item.member.fold)


def batches(
    tiny: TinyFolds, *, split: str = 'test', batch_size: int = 1, spec: views.TtaSpec | None = None
) -> list[dict]:
    cfg = Config.fromfile(tiny.configs[0])
    cfg.test_dataloader.batch_size = batch_size
    cfg.test_dataloader.dataset.split = split
    if spec is not None:
        pipeline = cfg.test_dataloader.dataset.pipeline
        cfg.test_dataloader.dataset.pipeline = spec.tta_pipeline(pipeline)
    return list(Runner.build_dataloader(cfg.test_dataloader))


def predict(model: torch.nn.Module, data: list[dict]) -> dict[str, InstanceSet]:
    """What a model predicts by itself."""
    with torch.no_grad():
        found = [to_instance_set(sample) for batch in data for sample in model.test_step(batch)]
    return {s.name: s for s in found}


def equal(a: InstanceSet, b: InstanceSet) -> bool:
    same = [np.array_equal(getattr(a, k), getattr(b, k)) for k in ('class_ids', 'scores')]
    return all(same) and np.array_equal(a.boxes_xyxy, b.boxes_xyxy) and a.rles == b.rles


def run(
    tiny: TinyFolds, out: Path, folds: tuple[int, ...] = (0, 1, 2), **options: object
) -> FoldEnsembleHook:
    runner = make_runner(tiny, out, batch_size=options.pop('batch_size', 1))
    hook = FoldEnsembleHook(members_of(tiny, folds), **options)
    runner.register_hook(hook)
    own = runner.model
    runner.test()
    assert runner.model is own
    return hook


def test_each_image_is_the_fusion_of_what_the_members_predict_alone(
    tiny: TinyFolds, loaded: list[Loaded], tmp_path: Path
) -> None:
    rule = 'wbf:iou_thr=0.4'
    hook = run(tiny, tmp_path, rule=rule, post='min_area_px=3')
    alone = [predict(item.model, batches(tiny)) for item in loaded]
    got = load_predictions(tmp_path / 'test.predictions.npz')
    assert [s.name for s in got.sets] == sorted(alone[0])
    for fused in got.sets:
        sets = [predictions[fused.name] for predictions in alone]
        wanted = fuse(sets, from_spec(rule), post_from_spec('min_area_px=3'))
        assert len(wanted) > 0
        assert equal(fused, wanted)
        for key in ('n_votes', 'agreement', 'mask_uncertainty'):
            assert fused.extra[key].tolist() == wanted.extra[key].tolist()
        order = [tiny.checkpoints.index(Path(m.source)) for m in hook.members]
        assert hook.member_counts[fused.name] == tuple(len(sets[k]) for k in order)
    assert hook.report.n_images == 2
    assert hook.report.n_in == sum(len(s) for sets in alone for s in sets.values())
    assert hook.report.n_out == sum(len(s) for s in got.sets)


@pytest.mark.parametrize('rule', ['nms', 'soft_mask'])
def test_order_of_the_folds_and_a_second_run_change_no_byte(
    tiny: TinyFolds, loaded: list[Loaded], tmp_path: Path, rule: str
) -> None:
    contents = []
    for i, folds in enumerate([(0, 1, 2), (2, 0, 1)]):
        run(tiny, tmp_path / str(i), folds, rule=rule)
        contents.append(load_predictions(tmp_path / str(i) / 'test.predictions.npz'))
    first, second = contents
    assert sum(len(s) for s in first.sets) > 10
    assert all(equal(a, b) for a, b in zip(first.sets, second.sets, strict=True))
    assert first.provenance['members'] == second.provenance['members']
    members = load_members([source(tiny, fold) for fold in (1, 0, 2)], CLASSES)
    for placement in ('device', 'turns'):
        ensemble = FoldEnsembleModel(MemberModels(members, 'cpu', placement), from_spec(rule))
        again = predict(ensemble, batches(tiny))
        assert all(equal(s, again[s.name]) for s in first.sets)


class RaisingHook(Hook):
    """Fails in the middle of a test."""

    def after_test_iter(self, *args: object, **kwargs: object) -> None:
        raise OSError('disk full')


def test_intervals_of_a_tested_fold_draw_the_groups_of_the_folds_file(
    tiny: TinyFolds, tmp_path: Path
) -> None:
    names = tiny.folds.val_names(1)
    save_folds(tmp_path / 'folds.json', Folds(tiny.folds.names_by_fold, dict.fromkeys(names, 'p')))
    found = {}
    for key, path in (('groups', tmp_path / 'folds.json'), ('images', 'auto')):
        make_runner(tiny, tmp_path / key, split='val', fold=1, folds_file=path).test()
        found[key] = json.loads((tmp_path / key / 'val.scores.json').read_text())
    units = {key: (r['interval_unit'], r['n_interval_units']) for key, r in found.items()}
    assert units == {'groups': ('groups', 1), 'images': ('images', 2)}


def test_model_comes_back_when_the_test_raises(tiny: TinyFolds, tmp_path: Path) -> None:
    runner = make_runner(tiny, tmp_path)
    runner.register_hook(FoldEnsembleHook(members_of(tiny)))
    runner.register_hook(RaisingHook())
    own = runner.model
    with pytest.raises(OSError, match='disk full'):
        runner.test()
    assert runner.model is own
    assert 'run' not in vars(runner.test_loop)


# ---- what is refused ----


def test_checkpoint_of_another_architecture_is_refused(tiny: TinyFolds, tmp_path: Path) -> None:
    model = random_model(tiny.configs[0], 0)
    state = model.state_dict()
    state['extra.weight'] = state.pop('roi_head.bbox_head.fc_cls.bias')
    state['rpn_head.rpn_cls.bias'] = torch.zeros(99)
    path = tmp_path / 'odd.pth'
    torch.save({'meta': {}, 'state_dict': state}, path)
    source = MemberSource(Config.fromfile(tiny.configs[0]), 'fold0.py', path)
    expected = r'odd.pth: does not fit fold0.py: 1 tensors missing in the file \(roi_head.*fc_cls'
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_members([source], CLASSES)
    assert '1 tensors not in the model (extra.weight)' in str(caught.value)
    assert '1 tensors of another shape (rpn_head.rpn_cls.bias)' in str(caught.value)


def test_other_classes_and_doubled_members_are_refused(tiny: TinyFolds, tmp_path: Path) -> None:
    model = random_model(tiny.configs[0], 0)
    path = save_checkpoint(tmp_path / 'x.pth', model, class_names=['a', 'b', 'c', 'd'])
    cfg = Config.fromfile(tiny.configs[0])
    with pytest.raises(PredictionError, match='its classes are a, b, c, d'):
        load_members([MemberSource(cfg, 'c', path)], CLASSES)
    twice = [MemberSource(cfg, 'c', tiny.checkpoints[0])] * 2
    with pytest.raises(PredictionError, match='same content'):
        load_members(twice, CLASSES)


def test_different_test_pipelines_are_refused(tiny: TinyFolds, tmp_path: Path) -> None:
    other = tmp_path / 'other.py'
    other.write_text(Path(tiny.configs[1]).read_text().replace('(96, 96)', '(80, 80)'))
    members = [members_of(tiny)[0], {'config': str(other), 'checkpoint': str(tiny.checkpoints[1])}]
    runner = make_runner(tiny, tmp_path)
    runner.register_hook(FoldEnsembleHook(members))
    with pytest.raises(ConfigError, match=r'test pipeline differs.*merge the prediction files'):
        runner.test()


def test_seen_images_are_refused_or_left_to_the_others(
    tiny: TinyFolds, loaded: list[Loaded], tmp_path: Path
) -> None:
    runner = make_runner(tiny, tmp_path / 'a', split='val', fold=1)
    runner.register_hook(FoldEnsembleHook(members_of(tiny)))
    with pytest.raises(FoldError, match=f'has trained on image .*folds {tiny.folds.hash}'):
        runner.test()
    # out of fold: every image by the one member that held it out
    runner = make_runner(tiny, tmp_path / 'b', split='all', batch_size=2)
    hook = FoldEnsembleHook(members_of(tiny), leave_out_seen=True)
    runner.register_hook(hook)
    runner.test()
    alone = [predict(item.model, batches(tiny, split='all')) for item in loaded]
    fold_of = tiny.folds.fold_of()
    got = load_predictions(tmp_path / 'b' / 'all.predictions.npz').sets
    assert sorted(s.name for s in got) == list(fold_of)
    for fused in got:
        wanted = fuse([alone[fold_of[fused.name]][fused.name]], from_spec('nms'))
        assert len(fused) == len(wanted)
        folds = [m.fold for m in hook.members]
        counts = dict(zip(folds, hook.member_counts[fused.name], strict=True))
        assert {fold for fold, n in counts.items() if n >= 0} == {fold_of[fused.name]}


def test_members_of_other_folds_are_refused(tiny: TinyFolds, tmp_path: Path) -> None:
    model = random_model(tiny.configs[0], 7)
    path = save_checkpoint(tmp_path / 'foreign.pth', model, fold=0, fold_hash='0123456789abcdef')
    runner = make_runner(tiny, tmp_path, split='val', fold=0)
    member = {'checkpoint': str(path)}
    runner.register_hook(FoldEnsembleHook([member], leave_out_seen=True))
    with pytest.raises(FoldError, match='trained with folds 0123456789abcdef'):
        runner.test()


def test_members_without_a_fold_may_be_fused_on_it(tiny: TinyFolds, tmp_path: Path) -> None:
    paths = [
        save_checkpoint(
            tmp_path / f'{k}.pth',
            random_model(tiny.configs[0], k),
            fold=k,
            fold_hash=tiny.folds.hash,
            excluded_folds=[2],
        )
        for k in (0, 1)
    ]
    runner = make_runner(tiny, tmp_path, split='val', fold=2)
    hook = FoldEnsembleHook([{'checkpoint': str(path)} for path in paths])
    runner.register_hook(hook)
    runner.test()
    assert all(min(counts) >= 0 for counts in hook.member_counts.values())


def test_automatic_mixed_precision(tiny: TinyFolds, loaded: list[Loaded]) -> None:
    ensemble = FoldEnsembleModel(MemberModels(loaded, 'cpu'), from_spec('soft_mask'))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = predict(ensemble, batches(tiny))
    assert sum(len(s) for s in found.values()) > 0


# ---- a further fold held out ----


def test_training_split_leaves_further_folds_out(tiny: TinyFolds) -> None:
    def names(**options: object) -> list[str]:
        dataset = CellDataset(
            data_root=str(tiny.data_root), metainfo={'classes': CLASSES}, pipeline=[], **options
        )
        assert dataset.fold_hash == tiny.folds.hash
        return [dataset.get_data_info(i)['name'] for i in range(len(dataset))]

    by_fold = tiny.folds.names_by_fold
    assert names(split='train', fold=0) == sorted(by_fold[1] + by_fold[2])
    assert names(split='train', fold=0, exclude_folds=[2]) == list(by_fold[1])
    assert names(split='val', fold=0, exclude_folds=[2]) == list(by_fold[0])
    with pytest.raises(FoldError, match='leave nothing of 3 folds'):
        names(split='train', fold=0, exclude_folds=[1, 2])
    with pytest.raises(FoldError, match='asks for fold 3'):
        names(split='train', fold=0, exclude_folds=[3])


def test_checkpoint_is_scored_on_excluded_folds_but_never_resumed_there(tiny: TinyFolds) -> None:
    trained = {'fold': 0, 'fold_hash': tiny.folds.hash, 'excluded_folds': [2]}

    def dataset(split: str, fold: int, exclude: tuple[int, ...] = ()) -> CellDataset:
        return CellDataset(
            data_root=str(tiny.data_root),
            metainfo={'classes': CLASSES},
            pipeline=[],
            split=split,
            fold=fold,
            exclude_folds=exclude,
        )

    for fold in (0, 2):
        refuse_other_folds(trained, dataset('val', fold))
    refuse_other_folds(trained, dataset('train', 0, (2,)))
    for other in (dataset('val', 1), dataset('train', 2, (1,)), dataset('train', 0)):
        with pytest.raises(FoldError, match='holds out'):
            refuse_other_folds(trained, other)


@pytest.mark.parametrize(
    ('trained', 'seen'),
    [
        pytest.param({'fold': 0}, None, id='same fold'),
        pytest.param({'fold': 2, 'excluded_folds': [0]}, None, id='left it out too'),
        pytest.param({'fold': 1}, '0', id='another fold'),
        pytest.param({'fold': None}, '0', id='no fold known'),
        pytest.param({'fold': 0, 'fold_hash': 'other'}, '0', id='other folds of the same data'),
        pytest.param({'fold': None, 'fold_hash': ''}, '0', id='all images'),
        pytest.param({'fold': 1, 'fold_hash': 'x', 'data_hash': 'x'}, None, id='other data'),
    ],
)
def test_fine_tuning_never_begins_with_weights_that_saw_what_is_held_out(
    tiny: TinyFolds, trained: dict, seen: str | None
) -> None:
    dataset = CellDataset(
        data_root=str(tiny.data_root), metainfo={'classes': CLASSES}, pipeline=[], fold=0
    )
    loop = IterBasedTrainLoop.__new__(IterBasedTrainLoop)
    loop.dataloader = SimpleNamespace(dataset=dataset)
    loops = {'_train_loop': loop, '_test_loop': None, '_val_loop': None}
    runner = SimpleNamespace(**loops, _resume=False, _load_from='weights.pth')
    known = {'fold_hash': tiny.folds.hash, 'data_hash': dataset.data_hash, **trained}
    checkpoint = {'meta': {'cellseg': known}}
    ProvenanceHook(allow_other_folds=True).after_load_checkpoint(runner, checkpoint)
    if seen is None:
        ProvenanceHook().after_load_checkpoint(runner, checkpoint)
    else:
        with pytest.raises(FoldError, match=rf'has seen images of fold {seen} of .*load_from=None'):
            ProvenanceHook().after_load_checkpoint(runner, checkpoint)


@pytest.mark.parametrize('batch_size', [1, 2])
def test_augmented_members_and_members_by_image(
    tiny: TinyFolds, loaded: list[Loaded], batch_size: int
) -> None:
    spec = views.from_spec('hflip')
    one_by_one, data = (batches(tiny, batch_size=n, spec=spec) for n in (1, batch_size))
    alone = []
    for item in loaded:
        model = MODELS.build({**spec.tta_model(), 'module': item.model})
        # Members see the images of their own part of a batch only, here one.
        alone.append(predict(model, one_by_one))
    first, second = sorted(alone[0])
    chosen = {first: (0,), second: (1, 2)}
    ensemble = FoldEnsembleModel(
        MemberModels(loaded, 'cpu'), from_spec('nms'), chosen=chosen, tta_model=spec.tta_model()
    )
    got = predict(ensemble, data)
    for name, members in chosen.items():
        wanted = fuse([alone[k][name] for k in members], from_spec('nms'))
        assert len(wanted) > 0
        assert equal(got[name], wanted)
    assert [c >= 0 for c in ensemble.member_counts[second]] == [False, True, True]

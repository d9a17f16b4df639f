"""tools/ensemble.py and its options: folds with models, in two processes, with views."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import cellseg_mm  # noqa: F401  (makes mmdet importable where mmcv has no compiled ops)

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')
from mmengine.config import Config  # noqa: E402

from cellseg_mm.core.errors import CheckpointError, ConfigError, PredictionError  # noqa: E402
from cellseg_mm.detectors.from_options import pair_sources  # noqa: E402
from cellseg_mm.detectors.member_models import MemberSource, load_member  # noqa: E402
from cellseg_mm.results.predictions import load_predictions  # noqa: E402
from cellseg_mm.training.marks import recipe_record  # noqa: E402
from cellseg_mm.weights.find import find_checkpoints  # noqa: E402
from tests.support.micro import free_port  # noqa: E402
from tests.support.tiny_folds import (  # noqa: E402
    ROOT,
    TinyFolds,
    environment,
    make_tiny_folds,
    random_model,
    save_checkpoint,
)

pytestmark = pytest.mark.mm


@pytest.fixture(scope='module')
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyFolds]:
    root = tmp_path_factory.mktemp('tiny')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('CELLSEG_DATA', str(root / 'data'))
        yield make_tiny_folds(root)


def run_tool(tiny: TinyFolds, *words: str | Path, n_processes: int = 1) -> str:
    """Run the ensemble tool in processes of its own and return what it prints."""
    command = [sys.executable, str(ROOT / 'tools/ensemble.py')]
    if n_processes > 1:
        command = ['bash', str(ROOT / 'tools/dist_ensemble.sh'), str(n_processes)]
    env = environment(tiny.data_root)
    env |= {'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}', 'PORT': str(free_port())}
    run = subprocess.run(
        [*command, *map(str, words)],
        cwd=tiny.root,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_two_processes_give_the_submission_of_one(tiny: TinyFolds) -> None:
    one, two = tiny.root / 'one', tiny.root / 'two'
    said = run_tool(
        tiny,
        *(*tiny.configs, '--fusion', 'soft_mask', '--out', one),
        *('--export', 'csv', 'geojson', '--overlays', '1'),
    )
    run_tool(tiny, *tiny.configs[::-1], '--fusion', 'soft_mask', '--out', two, n_processes=2)
    name = 'test-results.json.zip'
    assert (one / name).read_bytes() == (two / name).read_bytes()
    members = [
        load_predictions(p / 'test.predictions.npz').provenance['members'] for p in (one, two)
    ]
    assert [m['source_hash'] for m in members[0]] == [m['source_hash'] for m in members[1]]
    for fold in range(3):
        assert f'fold {fold}, folds {tiny.folds.hash}, score 0.2500' in said
    assert 'rule: soft_mask' in said
    assert '2 images: ' in said
    assert str(one / name) in said
    assert f'exports: 5 files in {one / "exports"} (score_thr=0.5,disjoint=true)' in said
    assert len(list((one / 'exports').iterdir())) == 5


def test_a_tested_fold_with_views_is_what_the_ensemble_of_one_predicts(tiny: TinyFolds) -> None:
    from cellseg_mm.core.layout import augmentations_of

    one = tiny.root / 'one_with_views'
    words = ['--cfg-options', 'test_dataloader.dataset.split=test']
    work_dir = tiny.checkpoints[0].parent
    command = [sys.executable, str(ROOT / 'tools/test.py'), tiny.configs[0], '--tta', 'hflip']
    run = subprocess.run(
        [*command, '--work-dir', str(work_dir), '--out', str(one), *words],
        cwd=tiny.root,
        env=environment(tiny.data_root),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = load_predictions(one / 'test.hflip.predictions.npz')
    assert found.provenance['tta'] == 'hflip'
    (one / 'test.hflip.predictions.npz').rename(one / 'val.hflip.predictions.npz')
    assert augmentations_of(one, 'val') == ['hflip']  # where find_best looks
    run_tool(tiny, tiny.configs[0], '--tta', 'hflip', '--out', one)
    wanted = {s.name: s for s in load_predictions(one / 'test.predictions.npz').sets}
    assert {s.name for s in found.sets} == set(wanted)
    for ours in found.sets:
        theirs = wanted[ours.name]
        assert len(ours) > 0
        assert ours.rles == theirs.rles
        assert ours.scores.tolist() == pytest.approx(theirs.scores.tolist())


def test_all_folds_with_views_are_merged(tiny: TinyFolds) -> None:
    out = tiny.root / 'all_with_views'
    said = run_tool(tiny, *tiny.configs, '--tta', 'hflip', '--out', out)
    assert 'test-time augmentation hflip' in said
    found = load_predictions(out / 'test.predictions.npz')
    assert found.provenance['tta'] == 'hflip'
    assert all(len(s) > 0 and 'agreement' in s.extra for s in found.sets)


def test_missing_members_are_all_reported(tiny: TinyFolds) -> None:
    work_dirs = [path.parent for path in tiny.checkpoints]
    assert find_checkpoints(work_dirs) == list(tiny.checkpoints)
    gone = [work_dirs[0], tiny.root / 'work_dirs/fold7', tiny.root / 'work_dirs/fold8']
    with pytest.raises(CheckpointError, match=r'2 of 3 members are missing: .*fold7.*fold8'):
        find_checkpoints(gone)


def test_checkpoints_of_another_number_of_folds(tiny: TinyFolds) -> None:
    configs = {path: Config.fromfile(path) for path in tiny.configs[:2]}
    one = {tiny.configs[0]: configs[tiny.configs[0]]}
    assert [s.config_path for s in pair_sources(one, tiny.checkpoints)] == [tiny.configs[0]] * 3
    with pytest.raises(ConfigError, match='3 checkpoints and 2 configs'):
        pair_sources(configs, tiny.checkpoints)


@pytest.mark.parametrize(
    ('change', 'error', 'says', 'may_be_named'),
    [
        pytest.param(
            {'test_dataloader.dataset.metainfo.classes': ('a', 'b', 'c', 'd')},
            PredictionError,
            r'classes are epithelial, .*fold0\.py has a, b, c, d; names and order',
            False,
            id='classes',
        ),
        pytest.param(
            {'model.rpn_head.anchor_generator.scales': [5]},
            CheckpointError,
            'trained with other settings of model',
            False,
            id='anchors that no weight tells of',
        ),
        pytest.param(
            {'train_dataloader.dataset.dataset.fold': 1},
            CheckpointError,
            r'was trained for fold 0, .*fold0\.py is fold 1',
            True,
            id='fold',
        ),
        pytest.param(
            {'optim_wrapper.optimizer.lr': 0.5},
            CheckpointError,
            'other values of optim_wrapper than the config',
            True,
            id='rate',
        ),
        pytest.param({'model.test_cfg.rcnn.max_per_img': 3}, None, '', True, id='cap'),
    ],
)
def test_a_config_and_its_checkpoint_belong_together(
    tiny: TinyFolds,
    tmp_path: Path,
    change: dict,
    error: type[Exception] | None,
    says: str,
    may_be_named: bool,
) -> None:
    cfg = Config.fromfile(tiny.configs[0])
    path = save_checkpoint(
        *(tmp_path / 'best_x.pth', random_model(tiny.configs[0], 0)),
        **recipe_record(cfg),
        fold=0,
    )
    cfg.merge_from_dict(change)
    source = MemberSource(cfg, tiny.configs[0], path, is_best=True)
    if error is None:
        assert load_member(source).member.fold == 0
        return
    with pytest.raises(error, match=says):
        load_member(source)
    named = replace(source, is_best=False)  # a person has chosen the file: only what decides cells
    if may_be_named:
        assert load_member(named).member.fold == 0
    else:
        with pytest.raises(error, match=says):
            load_member(named)

"""The plan of a cross-validation, and that interruptions change nothing."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import cellseg_mm  # noqa: F401  (makes mmdet importable where mmcv has no compiled ops)

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

from mmengine.config import Config  # noqa: E402

from cellseg_mm.core import files  # noqa: E402
from cellseg_mm.core.errors import ConfigError  # noqa: E402
from cellseg_mm.core.instances import InstanceSet  # noqa: E402
from cellseg_mm.core.layout import FINISHED, STARTED  # noqa: E402
from cellseg_mm.core.trainings import MARK_VERSION  # noqa: E402
from cellseg_mm.results.predictions import Predictions, save_predictions  # noqa: E402
from cellseg_mm.training import cross_validation  # noqa: E402
from cellseg_mm.training.marks import fold_hash_of, recipe_hash, write_finished  # noqa: E402

pytestmark = pytest.mark.mm
ROOT = Path(__file__).resolve().parents[2]
CONFIGS = tuple(str(ROOT / f'configs/sample/fold{k}.py') for k in range(2))
OPTIONS = ('train_cfg.max_iters=4',)


@pytest.fixture(autouse=True)
def data(sample_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv('CELLSEG_DATA', str(sample_data))
    return sample_data


def config(fold: int, options: tuple[str, ...] = OPTIONS) -> Config:
    cfg = Config.fromfile(CONFIGS[fold])
    cfg.merge_from_dict({key: json.loads(v) for key, v in (o.split('=') for o in options)})
    return cfg


def begin(root: Path, fold: int, options: tuple[str, ...] = OPTIONS) -> Path:
    """Make the work folder of a training that wrote one checkpoint."""
    work_dir = root / f'sample/fold{fold}'
    cfg = config(fold, options)
    state = {
        'version': MARK_VERSION,
        'recipe': recipe_hash(cfg),
        'fold_hash': fold_hash_of(cfg),
    }
    files.write_json(work_dir / STARTED, state)
    (work_dir / 'iter_2.pth').write_bytes(b'two')
    return work_dir


def finish(root: Path, fold: int, options: tuple[str, ...] = OPTIONS) -> Path:
    work_dir = begin(root, fold, options)
    best = work_dir / 'best_cell_segm_mAP_50_iter_4.pth'
    best.write_bytes(f'weights {fold}'.encode())
    state = json.loads((work_dir / STARTED).read_text())
    write_finished(work_dir, best, state)
    return work_dir


def test(root: Path, fold: int, **changes: object) -> Path:
    """Leave the predictions of a tested fold."""
    work_dir = root / f'sample/fold{fold}'
    provenance = {
        'checkpoint_hash': json.loads((work_dir / FINISHED).read_text())['best_hash'],
        'fold_hash': fold_hash_of(config(fold)),
        **changes,
    }
    path = work_dir / 'val.predictions.npz'
    save_predictions(path, Predictions([InstanceSet.empty('a', 1, (5, 7))], provenance))
    return path


test.__test__ = False


def plan(root: Path, options: tuple[str, ...] = OPTIONS) -> cross_validation.Plan:
    return cross_validation.make_plan(CONFIGS, work_root=root, options=options)


def final_steps(made: cross_validation.Plan) -> list[cross_validation.Step]:
    return [step for stage in made.final_stages for chain in stage for step in chain]


def done(root: Path) -> list[list[bool]]:
    return [[step.done for step in steps] for steps in plan(root).fold_steps]


def test_plan_knows_what_is_there(tmp_path: Path) -> None:
    assert done(tmp_path) == [[False, False], [False, False]]
    begin(tmp_path, 0)
    finish(tmp_path, 1)
    assert done(tmp_path) == [[False, False], [True, False]]
    test(tmp_path, 1)
    assert done(tmp_path) == [[False, False], [True, True]]
    text = plan(tmp_path).text()
    assert 'done   test fold 1' in text
    assert 'to do  train fold 0' in text
    assert shlex.join(['--cfg-options', *OPTIONS]) in text


def test_data_without_test_images_need_no_ensemble(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Own data seldom have any; the report must come all the same."""
    assert not any(step.done for step in final_steps(plan(tmp_path)))
    own = shutil.copytree(data, tmp_path / 'own', ignore=lambda *_: ['test_release'])
    monkeypatch.setenv('CELLSEG_DATA', str(own))
    steps = {Path(step.command[1]).name: step for step in final_steps(plan(tmp_path))}
    assert [name for name, step in steps.items() if step.done] == ['ensemble.py']
    assert 'test_release is not there' in steps['ensemble.py'].reason


def test_last_steps_wait_for_what_they_read(tmp_path: Path) -> None:
    """Scores and settings are independent; the answer needs the settings, the report everything."""
    needs = {
        'score_oof.py': [],
        'find_best.py': [],
        'ensemble.py': ['find_best.py'],
        'report.py': ['score_oof.py', 'ensemble.py'],
    }
    code = (
        'import sys, time; from pathlib import Path; folder, name, *needs = sys.argv[1:]\n'
        'assert all(Path(folder, need).exists() for need in needs), needs\n'
        'time.sleep(0.2); Path(folder, name).touch()'
    )

    def stand_in(step: cross_validation.Step) -> cross_validation.Step:
        name = Path(step.command[1]).name
        words = (sys.executable, '-c', code, str(tmp_path), name, *needs[name])
        return replace(step, command=words, done=False, log_path=tmp_path / f'{name}.log')

    stages = tuple(
        tuple(tuple(map(stand_in, chain)) for chain in stage)
        for stage in plan(tmp_path).final_stages
    )
    cross_validation.run_plan(cross_validation.Plan((), stages, tmp_path), ['', ''])
    assert all((tmp_path / name).exists() for name in needs)


def test_each_augmentation_is_tested_once(tmp_path: Path) -> None:
    def steps() -> dict[str, tuple[bool, list[str]]]:
        made = cross_validation.make_plan(
            CONFIGS[:1], work_root=tmp_path, options=OPTIONS, ttas=['flips']
        )
        return {s.name: (s.done, list(s.command)) for s in made.fold_steps[0]}

    finish(tmp_path, 0)
    test(tmp_path, 0)
    found = steps()
    assert [done for done, _ in found.values()] == [True, True, False]
    command = found['test fold 0 with flips'][1]
    assert command[command.index('--tta') + 1] == 'flips'
    assert '--tta' not in found['test fold 0'][1]
    plain = tmp_path / 'sample/fold0/val.predictions.npz'
    plain.rename(plain.with_name('val.flips.predictions.npz'))
    assert [done for done, _ in steps().values()] == [True, False, True]
    with pytest.raises(ConfigError, match='no setting'):
        cross_validation.make_plan(CONFIGS, work_root=tmp_path, options=OPTIONS, ttas=['sideways'])


@pytest.mark.parametrize(
    ('harm', 'wanted', 'says'),
    [
        pytest.param(
            lambda d: (d / 'best_cell_segm_mAP_50_iter_4.pth').unlink(),
            [False, False],
            'is gone',
            id='best checkpoint gone',
        ),
        pytest.param(
            lambda d: (d / 'best_cell_segm_mAP_50_iter_4.pth').write_bytes(b'other'),
            [False, False],
            'not the file that training ended with',
            id='best checkpoint replaced',
        ),
        pytest.param(
            lambda d: (d / FINISHED).write_text('{"best"'),
            [False, False],
            'is not there',
            id='mark cut',
        ),
        pytest.param(
            lambda d: test(d.parents[1], 0, checkpoint_hash='0' * 16),
            [True, False],
            'another checkpoint',
            id='retrained after the test',
        ),
        pytest.param(
            lambda d: test(d.parents[1], 0, fold_hash='0' * 16),
            [True, False],
            'other folds',
            id='tested with other folds',
        ),
        pytest.param(
            lambda d: (d / 'val.predictions.npz').write_bytes(b'PK'),
            [True, False],
            'cannot be read',
            id='predictions cut',
        ),
        pytest.param(
            lambda d: files.write_json(d / 'tested.json', {'settings': 'other'}),
            [True, False],
            'other settings',
            id='tested with other settings',
        ),
    ],
)
def test_stale_results_are_made_again(tmp_path: Path, harm, wanted: list, says: str) -> None:
    work_dir = finish(tmp_path, 0)
    test(tmp_path, 0)
    harm(work_dir)
    made = cross_validation.make_plan(CONFIGS[:1], work_root=tmp_path, options=OPTIONS)
    assert [step.done for step in made.fold_steps[0]] == wanted
    assert says in made.text()


def test_changed_options_and_configs_are_refused(tmp_path: Path) -> None:
    finish(tmp_path, 0)
    begin(tmp_path, 1)
    assert done(tmp_path)[0][0]
    with pytest.raises(ConfigError, match=r'finished\.json: trained with other settings'):
        plan(tmp_path, ('train_cfg.max_iters=5',))
    with pytest.raises(ConfigError, match='other settings'):
        plan(tmp_path, ())
    (tmp_path / 'sample/fold0' / FINISHED).unlink()
    (tmp_path / 'sample/fold0' / STARTED).unlink()
    with pytest.raises(ConfigError, match=r'started\.json: trained with other settings'):
        plan(tmp_path, ('train_cfg.max_iters=5',))
    # What does not decide the weights may change.
    test_only = (*OPTIONS, 'train_dataloader.num_workers=0', 'model.test_cfg.rcnn.score_thr=0.2')
    assert not plan(tmp_path, test_only).fold_steps[1][0].done


def test_other_folds_are_refused(tmp_path: Path, data: Path) -> None:
    work_dir = finish(tmp_path, 0)
    mark = json.loads((work_dir / FINISHED).read_text())
    assert mark['fold_hash']
    files.write_json(work_dir / FINISHED, {**mark, 'fold_hash': '0' * 16})
    with pytest.raises(ConfigError, match='trained with folds 0000'):
        plan(tmp_path)


@pytest.mark.parametrize(
    ('configs', 'options', 'says'),
    [
        pytest.param((), (), 'no configs given', id='no configs'),
        pytest.param((CONFIGS[0], CONFIGS[0]), (), 'share a fold', id='twice'),
        pytest.param(('no.py',), (), 'no such config file', id='missing'),
        pytest.param(CONFIGS, ('trian_cfg.max_iters=4',), 'trian_cfg', id='misspelt option'),
        pytest.param(
            CONFIGS,
            ('val_dataloader.dataset.data_root=x',),
            'CELLSEG_DATA',
            id='data for some steps only',
        ),
        pytest.param(
            CONFIGS,
            ('max_iters=3',),
            'max_iters: a variable that the config used while it was read, so that changing it now '
            'has no effect; set train_cfg.max_iters instead',
            id='variable of the config',
        ),
        pytest.param(
            CONFIGS,
            ('red_blue_swapped=False',),
            'train_dataloader.dataset.dataset.pipeline.0.red_blue_swapped',
            id='variable used in lists',
        ),
    ],
)
def test_wrong_requests_are_refused(configs: tuple, options: tuple, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        cross_validation.make_plan(configs, options=options)


def test_recipe_is_the_same_as_read_and_as_adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    from cellseg_mm.training.load_config import load_config

    monkeypatch.setenv('LOCAL_RANK', '0')
    options = {'train_dataloader.pin_memory': True, 'train_cfg.max_iters': 4}
    adapted = load_config(CONFIGS[0], cfg_options=options, work_dir='x')
    assert recipe_hash(adapted) == recipe_hash(config(0))
    assert recipe_hash(config(0)) != recipe_hash(config(1))


def test_slurm_script_is_bash_with_the_same_commands(tmp_path: Path) -> None:
    options = ('model.test_cfg.rcnn.score_thr=0.1', "default_scope=it's")
    text = cross_validation.slurm_script(
        CONFIGS, options, work_root=tmp_path / 'a b', ttas=['d4,scales=0.8']
    )
    script = tmp_path / 'job.sh'
    # Commands print themselves instead of running.
    script.write_text(text.replace('python tools', 'printf "%s\\n" python tools'))
    subprocess.run(['bash', '-n', script], check=True)
    for task, config_path in enumerate(CONFIGS):
        printed = subprocess.run(
            ['bash', script],
            env={**os.environ, 'SLURM_ARRAY_TASK_ID': str(task)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        work_dir = str(tmp_path / 'a b' / f'sample/fold{task}')
        common = ['--work-dir', work_dir, '--cfg-options', *options]
        assert printed == [
            *('python', 'tools/train.py', config_path, '--resume', *common),
            *('python', 'tools/test.py', config_path, *common),
            *('python', 'tools/test.py', config_path, '--tta', 'd4,scales=0.8', *common),
        ]
    assert f'--array=0-{len(CONFIGS) - 1}' in text


def test_devices_are_named_as_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,7')
    assert cross_validation.visible_devices() == ['4', '7']
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    assert cross_validation.visible_devices() == ['0', '1']
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    assert cross_validation.visible_devices() == ['']

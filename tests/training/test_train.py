"""training: exact resuming, folds that are checked, errors that name images, stock tools."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cellseg_mm.core.layout import FINISHED
from cellseg_mm.core.trainings import RECORD_KEYS
from tests.support.micro import MICRO, ROOT, free_port

pytestmark = pytest.mark.mm


def options(**changes: object) -> list[str]:
    merged = {**MICRO, **changes}
    return ['--cfg-options', *(f'{key}={json.dumps(value)}' for key, value in merged.items())]


def run(
    command: list[str | Path], data: Path, *, expect: int = 0, folds: Path | None = None
) -> subprocess.CompletedProcess:
    environment = {**os.environ, 'CELLSEG_DATA': str(data), 'PYTHONPATH': str(ROOT)}
    environment.pop('CELLSEG_FOLDS', None)
    if folds is not None:
        environment['CELLSEG_FOLDS'] = str(folds)
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == expect, (done.stdout + done.stderr)[-4000:]
    return done


def train(data: Path, work_dir: Path, *words: str, expect: int = 0, **changes: object):
    command = ['tools/train.py', 'configs/sample/fold0.py', '--work-dir', work_dir, *words]
    return run([*command, *options(**changes)], data, expect=expect)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=False, map_location='cpu')['state_dict']


@pytest.fixture(scope='module')
def trained(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder of an uninterrupted run of four iterations."""
    work_dir = tmp_path_factory.mktemp('trained')
    done = train(sample_data, work_dir)
    assert 'Parameter groups' in done.stdout
    assert 'best checkpoint:' in done.stdout
    return work_dir


def test_resumed_run_ends_with_the_same_bytes(
    sample_data: Path, trained: Path, tmp_path: Path
) -> None:
    # The first run ends at iteration 2 of the same schedule, as if it had been killed there;
    # its newest checkpoint is torn on top, as by a full disk.
    train(sample_data, tmp_path, **{'train_cfg.max_iters': 2})
    (tmp_path / 'iter_3.pth').write_bytes((tmp_path / 'iter_2.pth').read_bytes()[:5000])
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_3.pth'))
    done = train(sample_data, tmp_path, '--resume')
    assert 'iter_3.pth' in done.stdout + done.stderr
    assert 'repeating its validation' in done.stdout
    whole, resumed = weights(trained / 'iter_4.pth'), weights(tmp_path / 'iter_4.pth')
    assert whole.keys() == resumed.keys()
    differing = [name for name in whole if not torch.equal(whole[name], resumed[name])]
    assert differing == []


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        pytest.param({'optim_wrapper.optimizer.lr': 0.5}, 'optim_wrapper', id='rate'),
        pytest.param({'model.neck.num_outs': 5, 'train_cfg.max_iters': 9}, 'model', id='model'),
    ],
)
def test_resuming_with_other_settings_is_refused(
    sample_data: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict,
    named: str,
) -> None:
    from functools import partial

    from cellseg_mm.core.errors import CheckpointError, ConfigError
    from cellseg_mm.training import train as train_module
    from cellseg_mm.training.load_config import load_config

    monkeypatch.setenv('CELLSEG_DATA', str(sample_data))
    monkeypatch.setenv('LOCAL_RANK', '0')
    work_dir = shutil.copytree(trained, tmp_path / 'work')
    read = partial(
        load_config,
        'configs/sample/fold0.py',
        cfg_options={**MICRO, **change},
        work_dir=work_dir,
    )
    with pytest.raises(ConfigError, match=rf'began with other values of {named}'):
        train_module.train(read(), resume='auto')
    with pytest.raises(ConfigError, match=rf'is of a training with other values of {named}'):
        train_module.train(read())  # a new one would mix with it
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r'mixed precision .* found device cpu'):
            train_module.train(read(), amp=True)
    with pytest.raises(CheckpointError, match='no such checkpoint'):
        train_module.train(read(), resume=str(work_dir / 'iter_9.pth'))
    before, after = (sorted(p.name for p in d.iterdir()) for d in (trained, work_dir))
    assert before == after  # nothing was touched
    assert (work_dir / FINISHED).is_file()


def test_data_set_leaves_out_what_its_folds_record(sample_data: Path, tmp_path: Path) -> None:
    from cellseg_mm.data.config import CLASS_NAMES
    from cellseg_mm.data.preparing import prepare
    from cellseg_mm.data.preparing.records import PrepareParams
    from cellseg_mm.pipeline.dataset import CellDataset

    data = shutil.copytree(sample_data, tmp_path / 'data')
    bad = sorted((data / 'train').iterdir())[0]
    (bad / 'image.tif').write_bytes(b'broken')
    test_image = sorted((data / 'test_release').iterdir())[0]
    (tmp_path / 'list.txt').write_text(f'{bad.name}\n{test_image.stem}\n')
    params = PrepareParams(
        out_dir=tmp_path / 'out', exclude_file=tmp_path / 'list.txt', n_folds=2, n_workers=1
    )
    prepare.prepare(data, params).raise_for_errors()
    common = {
        'data_root': str(data),
        'folds_file': str(tmp_path / 'out/folds.json'),
        'metainfo': {'classes': CLASS_NAMES},
    }
    sizes = {s: len(CellDataset(split=s, **common)) for s in ('train', 'val', 'all', 'test')}
    assert sizes['train'] + sizes['val'] == sizes['all'] == 5
    assert sizes['test'] == 1


def test_folds_of_another_name_are_not_made(
    sample_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmengine.config import Config

    from cellseg_mm.core.errors import FoldError
    from cellseg_mm.training import train as train_module

    monkeypatch.setenv('CELLSEG_DATA', str(sample_data))
    monkeypatch.setenv('CELLSEG_FOLDS', str(tmp_path / 'three.json'))
    with pytest.raises(FoldError, match=r'three\.json: no such file'):
        train_module.ensure_folds(Config.fromfile(ROOT / 'configs/sample/fold0.py'))
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_says_where_it_comes_from(sample_data: Path, trained: Path) -> None:
    from cellseg_mm.data.folds import load_folds

    meta = torch.load(trained / 'iter_4.pth', weights_only=False)['meta']['cellseg']
    assert meta['fold'] == 0
    assert meta['fold_hash'] == load_folds(sample_data / 'folds.json').hash
    assert meta['class_names'] == ['epithelial', 'lymphocyte', 'neutrophil', 'macrophage']
    assert meta['versions']['torch']
    assert len(meta['data_hash']) == 16
    mark = json.loads((trained / FINISHED).read_text())
    assert {key: meta[key] for key in RECORD_KEYS} == {key: mark[key] for key in RECORD_KEYS}
    assert meta['parts'] != meta['file_parts']  # MICRO is a set of options


def test_scoring_finds_the_best_and_writes_instances(
    sample_data: Path, trained: Path, tmp_path: Path
) -> None:
    from cellseg_mm.data.folds import load_folds
    from cellseg_mm.results.predictions import load_predictions

    command = ['tools/test.py', 'configs/sample/fold0.py', '--work-dir', trained, '--out', tmp_path]
    run([*command, *options()], sample_data)
    predictions = load_predictions(tmp_path / 'val.predictions.npz')
    folds = load_folds(sample_data / 'folds.json')
    assert sorted(s.name for s in predictions.sets) == sorted(folds.val_names(0))
    assert predictions.provenance['fold'] == 0
    assert predictions.provenance['fold_hash'] == folds.hash
    assert predictions.provenance['checkpoint_hash']
    scores = json.loads((tmp_path / 'val.scores.json').read_text())
    assert scores['cap'] == 30


def test_checkpoint_of_another_fold_is_refused(
    sample_data: Path, trained: Path, tmp_path: Path
) -> None:
    checkpoint = trained / 'iter_4.pth'
    command = ['tools/test.py', 'configs/sample/fold1.py', checkpoint, '--work-dir', tmp_path]
    done = run([*command, *options()], sample_data, expect=2)
    assert 'trained for fold 0' in done.stderr
    assert 'the config is fold 1' in done.stderr
    assert 'Traceback' not in done.stderr.split('error:')[-1]


def test_checkpoint_of_other_folds_is_refused(
    sample_data: Path, trained: Path, tmp_path: Path
) -> None:
    from cellseg_mm.data.folds import load_folds, save_folds

    folds = load_folds(sample_data / 'folds.json')
    swapped = type(folds)(folds.names_by_fold[::-1], folds.groups, folds.method, folds.seed)
    save_folds(tmp_path / 'folds.json', swapped)
    command = ['tools/test.py', 'configs/sample/fold0.py', trained / 'iter_4.pth']
    done = run(
        [*command, '--work-dir', tmp_path, *options()],
        sample_data,
        expect=2,
        folds=tmp_path / 'folds.json',
    )
    assert folds.hash in done.stderr
    assert swapped.hash in done.stderr


def test_infinite_loss_stops_and_names_the_images(sample_data: Path, tmp_path: Path) -> None:
    done = train(
        sample_data,
        tmp_path,
        expect=2,
        **{'model.roi_head.mask_head.loss_mask.loss_weight': 1e39},
    )
    assert 'loss_mask not finite at iteration 1' in done.stderr
    saved = json.loads((tmp_path / 'invalid_loss_rank0.json').read_text())
    assert len(saved['images']) == 2
    assert all(Path(name).is_file() for name in saved['images'])


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        pytest.param({'modle.backbone.depth': 18}, 'modle', id='misspelt key'),
        pytest.param(
            {'optim_wrapper.paramwise_cfg.custom_keys.bakbone.lr_mult': 0.1},
            'bakbone',
            id='learning-rate key that matches nothing',
        ),
        pytest.param(
            {'train_dataloader.dataset.dataset.fold': 7}, 'folds 0 to 1', id='no such fold'
        ),
    ],
)
def test_settings_without_effect_are_refused(
    sample_data: Path, tmp_path: Path, change: dict, sentence: str
) -> None:
    done = train(sample_data, tmp_path, expect=2, **change)
    assert sentence in done.stderr


@pytest.mark.parametrize(
    ('head', 'n_classes'),
    [('bbox_head', 5), ('mask_head', 5), ('bbox_head', 2)],
)
def test_heads_of_another_number_of_classes_are_refused(
    sample_data: Path, monkeypatch: pytest.MonkeyPatch, head: str, n_classes: int
) -> None:
    from types import SimpleNamespace

    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    from cellseg_mm.core.errors import ConfigError
    from cellseg_mm.pipeline.dataset import CellDataset
    from cellseg_mm.training.fold_guard import ProvenanceHook
    from cellseg_mm.training.load_config import adapt_to_machine

    monkeypatch.setenv('CELLSEG_DATA', str(sample_data))
    cfg = Config.fromfile(ROOT / 'configs/sample/fold0.py')
    adapt_to_machine(cfg)
    settings = cfg.val_dataloader.dataset
    data = CellDataset(data_root=settings.data_root, split='val', metainfo=settings.metainfo)
    loop = SimpleNamespace(dataloader=SimpleNamespace(dataset=data))
    with DefaultScope.overwrite_default_scope('mmdet'):
        right = MODELS.build(cfg.model)
        cfg.model.roi_head[head].num_classes = n_classes
        wrong = MODELS.build(cfg.model)
    hook = ProvenanceHook()
    hook.before_train(SimpleNamespace(train_loop=loop, val_loop=None, model=right))
    says = rf'model.roi_head.{head}.num_classes={n_classes}: the data set names 4 classes'
    with pytest.raises(ConfigError, match=says):
        hook.before_train(SimpleNamespace(train_loop=loop, val_loop=None, model=wrong))
    with pytest.raises(ConfigError, match=says):
        hook.before_test(SimpleNamespace(test_loop=loop, model=wrong, _load_from=None))


def test_only_the_main_process_looks_for_its_checkpoints(
    sample_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others end first; what the main process still writes is not theirs to judge."""
    from types import SimpleNamespace

    from mmengine.config import Config

    from cellseg_mm.training import train as train_module

    monkeypatch.setenv('CELLSEG_DATA', str(sample_data))
    cfg = Config.fromfile(ROOT / 'configs/sample/fold0.py')
    cfg.work_dir = str(tmp_path)  # empty: a look would raise
    monkeypatch.setattr(train_module, 'is_main_process', lambda: False)
    runner = SimpleNamespace(train=lambda: None, hooks=[])
    monkeypatch.setattr(train_module, '_runner', lambda _: runner)
    told = tmp_path / 'best_x.pth'
    answers = iter(['', told])  # the lock is free; the best checkpoint
    monkeypatch.setattr(
        train_module, 'broadcast_object_list', lambda box: box.__setitem__(0, next(answers))
    )
    assert train_module.train(cfg) == told
    assert not (tmp_path / FINISHED).exists()


@pytest.mark.parametrize(('launcher', 'joins'), [('none', []), ('pytorch', ['pytorch', 'nccl'])])
def test_processes_join_before_anything_is_written(
    sample_data: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, joins: list[str]
) -> None:
    """Where there is CUDA too: before, each process takes itself for the main one."""
    from mmengine.config import Config

    from cellseg_mm.training import load_config as load_config_module

    monkeypatch.setenv('CELLSEG_DATA', str(sample_data))
    cfg = Config.fromfile(ROOT / 'configs/sample/fold0.py')
    cfg.launcher = launcher
    found: list[str] = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(load_config_module, 'set_multi_processing', lambda **_: None)
    monkeypatch.setattr(
        load_config_module, 'init_dist', lambda name, backend: found.extend([name, backend])
    )
    load_config_module.adapt_to_machine(cfg)
    assert found == joins


def test_settings_that_laptops_need(sample_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmengine.config import Config

    from cellseg_mm.cli import explain
    from cellseg_mm.training import load_config as load_config_module
    from cellseg_mm.training import train as train_module

    monkeypatch.setenv('CELLSEG_DATA', str(sample_data))
    cfg = Config.fromfile(ROOT / 'configs/sample/fold0.py')
    cfg.merge_from_dict({'val_dataloader.num_workers': 0, 'val_dataloader.prefetch_factor': 2})
    load_config_module.adapt_to_machine(cfg)  # torch refuses persistent_workers without workers
    assert not {'persistent_workers', 'prefetch_factor'} & set(cfg.val_dataloader)
    assert cfg.train_dataloader.persistent_workers
    # A second metric makes the evaluator a list.
    cfg.test_evaluator = [{'type': 'CocoMetric'}, cfg.test_evaluator]
    assert train_module._metric_of(cfg).type == 'CellMetric'
    train_module._augment_test(cfg, 'hflip')
    assert train_module._metric_of(cfg).provenance == {'tta': 'hflip'}
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert explain(caught.value).startswith('the device ran out of memory (')


def test_two_gloo_processes_train_and_score(sample_data: Path, tmp_path: Path) -> None:
    words = ['-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={free_port()}']
    command = [*words, 'tools/train.py', 'configs/sample/fold0.py', '--launcher', 'pytorch']
    done = run([*command, '--work-dir', tmp_path, *options()], sample_data)
    assert 'gloo' in done.stdout + done.stderr
    assert (tmp_path / 'iter_4.pth').is_file()
    assert (tmp_path / 'finished.json').is_file()


def test_stock_mmdetection_tools_run_our_configs(
    sample_data: Path, trained: Path, tmp_path: Path
) -> None:
    import mmdet

    tools = Path(mmdet.__file__).parent / '.mim/tools'
    command = [tools / 'train.py', 'configs/sample/fold0.py', '--work-dir', tmp_path]
    run([*command, *options()], sample_data)
    mine, stock = weights(trained / 'iter_4.pth'), weights(tmp_path / 'iter_4.pth')
    assert all(torch.equal(mine[name], stock[name]) for name in mine)
    best = next(tmp_path.glob('best_*.pth'))
    # test.py imports mmdet.models before it reads a config
    command = ['-m', 'cellseg_mm', tools / 'test.py', 'configs/sample/fold0.py', best]
    done = run([*command, '--work-dir', tmp_path, *options()], sample_data)
    assert 'segm_mAP_50' in done.stdout

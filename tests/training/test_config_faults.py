"""training.config_faults: settings that do nothing are said before anything is computed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mmengine.config import Config

import cellseg_mm.components
from cellseg_mm.core.errors import ConfigError
from cellseg_mm.training import config_faults as faults_module
from cellseg_mm.training.config_faults import class_faults, config_faults, schedule_faults
from cellseg_mm.training.faults import Fault
from cellseg_mm.training.known_options import names_of, option_faults
from cellseg_mm.training.load_config import load_config
from tests.support.micro import ROOT

pytestmark = pytest.mark.mm
assert cellseg_mm.components

SAMPLE = ROOT / 'configs/sample/fold0.py'
RECIPES = [ROOT / 'configs/fold0.py', *sorted((ROOT / 'configs').glob('*/fold0.py'))]


def texts(faults: list[Fault], *, is_error: bool) -> str:
    return '\n'.join(one.text for one in faults if one.is_error is is_error)


@pytest.mark.parametrize('path', RECIPES, ids=lambda p: p.parent.name)
def test_our_own_recipes_are_without_fault(path: Path) -> None:
    assert list(config_faults(Config.fromfile(path), path)) == []


def test_a_dumped_recipe_is_without_fault(tmp_path: Path) -> None:
    path = tmp_path / 'dumped.py'
    Config.fromfile(SAMPLE).dump(path)
    assert list(config_faults(Config.fromfile(path), path)) == []


# ---- variables of a child config


def child_of(tmp_path: Path, text: str, base: Path = SAMPLE) -> list[Fault]:
    path = tmp_path / 'child.py'
    relative = os.path.relpath(base, tmp_path)
    path.write_text(f'_base_ = {relative!r}\n{text}\n')
    return list(config_faults(Config.fromfile(path), path))


@pytest.mark.parametrize(
    ('text', 'sentence'),
    [
        pytest.param(
            'red_blue_swapped = False',
            'set train_dataloader.dataset.dataset.pipeline.0.red_blue_swapped, ',
            id='used deep in a pipeline',
        ),
        pytest.param('max_iters = 1', 'mask_rcnn_sample.py, line', id='length'),
        pytest.param(
            "metainfo = dict(classes=('a', 'b'))", '.metainfo', id='a dict that is merged'
        ),
        pytest.param("data_root = 'elsewhere'", 'dataset.data_root', id='the data'),
        pytest.param('train_pipeline = []', '(train_dataloader)', id='a pipeline'),
        pytest.param('num_classes = 7', 'roi_head.bbox_head.num_classes', id='key of a head'),
        pytest.param('train_dataloder = dict()', 'did you mean train_dataloader?', id='misspelt'),
    ],
)
def test_a_variable_that_changes_nothing(tmp_path: Path, text: str, sentence: str) -> None:
    found = child_of(tmp_path, text)
    name = text.split()[0]
    assert len(found) == 1
    assert found[0].is_error
    assert f'child.py, line 2: {name} is ' in found[0].text
    assert sentence in found[0].text


@pytest.mark.parametrize(
    'text',
    [
        pytest.param('red_blue_swapped = True', id='the value that it has'),
        pytest.param(
            'px = 96\ntest_dataloader = dict(dataset=dict(indices=px))', id='used in the child'
        ),
        pytest.param('_hidden = 3', id='private'),
        pytest.param('um_per_px = 0.25', id='what predicting reads'),
    ],
)
def test_a_variable_that_does_no_harm(tmp_path: Path, text: str) -> None:
    assert child_of(tmp_path, text) == []


def test_a_variable_that_a_grandchild_reads(tmp_path: Path) -> None:
    middle = tmp_path / 'middle.py'
    middle.write_text(f'_base_ = {os.path.relpath(SAMPLE, tmp_path)!r}\nshown = 3\n')
    used = 'default_hooks = dict(logger=dict(interval=_base_.shown))'
    assert child_of(tmp_path, used, middle) == []
    (fault,) = child_of(tmp_path, 'load_from = None', middle)
    assert not fault.is_error
    assert 'middle.py, line 2: shown is read by nothing' in fault.text


# ---- misspelt options


@pytest.mark.parametrize(
    ('option', 'meant'),
    [
        ('default_hooks.checkpoint.intervall', 'interval'),  # the hook takes **kwargs
        ('default_hooks.logger.intervals', 'interval'),
        ('randomness.sed', 'seed'),
        ('env_cfg.cudnn_benchmarks', 'cudnn_benchmark'),
        ('env_cfg.mp_cfg.mp_start_methode', 'mp_start_method'),
        ('env_cfg.dist_cfg.bakend', 'backend'),
        ('model.test_cfg.rcnn.max_per_image', 'max_per_img'),
        ('model.test_cfg.rcnn.nms.iou_treshold', 'iou_threshold'),
        ('model.train_cfg.rcnn.sampler.numm', 'num'),
        ('model.train_cfg.rpn.assigner.min_pos', 'min_pos_iou'),
        ('model.backbone.frozen_stage', 'frozen_stages'),
        ('model.neck.norm_cfg.requires_grd', 'requires_grad'),
        ('model.rpn_head.anchor_generator.scale', 'scales'),
        ('model.roi_head.mask_roi_extractor.roi_layer.output_sise', 'output_size'),
        ('train_dataloader.batchsize', 'batch_size'),
        ('train_dataloader.sampler.shufle', 'shuffle'),
        ('train_dataloader.dataset.dataset.metainfo.pallete', 'palette'),
        ('train_dataloader.dataset.dataset.pipeline.2.ratio_rang', 'ratio_range'),
        ('optim_wrapper.optimizer.weight_decy', 'weight_decay'),
        ('optim_wrapper.accumulative_count', 'accumulative_counts'),
        ('optim_wrapper.clip_grad.maxnorm', 'max_norm'),
        ('optim_wrapper.paramwise_cfg.norm_decay', 'norm_decay_mult'),
        ('optim_wrapper.paramwise_cfg.custom_keys.backbone.lr_mul', 'lr_mult'),
        ('param_scheduler.0.start_fac', 'start_factor'),
        ('train_cfg.max_iter', 'max_iters'),
        ('val_cfg.fp', ''),
        ('val_evaluator.max_per_image', 'max_per_img'),
        ('visualizer.save_dirr', 'save_dir'),
        ('log_processor.windowsize', 'window_size'),
        ('auto_scale_lr.base_batchsize', 'base_batch_size'),
        ('optim_wrapper.optimizer.learning_rate', ''),
        ('model.train_cfg.rcnn.sampler.anything', ''),  # taken by **kwargs that nothing reads
    ],
)
def test_a_misspelt_option_names_the_nearest(option: str, meant: str) -> None:
    cfg = Config.fromfile(SAMPLE)
    cfg.merge_from_dict({option: 1})
    ((place, fault),) = option_faults(cfg)
    assert place == option
    assert fault.is_error
    assert fault.text.startswith(f'{option}: ')
    assert (f'did you mean {meant}?' if meant else 'known are ') in fault.text


def test_an_option_of_no_likeness_in_test_cfg_is_a_warning() -> None:
    cfg = Config.fromfile(SAMPLE)
    cfg.merge_from_dict({'model.test_cfg.rcnn.zzz': 1})
    ((_, fault),) = option_faults(cfg)
    assert not fault.is_error  # MMDetection's code was searched, not executed


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        ({'default_hooks.checkpont.interval': 5}, 'did you mean checkpoint?'),
        ({'custom_hooks': [{'type': 'EMAHok'}]}, 'there is no EMAHok; did you mean EMAHook?'),
        ({'optim_wrapper.optimizer.type': 'AdamWW'}, 'did you mean AdamW?'),
    ],
)
def test_a_misspelt_hook_or_type(change: dict, sentence: str) -> None:
    cfg = Config.fromfile(SAMPLE)
    cfg.merge_from_dict(change)
    ((_, fault),) = option_faults(cfg)
    assert fault.is_error
    assert sentence in fault.text


def test_options_are_followed_through_constructors() -> None:
    class Base:
        def __init__(self, first: int, **kwargs: int) -> None:
            self.second = kwargs.get('second', 0) + first

    class Handing(Base):
        def __init__(self, third: int, **kwargs: int) -> None:
            super().__init__(**kwargs)
            self.third = third

    class Dropping(Base):
        def __init__(self, third: int, **kwargs: int) -> None:
            super().__init__(third)

    class Using(Base):
        def __init__(self, **kwargs: int) -> None:
            self.all = kwargs

    assert names_of(Base) == ({'first', 'second'}, False)
    assert names_of(Handing) == ({'first', 'second', 'third'}, False)
    assert names_of(Dropping) == ({'third'}, False)
    assert names_of(Using) == (frozenset(), True)


# ---- classes and colours

TRAIN = 'train_dataloader.dataset.dataset.metainfo'
BOTH = ('train_dataloader.dataset.dataset', 'val_dataloader.dataset', 'test_dataloader.dataset')


def with_classes(classes: object, **more: object) -> Config:
    cfg = Config.fromfile(SAMPLE)
    for place in BOTH:
        cfg.merge_from_dict({f'{place}.metainfo.classes': classes})
        cfg.merge_from_dict({f'{place}.metainfo.{key}': value for key, value in more.items()})
    return cfg


FOUR = ['a', 'b', 'c', 'd']


@pytest.mark.parametrize(
    ('classes', 'more', 'sentence'),
    [
        pytest.param('cell', {}, "classes is the text 'cell', each letter", id='a text'),
        pytest.param(['a', 'b', 'c', 4], {}, 'expected a list of texts', id='a number'),
        pytest.param(['a', 'b ', 'c', 'd'], {}, "class 'b ' is empty or has blanks", id='blanks'),
        pytest.param(['a', '', 'c', 'd'], {}, "class '' is empty", id='empty'),
        pytest.param(['a', 'b', 'c', 'A'], {}, 'class a occurs more than once', id='twice'),
        pytest.param(
            ['\u00e4', 'a\u0308', 'c', 'd'], {}, 'occurs more than once', id='two writings of one'
        ),
        pytest.param(FOUR[:3], {}, 'bbox_head.num_classes=4: the data set names 3', id='heads'),
        pytest.param(FOUR, {'palette': [(0, 0, 300)] * 4}, 'three numbers of 0 to 255', id='256'),
        pytest.param(FOUR, {'palette': ['red'] * 4}, 'three numbers', id='a name'),
    ],
)
def test_classes_that_cannot_be_meant(classes: object, more: dict, sentence: str) -> None:
    assert sentence in texts(list(class_faults(with_classes(classes, **more))), is_error=True)


@pytest.mark.parametrize(
    ('palette', 'sentence'),
    [
        pytest.param([(0, 0, 1), (0, 0, 2)], '2 colours for 4 classes', id='too few'),
        pytest.param([(0, 0, i) for i in range(5)], 'the rest is unused', id='too many'),
        pytest.param([(0, 0, 1)] * 4, 'two classes have one colour', id='one for all'),
    ],
)
def test_odd_palettes_are_warned_of(palette: list, sentence: str) -> None:
    found = list(class_faults(with_classes(FOUR, palette=palette)))
    assert texts(found, is_error=True) == ''
    assert sentence in texts(found, is_error=False)


def test_loaders_of_different_classes() -> None:
    cfg = Config.fromfile(SAMPLE)
    cfg.merge_from_dict({f'{TRAIN}.classes': FOUR})
    found = list(class_faults(cfg))
    assert 'the same in each loader' in texts(found, is_error=True)


# ---- schedules


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        pytest.param({'train_cfg.max_iters': 900}, 'end at 200, training at train_cfg', id='short'),
        pytest.param({'train_cfg.max_iters': 100}, 'end at 200, training', id='long'),
        pytest.param({'train_cfg.max_iters': 40}, 'the warm-up lasts to iteration 50', id='warm'),
        pytest.param({'param_scheduler.1.T_max': 90}, 'T_max is 90, but it runs 200', id='T_max'),
        pytest.param({'param_scheduler.1.by_epoch': True}, 'counts epochs', id='epochs'),
        pytest.param({'param_scheduler.1.begin': 200}, 'it does nothing', id='begins too late'),
        pytest.param(
            {'param_scheduler.1.milestones': [9, 300]},
            'milestones [300] are after',
            id='milestones',
        ),
    ],
)
def test_a_schedule_that_does_not_fit(change: dict, sentence: str) -> None:
    cfg = Config.fromfile(SAMPLE)
    cfg.train_cfg.max_iters = 200
    cfg.param_scheduler = [
        {'type': 'LinearLR', 'start_factor': 0.01, 'by_epoch': False, 'begin': 0, 'end': 50},
        {'type': 'CosineAnnealingLR', 'by_epoch': False, 'begin': 0, 'end': 200, 'T_max': 200},
    ]
    assert list(schedule_faults(cfg)) == []
    cfg.merge_from_dict(change)
    found = list(schedule_faults(cfg))
    assert texts(found, is_error=True) == ''
    assert sentence in texts(found, is_error=False)


# ---- where it is said


def test_every_tool_refuses_what_is_wrong_and_warns_of_what_is_odd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(faults_module, 'print_log', lambda text, *_, **__: said.append(text))
    with pytest.raises(ConfigError, match=r'^randomness\.sed: .*did you mean seed'):
        load_config(SAMPLE, cfg_options={'randomness.sed': 1})
    assert said == []
    for _ in range(2):
        load_config(SAMPLE, cfg_options={'train_cfg.max_iters': 123})
    assert [text[:30] for text in said] == ['param_scheduler: the scheduler']


def test_all_errors_are_said_at_once() -> None:
    options = {'randomness.sed': 1, 'train_cfg.max_iter': 1}
    with pytest.raises(ConfigError, match=r'(?s)sed.*max_iter|max_iter.*sed'):
        load_config(SAMPLE, cfg_options=options)

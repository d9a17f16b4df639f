"""check: each fault that the doctor knows is found and says what to do; exact anchor overlaps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

import cellseg_mm.components
from cellseg_mm.checks import settings as check_settings
from cellseg_mm.checks.lines import Line, guarded, summary
from cellseg_mm.checks.on_disk import check_data, check_work_dir, in_force_of
from cellseg_mm.checks.run import check_settings_of
from cellseg_mm.checks.settings import Truth
from cellseg_mm.core import files, provenance
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.trainings import MARK_VERSION
from cellseg_mm.data.config import CLASS_NAMES
from cellseg_mm.data.folds import Folds, load_folds, save_folds
from cellseg_mm.data.labels import find_cases, read_gt
from cellseg_mm.data.preparing import prepare
from cellseg_mm.data.preparing.groups import GroupRule
from cellseg_mm.data.preparing.records import PrepareParams
from cellseg_mm.pipeline.dataset import data_fingerprint
from cellseg_mm.results.predictions import Predictions, save_predictions
from cellseg_mm.training.marks import recipe_parts, recipe_record
from tests.support.micro import ROOT

pytestmark = pytest.mark.mm
assert cellseg_mm.components


@pytest.fixture
def config(sample_config: Config) -> Config:
    return sample_config


@pytest.fixture(scope='module')
def truth(sample_data: Path) -> Truth:
    cases = tuple(find_cases(sample_data, 'train', 4))
    return Truth(cases, tuple(read_gt(case) for case in cases))


def found(lines: list[Line], level: str) -> str:
    return '\n'.join(str(line) for line in lines if line.level == level)


# ---- settings


def test_sizes_at_network_scale_are_those_of_the_pipeline(config: Config, truth: Truth) -> None:
    pipeline = config.val_dataloader.dataset.pipeline
    pipeline[1] = {'type': 'Resize', 'scale': (100, 50), 'keep_ratio': True}
    for case, hw in zip(
        truth.cases, check_settings.scaled_hws(config, 'val_dataloader', truth.cases), strict=True
    ):
        factor = min(100 / max(case.image_hw), 50 / min(case.image_hw))
        assert hw == pytest.approx([side * factor for side in case.image_hw], abs=0.51)


def test_random_sizes_are_the_same_each_time(config: Config, truth: Truth) -> None:
    first = check_settings.scaled_hws(config, 'train_dataloader', truth.cases)
    assert check_settings.scaled_hws(config, 'train_dataloader', truth.cases) == first
    assert check_settings.scaled_hws(config, 'train_dataloader', truth.cases, seed=1) != first


def test_sample_config_is_well(config: Config, truth: Truth) -> None:
    lines = [
        *check_settings.check_learning_rates(config),
        *check_settings.check_norms(config, has_cuda=False),
        *check_settings.check_meta_keys(config),
        *check_settings.check_anchors(config, truth),
        *check_settings.check_min_sizes(config, truth),
        *check_settings.check_caps(config, truth),
        *check_settings.check_colours(config, truth),
    ]
    assert found(lines, 'error') == ''
    assert '(all others)' in found(lines, 'ok')  # the table of learning rates
    assert {line.what for line in lines if line.level == 'warn'} <= {'evaluator'}


COS = {'type': 'CosineAnnealingLR', 'by_epoch': False, 'begin': 0, 'end': 200, 'T_max': 200}
KEYS = 'optim_wrapper.paramwise_cfg.custom_keys'
RATES = {'backbone': {'lr_mult': 0.1}}
# What is changed, in which check, at which level, and a part of the sentence.
FAULTS = {
    'unmatched key': (
        {KEYS: {'bakbone': {'lr_mult': 0.1}}},
        *('check_learning_rates', 'error', "'bakbone'"),
    ),
    'number of classes': (
        {'model.roi_head.mask_head.num_classes': 5},
        *('check_learning_rates', 'error', 'mask_head.num_classes=5: the data set names 4'),
    ),
    'absolute floor': (
        {KEYS: RATES, 'param_scheduler': [{**COS, 'eta_min': 1e-5}]},
        *('check_learning_rates', 'warn', 'end at 0.01 to 0.1 of their own rates'),
    ),
    'floor above a rate': (
        {KEYS: RATES, 'param_scheduler': [{**COS, 'eta_min': 2e-4}]},
        *('check_learning_rates', 'error', 'not below the rate 0.0001 of one group'),
    ),
    'MMSyncBN': (
        {'model.roi_head.mask_head.norm_cfg': {'type': 'MMSyncBN'}},
        *('check_norms', 'error', 'mask_head.norm_cfg'),
    ),
    'frozen statistics of nothing': (
        {'model.backbone.norm_eval': True, 'model.backbone.init_cfg': None},
        *('check_norms', 'error', 'statistics of nothing'),
    ),
    'batch of two': ({'train_dataloader.batch_size': 2}, *('check_norms', 'warn', 'batches of 2')),
    'meta keys': (
        {'test_dataloader.dataset.pipeline.2.meta_keys': ('img_id', 'ori_shape')},
        *('check_meta_keys', 'error', 'test_dataloader: the pipeline packs no name, img_path'),
    ),
    'large anchors': (
        {
            'model.rpn_head.anchor_generator.scales': [16],
            'model.train_cfg.rpn.assigner.min_pos_iou': 0.3,
        },
        *('check_anchors', 'error', 'get no anchor (best IoU below 0.3)'),
    ),
    'anchors that fit badly': (
        {'model.rpn_head.anchor_generator.scales': [16]},
        *('check_anchors', 'warn', 'choose smaller anchor_generator.scales'),
    ),
    'filter by size': (
        {'train_dataloader.dataset.dataset.pipeline.6.min_gt_bbox_wh': (15, 15)},
        *('check_min_sizes', 'warn', 'FilterAnnotations.min_gt_bbox_wh=15 takes away'),
    ),
    'cap': (
        {'model.test_cfg.rcnn.max_per_img': 5},
        *('check_caps', 'warn', 'rcnn.max_per_img=5: 5 images have more cells'),
    ),
    'proposals': (
        {'model.test_cfg.rpn.nms_pre': 5},
        *('check_caps', 'warn', 'rpn.nms_pre (per level)=5'),
    ),
    'high threshold': (
        {'model.test_cfg.rcnn.score_thr': 0.5},
        *('check_caps', 'warn', 'score_thr=0.5 cuts'),
    ),
    'metric of another cap': (
        {'val_evaluator.max_per_img': 7},
        *('check_caps', 'warn', 'val_evaluator.max_per_img=7, the model has'),
    ),
    'red and blue': (
        {'train_dataloader.dataset.dataset.pipeline.0.red_blue_swapped': False},
        *('check_colours', 'warn', 'set red_blue_swapped=True in every LoadCellImage'),
    ),
}  # fmt: skip


@pytest.mark.parametrize('fault', FAULTS)
def test_fault_is_found(config: Config, truth: Truth, fault: str) -> None:
    changes, name, level, sentence = FAULTS[fault]
    needs_truth = name in ('check_anchors', 'check_min_sizes', 'check_caps', 'check_colours')
    args = (config, truth) if needs_truth else (config,)
    before = list(getattr(check_settings, name)(*args))
    assert sentence not in found(before, level)
    config.merge_from_dict(changes)
    assert sentence in found(list(getattr(check_settings, name)(*args)), level)


def test_colours_hold_for_most_images_of_the_sample(config: Config, truth: Truth) -> None:
    (line,) = check_settings.check_colours(config, truth)
    assert line.level == 'ok'
    assert '100 % of 6 images' in line.text


# ---- files


def good_origin(data: Path) -> dict:
    return {
        'fold': 0,
        'split': 'train',
        'fold_hash': load_folds(data / 'folds.json').hash,
        'data_hash': data_fingerprint(find_cases(data, 'train', 4)),
        'class_names': list(CLASS_NAMES),
        'commit': 'abc',
        'versions': provenance.versions(),
        'checkpoint_hash': 'x',
    }


def save_model(path: Path, origin: dict | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = {'cfg': 'x = 1', **({'cellseg': origin} if origin else {})}
    torch.save({'meta': meta, 'state_dict': {'w': torch.ones(2)}}, path)


def look(config: Config, work_dir: Path) -> list[Line]:
    return list(check_work_dir(work_dir, in_force_of(config)))


def test_whole_files_are_well(config: Config, sample_data: Path, tmp_path: Path) -> None:
    origin = good_origin(sample_data)
    save_model(tmp_path / 'best_x.pth', origin)
    best_hash = files.file_hash(tmp_path / 'best_x.pth')[:16]
    origin = {**origin, 'split': 'val', 'checkpoint_hash': best_hash}
    one = InstanceSet.empty('a', 1, (5, 7))
    save_predictions(tmp_path / 'val.predictions.npz', Predictions((one,), origin))
    files.write_json(tmp_path / 'val.scores.json', {'provenance': origin})
    mark = {'version': MARK_VERSION, 'best': 'best_x.pth', 'best_hash': best_hash}
    files.write_json(tmp_path / 'finished.json', mark)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'best_x.pth'))
    lines = look(config, tmp_path)
    assert [line.level for line in lines] == ['ok'] * 4, lines


def test_results_of_another_training_are_found(
    config: Config, sample_data: Path, tmp_path: Path
) -> None:
    origin = {**good_origin(sample_data), 'split': 'val', 'checkpoint_hash': 'an earlier one'}
    other = {**origin, **recipe_record(config)}
    other['parts'] = {**other['parts'], 'optim_wrapper': 'other'}
    other |= {'config_parts': other['parts'], 'file_parts': other['parts']}
    save_model(tmp_path / 'best_x.pth', {**other, 'class_names': list(CLASS_NAMES[::-1])})
    files.write_json(
        tmp_path / 'started.json', {'version': MARK_VERSION, 'parts': recipe_parts(config)}
    )
    save_predictions(tmp_path / 'val.predictions.npz', Predictions((), origin))
    swapped = {**origin, 'class_names': list(CLASS_NAMES[::-1])}
    files.write_json(tmp_path / 'val.scores.json', {'provenance': swapped})
    (tmp_path / 'last_checkpoint').write_text('/elsewhere/iter_9.pth')
    lines = look(config, tmp_path)
    warnings, errors = found(lines, 'warn'), found(lines, 'error')
    assert 'best_x.pth: its classes are macrophage, neutrophil, lymph' in errors
    assert 'best_x.pth: was trained with other values of optim_wrapper than started.json' in errors
    assert 'best_x.pth: was trained with other values of optim_wrapper than the config' in warnings
    assert 'val.predictions.npz: is of another checkpoint (an earlier one)' in errors
    assert 'val.scores.json: is of another checkpoint (an earlier one)' in errors
    assert 'val.scores.json: its classes are macrophage' in errors
    assert 'last_checkpoint: names /elsewhere/iter_9.pth, which is in another folder' in warnings


@pytest.mark.parametrize(
    ('change', 'level', 'sentence'),
    [
        pytest.param({'fold_hash': 'other'}, 'error', 'would not be out of fold', id='folds'),
        pytest.param({'data_hash': 'other'}, 'warn', 'made from data other, there is', id='data'),
        pytest.param({'commit': 'abc+'}, 'warn', 'uncommitted changes on abc', id='commit'),
        pytest.param({'versions': {'torch': '1.0'}}, 'warn', 'torch 1.0 (now', id='versions'),
    ],
)
def test_files_of_other_origin(
    config: Config, sample_data: Path, tmp_path: Path, change: dict, level: str, sentence: str
) -> None:
    save_model(tmp_path / 'iter_2.pth', {**good_origin(sample_data), **change})
    assert sentence in found(look(config, tmp_path), level)


def test_files_without_origin_or_broken(config: Config, sample_data: Path, tmp_path: Path) -> None:
    origin = good_origin(sample_data)
    save_model(tmp_path / 'iter_1.pth', None)
    save_model(tmp_path / 'iter_2.pth', {k: v for k, v in origin.items() if k != 'data_hash'})
    save_model(tmp_path / 'iter_3.pth', origin)
    content = (tmp_path / 'iter_3.pth').read_bytes()
    (tmp_path / 'iter_3.pth').write_bytes(content[: len(content) // 2])
    (tmp_path / 'val.predictions.npz').write_bytes(b'PK')
    (tmp_path / 'val.scores.json').write_text('{"AP": ')
    mark = {'version': MARK_VERSION, 'best': 'iter_2.pth', 'best_hash': '0'}
    (tmp_path / 'finished.json').write_text(json.dumps(mark))
    (tmp_path / 'oof.scores.json').write_text('{"AP": 0.5}')
    (tmp_path / '.tmp-1-iter_4.pth').write_bytes(b'half')
    lines = look(config, tmp_path)
    warnings, errors = found(lines, 'warn'), found(lines, 'error')
    assert 'iter_1.pth: opens, does not say where it comes from' in warnings
    assert 'iter_2.pth: does not say data_hash' in warnings
    assert '1 unfinished files of killed runs' in warnings
    assert 'oof.scores.json: does not say where it comes from' in warnings
    assert 'iter_3.pth: is cut short or damaged' in errors
    assert 'val.predictions.npz: cannot be read' in errors
    assert 'val.scores.json: cannot be read' in errors
    assert 'iter_2.pth is not the file that training ended with' in errors
    assert summary(lines) == '0 OK, 4 warnings, 4 errors'


def test_a_checkpoint_that_changed_after_its_predictions(
    config: Config, sample_data: Path, tmp_path: Path
) -> None:
    save_model(tmp_path / 'best_x.pth', good_origin(sample_data))
    origin = {**good_origin(sample_data), 'checkpoint': str(tmp_path / 'best_x.pth')}
    save_predictions(tmp_path / 'p.npz', Predictions((), origin))
    assert 'best_x.pth has changed since' in found(look(config, tmp_path), 'warn')


# ---- data and the whole


def test_folds_that_split_a_group(config: Config, sample_data: Path, tmp_path: Path) -> None:
    data = tmp_path / 'data'
    shutil.copytree(sample_data, data)
    folds = load_folds(data / 'folds.json')
    first = [names[0] for names in folds.names_by_fold]  # one of each fold is of patient p
    rows = [f'{name},{"p" if name in first else "q"}' for name in folds.names]
    (data / 'manifest.csv').write_text('\n'.join(['uuid,patient', *rows]))
    save_folds(data / 'folds.json', replace(folds, rule=None))  # an older file: the table tells
    config.train_dataloader.dataset.dataset.data_root = str(data)
    config.train_dataloader.dataset.dataset.folds_file = str(data / 'folds.json')
    assert '2 groups (patients' in found(list(check_data(config)), 'warn')
    assert load_folds(data / 'folds.json').hash == folds.hash  # nothing was written


def test_folds_are_judged_by_the_rule_that_made_them(
    config: Config, sample_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / 'data'
    shutil.copytree(sample_data, data)
    names = load_folds(data / 'folds.json').names
    table = data / 'manifest.csv'
    table.write_text('case,slide\n' + ''.join(f'{n},s{i // 2}\n' for i, n in enumerate(names)))
    rule = GroupRule(table, 'case', 'slide', alike=False)
    params = PrepareParams(groups=rule, n_folds=2, n_workers=1, new_folds=True)
    prepare.prepare(data, params).raise_for_errors()
    config.train_dataloader.dataset.dataset.data_root = str(data)
    config.train_dataloader.dataset.dataset.folds_file = str(data / 'folds.json')
    lines = list(check_data(config))  # the columns are not the usual ones
    assert found(lines, 'error') == ''
    assert 'are in several folds' not in found(lines, 'warn')
    table.write_text('case,slide\n' + ''.join(f'{n},s{i % 2}\n' for i, n in enumerate(names)))
    warnings = found(list(check_data(config)), 'warn')
    assert 'manifest.csv: changed since the folds were made' in warnings
    assert 'are in several folds' in warnings
    table.unlink()
    warnings = found(list(check_data(config)), 'warn')
    assert 'gone since the folds were made; their own groups hold' in warnings
    assert 'are in several folds' not in warnings


def test_settings_that_do_nothing_are_lines(sample_data: Path, tmp_path: Path) -> None:
    path = tmp_path / 'fold0.py'
    path.write_text(
        f'_base_ = {os.path.relpath(ROOT / "configs/sample/fold0.py", tmp_path)!r}\n'
        'red_blue_swapped = False\ntrain_cfg = dict(max_iters=900)\n'
    )
    lines = list(check_settings_of(Config.fromfile(path), str(path)))
    assert 'red_blue_swapped is set here, but' in found(lines, 'error')
    assert 'training at train_cfg.max_iters 900' in found(lines, 'warn')
    path.write_text(path.read_text().split('red_blue')[0])
    (line,) = check_settings_of(Config.fromfile(path), str(path))
    assert line.level == 'ok'


def test_folds_made_without_groups(config: Config, sample_data: Path, tmp_path: Path) -> None:
    folds = load_folds(sample_data / 'folds.json')
    settings = config.train_dataloader.dataset.dataset
    settings.data_root, settings.folds_file = str(sample_data), str(tmp_path / 'folds.json')
    lonely = folds.names_by_fold[0][0]
    for groups, is_warned in (({lonely: 'alike:x'}, True), ({}, True), ({lonely: 'p'}, False)):
        save_folds(tmp_path / 'folds.json', Folds(folds.names_by_fold, groups))
        said = found(list(check_data(config)), 'warn')
        assert ('made without groups' in said) == is_warned


def test_data_errors_and_missing_cases(config: Config, sample_data: Path, tmp_path: Path) -> None:
    data = tmp_path / 'data'
    shutil.copytree(sample_data, data)
    settings = config.train_dataloader.dataset.dataset
    settings.data_root, settings.folds_file = str(data), str(tmp_path / 'folds.json')
    names = [case.name for case in find_cases(data, 'train', 4)]
    save_folds(tmp_path / 'folds.json', Folds((tuple(names[:2]), tuple(names[2:5]))))
    lines = list(guarded('data', lambda: check_data(config)))
    assert '1 case(s) of the data are in no fold' in found(lines, 'error')
    (data / 'train' / names[0] / 'image.tif').write_bytes(b'')
    lines = list(guarded('data', lambda: check_data(config)))
    assert 'is empty (0 bytes)' in found(lines, 'error')


def test_a_check_that_fails_is_one_line(config: Config) -> None:
    del config.model.train_cfg
    (line,) = guarded('anchors', lambda: check_settings.check_anchors(config, None))
    assert line.level == 'error'
    assert 'could not be done (AttributeError' in line.text


def test_tool_ends_with_one_where_something_is_wrong(sample_data: Path, tmp_path: Path) -> None:
    (tmp_path / 'sample/fold0').mkdir(parents=True)
    (tmp_path / 'sample/fold0/iter_2.pth').write_bytes(b'')
    (tmp_path / 'broken.py').write_text('x = (')
    words = ['configs/sample/fold0.py', str(tmp_path / 'broken.py'), '--work-root', str(tmp_path)]
    done = subprocess.run(
        [sys.executable, 'tools/check.py', *words],
        cwd=ROOT,
        env={**os.environ, 'CELLSEG_DATA': str(sample_data), 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert 'iter_2.pth: is empty' in done.stdout
    assert 'broken.py: cannot be read' in done.stdout
    assert 'OK    anchors' in done.stdout
    assert done.stdout.splitlines()[-1].endswith('2 errors')

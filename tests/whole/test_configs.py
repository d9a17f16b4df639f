"""configs: the folds differ in the fold alone, everything builds, the curve is the original's."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

import cellseg_mm  # noqa: F401 - lets mmengine read cellseg_mm::...

pytestmark = pytest.mark.mm

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / 'configs').glob('**/*.py'))
FOLD_CONFIGS = [path for path in CONFIGS if path.parent.name != '_base_']


def load(path: Path):
    from mmengine.config import Config

    return Config.fromfile(path)


def leaves(node: object, path: tuple = ()) -> dict[tuple, object]:
    """All scalars of a nested config by their path."""
    if isinstance(node, dict):
        items = list(node.items())
    elif isinstance(node, (list, tuple)):
        items = list(enumerate(node))
    else:
        return {path: node}
    found: dict[tuple, object] = {}
    for key, value in items:
        found.update(leaves(value, (*path, key)))
    return found


def test_top_level_configs_are_exactly_the_five_folds() -> None:
    names = [path.name for path in sorted((ROOT / 'configs').glob('*.py'))]
    assert names == [f'fold{i}.py' for i in range(5)]


@pytest.mark.parametrize(
    'folder', sorted({p.parent for p in FOLD_CONFIGS}), ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_folds_differ_only_in_leaves_named_fold(folder: Path) -> None:
    paths = sorted(folder.glob('*.py'))
    numbers = [int(path.stem.removeprefix('fold')) for path in paths]
    assert numbers == list(range(len(paths)))
    tables = [leaves(load(path).to_dict()) for path in paths]
    for number, table in zip(numbers, tables, strict=True):
        assert table.keys() == tables[0].keys()
        used = {path: table[path] for path in table if path[-1] == 'fold' and 'dataset' in path[1:]}
        assert len(used) == 3, used.keys()  # training, validation, test
        assert set(used.values()) == {number}
        other = {path for path in table if table[path] != tables[0][path]}
        assert other <= used.keys()


@pytest.mark.parametrize(
    'path',
    # folds differ in one integer, see above
    [path for path in FOLD_CONFIGS if path.stem == 'fold0'],
    ids=lambda p: p.relative_to(ROOT).as_posix(),
)
def test_every_type_is_registered_and_the_model_builds(path: Path) -> None:
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.registry import Registry, init_default_scope

    cfg = load(path)
    register_all_modules(init_default_scope=False)
    init_default_scope('mmdet')
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert model.roi_head.bbox_head.num_classes == len(cfg.metainfo.classes)
    import mmdet.registry as registry_module
    import mmengine.registry as base_module

    known: set[str] = set()
    for module in (registry_module, base_module):
        for registry in vars(module).values():
            known |= set(registry.module_dict) if isinstance(registry, Registry) else set()
    known |= set(dir(torch.optim))
    known |= {'BN', 'SyncBN', 'GN', 'nms', 'soft_nms', 'RoIAlign', 'Conv', 'deconv'}
    parts = {k: v for k, v in cfg.to_dict().items() if k not in ('custom_imports',)}
    types = {v for p, v in leaves(parts).items() if p[-1] == 'type' and isinstance(v, str)}
    assert types - known == set()


def warmup_cosine(step: int, *, base: float, warmup: int, total: int, end_ratio: float) -> float:
    """detectron2's WarmupCosineLR: fvcore schedulers by their formulas, without rescaling."""

    def cosine(where: float) -> float:
        return end_ratio + 0.5 * (1 - end_ratio) * (1 + math.cos(math.pi * where))

    if step >= warmup:
        return base * cosine(step / total)
    start, stop = 1e-3 * cosine(0.0), cosine(warmup / total)
    return base * (start + (stop - start) * step / warmup)


def test_learning_rate_follows_the_original() -> None:
    from mmdet.registry import PARAM_SCHEDULERS

    cfg = load(ROOT / 'configs/fold0.py')
    groups = [{'params': [torch.nn.Parameter(torch.zeros(1))], 'lr': lr} for lr in (1e-3, 1e-4)]
    optimizer = torch.optim.Adam(groups, lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = [
        PARAM_SCHEDULERS.build(dict(settings, optimizer=optimizer))
        for settings in cfg.param_scheduler
    ]
    total = cfg.train_cfg.max_iters
    assert total == 5000
    deviations: list[float] = []
    for step in range(total):
        for group, base in zip(optimizer.param_groups, (1e-3, 1e-4), strict=True):
            wanted = warmup_cosine(step, base=base, warmup=500, total=total, end_ratio=1e-4)
            deviations.append(abs(group['lr'] - wanted) / wanted)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    # facts.md, section 0.10: at most 2.7 %, in the warm-up only; 0.19 % on average
    assert max(deviations) < 0.027
    assert sum(deviations) / len(deviations) < 0.002
    # each scheduler multiplies the last rate, so rounding adds up to a constant 2.4e-6
    assert max(deviations[2 * 500 :]) < 1e-5


def test_folders_of_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """mmengine pastes the variables' values into the file's text."""
    name = '/data/O\'Brien\'s "good" cells ä'
    monkeypatch.setenv('CELLSEG_DATA', name)
    monkeypatch.setenv('CELLSEG_FOLDS', f'{name}/folds.json')
    dataset = load(ROOT / 'configs/fold0.py').val_dataloader.dataset
    assert (dataset.data_root, dataset.folds_file) == (name, f'{name}/folds.json')
    monkeypatch.delenv('CELLSEG_DATA')
    monkeypatch.delenv('CELLSEG_FOLDS')
    dataset = load(ROOT / 'configs/fold0.py').val_dataloader.dataset
    assert (dataset.data_root, dataset.folds_file) == ('data', 'auto')


@pytest.mark.parametrize(
    'folder',
    [
        '.',
        'strong',
        'lsj1024',
        'scratch',
        'laptop',
        'laptop-quick',
        'laptop-long',
        'laptop-kept',
        'gpu',
        'sample',
    ],
)
def test_own_classes_and_colours_are_said_once(folder: str, tmp_path: Path) -> None:
    """As README says: change the base file, and every recipe follows."""
    configs = shutil.copytree(ROOT / 'configs', tmp_path / 'configs')
    base = configs / '_base_/mask_rcnn_r50_lsj.py'
    text = base.read_text()
    for before, after in (
        ("classes=('epithelial', 'lymphocyte', 'neutrophil', 'macrophage')", "classes=('a', 'b')"),
        ('red_blue_swapped = True', 'red_blue_swapped = False'),
        ('num_classes=4', 'num_classes=2'),
    ):
        assert before in text
        text = text.replace(before, after)
    base.write_text(text)
    text = str(load(configs / folder / 'fold0.py').to_dict())
    assert 'num_classes' in text
    assert "'num_classes': 4" not in text
    assert "'red_blue_swapped': True" not in text
    assert 'epithelial' not in text


def test_configs_of_the_package_are_read_and_inherited_by_name(tmp_path: Path) -> None:
    """MMDetection's classes are found: what is inherited gets no scope of its own."""
    from mmengine.config import Config

    there = load(ROOT / 'configs/laptop-quick/fold1.py')
    assert Config.fromfile('cellseg_mm::laptop-quick/fold1.py').to_dict() == there.to_dict()
    own = tmp_path / 'own.py'
    own.write_text("_base_ = ['cellseg_mm::laptop-quick/fold1.py']\nlog_level = 'ERROR'\n")
    assert load(own).to_dict() == {**there.to_dict(), 'log_level': 'ERROR'}
    assert (
        Config.fromfile('cellseg_mm::fold1.py').to_dict()
        == load(ROOT / 'configs/fold1.py').to_dict()
    )


def test_the_model_index_names_configs_that_are_there() -> None:
    import yaml

    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    for name in index['Import']:
        found = yaml.safe_load((ROOT / name).read_text())
        assert [model['Config'] for model in found['Models']]
        assert all((ROOT / model['Config']).is_file() for model in found['Models'])

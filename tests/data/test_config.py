"""What a config says of its data: one record, also of a data set that is built already."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.data.config import DataSettings, classes_and_colours, default_colours
from cellseg_mm.data.pixel_size import save_size

DATASET = {
    'type': 'CellDataset',
    'data_root': '/d',
    'split': 'val',
    'fold': 3,
    'metainfo': {'classes': ['round', 'long'], 'palette': [[1, 2, 3]]},
    'pipeline': [{'type': 'LoadCellImage', 'red_blue_swapped': True}, {'type': 'PackCellInputs'}],
}
EXPECTED = DataSettings(
    data_root=Path('/d'),
    folds_path=Path('/d/folds.json'),
    class_names=('round', 'long'),
    palette=((1, 2, 3), default_colours(2)[1]),
    red_blue_swapped=True,
    split='val',
    fold=3,
)


def config(**changes: object) -> Config:
    wrapped = {'type': 'RepeatDataset', 'dataset': {**DATASET, **changes}}
    return Config({'val_dataloader': {'dataset': wrapped}})


@pytest.mark.parametrize(
    ('changes', 'expected'),
    [
        pytest.param({}, {}, id='all said'),
        pytest.param({'folds_file': 'auto'}, {}, id='folds in the data folder'),
        pytest.param({'folds_file': 'f/x.json'}, {'folds_path': Path('f/x.json')}, id='folds'),
        pytest.param({'pipeline': []}, {'red_blue_swapped': False}, id='no pipeline'),
        pytest.param({'fold': None}, {'fold': None}, id='no fold'),
        pytest.param(
            {'metainfo': {'classes': ('a',)}},
            {'class_names': ('a',), 'palette': tuple(default_colours(1))},
            id='no colours',
        ),
    ],
)
def test_a_loaders_data(changes: dict, expected: dict) -> None:
    found = DataSettings.from_config(config(**changes), 'val_dataloader')
    assert found == dataclasses.replace(EXPECTED, **expected)


def test_what_is_not_said_is_as_the_data_set_has_it() -> None:
    cfg = config()
    node = cfg.val_dataloader.dataset.dataset
    del node.split, node.fold
    found = DataSettings.from_config(cfg, 'val_dataloader')
    assert (found.split, found.fold) == ('train', 0)


def test_a_built_data_set_says_the_same() -> None:
    import cellseg_mm.components  # noqa: F401  imports torch; registers the pipeline's steps
    from cellseg_mm.pipeline.dataset import CellDataset

    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = CellDataset(**{k: v for k, v in DATASET.items() if k != 'type'}, lazy_init=True)
    assert dataset.settings == EXPECTED


def test_more_colours_than_classes() -> None:
    metainfo = {'classes': ('a',), 'palette': [(1, 1, 1), (2, 2, 2)]}
    assert classes_and_colours(metainfo) == (('a',), ((1, 1, 1),))


@pytest.mark.parametrize('changes', [{'data_root': ''}, {'metainfo': {}}])
def test_data_without_a_folder_or_classes(changes: dict) -> None:
    with pytest.raises(ConfigError, match=r'val_dataloader.dataset: .*lacks data_root or'):
        DataSettings.from_config(config(**changes), 'val_dataloader')


def test_no_cell_dataset() -> None:
    with pytest.raises(ConfigError, match=r'test_dataloader.dataset: found no CellDataset'):
        DataSettings.from_config(config(), 'test_dataloader')


def test_the_size_of_pixels_is_the_configs_or_the_recorded_one(tmp_path: Path) -> None:
    cfg = config(data_root=str(tmp_path))
    assert DataSettings.from_config(cfg, 'val_dataloader').um_per_px() is None
    save_size(tmp_path / 'pixel_size.json', (0.5, 0.5))
    assert DataSettings.from_config(cfg, 'val_dataloader').um_per_px() == (0.5, 0.5)
    cfg.um_per_px = 0.25
    assert DataSettings.from_config(cfg, 'val_dataloader').um_per_px() == (0.25, 0.25)
    cfg.um_per_px = 40
    with pytest.raises(ConfigError, match='config: um_per_px is 40'):
        DataSettings.from_config(cfg, 'val_dataloader')

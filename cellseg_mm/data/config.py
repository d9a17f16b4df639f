"""What a config says of its data.

In: a config. Out: where the data are, the folds, the classes and their colours. Invariant: one
reading for all who ask.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.layout import folds_file

if TYPE_CHECKING:
    from mmengine.config import Config, ConfigDict

CLASS_NAMES = ('epithelial', 'lymphocyte', 'neutrophil', 'macrophage')  # of the collection
N_CLASSES = len(CLASS_NAMES)


def dataset_settings(cfg: Config, loader: str = 'train_dataloader') -> ConfigDict:
    """Return the CellDataset settings inside any wrappers of a data loader's data set.

    Raises:
        ConfigError: There is no CellDataset.
    """
    node = cfg.get(loader, {}).get('dataset')
    while isinstance(node, dict) and node.get('type') != 'CellDataset':
        node = node.get('dataset')
    if not isinstance(node, dict):
        raise ConfigError(
            f'{loader}.dataset: found no CellDataset; expected one inside the wrappers'
        )
    return node


def folds_path(settings: ConfigDict) -> Path:
    """Return where a CellDataset's settings say the folds are."""
    return folds_file(settings.data_root, settings.get('folds_file'))

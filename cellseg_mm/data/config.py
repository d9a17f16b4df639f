"""What a config says of its data.

In: a config. Out: where the data are, the folds, the classes and their colours. Invariant: one
reading for all who ask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.layout import folds_file
from cellseg_mm.data.intensity import ValueRange, recorded_range
from cellseg_mm.data.pixel_size import Um, recorded_size, stated

if TYPE_CHECKING:
    from mmengine.config import Config, ConfigDict

Rgb = tuple[int, int, int]

CLASS_NAMES = ('epithelial', 'lymphocyte', 'neutrophil', 'macrophage')  # of the collection
N_CLASSES = len(CLASS_NAMES)

# Okabe and Ito's colours, which people with any colour vision can tell apart.
OKABE_ITO: tuple[Rgb, ...] = (
    (0, 114, 178),
    (213, 94, 0),
    (240, 228, 66),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (230, 159, 0),
    (0, 0, 0),
)


@dataclass(frozen=True, slots=True)
class DataSettings:
    """The data that a data loader of a config reads.

    Attributes:
        data_root: Data folder.
        folds_path: Folds file, which need not be there yet.
        class_names: K names.
        palette: K colours: the config's, then default ones.
        red_blue_swapped: The image files hold blue where red belongs.
        split: ``train``, ``val``, ``all`` or ``test``.
        fold: The fold that is held out; None where the split knows none.
        stated_um: What the config's ``um_per_px`` says of the size of pixels; None where it says
            nothing.
    """

    data_root: Path
    folds_path: Path
    class_names: tuple[str, ...]
    palette: tuple[Rgb, ...]
    red_blue_swapped: bool
    split: str
    fold: int | None
    stated_um: Um | None = None

    @classmethod
    def from_config(cls, cfg: Config, loader: str = 'train_dataloader') -> DataSettings:
        """Read them from a config's data loader.

        Raises:
            ConfigError: There is no CellDataset in it, or it names no folder or no classes.
        """
        node = dataset_settings(cfg, loader)
        if not node.get('data_root') or not (node.get('metainfo') or {}).get('classes'):
            raise ConfigError(
                f'{loader}.dataset: its CellDataset lacks data_root or metainfo.classes; expected '
                'the data folder and a name for each class; add them to the config'
            )
        class_names, palette = classes_and_colours(node['metainfo'])
        fold = node.get('fold', 0)
        return cls(
            data_root=Path(node['data_root']),
            folds_path=folds_file(node['data_root'], node.get('folds_file')),
            class_names=class_names,
            palette=palette,
            red_blue_swapped=any(
                step.get('red_blue_swapped', False) for step in node.get('pipeline') or ()
            ),
            split=str(node.get('split', 'train')),
            fold=None if fold is None else int(fold),
            stated_um=stated(cfg.get('um_per_px'), 'config'),
        )

    def value_range(self) -> ValueRange | None:
        """Return the range of values that is recorded with the data; None where there is none.

        Raises:
            CellSegError: The file of the range is damaged.
        """
        return recorded_range(self.data_root, self.folds_path)

    def um_per_px(self) -> Um | None:
        """Return height and width of a pixel: what the config says, else what is recorded.

        Raises:
            CellSegError: The file of the size is damaged.
        """
        return self.stated_um or recorded_size(self.data_root, self.folds_path)


def dataset_settings(cfg: Config, loader: str = 'train_dataloader') -> ConfigDict:
    """Return the CellDataset settings inside any wrappers of a data loader's data set.

    To change them, or for the pipeline; :class:`DataSettings` has what is read of them.

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


def classes_and_colours(metainfo: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[Rgb, ...]]:
    """Return a data set's class names and a colour for each; default ones where it has none."""
    names = tuple(map(str, metainfo['classes']))
    named = [(int(r), int(g), int(b)) for r, g, b in metainfo.get('palette') or ()]
    return names, (*named[: len(names)], *default_colours(len(names))[len(named) :])


def default_colours(n_classes: int) -> list[Rgb]:
    """Return a colour per class; beyond 8 classes they repeat."""
    return [OKABE_ITO[i % len(OKABE_ITO)] for i in range(n_classes)]

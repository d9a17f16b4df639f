"""Where things lie: the names of work folders and of the files in them.

In: configs' paths and work folders. Out: paths. Invariant: a name is spelt here and nowhere else.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from cellseg_mm.core.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]
REPOSITORY = PACKAGE.parent
# In an installed package, what stands at the top of a checkout lies where MMDetection's own lies.
HOME = PACKAGE / '.mim' if (PACKAGE / '.mim').is_dir() else REPOSITORY
CONFIGS = HOME / 'configs'
TOOLS = HOME / 'tools'
CONFIG_SCHEME = 'cellseg_mm::'
WORK_ROOT = Path('work_dirs')

# In a data folder.
TRAIN, TEST = 'train', 'test_release'  # folders
FOLDS = 'folds.json'
INDEX = 'index.json'
VALUE_RANGE = 'range.json'
PIXEL_SIZE = 'pixel_size.json'
DATA_REPORT = 'data_report.txt'
ORIGINS = 'origins.json'
REPLACED = 'replaced'  # a folder: cases as they were before a correction
ID_MAP = 'test_image_name_to_ids.json'

# In a work folder, or in the ensemble's.
STARTED = 'started.json'
FINISHED = 'finished.json'
TRAINING_LOCK = 'training.lock'
AGAINST_START = 'against_start.json'
INFERENCE = 'inference.json'
OOF, OOF_NEW_SCORES = 'oof', 'oof.new_scores'  # names of pooled predictions and their scores
PREDICTIONS_SUFFIX = '.predictions.npz'
SCORES_SUFFIX = '.scores.json'

# Among the results of prediction; whatever folder they lie in, they are never taken for images.
LABELS_SUFFIX = '.labels.tif'
OVERLAY_SUFFIX = '.overlay.png'
STATE_SUFFIX = '.state.json'
ROIS_SUFFIX = '.rois.zip'
TABLE_SUFFIX = '.cells.csv'
COCO_SUFFIX = '.coco.json'
REVIEW_SUFFIX = '.review.geojson'
TISSUE_SUFFIX = '.tissue.png'
TILES_SUFFIX = '.tiles'  # a folder: tiles of a slide that is not whole yet
RESULT_SUFFIXES = (
    LABELS_SUFFIX,
    OVERLAY_SUFFIX,
    STATE_SUFFIX,
    ROIS_SUFFIX,
    TABLE_SUFFIX,
    COCO_SUFFIX,
    REVIEW_SUFFIX,
    TISSUE_SUFFIX,
    PREDICTIONS_SUFFIX,
    SCORES_SUFFIX,
)
VAL_PICTURES = 'val_pictures'
PICTURE_FOLDERS = (VAL_PICTURES, 'vis_image')  # mmengine's visualiser writes the second


def packaged_configs(name: str) -> list[Path]:
    """Return the configs that a name such as ``cellseg_mm::laptop/fold0.py`` stands for.

    Args:
        name: Begins with ``cellseg_mm::``; the rest is below ``configs`` and may be a pattern.

    Raises:
        ConfigError: There is none; the nearest names are said.
    """
    wanted = name.removeprefix(CONFIG_SCHEME)
    found = sorted(CONFIGS.glob(wanted)) if wanted and not wanted.startswith('/') else []
    if not found:
        known = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob('*.py'))
        near = difflib.get_close_matches(wanted, known, n=2) or known[:2]
        raise ConfigError(
            f'{name}: no such config in {CONFIGS}; expected for example '
            f'{" or ".join(CONFIG_SCHEME + one for one in near)}; correct the name'
        )
    return found


def as_typed(text: str) -> str:
    """Return a text for people with tools named as they are started here.

    A checkout has ``python tools/train.py``, an installed package ``cellseg train``.
    """
    if HOME == REPOSITORY:
        return text
    return re.sub(r'(?<![\w/.])(?:python )?tools/(\w+)\.py', r'cellseg \1', text)


def is_result(path: str | Path) -> bool:
    """Tell by its name whether this project made a file, in training or prediction."""
    path = Path(path)
    return path.parent.name in PICTURE_FOLDERS or path.name.lower().endswith(RESULT_SUFFIXES)


def work_dir_of(config_path: str | Path, work_root: str | Path | None = None) -> Path:
    """Return a config's work folder: ``<work_root>/<path below configs, without suffix>``.

    MMDetection takes the file's name alone; ``configs/fold0.py`` and ``configs/strong/fold0.py``
    would then write into the same folder.

    Args:
        config_path: For example ``configs/strong/fold0.py``.
        work_root: Folder of the work folders; None for ``work_dirs``.
    """
    parts = Path(config_path).resolve().with_suffix('').parts
    last = len(parts) - 1 - parts[::-1].index('configs') if 'configs' in parts else len(parts) - 2
    return Path(WORK_ROOT if work_root is None else work_root, *parts[last + 1 :])


def ensemble_dir(work_dirs: Sequence[Path]) -> Path:
    """Return where what belongs to all folds goes: ``ensemble`` beside their work folders."""
    return Path(os.path.commonpath([str(path.parent) for path in work_dirs])) / 'ensemble'


def folds_file(data_root: str | Path, named: str | Path | None = None) -> Path:
    """Return the folds file: ``folds.json`` of the data folder if None or ``auto`` is named."""
    return Path(data_root) / FOLDS if named in (None, 'auto') else Path(str(named))


def range_files(data_root: str | Path, folds_path: str | Path) -> tuple[Path, Path]:
    """Return where the range of values may be recorded: beside the folds, then with the data."""
    return Path(folds_path).parent / VALUE_RANGE, Path(data_root) / VALUE_RANGE


def size_files(data_root: str | Path, folds_path: str | Path) -> tuple[Path, Path]:
    """Return where the size of pixels may be recorded: beside the folds, then with the data."""
    return Path(folds_path).parent / PIXEL_SIZE, Path(data_root) / PIXEL_SIZE


def augmented_name(tta: str) -> str:
    """Return test-time augmentation as a part of a file's name: letters, digits and hyphens."""
    return re.sub(r'[^A-Za-z0-9]+', '-', tta).strip('-')


def result_name(split: str, tta: str = '') -> str:
    """Return how the names of a split's results begin: ``val``, ``val.flips``.

    Args:
        split: ``train``, ``val``, ``test``, ``all``, or ``oof`` for all folds together.
        tta: Test-time augmentation, as on the command line; '' for none.
    """
    return f'{split}.{augmented_name(tta)}' if tta else split


def predictions_path(folder: str | Path, split: str, tta: str = '') -> Path:
    """Return ``<folder>/<split>.<tta>.predictions.npz``; see :func:`result_name`."""
    return Path(folder) / f'{result_name(split, tta)}{PREDICTIONS_SUFFIX}'


def scores_path(folder: str | Path, split: str, tta: str = '') -> Path:
    """Return ``<folder>/<split>.<tta>.scores.json``; see :func:`result_name`."""
    return Path(folder) / f'{result_name(split, tta)}{SCORES_SUFFIX}'


def scores_beside(predictions: Path) -> Path:
    """Return where the scores of a file of predictions go."""
    return predictions.with_name(predictions.name.removesuffix(PREDICTIONS_SUFFIX) + SCORES_SUFFIX)


def augmentations_of(work_dir: Path, split: str) -> list[str]:
    """Return the augmentations, as in files' names, that a work folder has predictions of."""
    paths = work_dir.glob(f'{split}.*{PREDICTIONS_SUFFIX}')
    names = (p.name.removeprefix(f'{split}.').removesuffix(PREDICTIONS_SUFFIX) for p in paths)
    return sorted(name for name in names if name and '.' not in name)


def mark_of_test(work_dir: Path, tta: str = '') -> Path:
    """Return the mark that says with which settings a fold was tested."""
    return work_dir / f'{result_name("tested", tta)}.json'


def on_fold_dir(work_dir: str | Path, fold: int) -> Path:
    """Return where a member's results on a fold that it was not trained on go."""
    return Path(work_dir) / f'on_fold{fold}'

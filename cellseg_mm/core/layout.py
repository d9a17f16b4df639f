"""Where things lie: the names of work folders and of the files in them.

In: configs' paths and work folders. Out: paths. Invariant: a name is spelt here and nowhere else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def default_work_dir(config_path: str | Path) -> Path:
    """Return ``work_dirs/<path below configs, without suffix>``.

    MMDetection takes the file's name alone; ``configs/fold0.py`` and ``configs/strong/fold0.py``
    would then write into the same folder.
    """
    parts = Path(config_path).resolve().with_suffix('').parts
    last = len(parts) - 1 - parts[::-1].index('configs') if 'configs' in parts else len(parts) - 2
    return Path('work_dirs', *parts[last + 1 :])


STARTED = 'started.json'


FINISHED = 'finished.json'


ID_MAP = 'test_image_name_to_ids.json'


def work_dirs_of(config_paths: Sequence[str], work_root: Path | str | None) -> list[Path]:
    """Return the work folder of each config, below ``work_root`` or MMDetection's ``work_dirs``."""
    pass

    below = [default_work_dir(path).relative_to('work_dirs') for path in config_paths]
    return [Path('work_dirs' if work_root is None else work_root) / path for path in below]


def ensemble_dir(work_dirs: Sequence[Path]) -> Path:
    """Return where what belongs to all folds goes: ``ensemble`` beside their work folders."""
    return Path(os.path.commonpath([str(path.parent) for path in work_dirs])) / 'ensemble'


def augmented_name(tta: str) -> str:
    """Return test-time augmentation as a part of a file's name: letters, digits and hyphens."""
    return re.sub(r'[^A-Za-z0-9]+', '-', tta).strip('-')


VAL_FILE = 'val.predictions.npz'


TEST_FILE = 'test.predictions.npz'

"""Run one of MMDetection's own tools with our runtime in place.

    python -m cellseg_mm PATH/TO/mmdet/.mim/tools/test.py CONFIG CHECKPOINT ...

A config's ``custom_imports`` is enough for tools that read the config before they import
``mmdet.models``, as tools/train.py does. Others, such as MMDetection's tools/test.py, import the
models first; where mmcv has no compiled ops they would stop before they read any config.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import cellseg_mm  # noqa: F401 - provides the ops


def main() -> None:
    """Run the script named first with the words after it."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()

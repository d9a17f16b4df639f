"""Put what stands beside the package into the wheel, where MMDetection keeps its own: in ``.mim``.

All else is in pyproject.toml. An editable installation finds these files in the checkout.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BESIDE = ('configs', 'tools', 'model-index.yml', 'constraints.txt')


class BuildWithMim(build_py):
    """Builds the package, then copies into it what ``core/layout.py`` looks for there."""

    def run(self) -> None:
        """Build."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / 'cellseg_mm' / '.mim'
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in BESIDE:
            if (ROOT / name).is_file():
                shutil.copy2(ROOT / name, target)
                continue
            leave = shutil.ignore_patterns('__pycache__', '*.pyc', 'bootstrap.py')
            shutil.copytree(ROOT / name, target / name, ignore=leave)


setup(cmdclass={'build_py': BuildWithMim})

"""Where a result comes from: code commit, versions, data and fold hashes.

In: nothing but the environment. Out: plain values that every checkpoint and result file carries.
"""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from cellseg_mm.core.layout import REPOSITORY

PACKAGES = (
    'cellseg-mm',
    'torch',
    'numpy',
    'onedl-mmengine',
    'onedl-mmcv',
    'onedl-mmdetection',
    'pycocotools',
    'faster-coco-eval',
    'tifffile',
    'imagecodecs',
    'opencv-python',
    'onnxruntime',
)


@functools.cache
def code_commit() -> str:
    """Return the commit of this code, with ``+`` when files differ; '' outside a clone or git."""
    if not (REPOSITORY / '.git').exists():
        return ''

    def git(*words: str) -> str:
        try:
            result = subprocess.run(
                ['git', '-C', str(REPOSITORY), *words], capture_output=True, text=True, check=False
            )
        except OSError:  # a container with the clone but without git
            return ''
        return result.stdout.strip() if result.returncode == 0 else ''

    commit = git('rev-parse', '--short=12', 'HEAD')
    dirty = git('status', '--porcelain', '--untracked-files=no')
    return commit + ('+' if commit and dirty else '')


@functools.cache
def versions() -> dict[str, str]:
    """Return the installed version of each package that results depend on; '' when absent."""
    found = {'python': platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = ''
    return found


def machine() -> str:
    """Return processor, cores and system in one line, for benchmark tables."""
    import os

    name = platform.processor() or platform.machine()
    try:
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                name = line.split(':', 1)[1].strip()
                break
    except OSError:
        pass  # not Linux: the platform module's name has to do
    return f'{name}, {os.cpu_count()} cores, {platform.system()}'

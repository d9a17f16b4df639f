"""The wheel as people get it, and virtual environments that have nothing else of this checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What a sdist may draw from; the folders of data, results and environments are none of it.
SOURCES = (
    *('pyproject.toml', 'setup.py', 'MANIFEST.in', 'README.md', 'LICENSE', 'CHANGELOG.md'),
    *('CITATION.cff', 'constraints.txt', 'model-index.yml'),
    *('requirements', 'configs', 'tools', 'cellseg_mm'),
)
BUILD = 'import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])'


def build_wheels(folder: Path) -> tuple[Path, Path]:
    """Build the wheel of this checkout twice: directly, and from the sdist."""
    tree = folder / 'tree'
    tree.mkdir(parents=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            leave = shutil.ignore_patterns('__pycache__')
            shutil.copytree(ROOT / name, tree / name, ignore=leave)
        else:
            shutil.copy2(ROOT / name, tree)
    sdist = _build(tree, 'build_sdist', folder / 'sdist')
    wheel = _build(tree, 'build_wheel', folder / 'wheel')
    here = ('--no-deps', '--no-index', '--no-build-isolation')
    pip = [sys.executable, '-m', 'pip', 'wheel', '-q', *here, '-w', str(folder / 'again')]
    run([*pip, str(sdist)])
    return wheel, next((folder / 'again').iterdir())


def _build(tree: Path, what: str, target: Path) -> Path:
    target.mkdir()
    run([sys.executable, '-c', BUILD, what, str(target)], cwd=tree)
    return next(target.iterdir())


def make_venv(folder: Path, wheel: Path) -> Path:
    """Make an environment with the wheel alone, without what it depends on; return its commands."""
    venv.create(folder, with_pip=False, symlinks=os.name != 'nt')
    install(folder, '--no-deps', '--no-index', str(wheel))
    return folder / ('Scripts' if os.name == 'nt' else 'bin')


def install(folder: Path, *words: str) -> None:
    """Install into an environment with this Python's pip."""
    run([sys.executable, '-m', 'pip', '--python', str(folder), 'install', '-q', *words])


def packages_of(folder: Path) -> Path:
    """Return where an environment's packages lie."""
    scheme = 'nt' if os.name == 'nt' else 'posix_prefix'
    return Path(sysconfig.get_path('purelib', scheme, {'base': str(folder)}))


def lend_packages(folder: Path) -> None:
    """Let an environment use what this one has installed, but for this project itself.

    ``.pth`` files in the folder that is named are not read, and one of those is how an editable
    installation makes itself known.
    """
    lines = sorted({sysconfig.get_path('purelib'), sysconfig.get_path('platlib')})
    if sys.version_info >= (3, 12):  # mmengine wants distutils, which setuptools' own .pth provides
        lines.append('import _distutils_hack; _distutils_hack.add_shim()')
    (packages_of(folder) / 'lent.pth').write_text('\n'.join(lines) + '\n')


def run(
    command: list[str], *, cwd: Path | None = None, status: int = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command without any variable of this project or of Python, to an exit status."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(('CELLSEG_', 'PYTHON'))}
    env |= {'OMP_NUM_THREADS': '1', **variables}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == status, f'{command}: {done.stdout}\n{done.stderr}'
    return done

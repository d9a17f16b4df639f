"""Set everything up on a fresh machine and run the demo or the tests.

    python3 tools/bootstrap.py demo    install, make sample data, train two folds, ensemble, score
    python3 tools/bootstrap.py test    install, check the code (ruff, mypy), run the tests
    python3 tools/bootstrap.py check   install, check the code only
    python3 tools/bootstrap.py setup   install only
    python3 tools/bootstrap.py light   install what models in files need only: no torch

Needs Python 3.10 to 3.13 and nothing else: no compiler, no network but the package index.
Everything goes into .venv of this folder (or $CELLSEG_VENV); a second run installs nothing again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # not installed yet; these two need Python's own library only

from cellseg_mm.cli import run_tool  # noqa: E402
from cellseg_mm.core.errors import CellSegError  # noqa: E402

CHECKS = [['-m', 'ruff', 'check', '.'], ['-m', 'ruff', 'format', '--check', '.'], ['-m', 'mypy']]
# the browser tests need onnxruntime-web, which npm has; without it they say that they did not run
FETCH = ['-c', 'from cellseg_mm.exporting.ort_web import fetch_or_say; fetch_or_say()']
LIGHT = Path('requirements') / 'predict.txt'
# Sets of packages and their extras: the demo needs no tests, and waits 40 seconds less.
SETS = {'light': '', 'demo': '', 'all': '[test,dev]'}
TORCH = '2.13.0'
TORCH_CPU_INDEX = 'https://download.pytorch.org/whl/cpu'


def say(text: str) -> None:
    """Print a step, with the seconds since the start."""
    print(f'[{time.monotonic() - START:5.0f} s] {text}', flush=True)


START = time.monotonic()


def venv_python(folder: Path) -> Path:
    """Return the interpreter of a virtual environment."""
    return folder / ('Scripts/python.exe' if os.name == 'nt' else 'bin/python')


def has_nvidia_gpu() -> bool:
    """Tell whether a CUDA build of torch would find a device."""
    return Path('/dev/nvidia0').exists() or shutil.which('nvidia-smi') is not None


def pip(python: Path, *words: str, quiet_failure: bool = False) -> bool:
    """Run pip; with ``quiet_failure`` a failure is only reported by the result."""
    # pip compiles every file of every package, most of which is never imported: 35 s of CPU time.
    # Python compiles what it imports, once, unless it was told to keep nothing.
    late = [] if sys.dont_write_bytecode else ['--no-compile']
    command = [str(python), '-m', 'pip', '--disable-pip-version-check', 'install', *late, *words]
    done = subprocess.run(command, capture_output=quiet_failure, text=True, check=False)
    if done.returncode and not quiet_failure:
        raise CellSegError(f'pip failed, see above: {" ".join(command)}')
    return done.returncode == 0


def install_torch(python: Path) -> None:
    """Install torch: the default build where there is a GPU, a CPU build elsewhere."""
    linux_x86 = sys.platform == 'linux' and platform.machine() in ('x86_64', 'AMD64')
    if not linux_x86 or has_nvidia_gpu():
        pip(python, '-q', f'torch=={TORCH}', '-c', str(ROOT / 'constraints.txt'))
        return
    # The index's default Linux build brings about 3 GB of CUDA libraries that a CPU cannot use.
    local = f'torch=={TORCH}+cpu'
    for words in (['-q', local], ['-q', local, '--index-url', TORCH_CPU_INDEX]):
        if pip(python, *words, '--retries', '0', '--timeout', '20', quiet_failure=True):
            return
    say(f'no CPU build of torch {TORCH} can be had; installing the default build (about 3 GB)')
    pip(python, '-q', f'torch=={TORCH}', '-c', str(ROOT / 'constraints.txt'))


def fingerprint(what: str) -> str:
    """Return what a set of packages depends on."""
    names = ('pyproject.toml', 'constraints.txt', *([str(LIGHT)] if what == 'light' else []))
    parts = [what.encode(), *((ROOT / name).read_bytes() for name in names)]
    return hashlib.sha256(b''.join(parts) + sys.version.encode()).hexdigest()


def refuse_to_delete(folder: Path) -> None:
    """Raise CellSegError unless the folder may be made anew: absent, empty, or of this Python."""
    config = folder / 'pyvenv.cfg'
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not config.is_file():
        raise CellSegError(
            f'{folder}: found files and no virtual environment; expected one, an empty folder or '
            'none; name another folder with CELLSEG_VENV'
        )
    pairs = [line.partition('=') for line in config.read_text().splitlines()]
    found = next((value.strip() for key, _, value in pairs if key.strip() == 'version'), 'unknown')
    if found.split('.')[:2] != platform.python_version().split('.')[:2]:
        raise CellSegError(
            f'{folder}: a virtual environment of Python {found}, and this is Python '
            f'{platform.python_version()}; start this with that Python, name another folder with '
            'CELLSEG_VENV, or delete the old one yourself'
        )


def install(folder: Path, what: str = 'all') -> Path:
    """Make the virtual environment complete and return its interpreter.

    Args:
        folder: Of the environment. What it has already stays, where that is of this version.
        what: One of ``SETS``.
    """
    python, stamp = venv_python(folder), folder / 'cellseg_mm_installed'
    noted = stamp.read_text().split() if python.exists() and stamp.is_file() else []
    done = [one for one in SETS if fingerprint(one) in noted]
    if what in done or 'all' in done:
        say(f'{folder} is complete')
        return python
    if not done:
        refuse_to_delete(folder)
        say(f'making the virtual environment {folder}')
        venv.create(folder, with_pip=True, clear=folder.exists())
    exact = ('-q', '-c', str(ROOT / 'constraints.txt'))
    if what == 'light':
        say('installing, without torch')
        pip(python, *exact, '-r', str(ROOT / LIGHT))
        pip(python, '-q', '--no-deps', '-e', str(ROOT))
    else:
        say('installing torch')
        install_torch(python)
        say('installing the rest')
        pip(python, *exact, '-e', f'{ROOT}{SETS[what]}')
    stamp.write_text('\n'.join(map(fingerprint, [*done, what])))
    say('installed')
    return python


def main() -> int:
    """Install, then run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('what', choices=['setup', 'demo', 'test', 'check', 'light'])
    parser.add_argument('rest', nargs=argparse.REMAINDER, help='passed on to the demo or pytest')
    args = parser.parse_args()
    if args.rest and args.what in ('setup', 'check', 'light'):
        parser.error(f'{args.what} takes no further words: {" ".join(args.rest)}')
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        raise CellSegError(f'this is Python {platform.python_version()}; expected 3.10 to 3.13')
    folder = Path(os.environ.get('CELLSEG_VENV', ROOT / '.venv'))
    python = install(folder, args.what if args.what in SETS else 'all')
    if args.what in ('setup', 'light'):
        print(f'activate it with: source {python.parent / "activate"}; then: cellseg --help')
        return 0
    commands = {
        'demo': [['tools/demo.py', *args.rest]],
        'check': CHECKS,
        # a file's tests stay together: several share what takes long to make
        'test': [*CHECKS, FETCH, ['-m', 'pytest', '-n', 'auto', '--dist', 'loadfile', *args.rest]],
    }[args.what]
    for words in commands:
        say(' '.join(words))
        done = subprocess.run([str(python), *words], cwd=ROOT, check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == '__main__':
    run_tool(main)

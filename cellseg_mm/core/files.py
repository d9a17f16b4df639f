"""Writing files so that a reader never sees half of one, and naming what is in them.

In: bytes, text, JSON values. Out: files that are either the old or the new content, whole.
Invariant: nothing in this project opens a result file for writing except through here.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import platform
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What a machine, not the code, is to blame for.
DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG),
    errno.ENOTDIR,  # a file where a folder was named
)

JsonValue = None | bool | int | float | str | list['JsonValue'] | dict[str, 'JsonValue']


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that becomes ``path`` when the block succeeds.

    The temporary name keeps the suffixes, so that libraries that look at them behave the same.
    On any exception the temporary file is removed and ``path`` is left as it was. A killed process
    cannot do that: the first file that a process writes into a folder removes what dead processes
    of the same machine left there.

    Raises:
        OSError: The folder cannot be written, or the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(os.getpid(), path.parent.absolute())
    prefix = f'.tmp-{_machine_mark()}-{os.getpid()}-'
    tail = path.name.encode()[-100:].decode(errors='ignore')  # names may have 255 bytes
    handle, name = tempfile.mkstemp(prefix=prefix, suffix=f'-{tail}', dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open('r+b') as stream:  # Windows flushes only what may be written
            os.fsync(stream.fileno())
        # mkstemp makes private files; results are for everyone the umask allows.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@functools.cache
def _machine_mark() -> str:
    """Return a short mark of what gives process numbers: a machine, or a container on it."""
    try:
        namespace = Path('/proc/self/ns/pid').stat().st_ino
    except OSError:  # not Linux
        namespace = 0
    return text_hash(f'{platform.node()}/{namespace}')[:8]


@functools.lru_cache(maxsize=4096)
def _remove_leftovers(pid: int, folder: Path) -> None:
    """Remove unfinished files of dead processes of this machine, once per process and folder."""
    for path in folder.glob(f'.tmp-{_machine_mark()}-*'):
        owner = re.match(r'\.tmp-\w+-(\d+)-', path.name)
        if owner is not None and not is_alive(int(owner[1])):
            path.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Tell whether a process of this machine lives; true where that cannot be asked."""
    if os.name == 'nt':  # there signal 0 is Ctrl-C, which would end processes instead of asking
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # alive, and of another user
        return True
    return True


def write_bytes(path: Path | str, content: bytes) -> None:
    """Replace ``path`` by ``content`` in one step."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path | str, content: str) -> None:
    """Replace ``path`` by UTF-8 ``content`` in one step."""
    write_bytes(path, content.encode())


def write_json(path: Path | str, value: JsonValue, *, indent: int | None = 1) -> None:
    """Replace ``path`` by ``value`` as JSON in one step.

    Raises:
        ValueError: ``value`` has a NaN or an infinity, which JSON cannot express.
    """
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + '\n')


def text_hash(text: str) -> str:
    """Return the first 16 hex digits of the SHA-256 of ``text``."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def regular(path: Path) -> Path:
    """Return a path that is safe to open: reading a pipe or a device may wait for ever.

    Raises:
        OSError: It is missing, or no regular file.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, 'it is not a regular file', str(path))
    return path


def file_hash(path: Path | str) -> str:
    """Return the whole SHA-256 of a file as 64 hex digits, read in pieces."""
    digest = hashlib.sha256()
    with regular(Path(path)).open('rb') as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""files: what other systems than Linux ask of writing in one step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cellseg_mm.core import files


def test_flushed_handle_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses to flush what was opened for reading, so nothing could be written there."""
    fcntl = pytest.importorskip('fcntl')
    modes = []

    def note(handle: int) -> None:
        modes.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE)

    monkeypatch.setattr(os, 'fsync', note)
    files.write_text(tmp_path / 'a.txt', 'ä\n')
    assert (tmp_path / 'a.txt').read_bytes() == 'ä\n'.encode()
    assert modes == [os.O_RDWR]


def test_other_processes_are_never_signalled_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """There signal 0 is Ctrl-C."""
    asked = []
    monkeypatch.setattr(os, 'kill', lambda *call: asked.append(call))
    with monkeypatch.context() as patched:
        patched.setattr(os, 'name', 'nt')
        assert files.is_alive(12345)
    assert asked == []
    assert files.is_alive(12345)
    assert asked == [(12345, 0)]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / 'a').write_bytes(b'1')
    os.mkfifo(tmp_path / 'pipe')
    assert files.regular(tmp_path / 'a') == tmp_path / 'a'
    with pytest.raises(OSError, match='it is not a regular file'):
        files.file_hash(tmp_path / 'pipe')  # reading it would wait for ever
    with pytest.raises(IsADirectoryError):
        files.regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        files.regular(tmp_path / 'missing')


@pytest.mark.parametrize('letter', ['a', 'é'])
def test_a_name_may_be_as_long_as_file_systems_take(letter: str, tmp_path: Path) -> None:
    name = letter * (251 // len(letter.encode())) + '.txt'
    files.write_text(tmp_path / name, 'x')
    assert [path.name for path in tmp_path.iterdir()] == [name]

"""provenance: the commit of a clone, with a mark for changed files."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from cellseg_mm.core import provenance


def git(folder: Path, *words: str) -> str:
    author = ['-c', 'user.name=a', '-c', 'user.email=a@b', '-c', 'commit.gpgsign=false']
    done = subprocess.run(
        ['git', '-C', str(folder), *author, *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_commit_has_a_plus_where_tracked_files_differ(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(provenance, 'REPOSITORY', tmp_path)
    commit_of = provenance.code_commit.__wrapped__  # without the cache
    assert commit_of() == ''  # no clone
    git(tmp_path, 'init', '-q')
    assert commit_of() == ''  # no commit
    (tmp_path / 'a.py').write_text('1')
    git(tmp_path, 'add', 'a.py')
    git(tmp_path, 'commit', '-q', '-m', 'a')
    head = git(tmp_path, 'rev-parse', '--short=12', 'HEAD')
    (tmp_path / 'untracked.txt').write_text('x')
    assert commit_of() == head
    (tmp_path / 'a.py').write_text('2')
    assert commit_of() == head + '+'


def test_versions_are_those_installed_and_absent_ones_are_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(provenance, 'PACKAGES', ('numpy', 'no-such-package-here'))
    found = provenance.versions.__wrapped__()
    assert found['numpy'] == metadata.version('numpy')
    assert found['no-such-package-here'] == ''


def test_machine_is_one_line() -> None:
    assert ' cores, ' in provenance.machine()
    assert '\n' not in provenance.machine()


def test_code_commit_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv('PATH', str(tmp_path))
    assert provenance.code_commit.__wrapped__() == ''

"""conftest: tests that need a GPU are left out where there is none, and fail where required."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('torch')

pytestmark = pytest.mark.mm

CONFTEST = Path(__file__).parents[1] / 'conftest.py'
TESTS = """
import pytest

@pytest.mark.gpu
def test_on_a_gpu(): pass

def test_anywhere(): pass
"""


def run_without_a_device(folder: Path, *words: str, **variables: str) -> tuple[int, str]:
    """Run one test of each kind with our conftest where torch sees no device."""
    shutil.copy(CONFTEST, folder / 'conftest.py')
    (folder / 'test_two.py').write_text(TESTS)
    (folder / 'pytest.ini').write_text('[pytest]\nmarkers = gpu: needs a CUDA device\n')
    kept = {k: v for k, v in os.environ.items() if not k.startswith('CELLSEG_')}
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *words],
        cwd=folder,
        env={**kept, 'CUDA_VISIBLE_DEVICES': '', **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_plain_runs_leave_them_out_and_say_so(tmp_path: Path) -> None:
    code, text = run_without_a_device(tmp_path)
    assert code == 0, text
    assert '1 passed, 1 deselected' in text
    assert '1 GPU tests left out: torch finds no CUDA device' in text


def test_required_they_fail_without_a_device(tmp_path: Path) -> None:
    code, text = run_without_a_device(tmp_path, '-m', 'gpu', CELLSEG_REQUIRE_GPU='1')
    assert code == pytest.ExitCode.USAGE_ERROR, text
    assert 'CELLSEG_REQUIRE_GPU: 1 chosen tests need a CUDA device' in text
    assert 'passed' not in text


def test_what_was_not_chosen_is_not_required(tmp_path: Path) -> None:
    code, text = run_without_a_device(tmp_path, '-m', 'not gpu', CELLSEG_REQUIRE_GPU='1')
    assert code == 0, text
    assert '1 passed, 1 deselected' in text


def test_another_device_may_stand_in(tmp_path: Path) -> None:
    code, text = run_without_a_device(
        tmp_path, '-m', 'gpu', CELLSEG_REQUIRE_GPU='1', CELLSEG_TEST_DEVICE='cpu'
    )
    assert code == 0, text
    assert '1 passed, 1 deselected' in text

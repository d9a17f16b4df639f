"""Killing a cross-validation at three random moments changes nothing in the end.

Minutes of CPU, so the name keeps it out of the ordinary run: pytest tests/slow_cross_validation.py
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import MICRO

pytestmark = pytest.mark.mm
ROOT = Path(__file__).resolve().parents[1]
N_KILLS = 3


def start(root: Path, data: Path) -> subprocess.Popen:
    options = [f'{key}={str(value).replace(" ", "")}' for key, value in MICRO.items()]
    configs = [str(ROOT / f'configs/sample/fold{k}.py') for k in range(2)]
    log = (root.parent / f'{root.name}.log').open('ab')
    return subprocess.Popen(
        [
            *(sys.executable, str(ROOT / 'tools/cross_validate.py'), *configs),
            *('--work-root', str(root), '--cfg-options', *options),
        ],
        cwd=ROOT,
        env={**os.environ, 'CELLSEG_DATA': str(data), 'OMP_NUM_THREADS': '1'},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a process group of its own, so that all of it can be killed
    )


def results(root: Path) -> dict[str, object]:
    """Return what must not depend on interruptions."""
    found: dict[str, object] = {}
    for path in sorted(root.glob('sample/*/*.predictions.npz')):
        with np.load(path) as content:
            arrays = {key: content[key].tobytes() for key in content if key != 'header'}
        found[str(path.relative_to(root))] = arrays
    for path in sorted(root.glob('sample/*/*.scores.json')):
        found[str(path.relative_to(root))] = json.loads(path.read_text())
    settings = json.loads((root / 'sample/ensemble/inference.json').read_text())
    found['settings'] = settings['profiles'], settings['evidence']
    return found


def test_three_kills_change_nothing(sample_data: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    assert start(tmp_path / 'whole', sample_data).wait() == 0, (tmp_path / 'whole.log').read_text()
    duration = time.monotonic() - began
    moments = random.Random(20261124)
    for _ in range(N_KILLS):
        process = start(tmp_path / 'killed', sample_data)
        try:
            code = process.wait(moments.uniform(0.05, 0.6) * duration)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        else:
            assert code == 0, (tmp_path / 'killed.log').read_text()
    assert start(tmp_path / 'killed', sample_data).wait() == 0, (
        tmp_path / 'killed.log'
    ).read_text()
    whole, killed = results(tmp_path / 'whole'), results(tmp_path / 'killed')
    assert {'sample/fold0/val.predictions.npz', 'sample/ensemble/oof.scores.json'} <= set(whole)
    assert whole.keys() == killed.keys()
    for name, value in whole.items():
        assert killed[name] == value, name
    print((tmp_path / 'killed.log').read_text())

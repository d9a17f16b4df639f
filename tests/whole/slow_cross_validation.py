"""Killing a cross-validation at three random moments changes nothing in the end.

Minutes of CPU, so the name keeps it out of the ordinary run:
pytest tests/whole/slow_cross_validation.py
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

from tests.support.micro import MICRO

pytestmark = pytest.mark.mm
ROOT = Path(__file__).resolve().parents[2]
N_KILLS = 3
SEED = int(os.environ.get('CELLSEG_KILL_SEED', '20261124'))


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
        scores = json.loads(path.read_text())
        scores.pop('provenance')  # names times and folders
        found[str(path.relative_to(root))] = scores
    settings = json.loads((root / 'sample/ensemble/inference.json').read_text())
    found['settings'] = settings['profiles'], settings['evidence']
    return found


def written(root: Path) -> int:
    """Return the bytes of all steps' logs: how far a run is, however busy the machine."""
    logs = [*root.glob('sample/*/cross_validation/*.log'), *root.glob('sample/ensemble/*.log')]
    return sum(path.stat().st_size for path in logs)


def kill_at(process: subprocess.Popen, root: Path, n_bytes: float) -> bool:
    """Kill a run and its commands when its logs have so many bytes; False if it ended before."""
    while process.poll() is None:
        if written(root) >= n_bytes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.05)
    return False


def test_three_kills_change_nothing(sample_data: Path, tmp_path: Path) -> None:
    whole_dir, killed_dir = tmp_path / 'whole', tmp_path / 'killed'
    assert start(whole_dir, sample_data).wait() == 0, (tmp_path / 'whole.log').read_text()
    total = written(whole_dir)
    moments = random.Random(SEED)
    for _ in range(N_KILLS):
        now = written(killed_dir)
        more = moments.uniform(0.1, 0.6) * max(total - now, total / 20)
        assert kill_at(start(killed_dir, sample_data), killed_dir, now + more)
        print(f'killed at {written(killed_dir) / total:.0%} of the log of an uninterrupted run')
    assert start(killed_dir, sample_data).wait() == 0, (tmp_path / 'killed.log').read_text()
    whole, killed = results(whole_dir), results(killed_dir)
    assert {'sample/fold0/val.predictions.npz', 'sample/ensemble/oof.scores.json'} <= set(whole)
    assert len(whole['sample/ensemble/oof.predictions.npz']['scores']) > 0
    assert whole.keys() == killed.keys()
    for name, value in whole.items():
        assert killed[name] == value, name
    print((tmp_path / 'killed.log').read_text())

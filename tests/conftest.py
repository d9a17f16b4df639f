"""What several test files share: a small generated data set, and a model that trains in seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# One thread per process: the suite runs several processes on two cores.
os.environ.setdefault('OMP_NUM_THREADS', '1')


@pytest.fixture(autouse=True)
def registry_scope() -> Iterator[None]:
    """Give each test the registry scope that it found: a Runner leaves its own behind."""
    registry = sys.modules.get('mmengine.registry')
    before = registry.DefaultScope._instance_dict.copy() if registry else {}
    yield
    registry = sys.modules.get('mmengine.registry')
    if registry:
        registry.DefaultScope._instance_dict.clear()
        registry.DefaultScope._instance_dict.update(before)


@pytest.fixture(scope='session')
def sample_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated data set of six training and two test images with two folds."""
    from cellseg_mm.data.drawing.sample import make_sample
    from cellseg_mm.data.preparing import prepare
    from cellseg_mm.data.preparing.groups import GroupRule
    from cellseg_mm.data.preparing.records import PrepareParams

    root = tmp_path_factory.mktemp('sample') / 'data'
    make_sample(root, n_train=6, n_test=2, seed=3)
    rule = GroupRule(manifest=False)  # three images in each fold
    report = prepare.prepare(root, PrepareParams(n_folds=2, n_workers=1, groups=rule))
    report.raise_for_errors()
    return root


@pytest.fixture
def sample_config(sample_data: Path, monkeypatch: pytest.MonkeyPatch):
    """Fold 0 of the sample recipe on ``sample_data``, in MMDetection's scope."""
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    from tests.support.micro import ROOT

    monkeypatch.setenv('CELLSEG_DATA', str(sample_data))
    monkeypatch.delenv('CELLSEG_FOLDS', raising=False)
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield Config.fromfile(ROOT / 'configs/sample/fold0.py')


LEFT_OUT = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that need a GPU where there is none, or stop if they are required.

    Raises:
        pytest.UsageError: ``CELLSEG_REQUIRE_GPU`` is set, and there is no CUDA device.
    """
    gpu = [item for item in items if item.get_closest_marker('gpu')]
    if not gpu or 'CELLSEG_TEST_DEVICE' in os.environ:
        return
    import torch

    if torch.cuda.is_available():
        return
    if 'CELLSEG_REQUIRE_GPU' in os.environ:
        raise pytest.UsageError(
            f'CELLSEG_REQUIRE_GPU: {len(gpu)} chosen tests need a CUDA device and torch '
            f'{torch.__version__} finds none; check the driver, CUDA_VISIBLE_DEVICES and that '
            'torch was built for CUDA, or unset the variable'
        )
    config.stash[LEFT_OUT] = len(gpu)
    if hasattr(config, 'workeroutput'):  # a process of pytest-xdist tells the one that prints
        config.workeroutput['n_gpu_left_out'] = len(gpu)
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if not item.get_closest_marker('gpu')]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Take over how many tests a process of pytest-xdist left out."""
    node.config.stash[LEFT_OUT] = getattr(node, 'workeroutput', {}).get('n_gpu_left_out', 0)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say how many tests a machine without a GPU did not run."""
    if n := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(
            f'{n} GPU tests left out: torch finds no CUDA device; where there is one, run '
            'CELLSEG_REQUIRE_GPU=1 python -m pytest -m gpu'
        )

"""A published file with random weights, in detectron2's format; the loaders in force."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import random_detectron2


@pytest.fixture(scope='session')
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole R50 in detectron2's format with random weights."""
    return random_detectron2.write(tmp_path_factory.mktemp('published'))


@pytest.fixture
def safe_loading():
    """Register the loaders, and give mmengine its own back."""
    from mmengine.fileio import LocalBackend, register_backend
    from mmengine.runner.checkpoint import CheckpointLoader

    from cellseg_mm.weights.loaders import use_safe_loading

    schemes = CheckpointLoader._schemes
    use_safe_loading()
    yield
    CheckpointLoader._schemes = schemes
    register_backend('local', LocalBackend, force=True, prefixes='')

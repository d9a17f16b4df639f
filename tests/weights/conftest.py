"""A published file with random weights, in detectron2's format."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import random_detectron2


@pytest.fixture(scope='session')
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole R50 in detectron2's format with random weights."""
    return random_detectron2.write(tmp_path_factory.mktemp('published'))

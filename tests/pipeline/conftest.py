"""The scope in which transforms build others by name."""

from __future__ import annotations

import pytest

import cellseg_mm  # noqa: F401  (before mmdet: gives it NMS and RoIAlign)


@pytest.fixture(autouse=True)
def _mmdet_scope() -> None:
    from mmengine.registry import init_default_scope

    init_default_scope('mmdet')  # as the Runner does: RandomResize builds its Resize by name

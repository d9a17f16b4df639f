"""Resizing without mmcv gives mmcv's pixels."""

from __future__ import annotations

import numpy as np
import pytest

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.light.picture import check_step, resize, target_wh

STEPS = [
    {'type': 'Resize', 'scale': (1333, 800), 'keep_ratio': True, 'backend': 'pillow'},
    {'type': 'Resize', 'scale': (50, 30), 'keep_ratio': True},
    {'type': 'Resize', 'scale': (41, 57)},
    {'type': 'Resize', 'scale': 64, 'keep_ratio': True, 'interpolation': 'area'},
    {'type': 'Resize', 'scale_factor': 1.0, 'keep_ratio': True},
    {'type': 'Resize', 'scale_factor': 0.37, 'keep_ratio': True, 'interpolation': 'bicubic'},
    {'type': 'Resize', 'scale_factor': (1.5, 0.7)},
    {'type': 'ScaleBy', 'factor': 2.0, 'max_side_px': 2400},
    {'type': 'ScaleBy', 'factor': 2.0, 'max_side_px': 100, 'backend': 'pillow'},
]
SIZES = [(33, 71), (90, 40), (64, 64), (7, 3)]


@pytest.mark.mm
@pytest.mark.parametrize('step', STEPS, ids=str)
@pytest.mark.parametrize('hw', SIZES, ids=str)
def test_pixels_are_those_of_the_test_pipeline(step: dict, hw: tuple[int, int]) -> None:
    import cellseg_mm

    pytest.importorskip('mmdet')
    from mmdet.registry import TRANSFORMS
    from mmengine.registry import DefaultScope

    import cellseg_mm.components  # noqa: F401

    picture = np.random.default_rng(0).integers(0, 256, (*hw, 3), dtype=np.uint8)
    with DefaultScope.overwrite_default_scope('mmdet'):
        transform = TRANSFORMS.build(dict(step))
    theirs = transform({'img': picture, 'img_shape': hw})['img']
    assert target_wh(hw, step) == theirs.shape[1::-1]
    np.testing.assert_array_equal(resize(picture, step), theirs)


def test_without_a_step_the_picture_stays() -> None:
    picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert resize(picture, None) is picture


@pytest.mark.parametrize(
    ('step', 'part'),
    [
        ({'type': 'FixShapeResize', 'width': 3}, 'FixShapeResize'),
        ({'type': 'Resize', 'scale': 3, 'pad': 1}, 'has pad'),
        ({'type': 'Resize', 'scale': 3, 'backend': 'pillow', 'interpolation': 'area'}, 'area'),
        ({'type': 'Resize', 'scale': 3, 'backend': 'tifffile'}, 'backend tifffile'),
    ],
)
def test_other_steps_are_refused_by_name(step: dict, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        check_step(step, 'here')

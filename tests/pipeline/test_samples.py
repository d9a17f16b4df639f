"""pipeline.samples: settings that are wrong are named, and the seed decides a sample."""

from __future__ import annotations

import numpy as np
import pytest
from mmdet.structures.mask import BitmapMasks

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.pipeline.colour import HEDJitter, RandomBlurNoise
from cellseg_mm.pipeline.copy_paste import LabelMapCopyPaste
from cellseg_mm.pipeline.geometry import ClassAwareCrop, DropTruncatedInstances, RandomRotate90
from tests.support.moving_samples import CROP, HW, build, sample, seed_all

pytestmark = pytest.mark.mm

BAD = {
    r'RandomRotate90\.prob': lambda: RandomRotate90(prob=1.2),
    r'crop_size': lambda: ClassAwareCrop(crop_size=0),
    r'class_aware_prob': lambda: ClassAwareCrop(crop_size=9, class_aware_prob=-1),
    r'min_share': lambda: DropTruncatedInstances(crop=CROP, min_share=2),
    r'HEDJitter\.sigma': lambda: HEDJitter(sigma=-0.1),
    r'noise_sigma': lambda: RandomBlurNoise(noise_sigma=(3, 1)),
    r'source': lambda: LabelMapCopyPaste(source='elsewhere'),
    r'max_pasted': lambda: LabelMapCopyPaste(max_pasted=-1),
    r'MultiImageMixDataset': lambda: LabelMapCopyPaste(source='other')(sample(0)),
    r'put LoadLabelMaps': lambda: ClassAwareCrop(crop_size=9)(
        {**sample(0), 'gt_masks': BitmapMasks.random(3, *HW)}
    ),
}


@pytest.mark.parametrize(('message', 'call'), BAD.items())
def test_wrong_settings_are_named(message: str, call) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_same_seed_same_sample() -> None:
    pipeline = build(
        {'type': 'RandomRotate90'},
        {'type': 'ClassAwareCrop', 'crop_size': (30, 30)},
        {'type': 'LabelMapCopyPaste'},
        {'type': 'HEDJitter', 'prob': 1.0},
        {'type': 'RandomBlurNoise', 'blur_prob': 0.5, 'noise_prob': 1.0},
    )
    drawn = []
    for seed in (4, 4, 5):
        seed_all(seed)
        drawn.append(pipeline(sample(2))['img'])
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert drawn[0].shape != drawn[2].shape or (drawn[0] != drawn[2]).any()
    text = repr(pipeline)
    assert 'ClassAwareCrop(crop_size=(30, 30)' in text
    assert 'max_pasted=20' in text

"""fusion.masks: pasted, averaged and voted masks, equal to pixel loops and to the mask head."""

from __future__ import annotations

import numpy as np
import pytest

from cellseg_mm.core import rle
from cellseg_mm.fusion import fuse as fuse_module
from cellseg_mm.fusion import masks
from cellseg_mm.fusion.clusters import Clusters
from cellseg_mm.fusion.fuse import from_spec, fuse
from tests.support import reference_fusion as reference
from tests.support.fusion_members import (
    HW,
    SIDE,
    assert_identical,
    build_from_crops,
    random_members,
)


def random_frames(rng: np.random.Generator, n: int) -> np.ndarray:
    """Frames inside, across and outside the image, from less than a pixel to beyond the image."""
    low = rng.random((n, 2)) * (HW[1] + 6, HW[0] + 6) - 4
    size = rng.choice([0.4, 1, 3, 9, 40], (n, 2)) * (0.5 + rng.random((n, 2)))
    return np.concatenate([low, low + size], axis=1).astype(np.float32)


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('thr', [0.5, 0.1])
def test_paste_equals_pixel_loop(thr: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs, boxes = rng.random((12, SIDE, SIDE)).astype(np.float16), random_frames(rng, 12)
    crops, low = fuse_module.paste_probs(probs, boxes, HW, thr)
    for crop, (y, x), prob, box in zip(crops, low, probs, boxes, strict=True):
        full = np.zeros(HW, bool)
        full[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
        values = reference.paste(prob, box.tolist(), HW)
        clear = np.abs(values - thr) > 1e-5
        assert np.array_equal(full & clear, (values >= thr) & clear)


def test_paste_in_small_batches_and_without_width(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    probs, boxes = rng.random((40, SIDE, SIDE)).astype(np.float16), random_frames(rng, 40)
    boxes[3, 2], boxes[4, 3] = boxes[3, 0], boxes[4, 1] - 1
    whole, low = fuse_module.paste_probs(probs, boxes, HW)
    monkeypatch.setattr(masks, 'MAX_PIXELS', 1)
    parts, low_of_parts = fuse_module.paste_probs(probs, boxes, HW)
    assert np.array_equal(low, low_of_parts)
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert whole[3].size == whole[4].size == 0
    with pytest.raises(ValueError, match='above 0'):
        fuse_module.paste_probs(probs, boxes, HW, 0.0)
    assert fuse_module.paste_probs(probs[:0], boxes[:0], HW)[0] == []


def test_paste_keeps_a_pixel_at_the_threshold() -> None:
    # One bin per pixel, so every pixel's value is its bin's.
    probs = np.array([[[0.5, 0.25], [0.75, 0.5]]], np.float16)
    (crop,), (low,) = fuse_module.paste_probs(probs, np.array([[3, 4, 5, 6]]), HW)
    rows, columns = np.nonzero(crop)
    assert [(y + low[0], x + low[1]) for y, x in zip(rows, columns, strict=True)] == [
        (4, 3),
        (5, 3),
        (5, 4),
    ]


@pytest.mark.mm
@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('thr', [0.5, 0.1])
def test_paste_equals_the_mask_heads(thr: float, seed: int) -> None:
    torch = pytest.importorskip('torch')
    mask_head = pytest.importorskip('cellseg_mm.model.mask_head')
    rng = np.random.default_rng(seed)
    probs, boxes = rng.random((60, 28, 28)).astype(np.float16), random_frames(rng, 60)
    hw = (2 * HW[0], 3 * HW[1])
    given = torch.from_numpy(probs).float(), torch.from_numpy(boxes * 2)
    runs = mask_head.paste_runs(*given, hw, threshold=thr, whole_grid=True)
    crops, low = fuse_module.paste_probs(probs, boxes * 2, hw, thr)
    ours = build_from_crops(crops, low, hw).masks()
    theirs = build_from_crops(*rle.decode_crops(rle.encode_runs(runs), hw), hw).masks()
    assert ours.sum() > 500
    assert (ours != theirs).sum() <= 1  # float32 rounding at the threshold: none seen on x86


def test_votes_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = from_spec('wbf:iou_thr=0.2')
    whole = [fuse(random_members(seed), rule) for seed in range(6)]
    monkeypatch.setattr(masks, 'MAX_PIXELS', 30)
    for seed, expected in enumerate(whole):
        assert_identical(fuse(random_members(seed), rule), expected)


def test_resampling_to_the_same_frame_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    probs, frames = rng.random((20, 28, 28)).astype(np.float16), random_frames(rng, 20)
    same = masks.resample_probs(probs, frames, frames)
    assert np.array_equal(same.astype(np.float16), probs)


def test_average_of_probabilities_is_weighted_by_score() -> None:
    frames = np.array([[2, 2, 8, 8]] * 2, np.float32)
    probs = np.stack([np.full((SIDE, SIDE), 0.5), np.full((SIDE, SIDE), 1.0)]).astype(np.float16)
    clusters = Clusters(np.array([0, 0]), np.array([0]))
    mean, frame = masks.average_probs(probs, frames, np.array([0.75, 0.25], np.float32), clusters)
    assert mean.tolist() == np.full((1, SIDE, SIDE), 0.75 * 0.5 + 0.25).tolist()
    assert frame.tolist() == [[2, 2, 8, 8]]

"""rle: equal to pycocotools byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from cellseg_mm.core import rle
from cellseg_mm.core.errors import PredictionError


def random_masks(seed: int, n: int, hw: tuple[int, int]) -> np.ndarray:
    """Blobs, speckle (many runs), full columns, full and empty masks, corners, single pixels."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, *hw), dtype=bool)
    for i in range(n):
        kind = rng.integers(7)
        y0, x0 = rng.integers(hw[0]), rng.integers(hw[1])
        y1, x1 = rng.integers(y0 + 1, hw[0] + 1), rng.integers(x0 + 1, hw[1] + 1)
        if kind == 0:
            masks[i, y0:y1, x0:x1] = True
        elif kind == 1:
            masks[i, y0:y1, x0:x1] = rng.random((y1 - y0, x1 - x0)) < 0.5
        elif kind == 2:
            masks[i, :, x0:x1] = True  # full columns: the runs of neighbours join
        elif kind == 3:
            masks[i] = True
        elif kind == 4:
            masks[i, -1, -1] = True
        elif kind == 5:
            masks[i, 0, 0] = True
    return masks


def crop_randomly(mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, int]]:
    """A crop that holds the mask, not always tight."""
    ys, xs = np.nonzero(mask)
    if not len(ys):
        return np.zeros((0, 0), bool), (0, 0)
    y0, x0 = rng.integers(ys.min() + 1), rng.integers(xs.min() + 1)
    y1, x1 = (
        rng.integers(ys.max() + 1, mask.shape[0] + 1),
        rng.integers(xs.max() + 1, mask.shape[1] + 1),
    )
    return mask[y0:y1, x0:x1], (y0, x0)


@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('hw', [(17, 11), (1, 1), (1, 9), (300, 257)])
def test_encode_and_decode_equal_pycocotools(seed: int, hw: tuple[int, int]) -> None:
    masks = random_masks(seed, 12, hw)
    expected = [coco_mask.encode(np.asfortranarray(m.astype(np.uint8))) for m in masks]
    rng = np.random.default_rng(seed)
    crops, offsets = zip(*(crop_randomly(m, rng) for m in masks), strict=True)
    encoded = rle.encode_crops(crops, np.array(offsets), hw)
    assert encoded == [e['counts'] for e in expected]

    runs = rle.decode_runs(encoded, hw)
    assert rle.areas_of(runs).tolist() == masks.sum(axis=(1, 2)).tolist()
    boxes = rle.boxes_of(runs)
    xywh = coco_mask.toBbox(expected)
    assert np.array_equal(boxes, np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1))
    tight, at = rle.decode_crops(encoded, hw)
    for mask, crop, (y, x) in zip(masks, tight, at, strict=True):
        full = np.zeros(hw, bool)
        full[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
        assert np.array_equal(full, mask)


def test_no_masks() -> None:
    assert rle.encode_crops([], np.zeros((0, 2), int), (5, 7)) == []
    assert rle.decode_runs([], (5, 7)).n_masks == 0
    assert rle.boxes_of(rle.decode_runs([], (5, 7))).shape == (0, 4)
    assert rle.iou_matrix([], [], (5, 7)).shape == (0, 0)


@pytest.mark.parametrize(
    'text',
    [
        pytest.param(b'\x01', id='character out of range'),
        pytest.param(b'T' + bytes([48 + 0x20]), id='cut within a number'),
        pytest.param(b'5', id='too few pixels'),
        pytest.param(b'', id='empty string'),
        pytest.param(bytes([48 + 0x3F] * 20 + [48]), id='number of 100 bits'),
    ],
)
def test_broken_strings_are_refused(text: bytes) -> None:
    with pytest.raises(PredictionError, match='RLE'):
        rle.decode_runs([text], (5, 7))


def test_crop_outside_image_is_refused() -> None:
    with pytest.raises(ValueError, match='leaves the image'):
        rle.encode_crops([np.ones((3, 3), bool)], np.array([[3, 0]]), (5, 7))


@pytest.mark.parametrize('seed', range(5))
def test_iou_equals_loop(seed: int) -> None:
    masks = random_masks(seed, 10, (17, 11))
    rles = [coco_mask.encode(np.asfortranarray(m.astype(np.uint8)))['counts'] for m in masks]
    got = rle.iou_matrix(rles, rles, (17, 11))
    for i, a in enumerate(masks):
        for j, b in enumerate(masks):
            union = (a | b).sum()
            assert got[i, j] == pytest.approx((a & b).sum() / union if union else 0.0)


def test_crafted_sums_that_wrap_around_are_refused() -> None:
    # 32 runs of 2^59 px and one of 35 add up to the image's 35 px in 64 bits.
    def written(number: int) -> bytes:
        groups = []
        while True:
            low, number = number & 31, number >> 5
            more = number != -1 if low & 16 else number != 0
            groups.append(low + 48 + 32 * more)
            if not more:
                return bytes(groups)

    big = 1 << 59
    text = written(big) + written(big) + written(big) + written(0) * 29 + written(35 - big)
    with pytest.raises(PredictionError, match='RLE'):
        rle.decode_runs([text], (5, 7))


@pytest.mark.parametrize('seed', range(5))
def test_pieces_in_any_order_are_joined(seed: int) -> None:
    masks = random_masks(seed, 12, (17, 11))
    rng = np.random.default_rng(seed)
    owner, at = np.nonzero(masks.transpose(0, 2, 1).reshape(len(masks), -1))
    order = rng.permutation(len(at))
    runs = rle.runs_from_pieces(at[order], at[order] + 1, owner[order], len(masks), (17, 11))
    expected = [coco_mask.encode(np.asfortranarray(m.astype(np.uint8)))['counts'] for m in masks]
    assert rle.encode_runs(runs) == expected

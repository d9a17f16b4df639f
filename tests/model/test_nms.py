"""model.nms: equal to loops over boxes; odd boxes neither hang nor suppress."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip('torch')
from cellseg_mm.model import nms as nms_module  # noqa: E402
from cellseg_mm.model.nms import nms, softnms  # noqa: E402

pytestmark = pytest.mark.mm

IMAGE_EDGE = 40.0


def slow_iou(a: list[float], b: list[float], offset: int) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    areas = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
    union = sum(areas) - width * height
    return width * height / union if union else math.nan


def slow_nms(boxes: list, scores: list[float], threshold: float, offset: int) -> list[int]:
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if not any(slow_iou(boxes[i], boxes[j], offset) > threshold for j in kept):
            kept.append(i)
    return kept


def slow_softnms(
    boxes: list, scores: list[float], *, threshold: float, sigma: float, low: float, method: int
) -> list[tuple[int, float]]:
    left, picked = dict(enumerate(scores)), []
    while left:
        best = max(left, key=lambda i: (left[i], -i))
        picked.append((best, left.pop(best)))
        for i in list(left):
            iou = slow_iou(boxes[best], boxes[i], 0)
            if method == 2:
                left[i] *= math.exp(-iou * iou / sigma)
            elif iou >= threshold:
                left[i] *= (1 - iou) if method == 1 else 0.0
            if left[i] < low:
                del left[i]
    return picked


def random_boxes(
    rng: np.random.Generator, n: int, *, whole: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return boxes (some of size zero, some doubled) and scores with many ties."""
    corners = rng.uniform(0, IMAGE_EDGE, (n, 2))
    boxes = np.concatenate((corners, corners + rng.exponential(8, (n, 2))), axis=1)
    if whole:  # whole pixels give IoUs that equal the threshold exactly
        boxes = boxes.round()
    boxes[n // 2 : n // 2 + 2] = boxes[:1]
    return torch.tensor(boxes, dtype=torch.float32), torch.tensor(
        rng.random(n).round(1), dtype=torch.float32
    )


@pytest.mark.parametrize('seed', range(20))
def test_nms_equals_loop(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(nms_module, 'NMS_BLOCK', int(rng.choice([1, 3, 16, 256])))
    boxes, scores = random_boxes(rng, int(rng.integers(2, 90)), whole=bool(seed % 2))
    if seed % 3 == 0:  # classes moved apart, as batched_nms does
        boxes += 60.0 * torch.tensor(rng.integers(0, 3, (len(boxes), 1)))
    for threshold in (0.0, 0.25, 0.5, 0.9):
        for offset in (0, 1):
            got = nms(boxes, scores, threshold, offset).tolist()
            assert got == slow_nms(boxes.tolist(), scores.tolist(), threshold, offset)


def test_box_at_the_threshold_survives() -> None:
    """IoU of (0..2, 0..1) and (1..3, 0..1) is 1 / 3, of (0..2) and (0..4) exactly 1 / 2."""
    boxes = torch.tensor([[0.0, 0, 2, 1], [0, 0, 4, 1]])
    scores = torch.tensor([0.9, 0.8])
    assert nms(boxes, scores, 0.5, 0).tolist() == [0, 1]
    assert nms(boxes, scores, 0.4999, 0).tolist() == [0]


def test_long_chain_of_suppressions() -> None:
    """Each box overlaps only its neighbours: every second one stays, whatever the block."""
    left = torch.arange(600.0)
    boxes = torch.stack((left, torch.zeros(600), left + 1.6, torch.ones(600)), dim=1)
    kept = nms(boxes, torch.linspace(1, 0, 600), 0.2, 0)
    assert kept.tolist() == list(range(0, 600, 2))


def test_boxes_that_are_not_finite_do_not_hang_or_suppress() -> None:
    boxes = torch.tensor([[math.nan, 0, 2, 2], [0, 0, 2, 2], [0, 0, 2, 2]]).repeat(200, 1)
    kept = nms(boxes, torch.linspace(1, 0, 600), 0.5, 0)
    assert kept.tolist() == sorted([*range(0, 600, 3), 1])


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_nms_of_other_types(dtype: torch.dtype) -> None:
    boxes, scores = random_boxes(np.random.default_rng(5), 60, whole=True)
    got = nms(boxes.to(dtype), scores.to(dtype), 0.4, 0).tolist()
    assert got == slow_nms(boxes.tolist(), scores.to(dtype).tolist(), 0.4, 0)


def test_nms_of_nothing() -> None:
    kept = nms(torch.zeros(0, 4), torch.zeros(0), 0.5, 0)
    assert kept.shape == (0,)
    assert kept.dtype == torch.int64


@pytest.mark.parametrize('method', [0, 1, 2])
@pytest.mark.parametrize('n', [0, 1, 50])
def test_softnms_equals_loop(method: int, n: int) -> None:
    rng = np.random.default_rng(method)
    boxes = random_boxes(rng, 60, whole=False)[0][:n].double()
    scores = torch.tensor(rng.random(n))
    dets = torch.full((n, 5), -1.0, dtype=torch.float64)
    got = softnms(boxes, scores, dets, 0.3, 0.5, 0.05, method, 0)
    expected = slow_softnms(
        boxes.tolist(), scores.tolist(), threshold=0.3, sigma=0.5, low=0.05, method=method
    )
    assert got.tolist() == [index for index, _ in expected]
    assert dets[: len(got), 4].tolist() == pytest.approx([score for _, score in expected])
    assert torch.equal(dets[: len(got), :4], boxes[got])

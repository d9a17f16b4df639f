"""Non-maximum suppression in plain torch, with the signatures of mmcv's compiled op.

In: boxes and scores. Out: indices to keep. Invariant: the same boxes as mmcv keeps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Boxes per step of the NMS sweep: a (256, 4096) float32 IoU matrix is 4 MiB, about a core's cache.
NMS_BLOCK = 256


@torch.no_grad()
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Keep boxes that no kept box of higher score overlaps by more than the threshold.

    Args:
        boxes: (N, 4) floating point, xyxy px.
        scores: (N,) floating point.
        iou_threshold: Compared in the precision of the boxes, as mmcv does; equal survives.
        offset: 0 or 1, added to every width and height.

    Returns:
        (K,) int64, kept boxes by falling score; equal scores in the order of the input, as in
        torchvision. mmcv's C++ leaves their order to torch's unstable sort, which since torch 2.6
        depends on the processor's vector instructions.
    """
    if boxes.numel() == 0:
        return torch.empty(0, dtype=torch.int64, device=boxes.device)
    boxes = boxes.float() if boxes.dtype in (torch.float16, torch.bfloat16) else boxes
    order = torch.sort(scores, descending=True, stable=True).indices
    corners = boxes[order].t().contiguous()  # (4, N) by falling score
    kept = torch.zeros(len(order), dtype=torch.bool, device=boxes.device)
    for group in _separate_groups(corners, iou_threshold, offset):
        kept[group[_sweep(corners[:, group], iou_threshold, offset)]] = True
    return order[kept]


def _separate_groups(corners: Tensor, iou_threshold: float, offset: int) -> Iterator[Tensor]:
    """Yield index sets, each in rising order, that no overlap crosses in x.

    ``batched_nms`` moves every class and every FPN level to coordinates of its own, so sorting by
    the left edge finds the groups and saves the comparisons between them.
    """
    n = corners.shape[1]
    if n <= NMS_BLOCK or iou_threshold < 0 or not bool(torch.isfinite(corners).all()):
        yield torch.arange(n, device=corners.device)
        return
    left, by_left = torch.sort(corners[0])
    reach = torch.cummax(corners[2][by_left] + offset, 0).values
    cuts = (left[1:] > reach[:-1]).nonzero().flatten() + 1
    for part in torch.tensor_split(by_left, cuts.cpu()):
        yield part.sort().values


def _sweep(corners: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Return the indices that survive greedy NMS of boxes sorted by falling score."""
    alive = torch.arange(corners.shape[1], device=corners.device)
    kept = []
    while len(alive):
        block, alive = alive[:NMS_BLOCK], alive[NMS_BLOCK:]
        block = block[
            _greedy(_overlaps(corners[:, block], corners[:, block], iou_threshold, offset))
        ]
        kept.append(block)
        if len(alive):
            hits = _overlaps(corners[:, block], corners[:, alive], iou_threshold, offset)
            alive = alive[~hits.any(dim=0)]
    return torch.cat(kept)


def _greedy(overlaps: Tensor) -> Tensor:
    """Solve one block: (n, n) bool, row suppresses column, to (n,) bool kept.

    A box is kept unless a kept earlier box suppresses it. Starting from "all kept" and applying
    that rule to all boxes at once is right for box i after i rounds at most, and stops as soon as
    nothing changes: after as many rounds as the longest chain of suppressions, usually below ten.
    """
    before = overlaps.triu(1)
    kept = torch.ones(len(overlaps), dtype=torch.bool, device=overlaps.device)
    while True:
        again = ~before[kept].any(dim=0)
        if torch.equal(again, kept):
            return kept
        kept = again


def _overlaps(first: Tensor, second: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Compare (4, A) and (4, B) corners: (A, B) bool, IoU above the threshold."""
    x1, y1, x2, y2 = (edge[:, None] for edge in first)
    u1, v1, u2, v2 = second
    width = torch.minimum(x2, u2).sub_(torch.maximum(x1, u1))
    height = torch.minimum(y2, v2).sub_(torch.maximum(y1, v1))
    if offset:
        width, height = width.add_(offset), height.add_(offset)
    inter = width.clamp_(min=0).mul_(height.clamp_(min=0))
    union = ((x2 - x1 + offset) * (y2 - y1 + offset)) + (u2 - u1 + offset) * (v2 - v1 + offset)
    return inter.div_(union.sub_(inter)) > iou_threshold


@torch.no_grad()
def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Lower the scores of overlapping boxes instead of dropping them; fill ``dets``.

    Args:
        boxes: (N, 4) xyxy px, on the CPU as mmcv sends them.
        scores: (N,).
        dets: (N, 5) output; its first K rows become box and lowered score.
        iou_threshold: For the methods 0 and 1; equal is lowered.
        sigma: For method 2.
        min_score: A box whose lowered score is below is dropped.
        method: 0 naive, 1 linear, 2 Gaussian.
        offset: 0 or 1, added to every width and height.

    Returns:
        (K,) int64 in the order of selection; equal scores in the order of the input (mmcv's own
        order of ties depends on which boxes it swapped before).
    """
    left = torch.arange(len(boxes), device=boxes.device)
    scores = scores.clone()
    picked = []
    while len(left):
        best = int(scores[left].argmax())
        index = left[best]
        left = torch.cat((left[:best], left[best + 1 :]))
        dets[len(picked), :4] = boxes[index]
        dets[len(picked), 4] = scores[index]
        picked.append(index)
        iou = _iou_with(boxes[index], boxes[left], offset)
        if method == 2:
            scores[left] *= torch.exp(-(iou * iou) / sigma)
        else:
            lowered = 1 - iou if method == 1 else torch.zeros_like(iou)
            scores[left] *= torch.where(iou >= iou_threshold, lowered, torch.ones_like(iou))
        left = left[~(scores[left] < min_score)]
    return torch.stack(picked) if picked else left


def _iou_with(box: Tensor, boxes: Tensor, offset: int) -> Tensor:
    """Return the IoU of one (4,) box with (N, 4) boxes."""
    low = torch.maximum(box[:2], boxes[:, :2])
    high = torch.minimum(box[2:], boxes[:, 2:])
    inter = (high - low + offset).clamp_(min=0).prod(dim=1)
    area = (box[2:] - box[:2] + offset).prod()
    return inter / (area + (boxes[:, 2:] - boxes[:, :2] + offset).prod(dim=1) - inter)


def torchvision_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Do what :func:`nms` does with torchvision's compiled op, which knows no offset.

    torchvision compares in double; the threshold is rounded as mmcv rounds it.
    """
    if offset:
        return nms(boxes, scores, iou_threshold, offset)
    threshold = float(torch.tensor(iou_threshold, dtype=torch.float32))
    return torch.ops.torchvision.nms(boxes, scores.to(boxes.dtype), threshold)

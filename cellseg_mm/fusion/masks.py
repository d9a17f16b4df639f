"""One mask from several: by mask probabilities brought into a common frame, or by pixel votes.

In: (N, S, S) probabilities with their frames, or runs, and which instances belong together.
Out: probabilities, tight crops, uncertainty. Invariant: pixels are painted for final instances
only, and only inside their frame.

A frame is a box that its S x S bins divide evenly; a probability belongs to its bin's centre,
is linear between centres and fades to zero half a bin beyond the box. A pixel takes the value at
its centre. Source: ``_do_paste_mask`` of MMDetection 3.x (``grid_sample``,
``align_corners=False``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core import rle
from cellseg_mm.core.arrays import Int
from cellseg_mm.fusion.clusters import Clusters, Pairs

Float32 = NDArray[np.float32]

# Pixels painted together: 4 bytes each, and as much again for the step before.
MAX_PIXELS = 1 << 21
# Scores become whole numbers of this step, so that sums of votes do not depend on their order.
# float32 scores from 2**-7 to 1 are whole multiples of it.
VOTE_STEP = 2.0**-30


def paste_probs(
    probs: NDArray[np.floating],
    boxes_xyxy: NDArray[np.floating],
    image_hw: tuple[int, int],
    thr: float = 0.5,
) -> tuple[list[NDArray[np.bool_]], Int]:
    """Paint probabilities into their frames and keep the pixels of at least ``thr``.

    The same pixels as MMDetection's paste on a GPU, but for probabilities within a rounding error
    of ``thr``, and for frames without width or height, which get an empty crop here. (On a CPU
    MMDetection looks at most 2 px beyond the box, which matters below ``thr`` 0.5 only.)

    Args:
        probs: (N, S, S) floats in 0..1.
        boxes_xyxy: (N, 4) frames in px; may leave the image.
        image_hw: Height and width of the image in px.
        thr: Above 0, at most 1.

    Returns:
        N crops (h_i, w_i) bool inside the image, not always tight, and their (N, 2) int64 row and
        column.

    Raises:
        ValueError: ``thr`` is not above 0: every pixel of the image would be foreground.
    """
    if not thr > 0:
        raise ValueError(f'a mask threshold must be above 0, not {thr}')
    boxes = np.asarray(boxes_xyxy, dtype=np.float64)
    low, size = _extent(boxes, probs.shape[-1], image_hw)
    crops: list[NDArray[np.bool_]] = [np.zeros((0, 0), dtype=bool)] * len(boxes)
    for batch in _batches(size):
        height, width = size[batch].max(axis=0).tolist()
        columns, rows = _weights(
            boxes[batch],
            probs.shape[-1],
            low[batch, 1:] + 0.5 + np.arange(width),
            low[batch, :1] + 0.5 + np.arange(height),
        )
        painted = rows @ probs[batch].astype(np.float32) @ columns.transpose(0, 2, 1) >= thr
        for i, (h, w), image in zip(batch.tolist(), size[batch].tolist(), painted, strict=True):
            crops[i] = image[:h, :w]
    return crops, low


def _extent(boxes: NDArray[np.float64], side: int, image_hw: tuple[int, int]) -> tuple[Int, Int]:
    """Return the first pixel and the size of what may be foreground, two (N, 2) int64 of y, x."""
    start, end = boxes[:, [1, 0]], boxes[:, [3, 2]]
    fade = (end - start) / (2 * side)
    low = np.clip(np.floor(start - fade - 0.5), 0, image_hw).astype(np.int64)
    high = np.clip(np.ceil(end + fade + 0.5), 0, image_hw).astype(np.int64)
    size = np.maximum(high - low, 0)
    size[((end <= start) | (size == 0)).any(axis=1)] = 0
    return low, size


def _batches(size: Int) -> Iterator[Int]:
    """Yield indices of similar crops that are not empty, ``MAX_PIXELS`` or one crop at a time."""
    padded = -(-size // 16)
    chosen = np.flatnonzero(size[:, 0] > 0)
    order = chosen[np.lexsort((padded[chosen, 1], padded[chosen, 0]))]
    changes = np.flatnonzero((np.diff(padded[order], axis=0) != 0).any(axis=1)) + 1
    for group in np.split(order, changes):
        if len(group):
            n = max(MAX_PIXELS // int(padded[group[0]].prod() * 256), 1)
            for i in range(0, len(group), n):
                yield group[i : i + n]


def _weights(
    boxes: NDArray[np.float64], side: int, x: NDArray[np.floating], y: NDArray[np.floating]
) -> tuple[Float32, Float32]:
    """Return the share of each bin in each place, (N, len, S) float32, of x and of y.

    Args:
        boxes: (N, 4) frames with width and height.
        side: S.
        x: (N, W) or (1, W) places in px.
        y: (N, H) or (1, H) places in px.
    """
    shares = []
    for places, start, end in (
        (x, boxes[:, 0:1], boxes[:, 2:3]),
        (y, boxes[:, 1:2], boxes[:, 3:4]),
    ):
        at = (places - start) / (end - start) * side - 0.5
        share = at.astype(np.float32)[:, :, None] - np.arange(side, dtype=np.float32)
        np.abs(share, out=share)
        np.subtract(1, share, out=share)
        shares.append(np.maximum(share, 0, out=share))
    return shares[0], shares[1]


def resample_probs(
    probs: NDArray[np.floating],
    frames_xyxy: NDArray[np.floating],
    targets_xyxy: NDArray[np.floating],
) -> Float32:
    """Read probabilities at the bin centres of other frames, (N, S, S) float32.

    Args:
        probs: (N, S, S) floats in 0..1.
        frames_xyxy: (N, 4) px, where ``probs`` lie; a frame without width or height gives zeros.
        targets_xyxy: (N, 4) px, where the result lies.
    """
    frames = np.asarray(frames_xyxy, dtype=np.float64)
    targets = np.asarray(targets_xyxy, dtype=np.float64)
    side = probs.shape[-1]
    flat = (frames[:, 2] <= frames[:, 0]) | (frames[:, 3] <= frames[:, 1])
    frames = np.where(flat[:, None], [0.0, 0.0, 1.0, 1.0], frames)
    centres = (np.arange(side) + 0.5) / side
    size = targets[:, 2:] - targets[:, :2]
    columns, rows = _weights(
        frames,
        side,
        targets[:, 0:1] + centres * size[:, 0:1],
        targets[:, 1:2] + centres * size[:, 1:2],
    )
    result = rows @ probs.astype(np.float32) @ columns.transpose(0, 2, 1)
    result[flat] = 0
    return result


def average_probs(
    probs: NDArray[np.float16],
    frames_xyxy: Float32,
    scores: Float32,
    clusters: Clusters,
) -> tuple[NDArray[np.float16], Float32]:
    """Average the probabilities of each cluster, weighted by score, in the mean of its frames.

    Args:
        probs: (N, S, S) float16.
        frames_xyxy: (N, 4) float32 px.
        scores: (N,) float32.
        clusters: C groups of the N instances.

    Returns:
        (C, S, S) float16 and the (C, 4) float32 px where they lie.
    """
    weights = vote_weights(scores)
    inside = np.flatnonzero(clusters.owner >= 0)
    order = inside[np.argsort(clusters.owner[inside], kind='stable')]
    owner = clusters.owner[order]
    total = clusters.sums(weights)
    sums = np.stack([clusters.sums(weights * frames_xyxy[:, k]) for k in range(4)], axis=1)
    frames = (sums / total[:, None]).astype(np.float32)
    moved = resample_probs(probs[order], frames_xyxy[order], frames[owner])
    moved *= (weights[order] / total[owner]).astype(np.float32)[:, None, None]
    begin = np.concatenate([[0], np.cumsum(clusters.sizes)])[:-1]
    side = probs.shape[-1]
    flat = moved.reshape(len(moved), side * side)
    mean = np.add.reduceat(flat, begin, axis=0) if len(begin) else flat[:0]
    return np.minimum(mean, 1).astype(np.float16).reshape(-1, side, side), frames


def vote_weights(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return scores as whole numbers of at least 1, (N,) float64, whose sums are exact."""
    weights: NDArray[np.float64] = np.rint(scores.astype(np.float64) / VOTE_STEP)
    return np.maximum(weights, 1)


def vote_pixels(
    runs: rle.Runs, scores: Float32, clusters: Clusters, thr: float
) -> tuple[list[NDArray[np.bool_]], Int]:
    """Keep the pixels that at least the share ``thr`` of each cluster's scores covers.

    Args:
        runs: Runs of N masks.
        scores: (N,) float32.
        clusters: C groups of the N instances.
        thr: Above 0, at most 1.

    Returns:
        C crops (h_i, w_i) bool, not always tight, and their (C, 2) int64 row and column.
    """
    low, size = _union_boxes(runs, clusters)
    owner, column, top, bottom = rle.column_pieces(runs)
    inside = clusters.owner[owner] >= 0
    owner, column, top, bottom = owner[inside], column[inside], top[inside], bottom[inside]
    to = clusters.owner[owner]
    height = size[:, 0] + 1  # one more row per column keeps the columns' votes apart
    end = np.cumsum(size[:, 1] * height)
    begin = end - size[:, 1] * height
    at = begin[to] + (column - low[to, 1]) * height[to] - low[to, 0]
    weights = vote_weights(scores)
    needed = clusters.sums(weights) * thr
    crops: list[NDArray[np.bool_]] = []
    for batch in _cluster_batches(begin):
        here = (to >= batch.start) & (to < batch.stop)
        first, n_pixels = begin[batch.start], end[batch.stop - 1] - begin[batch.start]
        places = np.concatenate([(at + top)[here], (at + bottom)[here]]) - first
        steps = np.concatenate([weights[owner[here]], -weights[owner[here]]])
        votes = np.cumsum(np.bincount(places, weights=steps, minlength=int(n_pixels) + 1))[:-1]
        won = votes >= np.repeat(needed[batch], (end - begin)[batch])
        crops += [
            won[a : a + w * (h + 1)].reshape(w, h + 1)[:, :h].T
            for a, (h, w) in zip((begin[batch] - first).tolist(), size[batch].tolist(), strict=True)
        ]
    return crops, low


def _cluster_batches(begin: Int) -> Iterator[slice]:
    """Yield ranges of clusters of about ``MAX_PIXELS`` pixels, or one cluster at a time."""
    batch_of = begin // MAX_PIXELS
    edges = (np.flatnonzero(np.diff(batch_of)) + 1).tolist()
    if len(begin):
        for a, b in itertools.pairwise([0, *edges, len(begin)]):
            yield slice(a, b)


def _union_boxes(runs: rle.Runs, clusters: Clusters) -> tuple[Int, Int]:
    """Return where each cluster's pixels begin and how far they reach, two (C, 2) int64 of y, x."""
    boxes = rle.boxes_of(runs).astype(np.int64)
    used = (clusters.owner >= 0) & (boxes[:, 2] > 0)
    low = np.full((len(clusters), 2), np.iinfo(np.int64).max)
    high = np.zeros((len(clusters), 2), dtype=np.int64)
    np.minimum.at(low, clusters.owner[used], boxes[used][:, [1, 0]])
    np.maximum.at(high, clusters.owner[used], boxes[used][:, [3, 2]])
    low[high[:, 0] == 0] = 0
    return low, high - low


def prob_uncertainty(probs: NDArray[np.floating]) -> Float32:
    """Return the mean of 4 p (1 - p) over each frame, (N,) float32: 0 = sure, 1 = all at 0.5."""
    p = probs.astype(np.float32)
    mean: Float32 = (p * (1 - p)).mean(axis=(1, 2), dtype=np.float32)
    return 4 * mean


def mask_disagreement(pairs: Pairs, clusters: Clusters) -> Float32:
    """Return 1 - mean IoU over all pairs within each cluster, (C,) float32; 0 for one instance.

    Args:
        pairs: All overlapping masks among instances that may share a cluster.
        clusters: C groups.
    """
    own = clusters.owner
    same = (own[pairs.first] == own[pairs.second]) & (own[pairs.first] >= 0)
    total = np.bincount(own[pairs.first[same]], weights=pairs.iou[same], minlength=len(clusters))
    n = clusters.sizes
    n_pairs = n * (n - 1) // 2
    return np.where(n_pairs > 0, 1 - total / np.maximum(n_pairs, 1), 0).astype(np.float32)

"""Large images in overlapping tiles, and one set of cells again from the tiles' sets.

In: an image's size; then each tile's instances. Out: tiles, and an InstanceSet of the whole image.
Invariant: a cell is neither cut nor doubled at a seam; a detector that sees in each tile what it
would see in the whole image gives exactly the whole image's instances, if masks are in one piece
and overlaps are at least 1 px (docs/predict.md).

How a seam is closed. Two instances of different tiles and of one class are the same cell when
their masks agree (IoU above ``iou_thr``) inside the window that both tiles saw. An instance that
touches its tile's inner border is cut: it yields to an instance of another tile that is not cut,
and only where nobody saw the cell whole are the cut parts joined to one mask. Of several whole
views the one stays whose centre lies in its own tile's core, where the context is best; the cores
share out the image along the middles of the overlaps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core import rle
from cellseg_mm.core.arrays import Int, ranges_of
from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import InstanceSet, concatenate
from cellseg_mm.core.windows import MAX_PIECES, boxes_and_areas, runs_of_pieces
from cellseg_mm.fusion.clusters import mask_pairs

Bool = NDArray[np.bool_]

STRIP = 20_000  # instances near seams that are compared at once: about 200 MB


@dataclass(frozen=True, slots=True)
class Tile:
    """A window of the image, and the part of it that it owns; half-open, px.

    Attributes:
        window_yxyx: First row and column, one past the last row and column.
        core_yxyx: The same of the core; cores of all tiles cover the image once.
    """

    window_yxyx: tuple[int, int, int, int]
    core_yxyx: tuple[int, int, int, int]

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width in px."""
        y0, x0, y1, x1 = self.window_yxyx
        return y1 - y0, x1 - x0


def plan_tiles(image_hw: tuple[int, int], tile_px: int, overlap_px: int) -> list[Tile]:
    """Cover an image with tiles of one size, spread evenly, row by row.

    Neighbours overlap by ``overlap_px`` or more. A side of the image that is shorter than a tile
    makes tiles of that side.

    Args:
        image_hw: Height and width in px.
        tile_px: Height and width of a tile in px.
        overlap_px: Least overlap; cells smaller than this are seen whole by some tile.

    Raises:
        ConfigError: ``tile_px`` is not positive, or the overlap is not from 0 to half a tile.
    """
    if tile_px < 1:
        raise ConfigError(f'tiles: {tile_px} px; expected a size above 0, such as 1024')
    if not 0 <= overlap_px <= tile_px // 2:
        raise ConfigError(
            f'tiles: {overlap_px} px overlap of tiles of {tile_px} px; expected 0 to '
            f'{tile_px // 2}; choose more than the largest cell, such as 128'
        )
    rows = _spread(image_hw[0], tile_px, overlap_px)
    columns = _spread(image_hw[1], tile_px, overlap_px)
    return [
        Tile((y0, x0, y1, x1), (top, left, bottom, right))
        for y0, y1, top, bottom in rows
        for x0, x1, left, right in columns
    ]


def _spread(length: int, tile: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """Return start and end of the tiles along one side, and of their cores."""
    if length <= tile:
        return [(0, length, 0, length)]
    stride = max(tile - overlap, 1)
    n = -(-(length - overlap) // stride)
    starts = [i * (length - tile) // (n - 1) for i in range(n)]
    seams = [(starts[i] + tile + starts[i + 1]) // 2 for i in range(n - 1)]
    return [
        (start, start + tile, low, high)
        for start, low, high in zip(starts, [0, *seams], [*seams, length], strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class StitchParams:
    """When instances of different tiles are one cell.

    Attributes:
        iou_thr: Mask IoU within the window that both tiles saw must be above this.
        inside_thr: A cut part is a fragment of another tile's whole cell when more than this share
            of it lies inside.
        margin_px: An instance that comes as near to an inner border of its tile counts as cut;
            detectors seldom fill the last pixel.
    """

    iou_thr: float = 0.5
    inside_thr: float = 0.5
    margin_px: int = 1

    def __post_init__(self) -> None:
        if not (0 < self.iou_thr < 1 and 0 < self.inside_thr <= 1 and self.margin_px >= 0):
            raise ConfigError(
                f'stitching: {self}; expected thresholds in 0..1 and a margin of 0 px or more'
            )


@dataclass(frozen=True, slots=True)
class StitchReport:
    """What became of the tiles' instances.

    ``n_in`` = ``n_out`` + ``n_duplicates`` + ``n_parts`` - ``n_joined`` + ``n_unconfirmed``
    + ``n_empty``.

    Attributes:
        n_tiles: Tiles.
        n_in: Instances of all tiles.
        n_out: Instances returned.
        n_duplicates: Dropped for another tile's better view of the same cell.
        n_parts: Cut parts that were joined.
        n_joined: Cells made of them.
        n_unconfirmed: Dropped: outside their own tile's core, and the tile whose core it is does
            not see them.
        n_left_cut: Kept though cut: no other tile saw them.
        n_empty: Dropped: mask without a pixel.
    """

    n_tiles: int = 0
    n_in: int = 0
    n_out: int = 0
    n_duplicates: int = 0
    n_parts: int = 0
    n_joined: int = 0
    n_unconfirmed: int = 0
    n_left_cut: int = 0
    n_empty: int = 0

    def to_json(self) -> dict[str, int]:
        """Return what a result file records."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def move_to_image(instances: InstanceSet, tile: Tile, image_hw: tuple[int, int]) -> InstanceSet:
    """Return a tile's instances in the coordinates of the whole image, without probabilities.

    Raises:
        ValueError: The instances are not of the tile's size.
    """
    if instances.image_hw != tile.hw:
        raise ValueError(f'{instances.name}: instances of {instances.image_hw} px, tile {tile}')
    y0, x0, _, _ = tile.window_yxyx
    owner, column, top, bottom = rle.column_pieces(rle.decode_runs(instances.rles, tile.hw))
    moved = runs_of_pieces(owner, column + x0, top + y0, bottom + y0, len(instances), image_hw)
    return replace(
        instances.without_probs(),
        image_hw=image_hw,
        boxes_xyxy=instances.boxes_xyxy + np.array([x0, y0, x0, y0], dtype=np.float32),
        rles=tuple(rle.encode_runs(moved)),
    )


def stitch(
    tiles: Iterable[tuple[InstanceSet, Tile]],
    image_hw: tuple[int, int],
    *,
    name: str = '',
    image_id: int = 0,
    params: StitchParams | None = None,
) -> tuple[InstanceSet, StitchReport]:
    """Make one set of all tiles' instances.

    Args:
        tiles: Each tile's instances in the tile's coordinates, and the tile; consumed one by one.
        image_hw: Height and width of the whole image in px.
        name: Name of the result.
        image_id: Id of the result.
        params: See :class:`StitchParams`.

    Returns:
        Instances by falling score, equal scores from the top left down, whatever the order of the
        tiles; and what was merged. A joined cell has the best part's score and class, the union of
        the parts' masks and boxes. Memory follows the number of cells, never the pixels.
    """
    params = params or StitchParams()
    moved, windows = [InstanceSet.empty(name, image_id, image_hw)], []
    for instances, tile in tiles:
        moved.append(
            replace(move_to_image(instances, tile, image_hw), name=name, image_id=image_id)
        )
        windows.append(tile)
    tile_of = np.repeat(np.arange(len(windows)), [len(s) for s in moved[1:]])
    filled = [s for s in moved if len(s)]
    everything = concatenate(filled or moved[:1])
    boxes, _ = boxes_and_areas(everything)
    has_pixels = boxes[:, 2] > 0
    seam = _Seams(everything[has_pixels], boxes[has_pixels], tile_of[has_pixels], windows, params)
    result, report = seam.close()
    counts = {'n_tiles': len(windows), 'n_in': len(everything)}
    report = replace(report, **counts, n_out=len(result), n_empty=int((~has_pixels).sum()))
    return _in_order(result), report


def _in_order(instances: InstanceSet) -> InstanceSet:
    tight, _ = boxes_and_areas(instances)
    keys = [instances.class_ids, *tight.T[[2, 3, 0, 1]], -instances.scores]
    return instances[np.lexsort(keys)]


class _Grid:
    """Rectangles of :func:`plan_tiles`, all or some: rows and columns rise on both sides."""

    def __init__(self, yxyx: Int) -> None:
        rows, row_of = np.unique(yxyx[:, [0, 2]], axis=0, return_inverse=True)
        columns, column_of = np.unique(yxyx[:, [1, 3]], axis=0, return_inverse=True)
        there = np.zeros((len(rows) + 1, len(columns) + 1), dtype=np.int64)
        there[row_of.reshape(-1) + 1, column_of.reshape(-1) + 1] = 1
        self._sums = there.cumsum(axis=0).cumsum(axis=1)
        self._sides = (rows, columns)

    def count(self, boxes_yxyx: Int, unit: int = 1) -> Int:
        """Return how many rectangles each box meets; a box without extent is a point.

        Args:
            boxes_yxyx: (N, 4) in parts of a pixel.
            unit: How many parts.
        """
        spans = []
        for side, k in zip(self._sides, (0, 1), strict=True):
            low, high = boxes_yxyx[:, k], boxes_yxyx[:, k + 2]
            first = np.searchsorted(side[:, 1] * unit, low, side='right')
            last = np.searchsorted(side[:, 0] * unit, np.maximum(high, low + 1), side='left')
            spans.append((first, np.maximum(last, first)))
        (top, bottom), (left, right) = spans
        s = self._sums
        total: Int = s[bottom, right] - s[top, right] - s[bottom, left] + s[top, left]
        return total


class _Seams:
    """Everything that is known about the instances of all tiles, and how they are merged."""

    def __init__(
        self,
        instances: InstanceSet,
        boxes: Int,
        tile_of: Int,
        tiles: Sequence[Tile],
        params: StitchParams,
    ) -> None:
        self.instances, self.boxes, self.tile_of = instances, boxes, tile_of
        self.params = params
        self.windows = np.array([t.window_yxyx for t in tiles], dtype=np.int64).reshape(-1, 4)
        cores = np.array([t.core_yxyx for t in tiles], dtype=np.int64).reshape(-1, 4)
        twice = np.stack([boxes[:, 1] + boxes[:, 3], boxes[:, 0] + boxes[:, 2]], axis=1)
        mine = cores[tile_of]
        inside = (twice >= 2 * mine[:, :2]) & (twice < 2 * mine[:, 2:])
        # Nobody can confirm a cell in the core of a tile that was not looked at: it counts
        in_any = _Grid(cores).count(twice[:, [0, 1, 0, 1]], 2) > 0
        self.is_own: Bool = (inside[:, 0] & inside[:, 1]) | ~in_any
        self.is_cut = self._touches_inner_border()

    def _touches_inner_border(self) -> Bool:
        height, width = self.instances.image_hw
        y0, x0, y1, x1 = self.windows[self.tile_of].T
        left, top, right, bottom = self.boxes.T
        margin = self.params.margin_px
        touches: Bool = (x0 > 0) & (left <= x0 + margin)
        touches |= (y0 > 0) & (top <= y0 + margin)
        touches |= (x1 < width) & (right >= x1 - margin)
        touches |= (y1 < height) & (bottom >= y1 - margin)
        return touches

    def close(self) -> tuple[InstanceSet, StitchReport]:
        """Merge; see the module's text."""
        partners = self._partners()
        keep, absorbed = self._choose_views(partners)
        by_score = np.argsort(-self.instances.scores, kind='stable').tolist()
        parts = [i for i in by_score if self.is_cut[i] and not absorbed[i]]
        groups = _groups(parts, partners)
        joined = [group for group in groups if len(group) > 1]
        left_cut = [group[0] for group in groups if len(group) == 1 and self.is_own[group[0]]]
        keep[left_cut] = True
        in_parts = np.zeros(len(self.instances), dtype=bool)
        in_parts[[i for group in joined for i in group]] = True
        report = StitchReport(
            n_duplicates=int(absorbed.sum()),
            n_parts=int(in_parts.sum()),
            n_joined=len(joined),
            n_unconfirmed=int((~(keep | absorbed | in_parts)).sum()),
            n_left_cut=len(left_cut),
        )
        kept = self.instances[np.flatnonzero(keep)]
        return concatenate([kept, self._join(joined)]), report

    def _choose_views(self, partners: Mapping[int, Sequence[int]]) -> tuple[Bool, Bool]:
        """Of each cell that a tile saw whole, tell which view stays and which it absorbs."""
        n = len(self.instances)
        keep: Bool = np.zeros(n, dtype=bool)
        absorbed: Bool = np.zeros(n, dtype=bool)
        order = np.lexsort(
            [self.tile_of, *self.boxes.T, -self.instances.scores, ~self.is_own, self.is_cut]
        )
        for i in order.tolist():
            if self.is_cut[i] or absorbed[i]:
                continue
            others = [j for j in partners.get(i, ()) if not keep[j]]
            absorbed[others] = True
            # A view from outside the core counts when a second tile confirms it.
            keep[i] = self.is_own[i] or len(others) > 0
        return keep, absorbed

    def _partners(self) -> dict[int, list[int]]:
        """Return for each instance those of other tiles that show the same cell."""
        near = np.flatnonzero(_Grid(self.windows).count(self.boxes[:, [1, 0, 3, 2]]) > 1)
        partners: dict[int, list[int]] = {}
        for strip, top, bottom in self._strips(near):
            for a, b in self._same_cells(strip, top, bottom):
                partners.setdefault(a, []).append(b)
                partners.setdefault(b, []).append(a)
        return partners

    def _strips(self, near: Int) -> Iterator[tuple[Int, int, int]]:
        """Yield instances that may be in one strip, and its rows: memory follows ``STRIP``."""
        tops, bottoms = self.boxes[near, 1], self.boxes[near, 3]
        starts = np.unique(np.sort(tops)[::STRIP])
        ends = np.append(starts[1:], self.instances.image_hw[0] + 1)[: len(starts)]
        for top, bottom in zip(starts.tolist(), ends.tolist(), strict=True):
            yield near[(tops < bottom) & (bottoms > top)], top, bottom

    def _same_cells(self, near: Int, top: int, bottom: int) -> list[tuple[int, int]]:
        """Return pairs that show the same cell, of those that begin to share rows in a strip."""
        picked = self.instances[near]
        runs = rle.decode_runs(picked.rles, picked.image_hw)
        pairs = mask_pairs(runs, picked.class_ids)
        i, j = pairs.first, pairs.second
        first_row = np.maximum(self.boxes[near[i], 1], self.boxes[near[j], 1])
        counts = self.tile_of[near[i]] != self.tile_of[near[j]]
        counts &= (first_row >= top) & (first_row < bottom)
        i, j, iou = i[counts], j[counts], pairs.iou[counts]
        area = rle.areas_of(runs)
        shared = np.rint(iou / (1 + iou) * (area[i] + area[j])).astype(np.int64)
        in_i = self._count_inside(runs, i, self.tile_of[near[j]])
        in_j = self._count_inside(runs, j, self.tile_of[near[i]])
        same = shared > self.params.iou_thr * (in_i + in_j - shared)
        cut_i, cut_j = self.is_cut[near[i]], self.is_cut[near[j]]
        same |= cut_i & ~cut_j & (shared > self.params.inside_thr * area[i])
        same |= cut_j & ~cut_i & (shared > self.params.inside_thr * area[j])
        return list(zip(near[i[same]].tolist(), near[j[same]].tolist(), strict=True))

    def _count_inside(self, runs: rle.Runs, index: Int, tile: Int) -> Int:
        """Count the pixels of masks ``index`` inside the windows of ``tile``, pair by pair."""
        owner, column, top, bottom = rle.column_pieces(runs)
        n_pieces = np.bincount(owner, minlength=runs.n_masks)
        begin = np.cumsum(n_pieces) - n_pieces
        counts = np.zeros(len(index), dtype=np.int64)
        batch_of = np.cumsum(n_pieces[index]) // MAX_PIECES
        edges = np.flatnonzero(np.diff(batch_of)) + 1
        for rows in np.split(np.arange(len(index)), edges):
            lengths = n_pieces[index[rows]]
            pair = np.repeat(rows, lengths)
            piece = begin[index[pair]] + ranges_of(lengths)
            y0, x0, y1, x1 = self.windows[tile[pair]].T
            rows_inside = np.minimum(bottom[piece], y1) - np.maximum(top[piece], y0)
            is_inside = (column[piece] >= x0) & (column[piece] < x1)
            values = np.where(is_inside, np.maximum(rows_inside, 0), 0)
            counts += np.bincount(pair, weights=values, minlength=len(index)).astype(np.int64)
        return counts

    def _join(self, groups: Sequence[Sequence[int]]) -> InstanceSet:
        """Return one instance per group: the first one's, with the union of the masks and boxes."""
        flat = np.array([i for group in groups for i in group], dtype=np.int64)
        group_of = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        leads = self.instances[np.array([group[0] for group in groups], dtype=np.int64)]
        image_hw = leads.image_hw
        runs = rle.decode_runs([self.instances.rles[i] for i in flat.tolist()], image_hw)
        union = _union(runs, group_of, len(groups))
        boxes = np.zeros((len(groups), 4), dtype=np.float32)
        if len(groups):
            begin = np.flatnonzero(np.diff(group_of, prepend=-1))
            parts = self.instances.boxes_xyxy[flat]
            boxes[:, :2] = np.minimum.reduceat(parts[:, :2], begin)
            boxes[:, 2:] = np.maximum.reduceat(parts[:, 2:], begin)
        return replace(leads, rles=tuple(rle.encode_runs(union)), boxes_xyxy=boxes)


def _groups(parts: Sequence[int], partners: Mapping[int, Sequence[int]]) -> list[list[int]]:
    """Return cut parts that belong together, each group in the order of ``parts``."""
    waiting = set(parts)
    place = {part: k for k, part in enumerate(parts)}
    groups = []
    for first in parts:
        if first not in waiting:
            continue
        waiting.discard(first)
        group, open_ends = [first], [first]
        while open_ends:
            for other in partners.get(open_ends.pop(), ()):
                if other in waiting:
                    waiting.discard(other)
                    group.append(other)
                    open_ends.append(other)
        groups.append(sorted(group, key=place.__getitem__))
    return groups


def _union(runs: rle.Runs, group_of: Int, n_groups: int) -> rle.Runs:
    """Unite the masks of each group."""
    span = runs.image_hw[0] * runs.image_hw[1] + 1  # no run crosses from one group to the next
    owner = group_of[runs.owner]
    order = np.argsort(owner * span + runs.starts, kind='stable')
    starts = (owner * span + runs.starts)[order]
    reach = np.maximum.accumulate((owner * span + runs.ends)[order]) if len(order) else starts
    is_first = np.ones(len(starts), dtype=bool)
    is_first[1:] = starts[1:] > reach[:-1]
    is_last = np.append(is_first[1:], True)[: len(starts)]
    owner_of = owner[order][is_first]
    return rle.runs_from_pieces(
        starts[is_first] - owner_of * span,
        reach[is_last] - owner_of * span,
        owner_of,
        n_groups,
        runs.image_hw,
    )

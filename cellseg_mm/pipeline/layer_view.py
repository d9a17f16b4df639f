"""Label layers seen through a choice of rows and columns.

In: (L, h, w) label layers of an image as read. Out: :class:`LayerView`, the same layers resized by
the nearest pixel, cropped, mirrored and padded. Each of these only chooses rows and columns, so it
costs O(H + W) and touches no pixel; choices compose exactly. Invariant: the layers never change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from cellseg_mm.core.arrays import Int

Int32 = NDArray[np.int32]
Layers = NDArray[np.int32] | torch.Tensor


@dataclass(frozen=True, slots=True)
class RasterRuns:
    """Horizontal runs of one value in a label map, in raster order, background left out.

    Attributes:
        rows: (R,) int32.
        starts: (R,) int32, first column.
        ends: (R,) int32, one past the last column.
        values: (R,) int32, above 0.
    """

    rows: Int32
    starts: Int32
    ends: Int32
    values: Int32

    @property
    def n_bytes(self) -> int:
        """Memory of the arrays."""
        return sum(a.nbytes for a in (self.rows, self.starts, self.ends, self.values))


def find_runs(label_map: NDArray[np.int32]) -> RasterRuns:
    """Find the runs of an (H, W) label map in one pass."""
    height, width = label_map.shape
    begins = np.ones((height, width), dtype=bool)  # a run begins where the left neighbour differs
    np.not_equal(label_map[:, 1:], label_map[:, :-1], out=begins[:, 1:])
    first = np.flatnonzero(begins)
    lengths = np.diff(first, append=height * width)
    values = np.ascontiguousarray(label_map).reshape(-1)[first]
    used = values > 0
    rows, starts = np.divmod(first[used].astype(np.int32), np.int32(max(width, 1)))
    return RasterRuns(rows, starts, starts + lengths[used].astype(np.int32), values[used])


def paint_runs(runs: RasterRuns, image_hw: tuple[int, int]) -> Int32:
    """Return the (H, W) label map that has these runs; the inverse of :func:`find_runs`."""
    height, width = image_hw
    first = runs.rows.astype(np.int64) * width + runs.starts
    lengths = (runs.ends - runs.starts).astype(np.int64)
    after = first + lengths
    # Background before each run, the run, ..., and the background at the end.
    times = np.empty(2 * len(first) + 1, dtype=np.int64)
    times[0:-1:2] = np.diff(first, prepend=0) - np.concatenate([[0], lengths[:-1]])[: len(first)]
    times[1::2] = lengths
    times[-1] = height * width - (after[-1] if len(after) else 0)
    values = np.zeros(len(times), dtype=np.int32)
    values[1::2] = runs.values
    return np.repeat(values, times).reshape(height, width)


class LayerSource:
    """Label layers as an array, as runs, or both; shared by all views and never changed.

    Attributes:
        shape: (L, h, w).
    """

    def __init__(
        self, shape: tuple[int, int, int], array: Layers | None, runs: Sequence[RasterRuns]
    ) -> None:
        """Use :meth:`of_array` or :meth:`of_runs`."""
        self.shape = shape
        self._array = array
        self._runs: dict[int, RasterRuns] = dict(enumerate(runs))

    @classmethod
    def of_array(cls, array: Layers, runs: Sequence[RasterRuns] = ()) -> LayerSource:
        """Hold (L, h, w) int32 layers, and the runs of all of them where they are known."""
        return cls(tuple(array.shape), array, runs)

    @classmethod
    def of_runs(cls, runs: Sequence[RasterRuns], hw: tuple[int, int]) -> LayerSource:
        """Hold the runs of L layers of h x w px; they are painted when pixels are asked for."""
        return cls((len(runs), *hw), None, runs)

    @property
    def array(self) -> Layers:
        """(L, h, w) int32, numpy or a torch tensor on any device."""
        if self._array is None:
            painted = [paint_runs(self._runs[k], self.shape[1:]) for k in range(self.shape[0])]
            # One layer is the usual case and needs no copy.
            self._array = painted[0][None] if len(painted) == 1 else np.array(painted, np.int32)
            self._array = self._array.reshape(self.shape)
        return self._array

    @property
    def device(self) -> torch.device | None:
        """Where the layers are; None for numpy."""
        return self._array.device if isinstance(self._array, torch.Tensor) else None

    def runs(self, layer: int) -> RasterRuns:
        """Return the runs of one layer; found once."""
        if layer not in self._runs:
            label_map = self.array[layer]
            if isinstance(label_map, torch.Tensor):
                label_map = label_map.cpu().numpy()
            self._runs[layer] = find_runs(label_map)
        return self._runs[layer]

    def part(self, top: int, bottom: int, left: int, right: int) -> LayerSource | None:
        """Return the layers cut to a window, or None where all their runs are smaller."""
        known = [self._runs[k] for k in range(self.shape[0]) if k in self._runs]
        n_bytes = 4 * self.shape[0] * (bottom - top) * (right - left)
        if len(known) == self.shape[0] and sum(runs.n_bytes for runs in known) < n_bytes:
            return None
        part = self.array[:, top:bottom, left:right]
        return LayerSource.of_array(
            part if isinstance(part, torch.Tensor) else np.ascontiguousarray(part)
        )

    def without_array(self) -> LayerSource:
        """Return the same layers as runs."""
        return self.of_runs([self.runs(k) for k in range(self.shape[0])], self.shape[1:])


class LayerView:
    """H x W pixels of label layers: pixel (y, x) is source pixel (rows[y], columns[x]).

    Attributes:
        source: The layers.
        rows: (H,) int64 source row of each row, -1 = background. The others neighbour each other,
            and never fall or (mirrored) never rise.
        columns: (W,) int64, likewise.
    """

    def __init__(self, source: LayerSource, rows: Int, columns: Int) -> None:
        self.source = source
        self.rows = rows
        self.columns = columns

    @classmethod
    def of(cls, layers: Layers) -> LayerView:
        """Show (L, H, W) layers as they are."""
        return cls.whole(LayerSource.of_array(layers))

    @classmethod
    def whole(cls, source: LayerSource) -> LayerView:
        """Show all of a source as it is."""
        _, height, width = source.shape
        return cls(source, np.arange(height), np.arange(width))

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width in px."""
        return len(self.rows), len(self.columns)

    @cached_property
    def pixels(self) -> Layers:
        """The layers as seen, (L, H, W) int32; the source itself where nothing was changed."""
        array = self.source.array
        _, height, width = array.shape
        if self.hw == (height, width) and _is_count(self.rows) and _is_count(self.columns):
            return array
        if 0 in array.shape or 0 in self.hw:
            shape = (len(array), *self.hw)
            is_array = isinstance(array, np.ndarray)
            return np.zeros(shape, np.int32) if is_array else array.new_zeros(shape)
        rows, columns = np.maximum(self.rows, 0), np.maximum(self.columns, 0)
        if isinstance(array, torch.Tensor):
            index = (torch.from_numpy(i).to(array.device) for i in (rows, columns))
            seen: Layers = array.index_select(1, next(index)).index_select(2, next(index))
        else:
            seen = array.take(rows, axis=1).take(columns, axis=2)
        seen[:, self.rows < 0] = 0
        seen[:, :, self.columns < 0] = 0
        return seen

    def resize(self, out_hw: tuple[int, int]) -> LayerView:
        """Resize to ``out_hw`` px by the nearest pixel, as OpenCV does."""
        height, width = out_hw
        rows = self.rows[nearest_index(self.hw[0], height)]
        return LayerView(self.source, rows, self.columns[nearest_index(self.hw[1], width)])

    def flip(self, *, rows: bool, columns: bool) -> LayerView:
        """Mirror the order of the rows, of the columns, or of both."""
        new_rows = self.rows[::-1] if rows else self.rows
        return LayerView(self.source, new_rows, self.columns[::-1] if columns else self.columns)

    def quarter_turn(self) -> LayerView:
        """Turn by 90 degrees counter-clockwise, as ``np.rot90``."""
        turned = LayerSource.of_array(self.source.array.swapaxes(1, 2))
        return LayerView(turned, self.columns[::-1], self.rows)

    def window(self, top: int, left: int, out_hw: tuple[int, int]) -> LayerView:
        """Cut ``out_hw`` px from (``top``, ``left``) px on, which may lie outside: background."""
        rows = _cut(self.rows, top, out_hw[0])
        return LayerView(self.source, rows, _cut(self.columns, left, out_hw[1]))

    def compact(self) -> LayerView:
        """Return the same view of a source that is as small as can be, to be sent elsewhere."""
        (top, bottom), (left, right) = _span(self.rows), _span(self.columns)
        part = self.source.part(top, bottom, left, right)
        if part is None:
            return LayerView(self.source.without_array(), self.rows, self.columns)
        rows = np.where(self.rows < 0, -1, self.rows - top)
        return LayerView(part, rows, np.where(self.columns < 0, -1, self.columns - left))

    def measure(self, layer: int, ids: NDArray[np.int32]) -> tuple[Int, Int]:
        """Measure chosen values of one layer, at a cost that does not depend on their number.

        The runs of the source are carried over to the view; nothing is resampled.

        Args:
            layer: Index of the layer.
            ids: (N,) values; repeats and values that do not occur are allowed.

        Returns:
            areas: (N,) int64 px.
            boxes: (N, 4) int64 xyxy px, half-open; zeros where the value is not seen.
        """
        runs = self.source.runs(layer)
        _, height, width = self.source.shape
        y1, y2 = _carried_over(self.rows, height, runs.rows, runs.rows + 1)
        x1, x2 = _carried_over(self.columns, width, runs.starts, runs.ends)
        slots, slot_of = np.unique(ids, return_inverse=True)
        place = _places(runs.values, slots)
        used = (place < len(slots)) & (y2 > y1) & (x2 > x1)
        place, x1, y1, x2, y2 = (a[used] for a in (place, x1, y1, x2, y2))

        pixels = (y2 - y1) * (x2 - x1)
        areas = np.bincount(place, weights=pixels, minlength=len(slots)).astype(np.int64)
        boxes = np.zeros((len(slots), 4), dtype=np.int64)
        boxes[:, :2] = max(self.hw)
        for column, at, low_or_high in ((0, np.minimum, x1), (1, np.minimum, y1)):
            at.at(boxes[:, column], place, low_or_high)
        for column, at, low_or_high in ((2, np.maximum, x2), (3, np.maximum, y2)):
            at.at(boxes[:, column], place, low_or_high)
        boxes[areas == 0] = 0
        return areas[slot_of.reshape(-1)], boxes[slot_of.reshape(-1)]


def nearest_index(n_old: int, n_new: int) -> Int:
    """Return which of ``n_old`` pixels each of ``n_new`` shows after OpenCV's nearest resize.

    OpenCV itself is asked, because its rounding is not documented.
    """
    if n_old == n_new:
        return np.arange(n_old)
    numbers = np.arange(n_old, dtype=np.int32)[None]
    return cv2.resize(numbers, (n_new, 1), interpolation=cv2.INTER_NEAREST)[0].astype(np.int64)


def _is_count(index: Int) -> bool:
    return bool((index == np.arange(len(index))).all())


def _cut(index: Int, first: int, length: int) -> Int:
    inside = index[max(first, 0) : max(first + length, 0)]
    before = min(max(-first, 0), length)
    after = length - before - len(inside)
    if not before and not after:
        return inside
    return np.pad(inside, (before, after), constant_values=-1)


def _span(index: Int) -> tuple[int, int]:
    used = index[index >= 0]
    return (int(used.min()), int(used.max()) + 1) if len(used) else (0, 0)


def _carried_over(index: Int, n_source: int, starts: Int, ends: Int) -> tuple[Int, Int]:
    """Return where source intervals lie in the view; start == end where they are not seen.

    Args:
        index: Rows or columns of a view.
        n_source: Rows or columns of its source.
        starts: (R,) first source pixel.
        ends: (R,) one past the last.
    """
    seen = np.flatnonzero(index >= 0)
    if not len(seen):
        return np.zeros_like(starts), np.zeros_like(starts)
    times = np.bincount(index[seen], minlength=n_source)
    before = np.concatenate([[0], np.cumsum(times)])  # view pixels that show earlier source pixels
    if index[seen[0]] > index[seen[-1]]:  # mirrored
        total = seen[-1] + 1
        return total - before[ends], total - before[starts]
    return seen[0] + before[starts], seen[0] + before[ends]


def _places(values: NDArray[np.int32], slots: NDArray[np.int32]) -> Int:
    """Return each value's index in the rising ``slots``, or ``len(slots)`` if it is not there."""
    n = len(slots)
    if n == 0 or slots[-1] > 1 << 22:  # a table would be larger than the image
        found = np.searchsorted(slots, values)
        return np.where(np.append(slots, 0)[found] == values, found, n)
    table = np.full(int(slots[-1]) + 2, n, dtype=np.int64)
    table[slots] = np.arange(n)
    return table[np.minimum(values, slots[-1] + 1)]

"""Instance masks of mmdet that stay integer label maps from the file to the mask targets.

In: label layers. Out: :class:`LabelMapMasks`, which stock mmdet transforms, data preprocessor and
mask heads use where they expect ``BitmapMasks``. Invariant: no method but ``masks``, ``to_ndarray``
and ``to_tensor`` makes an array per instance, so cost and memory do not grow with their number.

What differs from ``BitmapMasks``, and why:

- ``resize``, ``rescale``, ``crop``, ``flip``, ``pad``, ``expand``, translation by whole pixels and
  rotation by multiples of 90 degrees give exactly its masks.
- ``rotate`` by other angles, ``shear`` and translation by parts of a pixel always sample the
  nearest pixel, whatever ``interpolation`` says: a blend of two ids is the id of a third cell. The
  stock class blends each mask alone and rounds, so the two differ, and only in pixels that touch
  the outline of one of the two (3x3 neighbourhood). Cells that touch still touch here; the stock
  class can make them overlap.
- The value outside the image is background; ``pad_val`` or ``border_value`` other than 0 would put
  every instance there at once and is refused.
- ``crop_and_resize`` has the stock result except where the stock value lies within 1e-5 of the
  threshold 0.5 (the order of float32 sums differs; 1e-3 on a GPU where TF32 was switched on).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mmcv
import numpy as np
import torch
from mmdet.structures.bbox import BaseBoxes, HorizontalBoxes, get_box_type
from mmdet.structures.mask import BaseInstanceMasks, BitmapMasks
from mmdet.structures.mask.structures import both_imtranslate
from numpy.typing import NDArray

Layers = NDArray[np.int32] | torch.Tensor
Index = int | slice | Sequence[int] | NDArray | torch.Tensor

# A window of 2048 x 2048 px at once, or 1024 of 64 x 64: bounds the memory of crop_and_resize.
_MAX_WINDOW_PIXELS = 1 << 22


class LabelMapMasks(BaseInstanceMasks):
    """N instance masks as pixel values of a few label layers.

    Instance i is the pixels with value ``ids[i]`` in ``layers[layer_of[i]]``. Values that no
    instance names are ignored, so choosing instances costs O(N) and shares the layers.
    ``isinstance(masks, BitmapMasks)`` holds, because stock code asks for it before drawing.

    Attributes:
        layers: (L, H, W) int32, 0 = background; numpy, or a torch tensor after ``to(device)``.
            Instances of one layer do not overlap. Never changed in place: it is shared.
        ids: (N,) int32, pixel value of each instance, above 0. Repeats are allowed.
        layer_of: (N,) int64, layer of each instance.
        height: H in px.
        width: W in px.
    """

    def __init__(self, layers: Layers, ids: NDArray, layer_of: NDArray) -> None:
        """Hold ``layers`` without copying when they are int32.

        Raises:
            ValueError: Shapes do not fit, an id is below 1, or a layer does not exist.
        """
        if isinstance(layers, torch.Tensor):
            self.layers: Layers = layers.to(torch.int32)
        else:
            self.layers = np.asarray(layers).astype(np.int32, copy=False)
        self.ids = np.asarray(ids).astype(np.int32, copy=False).reshape(-1)
        self.layer_of = np.asarray(layer_of).astype(np.int64, copy=False).reshape(-1)
        self._check()
        self.height, self.width = int(self.layers.shape[1]), int(self.layers.shape[2])
        self._measured: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        self._decoded: NDArray[np.uint8] | None = None

    def _check(self) -> None:
        shape = tuple(self.layers.shape)
        if len(shape) != 3:
            raise ValueError(f'layers must be (L, H, W), got shape {shape}')
        if len(self.ids) != len(self.layer_of):
            raise ValueError(f'{len(self.ids)} ids but {len(self.layer_of)} layer indices')
        if len(self.ids) and self.ids.min() < 1:
            raise ValueError(f'ids must be above 0 (background), got {self.ids.min()}')
        if len(self.ids) and not 0 <= self.layer_of.min() <= self.layer_of.max() < shape[0]:
            raise ValueError(f'layer indices must be in 0..{shape[0] - 1}, got {self.layer_of}')

    # ---- construction

    @classmethod
    def empty(cls, height: int, width: int) -> LabelMapMasks:
        """Return no masks of an image of the given size in px."""
        layers = np.zeros((0, height, width), dtype=np.int32)
        return cls(layers, np.zeros(0, np.int32), np.zeros(0, np.int64))

    @classmethod
    def from_bitmaps(cls, masks: BitmapMasks | NDArray) -> LabelMapMasks:
        """Put (N, H, W) masks into as few layers as first fit finds.

        Empty masks keep their row. Cost grows with N x H x W: for tests and odd inputs.
        """
        bitmaps = np.asarray(masks.to_ndarray() if isinstance(masks, BaseInstanceMasks) else masks)
        layers: list[NDArray[np.int32]] = []
        layer_of = np.zeros(len(bitmaps), dtype=np.int64)
        for i, bitmap in enumerate(bitmaps.astype(bool)):
            free = (k for k, layer in enumerate(layers) if not layer[bitmap].any())
            layer_of[i] = next(free, len(layers))
            if layer_of[i] == len(layers):
                layers.append(np.zeros(bitmap.shape, dtype=np.int32))
            layers[layer_of[i]][bitmap] = i + 1
        stacked = np.array(layers, dtype=np.int32).reshape(-1, *bitmaps.shape[1:])
        return cls(stacked, np.arange(1, len(bitmaps) + 1), layer_of)

    @classmethod
    def random(
        cls,
        num_masks: int = 3,
        height: int = 32,
        width: int = 32,
        dtype: type = np.uint8,
        rng: int | np.random.RandomState | None = None,
    ) -> LabelMapMasks:
        """Return the masks of ``BitmapMasks.random`` with the same arguments; for tests."""
        return cls.from_bitmaps(BitmapMasks.random(num_masks, height, width, dtype, rng))

    @classmethod
    def cat(cls, masks: Sequence[LabelMapMasks | BitmapMasks]) -> LabelMapMasks:
        """Join masks of images of one size, in order.

        Members that share their layers keep sharing them; the others add theirs. Stock
        ``BitmapMasks`` are taken too (mmdet makes them for images without annotations).

        Raises:
            ValueError: ``masks`` is empty or the sizes differ.
        """
        if len(masks) == 0:
            raise ValueError('masks should not be an empty list.')
        members = [m if isinstance(m, LabelMapMasks) else cls.from_bitmaps(m) for m in masks]
        on_device = [m.layers.device for m in members if isinstance(m.layers, torch.Tensor)]
        members = [m.to(on_device[0]) for m in members] if on_device else members
        sizes = {(m.height, m.width) for m in members}
        if len(sizes) > 1:
            raise ValueError(f'cannot join masks of different sizes (H, W): {sorted(sizes)}')
        distinct = list({id(m.layers): m.layers for m in members}.values())
        starts = np.cumsum([0] + [len(layers) for layers in distinct])
        start_of = {id(layers): start for layers, start in zip(distinct, starts, strict=False)}
        layer_of = [m.layer_of + start_of[id(m.layers)] for m in members]
        return cls(
            _joined(distinct), np.concatenate([m.ids for m in members]), np.concatenate(layer_of)
        )

    # ---- a sequence of instances

    def __len__(self) -> int:
        """Return N."""
        return len(self.ids)

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(num_masks={len(self)}, height={self.height}, '
            f'width={self.width}, layers={len(self.layers)})'
        )

    def __getitem__(self, index: Index) -> LabelMapMasks:
        """Choose instances as numpy does on the first axis; a single int keeps one row."""
        if isinstance(index, torch.Tensor):
            index = index.detach().cpu().numpy()
        rows = np.atleast_1d(np.arange(len(self))[index])
        chosen = LabelMapMasks(self.layers, self.ids[rows], self.layer_of[rows])
        if self._measured is not None:
            chosen._measured = (self._measured[0][rows], self._measured[1][rows])
        return chosen

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """Give each mask as (H, W) uint8 0/1."""
        layers = self._numpy_layers()
        for layer, value in zip(self.layer_of.tolist(), self.ids.tolist(), strict=True):
            yield (layers[layer] == value).astype(np.uint8)

    def __getstate__(self) -> dict:
        state = dict(self.__dict__, _decoded=None)
        if isinstance(self.layers, np.ndarray):
            # A crop is a view: its owner, the whole image, must not travel between workers.
            state['layers'] = np.ascontiguousarray(self.layers)
        return state

    # ---- where the layers are

    def to(self, *args: object, **kwargs: object) -> LabelMapMasks:
        """Move the layers as ``Tensor.to`` moves a tensor; the dtype stays int32.

        mmengine calls this when it moves a sample to the model's device. On the CPU the layers
        stay numpy, or become numpy again.
        """
        device = torch.empty(0).to(*args, **kwargs).device
        if device.type == 'cpu':
            return self._with_layers(self._numpy_layers())
        return self._with_layers(self._tensor_layers().to(device))

    def _numpy_layers(self) -> NDArray[np.int32]:
        if isinstance(self.layers, torch.Tensor):
            return self.layers.cpu().numpy()
        return self.layers

    def _tensor_layers(self) -> torch.Tensor:
        if isinstance(self.layers, torch.Tensor):
            return self.layers.contiguous()
        # torch refuses negative strides (flips) and warns about read-only memory.
        return torch.from_numpy(np.require(self.layers, requirements=['C', 'W']))

    def _with_layers(self, layers: Layers) -> LabelMapMasks:
        if layers is self.layers:
            return self
        if isinstance(self.layers, torch.Tensor) and self.layers.device.type != 'cpu':
            layers = torch.as_tensor(layers, device=self.layers.device)
        return LabelMapMasks(layers, self.ids, self.layer_of)

    # ---- exact geometry

    def rescale(
        self, scale: float | tuple[int, int], interpolation: str = 'nearest'
    ) -> LabelMapMasks:
        """Resize to fit ``scale`` and keep the aspect ratio, as ``mmcv.imrescale``.

        ``interpolation`` is taken for the sake of the interface; the nearest pixel is used.
        """
        new_wh = mmcv.rescale_size((self.width, self.height), scale)
        return self.resize(new_wh[::-1], interpolation)

    def resize(self, out_shape: tuple[int, int], interpolation: str = 'nearest') -> LabelMapMasks:
        """Resize to ``out_shape`` (H, W) px by the nearest pixel, whatever ``interpolation`` is."""
        del interpolation
        height, width = out_shape[:2]
        if (height, width) == (self.height, self.width):
            return self
        return self._each_layer(
            (height, width),
            lambda layer: mmcv.imresize(layer, (width, height), interpolation='nearest'),
        )

    def flip(self, flip_direction: str = 'horizontal') -> LabelMapMasks:
        """Mirror ``horizontal``, ``vertical`` or ``diagonal`` (both).

        Raises:
            ValueError: Another direction.
        """
        axes = {'horizontal': (2,), 'vertical': (1,), 'diagonal': (1, 2)}.get(flip_direction)
        if axes is None:
            raise ValueError(f'flip direction {flip_direction!r} is unknown')
        if isinstance(self.layers, torch.Tensor):
            return self._with_layers(self.layers.flip(axes))
        return self._with_layers(np.flip(self.layers, axes))

    def rotate90(self, k: int) -> LabelMapMasks:
        """Turn by ``k`` x 90 degrees counter-clockwise, as ``np.rot90``; H and W swap for odd k."""
        return self._with_layers(np.rot90(self._numpy_layers(), k, axes=(1, 2)))

    def pad(self, out_shape: tuple[int, int], pad_val: int = 0) -> LabelMapMasks:
        """Add background at the right and the bottom up to ``out_shape`` (H, W) px.

        Raises:
            ValueError: ``pad_val`` is not 0, or ``out_shape`` is smaller than the masks.
        """
        _require_background('pad_val', pad_val)
        height, width = out_shape[:2]
        if height < self.height or width < self.width:
            raise ValueError(f'cannot pad {self.height}x{self.width} to {height}x{width} px')
        return self.expand(height, width, 0, 0)

    def crop(self, bbox: NDArray) -> LabelMapMasks:
        """Cut out ``bbox`` (4,) xyxy whole px, clipped to the image, at least 1 px wide and high.

        The result is a view. An instance that lies outside keeps its row and has no pixel.

        Raises:
            ValueError: ``bbox`` is not a (4,) array.
        """
        bbox = np.asarray(bbox)
        if bbox.shape != (4,):
            raise ValueError(f'a crop box must have shape (4,), got {bbox.shape}')
        x1, x2 = np.clip(bbox[0::2], 0, self.width).astype(int).tolist()
        y1, y2 = np.clip(bbox[1::2], 0, self.height).astype(int).tolist()
        width, height = max(x2 - x1, 1), max(y2 - y1, 1)
        cut = self._with_layers(self.layers[:, y1 : y1 + height, x1 : x1 + width])
        # Only a box right of or below the image leaves less: its one pixel is background.
        return cut.pad((height, width))

    def expand(self, expanded_h: int, expanded_w: int, top: int, left: int) -> LabelMapMasks:
        """Put the masks at (``top``, ``left``) px of a larger, empty image."""
        expanded_h, expanded_w = int(expanded_h), int(expanded_w)
        if (expanded_h, expanded_w, top, left) == (self.height, self.width, 0, 0):
            return self
        shape = (len(self.layers), expanded_h, expanded_w)
        if isinstance(self.layers, torch.Tensor):
            canvas: Layers = self.layers.new_zeros(shape)
        else:
            canvas = np.zeros(shape, dtype=np.int32)
        canvas[:, top : top + self.height, left : left + self.width] = self.layers
        return self._with_layers(canvas)

    # ---- geometry by the nearest pixel

    def translate(
        self,
        out_shape: tuple[int, int],
        offset: float | tuple[float, float],
        direction: str = 'horizontal',
        border_value: int = 0,
        interpolation: str = 'bilinear',
    ) -> LabelMapMasks:
        """Shift by ``offset`` px ``horizontal``, ``vertical`` or ``both`` (dx, dy).

        The masks are cut or padded to ``out_shape`` (H, W) at the right and the bottom first.

        Raises:
            ValueError: ``border_value`` is not 0.
        """
        del interpolation
        _require_background('border_value', border_value)
        height, width = out_shape[:2]
        box = np.array([0, 0, min(width, self.width), min(height, self.height)])
        placed = self.crop(box).pad((height, width))
        return placed._each_layer(
            (height, width),
            lambda layer: both_imtranslate(layer, offset, direction, 0, interpolation='nearest'),
        )

    def shear(
        self,
        out_shape: tuple[int, int],
        magnitude: float,
        direction: str = 'horizontal',
        border_value: int = 0,
        interpolation: str = 'bilinear',
    ) -> LabelMapMasks:
        """Shear by ``magnitude`` px per px, ``horizontal`` or ``vertical``.

        Raises:
            ValueError: ``border_value`` is not 0, or ``out_shape`` is not the masks' (H, W).
        """
        del interpolation
        self._require_same_size('shear', out_shape, border_value)
        return self._each_layer(
            (self.height, self.width),
            lambda layer: mmcv.imshear(layer, magnitude, direction, 0, interpolation='nearest'),
        )

    def rotate(
        self,
        out_shape: tuple[int, int],
        angle: float,
        center: tuple[float, float] | None = None,
        scale: float = 1.0,
        border_value: int = 0,
        interpolation: str = 'bilinear',
    ) -> LabelMapMasks:
        """Rotate as ``BitmapMasks.rotate``, by ``angle`` degrees about ``center`` (x, y) px.

        Raises:
            ValueError: ``border_value`` is not 0, or ``out_shape`` is not the masks' (H, W).
        """
        del interpolation
        self._require_same_size('rotate', out_shape, border_value)
        return self._each_layer(
            (self.height, self.width),
            lambda layer: mmcv.imrotate(layer, angle, center, scale, 0, interpolation='nearest'),
        )

    def _require_same_size(self, what: str, out_shape: tuple[int, int], border_value: int) -> None:
        _require_background('border_value', border_value)
        if tuple(out_shape[:2]) != (self.height, self.width):
            size = (self.height, self.width)
            raise ValueError(f'{what} keeps the size {size}, out_shape is {tuple(out_shape)}')

    def _each_layer(
        self, out_hw: tuple[int, int], change: Callable[[NDArray[np.int32]], NDArray[np.int32]]
    ) -> LabelMapMasks:
        layers = self._numpy_layers()
        if len(layers) == 1:  # the usual case: no copy by stacking
            return self._with_layers(change(layers[0])[None])
        changed = np.zeros((len(layers), *out_hw), dtype=np.int32)
        for k, layer in enumerate(layers):
            changed[k] = change(layer)
        return self._with_layers(changed)

    # ---- measurements

    @property
    def areas(self) -> NDArray[np.int64]:
        """Pixels of each instance, (N,) int64."""
        return self._measure()[0]

    @property
    def boxes_xyxy(self) -> NDArray[np.int64]:
        """Tight boxes, (N, 4) int64 px, half-open; four zeros for an instance without a pixel."""
        return self._measure()[1]

    def get_bboxes(self, dst_type: str | type[BaseBoxes] = 'hbox') -> BaseBoxes:
        """Return the tight boxes as mmdet boxes of the given type."""
        _, box_class = get_box_type(dst_type)
        boxes = HorizontalBoxes(self.boxes_xyxy.astype(np.float32))
        return boxes if box_class is HorizontalBoxes else boxes.convert_to(dst_type)

    def _measure(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if self._measured is None:
            layers = self._numpy_layers()
            areas = np.zeros(len(self), dtype=np.int64)
            boxes = np.zeros((len(self), 4), dtype=np.int64)
            for k in np.unique(self.layer_of).tolist():
                rows = np.flatnonzero(self.layer_of == k)
                areas[rows], boxes[rows] = measure_ids(layers[k], self.ids[rows])
            self._measured = areas, boxes
        return self._measured

    # ---- dense masks, for code that asks for them

    @property
    def masks(self) -> NDArray[np.uint8]:
        """(N, H, W) uint8 0/1, decoded at the first use: N x H x W bytes.

        Read-only: a write would not reach the label map, so it raises instead of being lost.
        """
        if self._decoded is None:
            self._decoded = self.to_ndarray()
            self._decoded.flags.writeable = False
        return self._decoded

    def to_ndarray(self) -> NDArray[np.uint8]:
        """Decode to a new (N, H, W) uint8 array of 0/1."""
        layers = self._numpy_layers()
        masks = np.zeros((len(self), self.height, self.width), dtype=np.uint8)
        for i, (x1, y1, x2, y2) in enumerate(self.boxes_xyxy.tolist()):
            window = layers[self.layer_of[i], y1:y2, x1:x2]
            masks[i, y1:y2, x1:x2] = window == self.ids[i]
        return masks

    def to_tensor(self, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        """Decode to (N, H, W) of 0/1 with the given dtype on the given device."""
        return torch.from_numpy(self.to_ndarray()).to(dtype=dtype, device=device)

    # ---- mask targets

    def crop_and_resize(
        self,
        bboxes: NDArray[np.float32] | torch.Tensor,
        out_shape: tuple[int, int],
        inds: NDArray[np.int64] | torch.Tensor,
        device: torch.device | str = 'cpu',
        interpolation: str = 'bilinear',
        binarize: bool = True,
    ) -> BitmapMasks:
        """Sample the mask ``inds[r]`` inside the box ``bboxes[r]``, for each of R boxes.

        Same result as RoIAlign on float masks (sampling ratio 0, aligned), see the module's
        docstring. Only the pixels of the boxes are read, on the device where the layers are.

        Args:
            bboxes: (R, 4) floating xyxy px.
            out_shape: Height and width of each result in px.
            inds: (R,) instance of each box.
            device: Not used: the result of the interface is a numpy array.
            interpolation: Not used, as in ``BitmapMasks``.
            binarize: Give whether at least half of each cell is covered, not the share.

        Returns:
            R masks of ``out_shape``: bool, or float shares when ``binarize`` is False.
        """
        del device, interpolation
        if len(self) == 0 or len(bboxes) == 0:
            return BitmapMasks(np.zeros((0, *out_shape), dtype=np.uint8), *out_shape)
        if isinstance(inds, torch.Tensor):
            inds = inds.cpu().numpy()
        layers = self._tensor_layers()
        shares = roi_shares(
            layers,
            torch.as_tensor(self.ids[inds], device=layers.device),
            torch.as_tensor(self.layer_of[inds], device=layers.device),
            torch.as_tensor(bboxes).to(layers.device),
            out_shape,
        )
        result = shares >= 0.5 if binarize else shares
        return BitmapMasks(result.cpu().numpy(), *out_shape)


# Stock code takes masks only if they are BitmapMasks or PolygonMasks (mask2ndarray, the visualizer,
# the detectron2 wrapper) and then uses nothing but what this class has.
BitmapMasks.register(LabelMapMasks)


def measure_ids(
    label_map: NDArray[np.int32], ids: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Measure chosen values of a label map in one pass, at a cost that does not depend on N.

    Args:
        label_map: (H, W) integers.
        ids: (N,) integers; repeats and values that do not occur are allowed.

    Returns:
        areas: (N,) int64 px.
        boxes: (N, 4) int64 xyxy px, half-open; zeros where the value does not occur.
    """
    height, width = label_map.shape
    begins = np.ones((height, width), dtype=bool)  # a run begins where the left neighbour differs
    np.not_equal(label_map[:, 1:], label_map[:, :-1], out=begins[:, 1:])
    starts = np.flatnonzero(begins)
    rows, columns = np.divmod(starts, max(width, 1))
    lengths = np.diff(starts, append=height * width)
    slots, slot_of = np.unique(ids, return_inverse=True)
    place = _places(label_map[rows, columns], slots)
    used = place < len(slots)
    place, rows, columns, lengths = place[used], rows[used], columns[used], lengths[used]

    areas = np.bincount(place, weights=lengths, minlength=len(slots)).astype(np.int64)
    boxes = np.zeros((len(slots), 4), dtype=np.int64)
    boxes[:, 0] = width
    np.minimum.at(boxes[:, 0], place, columns)
    np.maximum.at(boxes[:, 2], place, columns + lengths)
    # Runs come in raster order: the first one of a value has its top row, the last one its bottom.
    boxes[place[::-1], 1] = rows[::-1]
    boxes[place, 3] = rows + 1
    boxes[areas == 0] = 0
    return areas[slot_of], boxes[slot_of]


def _places(values: NDArray[np.int32], slots: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return each value's index in the rising ``slots``, or ``len(slots)`` if it is not there."""
    n = len(slots)
    if n == 0 or slots[-1] > 1 << 22:  # a table would be larger than the image
        found = np.searchsorted(slots, values)
        return np.where(np.append(slots, 0)[found] == values, found, n) if n else found + n
    table = np.full(int(slots[-1]) + 2, n, dtype=np.int64)
    table[slots] = np.arange(n)
    inside = (values > 0) & (values <= slots[-1])
    return table[np.where(inside, values, 0)]


def roi_shares(
    layers: torch.Tensor,
    ids: torch.Tensor,
    layer_of: torch.Tensor,
    boxes_xyxy: torch.Tensor,
    out_hw: tuple[int, int],
) -> torch.Tensor:
    """Average each box's mask over an ``out_hw`` grid of cells, as RoIAlign does.

    RoIAlign's mean over bilinear samples is separable: rows weights x mask x column weights.
    Boxes of similar size go through it together.

    Args:
        layers: (L, H, W) int32, contiguous.
        ids: (R,) pixel value of the mask of each box.
        layer_of: (R,) its layer.
        boxes_xyxy: (R, 4) floating px.
        out_hw: Cells per box.

    Returns:
        (R, *out_hw), the dtype of ``boxes_xyxy``, in 0..1.
    """
    shares = boxes_xyxy.new_zeros((len(boxes_xyxy), *out_hw))
    sides = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).amax(dim=1).clamp(min=32)
    size_class = sides.log2().ceil().cpu().numpy()  # windows of up to 32, 64, 128, ... px
    for k in np.unique(size_class).tolist():
        rows = np.flatnonzero(size_class == k)
        per_chunk = max(1, _MAX_WINDOW_PIXELS >> int(2 * k))
        for first in range(0, len(rows), per_chunk):
            chunk = torch.as_tensor(rows[first : first + per_chunk], device=layers.device)
            shares[chunk] = _roi_shares_of_chunk(
                layers, ids[chunk], layer_of[chunk], boxes_xyxy[chunk], out_hw
            )
    return shares


def _roi_shares_of_chunk(
    layers: torch.Tensor,
    ids: torch.Tensor,
    layer_of: torch.Tensor,
    boxes_xyxy: torch.Tensor,
    out_hw: tuple[int, int],
) -> torch.Tensor:
    _, height, width = layers.shape
    x1, y1, x2, y2 = boxes_xyxy.unbind(dim=1)
    y_first, y_weights, y_count = _axis_weights(y1, y2, out_hw[0], height)  # (R, h, Y)
    x_first, x_weights, x_count = _axis_weights(x1, x2, out_hw[1], width)  # (R, w, X)
    y = y_first[:, None] + torch.arange(y_weights.shape[2], device=layers.device)
    x = x_first[:, None] + torch.arange(x_weights.shape[2], device=layers.device)
    # Windows have one size per chunk; where they leave the image their weights are 0.
    line = layer_of[:, None] * height + y.clamp(max=height - 1)  # (R, Y)
    pixel = line[:, :, None] * width + x.clamp(max=width - 1)[:, None, :]  # (R, Y, X)
    masks = (torch.take(layers, pixel) == ids[:, None, None]).to(y_weights.dtype)
    sums = y_weights @ masks @ x_weights.transpose(1, 2)  # (R, h, w)
    return sums / (y_count * x_count).clamp(min=1)[:, None, None]


def _axis_weights(
    low: torch.Tensor, high: torch.Tensor, n_cells: int, extent: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what each pixel of a window adds to each cell of one axis.

    Args:
        low: (R,) first edge of each box in px.
        high: (R,) last edge.
        n_cells: Cells along the axis.
        extent: Pixels of the image along the axis.

    Returns:
        first: (R,) int64, first pixel of the window.
        weights: (R, n_cells, window) sums of bilinear weights, not divided by ``count``.
        count: (R,) samples per cell.

    Source: RoIAlign with ``aligned=True, sampling_ratio=0`` as in mmcv
    ``csrc/pytorch/cpu/roi_align.cpp``, Apache-2.0; positions are computed in its order so that
    ties fall the same way.
    """
    start, length = low - 0.5, (high - low).clamp(min=0)
    step = length / n_cells
    count = step.ceil()
    cell = torch.arange(n_cells, device=low.device, dtype=low.dtype)
    sample = torch.arange(max(int(count.max()), 1), device=low.device, dtype=low.dtype)
    corner = start[:, None] + cell * step[:, None]  # (R, n_cells)
    inner = (sample + 0.5) * step[:, None] / count.clamp(min=1)[:, None]  # (R, samples)
    at = corner[:, :, None] + inner[:, None, :]  # (R, n_cells, samples)
    valid = (at >= -1) & (at <= extent) & (sample < count[:, None])[:, None, :]

    at = at.clamp(0, extent - 1)
    lower = at.floor()
    fraction = at - lower
    first = start.floor().clamp(0, extent - 1).long()
    window = int((high.ceil().clamp(0, extent).long() - first).max().clamp(min=0)) + 2
    lower = (lower.long() - first[:, None, None]).clamp(0, window - 2)
    weights = low.new_zeros((len(low), n_cells, window))
    weights.scatter_add_(2, lower, (1 - fraction) * valid)
    weights.scatter_add_(2, lower + 1, fraction * valid)
    return first, weights, count


def _joined(parts: list[Layers]) -> Layers:
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    return np.concatenate(parts)


def _require_background(name: str, value: int | tuple[int, ...]) -> None:
    if np.any(np.asarray(value) != 0):
        raise ValueError(f'{name} is {value}; label maps have background (0) outside the image')

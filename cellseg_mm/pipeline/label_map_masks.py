"""Instance masks of mmdet that stay integer label maps from the file to the mask targets.

In: label layers. Out: :class:`LabelMapMasks`, which stock mmdet transforms, data preprocessor and
mask heads use where they expect ``BitmapMasks``. Invariant: no method but ``masks``, ``to_ndarray``
and ``to_tensor`` makes an array per instance, so cost and memory do not grow with their number;
resize, crop, flip and pad touch no pixel at all (see :mod:`cellseg_mm.pipeline.layer_view`).

What differs from ``BitmapMasks``, and why:

- ``resize``, ``rescale``, ``crop``, ``flip``, ``pad``, ``expand``, translation by whole pixels and
  rotation by multiples of 90 degrees give exactly its masks.
- ``rotate`` by other angles, ``shear`` and translation by parts of a pixel always sample the
  nearest pixel, whatever ``interpolation`` says: a blend of two ids is the id of a third cell. The
  stock class blends each mask alone and rounds, so the two differ, and only in pixels that touch
  the outline of one of the two (3x3 neighbourhood). Cells that touch still touch here; the stock
  class can make them overlap.
- ``BatchSyncRandomResize`` resizes images and boxes but no masks, in stock mmdet too.
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
from mmdet.structures.mask.structures import both_imtranslate, get_offsets_hv
from numpy.typing import NDArray

from cellseg_mm.pipeline.layer_view import Layers, LayerView
from cellseg_mm.pipeline.mask_targets import roi_shares

Index = int | slice | Sequence[int] | NDArray | torch.Tensor


class LabelMapMasks(BaseInstanceMasks):
    """N instance masks as pixel values of a few label layers.

    Instance i is the pixels with value ``ids[i]`` in ``layers[layer_of[i]]``. Values that no
    instance names are ignored, so choosing instances costs O(N) and shares the layers.
    ``isinstance(masks, BitmapMasks)`` holds, because stock code asks for it before drawing.

    Attributes:
        ids: (N,) int32, pixel value of each instance, above 0. Repeats are allowed.
        layer_of: (N,) int64, layer of each instance.
        view: The layers with the rows and columns that are left of them; shared, never changed.
        height: H in px.
        width: W in px.
    """

    def __init__(self, layers: Layers | LayerView, ids: NDArray, layer_of: NDArray) -> None:
        """Hold ``layers`` (L, H, W), without copying them when they are int32.

        Raises:
            ValueError: Shapes do not fit, an id is below 1, or a layer does not exist.
        """
        self.view = layers if isinstance(layers, LayerView) else LayerView.of(_as_layers(layers))
        self.ids = np.asarray(ids).astype(np.int32, copy=False).reshape(-1)
        self.layer_of = np.asarray(layer_of).astype(np.int64, copy=False).reshape(-1)
        self._check()
        self.height, self.width = self.view.hw
        self._measured: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        self._decoded: NDArray[np.uint8] | None = None

    def _check(self) -> None:
        n_layers = self.view.source.shape[0]
        if len(self.ids) != len(self.layer_of):
            raise ValueError(f'{len(self.ids)} ids but {len(self.layer_of)} layer indices')
        if len(self.ids) and self.ids.min() < 1:
            raise ValueError(f'ids must be above 0 (background), got {self.ids.min()}')
        if len(self.ids) and not 0 <= self.layer_of.min() <= self.layer_of.max() < n_layers:
            raise ValueError(f'layer indices must be in 0..{n_layers - 1}, got {self.layer_of}')

    @property
    def layers(self) -> Layers:
        """(L, H, W) int32, 0 = background; numpy, or a torch tensor after ``to(device)``.

        Sampled at the first use after a resize, crop, flip or pad. Shared: not to be changed.
        """
        return self.view.pixels

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
        devices = [d for d in (m.view.source.device for m in members) if d is not None]
        members = [m.to(devices[0]) for m in members] if devices else members
        sizes = {(m.height, m.width) for m in members}
        if len(sizes) > 1:
            raise ValueError(f'cannot join masks of different sizes (H, W): {sorted(sizes)}')
        distinct = list({id(m.view): m.view for m in members}.values())
        starts = np.cumsum([0] + [view.source.shape[0] for view in distinct])
        start_of = {id(view): start for view, start in zip(distinct, starts, strict=False)}
        return cls(
            _joined(distinct),
            np.concatenate([m.ids for m in members]),
            np.concatenate([m.layer_of + start_of[id(m.view)] for m in members]),
        )

    # ---- a sequence of instances

    def __len__(self) -> int:
        """Return N."""
        return len(self.ids)

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(num_masks={len(self)}, height={self.height}, '
            f'width={self.width}, layers={self.view.source.shape[0]})'
        )

    def __getitem__(self, index: Index) -> LabelMapMasks:
        """Choose instances as numpy does on the first axis; a single int keeps one row."""
        if isinstance(index, torch.Tensor):
            index = index.detach().cpu().numpy()
        rows = np.atleast_1d(np.arange(len(self))[index])
        chosen = LabelMapMasks(self.view, self.ids[rows], self.layer_of[rows])
        if self._measured is not None:
            chosen._measured = (self._measured[0][rows], self._measured[1][rows])
        return chosen

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """Give each mask as (H, W) uint8 0/1."""
        layers = self._numpy_layers()
        for layer, value in zip(self.layer_of.tolist(), self.ids.tolist(), strict=True):
            yield (layers[layer] == value).astype(np.uint8)

    def __getstate__(self) -> dict:
        # What a crop left out must not travel between workers.
        return dict(self.__dict__, _decoded=None, view=self.view.compact())

    # ---- where the layers are

    def to(self, *args: object, **kwargs: object) -> LabelMapMasks:
        """Move the layers as ``Tensor.to`` moves a tensor; the dtype stays int32.

        mmengine calls this when it moves a sample to the model's device. On the CPU the layers
        stay numpy, or become numpy again.
        """
        device = torch.empty(0).to(*args, **kwargs).device
        source = self.view.source
        if device == (source.device or torch.device('cpu')) and device.type != 'cpu':
            return self
        if device.type == 'cpu' and source.device is None:
            return self
        array = source.array
        if isinstance(array, torch.Tensor):
            moved: Layers = array.cpu().numpy() if device.type == 'cpu' else array.to(device)
        else:
            moved = torch.from_numpy(np.require(array, requirements=['C', 'W'])).to(device)
        there = LayerView.of(moved).source
        return self._with_view(LayerView(there, self.view.rows, self.view.columns))

    def _numpy_layers(self) -> NDArray[np.int32]:
        layers = self.layers
        return layers.cpu().numpy() if isinstance(layers, torch.Tensor) else layers

    def _with_view(self, view: LayerView) -> LabelMapMasks:
        return LabelMapMasks(view, self.ids, self.layer_of)

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
        return self._with_view(self.view.resize((int(height), int(width))))

    def flip(self, flip_direction: str = 'horizontal') -> LabelMapMasks:
        """Mirror ``horizontal``, ``vertical`` or ``diagonal`` (both).

        Raises:
            ValueError: Another direction.
        """
        if flip_direction not in ('horizontal', 'vertical', 'diagonal'):
            raise ValueError(f'flip direction {flip_direction!r} is unknown')
        rows, columns = flip_direction != 'horizontal', flip_direction != 'vertical'
        return self._with_view(self.view.flip(rows=rows, columns=columns))

    def rotate90(self, k: int) -> LabelMapMasks:
        """Turn by ``k`` x 90 degrees counter-clockwise, as ``np.rot90``; H and W swap for odd k."""
        view = self.view
        for _ in range(k % 4):
            view = view.quarter_turn()
        return self._with_view(view)

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

        An instance that lies outside keeps its row and has no pixel.

        Raises:
            ValueError: ``bbox`` is not a (4,) array.
        """
        bbox = np.asarray(bbox)
        if bbox.shape != (4,):
            raise ValueError(f'a crop box must have shape (4,), got {bbox.shape}')
        x1, x2 = np.clip(bbox[0::2], 0, self.width).astype(int).tolist()
        y1, y2 = np.clip(bbox[1::2], 0, self.height).astype(int).tolist()
        # A box right of or below the image leaves one pixel of background.
        return self._with_view(self.view.window(y1, x1, (max(y2 - y1, 1), max(x2 - x1, 1))))

    def expand(self, expanded_h: int, expanded_w: int, top: int, left: int) -> LabelMapMasks:
        """Put the masks at (``top``, ``left``) px of a larger, empty image.

        Raises:
            ValueError: The masks do not fit there.
        """
        height, width, top, left = int(expanded_h), int(expanded_w), int(top), int(left)
        if min(top, left, height - top - self.height, width - left - self.width) < 0:
            raise ValueError(
                f'{self.height}x{self.width} px at ({top}, {left}) leave {height}x{width} px'
            )
        return self._with_view(self.view.window(-top, -left, (height, width)))

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
        out_hw = (int(out_shape[0]), int(out_shape[1]))
        placed = self._with_view(self.view.window(0, 0, out_hw))
        dx, dy = get_offsets_hv(offset, direction)
        if dx == round(dx) and dy == round(dy):
            return placed._with_view(placed.view.window(-round(dy), -round(dx), out_hw))
        return placed._each_layer(
            lambda layer: both_imtranslate(layer, offset, direction, 0, interpolation='nearest')
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
            lambda layer: mmcv.imrotate(layer, angle, center, scale, 0, interpolation='nearest'),
        )

    def _require_same_size(self, what: str, out_shape: tuple[int, int], border_value: int) -> None:
        _require_background('border_value', border_value)
        if tuple(out_shape[:2]) != (self.height, self.width):
            size = (self.height, self.width)
            raise ValueError(f'{what} keeps the size {size}, out_shape is {tuple(out_shape)}')

    def _each_layer(
        self, change: Callable[[NDArray[np.int32]], NDArray[np.int32]]
    ) -> LabelMapMasks:
        layers = self._numpy_layers()
        changed = np.zeros_like(layers)
        for k, layer in enumerate(layers):
            changed[k] = change(layer)
        moved: Layers = changed
        if isinstance(self.layers, torch.Tensor):
            moved = torch.from_numpy(changed).to(self.layers.device)
        return self._with_view(LayerView.of(moved))

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
            areas = np.zeros(len(self), dtype=np.int64)
            boxes = np.zeros((len(self), 4), dtype=np.int64)
            for k in np.unique(self.layer_of).tolist():
                rows = np.flatnonzero(self.layer_of == k)
                areas[rows], boxes[rows] = self.view.measure(k, self.ids[rows])
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
        device = self.view.source.device or torch.device('cpu')
        shares = roi_shares(
            self.view,
            torch.from_numpy(self.ids[inds]).to(device),
            torch.from_numpy(self.layer_of[inds]).to(device),
            torch.as_tensor(bboxes).to(device),
            out_shape,
        )
        result = shares >= 0.5 if binarize else shares
        return BitmapMasks(result.cpu().numpy(), *out_shape)


# Stock code takes masks only if they are BitmapMasks or PolygonMasks (mask2ndarray, the visualizer,
# the detectron2 wrapper) and then uses nothing but what this class has.
BitmapMasks.register(LabelMapMasks)


def _as_layers(layers: Layers) -> Layers:
    if len(layers.shape) != 3:
        raise ValueError(f'layers must be (L, H, W), got shape {tuple(layers.shape)}')
    if isinstance(layers, torch.Tensor):
        return layers.to(torch.int32)
    return layers.astype(np.int32, copy=False)


def _joined(views: Sequence[LayerView]) -> LayerView:
    if len(views) == 1:
        return views[0]
    parts = [view.pixels for view in views]
    if isinstance(parts[0], torch.Tensor):
        return LayerView.of(torch.cat(parts))
    return LayerView.of(np.concatenate(parts))


def _require_background(name: str, value: int | tuple[int, ...]) -> None:
    if np.any(np.asarray(value) != 0):
        raise ValueError(f'{name} is {value}; label maps have background (0) outside the image')

"""The one currency of the project: N scored instances of one image.

In: label maps, detector output, prediction files. Out: :class:`InstanceSet`, and files of them.
Ground truth, predictions, fused predictions and submissions are the same record.
Invariant: masks exist only as RLE or as tight crops; class ids are 0-based here, and 1-based only
inside the functions that read and write COCO files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core import rle
from cellseg_mm.core.arrays import Int

PROB_KEYS = ('mask_probs', 'mask_boxes')  # of ``extra``: masks before they were cut

Index = slice | NDArray[np.bool_] | NDArray[np.intp] | Sequence[int]


@dataclass(frozen=True, slots=True)
class InstanceSet:
    """N instances of one image.

    Attributes:
        name: Case name: the training folder's or the test file's name without suffix.
        image_id: COCO image id.
        image_hw: Height and width of the original image in px.
        class_ids: (N,) int64, 0-based.
        scores: (N,) float32 in 0..1; ground truth has 1.
        boxes_xyxy: (N, 4) float32, px of the original image, half-open edges. A detector's box for
            predictions, the tight box of the mask for ground truth.
        rles: N COCO ``counts`` strings (compressed, column-major, size ``image_hw``).
        extra: Further arrays whose first length is N. Keys in use:
            ``mask_probs`` (N, S, S) float16, mask probabilities inside ``mask_boxes``;
            ``mask_boxes`` (N, 4) float32 xyxy px, the frame of ``mask_probs`` where it is not
            ``boxes_xyxy``; ``n_votes`` (N,) int64, members that agreed; ``agreement`` (N,)
            float32 = votes / members; ``mask_uncertainty`` (N,) float32 in 0..1; ``uncut_area``
            (N,) int64 px before overlaps were resolved.
    """

    name: str
    image_id: int
    image_hw: tuple[int, int]
    class_ids: NDArray[np.int64]
    scores: NDArray[np.float32]
    boxes_xyxy: NDArray[np.float32]
    rles: tuple[bytes, ...]
    extra: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, 'image_hw', (int(self.image_hw[0]), int(self.image_hw[1])))
        set_(self, 'image_id', int(self.image_id))
        set_(self, 'class_ids', np.asarray(self.class_ids, dtype=np.int64).reshape(-1))
        set_(self, 'scores', np.asarray(self.scores, dtype=np.float32).reshape(-1))
        set_(self, 'boxes_xyxy', np.asarray(self.boxes_xyxy, dtype=np.float32).reshape(-1, 4))
        set_(self, 'rles', tuple(self.rles))
        set_(self, 'extra', dict(self.extra))
        n = len(self.rles)
        lengths: dict[str, NDArray[Any]] = {
            'class_ids': self.class_ids,
            'scores': self.scores,
            'boxes_xyxy': self.boxes_xyxy,
        }
        for key, value in {**lengths, **self.extra}.items():
            if len(value) != n:
                raise ValueError(f'{self.name}: {key} has length {len(value)}, rles has {n}')

    def __len__(self) -> int:
        return len(self.rles)

    def __getitem__(self, index: Index) -> InstanceSet:
        """Return the chosen instances in the given order."""
        picked = np.arange(len(self))[index]
        return replace(
            self,
            class_ids=self.class_ids[picked],
            scores=self.scores[picked],
            boxes_xyxy=self.boxes_xyxy[picked],
            rles=tuple(self.rles[i] for i in picked.tolist()),
            extra={key: value[picked] for key, value in self.extra.items()},
        )

    @property
    def areas(self) -> NDArray[np.int64]:
        """Mask pixels of each instance, (N,) int64."""
        return rle.areas_of(rle.decode_runs(self.rles, self.image_hw))

    def by_score(self) -> InstanceSet:
        """Return the instances by falling score; equal scores keep their order."""
        return self[np.argsort(-self.scores, kind='stable')]

    def without_probs(self) -> InstanceSet:
        """Return the instances without mask probabilities, most of what they weigh."""
        kept = {key: value for key, value in self.extra.items() if key not in PROB_KEYS}
        return replace(self, extra=kept)

    def crops(self) -> tuple[list[NDArray[np.bool_]], NDArray[np.int64]]:
        """Return tight Boolean crops and their (N, 2) row and column; see ``rle.decode_crops``."""
        return rle.decode_crops(self.rles, self.image_hw)

    def masks(self) -> NDArray[np.bool_]:
        """Return full masks, (N, H, W) bool: for tests and pictures of a few cells only."""
        full = np.zeros((len(self), *self.image_hw), dtype=bool)
        for i, (crop, (y, x)) in enumerate(zip(*self.crops(), strict=True)):
            full[i, y : y + crop.shape[0], x : x + crop.shape[1]] = crop
        return full

    def to_label_map(self) -> NDArray[np.int32]:
        """Return an (H, W) int32 map: 0 = background, k = k-th instance of this set.

        A contested pixel goes to the higher score, and of equal scores to the earlier instance.
        """
        label_map = np.zeros(self.image_hw, dtype=np.int32)
        crops, offsets = self.crops()
        for i in np.argsort(-self.scores, kind='stable')[::-1].tolist():
            (y, x), crop = offsets[i].tolist(), crops[i]
            label_map[y : y + crop.shape[0], x : x + crop.shape[1]][crop] = i + 1
        return label_map

    @classmethod
    def empty(cls, name: str, image_id: int, image_hw: tuple[int, int]) -> InstanceSet:
        """Return a set without instances."""
        none = np.empty(0, dtype=np.float32)
        return cls(name, image_id, image_hw, np.empty(0, dtype=np.int64), none, none, ())

    @classmethod
    def from_crops(
        cls,
        name: str,
        image_id: int,
        image_hw: tuple[int, int],
        *,
        crops: Sequence[NDArray[np.bool_]],
        offsets_yx: NDArray[np.int64],
        class_ids: NDArray[np.int64],
        scores: NDArray[np.float32],
    ) -> InstanceSet:
        """Build a set from tight masks; boxes become the tight boxes of the masks."""
        runs = rle.runs_from_crops(crops, offsets_yx, image_hw)
        rles = tuple(rle.encode_runs(runs))
        return cls(name, image_id, image_hw, class_ids, scores, rle.boxes_of(runs), rles)

    @classmethod
    def from_label_layers(
        cls,
        name: str,
        image_id: int,
        layers: NDArray[np.integer],
        layer_of: NDArray[np.int64],
        class_ids: NDArray[np.int64],
    ) -> InstanceSet:
        """Build ground truth from label layers.

        Args:
            name: Case name.
            image_id: COCO image id.
            layers: (L, H, W) integers; instance i has the value i + 1 in layer ``layer_of[i]``.
            layer_of: (N,) int64.
            class_ids: (N,) int64, 0-based.

        Raises:
            ValueError: An instance has no pixel.
        """
        from scipy import ndimage

        crops: list[NDArray[np.bool_]] = []
        offsets = np.zeros((len(class_ids), 2), dtype=np.int64)
        found = [ndimage.find_objects(layer, max_label=len(class_ids)) for layer in layers]
        for i, layer_index in enumerate(np.asarray(layer_of).tolist()):
            box = found[layer_index][i]
            if box is None:
                raise ValueError(f'{name}: instance {i} has no pixel in layer {layer_index}')
            crops.append(layers[layer_index][box] == i + 1)
            offsets[i] = box[0].start, box[1].start
        return cls.from_crops(
            name,
            image_id,
            (layers.shape[1], layers.shape[2]),
            crops=crops,
            offsets_yx=offsets,
            class_ids=class_ids,
            scores=np.ones(len(crops), dtype=np.float32),
        )


def concatenate(sets: Sequence[InstanceSet]) -> InstanceSet:
    """Join sets of the same image, in order. ``extra`` keeps the keys that all have.

    Raises:
        ValueError: ``sets`` is empty, or the sets are of different images.
    """
    if not sets:
        raise ValueError('concatenate needs at least one set')
    first = sets[0]
    if any(
        (s.name, s.image_id, s.image_hw) != (first.name, first.image_id, first.image_hw)
        for s in sets
    ):
        raise ValueError(f'cannot join instances of different images: {[s.name for s in sets]}')
    keys = [key for key in first.extra if all(key in s.extra for s in sets)]
    return replace(
        first,
        class_ids=np.concatenate([s.class_ids for s in sets]),
        scores=np.concatenate([s.scores for s in sets]),
        boxes_xyxy=np.concatenate([s.boxes_xyxy for s in sets]),
        rles=tuple(r for s in sets for r in s.rles),
        extra={key: np.concatenate([s.extra[key] for s in sets]) for key in keys},
    )


def canonical_order(instances: InstanceSet, member_of: Int | None = None) -> Int:
    """Return the indices by falling score, then class, box, RLE bytes and member, (N,) int64."""
    boxes, n = instances.boxes_xyxy, len(instances)
    keys = [*boxes.T[::-1], instances.class_ids, -instances.scores]
    order: Int = np.lexsort(keys)
    tied = np.ones(max(n - 1, 0), dtype=bool)
    for key in keys:
        tied &= key[order[1:]] == key[order[:-1]]
    if not tied.any():
        return order
    # Comparing RLE bytes is slow, and only equal boxes need it.
    rle_rank = np.zeros(n, dtype=np.int64)
    edge = np.concatenate([[False], tied]) | np.concatenate([tied, [False]])
    tied_rles = [instances.rles[i] for i in order[edge].tolist()]
    rank_of = {text: rank for rank, text in enumerate(sorted(set(tied_rles)))}
    rle_rank[order[edge]] = [rank_of[text] for text in tied_rles]
    member_of = np.zeros(n, dtype=np.int64) if member_of is None else member_of
    order[:] = np.lexsort([member_of, rle_rank, *keys])
    return order

"""Members of one image that see the same cells differently, and how two results are compared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.fusion import fuse

HW = (19, 14)  # not square, so that a swap of rows and columns shows
SIDE = 5
MERGING = ['nms', 'mask_nms', 'soft_nms', 'wbf', 'soft_mask']


def build(masks, scores, class_ids, *, boxes=None, hw=HW, extra=None) -> InstanceSet:
    """An instance set from full masks; boxes are tight unless given."""
    masks = np.asarray(masks, dtype=bool).reshape(-1, *hw)
    made = InstanceSet.from_crops(
        'case',
        7,
        hw,
        crops=list(masks),
        offsets_yx=np.zeros((len(masks), 2), np.int64),
        class_ids=np.asarray(class_ids, dtype=np.int64),
        scores=np.asarray(scores, dtype=np.float32),
    )
    boxes = made.boxes_xyxy if boxes is None else boxes
    return replace(made, boxes_xyxy=boxes, extra=extra or {})


def build_from_crops(crops, offsets_yx, hw) -> InstanceSet:
    """Class 0, score 1."""
    n = len(crops)
    return InstanceSet.from_crops(
        'case',
        7,
        hw,
        crops=crops,
        offsets_yx=offsets_yx,
        class_ids=np.zeros(n, np.int64),
        scores=np.ones(n, np.float32),
    )


def rectangles(boxes, scores, class_ids=None, *, hw=HW) -> InstanceSet:
    """Masks that fill their whole-numbered boxes, so that mask IoU equals box IoU."""
    masks = np.zeros((len(boxes), *hw), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    class_ids = np.zeros(len(boxes), int) if class_ids is None else class_ids
    return build(masks, scores, class_ids, hw=hw)


def random_member(rng: np.random.Generator, places: np.ndarray, with_probs: bool) -> InstanceSet:
    """Jittered ellipses around shared places, some missing, some doubled, a few anywhere."""
    ys, xs = np.mgrid[: HW[0], : HW[1]]
    chosen = [place for place in places for _ in range(rng.choice([0, 1, 1, 1, 2]))]
    chosen += [tuple(rng.integers(0, HW)) for _ in range(rng.integers(2))]
    masks = []
    for cy, cx in chosen:
        shift = rng.integers(-1, 2, 2)
        ry, rx = rng.integers(1, 5), rng.integers(1, 4)
        mask = ((ys - cy - shift[0]) / ry) ** 2 + ((xs - cx - shift[1]) / rx) ** 2 <= 1
        mask[rng.integers(HW[0])] &= rng.random() < 0.7  # a row cut out: two components
        masks.append(mask if rng.random() < 0.97 else mask & False)  # an empty mask
    n = len(masks)
    masks = np.asarray(masks, bool).reshape(n, *HW)
    # Eighths: many equal scores, and their sums are exact in any order.
    scores, class_ids = rng.integers(1, 9, n) / 8, rng.integers(0, 2, n)
    tight = build(masks, scores, class_ids)
    boxes = tight.boxes_xyxy + rng.integers(-2, 3, (n, 4)) / 4 * (rng.random() < 0.5)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    extra = {}
    if with_probs:
        frames = boxes + np.array([-0.5, -0.25, 0.75, 0.5])
        extra = {
            'mask_probs': rng.random((n, SIDE, SIDE)).astype(np.float16),
            'mask_boxes': frames.astype(np.float32),
        }
    return replace(tight, boxes_xyxy=boxes, extra=extra)


def random_members(seed: int, *, n_members: int = 4, with_probs: bool = False) -> list[InstanceSet]:
    """Members that see the same cells differently; one is empty, two may be equal."""
    rng = np.random.default_rng(seed)
    # Neighbours at 3 to 5 px touch and overlap.
    places = np.array([(y, x) for y in (3, 8, 14) for x in (3, 7, 11)])
    members = [random_member(rng, places, with_probs) for _ in range(n_members)]
    if seed % 3 == 0:
        members[1] = InstanceSet.empty('case', 7, HW)
    if seed % 4 == 0:
        members[2] = members[0]  # every instance of one has its equal in the other
    return members


def as_cells(member: InstanceSet) -> list[dict]:
    """The same for the reference."""
    cells = []
    for i, mask in enumerate(member.masks()):
        cell = {
            'score': float(member.scores[i]),
            'cls': int(member.class_ids[i]),
            'box': tuple(member.boxes_xyxy[i].tolist()),
            'mask': mask,
            'rle': member.rles[i],
        }
        if 'mask_probs' in member.extra:
            cell['probs'] = member.extra['mask_probs'][i].astype(float)
            cell['frame'] = tuple(member.extra['mask_boxes'][i].tolist())
        cells.append(cell)
    return cells


def assert_identical(first: InstanceSet, second: InstanceSet) -> None:
    assert first.rles == second.rles
    for key in ('class_ids', 'scores', 'boxes_xyxy'):
        assert getattr(first, key).tobytes() == getattr(second, key).tobytes(), key
    assert sorted(first.extra) == sorted(second.extra)
    for key in first.extra:
        assert first.extra[key].tobytes() == second.extra[key].tobytes(), key


def separate_cells(with_probs: bool) -> InstanceSet:
    """Four cells, two of which touch without overlap; masks are what their probabilities paint."""
    boxes = np.array([(1, 1, 5, 6), (5, 1, 9, 6), (1, 8, 6, 14), (8, 10, 12, 18)], np.float32)
    probs = np.random.default_rng(3).random((4, SIDE, SIDE)).astype(np.float16) ** 0.5
    crops, low = fuse.paste_probs(probs, boxes, HW)
    made = InstanceSet.from_crops(
        'case',
        7,
        HW,
        crops=crops,
        offsets_yx=low,
        class_ids=[0, 0, 1, 0],
        scores=[0.9, 0.7, 0.3, 0.7],
    )
    extra = {'mask_probs': probs, 'mask_boxes': boxes} if with_probs else {}
    return replace(made, boxes_xyxy=boxes, extra=extra)

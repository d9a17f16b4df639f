"""fusion: equal to pixel loops and to ensemble-boxes; the members' order never matters."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import ensemble_boxes
import numpy as np
import pytest
from ensemble_boxes import ensemble_boxes_nms

from cellseg_mm.core import rle
from cellseg_mm.core.errors import ConfigError, PredictionError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.fusion import fuse as fusion
from cellseg_mm.fusion import masks as fusion_masks
from cellseg_mm.fusion import rules as fusion_rules
from cellseg_mm.fusion.clusters import Clusters, box_pairs, mask_pairs, weighted_boxes
from cellseg_mm.fusion.fuse import PostProcess, from_spec, fuse, fuse_with_report, postprocess
from cellseg_mm.fusion.pool import Pool
from cellseg_mm.fusion.post import Dropped
from tests.support import reference_fusion as reference

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


def assert_same(got: InstanceSet, expected: list[dict], n_members: int) -> None:
    """Compare with the reference, which gives its cells in the order of their clusters."""
    assert len(got) == len(expected)
    keys = [
        (-np.float32(c['score']), c['cls'], *np.float32(c['box']), c['votes']) for c in expected
    ]
    expected = [expected[i] for i in sorted(range(len(expected)), key=keys.__getitem__)]
    got_keys = zip(-got.scores, got.class_ids, *got.boxes_xyxy.T, got.extra['n_votes'], strict=True)
    got = got[sorted(range(len(got)), key=list(got_keys).__getitem__)]
    np.testing.assert_allclose(got.scores, [c['score'] for c in expected], rtol=1e-6)
    assert got.class_ids.tolist() == [c['cls'] for c in expected]
    if len(got):
        np.testing.assert_allclose(got.boxes_xyxy, [c['box'] for c in expected], rtol=1e-6)
    assert got.extra['n_votes'].tolist() == [c['votes'] for c in expected]
    np.testing.assert_allclose(
        got.extra['agreement'], [c['votes'] / n_members for c in expected], rtol=1e-6
    )
    for i, (mask, cell) in enumerate(zip(got.masks(), expected, strict=True)):
        # Averages are stored as float16: pixels within its step of the threshold may go either way.
        clear = np.abs(cell['values'] - 0.5) > 1e-3 if 'values' in cell else np.ones(HW, bool)
        assert np.array_equal(mask & clear, cell['mask'] & clear), i
        if 'probs' in cell:
            np.testing.assert_allclose(got.extra['mask_probs'][i], cell['probs'], atol=1e-3)
            np.testing.assert_allclose(got.extra['mask_boxes'][i], cell['frame'], rtol=1e-6)
    # The mean of 4p(1-p) of float16 probabilities, in float32.
    atol = 2e-3 if 'mask_probs' in got.extra else 1e-6
    np.testing.assert_allclose(
        got.extra['mask_uncertainty'], [c['uncertainty'] for c in expected], atol=atol
    )


SPECS = [
    ('nms', lambda m: reference.nms(m, 0.5, 'box')),
    ('nms:iou_thr=0.3,class_vote', lambda m: reference.nms(m, 0.3, 'box', True)),
    ('mask_nms', lambda m: reference.nms(m, 0.5, 'mask')),
    ('mask_nms:iou_thr=0,class_vote', lambda m: reference.nms(m, 0.0, 'mask', True)),
    ('soft_nms', lambda m: reference.soft_nms(m, 'gaussian', 0.5, 0.5, 0.001)),
    (
        'soft_nms:method=linear,iou_thr=0.3,min_score=0.2',
        lambda m: reference.soft_nms(m, 'linear', 0.5, 0.3, 0.2),
    ),
    ('wbf', lambda m: reference.wbf(m, 0.55, 'avg')),
    (
        'wbf:iou_thr=0.2,score_type=box_and_model_avg,class_vote',
        lambda m: reference.wbf(m, 0.2, 'box_and_model_avg', class_vote=True),
    ),
    (
        'wbf:iou_thr=0.4,score_type=absent_model_aware_avg',
        lambda m: reference.wbf(m, 0.4, 'absent_model_aware_avg'),
    ),
    ('wbf:score_type=max', lambda m: reference.wbf(m, 0.55, 'max')),
    ('soft_mask', lambda m: reference.soft_mask(m, 0.5)),
    (
        'soft_mask:iou_thr=0.2,class_vote',
        lambda m: reference.soft_mask(m, 0.2, class_vote=True),
    ),
]


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('with_probs', [False, True], ids=['masks', 'probs'])
@pytest.mark.parametrize(('spec', 'slow'), SPECS, ids=[spec for spec, _ in SPECS])
def test_rule_equals_reference(spec: str, slow, with_probs: bool, seed: int) -> None:
    members = random_members(seed, with_probs=with_probs)
    # The reference takes members in the canonical order too: which of two equal cells of equal
    # members leads a cluster does not show in its result.
    expected = slow([as_cells(member) for member in members])
    got, report = fuse_with_report(members, from_spec(spec))
    assert_same(got, expected, len(members))
    assert report.n_in == sum(map(len, members)) == report.n_merged + report.n_out


def test_random_members_provoke_every_path() -> None:
    reports = [
        fuse_with_report(random_members(seed, with_probs=with_probs), from_spec('wbf:iou_thr=0.2'))
        for seed in range(8)
        for with_probs in (False, True)
    ]
    total = sum((report for _, report in reports), fusion.FuseReport())
    assert total.n_images == 16
    assert min(total.n_from_probs, total.n_from_pixels) > 50
    assert total.n_fallbacks > 0


def assert_identical(first: InstanceSet, second: InstanceSet) -> None:
    assert first.rles == second.rles
    for key in ('class_ids', 'scores', 'boxes_xyxy'):
        assert getattr(first, key).tobytes() == getattr(second, key).tobytes(), key
    assert sorted(first.extra) == sorted(second.extra)
    for key in first.extra:
        assert first.extra[key].tobytes() == second.extra[key].tobytes(), key


@pytest.mark.parametrize('with_probs', [False, True], ids=['masks', 'probs'])
@pytest.mark.parametrize('spec', [spec for spec, _ in SPECS])
def test_order_of_members_and_instances_is_irrelevant(spec: str, with_probs: bool) -> None:
    post = PostProcess(disjoint=True)
    for seed in range(12):
        members = random_members(seed, with_probs=with_probs)
        rng = np.random.default_rng(seed)
        shuffled = [
            members[i][rng.permutation(len(members[i]))] for i in rng.permutation(len(members))
        ]
        rule = from_spec(spec)
        assert_identical(fuse(members, rule, post), fuse(shuffled, rule, post))


@pytest.mark.parametrize('spec', MERGING)
def test_masks_that_differ_in_pixels_only_have_an_order(spec: str) -> None:
    full, holed = np.zeros((2, *HW), bool)
    full[2:8, 2:8] = holed[2:8, 2:8] = True
    holed[4, 4] = False
    box = np.array([[2, 2, 8, 8]] * 2)
    member = build([full, holed], [0.5, 0.5], [1, 1], boxes=box)
    other = build([holed], [0.5], [1], boxes=box[:1])
    expected = fuse([member, other], from_spec(spec))
    assert_identical(fuse([member[[1, 0]], other], from_spec(spec)), expected)
    assert_identical(fuse([other, member[[1, 0]]], from_spec(spec)), expected)


def separate_cells(with_probs: bool) -> InstanceSet:
    """Four cells, two of which touch without overlap; masks are what their probabilities paint."""
    boxes = np.array([(1, 1, 5, 6), (5, 1, 9, 6), (1, 8, 6, 14), (8, 10, 12, 18)], np.float32)
    probs = np.random.default_rng(3).random((4, SIDE, SIDE)).astype(np.float16) ** 0.5
    crops, low = fusion.paste_probs(probs, boxes, HW)
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


@pytest.mark.parametrize('with_probs', [False, True], ids=['masks', 'probs'])
@pytest.mark.parametrize('spec', MERGING)
def test_one_member_is_itself(spec: str, with_probs: bool) -> None:
    member = separate_cells(with_probs)
    got = fuse([member], from_spec(spec))
    order = [0, 1, 3, 2]  # by score; of two equal scores the lower box first
    assert got.rles == tuple(member.rles[i] for i in order)
    assert got.scores.tolist() == member.scores[order].tolist()
    assert np.array_equal(got.boxes_xyxy, member.boxes_xyxy[order])
    assert got.extra['n_votes'].tolist() == [1] * 4
    assert got.extra['agreement'].tolist() == [1.0] * 4
    if with_probs:
        assert np.array_equal(got.extra['mask_probs'], member.extra['mask_probs'][order])
    else:
        assert got.extra['mask_uncertainty'].tolist() == [0.0] * 4


@pytest.mark.parametrize('n_copies', [2, 3, 5, 7])
@pytest.mark.parametrize('with_probs', [False, True], ids=['masks', 'probs'])
@pytest.mark.parametrize('spec', ['nms', 'mask_nms', 'wbf', 'soft_mask'])
def test_copies_of_one_member_give_the_same_masks(
    spec: str, with_probs: bool, n_copies: int
) -> None:
    member = separate_cells(with_probs)
    got = fuse([member] * n_copies, from_spec(spec))
    once = fuse([member], from_spec(spec))
    assert got.rles == once.rles
    assert np.array_equal(got.boxes_xyxy, once.boxes_xyxy)
    np.testing.assert_allclose(got.scores, once.scores, rtol=1e-6)
    assert got.extra['n_votes'].tolist() == [n_copies] * 4
    assert got.extra['agreement'].tolist() == [1.0] * 4
    np.testing.assert_array_equal(got.extra['mask_uncertainty'], once.extra['mask_uncertainty'])


@pytest.mark.parametrize('spec', ['nms', 'mask_nms', 'wbf', 'soft_mask'])
def test_an_iou_equal_to_the_threshold_is_no_match(spec: str) -> None:
    # 4 x 2 = 8 px inside 4 x 4 = 16 px: IoU is exactly 8 / 16.
    members = [rectangles([(2, 3, 6, 7)], [0.9]), rectangles([(2, 3, 6, 5)], [0.8])]
    below = float(np.nextafter(0.5, 0))
    assert len(fuse(members, from_spec(f'{spec}:iou_thr=0.5'))) == 2
    assert len(fuse(members, from_spec(f'{spec}:iou_thr={below!r}'))) == 1


def test_soft_nms_linear_starts_above_the_threshold() -> None:
    members = [rectangles([(2, 3, 6, 7)], [0.9]), rectangles([(2, 3, 6, 5)], [0.8])]
    below = float(np.nextafter(0.5, 0))
    equal = fuse(members, from_spec('soft_nms:method=linear,iou_thr=0.5'))
    assert equal.scores.tolist() == [np.float32(0.9), np.float32(0.8)]
    assert equal.extra['n_votes'].tolist() == [1, 1]
    above = fuse(members, from_spec(f'soft_nms:method=linear,iou_thr={below!r}'))
    np.testing.assert_allclose(above.scores, [0.9, 0.8 * (1 - 0.5)], rtol=1e-6)
    assert above.extra['n_votes'].tolist() == [2, 2]


def test_votes_agreement_and_disagreement_by_hand() -> None:
    # Three of four members see the first cell, 4 x 4, 4 x 3 and 4 x 4 px; one sees the second.
    members = [
        rectangles([(1, 1, 5, 5)], [0.8]),
        rectangles([(1, 1, 5, 4), (8, 8, 12, 12)], [0.6, 0.5]),
        rectangles([(1, 1, 5, 5)], [0.4]),
        InstanceSet.empty('case', 7, HW),
    ]
    got = fuse(members, from_spec('soft_mask'))
    # Scores: (.8 + .6 + .4) / 3 x 3 / 4 and .5 x 1 / 4.
    np.testing.assert_allclose(got.scores, [0.45, 0.125], rtol=1e-6)
    assert got.extra['n_votes'].tolist() == [3, 1]
    assert got.extra['agreement'].tolist() == [0.75, 0.25]
    # Pairs: 12/16, 16/16, 12/16; mean 5/6.
    np.testing.assert_allclose(got.extra['mask_uncertainty'], [1 / 6, 0], atol=1e-7)
    # Of the last row 0.8 + 0.4 of 1.8 votes: kept.
    assert got.areas.tolist() == [16, 16]


def test_a_pixel_with_half_the_votes_stays() -> None:
    members = [rectangles([(1, 1, 5, 5)], [0.7]), rectangles([(1, 1, 5, 4)], [0.7])]
    assert fuse(members, from_spec('soft_mask')).areas.tolist() == [16]
    assert fuse(members, from_spec('soft_mask:mask_thr=0.51')).areas.tolist() == [12]


def test_class_vote_by_hand() -> None:
    box = [(1, 1, 5, 5)]
    members = [
        rectangles(box, [0.75], [2]),
        rectangles(box, [0.5], [1]),
        rectangles(box, [0.5], [1]),
    ]
    for spec in ('nms', 'mask_nms', 'wbf', 'soft_mask'):
        voted = fuse(members, from_spec(f'{spec}:class_vote'))
        assert voted.class_ids.tolist() == [1], spec  # 0.5 + 0.5 against 0.75
        assert sorted(fuse(members, from_spec(spec)).class_ids.tolist()) == [1, 2], spec
    tie = [rectangles(box, [0.5], [2]), rectangles(box, [0.5], [1])]
    assert fuse(tie, from_spec('soft_mask:class_vote')).class_ids.tolist() == [1]


def test_soft_mask_never_joins_two_instances_of_one_member() -> None:
    doubled = rectangles([(1, 1, 5, 5), (1, 1, 5, 5)], [0.9, 0.8])
    other = rectangles([(1, 1, 5, 5)], [0.7])
    got = fuse([doubled, other], from_spec('soft_mask'))
    np.testing.assert_allclose(got.scores, [(0.9 + 0.7) / 2, 0.8 / 2], rtol=1e-6)
    assert got.extra['n_votes'].tolist() == [2, 1]


# ---- the libraries that have it ----


def library_input(
    seed: int, n_members: int = 4
) -> tuple[list[InstanceSet], list[list[np.ndarray]]]:
    """Members with distinct scores (the libraries break ties by their sort) on a 1 x 1 canvas."""
    rng = np.random.default_rng(seed)
    centres = rng.random((12, 2)) * 50 + 5
    boxes, scores, labels = [], [], []
    for _ in range(n_members):
        seen = rng.permutation(12)[: rng.integers(6, 12)]
        seen = np.concatenate([seen, seen[:2]])  # doubles within one member
        half = rng.random((len(seen), 2)) * 4 + 2
        middle = centres[seen] + rng.normal(size=(len(seen), 2))
        corners = np.concatenate([middle - half, middle + half], axis=1)
        boxes.append(np.clip(corners / 64, 0, 1).astype(np.float32))
        scores.append((rng.permutation(900)[: len(seen)] / 1000 + 0.05).astype(np.float32))
        labels.append(seen % 3)
    hw = (64, 64)
    members = [
        replace(rectangles([(1, 1, 3, 3)] * len(b), s, c, hw=hw), boxes_xyxy=b * np.float32(64))
        for b, s, c in zip(boxes, scores, labels, strict=True)
    ]
    return members, [boxes, scores, labels]


def by_score(boxes, scores, labels):
    order = np.lexsort((boxes[:, 0], -scores))
    return boxes[order] * 64, scores[order], labels[order].astype(int)


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('iou_thr', [0.3, 0.55])
@pytest.mark.parametrize('score_type', fusion_rules.SCORE_TYPES)
def test_wbf_equals_ensemble_boxes(score_type: str, iou_thr: float, seed: int) -> None:
    members, (boxes, scores, labels) = library_input(seed)
    found = ensemble_boxes.weighted_boxes_fusion(
        boxes, scores, labels, iou_thr=iou_thr, conf_type=score_type, skip_box_thr=0.2
    )
    rule = fusion_rules.Wbf(iou_thr=iou_thr, score_type=score_type, min_score=0.2)
    got, report = fuse_with_report(members, rule)
    expected_boxes, expected_scores, expected_labels = by_score(*found)
    # ensemble-boxes adds up in float32.
    np.testing.assert_allclose(got.scores, expected_scores, rtol=1e-5)
    np.testing.assert_allclose(got.boxes_xyxy, expected_boxes, rtol=1e-4, atol=1e-4)
    assert got.class_ids.tolist() == expected_labels.tolist()
    assert report.n_skipped == sum(int((s < np.float32(0.2)).sum()) for s in scores) > 0


def test_wbf_overflow_equals_ensemble_boxes() -> None:
    # Six boxes of two members: the mean score times 6 / 2, which we keep below 1.
    one = rectangles([(1, 1, 5, 5)] * 3, [0.25, 0.25, 0.125])
    boxes, scores = [one.boxes_xyxy / 64] * 2, [one.scores] * 2
    found = ensemble_boxes.weighted_boxes_fusion(
        boxes, scores, [one.class_ids] * 2, allows_overflow=True
    )
    got = fuse([one, one], from_spec('wbf:allow_overflow'))
    np.testing.assert_allclose(got.scores, found[1], rtol=1e-6)
    sure = replace(one, scores=np.ones(3, np.float32))
    assert fuse([sure, sure], from_spec('wbf:allow_overflow')).scores.tolist() == [1.0]


@pytest.mark.parametrize('seed', range(6))
def test_nms_equals_ensemble_boxes(seed: int) -> None:
    members, (boxes, scores, labels) = library_input(seed)
    found = ensemble_boxes.nms(boxes, scores, labels, iou_thr=0.5)
    got = fuse(members, from_spec('nms:iou_thr=0.5'))
    expected_boxes, expected_scores, expected_labels = by_score(*found)
    assert got.scores.tolist() == expected_scores.tolist()
    assert np.array_equal(got.boxes_xyxy, expected_boxes)
    assert got.class_ids.tolist() == expected_labels.tolist()


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize(('method', 'code'), [('linear', 1), ('gaussian', 2)])
def test_soft_nms_equals_ensemble_boxes(method: str, code: int, seed: int) -> None:
    members, (boxes, scores, labels) = library_input(seed)
    boxes, scores, labels = map(np.concatenate, (boxes, scores, labels))
    expected = []
    # The library's soft_nms() reorders the scores in place and then picks from them by the old
    # places, so boxes and scores do not belong together. The function beneath it is right.
    for label in np.unique(labels):
        here = labels == label
        decayed = scores[here].astype(np.float64)
        keep = ensemble_boxes_nms.cpu_soft_nms_float(
            boxes[here].astype(np.float64), decayed, Nt=0.4, sigma=0.3, thresh=0.05, method=code
        )
        for box, score in zip(boxes[here][keep], decayed[decayed > 0.05], strict=True):
            expected.append((score, label, *(box * 64)))
    rule = fusion_rules.SoftNms(method=method, sigma=0.3, iou_thr=0.4, min_score=0.05)
    got = fuse(members, rule)
    expected = np.array(sorted(expected, key=lambda row: -row[0]))
    np.testing.assert_allclose(got.scores, expected[:, 0], rtol=1e-6)
    assert got.class_ids.tolist() == expected[:, 1].astype(int).tolist()
    np.testing.assert_allclose(got.boxes_xyxy, expected[:, 2:], rtol=1e-6)


# ---- overlaps ----


@pytest.mark.parametrize('seed', range(20))
def test_pairs_equal_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, hw = 30, (23, 31)
    low = rng.integers(-3, 25, (n, 2)).astype(float)
    boxes = np.concatenate([low, low + rng.choice([0, 1, 2.5, 7, 40], (n, 2))], axis=1)
    group = rng.integers(0, 3, n)
    found = box_pairs(boxes, group)
    expected = [
        (i, j, reference.box_iou(boxes[i], boxes[j]))
        for i in range(n)
        for j in range(i + 1, n)
        if group[i] == group[j] and reference.box_iou(boxes[i], boxes[j]) > 0
    ]
    assert list(zip(found.first, found.second, found.iou, strict=True)) == expected

    masks = rng.random((n, *hw)) < rng.choice([0, 0.01, 0.5], (n, 1, 1))
    crops = list(masks)
    runs = rle.runs_from_crops(crops, np.zeros((n, 2), int), hw)
    found = mask_pairs(runs, group)
    table = rle.iou_matrix(rle.encode_runs(runs), rle.encode_runs(runs), hw)
    expected = [
        (i, j, table[i, j])
        for i in range(n)
        for j in range(i + 1, n)
        if group[i] == group[j] and table[i, j] > 0
    ]
    assert list(zip(found.first, found.second, found.iou, strict=True)) == expected


def test_boxes_that_overlap_by_less_than_rounding_meet() -> None:
    # A large group number moves the boxes so far along the line that their edges become equal.
    boxes = np.array([[0, 0, 1, 1], [1 - 1e-9, 0, 2, 1], [1, 1, 2, 2]])
    found = box_pairs(boxes, np.full(3, 10**9))
    assert (found.first.tolist(), found.second.tolist()) == ([0], [1])


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('iou_thr', [0.0, 0.05, 0.3, 0.5, 0.52])
def test_weighted_boxes_equal_reference_where_means_wander(iou_thr: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 150
    low = rng.random((n, 2)) * 40
    sizes = rng.choice([2, 5, 20], (n, 2)) * (1 + rng.random((n, 2)) / 2)
    boxes = np.concatenate([low, low + sizes], axis=1)
    boxes[n // 2 :] = boxes[: n // 2] + rng.normal(size=(n // 2, 4)) / 3  # so that many fit well
    scores = np.sort(rng.random(n))[::-1]
    group = rng.integers(0, 2, n)
    clusters, means = weighted_boxes(boxes, scores, group, iou_thr)
    rows = zip(boxes.tolist(), scores.tolist(), group.tolist(), strict=True)
    cells = [{'box': b, 'score': s, 'cls': g, 'id': i} for i, (b, s, g) in enumerate(rows)]
    expected, expected_means = reference.weigh_boxes(cells, iou_thr, False)
    got = [np.flatnonzero(clusters.owner == c).tolist() for c in range(len(clusters))]
    assert got == [[cell['id'] for cell in cluster] for cluster in expected]
    np.testing.assert_allclose(means, expected_means, rtol=1e-12)


def test_weighted_boxes_of_equal_fit_join_the_better_cluster() -> None:
    # The third box covers half of each of the others; the grid lists the second one first.
    boxes = np.array([[12, 0, 16, 4], [8, 0, 12, 4], [10, 0, 14, 4]], float)
    clusters, _ = weighted_boxes(boxes, np.array([0.9, 0.8, 0.7]), np.zeros(3, int), 0.2)
    assert clusters.owner.tolist() == [0, 1, 0]


def test_mask_pairs_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    runs = rle.runs_from_crops(list(rng.random((9, 12, 13)) < 0.5), np.zeros((9, 2), int), (12, 13))
    whole = mask_pairs(runs, np.zeros(9, int))
    monkeypatch.setattr('cellseg_mm.fusion.clusters.MAX_RUN_PAIRS', 7)
    parts = mask_pairs(runs, np.zeros(9, int))
    assert len(whole.iou) == 36
    for key in ('first', 'second', 'iou'):
        assert np.array_equal(getattr(whole, key), getattr(parts, key))


# ---- masks ----


def random_frames(rng: np.random.Generator, n: int) -> np.ndarray:
    """Frames inside, across and outside the image, from less than a pixel to beyond the image."""
    low = rng.random((n, 2)) * (HW[1] + 6, HW[0] + 6) - 4
    size = rng.choice([0.4, 1, 3, 9, 40], (n, 2)) * (0.5 + rng.random((n, 2)))
    return np.concatenate([low, low + size], axis=1).astype(np.float32)


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('thr', [0.5, 0.1])
def test_paste_equals_pixel_loop(thr: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs, boxes = rng.random((12, SIDE, SIDE)).astype(np.float16), random_frames(rng, 12)
    crops, low = fusion.paste_probs(probs, boxes, HW, thr)
    for crop, (y, x), prob, box in zip(crops, low, probs, boxes, strict=True):
        full = np.zeros(HW, bool)
        full[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
        values = reference.paste(prob, box.tolist(), HW)
        clear = np.abs(values - thr) > 1e-5
        assert np.array_equal(full & clear, (values >= thr) & clear)


def test_paste_in_small_batches_and_without_width(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    probs, boxes = rng.random((40, SIDE, SIDE)).astype(np.float16), random_frames(rng, 40)
    boxes[3, 2], boxes[4, 3] = boxes[3, 0], boxes[4, 1] - 1
    whole, low = fusion.paste_probs(probs, boxes, HW)
    monkeypatch.setattr(fusion_masks, 'MAX_PIXELS', 1)
    parts, low_of_parts = fusion.paste_probs(probs, boxes, HW)
    assert np.array_equal(low, low_of_parts)
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert whole[3].size == whole[4].size == 0
    with pytest.raises(ValueError, match='above 0'):
        fusion.paste_probs(probs, boxes, HW, 0.0)
    assert fusion.paste_probs(probs[:0], boxes[:0], HW)[0] == []


def test_paste_keeps_a_pixel_at_the_threshold() -> None:
    # One bin per pixel, so every pixel's value is its bin's.
    probs = np.array([[[0.5, 0.25], [0.75, 0.5]]], np.float16)
    (crop,), (low,) = fusion.paste_probs(probs, np.array([[3, 4, 5, 6]]), HW)
    rows, columns = np.nonzero(crop)
    assert [(y + low[0], x + low[1]) for y, x in zip(rows, columns, strict=True)] == [
        (4, 3),
        (5, 3),
        (5, 4),
    ]


@pytest.mark.mm
@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('thr', [0.5, 0.1])
def test_paste_equals_the_mask_heads(thr: float, seed: int) -> None:
    torch = pytest.importorskip('torch')
    mask_head = pytest.importorskip('cellseg_mm.model.mask_head')
    rng = np.random.default_rng(seed)
    probs, boxes = rng.random((60, 28, 28)).astype(np.float16), random_frames(rng, 60)
    hw = (2 * HW[0], 3 * HW[1])
    given = torch.from_numpy(probs).float(), torch.from_numpy(boxes * 2)
    runs = mask_head.paste_runs(*given, hw, threshold=thr, whole_grid=True)
    crops, low = fusion.paste_probs(probs, boxes * 2, hw, thr)
    ours = build_from_crops(crops, low, hw).masks()
    theirs = build_from_crops(*rle.decode_crops(rle.encode_runs(runs), hw), hw).masks()
    assert ours.sum() > 500
    assert (ours != theirs).sum() <= 1  # float32 rounding at the threshold: none seen on x86


def test_votes_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = from_spec('wbf:iou_thr=0.2')
    whole = [fuse(random_members(seed), rule) for seed in range(6)]
    monkeypatch.setattr(fusion_masks, 'MAX_PIXELS', 30)
    for seed, expected in enumerate(whole):
        assert_identical(fuse(random_members(seed), rule), expected)


def test_resampling_to_the_same_frame_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    probs, frames = rng.random((20, 28, 28)).astype(np.float16), random_frames(rng, 20)
    same = fusion_masks.resample_probs(probs, frames, frames)
    assert np.array_equal(same.astype(np.float16), probs)


def test_average_of_probabilities_is_weighted_by_score() -> None:
    frames = np.array([[2, 2, 8, 8]] * 2, np.float32)
    probs = np.stack([np.full((SIDE, SIDE), 0.5), np.full((SIDE, SIDE), 1.0)]).astype(np.float16)
    clusters = Clusters(np.array([0, 0]), np.array([0]))
    mean, frame = fusion_masks.average_probs(
        probs, frames, np.array([0.75, 0.25], np.float32), clusters
    )
    assert mean.tolist() == np.full((1, SIDE, SIDE), 0.75 * 0.5 + 0.25).tolist()
    assert frame.tolist() == [[2, 2, 8, 8]]


# ---- odd input ----


@pytest.mark.parametrize('spec', MERGING)
def test_empty_members(spec: str) -> None:
    empty = InstanceSet.empty('case', 7, HW)
    got, report = fuse_with_report([empty, empty], from_spec(spec))
    assert len(got) == 0
    assert (got.name, got.image_id, got.image_hw) == ('case', 7, HW)
    assert {'n_votes', 'agreement', 'mask_uncertainty'} <= set(got.extra)
    assert report == fusion.FuseReport(n_images=1)


@pytest.mark.parametrize('spec', MERGING)
def test_scores_of_zero(spec: str) -> None:
    member = replace(separate_cells(True), scores=np.zeros(4, np.float32))
    got = fuse([member, member], from_spec(spec))
    assert np.isfinite(got.boxes_xyxy).all()
    assert np.isfinite(got.scores).all()
    if spec != 'soft_nms':  # which drops what is not above min_score
        assert sorted(got.rles) == sorted(member.rles)


def test_probabilities_are_used_only_where_all_have_them() -> None:
    with_probs, without = separate_cells(True), separate_cells(False)
    got, report = fuse_with_report([with_probs, without], from_spec('soft_mask'))
    assert 'mask_probs' not in got.extra
    assert (report.n_from_probs, report.n_from_pixels) == (0, 4)
    empty = InstanceSet.empty('case', 7, HW)  # has no key at all, and nothing to average
    got, report = fuse_with_report([with_probs, with_probs, empty], from_spec('soft_mask'))
    assert (report.n_from_probs, report.n_from_pixels) == (4, 0)
    other_size = replace(
        with_probs,
        extra={**with_probs.extra, 'mask_probs': np.zeros((4, 3, 3), np.float16)},
    )
    assert fuse_with_report([with_probs, other_size], from_spec('wbf'))[1].n_from_pixels == 4


def test_the_box_is_the_frame_where_no_frame_is_given() -> None:
    member = separate_cells(True)
    framed = fuse([member] * 2, from_spec('soft_mask'))
    bare = replace(member, extra={'mask_probs': member.extra['mask_probs']})
    assert_identical(framed, fuse([bare] * 2, from_spec('soft_mask')))


def test_members_that_do_not_fit_are_refused() -> None:
    member = separate_cells(False)
    rule = from_spec('nms')
    with pytest.raises(PredictionError, match='no member'):
        fuse([], rule)
    with pytest.raises(PredictionError, match='only predictions of one image'):
        fuse([member, InstanceSet.empty('other', 7, HW)], rule)
    with pytest.raises(PredictionError, match='only predictions of one image'):
        fuse([member, InstanceSet.empty('case', 7, HW[::-1])], rule)
    with pytest.raises(PredictionError, match='member 1 has a score outside'):
        fuse([member, replace(member, scores=np.full(4, np.nan))], rule)
    with pytest.raises(PredictionError, match='member 0 has a box that is not finite'):
        fuse([replace(member, boxes_xyxy=np.full((4, 4), np.inf))], rule)
    with pytest.raises(PredictionError, match='mask_probs have shape'):
        fuse([replace(member, extra={'mask_probs': np.zeros((4, 3))})], rule)


# ---- after fusion ----


@pytest.mark.parametrize('seed', range(10))
@pytest.mark.parametrize('share', [0.0, 0.4, 1.0])
def test_disjoint_equals_reference(share: float, seed: int) -> None:
    members = random_members(seed)
    everything = fuse(members, from_spec('soft_nms:min_score=0'))
    expected = reference.make_disjoint(as_cells(everything), share, 3)
    post = PostProcess(disjoint=True, max_lost_share=share, min_area_px=3)
    got, dropped = postprocess(everything, post)
    assert got.masks().tolist() == [cell['mask'].tolist() for cell in expected]
    assert got.extra['uncut_area'].tolist() == [cell['uncut'] for cell in expected]
    assert got.scores.tolist() == [np.float32(cell['score']) for cell in expected]
    assert got.masks().sum(axis=0).max() <= 1
    assert dropped.lost_overlap + dropped.too_small == len(everything) - len(got) > 0


def test_a_contested_pixel_goes_to_the_higher_score() -> None:
    cells = rectangles([(1, 1, 5, 5), (3, 1, 9, 5)], [0.6, 0.8])
    got, dropped = postprocess(cells, PostProcess(disjoint=True))
    assert got.areas.tolist() == [24, 8]  # the lower one lost 2 of 4 columns: half, not more
    assert got.extra['uncut_area'].tolist() == [24, 16]
    assert dropped == Dropped()
    below = float(np.nextafter(0.5, 0))
    got, dropped = postprocess(cells, PostProcess(disjoint=True, max_lost_share=below))
    assert got.areas.tolist() == [24]
    assert dropped.lost_overlap == 1


def test_what_is_dropped_takes_no_pixel() -> None:
    # The second loses 3 of its 4 columns and goes; the third then keeps all of its own.
    cells = rectangles([(1, 1, 5, 5), (2, 1, 6, 5), (5, 1, 9, 5)], [0.9, 0.8, 0.7])
    got, dropped = postprocess(cells, PostProcess(disjoint=True))
    assert got.areas.tolist() == [16, 16]
    assert dropped.lost_overlap == 1
    # A cell that loses everything goes even when any loss is allowed.
    twice = rectangles([(1, 1, 5, 5), (1, 1, 5, 5)], [0.9, 0.8])
    got, dropped = postprocess(twice, PostProcess(disjoint=True, max_lost_share=1.0))
    assert (len(got), dropped.lost_overlap) == (1, 1)


def test_thresholds_include_their_value() -> None:
    cells = rectangles([(1, 1, 4, 4), (6, 1, 9, 4), (1, 8, 3, 10)], [0.7, 0.7, 0.3], [0, 1, 1])
    assert len(postprocess(cells, PostProcess(score_thr=0.7))[0]) == 2
    got, dropped = postprocess(cells, PostProcess(score_thr=(0.71, 0.3)))
    assert got.class_ids.tolist() == [1, 1]
    assert dropped == Dropped(below_score=1)
    got, dropped = postprocess(cells, PostProcess(min_area_px=9))
    assert (len(got), dropped) == (2, Dropped(too_small=1))
    assert len(postprocess(cells, PostProcess(min_area_px=10))[0]) == 0
    got, dropped = postprocess(cells, PostProcess(max_instances=1))
    assert (got.class_ids.tolist(), dropped) == ([0], Dropped(over_limit=2))
    with pytest.raises(ConfigError, match='2 values and the instances have class 3'):
        postprocess(replace(cells, class_ids=[0, 1, 2]), PostProcess(score_thr=(0.5, 0.5)))


def test_min_votes() -> None:
    members = [
        rectangles([(1, 1, 5, 5)], [0.8]),
        rectangles([(1, 1, 5, 5), (8, 8, 12, 12)], [0.6] * 2),
    ]
    got, report = fuse_with_report(members, from_spec('nms'), PostProcess(min_votes=2))
    assert got.extra['n_votes'].tolist() == [2]
    assert (report.n_in, report.n_merged, report.n_few_votes, report.n_out) == (3, 1, 1, 1)
    with pytest.raises(ConfigError, match='carry no votes'):
        postprocess(members[0], PostProcess(min_votes=2))


@pytest.mark.parametrize('spec', MERGING)
def test_the_report_accounts_for_every_instance(spec: str) -> None:
    post = PostProcess(
        score_thr=0.2,
        min_votes=2,
        disjoint=True,
        max_lost_share=0.2,
        min_area_px=4,
        max_instances=2,
    )
    total = fusion.FuseReport()
    for seed in range(12):
        total += fuse_with_report(random_members(seed), from_spec(spec), post)[1]
    reasons = ('n_below_score', 'n_few_votes', 'n_lost_overlap', 'n_too_small', 'n_over_limit')
    dropped = sum(getattr(total, reason) for reason in reasons)
    assert total.n_in == total.n_skipped + total.n_merged + dropped + total.n_out
    assert total.n_images == 12
    assert min(total.n_out, total.n_few_votes, total.n_over_limit) > 0


# ---- names ----


@pytest.mark.parametrize('name', list(fusion.FUSION_RULES))
def test_specs_are_read_back(name: str) -> None:
    rule = from_spec(name)
    assert fusion.to_spec(rule) == name
    assert type(rule) is fusion.FUSION_RULES[name]


def test_settings_are_read_and_written() -> None:
    text = 'wbf:iou_thr=0.6,score_type=max,class_vote=true'
    assert from_spec(text) == fusion_rules.Wbf(iou_thr=0.6, score_type='max', class_vote=True)
    assert fusion.to_spec(from_spec(text)) == text
    post = 'score_thr=0.3/0.5,disjoint=true,min_area_px=20'
    expected = PostProcess(score_thr=(0.3, 0.5), disjoint=True, min_area_px=20)
    assert fusion.post_from_spec(post) == expected
    assert fusion.to_spec(expected) == post
    assert fusion.post_from_spec('disjoint') == PostProcess(disjoint=True)
    assert fusion.post_from_spec('') == PostProcess()
    assert from_spec('nms') == from_spec('nms:') == fusion_rules.Nms()


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        pytest.param('wbff', "no rule 'wbff'; choose one of nms, mask_nms", id='unknown rule'),
        pytest.param('', "no rule ''", id='nothing'),
        pytest.param(
            'nms:thr=0.5', "no setting 'thr'; known are iou_thr, class_vote", id='unknown key'
        ),
        pytest.param('nms:iou_thr=half', 'iou_thr is .half.; it must be a number', id='no number'),
        pytest.param('nms:iou_thr', 'it must be a number', id='no value'),
        pytest.param(
            'nms:iou_thr=1.5', r'iou_thr is 1.5; it must be a number in 0.0..1.0', id='range'
        ),
        pytest.param('nms:iou_thr=nan', 'iou_thr is nan', id='nan'),
        pytest.param('nms:class_vote=yes', 'write true or false', id='no switch'),
        pytest.param('wbf:score_type=mean', 'choose one of avg, max', id='no choice'),
        pytest.param('wbf:score_type=max,allow_overflow', 'has no effect', id='no effect'),
        pytest.param('nms:iou_thr=0.5,iou_thr=0.6', 'given twice', id='twice'),
        pytest.param('proposal_share:iou_thr=1', 'known are nothing', id='no settings'),
    ],
)
def test_bad_specs_are_explained(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_spec(spec)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        pytest.param('min_area_px=1.5', 'it must be a whole number', id='no whole number'),
        pytest.param('min_votes=0', 'min_votes is 0', id='range'),
        pytest.param('score_thr=0.5/2', 'score_thr has 2.0', id='score'),
        pytest.param('area=3', "no setting 'area'", id='unknown key'),
    ],
)
def test_bad_post_processing_is_explained(settings: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fusion.post_from_spec(settings)


def test_rules_refuse_wrong_words_and_names() -> None:
    with pytest.raises(ConfigError, match="method is 'cubic'"):
        fusion_rules.SoftNms(method='cubic')
    with pytest.raises(ValueError, match='registered twice'):
        fusion_rules.register('nms')(fusion_rules.Nms)


def test_a_rule_of_ones_own() -> None:
    known = dict(fusion.FUSION_RULES)

    @fusion_rules.register('one_member')
    @dataclass(frozen=True, kw_only=True)
    class OneMember:
        rank: int = 0

        def merge(self, pool: Pool) -> fusion_rules.Merged:
            chosen = pool.instances[pool.member_of == self.rank]
            return fusion_rules.Merged(chosen)

    try:
        members = [separate_cells(False), InstanceSet.empty('case', 7, HW)]
        got, report = fuse_with_report(members, from_spec('one_member:rank=1'))
        both = len(got) + len(fuse(members, from_spec('one_member')))
        assert (both, report.n_in, report.n_out) == (4, 4, len(got))
    finally:
        fusion.FUSION_RULES.clear()
        fusion.FUSION_RULES.update(known)


def test_proposal_share_needs_models() -> None:
    rule = from_spec('proposal_share')
    assert rule.needs_models
    assert not from_spec('nms').needs_models
    with pytest.raises(ConfigError, match='works on models'):
        fuse([separate_cells(False)], rule)


def test_the_picture_in_the_docs_is_current(tmp_path: Path) -> None:
    docs = Path(__file__).resolve().parents[2] / 'docs'
    out = tmp_path / 'fusion.svg'
    subprocess.run([sys.executable, docs / 'fusion_figure.py', out], check=True)
    assert out.read_text() == (docs / 'fusion.svg').read_text()


def test_core_has_no_torch() -> None:
    code = (
        'import sys, cellseg_mm.fusion.fuse; print("torch" in sys.modules, "numba" in sys.modules)'
    )
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ['False', 'False']

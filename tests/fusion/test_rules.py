"""fusion.rules: equal to pixel loops and to ensemble-boxes; the members' order never matters."""

from __future__ import annotations

from dataclasses import replace

import ensemble_boxes
import numpy as np
import pytest
from ensemble_boxes import ensemble_boxes_nms

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.fusion import fuse as fuse_module
from cellseg_mm.fusion import rules
from cellseg_mm.fusion.fuse import PostProcess, from_spec, fuse, fuse_with_report
from tests.support import reference_fusion as reference
from tests.support.fusion_members import (
    HW,
    MERGING,
    as_cells,
    assert_identical,
    build,
    random_members,
    rectangles,
    separate_cells,
)


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
    total = sum((report for _, report in reports), fuse_module.FuseReport())
    assert total.n_images == 16
    assert min(total.n_from_probs, total.n_from_pixels) > 50
    assert total.n_fallbacks > 0


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
@pytest.mark.parametrize('score_type', rules.SCORE_TYPES)
def test_wbf_equals_ensemble_boxes(score_type: str, iou_thr: float, seed: int) -> None:
    members, (boxes, scores, labels) = library_input(seed)
    found = ensemble_boxes.weighted_boxes_fusion(
        boxes, scores, labels, iou_thr=iou_thr, conf_type=score_type, skip_box_thr=0.2
    )
    rule = rules.Wbf(iou_thr=iou_thr, score_type=score_type, min_score=0.2)
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
    rule = rules.SoftNms(method=method, sigma=0.3, iou_thr=0.4, min_score=0.05)
    got = fuse(members, rule)
    expected = np.array(sorted(expected, key=lambda row: -row[0]))
    np.testing.assert_allclose(got.scores, expected[:, 0], rtol=1e-6)
    assert got.class_ids.tolist() == expected[:, 1].astype(int).tolist()
    np.testing.assert_allclose(got.boxes_xyxy, expected[:, 2:], rtol=1e-6)


def test_rules_refuse_wrong_words_and_names() -> None:
    with pytest.raises(ConfigError, match="method is 'cubic'"):
        rules.SoftNms(method='cubic')
    with pytest.raises(ValueError, match='registered twice'):
        rules.register('nms')(rules.Nms)

"""fusion.fuse: odd members, the report of a fusion, and how rules are written as text."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from cellseg_mm.core.errors import ConfigError, PredictionError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.fusion import fuse as fuse_module
from cellseg_mm.fusion import rules
from cellseg_mm.fusion.fuse import PostProcess, from_spec, fuse, fuse_with_report
from cellseg_mm.fusion.pool import Pool
from tests.support.fusion_members import (
    HW,
    MERGING,
    assert_identical,
    random_members,
    separate_cells,
)


@pytest.mark.parametrize('spec', MERGING)
def test_empty_members(spec: str) -> None:
    empty = InstanceSet.empty('case', 7, HW)
    got, report = fuse_with_report([empty, empty], from_spec(spec))
    assert len(got) == 0
    assert (got.name, got.image_id, got.image_hw) == ('case', 7, HW)
    assert {'n_votes', 'agreement', 'mask_uncertainty'} <= set(got.extra)
    assert report == fuse_module.FuseReport(n_images=1)


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
    total = fuse_module.FuseReport()
    for seed in range(12):
        total += fuse_with_report(random_members(seed), from_spec(spec), post)[1]
    reasons = ('n_below_score', 'n_few_votes', 'n_lost_overlap', 'n_too_small', 'n_over_limit')
    dropped = sum(getattr(total, reason) for reason in reasons)
    assert total.n_in == total.n_skipped + total.n_merged + dropped + total.n_out
    assert total.n_images == 12
    assert min(total.n_out, total.n_few_votes, total.n_over_limit) > 0


@pytest.mark.parametrize('name', list(fuse_module.FUSION_RULES))
def test_specs_are_read_back(name: str) -> None:
    rule = from_spec(name)
    assert fuse_module.to_spec(rule) == name
    assert type(rule) is fuse_module.FUSION_RULES[name]


def test_settings_are_read_and_written() -> None:
    text = 'wbf:iou_thr=0.6,score_type=max,class_vote=true'
    assert from_spec(text) == rules.Wbf(iou_thr=0.6, score_type='max', class_vote=True)
    assert fuse_module.to_spec(from_spec(text)) == text
    post = 'score_thr=0.3/0.5,disjoint=true,min_area_px=20'
    expected = PostProcess(score_thr=(0.3, 0.5), disjoint=True, min_area_px=20)
    assert fuse_module.post_from_spec(post) == expected
    assert fuse_module.to_spec(expected) == post
    assert fuse_module.post_from_spec('disjoint') == PostProcess(disjoint=True)
    assert fuse_module.post_from_spec('') == PostProcess()
    assert from_spec('nms') == from_spec('nms:') == rules.Nms()


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
        pytest.param('proposal_share', r'it is gone, .*; choose soft_mask', id='rule that is gone'),
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
        fuse_module.post_from_spec(settings)


def test_a_rule_of_ones_own() -> None:
    known = dict(fuse_module.FUSION_RULES)

    @rules.register('one_member')
    @dataclass(frozen=True, kw_only=True)
    class OneMember:
        rank: int = 0

        def merge(self, pool: Pool) -> rules.RuleResult:
            chosen = pool.instances[pool.member_of == self.rank]
            return rules.RuleResult(chosen)

    try:
        members = [separate_cells(False), InstanceSet.empty('case', 7, HW)]
        got, report = fuse_with_report(members, from_spec('one_member:rank=1'))
        both = len(got) + len(fuse(members, from_spec('one_member')))
        assert (both, report.n_in, report.n_out) == (4, 4, len(got))
    finally:
        fuse_module.FUSION_RULES.clear()
        fuse_module.FUSION_RULES.update(known)


def test_the_picture_in_the_docs_is_current(tmp_path: Path) -> None:
    docs = Path(__file__).resolve().parents[2] / 'docs'
    out = tmp_path / 'fusion.svg'
    subprocess.run([sys.executable, docs / 'fusion_figure.py', out], check=True)
    assert out.read_text() == (docs / 'fusion.svg').read_text()

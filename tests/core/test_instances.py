"""The record of N instances: indexing, joining, order."""

from __future__ import annotations

import numpy as np
import pytest

from cellseg_mm.core.instances import InstanceSet, canonical_order, concatenate

SQUARE = np.ones((2, 2), dtype=bool)


def three(name: str = 'a', **extra: np.ndarray) -> InstanceSet:
    """Three squares; the first and last are of one score."""
    made = InstanceSet.from_crops(
        name,
        7,
        (9, 13),
        crops=[SQUARE, SQUARE, SQUARE],
        offsets_yx=np.array([[0, 4], [5, 8], [0, 0]]),
        class_ids=np.array([1, 0, 1]),
        scores=np.array([0.5, 0.25, 0.5], dtype=np.float32),
    )
    return InstanceSet(
        made.name,
        made.image_id,
        made.image_hw,
        made.class_ids,
        made.scores,
        made.boxes_xyxy,
        made.rles,
        extra,
    )


def test_probabilities_are_dropped_and_the_rest_stays() -> None:
    votes = np.array([1, 2, 3])
    full = three(
        mask_probs=np.zeros((3, 4, 4), dtype=np.float16),
        mask_boxes=np.zeros((3, 4), dtype=np.float32),
        n_votes=votes,
    )
    assert full.without_probs().extra.keys() == {'n_votes'}
    assert full.without_probs().extra['n_votes'].tolist() == [1, 2, 3]
    assert full.without_probs().rles == full.rles
    assert set(full.extra) == {'mask_probs', 'mask_boxes', 'n_votes'}


def test_order_is_by_score_then_class_then_box() -> None:
    # Scores 0.5, 0.25, 0.5; of the equal ones the left box comes first.
    assert canonical_order(three()).tolist() == [2, 0, 1]


def test_order_of_equal_cells_is_by_member() -> None:
    twice = concatenate([three(), three()])
    member_of = np.array([1, 1, 1, 0, 0, 0])
    assert canonical_order(twice, member_of).tolist() == [5, 2, 3, 0, 4, 1]


def test_joining_keeps_what_all_have() -> None:
    joined = concatenate([three(n_votes=np.arange(3)), three(n_votes=np.arange(3), x=np.ones(3))])
    assert joined.extra.keys() == {'n_votes'}
    assert len(joined) == 6


def test_images_do_not_mix() -> None:
    with pytest.raises(ValueError, match='different images'):
        concatenate([three('a'), three('b')])
    with pytest.raises(ValueError, match='at least one set'):
        concatenate([])


def test_a_contested_pixel_goes_to_the_higher_score() -> None:
    crops = [np.ones((2, 3), dtype=bool)] * 2
    made = InstanceSet.from_crops(
        'a',
        0,
        (2, 4),
        crops=crops,
        offsets_yx=np.array([[0, 0], [0, 1]]),
        class_ids=np.zeros(2, dtype=np.int64),
        scores=np.array([0.25, 0.75], dtype=np.float32),
    )
    assert made.to_label_map().tolist() == [[1, 2, 2, 2]] * 2


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match='n_votes has length 2, rles has 3'):
        three(n_votes=np.arange(2))

"""anchors: the best overlap of a cell is that with all anchors of MMDetection's generator."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip('torch')

from cellseg_mm.checks.anchors import AnchorFit, AnchorLevel, best_ious  # noqa: E402

pytestmark = pytest.mark.mm


@pytest.mark.parametrize('seed', range(10))
def test_best_ious_are_those_of_all_anchors(seed: int) -> None:
    from mmdet.models.task_modules.prior_generators import AnchorGenerator
    from mmdet.structures.bbox import bbox_overlaps

    rng = np.random.default_rng(seed)
    generator = AnchorGenerator(
        strides=[4, (8, 16), 32],
        ratios=[0.5, 1.0, 2.0],
        scales=[2, 5],
        center_offset=[0.0, 0.5][seed % 2],
    )
    hw = (int(rng.integers(33, 200)), int(rng.integers(33, 200)))
    middle, size = rng.uniform(-5, 210, (60, 2)), np.exp(rng.uniform(0, 5, (60, 2)))
    boxes = np.concatenate([middle - size / 2, middle + size / 2], axis=1)  # some leave the image
    sizes = [(-(-hw[0] // s[1]), -(-hw[1] // s[0])) for s in generator.strides]
    anchors = torch.cat(generator.grid_priors(sizes, dtype=torch.float64, device='cpu'))
    expected = bbox_overlaps(torch.from_numpy(boxes), anchors.double()).max(dim=1).values.numpy()
    levels = [
        AnchorLevel(base.double().numpy(), tuple(map(float, stride)))
        for base, stride in zip(generator.base_anchors, generator.strides, strict=True)
    ]
    np.testing.assert_allclose(best_ious(boxes, hw, levels), expected, rtol=1e-5, atol=1e-7)


def test_best_iou_by_hand() -> None:
    # Anchor of 8 x 8 around the origin, every 16 px; the box's middle (14, 2) is next to (16, 0).
    level = AnchorLevel(np.array([[-4.0, -4, 4, 4]]), (16.0, 16.0))
    box = np.array([[10.0, -2, 18, 6]])  # overlap (12..18) x (-2..4) = 36 of 64 + 64 - 36
    assert best_ious(box, (64, 64), [level]) == pytest.approx(36 / 92)
    # In an image of 16 px the grid has only its first place, and nothing overlaps.
    assert best_ious(box, (16, 16), [level]) == pytest.approx(0)
    assert best_ious(np.zeros((0, 4)), (16, 16), [level]).shape == (0,)


def test_shares_and_table_by_hand() -> None:
    fit = AnchorFit(
        np.array([0.1, 0.4, 0.9, 0.2]), np.array([0, 0, 1, 1]), np.array([5.0, 20, 20, 200])
    )
    assert fit.share_below(0.3) == 0.5
    rows = {line[:18].strip(): line.split() for line in fit.table(('a', 'b'), (0.3,)).splitlines()}
    assert rows['all'][-3:] == ['4', '0.300', '50.00%']
    assert rows['a'][-1] == '50.00%'
    assert rows['0 to 8 px'][-1] == '100.00%'
    assert rows['16 to 32 px'][-3:] == ['2', '0.650', '0.00%']
    assert rows['from 128 px'][-1] == '100.00%'
    assert '64 to 128 px' not in rows

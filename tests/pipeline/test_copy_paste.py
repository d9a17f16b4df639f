"""pipeline.copy_paste: equal to painting pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmdet.registry import TRANSFORMS

from cellseg_mm.pipeline.copy_paste import LabelMapCopyPaste, Paste
from cellseg_mm.pipeline.label_map_masks import LabelMapMasks
from tests.support.moving_samples import HW, SEEDS, sample, seed_all, truncation_sample

pytestmark = pytest.mark.mm


def test_paste_by_hand() -> None:
    target, source = truncation_sample(), sample(4)
    target['img'] = np.zeros((10, 20, 3), np.uint8)
    heights = source['gt_masks'].boxes_xyxy[:, 3] - source['gt_masks'].boxes_xyxy[:, 1]
    row = int(np.argmax(np.where(heights <= 10, source['gt_masks'].areas, 0)))
    x1, y1, x2, y2 = source['gt_masks'].boxes_xyxy[row]
    cell = source['gt_masks'].to_ndarray()[row, y1:y2, x1:x2].astype(bool)
    results = LabelMapCopyPaste(min_share=0.5).paste(target, source, [Paste(row, 0, 0)])

    before = truncation_sample()['gt_masks'].to_ndarray()
    pasted = np.zeros((10, 20), bool)
    pasted[: cell.shape[0], : cell.shape[1]] = cell
    wanted = [mask & ~pasted for mask in before] + [pasted]
    enough = [w.sum() >= 0.5 * b.sum() for w, b in zip(wanted, [*before, pasted], strict=True)]
    wanted = np.array([w for w, keep in zip(wanted, enough, strict=True) if keep])
    np.testing.assert_array_equal(results['gt_masks'].to_ndarray(), wanted)
    assert results['n_covered'] == enough.count(False) > 0
    assert results['n_pasted'] == 1
    assert results['gt_bboxes_labels'][-1] == source['gt_bboxes_labels'][row]
    assert torch.equal(results['gt_bboxes'].tensor, results['gt_masks'].get_bboxes().tensor)
    value = source['gt_masks'].ids[row]
    np.testing.assert_array_equal(
        results['img'], np.where(pasted, value, 0)[..., None].repeat(3, 2)
    )


@pytest.mark.parametrize('source', ['same', 'other'])
@pytest.mark.parametrize('seed', SEEDS)
def test_copy_paste_equals_painting_by_loops(seed: int, source: str) -> None:
    results, other = sample(seed), sample(seed + 50, (33, 90))
    giver = {**(results if source == 'same' else other)}
    step = LabelMapCopyPaste(source=source, max_pasted=12, min_share=0.3)
    masks = giver['gt_masks']
    pastes = step.draw(np.random.default_rng(seed), HW, giver['gt_bboxes_labels'], masks.boxes_xyxy)
    canvas, img = results['gt_masks'].to_ndarray().astype(bool), results['img'].copy()
    bitmaps = list(canvas)
    for paste in pastes:
        new = np.zeros(HW, bool)
        x1, y1, x2, y2 = masks.boxes_xyxy[paste.row]
        for y in range(y1, y2):
            for x in range(x1, x2):
                if masks.layers[0, y, x] == masks.ids[paste.row]:
                    at = paste.top + y - y1, paste.left + x - x1
                    new[at] = True
                    img[at] = giver['img'][y, x] if source == 'other' else sample(seed)['img'][y, x]
        bitmaps = [mask & ~new for mask in bitmaps] + [new]
    areas = [*results['gt_masks'].areas, *(masks.areas[p.row] for p in pastes)]
    kept = [m for m, a in zip(bitmaps, areas, strict=True) if m.any() and m.sum() >= 0.3 * a]
    got = step.paste(results, results if source == 'same' else other, pastes)
    np.testing.assert_array_equal(got['gt_masks'].to_ndarray(), np.array(kept))
    np.testing.assert_array_equal(got['img'], img)


def test_paste_covers_every_layer() -> None:
    bitmaps = np.zeros((2, 9, 9), bool)
    bitmaps[0, :, :6] = bitmaps[1, :, 4:] = True  # they overlap, so they lie in two layers
    results = {**sample(0, (9, 9)), 'gt_bboxes_labels': np.arange(2)}
    results['gt_masks'] = LabelMapMasks.from_bitmaps(bitmaps)
    results['gt_ignore_flags'] = np.zeros(2, bool)
    cell = {**results, 'gt_masks': LabelMapMasks(np.ones((1, 3, 3)), [1], [0])}
    got = LabelMapCopyPaste(min_share=0).paste(results, cell, [Paste(0, 2, 4)])
    bitmaps[:, 2:5, 4:7] = False
    np.testing.assert_array_equal(got['gt_masks'].to_ndarray()[:2], bitmaps)
    assert got['gt_masks'].areas.tolist()[2] == 9


def test_copy_paste_does_not_touch_shared_layers() -> None:
    results = sample(1)
    shared, before = results['gt_masks'].layers, results['gt_masks'].layers.copy()
    img, img_before = results['img'], results['img'].copy()
    seed_all(3)
    pasted = LabelMapCopyPaste(max_pasted=15)(results)
    assert pasted['n_pasted'] > 0
    np.testing.assert_array_equal(shared, before)
    np.testing.assert_array_equal(img, img_before)


def test_copy_paste_into_an_image_without_cells() -> None:
    empty = sample(0)
    empty.update(
        gt_masks=LabelMapMasks.empty(*HW),
        gt_bboxes=LabelMapMasks.empty(*HW).get_bboxes(),
        gt_bboxes_labels=np.zeros(0, np.int64),
        gt_ignore_flags=np.zeros(0, bool),
        mix_results=[sample(1)],
    )
    seed_all(1)
    results = LabelMapCopyPaste(source='other', max_pasted=9)(empty)
    assert len(results['gt_masks']) == len(results['gt_bboxes_labels']) > 0
    unchanged = LabelMapCopyPaste(max_pasted=0)(sample(2))
    np.testing.assert_array_equal(unchanged['gt_masks'].to_ndarray(), sample(2)['gt_masks'].masks)


def test_copy_paste_runs_in_mmdet_mix_data_set() -> None:
    class Samples:
        metainfo = {}

        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> dict:
            return sample(index)

        def full_init(self) -> None: ...

    from mmdet.datasets import MultiImageMixDataset

    step = {'type': 'LabelMapCopyPaste', 'source': 'other', 'max_pasted': 10}
    mixed = MultiImageMixDataset.__new__(MultiImageMixDataset)
    mixed.dataset, mixed._skip_type_keys, mixed.max_refetch = Samples(), None, 3
    mixed.pipeline, mixed.pipeline_types = [TRANSFORMS.build(step)], ['LabelMapCopyPaste']
    mixed.num_samples = 5
    seed_all(0)
    n_pasted = 0
    for index in range(5):
        results = mixed[index]
        n_pasted += results['n_pasted']
        assert 'mix_results' not in results
        wanted = results['gt_masks'].get_bboxes().tensor
        assert torch.equal(results['gt_bboxes'].tensor, wanted)
    assert n_pasted > 5

"""mask_head: the same pixels as MMDetection's own paste and threshold, without its masks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import cellseg_mm  # noqa: F401  (makes mmdet importable where mmcv has no compiled ops)

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

from mmdet.evaluation.metrics import CocoMetric  # noqa: E402
from mmdet.models.roi_heads.mask_heads import FCNMaskHead  # noqa: E402
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402
from mmdet.structures.mask import BitmapMasks, encode_mask_results  # noqa: E402
from mmengine.config import ConfigDict  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402
from pycocotools import mask as coco_mask  # noqa: E402

from cellseg_mm.core.errors import ConfigError  # noqa: E402
from cellseg_mm.model import mask_head  # noqa: E402
from cellseg_mm.model.mask_head import CellMaskHead, encode_masks, enlarged, paste_runs  # noqa: E402
from cellseg_mm.model.roi_head import CellRoIHead  # noqa: E402

pytestmark = pytest.mark.mm

HW = (47, 61)
DEVICES = [
    'cpu',
    pytest.param(
        'cuda',
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device'),
        ],
    ),
]
# xyxy in an image of 47 x 61 px. Stock on a CPU fails on boxes that lie wholly outside; see below.
BORDER_BOXES = {
    'whole image': (0, 0, 61, 47),
    'larger than the image': (-20.3, -31.7, 90.2, 88.8),
    'very large': (-4000, -3000, 5000, 6000),
    'over the left edge': (-7.5, 10.25, 8.5, 20.75),
    'over the lower right corner': (55.5, 40.5, 70.1, 60.9),
    'one pixel': (30, 20, 31, 21),
    'below one pixel': (30.4, 20.4, 30.6, 20.6),
    'on a pixel centre': (30.5, 20.5, 40.5, 33.5),
    'no width': (30, 10, 30, 40),
    'no width, on a pixel centre': (30.5, 10, 30.5, 40),
    'no height': (10, 20, 50, 20),
    'no size': (33, 22, 33, 22),
    'no size, on a pixel centre': (33.5, 22.5, 33.5, 22.5),
    'inverted a little': (30.9, 20.9, 30.1, 20.2),
    'touches the right edge from outside': (61, 10, 61, 20),
    'thin': (3, 22.2, 58, 22.9),
    'in the first row and column': (0, 0, 1, 47),
}
FAR_BOXES = {
    'right of the image': (90, 10, 99, 20),
    'left of the image': (-30, 10, -9, 20),
    'above': (10, -60, 20, -40),
    'inverted': (45, 35, 12, 8),
    'inverted in x': (45, 8, 12, 35),
    'width that float32 cannot divide by': (0, 5, 1e-40, 30),
}


def smooth_probs(seed: int, n: int, size: int = 28) -> torch.Tensor:
    """(N, S, S) float32: blobs with every slope, some saturated to exactly 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 1, 5, 5, generator=generator) * 4 + 1
    probs = torch.nn.functional.interpolate(coarse, size=size, mode='bicubic')[:, 0].sigmoid()
    probs[: n // 4] = (probs[: n // 4] > 0.5).float()  # ties: 0.5 exactly on the box's edge
    return probs


def random_boxes(seed: int, n: int, hw: tuple[int, int]) -> torch.Tensor:
    """(N, 4) float32: of every size, over every edge, a third on whole and half pixels."""
    rng = np.random.default_rng(seed)
    wh = np.exp(rng.uniform(-1, np.log(1.5 * max(hw)), (n, 2)))
    centre = rng.random((n, 2)) * [hw[1], hw[0]]
    boxes = np.concatenate([centre - wh / 2, centre + wh / 2], axis=1)
    boxes[::3] = np.round(boxes[::3] * 2) / 2
    return torch.tensor(boxes, dtype=torch.float32)


def stock_masks(
    probs: torch.Tensor, boxes: torch.Tensor, hw: tuple[int, int], thr: float, *, whole_grid: bool
) -> np.ndarray:
    """Paste one by one with MMDetection's own function, (N, H, W) bool."""
    full = torch.zeros(len(boxes), *hw, dtype=torch.bool)
    for i in range(len(boxes)):
        pasted, where = _do_paste_mask(
            probs[i : i + 1, None], boxes[i : i + 1], *hw, skip_empty=not whole_grid
        )
        full[(slice(i, i + 1), *where)] = (pasted >= thr).cpu()
    return full.numpy()


def decoded(masks: list[dict]) -> np.ndarray:
    return np.moveaxis(coco_mask.decode(masks), 2, 0).astype(bool)


def our_masks(probs: torch.Tensor, boxes: torch.Tensor, hw: tuple[int, int], thr: float, **options):
    from cellseg_mm.core import rle

    runs = paste_runs(probs, boxes, hw, threshold=thr, **options)
    return decoded(rle.coco_dicts(rle.encode_runs(runs), hw))


@pytest.mark.parametrize('whole_grid', [False, True], ids=['cpu rule', 'gpu rule'])
@pytest.mark.parametrize('thr', [0.5, 0.3, 0.05, 0.999, 1.0])
@pytest.mark.parametrize('hw', [HW, (1, 1), (1, 40), (300, 7)], ids=str)
@pytest.mark.parametrize('seed', range(4))
def test_random_boxes_equal_stock(
    seed: int, hw: tuple[int, int], thr: float, whole_grid: bool
) -> None:
    probs, boxes = smooth_probs(seed, 60), random_boxes(seed, 60, hw)
    boxes[:, :2] = torch.minimum(boxes[:, :2], torch.tensor([hw[1], hw[0]]).float())
    boxes[:, 2:] = boxes[:, 2:].clamp(min=0)  # stock's CPU path fails on boxes wholly outside
    expected = stock_masks(probs, boxes, hw, thr, whole_grid=whole_grid)
    got = our_masks(probs, boxes, hw, thr, whole_grid=whole_grid)
    assert expected.any()
    assert np.array_equal(got, expected)


@pytest.mark.parametrize('thr', [0.5, 0.1])
@pytest.mark.parametrize('box', BORDER_BOXES.values(), ids=BORDER_BOXES.keys())
@pytest.mark.parametrize('whole_grid', [False, True], ids=['cpu rule', 'gpu rule'])
def test_border_cases_equal_stock(box: tuple[float, ...], thr: float, whole_grid: bool) -> None:
    probs, boxes = smooth_probs(1, 8), torch.tensor([box] * 8)
    expected = stock_masks(probs, boxes, HW, thr, whole_grid=whole_grid)
    assert np.array_equal(our_masks(probs, boxes, HW, thr, whole_grid=whole_grid), expected)


@pytest.mark.parametrize('thr', [0.5, 0.1])
@pytest.mark.parametrize('box', FAR_BOXES.values(), ids=FAR_BOXES.keys())
def test_boxes_that_stock_cpu_fails_on_follow_the_whole_grid(
    box: tuple[float, ...], thr: float
) -> None:
    probs, boxes = smooth_probs(1, 8), torch.tensor([box] * 8)
    expected = stock_masks(probs, boxes, HW, thr, whole_grid=True)
    assert np.array_equal(our_masks(probs, boxes, HW, thr, whole_grid=True), expected)
    on_cpu = our_masks(probs, boxes, HW, thr, whole_grid=False)
    assert not (on_cpu & ~expected).any()


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_boxes_that_are_not_finite_get_empty_masks(bad: float) -> None:
    boxes = torch.tensor([[1.0, 2.0, bad, 9.0], [1, 2, 8, 9]])
    for whole_grid in (False, True):
        got = our_masks(torch.ones(2, 28, 28), boxes, HW, 0.5, whole_grid=whole_grid)
        assert not got[0].any()
        assert got[1].sum() == 49


@pytest.mark.parametrize('max_pixels', [1, 10, 100, 1 << 20])
def test_batch_size_changes_nothing(max_pixels: int) -> None:
    probs, boxes = smooth_probs(3, 30), random_boxes(3, 30, HW)
    assert np.array_equal(
        our_masks(probs, boxes, HW, 0.5, max_pixels=max_pixels), our_masks(probs, boxes, HW, 0.5)
    )


def test_no_batch_exceeds_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = []
    original = mask_head._sample

    def watched(*args: object) -> torch.Tensor:
        sampled.append(original(*args))
        return sampled[-1]

    monkeypatch.setattr(mask_head, '_sample', watched)
    boxes = torch.cat([random_boxes(0, 200, (900, 1100)), torch.tensor([[0.0, 0, 1100, 900]] * 3)])
    paste_runs(smooth_probs(0, 203), boxes, (900, 1100), max_pixels=50_000)
    assert len(sampled) > 3 * 900 * 1100 // 50_000
    assert max(values.numel() for values in sampled) <= 50_000


@pytest.mark.parametrize('size', [7, 28, 56])
def test_other_mask_sizes(size: int) -> None:
    probs, boxes = smooth_probs(5, 20, size), random_boxes(5, 20, HW)
    expected = stock_masks(probs, boxes, HW, 0.4, whole_grid=True)
    assert np.array_equal(our_masks(probs, boxes, HW, 0.4, whole_grid=True), expected)


def test_hand_computed_square() -> None:
    # A mask of ones fills exactly the pixels whose centres lie in the box: columns 3..6, rows 2..4.
    got = our_masks(torch.ones(1, 28, 28), torch.tensor([[3.0, 2.0, 7.0, 5.0]]), (9, 11), 0.5)
    expected = np.zeros((9, 11), bool)
    expected[2:5, 3:7] = True
    assert np.array_equal(got[0], expected)


@pytest.mark.parametrize('thr', [0, -1])
def test_thresholds_without_meaning_are_refused(thr: float) -> None:
    with pytest.raises(ConfigError, match='mask_thr_binary'):
        encode_masks(torch.ones(1, 28, 28), torch.ones(1, 4), (5, 5), threshold=thr)


# The head as the RoI head calls it.


def heads(**options: object) -> tuple[FCNMaskHead, CellMaskHead]:
    common = {'num_convs': 0, 'in_channels': 3, 'conv_out_channels': 3, 'num_classes': 4}
    agnostic = {'class_agnostic': options.pop('class_agnostic', False)}
    stock = FCNMaskHead(**common, **agnostic)
    ours = MODELS.build({'type': 'mmdet.CellMaskHead', **common, **agnostic, **options})
    return stock, ours


def predict(head: FCNMaskHead, seed: int, device: str = 'cpu', **call: object) -> InstanceData:
    """One batch of three images with 40, 0 and 25 detections."""
    test_cfg = ConfigDict({'mask_thr_binary': 0.5, **call.pop('test_cfg', {})})
    metas = [
        {'ori_shape': (47, 61), 'scale_factor': (1.7, 1.6)},
        {'ori_shape': (33, 35), 'scale_factor': (2.0, 2.0)},
        {'ori_shape': (90, 41), 'scale_factor': (0.7, 0.71)},
    ]
    generator = torch.Generator().manual_seed(seed)
    preds, results = [], []
    for i, (n, meta) in enumerate(zip((40, 0, 25), metas, strict=True)):
        hw = [round(side * s) for side, s in zip(meta['ori_shape'], (1.7, 0.7), strict=True)]
        channels = 1 if head.class_agnostic else 4
        coarse = torch.randn(max(n, 1), channels, 5, 5, generator=generator) * 4
        logits = torch.nn.functional.interpolate(coarse, size=28, mode='bicubic')[:n]
        preds.append(logits.to(device))
        results.append(
            InstanceData(
                bboxes=random_boxes(seed + i, n, tuple(hw)).clamp(min=0).to(device),
                labels=torch.randint(0, 4, (n,), generator=generator).to(device),
                scores=torch.rand(n, generator=generator).to(device),
            )
        )
    for r in results:  # stock's CPU path fails on boxes that lie wholly outside
        r.bboxes[:, :2] = r.bboxes[:, :2].clamp(max=20)
        r.bboxes[:, 2:] = torch.maximum(r.bboxes[:, 2:], r.bboxes[:, :2] + 0.5)
    return head.predict_by_feat(preds, results, metas, test_cfg, **call)


@pytest.mark.filterwarnings('ignore:To copy construct')  # stock, with activate_map
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('rescale', [True, False])
@pytest.mark.parametrize('activate_map', [True, False])
@pytest.mark.parametrize('class_agnostic', [True, False])
def test_head_equals_stock_head(
    device: str, rescale: bool, activate_map: bool, class_agnostic: bool
) -> None:
    stock, ours = heads(class_agnostic=class_agnostic)
    call = {'device': device, 'rescale': rescale, 'activate_map': activate_map}
    expected, got = predict(stock, 2, **call), predict(ours, 2, **call)
    assert [len(r) for r in got] == [40, 0, 25]
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a.bboxes, b.bboxes)  # both bring the boxes to the original image
        assert b.masks == encode_mask_results(a.masks.cpu().numpy())
        assert set(a.keys()) == set(b.keys())


def test_half_precision_logits_equal_stock() -> None:
    stock, ours = heads()
    n = 12
    logits = (torch.randn(n, 4, 28, 28, generator=torch.Generator().manual_seed(0)) * 3).half()
    meta = {'ori_shape': HW, 'scale_factor': (1.0, 1.0)}
    masks = []
    for head in (stock, ours):
        result = InstanceData(
            bboxes=random_boxes(4, n, HW).clamp(0, 47), labels=torch.arange(n) % 4
        )
        cfg = ConfigDict(mask_thr_binary=0.5)
        masks.append(head.predict_by_feat([logits], [result], [meta], cfg, rescale=True)[0].masks)
    assert masks[1] == encode_mask_results(masks[0].numpy())


@pytest.mark.parametrize('where', ['constructor', 'test_cfg'])
def test_stock_masks_on_request(where: str) -> None:
    switch = {'rle_masks': False}
    stock, ours = heads(**(switch if where == 'constructor' else {}))
    expected = predict(stock, 0, rescale=True)
    got = predict(ours, 0, rescale=True, test_cfg=switch if where == 'test_cfg' else {})
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a.masks, b.masks)


@pytest.mark.parametrize('rle_masks', [True, False])
@pytest.mark.parametrize('where', ['constructor', 'test_cfg'])
def test_mask_probs_on_request(where: str, rle_masks: bool) -> None:
    switch = {'keep_mask_probs': True}
    _, ours = heads(rle_masks=rle_masks, **(switch if where == 'constructor' else {}))
    for result in predict(ours, 0, rescale=True, test_cfg=switch if where == 'test_cfg' else {}):
        n = len(result)
        assert result.mask_probs.shape == (n, 28, 28)
        assert result.mask_probs.dtype == torch.float16
        assert torch.equal(result.mask_boxes, result.bboxes)
        if n and rle_masks:  # the kept probabilities give the masks back, but for rounding
            hw = tuple(result.masks[0]['size'])
            again = our_masks(result.mask_probs, result.mask_boxes, hw, 0.5)
            assert (again != decoded(result.masks)).mean() < 1e-3


def test_rle_passes_through_indexing_and_coco_metric() -> None:
    _, ours = heads()
    result = predict(ours, 0, rescale=True)[0]
    kept = result[result.scores > 0.5]
    assert len(kept.masks) == int((result.scores > 0.5).sum()) < 40
    metric = CocoMetric(metric='segm', ann_file=None)
    sample = {
        'pred_instances': kept.to_dict(),
        'img_id': 1,
        'ori_shape': (47, 61),
        'instances': [],
    }
    metric.process({}, [sample])
    assert metric.results[0][1]['masks'] == kept.masks


# ------------------------------------------------------------------------- the masks' frame


def discs(hw: tuple[int, int], centres_yx: list, radius: float) -> np.ndarray:
    """Return (N, H, W) uint8 discs."""
    y, x = np.mgrid[: hw[0], : hw[1]] + 0.5
    near = [(y - cy) ** 2 + (x - cx) ** 2 <= radius**2 for cy, cx in centres_yx]
    return np.stack(near).astype(np.uint8)


def painted_back(frame: float, boxes: torch.Tensor, masks: np.ndarray) -> np.ndarray:
    """Paste what a head with this frame is trained on, as if it had learned it exactly."""
    head = CellMaskHead(num_classes=1)
    head.frame = frame
    sampled = SimpleNamespace(pos_priors=boxes, pos_assigned_gt_inds=torch.arange(len(boxes)))
    cells = InstanceData(masks=BitmapMasks(masks, *masks.shape[1:]))
    targets = head.get_targets([sampled], [cells], ConfigDict(mask_size=28))
    logits = ((targets - 0.5) * 40)[:, None]
    results = InstanceData(bboxes=boxes.clone(), labels=torch.zeros(len(boxes), dtype=torch.long))
    meta = {'ori_shape': masks.shape[1:], 'scale_factor': (1.0, 1.0)}
    cfg = ConfigDict(mask_thr_binary=0.5, keep_mask_probs=True)
    (found,) = head.predict_by_feat([logits], [results], [meta], cfg, rescale=True)
    assert torch.equal(found.mask_boxes, enlarged(boxes, frame))
    assert torch.equal(found.bboxes, boxes)
    return decoded(found.masks)


def test_a_frame_around_the_box_keeps_what_a_small_box_cuts() -> None:
    centres = [(30.0, 40.0), (60.0, 80.0), (8.0, 90.0)]  # the last reaches over the image's edge
    masks = discs((90, 100), centres, 12)
    boxes = torch.tensor([[cx - 9, cy - 9, cx + 9, cy + 9] for cy, cx in centres])

    def iou(found: np.ndarray) -> np.ndarray:
        return (found & (masks > 0)).sum((1, 2)) / (found | (masks > 0)).sum((1, 2))

    cut, whole = (iou(painted_back(frame, boxes, masks).astype(bool)) for frame in (1.0, 1.5))
    assert (cut < 0.8).all()
    assert (whole > 0.93).all()


def roi_head(**options: object) -> CellRoIHead:
    extractor = {
        'type': 'SingleRoIExtractor', 'out_channels': 4, 'featmap_strides': [4],
        'roi_layer': {'type': 'RoIAlign', 'output_size': 7, 'sampling_ratio': 0},
    }  # fmt: skip
    mask_head = {'type': 'CellMaskHead', 'num_convs': 1, 'in_channels': 4, 'conv_out_channels': 4}
    settings = {'mask_roi_extractor': extractor, 'mask_head': mask_head, **options}
    with DefaultScope.overwrite_default_scope('mmdet'):
        return CellRoIHead(**settings)


def test_features_come_from_the_frame() -> None:
    torch.manual_seed(0)
    stock, framed = roi_head(), roi_head(mask_frame=1.25)
    framed.load_state_dict(stock.state_dict())
    x = (torch.randn(1, 4, 30, 30),)
    rois = torch.tensor([[0.0, 20, 24, 60, 44]])
    larger = torch.tensor([[0.0, 15, 21.5, 65, 46.5]])
    with torch.no_grad():
        ours = framed._mask_forward(x, rois)['mask_preds']
        assert ours.equal(stock._mask_forward(x, larger)['mask_preds'])
        assert not ours.equal(stock._mask_forward(x, rois)['mask_preds'])
    assert (stock.mask_head.frame, framed.mask_head.frame) == (1.0, 1.25)


def test_frames_without_meaning_are_refused() -> None:
    with pytest.raises(ConfigError, match=r'mask_frame: found 0\.8; expected 1 or more'):
        roi_head(mask_frame=0.8)
    other = {'type': 'FCNMaskHead', 'num_convs': 1, 'in_channels': 4, 'conv_out_channels': 4}
    with pytest.raises(ConfigError, match='expected a CellMaskHead'):
        roi_head(mask_frame=1.25, mask_head=other)


def test_a_frame_cannot_be_had_as_stock_masks() -> None:
    head = CellMaskHead(num_classes=1, rle_masks=False)
    head.frame = 1.25
    results = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    meta = {'ori_shape': (9, 9), 'scale_factor': (1.0, 1.0)}
    cfg = ConfigDict(mask_thr_binary=0.5)
    with pytest.raises(ConfigError, match=r'1\.25 times as far'):
        head.predict_by_feat([torch.zeros(0, 1, 28, 28)], [results], [meta], cfg)

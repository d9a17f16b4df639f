"""detections: data samples to instances and back, and the report on caps."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

import cellseg_mm  # noqa: F401  (makes mmdet importable where mmcv has no compiled ops)

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

from mmdet.evaluation.metrics import DumpDetResults  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmdet.structures.bbox import HorizontalBoxes  # noqa: E402
from mmdet.structures.mask import encode_mask_results  # noqa: E402
from mmdet.visualization import DetLocalVisualizer  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

from cellseg_mm.core.errors import PredictionError  # noqa: E402
from cellseg_mm.core.instances import InstanceSet  # noqa: E402
from cellseg_mm.model import detections  # noqa: E402
from cellseg_mm.model.caps import count_truncation  # noqa: E402

pytestmark = pytest.mark.mm

HW = (17, 11)


def make_masks(n: int, seed: int = 0) -> np.ndarray:
    """(N, 17, 11) bool: rectangles; the last is empty, the first reaches every edge."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, *HW), dtype=bool)
    for mask in masks:
        y, x = rng.integers(0, 12), rng.integers(0, 7)
        mask[y : y + rng.integers(1, 6), x : x + rng.integers(1, 5)] = True
    if n:
        masks[0], masks[-1] = True, False
    return masks


def make_sample(n: int = 5, *, as_rle: bool = True, **meta: object) -> DetDataSample:
    rng = np.random.default_rng(n)
    masks = make_masks(n)
    sample = DetDataSample(
        metainfo={'img_id': 7, 'name': 'a', 'img_path': '/d/a.tif', 'ori_shape': HW, **meta}
    )
    low = rng.random((n, 2)) * 5
    sample.pred_instances = InstanceData(
        bboxes=torch.tensor(np.concatenate([low, low + 3], axis=1), dtype=torch.float32),
        scores=torch.tensor(rng.random(n), dtype=torch.float32),
        labels=torch.tensor(rng.integers(0, 4, n)),
        masks=encode_mask_results(masks) if as_rle else torch.from_numpy(masks),
    )
    return sample


@pytest.mark.parametrize('n', [0, 1, 5])
@pytest.mark.parametrize('as_dict', [True, False], ids=['dict', 'sample'])
@pytest.mark.parametrize('as_rle', [True, False], ids=['RLE', 'stock tensor'])
def test_sample_to_set(n: int, as_dict: bool, as_rle: bool) -> None:
    sample = make_sample(n, as_rle=as_rle)
    got = detections.to_instance_set(sample.to_dict() if as_dict else sample)
    pred = sample.pred_instances
    assert (got.name, got.image_id, got.image_hw) == ('a', 7, HW)
    assert np.array_equal(got.masks(), make_masks(n))
    assert np.array_equal(got.boxes_xyxy, pred.bboxes.numpy())
    assert np.array_equal(got.scores, pred.scores.numpy())
    assert np.array_equal(got.class_ids, pred.labels.numpy())
    assert got.extra == {}


def test_boxes_of_a_box_type_and_counts_as_text() -> None:
    sample = make_sample(3)
    expected = detections.to_instance_set(sample)
    sample.pred_instances.bboxes = HorizontalBoxes(sample.pred_instances.bboxes)
    for mask in sample.pred_instances.masks:  # what CocoMetric leaves behind
        mask['counts'] = mask['counts'].decode()
    got = detections.to_instance_set(sample)
    assert got.rles == expected.rles
    assert np.array_equal(got.boxes_xyxy, expected.boxes_xyxy)


def test_round_trip_keeps_extras() -> None:
    sample = make_sample(4)
    sample.pred_instances.mask_probs = torch.rand(4, 28, 28).half()
    sample.pred_instances.mask_boxes = sample.pred_instances.bboxes + 1
    first = detections.to_instance_set(sample)
    pred = detections.to_pred_instances(first)
    assert pred.mask_probs.dtype == torch.float16
    again = detections.to_instance_set(DetDataSample(metainfo=sample.metainfo, pred_instances=pred))
    assert again.rles == first.rles
    assert set(again.extra) == {'mask_probs', 'mask_boxes'}
    for key in first.extra:
        assert np.array_equal(again.extra[key], first.extra[key])


@pytest.mark.parametrize(
    ('path', 'name'),
    [
        pytest.param('/data/test_release/c8cb.tif', 'c8cb', id='test image'),
        pytest.param('/data/train/77aa/image.tif', '77aa', id='training folder'),
        pytest.param('image.tif', 'image', id='no folder'),
    ],
)
def test_name_without_name(path: str, name: str) -> None:
    sample = make_sample(0).to_dict()
    del sample['name']
    assert detections.case_name({**sample, 'img_path': path}) == name


def test_errors_name_the_image_and_the_remedy() -> None:
    with pytest.raises(PredictionError, match=r'a: masks are of 17 x 11 .* rescale=True'):
        detections.to_instance_set(make_sample(2, ori_shape=(18, 11)))
    with pytest.raises(PredictionError, match='rescale=True'):
        detections.to_instance_set(make_sample(2, as_rle=False, ori_shape=(18, 11)))
    sample = make_sample(2, as_rle=False)
    sample.pred_instances.masks = sample.pred_instances.masks.to(torch.uint8) * 255
    with pytest.raises(PredictionError, match='mask_thr_binary'):
        detections.to_instance_set(sample)
    del sample.pred_instances.masks
    with pytest.raises(PredictionError, match='mask head'):
        detections.to_instance_set(sample)
    bare = make_sample(2).to_dict()
    del bare['img_id']
    with pytest.raises(PredictionError, match='meta_keys'):
        detections.to_instance_set(bare)


def test_stock_visualiser_and_dump_read_stock_masks(tmp_path: Path) -> None:
    sample = make_sample(4)
    stock = detections.to_stock_masks(sample)
    assert torch.equal(stock.pred_instances.masks, torch.from_numpy(make_masks(4)))
    assert isinstance(sample.pred_instances.masks, list)  # a copy was changed

    visualiser = DetLocalVisualizer()
    visualiser.dataset_meta = {'classes': list('abcd'), 'palette': [(255, 0, 0)] * 4}
    image = np.zeros((*HW, 3), dtype=np.uint8)
    visualiser.add_datasample(
        'a', image, stock, draw_gt=False, out_file=str(tmp_path / 'a.png'), pred_score_thr=0
    )
    assert (tmp_path / 'a.png').stat().st_size > 0

    dump = DumpDetResults(out_file_path=str(tmp_path / 'dump.pkl'))
    dump.process({}, [detections.to_stock_masks(sample.to_dict())])
    dump.evaluate(size=1)
    with (tmp_path / 'dump.pkl').open('rb') as stream:
        dumped = pickle.load(stream)
    assert dumped[0]['pred_instances']['masks'] == sample.pred_instances.masks


def scored(name: str, scores: list[float]) -> InstanceSet:
    n = len(scores)
    return InstanceSet(name, 1, (2, 2), [0] * n, scores, np.zeros((n, 4)), (b'4',) * n)


def test_cap_report() -> None:
    sets = [
        scored('few', [0.9, 0.8]),
        scored('cut at 0.25', [0.9, 0.25, 0.5]),
        scored('none', []),
        scored('cut at 0.75', [0.75, 0.8, 0.99]),
    ]
    report = count_truncation(sets, 3, score_thr=0.05)
    assert report.n_images == 4
    assert [(c.name, c.n_kept, c.lowest_score) for c in report.capped] == [
        ('cut at 0.75', 3, 0.75),
        ('cut at 0.25', 3, 0.25),
    ]
    text = report.describe(n_shown=1)
    assert '2 of 4 images hit the cap of 3' in text
    assert 'cut at 0.75: kept down to 0.7500' in text
    assert '... and 1 more' in text
    assert 'No image of 4 hit the cap of 4' in count_truncation(sets, 4).describe()
    assert count_truncation(sets, -1).capped == ()

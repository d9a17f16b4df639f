"""Views come back exactly, and an equivariant detector's fused answer is its plain answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DefaultScope
from torch import nn

from cellseg_mm.core import rle
from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.fusion.views import D4, FLIPS, IDENTITY, TtaSpec, View, from_spec, map_back
from cellseg_mm.model.detections import to_instance_set, to_pred_instances
from cellseg_mm.model.tta import CellTTAModel

pytestmark = pytest.mark.mm

VIEWS = [pytest.param(view, id=str(view.key)) for view in D4]


def truth(image_hw: tuple[int, int] = (17, 23), seed: int = 0) -> InstanceSet:
    """Asymmetric masks: an F, a cell on the border, one with a hole, an empty one."""
    rng = np.random.default_rng(seed)
    f = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]], dtype=bool)
    hole = np.ones((5, 4), dtype=bool)
    hole[1:3, 1] = False
    crops = [f, np.ones((3, 2), bool), hole, np.zeros((0, 0), bool)]
    offsets = np.array([[4, 6], [image_hw[0] - 3, 0], [2, image_hw[1] - 4], [0, 0]])
    found = InstanceSet.from_crops(
        'a',
        3,
        image_hw,
        crops=crops,
        offsets_yx=offsets,
        class_ids=np.array([0, 1, 2, 1]),
        scores=np.array([0.9, 0.75, 0.5, 0.25]),
    )
    boxes = found.boxes_xyxy + rng.integers(-4, 5, (4, 4)) / 4  # not the tight ones
    probs = rng.random((4, 7, 7)).astype(np.float16)
    return replace(found, boxes_xyxy=boxes, extra={'mask_probs': probs, 'mask_boxes': boxes + 1})


def seen_in(view: View, instances: InstanceSet) -> InstanceSet:
    """What a perfect detector says about the turned picture: by pixels, not by our code."""
    masks = instances.masks()
    masks = masks.transpose(0, 2, 1) if view.transpose else masks
    masks = masks[:, ::-1] if view.flip_y else masks
    masks = masks[:, :, ::-1] if view.flip_x else masks
    hw = masks.shape[1:]
    zeros = np.zeros((len(masks), 2), dtype=np.int64)

    def forward(boxes: np.ndarray) -> np.ndarray:
        boxes = boxes[:, [1, 0, 3, 2]] if view.transpose else boxes
        x0, y0, x1, y1 = boxes.T
        if view.flip_y:
            y0, y1 = hw[0] - y1, hw[0] - y0
        if view.flip_x:
            x0, x1 = hw[1] - x1, hw[1] - x0
        return np.stack([x0, y0, x1, y1], axis=1)

    extra = {}
    if instances.extra:
        turned = [view.turn(grid) for grid in instances.extra['mask_probs']]
        extra = {
            'mask_probs': np.stack(turned),
            'mask_boxes': forward(instances.extra['mask_boxes']),
        }
    return replace(
        instances,
        image_hw=hw,
        boxes_xyxy=forward(instances.boxes_xyxy),
        rles=tuple(rle.encode_crops([np.ascontiguousarray(m) for m in masks], zeros, hw)),
        extra=extra,
    )


# ------------------------------------------------------------------------------- mapping


@pytest.mark.parametrize('view', VIEWS)
def test_an_image_turns_and_comes_back(view: View) -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 8, 3))
    turned = view.turn(image)
    assert view.original_hw(turned.shape[:2]) == (5, 8)
    assert np.array_equal(view.turn_back(turned), image)
    assert turned.flags.c_contiguous


def test_the_eight_views_differ() -> None:
    image = np.arange(9).reshape(3, 3)
    assert len({view.turn(image).tobytes() for view in D4}) == 8
    assert np.array_equal(View(True, True, False).turn(image), np.rot90(image))  # anticlockwise


@pytest.mark.parametrize('view', VIEWS)
@pytest.mark.parametrize('image_hw', [(17, 23), (20, 16)])
def test_instances_come_back_exactly(view: View, image_hw: tuple[int, int]) -> None:
    expected = truth(image_hw)
    found = map_back(seen_in(view, expected), view)
    assert found.image_hw == image_hw
    assert found.rles == expected.rles
    assert np.array_equal(found.boxes_xyxy, expected.boxes_xyxy)
    for key, value in expected.extra.items():
        assert np.array_equal(found.extra[key], value), key
    assert found.scores.tolist() == expected.scores.tolist()


@pytest.mark.parametrize('view', VIEWS)
def test_pasting_probabilities_commutes_with_turning(view: View) -> None:
    """Half a pixel wrong anywhere would show: masks pasted in the view equal masks pasted here."""
    torch = pytest.importorskip('torch')
    from cellseg_mm.model.mask_head import encode_masks

    rng = np.random.default_rng(1)
    # Halves and quarters of pixels, whose arithmetic is exact, and smooth masks
    low = rng.integers(0, 40, (30, 2)) / 4
    boxes = np.concatenate([low, low + rng.integers(8, 40, (30, 2)) / 4], axis=1)
    probs = rng.random((30, 7, 7)).astype(np.float16)
    image_hw = (24, 31)

    def pasted(probs: np.ndarray, boxes: np.ndarray, hw: tuple[int, int]) -> InstanceSet:
        tensors = torch.from_numpy(probs).float(), torch.from_numpy(boxes).float()
        masks = encode_masks(*tensors, hw, threshold=0.5)
        return InstanceSet(
            'a', 1, hw, np.zeros(30), np.ones(30), boxes, [m['counts'] for m in masks]
        )

    plain = replace(
        pasted(probs, boxes, image_hw), extra={'mask_probs': probs, 'mask_boxes': boxes}
    )
    turned = seen_in(view, plain)
    in_view = pasted(turned.extra['mask_probs'], turned.boxes_xyxy, turned.image_hw)
    back = map_back(in_view, view)
    wrong = np.array([a != b for a, b in zip(back.masks(), plain.masks(), strict=True)]).sum()
    # float32 rounds differently from the other side where a probability is 0.5 within 1e-6
    assert wrong <= 1


# ---------------------------------------------------------------------------------- specs


def test_specs() -> None:
    assert from_spec('none') == TtaSpec()
    assert from_spec('flips').views == FLIPS
    spec = from_spec('d4,scales=0.8/1.25', rule='wbf', post='min_votes=2')
    assert (spec.views, spec.scales) == (D4, (1.0, 0.8, 1.25))
    assert len(spec) == 24
    assert spec.tta_model() == {'type': 'CellTTAModel', 'rule': 'wbf', 'post': 'min_votes=2'}
    assert from_spec('scales=2') == TtaSpec(scales=(1.0, 2.0))


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('spin', "no setting 'spin'; known are none, hflip, flips, d4"),
        ('d4,scales', "no setting 'scales'"),
        ('scales=0.8;1.2', 'write them as 0.8/1.25'),
        ('scales=1/2', 'expected different numbers'),
        ('scales=0', 'from 0.1 to 10'),
        ('', "no setting ''"),
    ],
)
def test_wrong_specs(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match='tta') as caught:
        from_spec(text)
    assert message in str(caught.value)


def test_wrong_rules_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match='no rule'):
        from_spec('d4', rule='median')


# -------------------------------------------------------------------------------- pipeline

PIPELINE = [
    {'type': 'LoadCellImage', 'red_blue_swapped': True},
    {'type': 'Resize', 'scale': (60, 40), 'keep_ratio': True},
    {'type': 'PackDetInputs', 'meta_keys': ('img_id', 'name', 'ori_shape', 'img_shape')},
]


def build(steps: list[dict]) -> Compose:
    with DefaultScope.overwrite_default_scope('mmdet'):
        return Compose(steps)


def views_of(image: np.ndarray, spec: TtaSpec, pipeline: list[dict] | None = None) -> dict:
    """Run all steps but loading; one image as a batch, as a data loader gives it."""
    import cellseg_mm.components  # noqa: F401

    built = build(spec.tta_pipeline(pipeline or PIPELINE)[1:])
    results = {'img': image, 'img_id': 3, 'name': 'a', 'img_shape': image.shape[:2]}
    return pseudo_collate([built({**results, 'ori_shape': image.shape[:2]})])


def test_pipeline_makes_all_views() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    data = views_of(image, from_spec('d4,scales=0.5'))
    assert len(data['inputs']) == 16
    seen = {}
    for inputs, samples in zip(data['inputs'], data['data_samples'], strict=True):
        meta = samples[0].metainfo
        view = View(*meta['view'])
        scale = meta['scale_factor'][0]
        seen[view.key, scale] = True
        assert meta['ori_shape'] == ((30, 20) if view.transpose else (20, 30))
        height, width = (round(side * scale) for side in meta['ori_shape'])
        assert inputs[0].shape == (3, height, width)
    # 20 x 30 within 40 x 60 is twice as large, within 20 x 30 as it is
    assert {scale for _, scale in seen} == {1.0, 2.0}
    assert len(seen) == 16


def test_scales_need_something_that_resizes() -> None:
    with pytest.raises(ConfigError, match='scales need a Resize'):
        from_spec('scales=2').tta_pipeline([PIPELINE[0], PIPELINE[2]])
    from_spec('d4').tta_pipeline([PIPELINE[0], PIPELINE[2]])


def test_scale_factors_are_scaled_too() -> None:
    steps = [PIPELINE[0], {'type': 'Resize', 'scale_factor': 1.5, 'keep_ratio': True}, PIPELINE[2]]
    transforms = from_spec('scales=2').tta_pipeline(steps)[1]['transforms']
    assert [step['scale_factor'] for step in transforms[1]] == [1.5, 3.0]
    assert steps[1]['scale_factor'] == 1.5  # the input is left alone


# ----------------------------------------------------------------------------------- model


class PixelDetector(nn.Module):
    """Finds each id that is painted into the image: what it sees is all that it says."""

    def __init__(self, scores: np.ndarray, blind: tuple = ()) -> None:
        super().__init__()
        self.scores, self.blind = scores, blind

    def test_step(self, data: dict) -> list[DetDataSample]:
        samples = []
        for inputs, sample in zip(data['inputs'], data['data_samples'], strict=True):
            ids = inputs[0].numpy().astype(np.int64)
            if sample.metainfo.get('view') in self.blind:
                ids = ids * 0
            present = [k for k in range(1, len(self.scores) + 1) if (ids == k).any()]
            masks = np.array([ids == k for k in present], dtype=bool).reshape(-1, *ids.shape)
            crops, zeros = list(masks), np.zeros((len(masks), 2), dtype=np.int64)
            found = InstanceSet.from_crops(
                'a',
                3,
                ids.shape,
                crops=crops,
                offsets_yx=zeros,
                class_ids=np.array(present) % 3,
                scores=self.scores[np.array(present, dtype=int) - 1],
            )
            out = sample.new()
            out.pred_instances = to_pred_instances(found)
            samples.append(out)
        return samples


def painted() -> tuple[np.ndarray, InstanceSet]:
    instances = truth()[:3]
    label_map = instances.to_label_map()
    image = np.repeat(label_map[..., None], 3, axis=2).astype(np.uint8)
    return image, instances


AS_IT_IS = [PIPELINE[0], {'type': 'Resize', 'scale_factor': 1.0, 'keep_ratio': True}, PIPELINE[2]]


@pytest.mark.parametrize('name', ['none', 'hflip', 'flips', 'd4'])
@pytest.mark.parametrize('rule', ['soft_mask', 'wbf', 'nms'])
def test_an_equivariant_detector_says_the_same_with_any_views(name: str, rule: str) -> None:
    image, expected = painted()
    spec = from_spec(name, rule=rule)
    scores = expected.scores
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build({**spec.tta_model(), 'module': PixelDetector(scores)})
    (sample,) = model.test_step(views_of(image, spec, AS_IT_IS))
    found = to_instance_set(sample)
    tight = rle.boxes_of(rle.decode_runs(expected.rles, expected.image_hw))
    assert sample.metainfo['ori_shape'] == expected.image_hw
    assert found.rles == expected.rles
    assert np.array_equal(found.boxes_xyxy, tight)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-6)
    assert found.class_ids.tolist() == [1, 2, 0]
    assert sample.pred_instances.n_votes.tolist() == [len(spec)] * 3 if rule != 'nms' else True


def test_a_view_that_sees_nothing_lowers_the_score() -> None:
    image, expected = painted()
    spec = from_spec('flips')
    blind = PixelDetector(expected.scores, blind=(View(flip_x=True).key,))
    model = CellTTAModel(blind)
    (sample,) = model.test_step(views_of(image, spec, AS_IT_IS))
    found = to_instance_set(sample)
    np.testing.assert_allclose(found.scores, expected.scores * 3 / 4, rtol=1e-6)
    assert found.rles == expected.rles


def test_fused_masks_are_cut_where_the_detector_cuts_its_own() -> None:
    probs = np.full((1, 8, 8), 0.9, dtype=np.float16)
    probs[..., :4] = 0.45  # unsure on the left
    box = np.array([[2, 3, 10, 11]], dtype=np.float32)
    one = InstanceSet.from_crops(
        'a',
        3,
        (17, 23),
        crops=[np.ones((8, 8), dtype=bool)],
        offsets_yx=np.array([[3, 2]]),
        class_ids=np.array([1]),
        scores=np.array([0.5]),
    )
    one = replace(one, extra={'mask_probs': probs, 'mask_boxes': box})
    samples = []
    for _ in range(2):
        sample = DetDataSample(
            metainfo={'img_id': 3, 'name': 'a', 'ori_shape': (17, 23), 'view': IDENTITY.key}
        )
        sample.pred_instances = to_pred_instances(one)
        samples.append(sample)
    areas = {}
    for thr in (0.4, 0.5):
        detector = PixelDetector(np.ones(1))
        detector.roi_head = nn.Module()
        detector.roi_head.test_cfg = {'mask_thr_binary': thr}
        (fused,) = CellTTAModel(detector).merge_preds([samples])
        areas[thr] = to_instance_set(fused).areas.tolist()
    assert areas == {0.4: [64], 0.5: [32]}


def test_stock_flips_are_understood() -> None:
    """MMDetection's own pipeline: RandomFlip after Resize, 'flip' and 'flip_direction'."""
    import cellseg_mm.components  # noqa: F401

    image, expected = painted()
    keys = ('img_id', 'name', 'ori_shape', 'img_shape', 'flip', 'flip_direction')
    directions = ['horizontal', 'vertical', 'diagonal']
    flips = [{'type': 'RandomFlip', 'prob': 0.0}]
    flips += [{'type': 'RandomFlip', 'prob': 1.0, 'direction': d} for d in directions]
    pack = [{'type': 'PackDetInputs', 'meta_keys': keys}]
    built = build([{'type': 'TestTimeAug', 'transforms': [flips, pack]}])
    meta = {'img_id': 3, 'name': 'a', 'img_shape': (17, 23), 'ori_shape': (17, 23)}
    data = pseudo_collate([built({'img': image, **meta})])
    (sample,) = CellTTAModel(PixelDetector(expected.scores)).test_step(data)
    assert to_instance_set(sample).rles == expected.rles


def test_samples_that_do_not_say_how_they_lie_are_refused() -> None:
    image, expected = painted()
    data = views_of(image, from_spec('hflip'), AS_IT_IS)
    for samples in data['data_samples']:
        del samples[0].view
    with pytest.raises(ConfigError, match="neither 'view' nor 'flip'"):
        CellTTAModel(PixelDetector(expected.scores)).test_step(data)


def test_identity_is_first() -> None:
    assert D4[0] == FLIPS[0] == IDENTITY
    with pytest.raises(ConfigError, match='as first view'):
        TtaSpec(views=(View(flip_x=True),))

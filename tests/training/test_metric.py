"""CellMetric in mmengine's loops: equal to ``score``, once per image, also over two processes."""

from __future__ import annotations

import datetime
import json
import math
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile

import cellseg_mm  # noqa: F401  (makes mmdet importable where mmcv has no compiled ops)

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

from mmdet.registry import METRICS  # noqa: E402
from mmengine.evaluator import BaseMetric, Evaluator  # noqa: E402
from mmengine.logging import MMLogger  # noqa: E402
from mmengine.model import BaseModel  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from torch import distributed as dist  # noqa: E402

from cellseg_mm.core import rle  # noqa: E402
from cellseg_mm.core.errors import ConfigError, PredictionError  # noqa: E402
from cellseg_mm.core.instances import InstanceSet  # noqa: E402
from cellseg_mm.data.labels import Case, read_gt  # noqa: E402
from cellseg_mm.results.predictions import load_predictions  # noqa: E402
from cellseg_mm.scores.records import ScoreParams  # noqa: E402
from cellseg_mm.scores.score import score  # noqa: E402
from cellseg_mm.training.metric import CellMetric, flat_metrics  # noqa: E402

pytestmark = pytest.mark.mm

NAMES = ('a', 'b', 'c')
HW = (23, 31)
N_IMAGES = 3  # odd: two ranks must pad


@pytest.fixture(autouse=True)
def _mmdet_scope() -> Iterator[None]:
    with DefaultScope.overwrite_default_scope('mmdet'):  # whatever ran before
        yield


def case_of(root: Path, i: int) -> Case:
    folder = root / 'train' / f'case{i}'
    paths = {k: folder / f'class{k + 1}.tif' for k in range(2)}
    return Case(folder.name, folder / 'image.tif', paths, 10 + i, HW)


def write_cases(root: Path) -> list[Case]:
    """Write three images of 4-px squares in two of three classes, and return their cases."""
    for case in (cases := [case_of(root, i) for i in range(N_IMAGES)]):
        i = case.image_id - 10
        folder = case.image_path.parent
        folder.mkdir(parents=True)
        tifffile.imwrite(case.image_path, np.zeros((*HW, 3), dtype=np.uint8))
        for k, path in case.label_paths.items():
            label_map = np.zeros(HW, dtype=np.uint16)
            for n in range(3 + i):
                label_map[9 * k + 1 : 9 * k + 5, 5 * n : 5 * n + 4] = 300 + n
            tifffile.imwrite(path, label_map)
    return cases


def predict(case: Case) -> InstanceSet:
    """Return a prediction with a missed cell, a wrong class, and one moved by a pixel."""
    gt = read_gt(case)
    crops, offsets = gt.crops()
    offsets = offsets.copy()
    offsets[1, 0] += 1
    class_ids = gt.class_ids.copy()
    class_ids[2] = 1
    moved = InstanceSet.from_crops(
        case.name,
        case.image_id,
        HW,
        crops=crops,
        offsets_yx=offsets,
        class_ids=class_ids,
        scores=np.linspace(0.5, 0.9, len(gt), dtype=np.float32),
    )
    return moved[np.arange(len(gt) - 1)]


def sample_of(case: Case, pred: InstanceSet) -> dict:
    return {
        'img_id': case.image_id,
        'name': case.name,
        'img_path': str(case.image_path),
        'ori_shape': case.image_hw,
        'label_paths': {k: str(path) for k, path in case.label_paths.items()},
        'pred_instances': {
            'bboxes': torch.from_numpy(pred.boxes_xyxy),
            'scores': torch.from_numpy(pred.scores),
            'labels': torch.from_numpy(pred.class_ids),
            'masks': rle.coco_dicts(pred.rles, pred.image_hw),
        },
    }


def build(**options) -> CellMetric:
    metric = METRICS.build({'type': 'CellMetric', 'n_bootstrap': 0, **options})
    metric.dataset_meta = {'classes': NAMES}
    return metric


def same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value == pytest.approx(second[name], abs=0, nan_ok=True), name


def expected(cases: list[Case]) -> dict[str, float]:
    gts, preds = [read_gt(case) for case in cases], [predict(case) for case in cases]
    scores = score(gts, preds, NAMES, ScoreParams(n_bootstrap=0))
    return {f'cell/{name}': value for name, value in flat_metrics(scores).items()}


def test_equals_score_and_has_the_names_that_configs_use(tmp_path: Path) -> None:
    cases = write_cases(tmp_path)
    metric = build()
    for case in cases:
        metric.process(None, [sample_of(case, predict(case))])
    got = metric.evaluate(size=N_IMAGES)
    same(got, expected(cases))
    assert {
        'cell/segm_mAP', 'cell/segm_mAP_50', 'cell/segm_mAP_75', 'cell/bbox_mAP',
        'cell/bbox_mAP_50', 'cell/mPQ', 'cell/AJI', 'cell/F1_50', 'cell/segm_AP50_a',
    } <= got.keys()  # fmt: skip
    assert all(type(value) is float for value in got.values())
    assert 0 < got['cell/segm_mAP_50'] < 1
    assert math.isnan(got['cell/segm_AP50_c'])
    assert metric.results == []


def test_an_image_counts_once_and_padding_is_dropped(tmp_path: Path) -> None:
    cases = write_cases(tmp_path)
    metric = build()
    for case in [*cases, cases[0]]:
        metric.process(None, [sample_of(case, predict(case))])
    same(metric.evaluate(size=N_IMAGES), expected(cases))


def test_ground_truth_is_read_once(tmp_path: Path) -> None:
    cases = write_cases(tmp_path)
    metric = build()
    samples = [sample_of(case, predict(case)) for case in cases]
    metric.process(None, samples)
    first = metric.evaluate(size=N_IMAGES)
    for case in cases:
        for path in case.label_paths.values():
            path.unlink()
    metric.process(None, samples)
    same(metric.evaluate(size=N_IMAGES), first)


def test_a_lost_image_is_an_error(tmp_path: Path) -> None:
    cases = write_cases(tmp_path)
    metric = build()
    metric.process(None, [sample_of(case, predict(case)) for case in cases[:2]])
    with pytest.raises(PredictionError, match='2 different images arrived, the data set has 3'):
        metric.evaluate(size=N_IMAGES)


def test_wrong_use_is_explained(tmp_path: Path) -> None:
    case = write_cases(tmp_path)[0]
    sample = sample_of(case, predict(case))
    del sample['label_paths']
    with pytest.raises(ConfigError, match='meta_keys'):
        build().process(None, [sample])
    with pytest.raises(ConfigError, match=r"\['pq_thr'\]"):
        build(score_params={'pq_thr': 0.3})
    nameless = CellMetric(n_bootstrap=0)
    nameless.process(None, [sample_of(case, predict(case))])
    with pytest.raises(ConfigError, match='names no classes'):
        nameless.evaluate(size=1)


def test_files_hold_predictions_and_scores(tmp_path: Path) -> None:
    cases = write_cases(tmp_path)
    metric = build(
        outfile_prefix=str(tmp_path / 'out' / 'val'),
        score_params={'f1_iou_thrs': [0.5, 0.8]},
        provenance={'fold': 3},
    )
    metric.process(None, [sample_of(case, predict(case)) for case in cases])
    got = metric.evaluate(size=N_IMAGES)
    loaded = load_predictions(tmp_path / 'out' / 'val.predictions.npz')
    assert loaded.provenance['fold'] == 3
    assert loaded.provenance['class_names'] == list(NAMES)
    again = score(
        [read_gt(case) for case in cases],
        loaded.sets,
        NAMES,
        ScoreParams(n_bootstrap=0, f1_iou_thrs=(0.5, 0.8)),
    )
    same({f'cell/{name}': value for name, value in flat_metrics(again).items()}, got)
    record = json.loads((tmp_path / 'out' / 'val.scores.json').read_text())
    assert record['headline']['F1_80'] == got['cell/F1_80']
    assert record['provenance'] == loaded.provenance
    assert record['headline']['segm_AP50_c'] is None
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == [
        'val.predictions.npz',
        'val.scores.json',
    ]


def test_images_at_the_cap_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases = write_cases(tmp_path)
    logger = MMLogger.get_instance(f'metric_{tmp_path.name}')  # becomes the current one
    logger.addHandler(caplog.handler)
    metric = build(max_per_img=7)  # the images have 5, 7 and 9 predictions
    metric.process(None, [sample_of(case, predict(case)[:7]) for case in cases])
    metric.evaluate(size=N_IMAGES)
    logger.removeHandler(caplog.handler)
    assert '2 of 3 images hit the cap of 7 instances' in caplog.text
    assert 'segm AP50 @7' in caplog.text


def _evaluate_rank(rank: int, port: int, root: str) -> None:
    """Score one rank's share and write what it got."""
    dist.init_process_group(
        'gloo',
        init_method=f'tcp://127.0.0.1:{port}',
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        metric = build(collect_dir=str(Path(root, 'collected')))
        # What DefaultSampler gives two ranks for three images.
        for i in ((0, 2), (1, 0))[rank]:
            case = case_of(Path(root), i)
            metric.process(None, [sample_of(case, predict(case))])
        got = metric.evaluate(size=N_IMAGES)
        Path(root, f'rank{rank}.json').write_text(json.dumps(got))
    finally:
        dist.destroy_process_group()


def test_two_processes_give_the_same_scores(tmp_path: Path) -> None:
    cases = write_cases(tmp_path)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    other = torch.multiprocessing.get_context('spawn').Process(
        target=_evaluate_rank, args=(1, port, str(tmp_path))
    )
    other.start()
    _evaluate_rank(0, port, str(tmp_path))
    other.join(60)
    assert other.exitcode == 0
    for rank in range(2):
        same(json.loads((tmp_path / f'rank{rank}.json').read_text()), expected(cases))


class OneWeight(BaseModel):
    """The smallest model that a Runner trains."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, mode: str = 'tensor') -> object:
        return {'loss': self.weight.sum() + 0 * x.sum()} if mode == 'loss' else [{}]


class Scripted(BaseMetric):
    """Delivers given values of segm_mAP_50, one per validation."""

    default_prefix = 'cell'

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = iter(values)

    def process(self, data_batch: object, data_samples: object) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list) -> dict[str, float]:
        return {'segm_mAP_50': next(self.values)}


def test_save_best_waits_for_a_defined_score(tmp_path: Path) -> None:
    """NaN first, NaN in between and NaN last: the best checkpoint is that of the best number."""
    data = {
        'batch_size': 1,
        'dataset': [torch.zeros(1)],
        'sampler': {'type': 'DefaultSampler', 'shuffle': False},
    }
    runner = Runner(
        model=OneWeight(),
        work_dir=str(tmp_path),
        train_dataloader=data,
        val_dataloader=data,
        train_cfg={'by_epoch': True, 'max_epochs': 5, 'val_interval': 1},
        val_cfg={},
        val_evaluator=Evaluator(Scripted([math.nan, 0.2, math.nan, 0.5, math.nan])),
        optim_wrapper={'optimizer': {'type': 'SGD', 'lr': 0.1}},
        default_hooks={
            'checkpoint': {
                'type': 'CheckpointHook',
                'interval': 5,
                'save_best': 'cell/segm_mAP_50',
                'rule': 'greater',
            }
        },
        experiment_name=f'save_best_{tmp_path.name}',
        default_scope='mmengine',
    )
    runner.train()
    assert [p.name for p in tmp_path.glob('best_*')] == ['best_cell_segm_mAP_50_epoch_4.pth']
    assert runner.message_hub.get_info('best_score') == 0.5

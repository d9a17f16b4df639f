"""browse and ValidationPictureHook: pictures show what training really gets."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

import cellseg_mm  # noqa: F401  (makes mmdet importable where mmcv has no compiled ops)

pytest.importorskip('torch')
pytest.importorskip('mmdet')

import torch
from mmdet.registry import DATA_SAMPLERS, DATASETS, VISBACKENDS
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from mmengine.visualization import Visualizer

from cellseg_mm import components  # noqa: F401  (registers)
from cellseg_mm.checks import browse
from cellseg_mm.core.errors import ConfigError
from cellseg_mm.data.folds import Folds, save_folds
from cellseg_mm.data.labels import find_cases, read_gt
from cellseg_mm.pipeline.label_map_masks import LabelMapMasks
from cellseg_mm.training.pictures import ValidationPictureHook

pytestmark = pytest.mark.mm

HW = (61, 83)
META = ('img_id', 'name', 'img_path', 'label_paths', 'ori_shape', 'img_shape')
COLOURS = ((0, 114, 178), (213, 94, 0))


def write_data(root: Path) -> Path:
    """Write four cases with 3 + i cells of two classes; class 1 is larger."""
    names = [f'case{i}' for i in range(4)]
    for i, name in enumerate(names):
        folder = root / 'train' / name
        folder.mkdir(parents=True)
        pixels = np.full((*HW, 3), 90 + 20 * i, dtype=np.uint8)
        pixels[..., 2] = 220  # stored as blue: shown as red, because red and blue are swapped
        tifffile.imwrite(folder / 'image.tif', pixels)
        for k, size in enumerate((6, 11)):
            label_map = np.zeros(HW, dtype=np.uint16)
            for n in range(3 + i):
                label_map[5 + 30 * k : 5 + 30 * k + size, 13 * n + 1 : 13 * n + 1 + size] = n + 1
            tifffile.imwrite(folder / f'class{k + 1}.tif', label_map)
    save_folds(root / 'folds.json', Folds((tuple(names[:1]), tuple(names[1:]))))
    return root


def config_of(root: Path) -> Config:
    load = {'type': 'LoadCellImage', 'red_blue_swapped': True}
    pack = {'type': 'PackDetInputs', 'meta_keys': META}
    train = [
        load,
        {'type': 'LoadLabelMaps'},
        {'type': 'RandomFlip', 'prob': 1.0},
        {'type': 'RandomRotate90', 'prob': 1.0},
        {'type': 'RandomFlip', 'prob': 0.0},
        pack,
    ]
    common = {
        'type': 'CellDataset',
        'data_root': str(root),
        'fold': 0,
        'metainfo': {'classes': ('small', 'large'), 'palette': COLOURS},
    }
    return Config(
        {
            'train_dataloader': {
                'batch_size': 1,
                'num_workers': 0,
                'sampler': {'type': 'SeededInfiniteSampler', 'shuffle': True},
                'dataset': {
                    'type': 'SeededDataset',
                    'dataset': {'split': 'train', 'pipeline': train, **common},
                },
            },
            'val_dataloader': {
                'batch_size': 1,
                'num_workers': 0,
                'sampler': {'type': 'DefaultSampler', 'shuffle': False},
                'dataset': {
                    'split': 'val',
                    'pipeline': [load, pack],
                    'test_mode': True,
                    **common,
                },
            },
            'randomness': {'seed': 5},
        }
    )


@pytest.fixture(scope='module')
def cfg(tmp_path_factory: pytest.TempPathFactory) -> Config:
    init_default_scope('mmdet')
    return config_of(write_data(tmp_path_factory.mktemp('browse')))


def has_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((picture == np.array(colour)).all(axis=2).any())


def test_samples_are_the_first_draws_of_training(cfg: Config, monkeypatch) -> None:
    shown: list[np.ndarray] = []
    original = browse.draw_overlay
    monkeypatch.setattr(
        browse, 'draw_overlay', lambda rgb, *a, **k: shown.append(rgb) or original(rgb, *a, **k)
    )
    browsed = browse.browse_samples(cfg, n=4)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    sampler = DATA_SAMPLERS.build(
        cfg.train_dataloader.sampler, default_args={'dataset': dataset, 'seed': 5}
    )
    for rgb, index in zip(shown, sampler, strict=False):
        expected = dataset[index]['inputs'].numpy()[::-1].transpose(1, 2, 0)
        assert np.array_equal(rgb, expected)
        assert rgb[0, 0].tolist()[0] == 220  # red first
    assert len(shown) == 4
    assert all(has_colour(browsed.picture, colour) for colour in COLOURS)
    assert '4 samples of 3 train images' in browsed.text


def test_validation_samples_have_no_labels(cfg: Config) -> None:
    browsed = browse.browse_samples(cfg, split='val', n=1)
    assert '1 samples of 1 val images' in browsed.text


@pytest.mark.parametrize(
    ('call', 'match'),
    [
        (lambda cfg: browse.browse_samples(cfg, split='test'), 'expected train or val'),
        (lambda cfg: browse.browse_samples(cfg, n=0), 'at least 1'),
    ],
)
def test_wrong_requests(cfg: Config, call, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        call(cfg)


def test_statistics_by_hand(cfg: Config) -> None:
    browsed = browse.browse_dataset(cfg, n=2)
    # cases 1 to 3 have 4, 5 and 6 cells of each class
    assert browsed.text.splitlines()[0] == '3 train images, 61 to 83 px a side, 30 cells'
    sets = [
        read_gt(case)
        for case in find_cases(cfg.val_dataloader.dataset.data_root, 'train', 2)
        if case.name != 'case0'
    ]
    small, large = browse.statistics_of(sets, ('small', 'large'))
    assert (small.n_cells, small.n_images) == (15, 3)
    assert small.diameters_px == pytest.approx(2 * np.sqrt(36 / np.pi))
    assert large.diameters_px[0] == pytest.approx(2 * np.sqrt(121 / np.pi))


def test_statistics_of_an_empty_class() -> None:
    (empty,) = browse.statistics_of([], ('a',))
    assert (empty.n_cells, empty.n_images, len(empty.diameters_px)) == (0, 0, 0)
    assert browse.draw_histograms([empty], [(0, 0, 0)], width_px=200).shape == (150, 200, 3)


def test_augmentations_show_each_step(cfg: Config, monkeypatch) -> None:
    shown: list[np.ndarray] = []
    original = browse.draw_overlay
    monkeypatch.setattr(
        browse,
        'draw_overlay',
        lambda rgb, *a, **k: shown.append(original(rgb, *a, **k)) or shown[-1],
    )
    browsed = browse.browse_augmentations(cfg, n=2)
    assert [line.strip() for line in browsed.text.splitlines()[1:]] == [
        'as loaded: 2 of 2',
        'RandomFlip: 2 of 2',
        'RandomRotate90: 2 of 2',
        'RandomFlip: 0 of 2',
    ]
    assert len(shown) == 8
    loaded, flipped, turned, same = shown[:4]
    assert loaded.shape == flipped.shape == (*HW, 3)
    # Boxes and masks moved with the image: the picture of a mirrored sample is the mirrored one.
    assert np.array_equal(flipped, loaded[:, ::-1])
    assert not np.array_equal(flipped, loaded)
    assert np.array_equal(same, turned)


@pytest.mark.parametrize('kind', ['label map', 'bitmaps'])
def test_instances_of_masks_equal_the_dense_masks(kind: str) -> None:
    layers = np.zeros((2, 9, 12), dtype=np.int32)
    layers[0, 1:4, 2:7] = 1
    layers[0, 5:8, 0:3] = 4
    layers[0, 3, 2] = 4  # inside the box of the first
    layers[1, 2:6, 5:12] = 2
    masks = LabelMapMasks(layers, np.array([1, 4, 2, 3]), np.array([0, 0, 1, 1]))
    dense = masks.to_ndarray()
    if kind == 'bitmaps':
        masks = BitmapMasks(dense[:3], 9, 12)
    classes = np.array([0, 1, 1, 0])[: len(masks)]
    found = browse.instances_of_masks(masks, classes)
    assert np.array_equal(found.masks(), dense[:3].astype(bool))  # the fourth has no pixel
    assert found.class_ids.tolist() == [0, 1, 1]


# ---- pictures while training ----


class OneCell(BaseModel):
    """Finds one square in every image."""

    def forward(self, inputs, data_samples=None, mode='tensor'):
        masks = torch.zeros(1, *HW, dtype=torch.bool)
        masks[0, 20:40, 20:40] = True
        for sample in data_samples:
            sample.pred_instances = InstanceData(
                bboxes=torch.tensor([[20.0, 20, 40, 40]]),
                scores=torch.tensor([0.8]),
                labels=torch.tensor([1]),
                masks=masks,
            )
        return data_samples


class Recorder(Visualizer):
    """Keeps the images that hooks send to the backends."""

    def __init__(self, name: str = 'recorder') -> None:
        super().__init__(name)
        self.images: list[tuple[str, tuple, int]] = []

    def add_image(self, name: str, image: np.ndarray, step: int = 0) -> None:
        self.images.append((name, image.shape, step))


def validate(cfg: Config, work_dir: Path, hook: ValidationPictureHook, times: int) -> Recorder:
    runner = Runner(
        OneCell(),
        work_dir=str(work_dir),
        val_dataloader={**cfg.val_dataloader, 'collate_fn': {'type': 'pseudo_collate'}},
        val_cfg={'type': 'ValLoop'},
        val_evaluator={'type': 'CellMetric', 'n_bootstrap': 0},
        custom_hooks=[hook],
        default_hooks={'logger': None, 'checkpoint': None},
        default_scope='mmdet',
        experiment_name=f'{work_dir.name}-{times}',
    )
    runner.visualizer = Recorder()
    for _ in range(times):
        runner.val()
    return runner.visualizer


def test_pictures_reach_files_and_backends(cfg: Config, tmp_path: Path) -> None:
    recorder = validate(cfg, tmp_path, ValidationPictureHook(n_images=3), 1)
    assert [name for name, _, _ in recorder.images] == ['val_case0']
    (path,) = (tmp_path / 'val_pictures').glob('*.png')
    picture = cv2.imread(str(path))[..., ::-1]
    assert picture.shape == recorder.images[0][1]
    half = picture.shape[1] // 2
    assert has_colour(picture[:, :half], COLOURS[0])  # labels of both classes on the left
    right = picture[30:90, half:]  # between title and legend: the one predicted cell
    assert has_colour(right, COLOURS[1])
    assert not has_colour(right, COLOURS[0])


def test_every_nth_validation_is_drawn(cfg: Config, tmp_path: Path) -> None:
    hook = ValidationPictureHook(every_n=2, score_thr=0.9, out_dir='')
    recorder = validate(cfg, tmp_path, hook, 5)
    assert len(recorder.images) == 2
    assert not (tmp_path / 'val_pictures').exists()


def test_mlflow_gets_file_names_with_step_and_format(tmp_path: Path) -> None:
    class FakeMLflow:
        MlflowException = RuntimeError

        def __init__(self) -> None:
            self.names: list[str] = []

        def log_image(self, image: np.ndarray, artifact_file: str) -> None:
            assert image.shape == (2, 3, 3)
            self.names.append(artifact_file)

    backend = VISBACKENDS.build({'type': 'MLflowPictureBackend', 'save_dir': str(tmp_path)})
    backend._mlflow, backend._env_initialized = FakeMLflow(), True
    for step in (2, 4):
        backend.add_image('val_case0', np.zeros((2, 3, 3), dtype=np.uint8), step)
    assert backend._mlflow.names == ['val_case0_2.png', 'val_case0_4.png']


@pytest.mark.parametrize('name', ['every_n', 'n_images'])
def test_hook_refuses_zero(name: str) -> None:
    with pytest.raises(ConfigError, match=f'{name}: 0; expected at least 1'):
        ValidationPictureHook(**{name: 0})


def test_tool_writes_a_picture(cfg: Config, tmp_path: Path, monkeypatch, capsys) -> None:
    import runpy

    path = tmp_path / 'fold0.py'
    path.write_text("default_scope = 'mmdet'\n" + cfg.pretty_text)
    out = tmp_path / 'x.png'
    tool = Path(__file__).resolve().parents[2] / 'tools' / 'browse.py'
    words = [str(tool), str(path), '--dataset', '--n', '1', '--out', str(out)]
    monkeypatch.setattr(sys, 'argv', words)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(tool), run_name='__main__')
    assert ended.value.code == 0
    assert cv2.imread(str(out)) is not None
    assert f'picture: {out}' in capsys.readouterr().out

"""Exported files find what their models find, also where there is no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cellseg_mm  # noqa: F401

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')
onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

from mmengine.config import Config  # noqa: E402

from cellseg_mm.core.errors import CheckpointError, ConfigError  # noqa: E402
from cellseg_mm.core.files import write_json  # noqa: E402
from cellseg_mm.core.instances import InstanceSet  # noqa: E402
from cellseg_mm.detectors.from_options import make_detector  # noqa: E402
from cellseg_mm.exporting import onnx_file, ort_web  # noqa: E402
from cellseg_mm.exporting.export import (  # noqa: E402
    Exported,
    ExportOptions,
    export,
    trained_size,
)
from cellseg_mm.exporting.parity import compare  # noqa: E402
from cellseg_mm.fusion.settings import default_settings  # noqa: E402
from cellseg_mm.light import from_options as light  # noqa: E402
from cellseg_mm.light.card import describe  # noqa: E402
from cellseg_mm.light.detector import OnnxModel  # noqa: E402
from cellseg_mm.light.model_file import read_model_file  # noqa: E402
from cellseg_mm.predict.options import MemberOptions, PredictOptions  # noqa: E402
from cellseg_mm.results.predictions import load_predictions  # noqa: E402
from tests.support.spread_model import spread_model  # noqa: E402
from tests.support.tiny_folds import (  # noqa: E402
    ROOT,
    TinyFolds,
    environment,
    make_tiny_folds,
    save_checkpoint,
)
from tests.support.without_torch import WITHOUT_TORCH  # noqa: E402

pytestmark = pytest.mark.mm

CAP = 200
FRAME = "type='CellRoIHead', mask_frame=1.25"  # masks reach beyond their boxes


@pytest.fixture(scope='module')
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyFolds:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp('tiny')
        patch.setenv('CELLSEG_DATA', str(root / 'data'))
        tiny = make_tiny_folds(root)
        for fold, (config, checkpoint) in enumerate(
            zip(tiny.configs, tiny.checkpoints, strict=True)
        ):
            path = Path(config)
            text = path.read_text().replace('max_per_img=20', f'max_per_img={CAP}')
            path.write_text(text.replace('roi_head=dict(', f'roi_head=dict({FRAME}, '))
            save_checkpoint(
                checkpoint, spread_model(path, fold), fold=fold, fold_hash=tiny.folds.hash
            )
        return tiny


@pytest.fixture(autouse=True)
def _data(tiny: TinyFolds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('CELLSEG_DATA', str(tiny.data_root))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')


@pytest.fixture(scope='module')
def files(tiny: TinyFolds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    out = tmp_path_factory.mktemp('files')
    classes = ('epithelial', 'lymphocyte', 'neutrophil', 'macrophage')
    profiles = {
        name: default_settings(name, classes).to_json() for name in ('submission', 'instances')
    }
    profiles['instances'] |= {'score_thr': dict.fromkeys(classes, 0.1), 'tta': 'hflip'}
    card = {'card': out / 'card.json', 'scores': out / 'oof.flips.scores.json'}
    write_json(card['card'], {'licence': 'CC0', 'um_per_px': 0.25})
    write_json(
        card['scores'],
        {
            'headline': {'segm_AP50': 0.5},
            'per_image': {'names': ['a']},
            'cap': 500,
            'class_names': list(classes),
            'provenance': {'split': 'oof', 'fold_hash': tiny.folds.hash, 'folds': [0, 1]},
        },
    )
    settings = tiny.root / 'inference.json'
    write_json(settings, {'version': 1, 'class_names': list(classes), 'profiles': profiles})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('CELLSEG_DATA', str(tiny.data_root))
        return {
            'one': run(tiny, out / 'one.onnx', 1),
            'half': run(tiny, out / 'half.cellseg', 1, half=True, red_blue_swapped=False, **card),
            'two': run(tiny, out / 'two.cellseg', 2),
            'with settings': run(tiny, out / 'settings.cellseg', 2, settings=str(settings)),
        }


def configs_of(tiny: TinyFolds, n: int) -> dict[str, Config]:
    return {path: Config.fromfile(path) for path in tiny.configs[:n]}


def members_of(tiny: TinyFolds, n: int, settings: str | None = None) -> MemberOptions:
    return MemberOptions(checkpoints=tuple(map(str, tiny.checkpoints[:n])), settings_path=settings)


def run(
    tiny: TinyFolds, out: Path, n: int, *, settings: str | None = None, **options: Any
) -> Exported:
    wanted = ExportOptions(out=out, **options)
    return export(configs_of(tiny, n), members_of(tiny, n, settings), wanted)


def test_every_file_is_checked_and_says_what_it_is(files: dict[str, Exported]) -> None:
    for exported in files.values():
        for _, parity in exported.members:
            assert parity.n_cells == parity.n_same > 50
            assert parity.box_px < 1e-3
            assert parity.score < 1e-4
    one, half = files['one'], files['half']
    assert half.n_bytes < 0.75 * one.n_bytes  # the smallest tensors stay
    assert half.halved[0][1] == one.members[0][1].n_cells
    assert str(half.halved[0][0]) in half.describe()
    props = {p.key: p.value for p in onnx.load(one.path).metadata_props}
    record = json.loads(props['cellseg'])
    assert record['class_names'][0] == 'epithelial'
    assert record['member']['fold'] == 0
    assert record['parity']['n_only'] == 0
    assert record['mask_frame'] == 1.25


def test_a_file_carries_its_card(tiny: TinyFolds, files: dict[str, Exported]) -> None:
    half = read_model_file(files['half'].path)
    assert half.card['licence'] == 'CC0'
    assert half.card['scores']['headline'] == {'segm_AP50': 0.5}
    assert half.card['members'][0]['source'] == tiny.checkpoints[0].name  # without the folder
    assert half.card['training'][0]['red_blue_swapped'] is True
    assert (half.card['red_blue_swapped'], half.card['half']) == (False, True)
    record = OnnxModel(half.members[0], 'cpu').record
    assert (record.red_blue_swapped, record.um_per_px) == (False, 0.25)
    assert 'AP50' in describe(half)
    two = read_model_file(files['two'].path)
    assert (two.card['scores'], two.card['red_blue_swapped']) == (None, True)
    assert 'card: no scores outside the training' in files['two'].describe()
    assert 'No scores' in describe(two)


def test_a_picture_in_the_other_order_gives_the_same_cells(
    tiny: TinyFolds, files: dict[str, Exported], tmp_path: Path
) -> None:
    picture = np.random.default_rng(5).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    file = read_model_file(files['half'].path)
    found = []
    for is_swapped in (None, True):  # natural is what the file says
        options = PredictOptions(
            inputs=('.',), out_dir=tmp_path, device='cpu', red_blue_swapped=is_swapped
        )
        detector = light.make_detector([file], MemberOptions(), options)
        seen = picture[..., ::-1] if is_swapped else picture
        found += detector.detect([np.ascontiguousarray(seen)], 'a')
    assert len(found[0]) > 30
    assert found[0].rles == found[1].rles


def picture_of(tiny: TinyFolds, name: str = '') -> Path:
    return sorted((tiny.data_root / 'test_release').glob(f'{name}*.tif'))[0]


CASES = [
    pytest.param('one', 1, None, id='one model'),
    pytest.param('one', 1, 'flips', id='views'),
    pytest.param('one', 1, 'd4,scales=1.25', id='turns and scales'),
    pytest.param('two', 2, None, id='an ensemble'),
    pytest.param('two', 2, 'hflip', id='an ensemble with views'),
    pytest.param('with settings', 2, None, id='settings in the file'),
]


@pytest.mark.parametrize(('which', 'n', 'tta'), CASES)
def test_the_detector_without_torch_finds_the_same(
    tiny: TinyFolds, files: dict[str, Exported], tmp_path: Path, which: str, n: int, tta: str | None
) -> None:
    settings = str(tiny.root / 'inference.json') if which == 'with settings' else None
    members = members_of(tiny, n, settings)
    members = MemberOptions(
        checkpoints=members.checkpoints, settings_path=members.settings_path, tta=tta
    )
    options = PredictOptions(inputs=('.',), out_dir=tmp_path, device='cpu')
    in_torch = make_detector(configs_of(tiny, n), members, options)
    file = read_model_file(files[which].path)
    without = light.make_detector([file], MemberOptions(tta=tta), options)
    assert (without.cap, without.identity['fusion']) == (in_torch.cap, in_torch.identity['fusion'])
    rng = np.random.default_rng(5)
    for hw in ((90, 70), (61, 140)):
        picture = rng.integers(0, 256, (*hw, 3), dtype=np.uint8)
        ours = in_torch.detect([picture], 'a')
        theirs = without.detect([picture], 'a')
        found = compare(ours, theirs, score_thr=0.01, cap=CAP)
        assert found.n_cells == found.n_same > 30
        assert found.n_odd_pixels <= 2
        assert set(theirs[0].extra) == set(ours[0].extra)


def test_predict_runs_where_torch_cannot_be_imported(
    tiny: TinyFolds, files: dict[str, Exported], tmp_path: Path
) -> None:
    images = sorted((tiny.data_root / 'test_release').glob('*.tif'))
    words = [str(files['two'].path), *map(str, images), '--out', 'out', '--tile', '64']
    words += ['--overlap', '24', '--format', 'geojson', 'csv', 'label-map', 'overlay', 'coco']
    command = [sys.executable, '-c', WITHOUT_TORCH, str(ROOT / 'tools/predict.py'), *words]
    env = environment(tiny.data_root) | {'PYTHONPATH': ':'.join([str(ROOT), *sys.path[1:]])}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    options = PredictOptions(
        inputs=tuple(map(str, images)),
        out_dir=tmp_path / 'in_torch',
        tile_px=64,
        overlap_px=24,
        device='cpu',
    )
    from cellseg_mm.detectors.from_options import predict_images

    predict_images(configs_of(tiny, 2), members_of(tiny, 2), options)
    for image in images:
        ours, theirs = (
            one_set(tmp_path / folder / f'{image.stem}.npz') for folder in ('in_torch', 'out')
        )
        found = compare([ours], [theirs], score_thr=0.01, cap=0)
        # of thousands of cells without training some vote at the very threshold of fusion
        assert found.n_same > max(found.n_cells * 0.99, 100)
        assert found.n_odd_pixels <= 3
    again = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert f'{len(images)} were done already' in again.stdout


def one_set(path: Path) -> InstanceSet:
    (found,) = load_predictions(path).sets
    return found


def test_a_file_that_finds_something_else_is_not_written(
    tiny: TinyFolds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_onnx = onnx_file.to_onnx

    def of_other_weights(model: torch.nn.Module, *rest: object) -> bytes:
        with torch.no_grad():
            model.roi_head.bbox_head.fc_cls.bias[0] += 0.5
            content = to_onnx(model, *rest)
            model.roi_head.bbox_head.fc_cls.bias[0] -= 0.5
        return content

    monkeypatch.setattr(onnx_file, 'to_onnx', of_other_weights)
    with pytest.raises(ConfigError, match='does not find what the model in torch finds'):
        run(tiny, tmp_path / 'model.onnx', 1)
    assert not list(tmp_path.iterdir())


def test_a_package_gets_the_drawn_picture_as_the_model_sees_it(
    tiny: TinyFolds, tmp_path: Path
) -> None:
    pytest.importorskip('bioimageio.core')
    with pytest.raises(ConfigError, match=r'the test picture: has 96 x 96 px .* expected 128 px'):
        run(tiny, tmp_path / 'model.zip', 1)
    assert not list(tmp_path.iterdir())


def test_names_that_do_not_fit(tiny: TinyFolds, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='ends in'):
        run(tiny, tmp_path / 'model.pt', 1)
    for name in ('model.onnx', 'model.zip'):
        with pytest.raises(ConfigError, match='one member without settings'):
            run(tiny, tmp_path / name, 2)
    (tmp_path / 'file').touch()
    with pytest.raises(ConfigError, match='file: cannot be written'):
        run(tiny, tmp_path / 'file/model.onnx', 1)


def test_members_of_other_classes_are_no_ensemble(
    files: dict[str, Exported], tmp_path: Path
) -> None:
    path = tmp_path / 'other.onnx'
    graph = onnx.load(files['one'].path)
    record = json.loads(graph.metadata_props[0].value)
    record['class_names'][0] = 'stroma'
    onnx.helper.set_model_props(graph, {'cellseg': json.dumps(record)})
    onnx.save(graph, path)
    options = PredictOptions(inputs=('.',), out_dir=tmp_path, device='cpu')
    both = [read_model_file(files['one'].path), read_model_file(path)]
    with pytest.raises(CheckpointError, match='stroma'):
        light.make_detector(both, MemberOptions(), options)


def test_a_page_is_made_of_the_checked_file(
    tiny: TinyFolds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = dict.fromkeys((ort_web.LOADER, ort_web.WASM), b'var a=1;export{a as default};')
    for module in ('export', 'html_page'):
        name = f'cellseg_mm.exporting.{module}.runtime_files'
        monkeypatch.setattr(name, lambda named: content)
    exported = run(tiny, tmp_path / 'one.html', 1)
    assert exported.members[0][1].n_same > 50
    assert exported.n_bytes == (tmp_path / 'one.html').stat().st_size
    assert 'Cells by one' in (tmp_path / 'one.html').read_text(encoding='utf-8')
    with pytest.raises(ConfigError, match='2 members; a page carries one'):
        run(tiny, tmp_path / 'two.html', 2)
    assert [path.name for path in tmp_path.iterdir()] == ['one.html']


@pytest.mark.parametrize(
    ('said', 'expected'),
    [({}, None), ({'um_per_px': [0.5, 0.5]}, 0.5), ({'um_per_px': [1, 2]}, None)],
)
def test_size_of_a_pixel_is_the_trainings_where_the_card_is_silent(said, expected) -> None:
    assert trained_size(SimpleNamespace(provenance={'members': [said]})) == expected

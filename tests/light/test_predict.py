"""What predict does with model files: tiles, views, ensembles, formats, going on; and bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

from onnx import TensorProto, helper

from cellseg_mm.core.errors import CheckpointError, ConfigError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.fusion.settings import default_settings
from cellseg_mm.light.detector import OnnxModel
from cellseg_mm.light.from_options import predict_images
from cellseg_mm.light.model_file import read_model_file, write_model_file
from cellseg_mm.predict.options import MemberOptions, PredictOptions
from cellseg_mm.predict.summary import Summary
from cellseg_mm.results.formats import FORMATS
from cellseg_mm.results.predictions import load_predictions
from tests.support.marker_model import (
    CLASSES,
    marked_picture,
    marker_model,
    write_marker_model,
)
from tests.support.without_torch import WITHOUT_TORCH

ROOT = Path(__file__).resolve().parents[2]
N_CELLS = 42  # 6 x 7 markers


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_marker_model(tmp_path / 'markers.onnx')


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / 'a.tif'
    tifffile.imwrite(path, marked_picture((96, 112)), photometric='rgb')
    return path


def run(
    models: Path | list[Path],
    image: Path,
    *,
    members: MemberOptions | None = None,
    **options: object,
) -> tuple[Summary, InstanceSet | None]:
    out = image.parent / 'out'
    settings = {'inputs': (str(image),), 'out_dir': out, 'formats': ('csv',), 'device': 'cpu'}
    paths = [str(path) for path in (models if isinstance(models, list) else [models])]
    summary = predict_images(
        paths, members or MemberOptions(), PredictOptions(**{**settings, **options})
    )
    found = out / f'{image.stem}.npz'
    return summary, load_predictions(found).sets[0] if found.is_file() else None


def in_order(found: InstanceSet) -> InstanceSet:
    return found[np.lexsort(found.boxes_xyxy.T)]


def test_tiles_find_what_the_whole_finds(model: Path, image: Path) -> None:
    _, whole = run(model, image)
    _, tiled = run(model, image, tile_px=48, overlap_px=20, again=True)
    assert len(whole) == len(tiled) == N_CELLS
    first, second = in_order(whole), in_order(tiled)
    assert first.rles == second.rles
    np.testing.assert_array_equal(first.class_ids, second.class_ids)
    np.testing.assert_array_equal(first.areas, 81)  # 9 x 9


def test_a_model_says_how_large_its_tiles_are(tmp_path: Path, image: Path) -> None:
    model = write_marker_model(tmp_path / 'markers.onnx', tile_px=64)
    run(model, image, overlap_px=20)
    found = load_predictions(tmp_path / 'out/a.npz').provenance
    assert (found['tile_px'], found['whole_px'], found['tiles']['n_tiles']) == (64, 64, 6)
    run(model, image, overlap_px=20, tile_px=200)
    assert load_predictions(tmp_path / 'out/a.npz').provenance['tile_px'] == 200


@pytest.mark.parametrize('tta', ['hflip', 'flips', 'd4'])
def test_views_agree(model: Path, image: Path, tta: str) -> None:
    _, plain = run(model, image)
    _, viewed = run(model, image, members=MemberOptions(tta=tta))
    assert in_order(viewed).rles == in_order(plain).rles
    np.testing.assert_allclose(in_order(viewed).scores, in_order(plain).scores, atol=1e-6)


def test_files_of_one_member_and_of_several_make_the_same_ensemble(
    model: Path, image: Path, tmp_path: Path
) -> None:
    larger = write_marker_model(tmp_path / 'larger.onnx', radius=5)
    both = tmp_path / 'both.cellseg'
    write_model_file(both, [larger.read_bytes(), model.read_bytes()], settings=None, card={})
    _, apart = run([model, larger], image)
    summary, together = run(both, image)
    assert summary.skipped == ['a']  # the members are the same: nothing is looked at again
    summary, together = run(both, image, again=True)
    assert summary.predicted == ['a']
    assert together.rles == apart.rles
    assert len(apart) == N_CELLS
    assert apart.areas.min() >= 77


def test_going_on(model: Path, image: Path, tmp_path: Path) -> None:
    assert run(model, image)[0].predicted == ['a']
    assert run(model, image)[0].skipped == ['a']
    assert run(model, image, formats=('csv', 'geojson'))[0].rewritten == ['a']
    other = write_marker_model(tmp_path / 'other.onnx', radius=3)
    assert run(other, image)[0].predicted == ['a']


@pytest.mark.parametrize('name', ['markers.onnx', 'markers.cellseg'])
def test_every_format_without_torch(image: Path, tmp_path: Path, name: str) -> None:
    content = marker_model()
    path = tmp_path / name
    if path.suffix == '.onnx':
        path.write_bytes(content)
    else:
        write_model_file(path, [content, marker_model(radius=5)], settings=None, card={})
    words = [str(path), str(image), '--out', 'out', '--tile', '64', '--overlap', '20']
    words += ['--tta', 'flips', '--format', *FORMATS]
    command = [sys.executable, '-c', WITHOUT_TORCH, str(ROOT / 'tools/predict.py'), *words]
    env = {**os.environ, 'PYTHONPATH': ':'.join([str(ROOT), *sys.path[1:]]), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f'{N_CELLS} cells' in done.stdout
    assert len(list((tmp_path / 'out').glob('a.*'))) >= len(FORMATS) + 2  # instances and state


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize('n', [1, 4])
def test_grey_and_four_channels_become_what_the_model_sees(
    model: Path, tmp_path: Path, n: int
) -> None:
    picture = marked_picture((40, 40))
    grey = np.where(picture[..., 0] == 255, 255, 100).astype(np.uint8)
    shown = grey if n == 1 else np.dstack([picture, np.full_like(grey, 255)])
    path = tmp_path / 'b.tif'
    more = {'photometric': 'rgb', 'extrasamples': ['unassalpha']} if n == 4 else {}
    tifffile.imwrite(path, shown, **more)
    summary, found = run(model, path)
    assert not summary.failed
    assert len(found) == 4


def test_pictures_of_channels_that_nobody_can_name_are_one_sentence(
    model: Path, tmp_path: Path
) -> None:
    path = tmp_path / 'five.tif'
    tifffile.imwrite(
        path, np.zeros((40, 40, 5), np.uint8), photometric='minisblack', planarconfig=1
    )
    summary, found = run(model, path)
    assert found is None
    (message,) = summary.failed.values()
    assert 'five.tif' in message
    assert 'channels' in message


@pytest.mark.parametrize('value', [0, 137, 254])
def test_a_picture_of_one_colour_has_no_cells(model: Path, tmp_path: Path, value: int) -> None:
    path = tmp_path / 'flat.tif'
    tifffile.imwrite(path, np.full((50, 60, 3), value, np.uint8), photometric='rgb')
    summary, found = run(model, path, formats=tuple(FORMATS))
    assert not summary.failed
    assert len(found) == 0
    assert 'no cell was found' in summary.describe()


def test_a_model_for_other_pictures(tmp_path: Path) -> None:
    path = write_marker_model(tmp_path / 'four.onnx', n_channels=4)
    with pytest.raises(CheckpointError, match=r'of shape \[.*4\]; expected one for pictures'):
        OnnxModel(read_model_file(path).members[0], 'cpu')


@pytest.mark.parametrize(
    ('opset', 'ir', 'part'),
    [
        (16, 99, "reads ONNX's IR version up to .*, the file has 99; expected a newer onnxruntime"),
        (99, 8, "reads ONNX's opset up to .*, the file has 99; expected a newer onnxruntime"),
    ],
)
def test_an_onnxruntime_that_is_too_old(tmp_path: Path, opset: int, ir: int, part: str) -> None:
    ports = [helper.make_tensor_value_info(name, TensorProto.UINT8, [1]) for name in ('x', 'y')]
    graph = helper.make_graph(
        [helper.make_node('Identity', ['x'], ['y'])], 'g', ports[:1], ports[1:]
    )
    opsets = [helper.make_opsetid('', opset)]
    path = tmp_path / 'newer.onnx'
    path.write_bytes(
        helper.make_model(graph, opset_imports=opsets, ir_version=ir).SerializeToString()
    )
    with pytest.raises(CheckpointError, match=part):
        OnnxModel(read_model_file(path).members[0], 'cpu')


def test_every_cut_model_is_one_sentence(model: Path) -> None:
    whole = model.read_bytes()
    for end in range(0, len(whole), 97):
        model.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r'cannot load it|no model of this project'):
            OnnxModel(read_model_file(model).members[0], 'cpu')


def test_members_that_do_not_fit_together(model: Path, image: Path, tmp_path: Path) -> None:
    names = (CLASSES[0], 'stroma')
    other = write_marker_model(tmp_path / 'other.onnx', class_names=names)
    with pytest.raises(CheckpointError, match='stroma'):
        run([model, other], image)
    swapped = write_marker_model(tmp_path / 'swapped.onnx', red_blue_swapped=True)
    with pytest.raises(CheckpointError, match='prepared in different ways'):
        run([model, swapped], image)


def test_a_folder_of_results_that_cannot_be_made(
    model: Path, image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    summary, found = run(model, image, out_dir=image / 'out')
    assert found is None
    (message,) = summary.failed.values()
    assert 'a.tif/out' in message
    assert 'cannot be written or read (Not a directory); expected a folder with room' in message
    assert not caplog.records  # no traceback


def test_swapped_colours_are_put_right(model: Path, image: Path) -> None:
    tifffile.imwrite(image, tifffile.imread(image)[..., ::-1], photometric='rgb')
    assert len(run(model, image)[1]) == 0
    _, found = run(model, image, red_blue_swapped=True)
    assert len(found) == N_CELLS


def test_scales_need_a_step_that_resizes(model: Path, image: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='scales need a Resize in the test pipeline'):
        run(model, image, members=MemberOptions(tta='hflip,scales=2'))
    step = {'type': 'Resize', 'scale_factor': 1.0, 'keep_ratio': True, 'interpolation': 'nearest'}
    resized = write_marker_model(tmp_path / 'resized.onnx', resize=step)
    _, found = run(resized, image, members=MemberOptions(tta='hflip,scales=2'))
    assert len(found) >= N_CELLS


def test_settings_of_a_file_hold_until_others_are_named(
    model: Path, image: Path, tmp_path: Path
) -> None:
    profile = default_settings('instances', CLASSES).to_json()
    profile['score_thr'] = dict.fromkeys(CLASSES, 0.55)
    settings = {'version': 1, 'class_names': list(CLASSES), 'profiles': {'instances': profile}}
    inside = tmp_path / 'inside.cellseg'
    write_model_file(inside, [model.read_bytes()], settings=settings, card={})
    _, found = run(inside, image)
    assert 0 < len(found) < N_CELLS
    assert found.scores.min() >= 0.55
    assert len(run(inside, image, score_thr=0.9)[1]) <= len(found)
    assert len(run(inside, image, score_thr=0.1)[1]) == N_CELLS  # asked for, so not hidden
    said = MemberOptions(post='score_thr=0.55')  # and what is said of the steps holds
    assert run(inside, image, members=said, score_thr=0.1)[1].scores.min() >= 0.55
    with pytest.raises(ConfigError, match='holds settings that were found for its own members'):
        run([inside, model], image)
    assert len(run(inside, image, members=MemberOptions(post='disjoint'))[1]) == N_CELLS

"""The ops that stand in for compiled mmcv, in fresh interpreters as users have them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cellseg_mm import runtime
from cellseg_mm.core.errors import ConfigError

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

pytestmark = pytest.mark.mm

ROOT = Path(__file__).parents[2]
MMDET_TOOLS = Path(importlib.util.find_spec('mmdet').origin).parent / '.mim' / 'tools'
HAS_COMPILED = bool(list(Path(importlib.util.find_spec('mmcv').origin).parent.glob('_ext*.so')))
# What a compiled mmcv would answer; the tests below hold with and without one.
UNFORCED = 'mmcv' if HAS_COMPILED else None


def run(code: str, *path: Path, forced: str | None = None) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter that finds this project and, before it, ``path``."""
    environment = {key: value for key, value in os.environ.items() if key != runtime.VARIABLE}
    environment['PYTHONPATH'] = os.pathsep.join(map(str, (*path, ROOT)))
    environment['OMP_NUM_THREADS'] = '1'
    if forced is not None:
        environment[runtime.VARIABLE] = forced
    return subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def last_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def fake_package(folder: Path, name: str, body: str) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / '__init__.py').write_text(body)
    return folder


def test_mask_rcnn_imports_and_runs_its_ops() -> None:
    """Everything in one interpreter, because importing mmdet takes seconds."""
    done = run("""
import importlib.util, sys
import cellseg_mm
import mmdet.models
import torch
from mmcv.ops import RoIAlign, batched_nms
from mmengine.utils.dl_utils.misc import mmcv_full_available
from cellseg_mm.runtime import ops_backend

spec = importlib.util.find_spec('mmcv._ext')
assert spec is sys.modules['mmcv._ext'].__spec__ and spec.loader is not None
assert mmcv_full_available()
boxes = torch.tensor([[0., 0, 4, 4], [0, 0, 4, 4], [0, 0, 4, 4]])
scores, classes = torch.tensor([.5, .9, .7]), torch.tensor([0, 0, 1])
hard = {'type': 'nms', 'iou_threshold': .5}
assert batched_nms(boxes, scores, classes, hard)[1].tolist() == [1, 2]
soft = {'type': 'soft_nms', 'iou_threshold': .5, 'min_score': .05}
assert batched_nms(boxes, scores, classes, soft)[1].tolist() == [1, 2]
features = torch.ones(1, 2, 8, 8, requires_grad=True)
RoIAlign(7, 1.0, 0)(features, torch.tensor([[0, 1., 1, 5, 6]])).sum().backward()
assert abs(features.grad.sum().item() - 2 * 49) < 1e-3
from mmdet.utils import collect_env
assert collect_env()
print(ops_backend())
""")
    assert last_line(done) in ('mmcv', 'torchvision', 'torch')
    if not HAS_COMPILED:
        assert last_line(done) != 'mmcv'


def test_importing_mmdet_prints_nothing(tmp_path: Path) -> None:
    """Else the first line of what a tool prints, a job script's ``#!`` for one, is another."""
    done = run('import cellseg_mm, mmdet.datasets, mmdet.datasets.transforms as t; print(t.Resize)')
    assert done.stdout == "<class 'mmdet.datasets.transforms.transforms.Resize'>\n", done.stderr
    (tmp_path / 'mmdet/datasets').mkdir(parents=True)
    (tmp_path / 'mmdet/__init__.py').touch()
    body = f'print({runtime._OneDLSilencer.LINE!r} + "kept"); raise KeyError("a fault")'
    (tmp_path / 'mmdet/datasets/__init__.py').write_text(body)
    done = run('import cellseg_mm, mmdet.datasets', tmp_path)
    assert done.stdout == 'kept\n'
    assert "KeyError: 'a fault'" in done.stderr


PRINT_BACKEND = """
import cellseg_mm
from cellseg_mm.runtime import ops_backend
print(ops_backend())
"""


def test_forced_torch_and_its_missing_ops() -> None:
    """Also where compiled ops exist: they do not come first then."""
    code = """
import torch
from mmcv.ops import nms_match
try:
    nms_match(torch.zeros(1, 5), 0.5)
except NotImplementedError as error:
    print(error)
"""
    lines = run(PRINT_BACKEND + code, forced='torch').stdout.splitlines()
    assert lines[0] == 'torch'
    assert "mmcv op 'nms_match': cellseg_mm supplies only NMS" in lines[1]
    assert 'MMCV_WITH_OPS=1' in lines[1]


def test_wrong_name_of_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtime.VARIABLE, 'cuda')
    with pytest.raises(ConfigError, match="'cuda' is no backend; expected one of mmcv, torch"):
        runtime.provide_mmcv_ops()


@pytest.mark.skipif(HAS_COMPILED, reason='compiled mmcv ops are installed')
def test_compiled_ops_cannot_be_forced_where_there_are_none() -> None:
    done = run(PRINT_BACKEND, forced='mmcv')
    assert done.returncode == 1
    assert 'CELLSEG_OPS=mmcv: mmcv was installed without compiled ops' in done.stderr


def test_forcing_broken_torchvision_is_an_error(tmp_path: Path) -> None:
    broken = fake_package(tmp_path, 'torchvision', 'raise RuntimeError("operator does not exist")')
    done = run(PRINT_BACKEND, broken, forced='torchvision')
    assert done.returncode == 1
    assert "torchvision's ops do not work here" in done.stderr
    assert 'operator does not exist' in done.stderr


def test_broken_torchvision_is_passed_over_and_raises_import_error(tmp_path: Path) -> None:
    """As detectron2 beside a torchvision of another build: d2_wrapper catches only ImportError."""
    fake_package(tmp_path, 'torchvision', 'raise RuntimeError("operator does not exist")')
    fake_package(tmp_path, 'detectron2', 'import torchvision')
    code = """
import cellseg_mm
try:
    import detectron2
except ImportError as error:
    assert 'torchvision does not fit this torch: operator does not exist' in str(error)
else:
    raise SystemExit('no error')
import mmdet.models
"""
    done = run(code + PRINT_BACKEND, tmp_path)
    assert last_line(done) == (UNFORCED or 'torch')


def test_torchvision_without_working_ops_is_passed_over(tmp_path: Path) -> None:
    quiet = fake_package(tmp_path, 'torchvision', '')  # imports, but registers no operator
    done = run(PRINT_BACKEND, quiet)
    assert last_line(done) == (UNFORCED or 'torch')


@pytest.mark.skipif(HAS_COMPILED, reason='compiled mmcv ops come first')
def test_torchvision_comes_before_torch(tmp_path: Path) -> None:
    """A library that registers the operators under torchvision's names, as torchvision does."""
    body = """
import torch
library = torch.library.Library('torchvision', 'DEF')
library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
library.impl('nms', lambda dets, scores, iou_threshold: torch.zeros(0).long(), 'CPU')
"""
    done = run(PRINT_BACKEND, fake_package(tmp_path, 'torchvision', body))
    assert last_line(done) == 'torchvision'


def test_an_early_compiled_extension_cannot_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = type(sys)(runtime.EXTENSION)
    monkeypatch.setitem(sys.modules, runtime.EXTENSION, loaded)
    monkeypatch.setattr(sys, 'meta_path', [])
    monkeypatch.setenv(runtime.VARIABLE, 'torch')
    with pytest.raises(ConfigError, match='import cellseg_mm before mmcv and mmdet'):
        runtime.provide_mmcv_ops()


def test_finders_are_installed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'meta_path', list(sys.meta_path))
    before = list(sys.meta_path)
    runtime.provide_mmcv_ops()
    assert sys.meta_path == before


def test_stock_tools_take_the_ops_from_custom_imports(tmp_path: Path) -> None:
    """tools/train.py imports mmdet.utils before the config's custom_imports import us."""
    config = tmp_path / 'tiny.py'
    config.write_text(
        "custom_imports = {'imports': ['cellseg_mm'], 'allow_failed_imports': False}\n"
        "default_scope = 'mmdet'\n"
    )
    code = f"""
import runpy, sys
tool = runpy.run_path({str(MMDET_TOOLS / 'train.py')!r})  # not as __main__: only its imports
assert 'cellseg_mm' not in sys.modules and 'mmdet.utils' in sys.modules
tool['Config'].fromfile({str(config)!r})
import mmdet.models
from mmdet.utils.large_image import batched_nms
assert batched_nms.__module__ == 'mmcv.ops.nms', batched_nms.__module__
from cellseg_mm.runtime import ops_backend
print(ops_backend())
"""
    assert last_line(run(code, forced=None)) in ('mmcv', 'torchvision', 'torch')

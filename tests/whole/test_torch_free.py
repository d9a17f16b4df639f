"""A model in a file finds cells without torch: requirements/predict.txt and the wheel are enough.

The environment is made from nothing, so a package index is needed; where there is none the tests
fail and say so.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.fresh import ROOT, build_wheels, install, make_venv, packages_of, run

pytest.importorskip('torch')  # makes the model
pytest.importorskip('mmdet')
pytest.importorskip('onnx')
pytestmark = pytest.mark.mm

TORCH = ('torch', 'torchvision', 'mmengine', 'mmcv', 'mmdet')
# Every process of the environment begins with it: whoever asks for one of these is written down.
WATCH = f"""
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {TORCH!r}:
            with open(os.environ['ASKED_FOR_TORCH'], 'a') as file:
                print(name, sys.argv, file=file)
sys.meta_path.insert(0, Watch())
"""


@dataclass(frozen=True)
class TorchFree:
    """The command, the environment's packages, a folder to work in, a model and pictures."""

    command: str
    packages: Path
    elsewhere: Path
    model: Path
    pictures: Path

    @property
    def asked(self) -> Path:
        return self.elsewhere / 'asked_for_torch.txt'

    def cellseg(self, *words: str, status: int = 0) -> str:
        asked = {'ASKED_FOR_TORCH': str(self.asked)}
        done = run([self.command, *words], cwd=self.elsewhere, status=status, **asked)
        return done.stdout + done.stderr


def make_environment(folder: Path) -> tuple[Path, Path]:
    """Return commands and packages of an environment with what the page says, and no more."""
    wheel, _ = build_wheels(folder / 'build')
    commands = make_venv(folder / 'venv', wheel)
    wanted, exact = ROOT / 'requirements/predict.txt', ROOT / 'constraints.txt'
    try:
        # --no-compile: most of it is never imported
        install(folder / 'venv', '--no-compile', '-r', str(wanted), '-c', str(exact))
    except AssertionError as error:
        pytest.fail(
            f'the environment without torch is made from {wanted}, and pip could not; this test '
            f'needs a package index; pip said: {str(error)[-1500:]}'
        )
    packages = packages_of(folder / 'venv')
    (packages / 'watch_torch.py').write_text(WATCH)
    (packages / 'watch_torch.pth').write_text('import watch_torch\n')
    return commands, packages


def make_model(folder: Path) -> tuple[Path, Path]:
    """Export a very small model; return its file and a folder of pictures."""
    from mmengine.config import Config

    from cellseg_mm.exporting.export import ExportOptions, export
    from cellseg_mm.predict.options import MemberOptions
    from tests.support.spread_model import spread_model
    from tests.support.tiny_folds import make_tiny_folds, save_checkpoint

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('CELLSEG_DATA', str(folder / 'data'))
        tiny = make_tiny_folds(folder)
        config, checkpoint = tiny.configs[0], tiny.checkpoints[0]
        save_checkpoint(checkpoint, spread_model(config, 0), fold=0, fold_hash=tiny.folds.hash)
        members = MemberOptions(checkpoints=(str(checkpoint),))
        out = folder / 'model.onnx'
        export({config: Config.fromfile(config)}, members, ExportOptions(out=out))
    return out, tiny.data_root / 'test_release'


@pytest.fixture(scope='module')
def torch_free(tmp_path_factory: pytest.TempPathFactory) -> TorchFree:
    commands, packages = make_environment(tmp_path_factory.mktemp('environment'))
    elsewhere = tmp_path_factory.mktemp('elsewhere')
    model, pictures = make_model(tmp_path_factory.mktemp('model'))
    return TorchFree(str(commands / 'cellseg'), packages, elsewhere, model, pictures)


@pytest.fixture(autouse=True)
def _nobody_asks_for_torch(torch_free: TorchFree) -> Iterator[None]:
    yield
    assert not torch_free.asked.exists(), torch_free.asked.read_text()


def test_none_of_it_is_installed(torch_free: TorchFree) -> None:
    found = sorted(path.name.lower() for path in torch_free.packages.iterdir())
    assert 'onnxruntime' in found
    assert not [name for name in found if name.startswith(TORCH) or 'onedl' in name]
    said = torch_free.cellseg('--version')
    assert 'not installed: torch, mmengine, mmcv, mmdet' in said
    assert 'onnxruntime' in said


def test_cells_are_found(torch_free: TorchFree) -> None:
    words = [str(torch_free.model), str(torch_free.pictures), '--format', 'geojson', 'csv']
    words += ['overlay', '--score-thr', '0.1']
    said = torch_free.cellseg('predict', *words, '--out', 'cells')
    assert 'results: cells' in said
    here = torch_free.elsewhere / 'in_this_environment'
    command = [sys.executable, str(ROOT / 'tools/predict.py'), *words, '--out', str(here)]
    subprocess.run(command, check=True, capture_output=True, cwd=torch_free.elsewhere)
    n_cells = 0
    for picture in torch_free.pictures.glob('*.tif'):
        tables = [torch_free.elsewhere / 'cells' / f'{picture.stem}.cells.csv']
        tables.append(here / tables[0].name)
        ours, theirs = (path.read_text().splitlines() for path in tables)
        assert ours == theirs
        outlines = json.loads(tables[0].with_name(f'{picture.stem}.geojson').read_text())
        assert len(outlines['features']) == len(ours) - 1  # the heading
        assert tables[0].with_name(f'{picture.stem}.overlay.png').is_file()
        n_cells += len(ours)
    assert n_cells > 20


def test_what_needs_torch_says_so(torch_free: TorchFree) -> None:
    said = torch_free.cellseg('train', 'cellseg_mm::sample/fold0.py', status=2)
    assert re.search('error: (torch|mmengine): is not installed', said)
    assert 'Traceback' not in said
    assert re.search('torch|mmengine', torch_free.asked.read_text())  # the watch sees it
    torch_free.asked.unlink()


def test_help_of_every_tool(torch_free: TorchFree) -> None:
    listed = torch_free.cellseg('--help').split('tools:\n')[1]
    names = [line.split()[0] for line in listed.splitlines()]
    assert {'train', 'predict', 'export'} <= set(names)
    for name in names:
        said = torch_free.cellseg(name, '--help')
        assert said.startswith(f'usage: cellseg {name} ')
        assert 'tools/' not in said.replace('tools/dist_ensemble.sh', '')

"""The built wheel does everything outside the checkout: in another environment, read-only."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.fresh import ROOT, build_wheels, lend_packages, make_venv, packages_of, run
from tests.support.micro import MICRO

pytest.importorskip('torch')
pytest.importorskip('mmdet')
pytestmark = pytest.mark.mm


@dataclass(frozen=True)
class Installed:
    """The command, the package's folder in its environment, and a folder that is elsewhere."""

    command: str
    package: Path
    elsewhere: Path

    def cellseg(self, *words: str, status: int = 0) -> str:
        data = {'CELLSEG_DATA': str(self.elsewhere / 'data')}
        done = run([self.command, *words], cwd=self.elsewhere, status=status, **data)
        return done.stdout + done.stderr


@pytest.fixture(scope='module')
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build_wheels(tmp_path_factory.mktemp('build'))


@pytest.fixture(scope='module')
def installed(
    wheels: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installed]:
    folder = tmp_path_factory.mktemp('environment')
    commands = make_venv(folder, wheels[0])
    lend_packages(folder)
    package = packages_of(folder) / 'cellseg_mm'
    everything = [package, *package.rglob('*')]
    for path in everything:
        path.chmod(path.stat().st_mode & ~0o222)
    yield Installed(str(commands / 'cellseg'), package, tmp_path_factory.mktemp('elsewhere'))
    # root may write anywhere: what counts is that nothing did
    assert sorted(package.rglob('*')) == sorted(everything[1:])
    for path in everything:
        path.chmod(path.stat().st_mode | 0o200)


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def files_below(folder: str) -> set[str]:
    paths = (ROOT / folder).rglob('*')
    return {
        path.relative_to(ROOT).as_posix()
        for path in paths
        if path.is_file() and path.suffix != '.pyc'
    }


def test_the_sdist_builds_the_same_wheel_and_nothing_is_left_out(
    wheels: tuple[Path, Path],
) -> None:
    direct, from_sdist = map(contents, wheels)
    assert direct == from_sdist
    beside = files_below('configs') | files_below('tools') | {'model-index.yml', 'constraints.txt'}
    beside -= {'tools/bootstrap.py'}
    mim = {f'cellseg_mm/.mim/{name}' for name in beside}
    assert {n for n in direct if '.dist-info/' not in n} == mim | files_below('cellseg_mm')
    assert direct['cellseg_mm/.mim/configs/fold0.py'] == (ROOT / 'configs/fold0.py').read_bytes()


def test_it_says_what_it_is(installed: Installed) -> None:
    said = installed.cellseg('--version')
    assert str(installed.package) in said
    assert re.search(r'torch \d.*, mmcv \d.*, mmdet \d', said)
    assert re.search(r'ops: NMS and RoIAlign of (mmcv|torchvision|torch)$', said, re.MULTILINE)


def test_its_texts_name_the_command(installed: Installed) -> None:
    said = installed.cellseg('predict', '--help')
    assert 'cellseg predict cellseg_mm::fold0.py best' in said
    assert 'tools/' not in said
    said = installed.cellseg('train', 'cellseg_mm::sampel/fold0.py', status=2)
    assert 'expected for example cellseg_mm::sample/fold0.py' in said
    assert 'did you mean train' in installed.cellseg('trian', status=2)


def test_it_trains_and_predicts(installed: Installed) -> None:
    """From a config that inherits the package's, and with the package's own."""
    own = installed.elsewhere / 'configs' / 'fold0.py'
    own.parent.mkdir()
    own.write_text("_base_ = 'cellseg_mm::sample/fold0.py'\n")
    installed.cellseg('make-sample', 'data', '--n-train', '4', '--n-test', '1')
    said = installed.cellseg('prepare_data', 'data', '--folds', '2', '--no-manifest')
    assert 'cellseg train cellseg_mm::fold0.py' in said
    options = {**MICRO, 'train_cfg.max_iters': 2, 'default_hooks.checkpoint.interval': 2}
    words = ['--cfg-options', *(f'{key}={value}' for key, value in options.items())]
    said = installed.cellseg('train', str(own), *words)
    assert f'next: cellseg test {own}' in said
    checkpoint = re.search(r'best checkpoint: (.+)', said)[1]
    picture = next((installed.elsewhere / 'data' / 'test_release').glob('*.tif'))
    config = 'cellseg_mm::sample/fold0.py'
    installed.cellseg('predict', config, checkpoint, str(picture), '--out', 'cells')
    assert (installed.elsewhere / 'cells' / f'{picture.stem}.overlay.png').is_file()
    names = sorted(path.name for path in installed.elsewhere.iterdir())
    assert names == ['cells', 'configs', 'data', 'work_dirs']

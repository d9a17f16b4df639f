"""What the options of both tools mean: plain models, settings, members."""

from __future__ import annotations

from pathlib import Path

import pytest

import cellseg_mm  # noqa: F401  (makes mmdet importable where mmcv has no compiled ops)

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

from mmengine.config import Config  # noqa: E402

from cellseg_mm.core.errors import CheckpointError, ConfigError  # noqa: E402
from cellseg_mm.core.files import write_json  # noqa: E402
from cellseg_mm.detectors.from_options import make_detector  # noqa: E402
from cellseg_mm.fusion.settings import default_settings  # noqa: E402
from cellseg_mm.predict.options import MemberOptions, PredictOptions  # noqa: E402
from tests.support.tiny_folds import random_model, save_checkpoint  # noqa: E402

pytestmark = pytest.mark.mm

CONFIG = 'configs/sample/fold0.py'
CLASSES = ('epithelial', 'lymphocyte', 'neutrophil', 'macrophage')


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp('members')
    return [
        str(save_checkpoint(root / f'{k}.pth', random_model(CONFIG, k), fold=k)) for k in (0, 1)
    ]


@pytest.fixture(scope='module')
def settings_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp('settings') / 'inference.json'
    profiles = {
        name: default_settings(name, CLASSES).to_json() for name in ('submission', 'instances')
    }
    write_json(path, {'version': 1, 'class_names': list(CLASSES), 'profiles': profiles})
    return str(path)


def identity(tmp_path: Path, members: MemberOptions) -> tuple[object, object, object]:
    """Build the detector and return how it fuses, what follows, and its cap."""
    options = PredictOptions(inputs=('.',), out_dir=tmp_path, device='cpu')
    detector = make_detector({CONFIG: Config.fromfile(CONFIG)}, members, options)
    return detector.identity['fusion'], detector.identity['post'], detector.cap


def test_one_model_gives_its_own_answer_until_something_is_asked(
    checkpoints: list[str], settings_path: str, tmp_path: Path
) -> None:
    one = (checkpoints[0],)
    assert identity(tmp_path, MemberOptions(checkpoints=one)) == ('', '', 500)
    post = MemberOptions(checkpoints=one, post='min_area_px=9')
    assert identity(tmp_path, post) == ('soft_mask', 'min_area_px=9', 0)
    file = MemberOptions(checkpoints=one, settings_path=settings_path)
    people = 'score_thr=0.5,disjoint=true'  # of the profile for people
    assert identity(tmp_path, file) == ('soft_mask', people, 0)
    over = MemberOptions(checkpoints=one, settings_path=settings_path, fusion='nms', post='')
    assert identity(tmp_path, over) == ('nms', '', 0)


def test_several_checkpoints_of_one_config_are_fused(
    checkpoints: list[str], tmp_path: Path
) -> None:
    both = MemberOptions(checkpoints=tuple(checkpoints))
    assert identity(tmp_path, both) == ('soft_mask', '', 0)
    with pytest.raises(ConfigError, match="no rule 'magic'"):
        identity(tmp_path, MemberOptions(checkpoints=tuple(checkpoints), fusion='magic'))


def test_without_checkpoints_the_best_of_the_work_folder_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r'sample/fold0: has no checkpoint'):
        identity(tmp_path, MemberOptions(work_root=str(tmp_path)))

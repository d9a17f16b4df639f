"""Where things lie: work folders and the names of files in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellseg_mm.core import layout
from cellseg_mm.core.errors import ConfigError


@pytest.mark.parametrize(
    ('config', 'root', 'expected'),
    [
        pytest.param('configs/fold0.py', None, 'work_dirs/fold0', id='plain'),
        pytest.param('configs/strong/fold0.py', None, 'work_dirs/strong/fold0', id='variant'),
        pytest.param('/a/configs/b/configs/c.py', 'out', 'out/c', id='the last configs counts'),
        pytest.param('/elsewhere/mine.py', Path('/o'), '/o/mine', id='outside of configs'),
    ],
)
def test_work_folders_of_variants_do_not_meet(config: str, root: str | None, expected: str) -> None:
    assert layout.work_dir_of(config, root) == Path(expected)


def test_results_of_a_split_stand_side_by_side() -> None:
    predictions = layout.predictions_path('w', 'val', 'hflip,scales=0.8/1.25')
    assert predictions == Path('w/val.hflip-scales-0-8-1-25.predictions.npz')
    assert layout.scores_beside(predictions) == layout.scores_path(
        'w', 'val', 'hflip,scales=0.8/1.25'
    )
    assert layout.predictions_path('w', 'test') == Path('w/test.predictions.npz')
    assert layout.mark_of_test(Path('w'), 'flips') == Path('w/tested.flips.json')
    assert layout.mark_of_test(Path('w')) == Path('w/tested.json')


def test_augmentations_are_read_from_the_files_names(tmp_path: Path) -> None:
    for name in ('val', 'val.hflip', 'val.flips', 'val.a.b', 'test.rot90'):
        (tmp_path / f'{name}.predictions.npz').touch()
    (tmp_path / 'val.only.scores.json').touch()
    assert layout.augmentations_of(tmp_path, 'val') == ['flips', 'hflip']


def test_folds_lie_in_the_data_folder_unless_they_are_named() -> None:
    assert layout.folds_file('d') == layout.folds_file('d', 'auto') == Path('d/folds.json')
    assert layout.folds_file('d', 'x/y.json') == Path('x/y.json')


def test_the_ensemble_lies_beside_the_folds() -> None:
    assert layout.ensemble_dir([Path('w/s/fold0'), Path('w/s/fold1')]) == Path('w/s/ensemble')


def test_the_repository_is_the_checkout() -> None:
    assert (layout.REPOSITORY / 'pyproject.toml').is_file()


def test_packaged_configs_are_found_by_name_and_pattern() -> None:
    (one,) = layout.packaged_configs('cellseg_mm::laptop/fold0.py')
    assert one == layout.CONFIGS / 'laptop' / 'fold0.py'
    five = layout.packaged_configs('cellseg_mm::fold*.py')
    assert [path.name for path in five] == [f'fold{k}.py' for k in range(5)]


@pytest.mark.parametrize('name', ['cellseg_mm::lptop/fold0.py', 'cellseg_mm::', 'cellseg_mm::/etc'])
def test_no_such_packaged_config_names_some_that_are(name: str) -> None:
    with pytest.raises(ConfigError, match=r'expected for example cellseg_mm::\S+\.py'):
        layout.packaged_configs(name)


def test_texts_name_tools_as_they_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'next: python tools/test.py a.py; tools/train.py with --resume; /home/me/tools/train.py'
    assert layout.as_typed(text) == text
    monkeypatch.setattr(layout, 'HOME', layout.PACKAGE / '.mim')
    said = 'next: cellseg test a.py; cellseg train with --resume; /home/me/tools/train.py'
    assert layout.as_typed(text) == said

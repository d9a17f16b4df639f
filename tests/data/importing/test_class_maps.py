"""Masks of colours and nnU-Net's labels: parts of a class become cells, the rest is counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from cellseg_mm.core.errors import CellSegError
from tests.support.import_sources import HW, IMAGE, assert_masks, f_mask, run, stored
from tools.import_data import parse_args

RED, BLUE = (255, 0, 0), (0, 0, 255)
MASKS = [f_mask(1, 1), f_mask(9, 8), f_mask(1, 15)]
COLOURS = {'#ff0000': 'tumor', 'blue': 'stroma'}


def painted(*colours: tuple[int, int, int]) -> np.ndarray:
    """The masks in colours."""
    picture = np.zeros((*HW, 3), np.uint8)
    for mask, colour in zip(MASKS, colours, strict=True):
        picture[mask] = colour
    return picture


def source_of(folder: Path, mask: np.ndarray, name: str = 'a_mask.png') -> Path:
    folder.mkdir()
    Image.fromarray(IMAGE).save(folder / 'a.png')
    Image.fromarray(mask).save(folder / name)
    return folder


def test_colours_are_classes(tmp_path: Path) -> None:
    source = source_of(tmp_path / 'in', painted(RED, BLUE, RED))
    report = run('colour-mask', source, tmp_path / 'out', colours=COLOURS)
    assert report.class_names == ('tumor', 'stroma')
    assert_masks(stored(tmp_path / 'out', 'a'), {1: [MASKS[0], MASKS[2]], 2: [MASKS[1]]})
    assert 'every connected part of a class became a cell' in report.text()


def test_the_command_takes_colours_again_and_again() -> None:
    words = ['--colour', '#ff0000=tumor', '--colour', 'blue=stroma', '1=x']
    args = parse_args(['colour-mask', 'in', 'out', *words])
    assert dict(args.colour) == COLOURS | {'1': 'x'}


def test_a_palette_and_a_tiff_hold_colours_too(tmp_path: Path) -> None:
    source = source_of(tmp_path / 'in', painted(RED, BLUE, RED), 'other.png')
    (source / 'other.png').unlink()
    tifffile.imwrite(source / 'a_mask.tif', painted(RED, BLUE, RED), photometric='rgb')
    Image.fromarray(IMAGE).save(source / 'b.png')
    Image.fromarray(painted(RED, BLUE, RED)).quantize(8).save(source / 'b_mask.png')
    assert not run('colour-mask', source, tmp_path / 'out', colours=COLOURS).problems
    for name in 'ab':
        assert_masks(stored(tmp_path / 'out', name), {1: [MASKS[0], MASKS[2]], 2: [MASKS[1]]})


def test_grey_values_are_classes(tmp_path: Path) -> None:
    grey = (MASKS[0] * 1 + MASKS[1] * 2 + MASKS[2] * 3).astype(np.uint8)
    source = source_of(tmp_path / 'in', grey)
    options = {'colours': {'1': 'x', '2': 'y', '3': 'rest'}, 'skipped': frozenset({'rest'})}
    report = run('colour-mask', source, tmp_path / 'out', **options)
    assert_masks(stored(tmp_path / 'out', 'a'), {1: [MASKS[0]], 2: [MASKS[1]]})
    assert report.left_out == {'px of class rest': int(MASKS[2].sum())}


def test_colours_that_mean_nothing_are_counted(tmp_path: Path) -> None:
    source = source_of(tmp_path / 'in', painted(RED, BLUE, (1, 2, 3)))
    report = run('colour-mask', source, tmp_path / 'out', colours=COLOURS)
    n_px = int(MASKS[2].sum())
    assert f'1 values of the mask that no class has left out (#010203 ({n_px} px))' in report.text()
    assert_masks(stored(tmp_path / 'out', 'a'), {1: [MASKS[0]], 2: [MASKS[1]]})
    strict = run('colour-mask', source, tmp_path / 'strict', colours=COLOURS, strict=True)
    assert 'expected that all can be used' in strict.problems[0]


@pytest.mark.parametrize(
    ('colours', 'sentence'),
    [
        ({}, "expected such as '#ff0000=tumor'"),
        ({'#ff00': 'a', '#nope': 'b'}, 'is no colour; expected #rrggbb'),
        ({'1': 'a', '#ff0000': 'b'}, 'are grey values, the others colours'),
        ({'#ff0000': 'a', 'red': 'b'}, 'means a and b; expected one class'),
    ],
)
def test_wrong_colours_are_a_sentence(
    tmp_path: Path, colours: dict[str, str], sentence: str
) -> None:
    source = source_of(tmp_path / 'in', painted(RED, BLUE, RED))
    with pytest.raises(CellSegError, match=sentence):
        run('colour-mask', source, tmp_path / 'out', colours=colours)


def test_what_changes_colours_is_refused_and_the_rest_goes_on(tmp_path: Path) -> None:
    source = source_of(tmp_path / 'in', painted(RED, BLUE, RED))
    for name in 'bcd':
        Image.fromarray(IMAGE).save(source / f'{name}.png')
    Image.fromarray(painted(RED, BLUE, RED)).save(source / 'b_mask.jpg')
    Image.fromarray(painted(RED, BLUE, RED)[1:]).save(source / 'c_mask.png')
    (source / 'd_mask.png').write_bytes((source / 'a_mask.png').read_bytes()[:60])
    problems = run('colour-mask', source, tmp_path / 'out', colours=COLOURS).problems
    assert 'b_mask.jpg: is a JPEG; expected 8-bit colours without loss' in problems[0]
    assert 'c_mask.png: is 16 x 23 px, the image is 17 x 23 px' in problems[1]
    assert 'd_mask.png' in problems[2]
    assert [path.name for path in (tmp_path / 'out' / 'train').iterdir()] == ['a']


def nnunet(folder: Path, labels: dict[str, object]) -> Path:
    """One RGB case and one of three channels, as nnU-Net 2 has them."""
    for name in ('imagesTr', 'labelsTr'):
        (folder / name).mkdir(parents=True)
    content = {'channel_names': {'0': 'R', '1': 'G', '2': 'B'}, 'file_ending': '.png'}
    (folder / 'dataset.json').write_text(json.dumps(content | {'labels': labels}))
    Image.fromarray(IMAGE).save(folder / 'imagesTr' / 'x_0000.png')
    for k in range(3):
        Image.fromarray(IMAGE[..., k]).save(folder / 'imagesTr' / f'y_000{k}.png')
    grey = (MASKS[0] * 2 + MASKS[1] * 1 + MASKS[2] * 3).astype(np.uint8)
    for name in 'xy':
        Image.fromarray(grey).save(folder / 'labelsTr' / f'{name}.png')
    return folder


def test_nnunet_folders(tmp_path: Path) -> None:
    labels = {'background': 0, 'stroma': 1, 'tumor': 2, 'ignore': 3}
    report = run('nnunet', nnunet(tmp_path / 'in', labels), tmp_path / 'out')
    assert not report.problems
    assert report.class_names == ('stroma', 'tumor')
    assert report.left_out == {'px of class ignore': 2 * int(MASKS[2].sum())}
    for name in 'xy':
        assert_masks(stored(tmp_path / 'out', name), {1: [MASKS[1]], 2: [MASKS[0]]})
        written = tifffile.imread(tmp_path / 'out' / 'train' / name / 'image.tif')
        assert (written[..., :3] == IMAGE).all()


def test_nnunet_of_version_1(tmp_path: Path) -> None:
    labels = {'0': 'background', '1': 'stroma', '2': 'tumor', '3': 'gland'}
    report = run('nnunet', nnunet(tmp_path / 'in', labels), tmp_path / 'out')
    assert report.class_names == ('stroma', 'tumor', 'gland')
    assert_masks(stored(tmp_path / 'out', 'x'), {1: [MASKS[1]], 2: [MASKS[0]], 3: [MASKS[2]]})


@pytest.mark.parametrize(
    ('labels', 'sentence'),
    [
        ({'background': 0, 'whole': [1, 2]}, 'whole is a region of several values'),
        ({'background': 0, 'a': 1, 'b': 1}, 'the labels a and b have the value 1'),
        ({'background': 0, 'a': 1.5}, 'label a has the value 1.5'),
    ],
)
def test_wrong_labels_of_nnunet(tmp_path: Path, labels: dict[str, object], sentence: str) -> None:
    with pytest.raises(CellSegError, match=sentence):
        run('nnunet', nnunet(tmp_path / 'in', labels), tmp_path / 'out')


def test_bad_cases_of_nnunet_cost_no_other(tmp_path: Path) -> None:
    source = nnunet(tmp_path / 'in', {'background': 0, 'a': 1, 'b': 2})
    (source / 'imagesTr' / 'y_0002.png').unlink()
    report = run('nnunet', source, tmp_path / 'out')
    assert 'has 2 images y_0000, _0001, ... in imagesTr; expected one picture' in report.problems[0]
    assert 'no class has left out (3 (' in report.text()
    assert_masks(stored(tmp_path / 'out', 'x'), {1: [MASKS[1]], 2: [MASKS[0]]})
    (source / 'dataset.json').write_text('{"labels": ')
    with pytest.raises(CellSegError, match='not valid JSON'):
        run('nnunet', source, tmp_path / 'out')

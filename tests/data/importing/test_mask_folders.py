"""One picture per cell: a file is one cell, or it is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from cellseg_mm.data.importing.import_data import import_data
from cellseg_mm.data.importing.sources import ImportParams
from cellseg_mm.data.labels import read_image
from tests.support.import_sources import HW, IMAGE, assert_masks, f_mask, run, stored


def test_mask_folders(tmp_path: Path) -> None:
    folder = tmp_path / 'in' / 'abc'
    (folder / 'images').mkdir(parents=True)
    (folder / 'masks').mkdir()
    Image.fromarray(np.dstack([IMAGE, np.full(HW, 9, np.uint8)])).save(
        folder / 'images' / 'abc.png'
    )
    masks = [f_mask(1, 1), f_mask(9, 8)]
    for i, mask in enumerate([*masks, np.zeros(HW, bool)]):
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / 'masks' / f'{i}.png')
    (tmp_path / 'in' / 'empty').mkdir()
    report = import_data('mask-folders', tmp_path / 'in', tmp_path / 'out', ImportParams())
    assert_masks(stored(tmp_path / 'out', 'abc'), {1: masks})
    assert (read_image(tmp_path / 'out' / 'train' / 'abc' / 'image.tif') == IMAGE).all()
    assert report.notes == (f'{folder}: 1 masks without a pixel left out (2.png)',)
    assert report.problems == (
        f'{tmp_path}/in/empty: has no folder images; expected images and masks; check the path',
    )


def folder_of(root: Path, masks: dict[str, np.ndarray]) -> Path:
    """One image, and its masks by file name."""
    (root / 'a' / 'images').mkdir(parents=True)
    (root / 'a' / 'masks').mkdir()
    Image.fromarray(IMAGE).save(root / 'a' / 'images' / 'a.png')
    for name, mask in masks.items():
        Image.fromarray(mask.astype(np.uint8)).save(root / 'a' / 'masks' / name)
    return root


def test_one_bad_mask_costs_no_other(tmp_path: Path) -> None:
    good, other = f_mask(1, 1), f_mask(9, 8)
    source = folder_of(
        tmp_path / 'in',
        {
            'good.png': good * 255,
            'lossy.jpg': other * 255,
            'grey.png': other * 100 + good,
            'small.png': other[:9] * 255,
        },
    )
    (source / 'a' / 'masks' / 'torn.png').write_bytes(b'\x89PNG')
    (source / 'a' / 'masks' / 'notes.txt').write_text('')
    report = run('mask-folders', source, tmp_path / 'out')
    assert_masks(stored(tmp_path / 'out', 'a'), {1: [good]})
    assert report.left_out == {
        'masks that cannot be read': 3,
        'masks with more than two values (label maps need the format label-map)': 1,
    }
    text = '\n'.join(report.notes)
    for name in ('lossy.jpg: is a JPEG', 'small.png: is 9 x 23 px', 'torn.png: this is', '1 .txt'):
        assert name in text
    strict = run('mask-folders', source, tmp_path / 'strict', strict=True)
    assert 'lossy.jpg' in strict.problems[0]
    assert not (tmp_path / 'strict').exists()


def test_a_mask_of_many_cells_is_not_one(tmp_path: Path) -> None:
    both = (f_mask(1, 1) | f_mask(9, 8)) * 255
    source = folder_of(tmp_path / 'in', {'all.png': both})
    problem = run('mask-folders', source, tmp_path / 'out').problems[0]
    assert '1 of 1 masks lie in several parts' in problem
    assert '--binary components' in problem
    report = run('mask-folders', source, tmp_path / 'out', binary='components')
    assert_masks(stored(tmp_path / 'out', 'a'), {1: [f_mask(1, 1), f_mask(9, 8)]})
    assert '1 masks became 2 cells' in report.notes[0]
    run('mask-folders', source, tmp_path / 'ids', binary='ids')
    assert_masks(stored(tmp_path / 'ids', 'a'), {1: [both > 0]})


def test_a_cell_in_two_parts_among_others_stays_one(tmp_path: Path) -> None:
    torn = f_mask(1, 1) | f_mask(9, 8)
    masks = {'0.png': torn, '1.png': f_mask(1, 12), '2.png': f_mask(9, 16)}
    report = run('mask-folders', folder_of(tmp_path / 'in', masks), tmp_path / 'out')
    assert_masks(stored(tmp_path / 'out', 'a'), {1: list(masks.values())})
    assert '1 of 3 cells lie in several parts' in report.notes[0]

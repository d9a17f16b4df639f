"""Run lengths of the Data Science Bowl: encoded as its own kernel does, and what is broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cellseg_mm.core.errors import CellSegError
from tests.support.import_sources import HW, IMAGE, assert_masks, f_mask, run, stored

MASKS = [f_mask(1, 1), f_mask(9, 8), f_mask(12, 15)]


def encoded(mask: np.ndarray) -> str:
    """The bowl's encoding, by looping: down the columns, from 1."""
    runs: list[int] = []
    last = -2
    for place in np.flatnonzero(mask.T.reshape(-1)).tolist():
        if place > last + 1:
            runs += [place + 1, 0]
        runs[-1] += 1
        last = place
    return ' '.join(map(str, runs))


def source_of(folder: Path, rows: list[str], header: str = 'ImageId,EncodedPixels') -> Path:
    """The bowl's layout: stage1_train/<id>/images/<id>.png, the masks beside it."""
    for name in ('masks', 'images'):
        (folder / 'stage1_train' / 'abc' / name).mkdir(parents=True)
        Image.fromarray(IMAGE).save(folder / 'stage1_train' / 'abc' / name / 'abc.png')
    path = folder / 'stage1_train_labels.csv'
    path.write_text('\n'.join([header, *rows]) + '\n')
    return path


def test_rows_are_cells(tmp_path: Path) -> None:
    source = source_of(tmp_path / 'in', [f'abc,{encoded(mask)}' for mask in MASKS])
    report = run('run-lengths', source, tmp_path / 'out', single_class='nucleus')
    assert (report.problems, report.notes) == ((), ())
    assert report.class_names == ('nucleus',)
    assert_masks(stored(tmp_path / 'out', 'abc'), {1: MASKS})


def test_a_solution_with_sizes_and_ignored_rows(tmp_path: Path) -> None:
    header = 'ImageId,EncodedPixels,Height,Width,Usage'
    size = f'{HW[0]},{HW[1]}'
    rows = [f'abc,{encoded(MASKS[0])},{size},Public', f'abc,{encoded(MASKS[1])},{size},Ignored']
    source = source_of(tmp_path / 'in', rows, header)
    report = run('run-lengths', source, tmp_path / 'out')
    assert_masks(stored(tmp_path / 'out', 'abc'), {1: [MASKS[0]]})
    assert report.left_out == {'rows that the file says to ignore': 1}
    source.write_text('\n'.join([header, f'abc,{encoded(MASKS[0])},{HW[1]},{HW[0]},Public']))
    problems = run('run-lengths', source, tmp_path / 'turned').problems
    assert 'line 2 says 23 x 17 px, the image is 17 x 23 px' in problems[0]


def test_broken_rows_are_counted(tmp_path: Path) -> None:
    n_px = HW[0] * HW[1]
    bad = ['1 2 3', '0 4', f'{n_px} 2', '1 x', '5 3 6 2', '7 0', encoded(MASKS[0])]
    rows = [f'abc,{text}' for text in (encoded(MASKS[0]), *bad)]
    report = run('run-lengths', source_of(tmp_path / 'in', rows), tmp_path / 'out')
    assert report.left_out == {
        'runs with an odd number of values (cut off?)': 1,
        'runs that leave the image (they count from 1)': 2,
        'runs that are no whole numbers': 1,
        'runs that overlap': 1,
        'cells without a pixel': 1,
        'rows that occur twice': 1,
    }
    assert_masks(stored(tmp_path / 'out', 'abc'), {1: [MASKS[0]]})


def test_images_without_rows_or_cells(tmp_path: Path) -> None:
    source = source_of(tmp_path / 'in', ['abc,', 'gone,1 2'])
    report = run('run-lengths', source, tmp_path / 'out')
    assert stored(tmp_path / 'out', 'abc') == {}
    assert "has 0 images of the name 'gone' (none); expected one" in report.problems[0]


@pytest.mark.parametrize(
    ('text', 'sentence'),
    [
        ('id,rle\nabc,1 2\n', r"has the columns \['id', 'rle'\]; expected a CSV file"),
        ('', r'has the columns \[\]'),
    ],
)
def test_other_tables_are_refused(tmp_path: Path, text: str, sentence: str) -> None:
    source = source_of(tmp_path / 'in', [])
    source.write_text(text)
    with pytest.raises(CellSegError, match=sentence):
        run('run-lengths', source, tmp_path / 'out')
    source.write_bytes(b'\xff\xfe\x00')
    with pytest.raises(CellSegError, match='cannot be read'):
        run('run-lengths', source, tmp_path / 'out')
    with pytest.raises(CellSegError, match='cannot be read'):
        run('run-lengths', tmp_path / 'none.csv', tmp_path / 'out')

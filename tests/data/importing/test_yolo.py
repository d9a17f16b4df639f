"""YOLO's rows arrive as cells, in the layouts of Ultralytics and Roboflow."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellseg_mm.core.errors import CellSegError
from tests.support.import_sources import HW, run, stored, write_image


def row(number: object, x: float, y: float, side: float) -> str:
    points = [(x, y), (x + side, y), (x + side, y + side), (x, y + side)]
    return f'{number} ' + ' '.join(f'{a / HW[1]:.6f} {b / HW[0]:.6f}' for a, b in points)


def source(folder: Path, files: dict[str, str], names: str = 'names: [tumor, stroma]\n') -> Path:
    """Files of labels by path of the image, and data.yaml."""
    for image, text in files.items():
        write_image(folder / image)
        label = folder / image.replace('images', 'labels')
        label.parent.mkdir(parents=True, exist_ok=True)
        label.with_suffix('.txt').write_text(text)
    if names:
        (folder / 'data.yaml').write_text(names)
    return folder


@pytest.mark.parametrize('layout', ['images/{}/a.png', '{}/images/a.png'])
@pytest.mark.parametrize('names', ['names: [tumor, stroma]\n', 'names: {0: tumor, 1: stroma}\n'])
def test_splits_classes_and_pixels(tmp_path: Path, layout: str, names: str) -> None:
    files = {
        layout.format('train'): row(0, 2, 2, 4) + '\n' + row(1, 9, 3, 5),
        layout.format('val'): row(1, 1, 1, 3) + '\n\n',
    }
    report = run('yolo', source(tmp_path / 'in', files, names), tmp_path / 'out')
    assert report.class_names == ('tumor', 'stroma')
    assert [r['uuid'] for r in report.rows] == ['train_a', 'val_a']
    masks = stored(tmp_path / 'out', 'train_a')
    assert masks[1][0][2:6, 2:6].all()
    assert (masks[1][0].sum(), masks[2][0].sum()) == (16, 25)


def test_classes_without_names_are_their_numbers(tmp_path: Path) -> None:
    text = '\n'.join(row(k, 2 + 4 * i, 2, 3) for i, k in enumerate([10, 2]))
    folder = source(tmp_path / 'in', {'images/a.png': text}, names='')
    assert run('yolo', folder, tmp_path / 'out').class_names == ('2', '10')
    named = run('yolo', folder, tmp_path / 'named', class_map={'2': 'tumor', '10': 'tumor'})
    assert named.class_names == ('tumor',)


def test_what_cannot_be_used_is_counted(tmp_path: Path) -> None:
    rows = [
        row(0, 2, 2, 4),
        row(0, 2, 2, 4),
        '0 0.5 0.5 0.1 0.1',
        '0 0.5 0.5 0.1',
        '0 0.1 0.1 0.2 0.1 0.2',
        'tumor 0.1 0.1 0.2 0.1 0.2 0.2',
        '0 0.1 0.1 0.2 nan 0.2 0.2',
        '0 10 10 20 10 20 20',
        row(7, 2, 2, 4),
        row(0, 24, 2, 4),
    ]
    folder = source(tmp_path / 'in', {'images/a.png': '\n'.join(rows)})
    report = run('yolo', folder, tmp_path / 'out')
    assert len(stored(tmp_path / 'out', 'a')[1]) == 1
    assert report.left_out == {
        'rows that occur twice': 1,
        'boxes (a box alone is no cell)': 1,
        'rows without pairs of x and y for 3 points or more': 2,
        'rows that are no class number and numbers': 2,
        'rows with coordinates far outside 0 to 1 (expected fractions of the image)': 1,
        'rows of classes that data.yaml does not name': 1,
        'outlines without a pixel in the image': 1,
    }
    assert any('line 3' in note for note in report.notes)


def test_missing_partners_are_named(tmp_path: Path) -> None:
    folder = source(tmp_path / 'in', {'images/a.png': row(0, 2, 2, 4), 'images/none.png': ''})
    write_image(folder / 'images' / 'idle.png')
    (folder / 'labels' / 'gone.txt').write_text(row(0, 2, 2, 4))
    report = run('yolo', folder / 'data.yaml', tmp_path / 'out')
    assert [r['uuid'] for r in report.rows] == ['a', 'none']  # an empty file says: no cell
    assert 'gone.txt: has 0 images' in report.problems[0]
    assert any(
        '1 images without a file of labels were not used (idle.png)' in n for n in report.notes
    )


@pytest.mark.parametrize('text', ['names: [a', 'names: !!python/object:os.system {}'])
def test_a_bad_table_of_names_is_an_error_and_runs_nothing(tmp_path: Path, text: str) -> None:
    folder = source(tmp_path / 'in', {'images/a.png': row(0, 2, 2, 4)}, text)
    with pytest.raises(CellSegError, match=r'data\.yaml: cannot be read'):
        run('yolo', folder, tmp_path / 'out')

"""Imports as a whole: overlaps, names, files, reports, and the tool."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from cellseg_mm.core.errors import CellSegError
from cellseg_mm.data.importing import import_data as importers
from cellseg_mm.data.importing.import_data import import_data, paint_cells
from cellseg_mm.data.importing.sources import Cell, ImportParams
from cellseg_mm.data.labels import find_cases, read_gt
from tests.support.import_sources import BOX, HW, IMAGE, aperio, f_mask, monusac, run
from tools.import_data import parse_args

ROOT = Path(__file__).parents[3]


def test_contested_pixels_go_to_the_smaller_cell_of_a_class() -> None:
    big, small = np.ones((4, 6), bool), np.ones((2, 3), bool)
    cells = [Cell(2, 2, 2, big), Cell(2, 4, 6, small), Cell(1, 2, 2, big)]
    label_maps, lost_px = paint_cells(cells, HW)
    expected = np.zeros(HW, int)
    expected[2:6, 2:8] = 2  # ids rise with the class: the cell of class 1 is number 1
    expected[4:6, 6:9] = 3
    assert label_maps[2].tolist() == expected.tolist()
    assert (label_maps[1] == 1).sum() == 24  # another class keeps its pixels
    assert dict(lost_px) == {1: 0, 2: 4}  # 24 + 6 drawn, 26 kept
    for order in ([0, 1], [1, 0]):  # whichever comes first
        again = paint_cells([cells[i] for i in order], HW)[0][2]
        assert [(again == i).sum() for i in (1, 2)] == [[20, 6], [6, 20]][order[0]]


def test_equal_cells_keep_the_earlier_one_and_vanished_ones_are_counted() -> None:
    square = np.ones((3, 3), bool)
    label_maps, lost_px = paint_cells([Cell(1, 1, 1, square), Cell(1, 1, 1, square)], HW)
    assert np.unique(label_maps[1]).tolist() == [0, 1]
    assert lost_px[1] == 9


def slow_paint(masks: list[np.ndarray]) -> np.ndarray:
    """By pixel: the smallest mask, then the earliest, owns it."""
    owner = np.zeros(HW, int)
    for y in range(HW[0]):
        for x in range(HW[1]):
            claims = [(m.sum(), i + 1) for i, m in enumerate(masks) if m[y, x]]
            owner[y, x] = min(claims)[1] if claims else 0
    return owner


@pytest.mark.parametrize('seed', range(5))
def test_painting_equals_a_loop_over_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks, cells = [], []
    for _ in range(12):
        h, w = rng.integers(1, 7, 2)
        top, left = rng.integers(0, HW[0] - h + 1), rng.integers(0, HW[1] - w + 1)
        crop = rng.random((h, w)) < 0.8
        crop[0, 0] = True
        mask = np.zeros(HW, bool)
        mask[top : top + h, left : left + w] = crop
        masks.append(mask)
        cells.append(Cell(1, int(top), int(left), crop))
    label_maps, lost_px = paint_cells(cells, HW)
    assert label_maps[1].tolist() == slow_paint(masks).tolist()
    assert lost_px[1] == sum(m.sum() for m in masks) - np.any(masks, axis=0).sum()


def test_result_is_a_data_folder(tmp_path: Path) -> None:
    import_data('monusac', monusac(tmp_path), tmp_path / 'out', ImportParams())
    cases = find_cases(tmp_path / 'out', 'train', 4)
    assert [read_gt(case).class_ids.tolist() for case in cases] == [[0, 0, 1, 3], [2]]


def test_colliding_and_unsafe_names(tmp_path: Path) -> None:
    source = monusac(tmp_path)
    for folder, name in (('TCGA-BB', 'tcga-aa_1'), ('TCGA-BB', 'a b:c'), ('TCGA-BB', 'x' * 151)):
        tifffile.imwrite(source / folder / f'{name}.tif', IMAGE, photometric='rgb')
        (source / folder / f'{name}.xml').write_text(aperio([('Epithelial', [BOX])]))
    report = import_data('monusac', source, tmp_path / 'out', ImportParams())
    assert len(report.problems) == 1
    assert 'cannot name a folder' in report.problems[0]
    names = sorted(p.name for p in (tmp_path / 'out' / 'train').iterdir())
    assert names == ['TCGA-AA_TCGA-AA_1', 'TCGA-BB_1', 'TCGA-BB_tcga-aa_1', 'a_b_c']
    assert 'names of 3 cases were changed: TCGA-AA_1 is TCGA-AA_TCGA-AA_1' in report.notes[0]


def test_names_that_folders_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    source = tmp_path / 'in'
    source.mkdir()
    for name in ('a b', 'a_b'):
        Image.fromarray(IMAGE).save(source / f'{name}.png')
        Image.fromarray(f_mask(1, 1).astype(np.uint8)).save(source / f'{name}_masks.png')
    report = run('label-map', source, tmp_path / 'out')
    assert len(report.rows) == 1
    assert 'names must differ, also without case' in report.problems[0]


def test_case_names_have_one_unicode_form(tmp_path: Path) -> None:
    source = tmp_path / 'in'
    (source / 'images').mkdir(parents=True)
    (source / 'masks').mkdir()
    Image.fromarray(IMAGE).save(source / 'images' / 'A\u0308.png')  # as macOS writes it
    Image.fromarray(f_mask(1, 1).astype(np.uint8)).save(source / 'masks' / '\u00c4.png')
    report = run('label-map', source, tmp_path / 'out')
    assert [row['uuid'] for row in report.rows] == ['\u00c4']
    assert [p.name for p in (tmp_path / 'out' / 'train').iterdir()] == ['\u00c4']


def test_existing_cases_stay_unless_asked(tmp_path: Path) -> None:
    source = monusac(tmp_path)
    import_data('monusac', source, tmp_path / 'out', ImportParams())
    mark = tmp_path / 'out' / 'train' / 'TCGA-BB_1' / 'mark'
    mark.write_text('')
    report = import_data('monusac', source, tmp_path / 'out', ImportParams())
    assert len(report.problems) == 2
    assert 'is already there' in report.problems[0]
    assert '--replace' in report.problems[0]
    assert mark.exists()
    report = import_data('monusac', source, tmp_path / 'out', ImportParams(replace=True))
    assert report.problems == ()
    assert not mark.exists()
    two = ImportParams(class_names=('a', 'b'))
    with pytest.raises(CellSegError, match=r'has the classes epithelial, .*, this import a, b'):
        import_data('monusac', source, tmp_path / 'out', two)
    (tmp_path / 'out' / 'import.json').unlink()  # a folder of before
    with pytest.raises(CellSegError, match='import into another folder'):
        import_data('monusac', source, tmp_path / 'out', two)


def test_a_case_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = monusac(tmp_path)
    write_case, calls = importers.write_case, []

    def fail_second(case_dir: Path, *rest: object, **known: object) -> None:
        calls.append(case_dir)
        write_case(case_dir, *rest, **known)
        if len(calls) == 2:
            raise OSError('disk full')

    monkeypatch.setattr(importers, 'write_case', fail_second)
    with pytest.raises(OSError, match='disk full'):
        import_data('monusac', source, tmp_path / 'out', ImportParams())
    assert [p.name for p in (tmp_path / 'out' / 'train').iterdir()] == ['TCGA-AA_1']
    rows = list(csv.DictReader((tmp_path / 'out' / 'manifest.csv').read_text().splitlines()))
    assert [row['uuid'] for row in rows] == ['TCGA-AA_1']


@pytest.mark.parametrize(
    ('source_format', 'params', 'message'),
    [
        pytest.param('xml', ImportParams(), "format 'xml' is unknown", id='format'),
        pytest.param('monusac', ImportParams(), 'cannot be listed', id='no folder'),
        pytest.param('coco', ImportParams(), 'cannot be read', id='no file'),
        pytest.param('label-map', ImportParams(class_names=('a', 'A')), 'must differ', id='names'),
        pytest.param(
            'label-map',
            ImportParams(class_names=('a', 'b'), single_class='c'),
            "class 'c' is none of a, b",
            id='single',
        ),
        pytest.param(
            'coco', ImportParams(image_dir=Path('none')), '--images none: is no folder', id='images'
        ),
    ],
)
def test_wrong_options(
    tmp_path: Path, source_format: str, params: ImportParams, message: str
) -> None:
    with pytest.raises(CellSegError, match=message):
        import_data(source_format, tmp_path / 'none', tmp_path / 'out', params)


def test_tool(tmp_path: Path) -> None:
    source, out = monusac(tmp_path), tmp_path / 'out'
    command = [sys.executable, 'tools/import_data.py', 'monusac', str(source), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert '2 cases written: 2 epithelial, 1 lymphocyte, 1 neutrophil, 1 macrophage' in done.stdout
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1
    assert 'error: 2 case(s) not imported' in again.stderr
    assert 'Traceback' not in again.stderr
    wrong = subprocess.run(
        [*command, '--skip', 'Macrofage'], cwd=ROOT, capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: --skip: the source has no class 'Macrofage'")
    assert '(nearest: Macrophage)' in wrong.stderr


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--map', 'a'], 'is not SOURCE=CLASS'),
        (['--map', 'a='], 'is not SOURCE=CLASS'),
        (['--map', 'a=b', 'a=c'], "'a' goes to ['b', 'c']"),
        (['--binary', 'yes'], 'invalid choice'),
    ],
)
def test_tool_refuses_wrong_words(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_args(['coco', 'in', 'out', *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_tool_takes_cells_without_a_name() -> None:
    assert parse_args(['coco', 'in', 'out', '--map', '=cell', 'a=b=c']).map == [
        ('', 'cell'),
        ('a=b', 'c'),
    ]


@pytest.mark.parametrize(
    ('source_format', 'options', 'message'),
    [
        ('label-map', {'image_dir': Path()}, '--images .* means nothing to label-map'),
        ('monusac', {'binary': 'components'}, '--binary components: means nothing to monusac'),
    ],
)
def test_options_of_other_formats_are_refused(
    tmp_path: Path, source_format: str, options: dict, message: str
) -> None:
    with pytest.raises(CellSegError, match=message):
        run(source_format, tmp_path, tmp_path / 'out', **options)


def label_map_sources(folder: Path, names: str, values: np.ndarray) -> Path:
    """Images of the same values, each with two cells."""
    folder.mkdir()
    cells = f_mask(1, 1) * np.uint8(1) + f_mask(9, 8) * np.uint8(2)
    for name in names:
        tifffile.imwrite(folder / f'{name}.tif', values, photometric='rgb')
        Image.fromarray(cells).save(folder / f'{name}_masks.png')
    return folder


def test_what_is_said_of_several_cases_is_counted(tmp_path: Path) -> None:
    source = label_map_sources(tmp_path / 'in', 'abc', np.float32(IMAGE) / 255)
    report = run('label-map', source, tmp_path / 'out')
    assert len(report.notes) == 1
    assert report.notes[0].startswith('3 cases: values of 32 bits that are no plain 16-bit')


def test_a_folder_keeps_the_meaning_of_its_classes(tmp_path: Path) -> None:
    first = label_map_sources(tmp_path / 'first', 'a', IMAGE)
    second = label_map_sources(tmp_path / 'second', 'b', IMAGE)
    options = {'class_names': ('tumour', 'stroma'), 'single_class': 'tumour'}
    run('label-map', first, tmp_path / 'out', **options)
    swapped = {'class_names': ('stroma', 'tumour'), 'single_class': 'tumour'}
    with pytest.raises(CellSegError, match='has the classes tumour, stroma, this import stroma'):
        run('label-map', second, tmp_path / 'out', **swapped)
    assert len(run('label-map', second, tmp_path / 'out', **options).rows) == 1
    (tmp_path / 'out' / 'import.json').write_text('[]')
    with pytest.raises(CellSegError, match='expected the classes of earlier imports'):
        run('label-map', second, tmp_path / 'out', **options)

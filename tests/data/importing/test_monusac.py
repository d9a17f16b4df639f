"""Aperio outlines arrive pixel by pixel; one that cannot be used costs no other."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_mm.core.errors import CellSegError, LabelMapError
from cellseg_mm.data.importing.import_data import import_data
from cellseg_mm.data.importing.monusac import read_aperio_xml
from cellseg_mm.data.importing.shapes import fill_polygon
from cellseg_mm.data.importing.sources import ImportParams
from cellseg_mm.data.labels import read_image
from tests.support.import_sources import (
    BOX,
    HW,
    IMAGE,
    SQUARE,
    TRIANGLE,
    aperio,
    assert_masks,
    monusac,
    run,
    stored,
)


def slow_polygon(vertices: np.ndarray) -> np.ndarray:
    """By pixel: even-odd rule with exact fractions of halves, outline and vertices included."""
    mask = np.zeros(HW, bool)
    edges = list(zip(vertices, np.roll(vertices, -1, axis=0), strict=True))
    for y in range(HW[0]):
        for x in range(HW[1]):
            n_right = n_left = 0
            for (x0, y0), (x1, y1) in edges:
                if (y0 > y) != (y1 > y):
                    n_right += (
                        (x0 - x) * (y1 - y0) + (y - y0) * (x1 - x0) > 0
                        if y1 > y0
                        else ((x0 - x) * (y1 - y0) + (y - y0) * (x1 - x0) < 0)
                    )
                if (y0 < y) != (y1 < y):
                    n_left += (
                        (x0 - x) * (y1 - y0) + (y - y0) * (x1 - x0) < 0
                        if y1 > y0
                        else ((x0 - x) * (y1 - y0) + (y - y0) * (x1 - x0) > 0)
                    )
            at_vertex = ((vertices == (x, y)).all(axis=1)).any()
            mask[y, x] = at_vertex or n_right % 2 or n_left % 2
    return mask


def whole(polygon: tuple[int, int, np.ndarray]) -> np.ndarray:
    top, left, crop = polygon
    mask = np.zeros(HW, bool)
    mask[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
    return mask


@pytest.mark.parametrize('seed', range(20))
def test_polygon_equals_a_loop_over_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vertices = rng.uniform(-4, 26, (int(rng.integers(3, 12)), 2))  # some leave the image
    if seed % 3:
        vertices = np.rint(vertices * (seed % 3)) / (seed % 3)  # whole or half pixels: ties
    assert whole(fill_polygon(vertices, HW)).tolist() == slow_polygon(vertices).tolist()


def test_polygon_by_hand() -> None:
    # Corners (2, 3), (6, 3), (6, 5), (2, 5) in x, y: the outline belongs to it, 5 x 3 px.
    expected = np.zeros(HW, bool)
    expected[3:6, 2:7] = True
    square = np.array([[2, 3], [6, 3], [6, 5], [2, 5]], float)
    assert whole(fill_polygon(square, HW)).tolist() == expected.tolist()
    half = whole(fill_polygon(square + 0.5, HW))  # 4 x 2 points lie strictly inside
    assert np.argwhere(half).tolist() == [[y, x] for y in (4, 5) for x in (3, 4, 5, 6)]
    assert fill_polygon(square + 100, HW)[2].shape == (0, 0)


def test_monusac_arrives_pixel_by_pixel(tmp_path: Path) -> None:
    report = import_data('monusac', monusac(tmp_path), tmp_path / 'out', ImportParams())
    assert report.problems == ()
    triangle, square, box = (
        whole(fill_polygon(np.array(p, float), HW)) for p in (TRIANGLE, SQUARE, BOX)
    )
    overlap = triangle & square
    assert square.sum() > triangle.sum()
    assert overlap.any()
    expected = {1: [triangle, square & ~triangle], 2: [triangle], 4: [box]}
    assert_masks(stored(tmp_path / 'out', 'TCGA-AA_1'), expected)
    assert_masks(stored(tmp_path / 'out', 'TCGA-BB_1'), {3: [box]})
    for name in ('TCGA-AA_1', 'TCGA-BB_1'):
        assert (read_image(tmp_path / 'out' / 'train' / name / 'image.tif') == IMAGE).all()
    rows = list(csv.DictReader((tmp_path / 'out' / 'manifest.csv').read_text().splitlines()))
    assert [row['patient'] for row in rows] == ['TCGA-AA', 'TCGA-BB']
    assert [rows[0][k] for k in ('uuid', 'height', 'width', 'c1', 'c2', 'c3', 'c4')] == [
        'TCGA-AA_1', '17', '23', '2', '1', '0', '1',
    ]  # fmt: skip
    assert rows[0]['lost_px'] == str(overlap.sum())
    notes = '\n'.join(report.notes)
    assert '2 outlines of class Ambiguous left out' in notes
    assert '1 outlines with fewer than 3 vertices left out' in notes
    assert '1 outlines without a pixel in the image left out' in notes
    assert f'{overlap.sum()} px of epithelial cells overlap' in notes
    assert not list((tmp_path / 'out').rglob('.tmp-*'))


def test_problems_are_listed_and_good_cases_are_written(tmp_path: Path) -> None:
    source = monusac(tmp_path)
    folder = source / 'TCGA-AA'
    for name, xml in {
        'doctype': aperio([('Epithelial', [BOX])], '<!DOCTYPE a [<!ENTITY b "c">]>'),
        'torn': aperio([('Epithelial', [BOX])])[:-40],
        'unknown': aperio([('Plasma', [BOX])]),
        'empty': aperio([('Epithelial', [BOX])]).replace('"14.5"', '"nan"'),
        'other': '<html/>',
    }.items():
        tifffile.imwrite(folder / f'{name}.tif', IMAGE, photometric='rgb')
        (folder / f'{name}.xml').write_text(xml)
    (folder / 'alone.xml').write_text(aperio([]))
    tifffile.imwrite(folder / 'bare.tif', IMAGE, photometric='rgb')
    (folder / 'broken.tif').write_bytes(b'II*\0')
    (folder / 'broken.xml').write_text(aperio([('Epithelial', [BOX])]))
    report = import_data('monusac', source, tmp_path / 'out', ImportParams())
    text = '\n'.join(report.problems)
    for sentence in (
        'doctype.xml: has a DOCTYPE',
        'torn.xml: not valid XML',
        "unknown.xml: has cells of class 'Plasma'",
        'empty.tif: no cell can be used: 1 outlines with a vertex that is no number',
        'other.xml: has no Annotation element',
        'alone.xml: there is no .tif or .svs image beside it',
        'bare.tif: there is no .xml',
        'broken.tif: ',
    ):
        assert sentence in text
    assert len(report.problems) == 8
    assert sorted(p.name for p in (tmp_path / 'out' / 'train').iterdir()) == [
        'TCGA-AA_1',
        'TCGA-BB_1',
    ]


def test_entities_are_not_expanded_in_any_encoding(tmp_path: Path) -> None:
    path = tmp_path / 'a.xml'
    bomb = '<!DOCTYPE a [<!ENTITY b "x">]><Annotations>&b;</Annotations>'
    path.write_bytes(bomb.encode('utf-16'))
    with pytest.raises(LabelMapError, match='has a DOCTYPE'):
        read_aperio_xml(path)


def test_negative_regions_and_attributes_after_regions(tmp_path: Path) -> None:
    path = tmp_path / 'a.xml'
    head, tail = aperio([('X', [BOX, SQUARE])]).split('<Attributes><Attribute Name="X"', 1)
    attributes, tail = tail.split('</Attributes>', 1)
    tail = tail.replace('NegativeROA="0"', 'NegativeROA="1"', 1)
    late = tail.replace('<Plots/>', f'<Attributes><Attribute Name="X"{attributes}</Attributes>')
    path.write_text(head + late)
    regions = read_aperio_xml(path)
    assert [(r.class_name, r.is_negative) for r in regions] == [('X', True), ('X', False)]
    assert regions[1].vertices_xy == [tuple(map(float, v)) for v in SQUARE]


def test_class_map_skip_and_swap(tmp_path: Path) -> None:
    params = ImportParams(
        class_names=('immune', 'tumour'),
        class_map={'Lymphocyte': 'immune', 'neutrophil': 'Immune', 'EPITHELIAL': 'tumour'},
        skipped=frozenset({'macrophage'}),
        swap_red_blue=True,
    )
    report = import_data('monusac', monusac(tmp_path), tmp_path / 'out', params)
    assert report.problems == ()
    assert {k: len(v) for k, v in stored(tmp_path / 'out', 'TCGA-AA_1').items()} == {1: 1, 2: 2}
    assert '1 outlines of class Macrophage left out' in '\n'.join(report.notes)
    image = read_image(tmp_path / 'out' / 'train' / 'TCGA-AA_1' / 'image.tif')
    assert (image == IMAGE[..., ::-1]).all()


def test_unknown_class_names_the_options(tmp_path: Path) -> None:
    source = monusac(tmp_path)
    path = source / 'TCGA-BB' / 'TCGA-BB_1.xml'
    path.write_text(aperio([('Epithelal cell', [BOX])]))
    problem = run('monusac', source, tmp_path / 'out').problems[0]
    assert '(nearest: epithelial)' in problem
    assert "--map 'Epithelal cell=epithelial'" in problem
    assert "--skip 'Epithelal cell'" in problem


def test_one_bad_outline_costs_no_other_and_strict_refuses(tmp_path: Path) -> None:
    source = monusac(tmp_path)
    bad = [('x', 2), (3, 3), (9, 9)]
    text = aperio([('Neutrophil', [BOX, bad, bad, BOX[:2]])])
    (source / 'TCGA-BB' / 'TCGA-BB_1.xml').write_text(text)
    report = run('monusac', source, tmp_path / 'out')
    box = whole(fill_polygon(np.array(BOX, float), HW))
    assert_masks(stored(tmp_path / 'out', 'TCGA-BB_1'), {3: [box]})
    assert report.left_out['outlines with a vertex that is no number of pixels'] == 2
    assert any('left out (outline 2, outline 3)' in note for note in report.notes)
    strict = run('monusac', source, tmp_path / 'strict', strict=True)
    assert len(strict.problems) == 2
    assert 'outline 2, outline 3' in strict.problems[1]
    assert '--strict' in strict.problems[1]
    assert not (tmp_path / 'strict').exists()


def test_strict_does_not_refuse_what_was_asked_for(tmp_path: Path) -> None:
    source = monusac(tmp_path)
    (source / 'TCGA-AA' / 'TCGA-AA_1.xml').write_text(
        aperio([('Epithelial', [BOX]), ('Ambiguous', [SQUARE]), ('Lymphocyte', [SQUARE])])
    )
    report = run(
        'monusac', source, tmp_path / 'out', strict=True, skipped=frozenset({'lymphocyte'})
    )
    assert report.problems == ()
    assert report.left_out == {'outlines of class Ambiguous': 1, 'outlines of class Lymphocyte': 1}


@pytest.mark.parametrize('skip', ['Macrophage', 'macrophage', ' MACROPHAGE '])
def test_a_class_of_the_format_is_skipped_and_keeps_the_numbers(tmp_path: Path, skip: str) -> None:
    source = monusac(tmp_path)
    report = run('monusac', source, tmp_path / 'out', skipped=frozenset({skip, 'Lymphocyte'}))
    assert report.class_names == ('epithelial', 'lymphocyte', 'neutrophil', 'macrophage')
    assert list(stored(tmp_path / 'out', 'TCGA-AA_1')) == [1]
    assert list(stored(tmp_path / 'out', 'TCGA-BB_1')) == [3]
    assert report.left_out['outlines of class Macrophage'] == 1


# ---- layers without a class name ----


def monuseg(
    folder: Path, layer: str = '', attribute: str = '<Attribute Name="Description"/>'
) -> Path:
    """MoNuSeg's layout: a folder of images, a folder of outlines, one layer without a name."""
    for name in ('Tissue Images', 'Annotations'):
        (folder / name).mkdir(parents=True)
    tifffile.imwrite(folder / 'Tissue Images' / 'TCGA-1.tif', IMAGE, photometric='rgb')
    text = aperio([('X', [BOX, SQUARE])]).replace('Name="" Type', f'Name="{layer}" Type')
    text = text.replace('<Attribute Name="X" Id="0" Value=""/>', attribute)
    (folder / 'Annotations' / 'TCGA-1.xml').write_text(text)
    return folder


@pytest.mark.parametrize(
    'options',
    [
        pytest.param({'class_names': ('nucleus',)}, id='one class'),
        pytest.param({'single_class': 'nucleus'}, id='--class'),
        pytest.param({'class_names': ('a', 'nucleus'), 'single_class': 'nucleus'}, id='of two'),
        pytest.param({'class_names': ('nucleus',), 'class_map': {'': 'nucleus'}}, id='--map'),
    ],
)
def test_outlines_without_a_class_name_are_imported(tmp_path: Path, options: dict) -> None:
    report = run('monusac', monuseg(tmp_path / 'in'), tmp_path / 'out', **options)
    assert report.problems == ()
    number = report.class_names.index('nucleus') + 1
    assert {k: len(v) for k, v in stored(tmp_path / 'out', 'TCGA-1').items()} == {number: 2}
    assert report.rows[0]['patient'] == ''  # a folder of images is no patient


@pytest.mark.parametrize('class_names', [(), ('a', 'b')])
def test_without_a_class_the_option_is_named(tmp_path: Path, class_names: tuple) -> None:
    report = run('monusac', monuseg(tmp_path / 'in'), tmp_path / 'out', class_names=class_names)
    assert 'has cells without a class name' in report.problems[0]
    assert '--class NAME' in report.problems[0]


@pytest.mark.parametrize(
    ('layer', 'attribute', 'expected'),
    [
        ('', '<Attribute Name="Description" Value="Epithelial "/>', 'Epithelial'),
        ('Epithelial', '<Attribute Name="Description" Value=""/>', 'Epithelial'),
        ('Epithelial', '', 'Epithelial'),
        ('Layer 1', '<Attribute Name="Epithelial" Value=""/>', 'Epithelial'),
        ('', '<Attribute Name="Class" Value="A"/><Attribute Name="Note" Value="b"/>', 'A'),
        ('', '<Attribute Name=" " Value=""/>', ''),
    ],
)
def test_names_of_layers(tmp_path: Path, layer: str, attribute: str, expected: str) -> None:
    folder = monuseg(tmp_path, layer, attribute)
    regions = read_aperio_xml(folder / 'Annotations' / 'TCGA-1.xml')
    assert {region.class_name for region in regions} == {expected}


def test_class_for_unnamed_cells_is_refused_where_all_have_names(tmp_path: Path) -> None:
    with pytest.raises(CellSegError, match='--class nucleus: all cells of the source have a class'):
        run('monusac', monusac(tmp_path), tmp_path / 'out', single_class='nucleus')


def test_shapes_that_are_no_outlines_are_left_out(tmp_path: Path) -> None:
    source = monusac(tmp_path)
    path = source / 'TCGA-BB' / 'TCGA-BB_1.xml'
    text = aperio([('Neutrophil', [BOX, SQUARE])])
    path.write_text(text.replace('Id="2" Neg', 'Id="2" Type="2" Neg'))
    report = run('monusac', source, tmp_path / 'out')
    assert report.left_out['regions that are no outlines (ellipses, arrows, rulers)'] == 1
    assert len(stored(tmp_path / 'out', 'TCGA-BB_1')[3]) == 1

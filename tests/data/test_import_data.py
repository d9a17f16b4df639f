"""Importers: what was drawn arrives pixel by pixel; what cannot be kept is counted and named."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from pycocotools import mask as coco_mask

from cellseg_mm.core.errors import CellSegError, ImageError, LabelMapError
from cellseg_mm.data.importing import import_data as importers
from cellseg_mm.data.importing.coco import coco_cell
from cellseg_mm.data.importing.import_data import import_data, paint_cells
from cellseg_mm.data.importing.monusac import fill_polygon, read_aperio_xml
from cellseg_mm.data.importing.sources import Cell, ImportParams, read_picture
from cellseg_mm.data.labels import find_cases, read_gt, read_image

ROOT = Path(__file__).parents[2]
HW = (17, 23)  # odd and not square, so that a transposition cannot pass
IMAGE = np.random.default_rng(0).integers(0, 256, (*HW, 3)).astype(np.uint8)


def f_mask(top: int, left: int) -> np.ndarray:
    """An F of 5 x 4 px: no symmetry."""
    mask = np.zeros(HW, bool)
    mask[top : top + 5, left] = True
    mask[top, left : left + 4] = True
    mask[top + 2, left : left + 3] = True
    return mask


def stored(out_dir: Path, name: str) -> dict[int, list[np.ndarray]]:
    """Masks of each class of a written case, in the order of their ids."""
    found = {}
    for path in sorted((out_dir / 'train' / name).glob('class*.tif')):
        label_map = tifffile.imread(path)
        found[int(path.stem[-1])] = [label_map == i for i in np.unique(label_map[label_map > 0])]
    return found


def assert_masks(found: dict[int, list[np.ndarray]], expected: dict[int, list[np.ndarray]]) -> None:
    assert {k: [m.tolist() for m in v] for k, v in found.items()} == {
        k: [m.tolist() for m in v] for k, v in expected.items()
    }


# ---- overlaps ----


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


# ---- polygons ----


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


# ---- MoNuSAC ----


def aperio(annotations: list[tuple[str, list[list[tuple[float, float]]]]], extra: str = '') -> str:
    """The distribution's layout: one Annotation per class, the class is its Attribute."""
    text = '<?xml version="1.0" encoding="UTF-8"?>' + extra + '<Annotations MicronsPerPixel="0.25">'
    for number, (name, polygons) in enumerate(annotations, start=1):
        text += f'<Annotation Id="{number}" Name="" Type="4"><Attributes>'
        text += f'<Attribute Name="{name}" Id="0" Value=""/></Attributes><Regions>'
        text += '<RegionAttributeHeaders><AttributeHeader Id="9999" Name="Region"/>'
        text += '</RegionAttributeHeaders>'
        for i, polygon in enumerate(polygons, start=1):
            vertices = ''.join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in polygon)
            text += f'<Region Id="{i}" NegativeROA="0"><Attributes/>'
            text += f'<Vertices>{vertices}</Vertices></Region>'
        text += '</Regions><Plots/></Annotation>'
    return text + '</Annotations>'


TRIANGLE = [(1.0, 1.0), (9.0, 1.0), (1.0, 8.0)]
SQUARE = [(3, 3), (12, 3), (12, 12), (3, 12)]
BOX = [(14.5, 2.5), (20.5, 2.5), (20.5, 6.5), (14.5, 6.5)]


def monusac(folder: Path) -> Path:
    source = folder / 'source'
    (source / 'TCGA-AA').mkdir(parents=True)
    (source / 'TCGA-BB').mkdir()
    tifffile.imwrite(source / 'TCGA-AA' / 'TCGA-AA_1.tif', IMAGE, photometric='rgb')
    (source / 'TCGA-AA' / 'TCGA-AA_1.xml').write_text(
        aperio(
            [
                ('Epithelial', [TRIANGLE, SQUARE]),
                ('Lymphocyte', [TRIANGLE, [(1, 1), (2, 2)], [(90, 90), (95, 90), (95, 95)]]),
                ('Macrophage', [BOX]),
                ('Ambiguous', [BOX, SQUARE]),
            ]
        )
    )
    write_svs(source / 'TCGA-BB' / 'TCGA-BB_1.svs')
    (source / 'TCGA-BB' / 'TCGA-BB_1.xml').write_text(aperio([('Neutrophil', [BOX])]))
    return source


def write_svs(path: Path) -> None:
    """Two levels and Aperio's description; level 0 is the image."""
    description = f'Aperio Image Library v1\n{HW[1]}x{HW[0]} |AppMag = 40|MPP = 0.25'
    with tifffile.TiffWriter(path) as writer:
        options = {'photometric': 'rgb', 'metadata': None, 'software': False}
        writer.write(IMAGE, tile=(16, 16), description=description, **options)
        writer.write(IMAGE[::4, ::4], description='Aperio thumbnail', **options)


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
    rows = list(csv.DictReader((tmp_path / 'out' / 'manifest.csv').open(newline='')))
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


def test_result_is_a_data_folder(tmp_path: Path) -> None:
    import_data('monusac', monusac(tmp_path), tmp_path / 'out', ImportParams())
    cases = find_cases(tmp_path / 'out', 'train', 4)
    assert [read_gt(case).class_ids.tolist() for case in cases] == [[0, 0, 1, 3], [2]]


def test_problems_are_listed_and_good_cases_are_written(tmp_path: Path) -> None:
    source = monusac(tmp_path)
    folder = source / 'TCGA-AA'
    for name, xml in {
        'doctype': aperio([('Epithelial', [BOX])], '<!DOCTYPE a [<!ENTITY b "c">]>'),
        'torn': aperio([('Epithelial', [BOX])])[:-40],
        'unknown': aperio([('Plasma', [BOX])]),
        'number': aperio([('Epithelial', [BOX])]).replace('"14.5"', '"nan"'),
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
        'number.xml: line 1: a vertex is',
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


# ---- COCO ----


def coco(folder: Path, annotations: list[dict], **entry: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(IMAGE).save(folder / 'a.png')
    image = {'id': 7, 'file_name': 'a.png', 'height': HW[0], 'width': HW[1], **entry}
    content = {
        'images': [image],
        'categories': [{'id': 30, 'name': 'dark'}, {'id': 4, 'name': 'pale'}],
        'annotations': [
            {'id': i, 'image_id': 7, 'category_id': 4, **a} for i, a in enumerate(annotations)
        ],
    }
    path = folder / 'coco.json'
    path.write_text(json.dumps(content))
    return path


def packed(mask: np.ndarray) -> dict:
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {'size': list(HW), 'counts': encoded['counts'].decode()}


def unpacked(mask: np.ndarray) -> dict:
    counts, value = [0], 0
    for pixel in mask.T.reshape(-1).tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {'size': list(HW), 'counts': counts}


def test_coco_masks_arrive_pixel_by_pixel(tmp_path: Path) -> None:
    polygons = [[2.0, 2.0, 9.0, 2.0, 9.0, 7.0], [15, 10, 20, 10, 20, 15, 15, 15]]  # two parts
    source = coco(
        tmp_path,
        [
            {'segmentation': packed(f_mask(1, 1))},
            {'segmentation': unpacked(f_mask(9, 2)), 'category_id': 30},
            {'segmentation': polygons, 'category_id': 30},
            {'segmentation': packed(f_mask(1, 1)), 'iscrowd': 1},
            {'segmentation': packed(np.zeros(HW, bool))},
        ],
    )
    report = import_data('coco', source, tmp_path / 'out', ImportParams())
    assert report.problems == ()
    assert report.class_names == ('pale', 'dark')  # by rising category id
    rles = coco_mask.frPyObjects([[float(v) for v in p] for p in polygons], *HW)
    polygon = coco_mask.decode(coco_mask.merge(rles)).astype(bool)
    assert polygon.sum() > 30
    expected = {1: [f_mask(1, 1)], 2: [f_mask(9, 2), polygon]}
    assert_masks(stored(tmp_path / 'out', 'a'), expected)
    notes = '\n'.join(report.notes)
    assert '1 crowd areas (iscrowd) left out' in notes
    assert '1 cells without a pixel left out' in notes


@pytest.mark.parametrize(
    ('segmentation', 'message'),
    [
        pytest.param([], 'missing', id='empty'),
        pytest.param(None, 'missing', id='none'),
        pytest.param([[1, 2, 3, 4]], 'has 4 values', id='short'),
        pytest.param([[1, 2, 3, 4, 5, 6, 7]], 'has 7 values', id='odd'),
        pytest.param([[1, 2, 3, 4, 5, 'x']], 'at least 6 numbers', id='text'),
        pytest.param([5], 'has 0 values', id='number'),
        pytest.param([[1, 2, 3, 4, 5, 1e12]], 'leaves the image by far', id='far'),
        pytest.param([[1, 2, 3, 4, 5, float('nan')]], 'leaves the image by far', id='nan'),
        pytest.param({'size': [23, 17], 'counts': [391]}, 'has size', id='transposed'),
        pytest.param({'size': [17, 23], 'counts': [390]}, 'counts are broken', id='sum'),
        pytest.param({'size': [17, 23], 'counts': [-9, 400]}, 'counts are broken', id='negative'),
        pytest.param({'size': [17, 23], 'counts': 'abc'}, 'annotation 3', id='rle'),
        pytest.param({'size': [17, 23], 'counts': 'é'}, 'counts are broken', id='letters'),
    ],
)
def test_broken_segmentations_are_refused(segmentation: object, message: str) -> None:
    with pytest.raises(LabelMapError, match=message) as error:
        coco_cell(segmentation, 1, HW, 'x.json: annotation 3')
    assert str(error.value).startswith('x.json: annotation 3')


@pytest.mark.parametrize(
    ('entry', 'message'),
    [
        pytest.param({'height': 23, 'width': 17}, 'must match', id='transposed'),
        pytest.param({'file_name': '../a.png'}, 'expected a file inside', id='parent'),
        pytest.param({'file_name': '/etc/hostname'}, 'expected a file inside', id='absolute'),
        pytest.param({'file_name': 'a\0.png'}, 'expected a file inside', id='zero byte'),
        pytest.param({'file_name': 3}, 'expected a file inside', id='number'),
        pytest.param({'file_name': 'b.png'}, 'cannot be read', id='missing'),
    ],
)
def test_coco_image_entries_are_checked(tmp_path: Path, entry: dict, message: str) -> None:
    source = coco(tmp_path / 'in', [{'segmentation': packed(f_mask(1, 1))}], **entry)
    report = import_data('coco', source, tmp_path / 'out', ImportParams())
    assert len(report.problems) == 1
    assert message in report.problems[0]
    assert not (tmp_path / 'out' / 'train').exists()


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        pytest.param('{"images": [', 'not valid JSON', id='torn'),
        pytest.param('[]', 'images is no list of objects', id='list'),
        pytest.param('{"images": [1], "annotations": [], "categories": []}', 'images', id='type'),
        pytest.param(
            '{"images": [{"id": 1}, {"id": 1}], "annotations": [], "categories": []}',
            'ids .1. occur more than once',
            id='ids',
        ),
        pytest.param(
            '{"images": [{"id": 1}], "annotations": [{"image_id": 2}], "categories": []}',
            '1 annotations are of image ids',
            id='unlisted',
        ),
        pytest.param(
            '{"images": [{"id": "1"}], "annotations": [], "categories": []}',
            "id is '1'",
            id='id type',
        ),
    ],
)
def test_broken_coco_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / 'c.json'
    path.write_text(text)
    with pytest.raises(CellSegError, match=message):
        import_data('coco', path, tmp_path / 'out', ImportParams())


def test_unknown_category_names_what_to_do(tmp_path: Path) -> None:
    source = coco(tmp_path, [{'segmentation': packed(f_mask(1, 1)), 'category_id': 5}])
    report = import_data('coco', source, tmp_path / 'out', ImportParams())
    assert 'category_id is 5; expected one of [4, 30]' in report.problems[0]
    params = ImportParams(class_names=('dark',))
    source = coco(tmp_path, [{'segmentation': packed(f_mask(1, 1))}])
    report = import_data('coco', source, tmp_path / 'out', params)
    assert "cells of class 'pale'; expected dark; map it" in report.problems[0]


# ---- label maps ----


def numbered(masks: list[np.ndarray], ids: list[int]) -> np.ndarray:
    return sum(m * np.uint16(i) for m, i in zip(masks, ids, strict=True)).astype(np.uint16)


def test_label_maps_of_cellpose_and_stardist(tmp_path: Path) -> None:
    masks = [f_mask(1, 1), f_mask(9, 8)]
    label_map = numbered(masks, [700, 3])  # above 255, with gaps, not in order
    flat, paired = tmp_path / 'cellpose', tmp_path / 'stardist'
    flat.mkdir()
    (paired / 'images').mkdir(parents=True)
    (paired / 'masks').mkdir()
    Image.fromarray(IMAGE).save(flat / 'x.png')
    Image.fromarray(label_map).save(flat / 'x_cp_masks.png')
    Image.fromarray(IMAGE).save(flat / '000_img.png')
    tifffile.imwrite(flat / '000_masks.tif', label_map)
    tifffile.imwrite(paired / 'images' / 'y.tif', IMAGE, photometric='rgb')
    tifffile.imwrite(paired / 'masks' / 'y.tif', label_map.astype(np.int32))
    params = ImportParams(class_names=('a', 'b'), single_class='B')
    for source in (flat, paired):
        report = import_data('label-map', source, tmp_path / 'out', params)
        assert report.problems == ()
    for name in ('x', '000', 'y'):
        assert_masks(stored(tmp_path / 'out', name), {2: [masks[1], masks[0]]})
    rows = list(csv.DictReader((tmp_path / 'out' / 'manifest.csv').open(newline='')))
    assert [row['uuid'] for row in rows] == ['000', 'x', 'y']  # both runs are in the table


def test_label_map_problems(tmp_path: Path) -> None:
    source = tmp_path / 'in'
    source.mkdir()
    for name in ('alone', 'size', 'colour', 'full'):
        Image.fromarray(IMAGE).save(source / f'{name}.png')
    Image.fromarray(numbered([f_mask(1, 1)], [1]).T).save(source / 'size_masks.png')
    Image.fromarray(IMAGE).save(source / 'colour_masks.png')
    Image.fromarray(np.full(HW, 5, np.uint8)).save(source / 'full_masks.png')  # no background
    Image.fromarray(np.ones(HW, np.uint8)).save(source / 'map_masks.png')
    report = import_data('label-map', source, tmp_path / 'out', ImportParams())
    text = '\n'.join(report.problems)
    assert 'alone has 0 label maps (none); expected one' in text
    assert 'map has 0 images (none); expected one' in text
    assert 'size_masks.png: is 23 x 17 px, the image is 17 x 23 px' in text
    assert 'colour_masks.png: the mode is RGB; expected one channel' in text
    assert len(report.problems) == 4
    assert_masks(stored(tmp_path / 'out', 'full'), {1: [np.ones(HW, bool)]})


# ---- one picture per cell ----


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
    assert report.notes == (f'{folder}: 1 masks without a pixel left out',)
    assert report.problems == (
        f'{tmp_path}/in/empty: has no folder images; expected images and masks',
    )


# ---- names, files, tool ----


def test_colliding_and_unsafe_names(tmp_path: Path) -> None:
    source = monusac(tmp_path)
    for folder, name in (('TCGA-BB', 'tcga-aa_1'), ('TCGA-BB', 'a b:c'), ('TCGA-BB', 'x' * 151)):
        tifffile.imwrite(source / folder / f'{name}.tif', IMAGE, photometric='rgb')
        (source / folder / f'{name}.xml').write_text(aperio([('Epithelial', [BOX])]))
    report = import_data('monusac', source, tmp_path / 'out', ImportParams())
    assert len(report.problems) == 2
    assert 'names must differ, also without case' in report.problems[0]
    assert 'cannot name a folder' in report.problems[1]
    assert (tmp_path / 'out' / 'train' / 'a_b_c').is_dir()


def test_existing_cases_stay_unless_asked(tmp_path: Path) -> None:
    source = monusac(tmp_path)
    import_data('monusac', source, tmp_path / 'out', ImportParams())
    mark = tmp_path / 'out' / 'train' / 'TCGA-BB_1' / 'mark'
    mark.write_text('')
    report = import_data('monusac', source, tmp_path / 'out', ImportParams())
    assert len(report.problems) == 2
    assert 'is already there' in report.problems[0]
    assert mark.exists()
    report = import_data('monusac', source, tmp_path / 'out', ImportParams(replace=True))
    assert report.problems == ()
    assert not mark.exists()
    two = ImportParams(class_names=('a', 'b'))
    with pytest.raises(CellSegError, match='import into another folder'):
        import_data('monusac', source, tmp_path / 'out', two)


def test_a_case_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = monusac(tmp_path)
    write_case, calls = importers.write_case, []

    def fail_second(case_dir: Path, *rest: object) -> None:
        calls.append(case_dir)
        write_case(case_dir, *rest)
        if len(calls) == 2:
            raise OSError('disk full')

    monkeypatch.setattr(importers, 'write_case', fail_second)
    with pytest.raises(OSError, match='disk full'):
        import_data('monusac', source, tmp_path / 'out', ImportParams())
    assert [p.name for p in (tmp_path / 'out' / 'train').iterdir()] == ['TCGA-AA_1']
    rows = list(csv.DictReader((tmp_path / 'out' / 'manifest.csv').open(newline='')))
    assert [row['uuid'] for row in rows] == ['TCGA-AA_1']


@pytest.mark.parametrize(
    ('mode', 'values', 'expected'),
    [
        pytest.param('L', IMAGE[..., 0], np.repeat(IMAGE[..., :1], 3, 2), id='grey'),
        pytest.param('RGBA', np.dstack([IMAGE, IMAGE[..., 0]]), IMAGE, id='alpha is dropped'),
        pytest.param(
            'I;16',
            IMAGE[..., 0].astype(np.uint16) * 257,
            np.repeat(IMAGE[..., :1], 3, 2),
            id='16 bit',
        ),
    ],
)
def test_pictures(tmp_path: Path, mode: str, values: np.ndarray, expected: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / 'a.png')
    assert Image.open(tmp_path / 'a.png').mode == mode
    assert (read_picture(tmp_path / 'a.png') == expected).all()


def test_pictures_that_are_refused(tmp_path: Path) -> None:
    Image.fromarray(IMAGE).save(tmp_path / 'a.png')
    with pytest.raises(ImageError, match='at most 100 px are accepted'):
        read_picture(tmp_path / 'a.png', max_pixels=100)
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'a.png').read_bytes()[:300])
    (tmp_path / 'text.jpg').write_text('no picture')
    (tmp_path / 'text.svs').write_text('no slide')
    for name in ('cut.png', 'text.jpg', 'text.svs', 'none.png'):
        with pytest.raises(ImageError, match=f'{name}: cannot be read'):
            read_picture(tmp_path / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(IMAGE).save(tmp_path / 'turned.jpg', exif=exif)
    with pytest.raises(ImageError, match='marked as turned'):
        read_picture(tmp_path / 'turned.jpg')
    write_svs(tmp_path / 'big.svs')
    with pytest.raises(ImageError, match='level 0 has 391 px; at most 100'):
        read_picture(tmp_path / 'big.svs', max_pixels=100)


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
            'monusac', ImportParams(class_map={'x': 'y'}), 'mapped to y, which is none', id='map'
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

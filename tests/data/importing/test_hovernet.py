"""JSON as HoVer-Net and CellViT write it: OpenCV's outlines give the masks back."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.support.import_sources import IMAGE, assert_masks, f_mask, run, stored

MASKS = [f_mask(1, 1), f_mask(9, 8), f_mask(1, 15)]
TYPES = [2, 1, 2]
TYPE_INFO = {'0': ['nolabe', [0, 0, 0]], '1': ['neopla', [255, 0, 0]], '2': ['inflam', [0, 255, 0]]}


def nucleus(mask: np.ndarray, kind: int | None) -> dict[str, object]:
    """As HoVer-Net's process_utils makes it."""
    rows, columns = np.nonzero(mask)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    return {
        'bbox': [[int(rows.min()), int(columns.min())], [int(rows.max()) + 1, int(columns.max())]],
        'centroid': [float(columns.mean()), float(rows.mean())],
        'contour': contours[0][:, 0].tolist(),
        'type_prob': 0.9,
        'type': kind,
    }


NUCLEI = {str(i): nucleus(m, t) for i, (m, t) in enumerate(zip(MASKS, TYPES, strict=True), start=1)}


def source_of(folder: Path, content: object, name: str = 'a.json') -> Path:
    (folder / 'json').mkdir(parents=True, exist_ok=True)
    Image.fromarray(IMAGE).save(folder / 'a.png')
    (folder / 'json' / name).write_text(json.dumps(content))
    return folder / 'json'


def test_hovernet_with_its_table_of_types(tmp_path: Path) -> None:
    source = source_of(tmp_path, {'mag': 40, 'nuc': NUCLEI})
    (source / 'type_info.json').write_text(json.dumps(TYPE_INFO))
    report = run('hovernet', source, tmp_path / 'out', image_dir=tmp_path)
    assert report.class_names == ('inflam', 'neopla')
    assert_masks(stored(tmp_path / 'out', 'a'), {1: [MASKS[0], MASKS[2]], 2: [MASKS[1]]})
    assert 'outlines were found at magnification 40' in report.text()


def test_types_without_a_table_are_numbers(tmp_path: Path) -> None:
    source = source_of(tmp_path, {'mag': None, 'nuc': NUCLEI})
    options = {'image_dir': tmp_path, 'class_map': {'1': 'tumor', '2': 'other'}}
    report = run('hovernet', source, tmp_path / 'out', **options)
    assert report.class_names == ('tumor', 'other')
    assert_masks(stored(tmp_path / 'out', 'a'), {1: [MASKS[1]], 2: [MASKS[0], MASKS[2]]})


def test_nuclei_without_types(tmp_path: Path) -> None:
    nuclei = {key: {**row, 'type': None} for key, row in NUCLEI.items()}
    source = source_of(tmp_path, {'mag': 40, 'nuc': nuclei})
    report = run('hovernet', source, tmp_path / 'out', image_dir=tmp_path)
    assert report.class_names == ('cell',)
    assert_masks(stored(tmp_path / 'out', 'a'), {1: MASKS})


@pytest.mark.parametrize(
    'type_map',
    [
        {'1': 'Neoplastic', '2': 'Inflammatory'},
        {'Background': 0, 'Neoplastic': 1, 'Inflammatory': 2},  # before CellViT-Inference
    ],
)
def test_cellvit(tmp_path: Path, type_map: dict[str, object]) -> None:
    content = {
        'wsi_metadata': {'magnification': 40},
        'type_map': type_map,
        'cells': [{**row, 'cell_status': 2, 'offset_global': [0, 0]} for row in NUCLEI.values()],
    }
    source = source_of(tmp_path, content, 'a_cells.json')
    centres = [{key: row[key] for key in ('bbox', 'centroid', 'type')} for row in NUCLEI.values()]
    source_of(tmp_path, {**content, 'cells': centres}, 'a_cell_detection.json')
    report = run('hovernet', source, tmp_path / 'out', image_dir=tmp_path)
    assert report.class_names == ('Inflammatory', 'Neoplastic')
    assert not report.problems
    assert 'files of centres without outlines were not used: a_cell_detection.json' in report.text()
    assert_masks(stored(tmp_path / 'out', 'a'), {1: [MASKS[0], MASKS[2]], 2: [MASKS[1]]})


def test_bad_nuclei_are_counted(tmp_path: Path) -> None:
    crossing = [[2, 2], [8, 8], [8, 2], [2, 8]]
    nuclei = {
        **NUCLEI,
        '4': {'contour': [[90, 90], [95, 90], [95, 95]], 'type': 1},
        '5': {'contour': [[1, 1], [2, 2]], 'type': 1},
        '6': {'contour': [['a', 1]], 'type': 1},
        '7': {'centroid': [1, 1], 'type': 1},
        '8': {'contour': crossing, 'type': 1},
        '9': 3,
    }
    source = source_of(tmp_path, {'mag': 40, 'nuc': nuclei})
    report = run('hovernet', source, tmp_path / 'out', image_dir=tmp_path)
    assert report.left_out == {
        'nuclei without an outline of numbers x, y': 3,
        'outlines with fewer than 3 points': 1,
        'outlines without a pixel in the image': 1,
    }
    assert '1 outlines cross themselves (such as nucleus 8)' in report.text()
    assert [len(masks) for masks in stored(tmp_path / 'out', 'a').values()] == [2, 2]


def test_bad_files_cost_no_other(tmp_path: Path) -> None:
    source = source_of(tmp_path, {'mag': 40, 'nuc': NUCLEI})
    for name, text in (('b', '{"nuc": {'), ('c', '[]'), ('d', '{"nuc": 3}'), ('e', '{"nuc": {}}')):
        (source / f'{name}.json').write_text(text)
        if name != 'e':
            Image.fromarray(IMAGE).save(tmp_path / f'{name}.png')
    report = run('hovernet', source, tmp_path / 'out', image_dir=tmp_path)
    assert 'b.json: not valid JSON' in report.problems[0]
    assert 'c.json: has neither nuc nor cells (its keys: none)' in report.problems[1]
    assert 'd.json: has neither nuc nor cells (its keys: nuc)' in report.problems[2]
    assert 'e.json: has 0 images of the name e' in report.problems[3]
    assert [path.name for path in (tmp_path / 'out' / 'train').iterdir()] == ['a']

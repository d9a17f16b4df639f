"""Labelme's shapes arrive as cells; groups are one, lines are none."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.import_sources import HW, assert_masks, f_mask, run, stored, write_image

SQUARE = [[2, 2], [8, 2], [8, 6], [2, 6]]


def shape(points: object = SQUARE, label: object = 'tumor', kind: str = 'polygon', **more) -> dict:
    return {
        **{'label': label, 'points': points, 'group_id': None, 'description': ''},
        **{'shape_type': kind, 'flags': {}, 'mask': None, **more},
    }


def png(mask: np.ndarray) -> str:
    """What Labelme 5 stores: labelme.utils.img_arr_to_b64."""
    stream = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(stream, format='PNG')
    return base64.b64encode(stream.getvalue()).decode()


def source(folder: Path, shapes: list, name: str = 'a', **more: object) -> Path:
    write_image(folder / f'{name}.png')
    content = {
        **{'version': '5.4.1', 'flags': {}, 'shapes': shapes, 'imagePath': f'{name}.png'},
        **{'imageData': None, 'imageHeight': HW[0], 'imageWidth': HW[1], **more},
    }
    (folder / f'{name}.json').write_text(json.dumps(content))
    return folder


def test_kinds_of_shapes(tmp_path: Path) -> None:
    mask = f_mask(9, 2)[9:14, 2:6]
    shapes = [
        shape(label='polygon'),
        shape([[20, 6], [12, 2]], 'rectangle', 'rectangle'),
        shape([[15, 11], [15, 15]], 'circle', 'circle'),
        shape([[2, 9], [5, 13]], 'mask', 'mask', mask=png(mask * 255)),
    ]
    run('labelme', source(tmp_path / 'in', shapes), tmp_path / 'out')
    circle, masked, polygon, rectangle = stored(tmp_path / 'out', 'a').values()
    assert_masks({1: masked}, {1: [f_mask(9, 2)]})
    assert (polygon[0].sum(), rectangle[0].sum()) == (24, 32)
    assert abs(int(circle[0].sum()) - np.pi * 16) < 4


def test_shapes_of_one_group_and_label_are_one_cell(tmp_path: Path) -> None:
    other = [[x + 10, y + 5] for x, y in SQUARE]
    shapes = [shape(group_id=1), shape(other, group_id=1), shape(other, 'stroma', group_id=1)]
    report = run('labelme', source(tmp_path / 'in', shapes), tmp_path / 'out')
    assert report.class_names == ('stroma', 'tumor')
    found = stored(tmp_path / 'out', 'a')
    assert [int(mask.sum()) for masks in found.values() for mask in masks] == [24, 48]


def test_what_cannot_be_used_is_counted(tmp_path: Path) -> None:
    shapes = [
        shape(),
        shape([[1, 1], [5, 5]], kind='linestrip'),
        shape([[1, 1], [5, 5]]),
        shape([['x', 1], [5, 5], [7, 9]]),
        shape([[90, 90], [95, 90], [95, 95]]),
        shape([[2, 9], [5, 13]], kind='mask', mask='no png'),
        shape([[2, 9], [5, 13]], kind='mask', mask=png(np.ones((500, 500)))),
        shape(label=None),
        'text',
    ]
    report = run('labelme', source(tmp_path / 'in', shapes), tmp_path / 'out')
    assert len(stored(tmp_path / 'out', 'a')[1]) == 1
    assert report.left_out == {
        'shapes that are no areas (points, lines)': 1,
        'outlines with fewer than 3 points': 1,
        'outlines with a point that is no number of pixels': 1,
        'outlines without a pixel in the image': 1,
        'masks that cannot be read': 2,
        'outlines without a class (--class names one for them)': 1,
        'shapes that are no objects': 1,
    }


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        pytest.param('{"shapes": [', 'not valid JSON', id='torn'),
        pytest.param('{"features": []}', 'no list of shapes', id='geojson'),
        pytest.param('[1]', 'no list of shapes', id='list'),
        pytest.param(
            json.dumps({'shapes': [shape()], 'imageHeight': 23, 'imageWidth': 17}),
            'must match',
            id='transposed',
        ),
    ],
)
def test_a_bad_file_costs_its_image_only(tmp_path: Path, content: str, message: str) -> None:
    folder = source(source(tmp_path / 'in', [shape()]), [shape()], name='b')
    (folder / 'b.json').write_text(content)
    (folder / 'gone.json').write_text(json.dumps({'shapes': [shape()]}))
    report = run('labelme', folder, tmp_path / 'out')
    assert [row['uuid'] for row in report.rows] == ['a']
    assert message in report.problems[0]
    assert 'has 0 images of the name gone' in report.problems[1]

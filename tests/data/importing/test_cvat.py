"""CVAT's images and shapes arrive as cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cellseg_mm.core.errors import CellSegError
from tests.support.import_sources import HW, assert_masks, f_mask, run, stored, write_image

SIZE = f'width="{HW[1]}" height="{HW[0]}"'
META = """<version>1.1</version><meta><job><id>3</id><labels>
<label><name>tumor</name><color>#ff0000</color><type>any</type><attributes></attributes></label>
<label><name>stroma</name><color>#00ff00</color><type>any</type></label></labels></job></meta>"""


def polygon(points: str = '2,2;8,2;8,6;2,6', label: str = 'tumor', more: str = '') -> str:
    return (
        f'<polygon label="{label}" source="manual" occluded="0" points="{points}" z_order="0" '
        f'{more}><attribute name="sure">true</attribute></polygon>'
    )


def mask(found: np.ndarray, label: str = 'tumor', more: str = '') -> str:
    """What CVAT writes of a brush stroke: run lengths of the box, row by row."""
    rows, columns = (np.flatnonzero(found.any(axis=axis)) for axis in (1, 0))
    box = found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    runs, value = [0], False
    for pixel in box.reshape(-1).tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return (
        f'<mask label="{label}" rle="{", ".join(map(str, runs))}" left="{columns[0]}" '
        f'top="{rows[0]}" width="{box.shape[1]}" height="{box.shape[0]}" z_order="0" {more}></mask>'
    )


def source(folder: Path, *images: tuple[str, str], head: str = '', size: str = SIZE) -> Path:
    text = ''.join(
        f'<image id="{i}" name="{name}" {size}>{shapes}</image>'
        for i, (name, shapes) in enumerate(images)
    )
    folder.mkdir(parents=True, exist_ok=True)
    whole = f'<?xml version="1.0" encoding="utf-8"?>{head}<annotations>{META}{text}</annotations>'
    (folder / 'annotations.xml').write_text(whole)
    return folder


def test_polygons_ellipses_and_masks(tmp_path: Path) -> None:
    ellipse = '<ellipse label="stroma" cx="15" cy="8" rx="6" ry="3" rotation="90"></ellipse>'
    shapes = polygon() + mask(f_mask(9, 2)) + ellipse
    folder = source(tmp_path / 'in', ('sub/a.png', shapes))
    write_image(folder / 'images' / 'sub' / 'a.png')
    report = run('cvat', folder, tmp_path / 'out')
    assert report.class_names == ('stroma', 'tumor')
    found = stored(tmp_path / 'out', 'a')
    assert found[2][0][2:6, 2:8].all()
    assert_masks({1: found[2][1:]}, {1: [f_mask(9, 2)]})
    assert found[1][0].any(axis=1).sum() == 12  # turned upright
    assert found[1][0].any(axis=0).sum() == 6


def test_shapes_of_one_group_are_one_cell(tmp_path: Path) -> None:
    group = 'group_id="4"'
    shapes = polygon(more=group) + mask(f_mask(9, 12), more=group) + polygon('9,1;12,1;12,4')
    folder = source(tmp_path / 'in', ('a.png', shapes))
    write_image(folder / 'a.png')
    run('cvat', folder, tmp_path / 'out')
    first, second = stored(tmp_path / 'out', 'a')[2]
    assert first.sum() == 24 + f_mask(9, 12).sum()
    assert second.sum() == 6


def test_what_cannot_be_used_is_counted(tmp_path: Path) -> None:
    shapes = [
        polygon(),
        '<box label="tumor" xtl="1" ytl="1" xbr="5" ybr="5"></box>',
        '<polyline label="tumor" points="1,1;5,5"></polyline>',
        polygon('1,1;5,5'),
        polygon('1,1;5,x;7,9'),
        polygon('90,90;95,90;95,95'),
        '<mask label="tumor" rle="3, 4" left="1" top="1" width="2" height="2"></mask>',
        '<mask label="tumor" rle="0, 90000" left="1" top="1" width="300" height="300"></mask>',
        '<mask label="tumor" rle="a" left="1" top="1" width="2" height="2"></mask>',
        '<ellipse label="tumor" cx="15" cy="8"></ellipse>',
    ]
    folder = source(tmp_path / 'in', ('a.png', ''.join(shapes)))
    write_image(folder / 'a.png')
    report = run('cvat', folder, tmp_path / 'out')
    assert report.problems == ()
    assert report.left_out == {
        'shapes that are no areas (boxes, lines, points, tags)': 2,
        'outlines with fewer than 3 points': 1,
        'outlines with a point that is no number of pixels': 1,
        'outlines without a pixel in the image': 1,
        'shapes of broken numbers (mask)': 3,
        'shapes of broken numbers (ellipse)': 1,
    }


def test_a_bad_image_costs_itself_only(tmp_path: Path) -> None:
    names = ['a.png', 'gone.png', '../outside.png', 'a.png', 'other.png']
    shapes = [polygon()] * 4 + [polygon(label='dust')]
    folder = source(tmp_path / 'in', *zip(names, shapes, strict=True))
    for name in ('a.png', 'other.png', '../outside.png'):
        write_image(folder / name)
    report = run('cvat', folder, tmp_path / 'out', class_names=('tumor', 'stroma'))
    assert [row['uuid'] for row in report.rows] == ['a']
    for text in ("'gone.png' is not in", "'../outside.png' is not in", 'is listed twice', "'dust'"):
        assert sum(text in problem for problem in report.problems) == 1, text


@pytest.mark.parametrize(
    ('options', 'text', 'message'),
    [
        ({}, None, 'expected the XML'),
        ({}, '<annotations><image', 'not valid XML'),
        ({}, '<annotations></annotations>', 'has no image'),
        ({}, '<annotations><track id="0"></track></annotations>', 'tracks of a video'),
        ({'head': '<!DOCTYPE x [<!ENTITY a "b">]>'}, '', 'has a DOCTYPE'),
    ],
)
def test_a_bad_file_is_one_sentence(
    tmp_path: Path, options: dict, text: str | None, message: str
) -> None:
    folder = source(tmp_path / 'in', ('a.png', polygon()), **options)
    if text is None:
        (folder / 'annotations.xml').unlink()
    elif text:
        (folder / 'annotations.xml').write_text(text)
    with pytest.raises(CellSegError, match=message):
        run('cvat', folder, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_an_image_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = source(tmp_path / 'in', ('a.png', polygon()), size='width="17" height="23"')
    write_image(folder / 'a.png')
    assert 'must match' in run('cvat', folder, tmp_path / 'out').problems[0]

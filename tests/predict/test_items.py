"""Names of images: what they are called, and which ids and fingerprints follow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.predict.items import Item, find_items


@pytest.mark.parametrize(
    ('path', 'name'),
    [
        ('s/slide.ome.tif', 'slide'),
        ('s/slide.OME.TIFF', 'slide'),
        ('s/plate.1.png', 'plate.1'),
        ('case3/image.tif', 'case3'),
        ('case3/IMAGE.TIF', 'case3'),
        ('s/imagej.tif', 'imagej'),
    ],
)
def test_names(tmp_path: Path, path: str, name: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_bytes(b'.')
    (item,) = find_items([str(file)])
    assert (item.path, item.name) == (file, name)


def test_a_missing_file_is_an_item_whose_own_turn_fails(tmp_path: Path) -> None:
    (item,) = find_items([str(tmp_path / 'gone.tif')])
    assert item.name == 'gone'
    with pytest.raises(FileNotFoundError):
        item.fingerprint()


def test_one_file_named_twice_is_one_item(tmp_path: Path) -> None:
    (tmp_path / 'a.png').write_bytes(b'.')
    assert len(find_items([str(tmp_path), str(tmp_path / '*.png'), str(tmp_path / 'a.png')])) == 1


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path: Path) -> None:
    (tmp_path / 'a[1].png').write_bytes(b'.')
    (tmp_path / 'a1.png').write_bytes(b'.')
    assert [item.name for item in find_items([str(tmp_path / 'a[1].png')])] == ['a[1]']


def test_label_maps_and_results_are_no_images(tmp_path: Path) -> None:
    for name in ('x/class1.tif', 'x/out/a.tif'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b'.')
    with pytest.raises(ConfigError, match='there is no image'):
        find_items([str(tmp_path / 'x')], out_dir=tmp_path / 'x/out')
    assert [item.name for item in find_items([str(tmp_path / 'x')])] == ['a']


def test_a_fingerprint_tells_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / 'a.tif'
    path.write_bytes(b'12')
    os.utime(path, ns=(5, 7))
    assert Item(path, 'a').fingerprint() == {'path': str(path), 'bytes': 2, 'mtime_ns': 7}


def test_ids_depend_on_the_name_alone() -> None:
    assert Item(Path('x/a.tif'), 'a').image_id == Item(Path('y/a.png'), 'a').image_id
    assert Item(Path('a.tif'), 'a').image_id != Item(Path('a.tif'), 'b').image_id
    assert 0 <= Item(Path('a.tif'), 'a').image_id < 1 << 31

"""Names of images: what they are called, and which ids and fingerprints follow."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.layout import RESULT_SUFFIXES
from cellseg_mm.predict.items import Item, look_for
from cellseg_mm.results.formats import FORMATS
from tests.support.dicom_slide import write_dicom_slide


@pytest.mark.parametrize(
    ('path', 'name'),
    [
        ('s/slide.ome.tif', 'slide'),
        ('s/slide.OME.TIFF', 'slide'),
        ('s/plate.1.png', 'plate.1'),
        ('case3/image.tif', 'case3'),
        ('case3/image.png', 'image'),  # cases hold TIFF; a picture is called as it is
        ('case3/IMAGE.TIF', 'case3'),
        ('s/imagej.tif', 'imagej'),
    ],
)
def test_names(tmp_path: Path, path: str, name: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_bytes(b'.')
    (item,) = look_for([str(file)]).items
    assert (item.path, item.name) == (file, name)


def test_a_missing_file_is_an_item_whose_own_turn_fails(tmp_path: Path) -> None:
    (item,) = look_for([str(tmp_path / 'gone.tif')]).items
    assert item.name == 'gone'
    with pytest.raises(FileNotFoundError):
        item.fingerprint()


def test_one_file_named_twice_is_one_item(tmp_path: Path) -> None:
    (tmp_path / 'a.png').write_bytes(b'.')
    words = [str(tmp_path), str(tmp_path / '*.png'), str(tmp_path / 'a.png')]
    assert len(look_for(words).items) == 1


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path: Path) -> None:
    (tmp_path / 'a[1].png').write_bytes(b'.')
    (tmp_path / 'a1.png').write_bytes(b'.')
    assert [item.name for item in look_for([str(tmp_path / 'a[1].png')]).items] == ['a[1]']


def test_label_maps_and_results_are_no_images(tmp_path: Path) -> None:
    for name in ('x/class1.tif', 'x/out/a.tif'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b'.')
    with pytest.raises(ConfigError, match='there is no image'):
        look_for([str(tmp_path / 'x')], out_dir=tmp_path / 'x/out')
    assert [item.name for item in look_for([str(tmp_path / 'x')]).items] == ['a']


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'.')


def test_the_suffixes_of_all_formats_are_known_as_results() -> None:
    pictures = {suffix for suffix, _ in FORMATS.values() if suffix != '.geojson'}
    assert pictures <= set(RESULT_SUFFIXES)


@pytest.mark.parametrize('asked', ['', '*', '**/*', 'first', 'first/*'])
def test_results_are_no_images_whatever_folder_they_lie_in(tmp_path: Path, asked: str) -> None:
    results = ['first/a.labels.tif', 'first/A.OVERLAY.PNG', 'first/a.state.json']
    results += ['first/run/val_pictures/x_iter_9.png', 'first/v/vis_data/vis_image/x_1.png']
    touch(tmp_path, 'a.tif', 'first/b.tif', *results)
    found = look_for([str(tmp_path / asked)], out_dir=tmp_path / 'second')
    assert {item.name for item in found.items} <= {'a', 'b'}
    assert asked == '*' or any('results of this program' in note for note in found.notes)


def test_results_that_are_named_are_left_out_beside_images(tmp_path: Path) -> None:
    touch(tmp_path, 'a.tif', 'a.overlay.png', 'a.cells.csv')
    words = [str(path) for path in sorted(tmp_path.iterdir())]  # as a shell expands a pattern
    found = look_for(words)
    assert [item.name for item in found.items] == ['a']
    assert found.notes == ('left out: 2 results of this program',)
    with pytest.raises(ConfigError, match=r'no image .left out: 1 results of'):
        look_for([words[1]])


def test_what_is_left_out_is_counted_by_suffix(tmp_path: Path) -> None:
    names = ['a.tif', 'b.mov', 'c.MOV', 'd.txt', 'noext', 'class1.tif', '._a.tif', '.DS_Store']
    touch(tmp_path, *names)
    found = look_for([str(tmp_path)])
    assert [item.name for item in found.items] == ['a']
    assert found.notes == (
        'left out: 1 label maps (class1.tif ...)',
        'left out: files that are no images by their suffix (2 .mov, 1 .txt, 1 without suffix)',
    )
    (tmp_path / 'a.tif').unlink()
    with pytest.raises(ConfigError, match=r'no image .*2 \.mov, 1 \.txt'):
        look_for([str(tmp_path)])


@pytest.mark.parametrize(
    ('names', 'called'),
    [
        (['x/a.tif', 'x/a.png', 'x/b.tif'], ['a.png', 'a.tif', 'b']),
        (['p/a.tif', 'q/a.tif'], ['p_a', 'q_a']),
        (['p/c/image.tif', 'q/c/image.tif'], ['p_c', 'q_c']),
        # a.png would be called like the image of another file
        (['x/a.tif', 'x/a.png', 'x/a.png.tif'], ['a.png', 'x_a.png', 'x_a.tif']),
    ],
)
def test_a_clash_of_names_gives_longer_names(
    tmp_path: Path, names: list[str], called: list[str]
) -> None:
    touch(tmp_path, *names)
    found = look_for([str(tmp_path)])
    assert [item.name for item in found.items] == called
    assert len({item.path for item in found.items}) == len(names)
    assert not found.refused
    (note,) = found.notes
    assert note.startswith('2 images would be called ')


def test_a_clash_that_no_name_solves_costs_one_image(tmp_path: Path) -> None:
    # decomposed, and the other case: one file on a Mac
    touch(tmp_path, 'r/\u00c4.tif', 'r/a\u0308.tif', 'r/z.tif')
    found = look_for([str(tmp_path)])
    assert len(found.items) == 2
    ((path, message),) = found.refused.items()
    assert path not in {str(item.path) for item in found.items}
    assert 'different names, also without case' in message


def test_a_fingerprint_tells_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / 'a.tif'
    path.write_bytes(b'12')
    os.utime(path, ns=(5, 7))
    assert Item(path, 'a').fingerprint() == {'path': str(path), 'bytes': 2, 'mtime_ns': 7}


def test_ids_depend_on_the_name_alone() -> None:
    assert Item(Path('x/a.tif'), 'a').image_id == Item(Path('y/a.png'), 'a').image_id
    assert Item(Path('a.tif'), 'a').image_id != Item(Path('a.tif'), 'b').image_id
    assert 0 <= Item(Path('a.tif'), 'a').image_id < 1 << 31


def test_a_zarr_store_is_one_image(tmp_path: Path) -> None:
    for name in ('s/a.ome.zarr/zarr.json', 's/a.ome.zarr/0/c/0/0', 's/b/.zattrs', 's/b/0/0.0'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b'12345')
    found = look_for([str(tmp_path / 's')])
    assert [(item.name, item.path.name) for item in found.items] == [
        ('a', 'a.ome.zarr'),
        ('b', 'b'),
    ]
    assert not found.notes  # no chunk is a file of its own
    (item,) = look_for([str(tmp_path / 's/a.ome.zarr')]).items
    (same,) = look_for([str(tmp_path / 's/*.zarr')]).items
    assert item == same
    before = item.fingerprint()
    assert before['bytes'] == 10
    (tmp_path / 's/a.ome.zarr/0/c/0/0').write_bytes(b'123456')
    assert item.fingerprint() != before


def test_a_mirax_slide_changes_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / 'a').mkdir()
    for name in ('a.mrxs', 'a/Slidedat.ini', 'a/Data0000.dat'):
        (tmp_path / name).write_bytes(b'123')
    (item,) = look_for([str(tmp_path)]).items
    assert item.name == 'a'
    assert item.fingerprint()['bytes'] == 9


def test_a_dicom_slide_of_several_files_is_one_image(tmp_path: Path) -> None:
    level = np.zeros((5, 7, 3), np.uint8)
    for name in 'ab':
        write_dicom_slide(tmp_path / name, [level] * 3, (0.25, 0.25))
    found = look_for([str(tmp_path)])
    assert [item.path for item in found.items] == [tmp_path / 'a/0.dcm', tmp_path / 'b/0.dcm']
    assert 'left out: 4 further files of DICOM slides' in found.notes
    (tmp_path / 'c.dcm').write_bytes(b'no DICOM')
    (tmp_path / 'd.dcm').write_bytes(b'no DICOM')
    names = [item.path.name for item in look_for([str(tmp_path)]).items]
    assert sorted(names) == ['0.dcm', '0.dcm', 'c.dcm', 'd.dcm']

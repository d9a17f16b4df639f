"""Each kind of bad image, label map and id map gives its own sentence, or is read rightly.

The sentences are matched on what is special to the fault, and every message names its file.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_mm.core.errors import CellSegError, DataError, IdMapError, ImageError, LabelMapError
from cellseg_mm.data import labels
from cellseg_mm.data.labels import Case

HW = (17, 11)
IMAGE = np.random.default_rng(0).integers(0, 256, (*HW, 3)).astype(np.uint8)
MAP = np.zeros(HW, dtype=np.float64)
MAP[2:5, 3:9], MAP[10, 10] = 1, 2  # the second has 1 px


def write(path: Path, array: np.ndarray, **kwargs) -> None:
    tifffile.imwrite(path, array, **kwargs)


def truncated(path: Path, *, keep: float) -> None:
    write(path, IMAGE, photometric='rgb', compression='lzw', rowsperstrip=2)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def patched(path: Path, tag: int, value: int, **kwargs) -> None:
    """Write a good file, then change one header value."""
    write(path, kwargs.pop('array', IMAGE), **kwargs)
    with tifffile.TiffFile(path) as tif:
        found = tif.pages[0].tags[tag]
        offset, is_long = found.valueoffset, found.dtype == 4
    with path.open('r+b') as stream:
        stream.seek(offset)
        stream.write(struct.pack('<I' if is_long else '<H', value))


def endless_link(path: Path) -> None:
    other = path.with_name('other.tif')
    path.symlink_to(other)
    other.symlink_to(path)


def wrong_lzw_code(path: Path) -> None:
    """Make the first code after the clear code 510, which no table has yet.

    imagecodecs' own decoder takes it, and returns rubbish or ends the process.
    """
    write(path, IMAGE, photometric='rgb', compression='lzw')
    with tifffile.TiffFile(path) as tif:
        offset = tif.pages[0].dataoffsets[0]
    with path.open('r+b') as stream:
        stream.seek(offset)
        first = int.from_bytes(stream.read(3), 'big')
        assert first >> 15 == 256  # nine bits: clear
        stream.seek(offset)
        stream.write((256 << 15 | 510 << 6 | first & 63).to_bytes(3, 'big'))


BAD_IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    'missing': (lambda p: None, r'cannot be opened \(No such file'),
    'zero bytes': (lambda p: p.write_bytes(b''), r'is empty \(0 bytes\)'),
    'text': (lambda p: p.write_text('see mail of Tuesday\n'), 'this is a text file, not an image'),
    'PNG': (lambda p: p.write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(40)), 'this is a PNG file'),
    'Git LFS': (
        lambda p: p.write_text('version https://git-lfs.github.com/spec/v1\n'),
        'a Git LFS pointer.*run git lfs pull',
    ),
    'other bytes': (lambda p: p.write_bytes(bytes(range(200))), 'begins with 00 01 02 03'),
    'header alone': (lambda p: p.write_bytes(b'II*\0'), 'damaged'),
    'no page': (lambda p: p.write_bytes(b'II*\0\0\0\0\0'), 'has no image in it|damaged'),
    'page beyond the end': (lambda p: p.write_bytes(b'II*\0\xf0\0\0\0'), 'has no image|damaged'),
    'truncated pixels': (lambda p: truncated(p, keep=0.9), 'the file is truncated: it has'),
    'truncated early': (lambda p: truncated(p, keep=0.3), 'truncated|damaged'),
    'folder': (lambda p: p.mkdir(), 'this is a folder'),
    'pipe': (os.mkfifo, 'not a regular file'),
    'link loop': (endless_link, r'cannot be opened \(Too many levels of symbolic links'),
    'dangling link': (lambda p: p.symlink_to('nowhere'), 'cannot be opened'),
    'several pages': (
        lambda p: write(p, np.stack([IMAGE] * 3), photometric='rgb'),
        'the TIFF has 3 pages; expected one image per file',
    ),
    'CMYK': (
        lambda p: write(p, np.dstack([IMAGE, IMAGE[..., 0]]), photometric='separated'),
        'the colours are CMYK; expected RGB or grey',
    ),
    'CIELAB': (lambda p: write(p, IMAGE, photometric='cielab'), 'the colours are CIELAB'),
    'five channels': (
        lambda p: write(
            p, np.zeros((*HW, 5), np.uint8), photometric='minisblack', planarconfig='contig'
        ),
        r'5 values per pixel, 0 of them alpha; expected RGB, grey, or these with alpha',
    ),
    'volume': (
        lambda p: write(p, np.zeros((16, 16, 16), np.uint8), volumetric=True, tile=(16, 16, 16)),
        'planes in depth; expected a flat image',
    ),
    'turned': (
        lambda p: write(p, IMAGE, photometric='rgb', extratags=[(274, 'H', 1, 6, True)]),
        'the orientation tag is 6',
    ),
    'NaN': (
        lambda p: write(p, np.where(MAP == 1, np.nan, MAP)),
        '18 values are NaN or infinite; expected finite numbers',
    ),
    'infinity': (
        lambda p: write(p, np.where(MAP == 2, np.inf, MAP)),
        '1 values are NaN or infinite',
    ),
    'minus infinity': (
        lambda p: write(p, np.where(MAP == 2, -np.inf, MAP)),
        '1 values are NaN or infinite',
    ),
    'negative': (lambda p: write(p, -MAP), r'values down to -2.0; expected none below 0'),
    'negative integers': (lambda p: write(p, (-MAP).astype(np.int16)), 'values down to -2'),
    'complex': (lambda p: write(p, MAP.astype(np.complex64)), 'values of type complex64'),
    'bomb by the header': (
        lambda p: patched(p, 257, 2**31 - 1, photometric='rgb'),
        r'the header promises 2147483647 x 11 px; at most 100000000 px are accepted',
    ),
    'bomb by tiles': (
        lambda p: patched(p, 322, 2**31 - 16, photometric='rgb', tile=(16, 16), compression='zlib'),
        'its tiles are 16 x 2147483632 px',
    ),
    'no rows': (lambda p: patched(p, 257, 0, photometric='rgb'), 'the image is 0 x 11 px'),
    'samples beyond reason': (
        lambda p: patched(p, 277, 60000, photometric='rgb'),
        'there are 60000 values per pixel',
    ),
    'strip left out': (
        lambda p: patched(p, 273, 0, photometric='rgb', compression='lzw'),
        '0 of 1 strips or tiles have data; expected all',
    ),
    'damaged deflate': (
        lambda p: patched(p, 259, 5, photometric='rgb', compression='zlib'),
        'the file is damaged or of an unknown kind',
    ),
    'wrong LZW code': (
        wrong_lzw_code,
        r'damaged or of an unknown kind \(Using code not yet in table',
    ),
    'unknown compression': (
        lambda p: patched(p, 259, 60001, photometric='rgb', compression='zlib'),
        'the file is damaged or of an unknown kind',
    ),
}


@pytest.mark.parametrize('kind', BAD_IMAGES)
def test_bad_image(tmp_path: Path, kind: str) -> None:
    build, sentence = BAD_IMAGES[kind]
    path = tmp_path / 'with space é.tif'
    build(path)
    with pytest.raises(ImageError, match=sentence) as caught:
        labels.read_image(path)
    assert str(caught.value).startswith(str(path))
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('hw', [(1, 1), (1, 29), (29, 1), (2, 1)], ids=str)
@pytest.mark.parametrize('compression', [None, 'lzw'])
def test_tiny_images_and_maps(tmp_path: Path, hw: tuple[int, int], compression: str | None) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*hw, 3)).astype(np.uint8)
    write(tmp_path / 'i.tif', image, photometric='rgb', compression=compression)
    assert np.array_equal(labels.read_image(tmp_path / 'i.tif'), image)
    label_map = np.arange(hw[0] * hw[1]).reshape(hw)
    write(tmp_path / 'm.tif', label_map.astype(np.uint16), compression=compression)
    assert np.array_equal(labels.read_label_map(tmp_path / 'm.tif', hw), label_map)


def test_limit_of_pixels_is_a_setting(tmp_path: Path) -> None:
    write(tmp_path / 'i.tif', IMAGE, photometric='rgb')
    n_pixels = HW[0] * HW[1]
    assert labels.read_image(tmp_path / 'i.tif', max_pixels=n_pixels).shape == (*HW, 3)
    with pytest.raises(ImageError, match='at most 186 px are accepted; cut the image, or raise'):
        labels.read_image(tmp_path / 'i.tif', max_pixels=n_pixels - 1)


def test_bomb_costs_no_memory(tmp_path: Path) -> None:
    # 100 MB of address space on top of what is used is far less than 30000 x 30000 pixels.
    patched(
        tmp_path / 'b.tif', 257, 30000, array=np.zeros((64, 30000), np.uint8), compression='zlib'
    )
    code = (
        'import resource, sys\n'
        'from cellseg_mm.data import labels, tiff\n'
        'import tifffile, imagecodecs\n'
        'used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()\n'
        'resource.setrlimit(resource.RLIMIT_AS, (used + 10**8, -1))\n'
        'try:\n'
        '    labels.read_image(sys.argv[1])\n'
        'except labels.ImageError as error:\n'
        '    print(error)\n'
    )
    path = str(tmp_path / 'b.tif')
    done = subprocess.run(
        [sys.executable, '-c', code, path], capture_output=True, text=True, check=True
    )
    assert 'the header promises 30000 x 30000 px' in done.stdout


def test_unreadable_file(tmp_path: Path) -> None:
    """Root may read everything, so another process gives its rights up before it reads."""
    write(tmp_path / 'i.tif', IMAGE, photometric='rgb')
    tmp_path.chmod(0o755)
    (tmp_path / 'i.tif').chmod(0)
    code = (
        'import os\n'
        'from cellseg_mm.data import labels\n'
        'if os.geteuid() == 0:\n'
        '    os.setuid(65534)\n'  # the path is relative, so the folders above do not matter
        'try:\n'
        "    labels.read_image('i.tif')\n"
        'except labels.ImageError as error:\n'
        '    print(error)\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        'i.tif: cannot be opened (Permission denied); expected a readable image file; '
        'check the path, the link and the permissions.\n'
    )


BAD_MAPS: dict[str, tuple[np.ndarray, str]] = {
    'other size': (MAP[:-1], r'label map is 16 x 11 px, the image is 17 x 11 px; they must match'),
    'transposed': (
        MAP.T,
        r'label map is 11 x 17 px, the image is 17 x 11 px \(height and width are swapped\)',
    ),
    'NaN': (np.where(MAP == 2, np.nan, MAP), '1 pixels have an id that is NaN or infinite'),
    'infinity': (np.where(MAP == 1, np.inf, MAP), '18 pixels have an id that is NaN or infinite'),
    'NaN in float32': (np.where(MAP == 2, np.nan, MAP).astype('f4'), 'NaN or infinite'),
    'negative': (np.where(MAP == 2, -3, MAP), r'negative \(such as -3.0\)'),
    'negative integers': (np.where(MAP == 2, -3, MAP).astype(np.int8), r'negative \(such as -3\)'),
    'fractional': (MAP * 1.5, r'18 pixels have an id that is fractional \(such as 1.5\)'),
    'below one': (MAP / 4, r'19 pixels have an id that is fractional \(such as 0.25\)'),
    'huge': (MAP * 2.0**31, r'19 pixels have an id that is above 2147483647'),
    'just too large in float32': (
        np.where(MAP == 2, 2**31, MAP).astype('f4'),
        '1 pixels have an id that is above 2147483647',
    ),
    'huge unsigned': (
        np.where(MAP == 2, 2**64 - 1, MAP.astype('u8')).astype('u8'),
        '1 pixels have an id that is above 2147483647',
    ),
    'colours': (IMAGE, 'the label map has 3 channels; expected one with an id per pixel'),
    'complex': (MAP.astype(np.complex64), 'values of type complex64; expected ids'),
}


@pytest.mark.parametrize('kind', BAD_MAPS)
@pytest.mark.parametrize('reader', ['map', 'layers'])
def test_bad_label_map(tmp_path: Path, kind: str, reader: str) -> None:
    array, sentence = BAD_MAPS[kind]
    path = tmp_path / 'class1.tif'
    kwargs = {'photometric': 'rgb'} if array.ndim == 3 else {}
    write(path, array, **kwargs)
    case = Case('a', tmp_path / 'image.tif', {0: path}, 1, HW)
    with pytest.raises(LabelMapError, match=sentence) as caught:
        labels.read_label_map(path, HW) if reader == 'map' else labels.read_label_layers(case)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize('kind', ['zero bytes', 'text', 'truncated pixels', 'several pages'])
def test_unreadable_label_map(tmp_path: Path, kind: str) -> None:
    build, sentence = BAD_IMAGES[kind]
    build(tmp_path / 'class1.tif')
    with pytest.raises(LabelMapError, match=sentence):
        labels.read_label_map(tmp_path / 'class1.tif', HW)


def test_odd_label_maps_that_are_right(tmp_path: Path) -> None:
    shared = np.where(MAP == 1, 2, 0)
    paths = {}
    for class_id, array in enumerate((MAP, shared, np.zeros(HW))):
        paths[class_id] = tmp_path / f'class{class_id + 1}.tif'
        write(paths[class_id], array)
    found = labels.read_label_layers(Case('a', tmp_path / 'image.tif', paths, 1, HW))
    # The id 2 of two classes makes two instances, 1 px is an instance, all-background is none.
    assert found.class_ids.tolist() == [0, 0, 1]
    assert found.original_ids.tolist() == [1, 2, 2]
    areas = [int((found.layers[found.layer_of[i]] == i + 1).sum()) for i in range(3)]
    assert areas == [18, 1, 18]


# ---- folders


def good_case(root: Path, name: str) -> Path:
    folder = root / 'train' / name
    folder.mkdir(parents=True)
    write(folder / 'image.tif', IMAGE, photometric='rgb')
    write(folder / 'class1.tif', MAP)
    return folder


def problems_of(root: Path, split: str = 'train') -> list[str]:
    with pytest.raises(DataError) as caught:
        labels.find_cases(root, split, 2)
    return caught.value.problems


def test_all_problems_of_a_folder_are_listed_at_once(tmp_path: Path) -> None:
    good_case(tmp_path, 'a good one')
    (good_case(tmp_path, 'b no image') / 'image.tif').unlink()
    write(good_case(tmp_path, 'c doubled') / 'Class1.TIF', MAP)
    write(good_case(tmp_path, 'd class 3') / 'class3.tif', MAP)
    write(good_case(tmp_path, 'e class 0') / 'class0.tif', MAP)
    (good_case(tmp_path, 'f empty é') / 'image.tif').write_bytes(b'')
    write(good_case(tmp_path, 'g two images') / 'image.tiff', IMAGE, photometric='rgb')
    (tmp_path / 'train/h loop').symlink_to('h loop')
    (tmp_path / 'train/i nowhere').symlink_to('nowhere')
    (tmp_path / 'train/j parent').symlink_to('.')
    expected = [
        ('b no image', 'no image.tif in it; expected one'),
        ('c doubled', 'Class1.TIF and class1.tif are both the class 1 file; expected one'),
        ('d class 3/class3.tif', 'class 3, but there are 2 classes; expected class1.tif to class2'),
        ('e class 0/class0.tif', 'class 0, but there are 2 classes'),
        ('f empty é/image.tif', 'is empty (0 bytes)'),
        ('g two images', 'image.tif and image.tiff are both the image file'),
        ('h loop', 'cannot be followed (Too many levels of symbolic links)'),
        ('i nowhere', 'cannot be followed (No such file or directory)'),
        ('j parent', 'no image.tif in it'),
    ]
    found = problems_of(tmp_path)
    assert len(found) == len(expected)
    for sentence, (where, what) in zip(found, expected, strict=True):
        assert sentence.startswith(f'{tmp_path}/train/{where}: ')
        assert what in sentence


def test_missing_class_files_are_classes_without_cells(tmp_path: Path) -> None:
    (good_case(tmp_path, 'a') / 'class1.tif').unlink()
    (case,) = labels.find_cases(tmp_path, 'train', 2)
    assert case.label_paths == {}
    assert len(labels.read_gt(case)) == 0


@pytest.mark.parametrize('split', ['train', 'test'])
def test_missing_folder(tmp_path: Path, split: str) -> None:
    found = problems_of(tmp_path, split)
    assert 'cannot be listed (No such file or directory)' in found[0]
    assert str(tmp_path / split) in found[0]


def test_folder_without_cases(tmp_path: Path) -> None:
    (tmp_path / 'train/.hidden').mkdir(parents=True)
    assert 'no case folder in it; expected <name>/image.tif' in problems_of(tmp_path)[0]


def test_name_that_is_not_utf8(tmp_path: Path) -> None:
    good_case(tmp_path, 'a')
    (tmp_path / 'train' / os.fsdecode(b'm\xfcller')).mkdir()
    assert 'is not valid UTF-8' in problems_of(tmp_path)[0]


def test_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 'train' or 'test'"):
        labels.find_cases(tmp_path, 'val', 2)


# ---- id maps


def entry(name: object = 'a.tif', image_id: object = 1, height: object = 17, width: object = 11):
    return {'file_name': name, 'id': image_id, 'height': height, 'width': width}


def make_test(root: Path, content: object, names: tuple[str, ...] = ('a.tif',)) -> Path:
    (root / 'test_release').mkdir()
    for name in names:
        write(root / 'test_release' / name, IMAGE, photometric='rgb')
    path = root / 'test_image_name_to_ids.json'
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def without(key: str) -> dict:
    return {k: v for k, v in entry().items() if k != key}


BAD_ID_MAPS: dict[str, tuple[object, str]] = {
    'empty file': ('', 'not valid JSON'),
    'cut off': ('[{"file_name": "a.tif", ', 'not valid JSON'),
    'deep': ('[' * 100_000, 'not valid JSON'),
    'an object': ({'a.tif': 1}, 'holds dict; expected a list of objects'),
    'a number': ('3', 'holds int; expected a list'),
    'an empty list': ([], 'holds an empty list'),
    'names alone': (['a.tif'], "entry 1: 'a.tif'; expected an object"),
    'no name': ([without('file_name')], 'file_name is None; expected the name of a test image'),
    'name as number': ([entry(7)], 'file_name is 7'),
    'no id': ([without('id')], r'\(a.tif\): id is None; expected an integer from 0'),
    'no height': ([without('height')], 'height is None; expected an integer from 1'),
    'id as text': ([entry(image_id='1')], 'id is 1; expected an integer'),
    'id as truth': ([entry(image_id=True)], 'id is True; expected an integer'),
    'negative id': ([entry(image_id=-1)], 'id is -1; expected an integer from 0'),
    'fractional id': ([entry(image_id=1.5)], 'id is 1.5'),
    'huge id': ([entry(image_id=2**40)], 'id is 1099511627776'),
    'NaN size': ('[{"file_name": "a.tif", "id": 1, "height": NaN, "width": 1}]', 'height is nan'),
    'zero size': ([entry(width=0)], 'width is 0; expected an integer from 1'),
    'same name twice': ([entry(), entry(image_id=2)], "entry 2: name 'a' is also that of entry 1"),
    'same id twice': ([entry(), entry('b.tif')], 'entry 2: id 1 is also that of entry 1'),
    'parent folder': ([entry('../a.tif')], r"file_name is '../a.tif'; expected a plain name"),
    'absolute path': ([entry('/etc/a.tif')], r"file_name is '/etc/a.tif'; expected a plain name"),
    'Windows path': ([entry('..\\a.tif')], 'expected a plain name that ends in .tif'),
    'sub-folder': ([entry('x/a.tif')], 'without folders'),
    'half a letter': (
        '[{"file_name": "\\ud800.tif", "id": 1}]',
        r"is '\\ud800.tif'; expected a plain",
    ),
    'half a letter as id': (
        '[{"file_name": "a.tif", "id": "\\ud800"}]',
        r'id is \\ud800; expected',
    ),
    'zero byte in name': ([entry('a\0.tif')], 'expected a plain name'),
    'two dots': ([entry('..')], 'expected a plain name'),
    'other suffix': ([entry('a.png')], 'expected a plain name that ends in .tif'),
}


@pytest.mark.parametrize('kind', BAD_ID_MAPS)
def test_bad_id_map(tmp_path: Path, kind: str) -> None:
    content, sentence = BAD_ID_MAPS[kind]
    path = make_test(tmp_path, content)
    with pytest.raises((IdMapError, DataError), match=sentence):
        labels.read_id_map(path)
    with pytest.raises(DataError, match=sentence) as caught:
        labels.find_cases(tmp_path, 'test', 2)
    assert all(problem.startswith(str(path)) for problem in caught.value.problems)
    str(caught.value).encode()  # can be printed


def test_id_map_missing_or_a_folder(tmp_path: Path) -> None:
    path = make_test(tmp_path, [entry()])
    path.unlink()
    assert 'cannot be read (No such file or directory)' in problems_of(tmp_path, 'test')[0]
    path.mkdir()
    assert 'cannot be read (Is a directory)' in problems_of(tmp_path, 'test')[0]


def test_images_and_id_map_must_agree(tmp_path: Path) -> None:
    names = ('a.tif', 'b.tif', 'c.tif', 'd.tif', 'e.tif', 'e.tiff')
    entries = [entry(), entry('b.tif', 2, 11, 17), entry('c.tif', 3, 17, 12), entry('e.tif', 5)]
    path = make_test(tmp_path, entries, names)
    (tmp_path / 'test_release/0.tif').write_text('not a picture')
    found = problems_of(tmp_path, 'test')
    folder = tmp_path / 'test_release'
    assert [sentence.split(': ')[0] for sentence in found] == [
        f'{folder}/e.tiff',
        f'{folder}/0.tif',
        f'{folder}/b.tif',
        f'{folder}/c.tif',
        f'{folder}/d.tif',
        f'{folder}/e.tiff',
    ]
    assert 'e.tif has the same case name' in found[0]
    assert f'not in {path}; expected an entry with its id' in found[1]
    assert '17 x 11 px' in found[2]
    assert '(height and width are swapped); they must match' in found[2]
    assert 'the image is 17 x 11 px, test_image_name_to_ids.json says 17 x 12 px;' in found[3]
    assert f'not in {path}' in found[4]


def test_bad_images_are_listed_beside_a_bad_id_map(tmp_path: Path) -> None:
    make_test(tmp_path, [], ('a.tif', 'b.tif'))
    (tmp_path / 'test_release/b.tif').write_bytes(b'')
    found = problems_of(tmp_path, 'test')
    assert len(found) == 2
    assert 'holds an empty list' in found[0]
    assert 'b.tif: the file is empty' in found[1]


def test_link_out_of_the_data_folder_is_the_users_own_business(tmp_path: Path) -> None:
    """A link that the user made is followed; only the id map's text cannot lead anywhere."""
    write(tmp_path / 'elsewhere.tif', IMAGE, photometric='rgb')
    make_test(tmp_path, [entry()], ())
    (tmp_path / 'test_release/a.tif').symlink_to(tmp_path / 'elsewhere.tif')
    (case,) = labels.find_cases(tmp_path, 'test', 2)
    assert np.array_equal(labels.read_image(case.image_path), IMAGE)


# ---- damage at random places


@pytest.mark.parametrize('seed', range(4))
def test_random_damage_is_a_sentence_or_pixels(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path = tmp_path / 'i.tif'
    kwargs = [
        {'photometric': 'rgb', 'compression': 'lzw', 'predictor': True},
        {'photometric': 'rgb', 'compression': 'zlib', 'tile': (16, 16)},
        {'photometric': 'rgb'},
        {'photometric': 'rgb', 'compression': 'jpeg'},
    ][seed]
    write(path, IMAGE, **kwargs)
    good = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    n_refused = 0
    for _ in range(150):
        bad = good.copy()
        at = rng.integers(len(bad), size=rng.integers(1, 6))
        bad[at] = rng.choice([0, 1, 127, 128, 255], size=len(at))
        path.write_bytes(bad[: rng.integers(len(bad) // 2, len(bad) + 1)].tobytes())
        for read in (labels.read_image, labels.read_label_map):
            try:
                found = read(path)
            except CellSegError:
                n_refused += 1
            else:
                assert found.shape[:2] > (0, 0)
    assert n_refused > 150

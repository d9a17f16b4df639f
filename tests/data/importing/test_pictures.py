"""Pictures are read right, with all their bits, or refused with the way out."""

from __future__ import annotations

import os
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from cellseg_mm.core.errors import ImageError, LabelMapError
from cellseg_mm.data.importing.pictures import read_grid, read_picture
from cellseg_mm.data.importing.sources import Tally
from cellseg_mm.data.labels import read_image
from tests.support.import_sources import HW, IMAGE, f_mask, run, write_svs

DEEP = np.random.default_rng(1).integers(0, 65536, (*HW, 3)).astype(np.uint16)


def read(path: Path, **options: int) -> np.ndarray:
    """Read a picture of which nothing is to be remarked."""
    tally = Tally()
    picture = read_picture(path, tally, **{'max_pixels': 10_000, **options})
    assert tally.remarks == []
    return picture


@pytest.mark.parametrize(
    ('mode', 'values', 'expected'),
    [
        pytest.param('L', IMAGE[..., 0], np.repeat(IMAGE[..., :1], 3, 2), id='grey'),
        pytest.param('RGBA', np.dstack([IMAGE, IMAGE[..., 0]]), IMAGE, id='alpha is dropped'),
        pytest.param('I;16', DEEP[..., 0], np.repeat(DEEP[..., :1], 3, 2), id='16 bit'),
        pytest.param(
            '1', IMAGE[..., 0] > 99, np.repeat((IMAGE[..., :1] > 99) * 255, 3, 2), id='1 bit'
        ),
    ],
)
def test_pictures(tmp_path: Path, mode: str, values: np.ndarray, expected: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / 'a.png')
    with Image.open(tmp_path / 'a.png') as opened:
        assert opened.mode == mode
    assert (read(tmp_path / 'a.png') == expected).all()


def test_palettes_become_colours(tmp_path: Path) -> None:
    picture = Image.fromarray(IMAGE).quantize(9)
    picture.save(tmp_path / 'a.png')
    assert (read(tmp_path / 'a.png') == np.asarray(picture.convert('RGB'))).all()


def test_16_bits_stay_16_bits(tmp_path: Path) -> None:
    """Pillow reads 16-bit colours of a PNG as 8 bits without a word."""
    (tmp_path / 'a.png').write_bytes(imagecodecs.png_encode(DEEP))
    tifffile.imwrite(tmp_path / 'b.tif', DEEP, photometric='rgb')
    tifffile.imwrite(tmp_path / 'c.tif', DEEP[..., 0])
    with Image.open(tmp_path / 'a.png') as opened:
        assert opened.mode == 'RGB'
    for name, expected in {'a.png': DEEP, 'b.tif': DEEP, 'c.tif': DEEP[..., [0, 0, 0]]}.items():
        found = read(tmp_path / name)
        assert found.dtype == np.uint16
        assert (found == expected).all()


def test_imported_16_bits_are_those_of_the_source(tmp_path: Path) -> None:
    source = tmp_path / 'in'
    source.mkdir()
    tifffile.imwrite(source / 'a.tif', DEEP, photometric='rgb')
    tifffile.imwrite(source / 'a_masks.tif', f_mask(1, 1).astype(np.uint8))
    run('label-map', source, tmp_path / 'out')
    written = tmp_path / 'out' / 'train' / 'a' / 'image.tif'
    assert (tifffile.imread(written)[..., :3] == DEEP).all()
    assert (read_image(written) == read_image(source / 'a.tif')).all()


@pytest.mark.parametrize(
    ('values', 'bits'), [(np.float32(IMAGE) / 255, 32), (IMAGE.astype(np.uint32) * 9999, 32)]
)
def test_what_becomes_8_bits_is_said(tmp_path: Path, values: np.ndarray, bits: int) -> None:
    tifffile.imwrite(tmp_path / 'a.tif', values, photometric='rgb')
    tally = Tally()
    found = read_picture(tmp_path / 'a.tif', tally, max_pixels=10_000)
    assert (found == read_image(tmp_path / 'a.tif')).all()
    assert tally.remarks == [
        f'values of {bits} bits that are no plain 16-bit integers became 8 bits'
    ]


def test_slides_are_read_at_full_resolution(tmp_path: Path) -> None:
    write_svs(tmp_path / 'a.svs')
    assert (read(tmp_path / 'a.svs') == IMAGE).all()


def test_pictures_that_are_refused(tmp_path: Path) -> None:
    Image.fromarray(IMAGE).save(tmp_path / 'a.png')
    with pytest.raises(ImageError, match=r'at most 100 px are accepted; .*--max-pixels'):
        read(tmp_path / 'a.png', max_pixels=100)
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'a.png').read_bytes()[:300])
    (tmp_path / 'text.jpg').write_text('no picture')
    for name in ('cut.png', 'text.jpg', 'none.png'):
        with pytest.raises(ImageError, match=f'{name}: (this|cannot)'):
            read(tmp_path / name)
    (tmp_path / 'text.svs').write_text('no slide')
    with pytest.raises(ImageError, match=r'text\.svs: '):
        read(tmp_path / 'text.svs')
    write_svs(tmp_path / 'big.svs')
    with pytest.raises(ImageError, match='level 0 has 17 x 23 px; at most 100'):
        read(tmp_path / 'big.svs', max_pixels=100)
    Image.fromarray(IMAGE).convert('CMYK').save(tmp_path / 'cmyk.jpg')
    with pytest.raises(ImageError, match='the colours are CMYK'):
        read(tmp_path / 'cmyk.jpg')


def test_advice_is_for_who_imports(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / 'a.tif', IMAGE, photometric='rgb')
    with pytest.raises(ImageError, match='or raise --max-pixels'):
        read(tmp_path / 'a.tif', max_pixels=100)
    (tmp_path / 'a.tif').write_bytes((tmp_path / 'a.tif').read_bytes()[:300])
    with pytest.raises(ImageError) as error:
        read(tmp_path / 'a.tif')
    assert 'exclude.txt' not in str(error.value)


@pytest.mark.parametrize('name', ['a.jpg', 'a.png', 'a.tif'])
def test_turned_pictures_are_refused(tmp_path: Path, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    if name == 'a.tif':
        tifffile.imwrite(tmp_path / name, IMAGE, photometric='rgb', extratags=[(274, 3, 1, 6)])
    else:
        Image.fromarray(IMAGE).save(tmp_path / name, exif=exif)
    with pytest.raises(ImageError, match='turn'):
        read(tmp_path / name)
    ids = IMAGE[..., 0]
    if name == 'a.tif':
        tifffile.imwrite(tmp_path / name, ids, extratags=[(274, 3, 1, 6)])
    if name != 'a.jpg':
        with pytest.raises(LabelMapError, match='turn'):
            read_grid(tmp_path / name, HW)


def write_stack(path: Path) -> None:
    """Three planes; ImageJ lists one page of a large stack."""
    planes = np.stack([IMAGE[..., 0]] * 3)
    if path.suffix == '.png':
        first, *others = map(Image.fromarray, planes + np.arange(3, dtype=np.uint8)[:, None, None])
        first.save(path, save_all=True, append_images=others)
    else:
        tifffile.imwrite(path, planes, imagej=True, truncate=path.name.startswith('one'))


@pytest.mark.parametrize('name', ['pages.tif', 'one_page.tif', 'animated.png'])
def test_stacks_are_refused_by_name(tmp_path: Path, name: str) -> None:
    write_stack(tmp_path / name)
    for error, read_it in (
        (ImageError, lambda: read(tmp_path / name)),
        (LabelMapError, lambda: read_grid(tmp_path / name, HW)),
    ):
        with pytest.raises(error, match=f'{name}: .*(3 pages|3 planes|3 pictures).* alone'):
            read_it()


# ---- grids ----

IDS = np.zeros(HW, np.int64)
IDS[1:5, 2:9] = 3
IDS[8:15, 10:20] = 200


@pytest.mark.parametrize(
    ('name', 'values'),
    [
        pytest.param('a.png', IDS.astype(np.uint8), id='8 bit'),
        pytest.param('a.png', IDS.astype(np.uint16) * 300, id='16 bit PNG'),
        pytest.param('a.png', np.repeat(IDS.astype(np.uint8)[..., None], 3, 2), id='grey as RGB'),
        pytest.param('a.tif', np.repeat(IDS.astype(np.uint16)[..., None], 3, 2), id='RGB TIFF'),
        pytest.param(
            'a.png',
            np.dstack([*[IDS.astype(np.uint8)] * 3, np.full(HW, 255, np.uint8)]),
            id='grey as RGBA',
        ),
        pytest.param(
            'a.png', np.dstack([IDS.astype(np.uint8), np.full(HW, 255, np.uint8)]), id='alpha'
        ),
        pytest.param('a.bmp', IDS.astype(np.uint8), id='BMP'),
        pytest.param('a.tif', IDS.astype(np.uint32) * 400_000, id='32 bit'),
        pytest.param('a.tif', IDS.astype(np.uint64) * 2**40, id='64 bit'),
        pytest.param('a.tif', IDS.astype(np.float64) * 2**40, id='double'),
        pytest.param('a.tif', IDS.astype(np.float32), id='float'),
        pytest.param('a.tif', IDS > 0, id='bool'),
    ],
)
def test_ids_are_read_whole(tmp_path: Path, name: str, values: np.ndarray) -> None:
    path = tmp_path / name
    if name == 'a.tif':
        tifffile.imwrite(path, values, photometric='rgb' if values.ndim == 3 else 'minisblack')
    else:
        Image.fromarray(values).save(path)
    plain = values[..., 0] if values.ndim == 3 else values
    assert read_grid(path, HW).tolist() == plain.astype(np.int64).tolist()


def test_16_bit_colours_of_a_png_keep_their_ids(tmp_path: Path) -> None:
    ids = (IDS * 300).astype(np.uint16)
    (tmp_path / 'a.png').write_bytes(imagecodecs.png_encode(np.repeat(ids[..., None], 3, 2)))
    assert read_grid(tmp_path / 'a.png', HW).tolist() == ids.tolist()


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        pytest.param(IMAGE, 'has colours', id='colours'),
        pytest.param(DEEP, 'has colours', id='16-bit colours'),
        pytest.param(np.dstack([IMAGE[..., [0, 0, 0]], IMAGE[..., 1]]), 'transparent', id='alpha'),
        pytest.param(IDS.astype(np.int16) - 1, 'values down to -1', id='negative'),
        pytest.param(IDS.astype(np.float32) / 3, 'has fractions', id='fractions'),
        pytest.param(IDS + np.float64('nan'), 'NaN or infinite', id='nan'),
        pytest.param(
            (IDS * 2**20).astype(np.float32), 'above 16777216, which float32', id='float32'
        ),
        pytest.param((IDS * 100).astype(np.float16), 'above 2048, which float16', id='float16'),
        pytest.param(IDS.astype(np.uint64) * 2**57, 'above 9223372036854775807', id='uint64'),
        pytest.param(IDS.astype(np.complex64), 'type complex64', id='complex'),
        pytest.param(IDS.T.astype(np.uint8).copy(), 'must match', id='transposed'),
    ],
)
def test_what_are_no_ids_is_refused(tmp_path: Path, values: np.ndarray, message: str) -> None:
    kind = 'rgb' if values.ndim == 3 else 'minisblack'
    tifffile.imwrite(tmp_path / 'a.tif', values, photometric=kind)
    with pytest.raises(LabelMapError, match=message) as error:
        read_grid(tmp_path / 'a.tif', HW)
    assert 'export' in str(error.value)


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_palettes_count_by_index_if_0_is_background(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f'a.{suffix}'
    colours = np.random.default_rng(0).integers(1, 256, (256, 3))
    colours[0] = 0

    def write(indices: np.ndarray) -> None:
        if suffix == 'png':
            picture = Image.fromarray(indices).convert('P')
            picture.putpalette(colours.reshape(-1).tolist())
            picture.save(path)
        else:
            tifffile.imwrite(
                path, indices, photometric='palette', colormap=(colours.T * 257).astype(np.uint16)
            )

    write(IDS.astype(np.uint8))
    assert read_grid(path, HW).tolist() == IDS.tolist()
    colours = np.roll(colours, 7, axis=0)  # as a quantiser sorts them
    write((IDS + 7).astype(np.uint8))
    with pytest.raises(LabelMapError, match='palette in which black is number 7'):
        read_grid(path, HW)


def test_masks_with_white_as_zero_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / 'a.tif', (IDS > 0).astype(np.uint8), photometric='miniswhite')
    with pytest.raises(LabelMapError, match='white as zero'):
        read_grid(tmp_path / 'a.tif', HW)


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        (b'', 'the file is empty'),
        (b'version https://git-lfs.github.com/spec/v1', 'git lfs pull'),
        (b'\n<!doctype html>', 'a web page'),
        (b'\0\5\x16\7\0\2\0\0Mac OS X', 'resource fork'),
        (b'II*\0\x08\0\0\0', 'this is a TIFF file and cannot be read .*name it as what it is'),
    ],
)
def test_what_is_no_picture_is_called_what_it_is(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / 'a.png').write_bytes(content)
    for error, read_it in ((ImageError, read), (LabelMapError, lambda path: read_grid(path, HW))):
        with pytest.raises(error, match=reason):
            read_it(tmp_path / 'a.png')


def test_pipes_are_not_opened(tmp_path: Path) -> None:
    for name in ('a.png', 'a.svs'):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ImageError, match='this is not a regular file'):
            read(tmp_path / name)
        with pytest.raises(LabelMapError, match='this is not a regular file'):
            read_grid(tmp_path / name, HW)

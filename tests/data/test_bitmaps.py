"""PNG, JPEG and BMP: judged by their header, turned as EXIF says, whole or refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from cellseg_mm.core.errors import ConfigError, ImageError
from cellseg_mm.data.contents import Choice
from cellseg_mm.data.image_reader import open_image

HW = (17, 24)
IMAGE = np.random.default_rng(0).integers(0, 256, (*HW, 3)).astype(np.uint8)


def read(path: Path, **options: object) -> tuple[np.ndarray, str]:
    with open_image(path, **options) as reader:
        return reader.read(0, 0, *reader.image_hw), reader.says


@pytest.mark.parametrize('suffix', ['.png', '.jpg'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_turned_pictures_are_turned_as_viewers_do(
    orientation: int, suffix: str, tmp_path: Path
) -> None:
    exif, path = Image.Exif(), tmp_path / f'a{suffix}'
    exif[0x0112] = orientation
    Image.fromarray(IMAGE).save(path, exif=exif)
    with Image.open(path) as picture:
        wanted = np.asarray(ImageOps.exif_transpose(picture))
    found, says = read(path)
    assert np.array_equal(found, wanted)
    assert says == (
        '' if orientation == 1 else f'turned as its EXIF says (orientation {orientation})'
    )


@pytest.mark.parametrize('bits', [1, 2, 4, 8])
@pytest.mark.parametrize('transparency', [None, 0, b'\x00\x80'])
def test_png_palettes_with_transparency(
    bits: int, transparency: int | bytes | None, tmp_path: Path
) -> None:
    rng = np.random.default_rng(bits)
    index, colours = rng.integers(0, 2**bits, HW), rng.integers(0, 256, (2**bits, 3))
    picture = Image.new('P', HW[::-1])
    picture.putdata(index.reshape(-1).tolist())
    picture.putpalette(colours.astype(np.uint8).tobytes())
    options = {} if transparency is None else {'transparency': transparency}
    picture.save(tmp_path / 'a.png', bits=bits, **options)
    assert np.array_equal(read(tmp_path / 'a.png')[0], colours[index])


MODES = [(mode, '.png') for mode in ('1', 'L', 'LA', 'RGB', 'RGBA', 'P')]
MODES += [(mode, '.bmp') for mode in ('1', 'L', 'RGB', 'RGBA', 'P')]


@pytest.mark.parametrize(('mode', 'suffix'), MODES)
def test_modes(mode: str, suffix: str, tmp_path: Path) -> None:
    picture = Image.fromarray(IMAGE).convert(mode)
    picture.save(tmp_path / f'a{suffix}')
    assert np.array_equal(read(tmp_path / f'a{suffix}')[0], np.asarray(picture.convert('RGB')))


def test_channels_of_a_picture(tmp_path: Path) -> None:
    path = tmp_path / 'a.png'
    Image.fromarray(IMAGE).save(path)
    found, says = read(path, choice=Choice(image=0, z=0, channels=(2,)))
    assert np.array_equal(found, np.repeat(IMAGE[..., 2:], 3, axis=2))
    assert says == 'read: channels 2'
    for wrong in ({'z': 1}, {'image': 1}, {'channels': (3,)}):
        with pytest.raises(ConfigError, match='holds one picture of 3 channels'):
            read(path, choice=Choice(**wrong))


@pytest.mark.parametrize('suffix', ['.png', '.jpg', '.bmp'])
def test_a_picture_that_is_cut_off_is_an_error(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f'a{suffix}'
    Image.fromarray(IMAGE).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ImageError, match='cannot be read as an image'):
        read(path)


def test_several_pictures_and_cmyk(tmp_path: Path) -> None:
    first, second = Image.fromarray(IMAGE), Image.fromarray(255 - IMAGE)
    first.save(tmp_path / 'a.png', save_all=True, append_images=[second])
    with pytest.raises(ImageError, match='holds 2 pictures, as animations do'):
        read(tmp_path / 'a.png')
    first.save(tmp_path / 'm.jpg', format='MPO', save_all=True, append_images=[second], quality=100)
    found, says = read(tmp_path / 'm.jpg')
    with Image.open(tmp_path / 'm.jpg') as picture:
        assert np.array_equal(found, np.asarray(picture))
    assert says == 'read: the main one of its 2 pictures'
    first.convert('CMYK').save(tmp_path / 'c.jpg')
    with pytest.raises(ImageError, match='the colours are CMYK'):
        read(tmp_path / 'c.jpg')


@pytest.mark.parametrize('suffix', ['.png', '.bmp', '.jpg'])
def test_a_huge_picture_costs_no_memory(suffix: str, tmp_path: Path) -> None:
    """Its header alone is patched; another process has 200 MB on top of what it uses."""
    path = tmp_path / f'a{suffix}'
    Image.fromarray(IMAGE).save(path)
    content = bytearray(path.read_bytes())
    side = 30000
    if suffix == '.jpg':
        at = content.index(b'\xff\xc0') + 5  # height and width of the frame
        content[at : at + 4] = side.to_bytes(2, 'big') * 2
    else:
        at, order = (16, 'big') if suffix == '.png' else (18, 'little')
        content[at : at + 8] = side.to_bytes(4, order) * 2
        if suffix == '.png':
            import zlib

            content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, 'big')
    path.write_bytes(content)
    code = (
        'import resource, sys\n'
        'from cellseg_mm.data.image_reader import ImageError, open_image\n'
        'used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()\n'
        'resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 10**8, -1))\n'
        'try:\n'
        '    open_image(sys.argv[1]).__enter__()\n'
        'except ImageError as error:\n'
        '    print(error)\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, str(path)], capture_output=True, text=True, check=True
    )
    assert '30000 x 30000 px; at most 100000000 px are read whole' in done.stdout

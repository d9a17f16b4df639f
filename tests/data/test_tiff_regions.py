"""Tiles that a slide leaves out are background; what is cut off stays an error."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_mm.core.errors import ImageError
from cellseg_mm.data.image_reader import open_image

IMAGE = np.random.default_rng(0).integers(0, 200, (64, 96, 3)).astype(np.uint8)


def leave_out(path: Path, number: int, *, only_offset: bool = False) -> None:
    """Set offset and byte count of a tile or strip to 0."""
    with tifffile.TiffFile(path) as file:
        tags = file.pages[0].tags
        is_tiled = file.pages[0].is_tiled
        codes = (324, 325) if is_tiled else (273, 279)
        places = [(tags[code].valueoffset, tags[code].dtype) for code in codes]
    content = bytearray(path.read_bytes())
    for at, kind in places[:1] if only_offset else places:
        size = 4 if kind == 4 else 2
        struct.pack_into('<I' if size == 4 else '<H', content, at + size * number, 0)
    path.write_bytes(content)


def write(path: Path, image: np.ndarray = IMAGE, **options: object) -> None:
    tifffile.imwrite(path, image, **{'tile': (32, 32), 'metadata': None, **options})


@pytest.mark.parametrize('compression', [None, 'zlib', 'lzw', 'zstd'])
@pytest.mark.parametrize('whole_px', [0, 10**6])
def test_an_empty_tile_is_white(compression: str | None, whole_px: int, tmp_path: Path) -> None:
    path = tmp_path / 'a.tif'
    write(path, photometric='rgb', compression=compression)
    leave_out(path, 4)  # of 2 x 3 tiles the middle one of the second row
    wanted = IMAGE.copy()
    wanted[32:, 32:64] = 255
    with open_image(path, whole_px=whole_px) as reader:
        assert np.array_equal(reader.read(0, 0, 64, 96), wanted)
        assert np.array_equal(reader.read(30, 40, 50, 90), wanted[30:50, 40:90])
        assert reader.says == '1 of 6 tiles are empty and were taken for white'


@pytest.mark.parametrize('photometric', ['rgb', 'minisblack', 'miniswhite'])
def test_what_is_empty_follows_the_colours(photometric: str, tmp_path: Path) -> None:
    """Wide values: the white of an empty tile must not decide about the range."""
    path = tmp_path / 'a.tif'
    image = IMAGE.astype(np.uint16) if photometric == 'rgb' else IMAGE[..., 0]
    write(path, image, photometric=photometric)
    leave_out(path, 0)
    with open_image(path) as reader:
        found = reader.read(0, 0, 64, 96)
    assert (found[:32, :32] == {'rgb': 255, 'minisblack': 0, 'miniswhite': 255}[photometric]).all()
    rest = IMAGE if photometric == 'rgb' else np.repeat(IMAGE[..., :1], 3, axis=2)
    rest = 255 - rest if photometric == 'miniswhite' else rest
    assert np.array_equal(found[32:], rest[32:])


def test_planes_of_an_empty_tile(tmp_path: Path) -> None:
    path = tmp_path / 'a.tif'
    write(path, IMAGE.transpose(2, 0, 1), photometric='rgb', planarconfig='separate')
    for plane in range(3):
        leave_out(path, 6 * plane)
    with open_image(path) as reader:
        found = reader.read(0, 0, 64, 96)
    assert (found[:32, :32] == 255).all()
    assert np.array_equal(found[32:], IMAGE[32:])


def test_an_empty_first_tile_does_not_hide_what_the_jpegs_are(tmp_path: Path) -> None:
    """JFIF marks YCbCr whatever the tag says; tifffile looks for it in the first tile alone."""
    import cv2

    smooth = cv2.blur(IMAGE, (31, 31))
    tiles = [
        cv2.imencode('.jpg', np.ascontiguousarray(smooth[y : y + 32, x : x + 32, ::-1]))[
            1
        ].tobytes()
        for y in (0, 32)
        for x in (0, 32, 64)
    ]
    path = tmp_path / 'a.tif'
    with tifffile.TiffWriter(path) as writer:
        writer.write(
            iter(tiles),
            shape=smooth.shape,
            dtype='u1',
            tile=(32, 32),
            compression='jpeg',
            photometric='rgb',
            metadata=None,
        )
    leave_out(path, 0)
    with open_image(path) as reader:
        found = reader.read(32, 0, 64, 96).astype(int)
    assert abs(found - smooth[32:]).mean() < 5


def test_what_is_no_empty_tile_stays_an_error(tmp_path: Path) -> None:
    path = tmp_path / 'a.tif'
    write(path, photometric='rgb', tile=None, rowsperstrip=16)
    leave_out(path, 1)
    with pytest.raises(ImageError, match='3 of 4 strips or tiles have data'):
        open_image(path).__enter__()
    write(path, photometric='rgb')
    leave_out(path, 1, only_offset=True)
    with pytest.raises(ImageError, match='5 of 6 strips or tiles have data'):
        open_image(path).__enter__()
    write(path, photometric='rgb')
    for number in range(6):
        leave_out(path, number)
    with pytest.raises(ImageError, match='0 of 6 strips or tiles have data'):
        open_image(path).__enter__()
    write(path, photometric='rgb')
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ImageError, match='truncated'):
        open_image(path, whole_px=0).__enter__()

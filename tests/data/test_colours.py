"""Palettes, alpha and colour spaces are read by rule, or refused."""

from __future__ import annotations

import struct
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile

from cellseg_mm.core.errors import ImageError
from cellseg_mm.data import labels
from cellseg_mm.data.contents import Choice
from cellseg_mm.data.image_reader import open_image

HW = (17, 24)


def rows_of_bits(index: np.ndarray, bits: int) -> bytes:
    """Pack numbers of 1, 2, 4 or 8 bits, each row from a whole byte on."""
    single = (index[..., None] >> np.arange(bits)[::-1]) & 1  # (H, W, bits)
    return np.packbits(single.reshape(len(index), -1), axis=1).tobytes()


def write_palette(path: Path, index: np.ndarray, colour_map: np.ndarray, bits: int) -> None:
    """Write a palette TIFF of one strip by hand: tifffile writes 8 and 16 bits only."""
    data = rows_of_bits(index, bits)
    colours = colour_map.astype('<u2').tobytes()
    n_tags, map_at = 9, 8 + 2 + 9 * 12 + 4
    entries = [
        (256, 4, 1, index.shape[1]),
        (257, 4, 1, index.shape[0]),
        (258, 3, 1, bits),
        (259, 3, 1, 1),
        (262, 3, 1, 3),
        (273, 4, 1, map_at + len(colours)),
        (278, 4, 1, index.shape[0]),
        (279, 4, 1, len(data)),
        (320, 3, 3 * 2**bits, map_at),
    ]
    table = b''.join(struct.pack('<HHII', *entry) for entry in entries)
    head = b'II' + struct.pack('<HIH', 42, 8, n_tags)
    path.write_bytes(head + table + bytes(4) + colours + data)


@pytest.mark.parametrize('bits', [1, 2, 4, 8])
@pytest.mark.parametrize('factor', [1, 256, 257], ids=['8-bit map', 'ImageJ', 'full range'])
def test_palettes_of_every_depth_and_writer(bits: int, factor: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(bits)
    index = rng.integers(0, 2**bits, HW)
    colours = rng.integers(0, 256, (3, 2**bits))
    colours[:, 0], colours[:, -1] = (250, 3, 77), (255, 0, 1)
    path = tmp_path / 'p.tif'
    write_palette(path, index, colours * factor, bits)
    wanted = colours.T[index]
    assert np.array_equal(labels.read_image(path), wanted)
    with open_image(path, whole_px=0) as reader:
        assert np.array_equal(reader.read(3, 2, 15, 23), wanted[3:15, 2:23])


def test_palette_of_true_16_bits_keeps_the_upper_8(tmp_path: Path) -> None:
    # 40000 = 0x9C40: 156; 0x9C is what libtiff and ImageJ show. One value above 255 decides.
    colours = np.zeros((3, 4), dtype=int)
    colours[:, 1], colours[:, 2] = (40000, 255, 256), (65535, 0, 511)
    write_palette(tmp_path / 'p.tif', np.array([[0, 1, 2]]), colours, 2)
    found = labels.read_image(tmp_path / 'p.tif')[0].tolist()
    assert found == [[0, 0, 0], [156, 0, 1], [255, 0, 1]]


def test_palette_that_is_too_short(tmp_path: Path) -> None:
    path = tmp_path / 'p.tif'
    write_palette(path, np.array([[0, 3]]), np.zeros((3, 4), int), 2)
    content = bytearray(path.read_bytes())
    at = content.index(struct.pack('<HHI', 320, 3, 12))
    struct.pack_into('<I', content, at + 4, 6)  # two colours, of which none is number 3
    path.write_bytes(content)
    with pytest.raises(ImageError, match='palette colour 3 is used, the palette has 2'):
        labels.read_image(path)


FOUR = np.random.default_rng(4).integers(0, 256, (*HW, 4)).astype(np.uint8)


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('kind', [1, 2])
def test_alpha_that_is_said_is_dropped(kind: int, dtype: type, tmp_path: Path) -> None:
    image = FOUR.astype(dtype)
    image[..., 3] = np.iinfo(dtype).max
    tifffile.imwrite(tmp_path / 'a.tif', image, photometric='rgb', extrasamples=[kind])
    for whole_px in (0, 10**6):
        with open_image(tmp_path / 'a.tif', whole_px=whole_px) as reader:
            assert np.array_equal(reader.read(0, 0, *HW), FOUR[..., :3])


@pytest.mark.parametrize('planar', ['contig', 'separate'])
@pytest.mark.parametrize('kind', [1, 2])
def test_colours_that_were_multiplied_by_alpha(kind: int, planar: str, tmp_path: Path) -> None:
    # 40 * 255 / 51 = 200, 51 = a fifth; more than the alpha is cut; nothing is seen of alpha 0
    pixels = np.array([[[40, 51, 60, 51], [9, 8, 7, 255], [9, 8, 7, 0]]], dtype=np.uint8)
    stored = pixels.transpose(2, 0, 1) if planar == 'separate' else pixels
    options = {'photometric': 'rgb', 'extrasamples': [kind], 'planarconfig': planar}
    tifffile.imwrite(tmp_path / 'a.tif', stored, **options)
    wanted = {1: [[200, 255, 255], [9, 8, 7], [0, 0, 0]], 2: pixels[0, :, :3].tolist()}[kind]
    for whole_px in (0, 10**6):
        with open_image(tmp_path / 'a.tif', whole_px=whole_px) as reader:
            assert reader.read(0, 0, 1, 3)[0].tolist() == wanted


def without_tag(path: Path, code: int) -> None:
    """Rename a tag to one that nobody knows."""
    with tifffile.TiffFile(path) as file:
        at = file.pages[0].tags[code].offset
    with path.open('r+b') as stream:
        stream.seek(at)
        stream.write(struct.pack('<H', 65000))


def test_rgba_without_the_tag_as_the_collection_has_it(tmp_path: Path) -> None:
    path = tmp_path / 'a.tif'
    tifffile.imwrite(path, FOUR, photometric='rgb', extrasamples=[2])
    without_tag(path, 338)
    assert np.array_equal(labels.read_image(path), FOUR[..., :3])
    tifffile.imwrite(path, FOUR.astype(np.uint16), photometric='rgb', extrasamples=[2])
    without_tag(path, 338)  # four channels of a camera look the same
    with pytest.raises(ImageError, match='4 values per pixel, 0 of them alpha'):
        labels.read_image(path)


OTHERS = {
    'RGB and something': {'photometric': 'rgb', 'extrasamples': [0]},
    'grey and three': {'photometric': 'minisblack', 'extrasamples': [0, 0, 0]},
    'grey, one and alpha': {'photometric': 'minisblack', 'extrasamples': [0, 0, 2]},
    'RGB in planes': {'photometric': 'rgb', 'extrasamples': [0], 'planarconfig': 'separate'},
}


@pytest.mark.parametrize('name', OTHERS)
def test_channels_that_are_no_alpha_are_refused_or_chosen(name: str, tmp_path: Path) -> None:
    options = {'planarconfig': 'contig', **OTHERS[name]}
    stored = FOUR.transpose(2, 0, 1) if options['planarconfig'] == 'separate' else FOUR
    path = tmp_path / 'a.tif'
    tifffile.imwrite(path, stored, **options)
    if name == 'grey, one and alpha':  # three remain, and are red, green and blue
        assert np.array_equal(labels.read_image(path), FOUR[..., :3])
        return
    for read in (labels.read_image, lambda p: open_image(p, whole_px=0).__enter__()):
        with pytest.raises(ImageError, match=r'4 values per pixel.*has --channels, of 0 to 3'):
            read(path)
    with open_image(path, choice=Choice(channels=(3, 0, 1))) as reader:
        assert np.array_equal(reader.read(2, 1, 9, 20), FOUR[2:9, 1:20][..., [3, 0, 1]])
        assert reader.says == 'read: channels 3, 0, 1 of 4 as red, green and blue'
    with open_image(path, choice=Choice(channels=(3,))) as reader:
        assert np.array_equal(reader.read(0, 0, *HW), np.repeat(FOUR[..., 3:], 3, axis=2))


def refused(path: Path, match: str) -> None:
    for whole_px in (0, 10**6):
        with pytest.raises(ImageError, match=match):
            open_image(path, whole_px=whole_px).__enter__()


def test_ycbcr_that_no_codec_turns_into_rgb(tmp_path: Path) -> None:
    image = FOUR[..., :3]
    path = tmp_path / 'a.tif'
    tifffile.imwrite(path, image, photometric='ycbcr', subsampling=(1, 1), tile=(16, 16))
    refused(path, 'the colours are YCbCr of 3 values per pixel in compression 1')
    tifffile.imwrite(
        path,
        image.transpose(2, 0, 1),
        photometric='rgb',
        planarconfig='separate',
        compression='jpeg',
    )
    with tifffile.TiffFile(path) as file:
        at = file.pages[0].tags[262].valueoffset
    content = bytearray(path.read_bytes())
    struct.pack_into('<H', content, at, 6)  # Y, Cb and Cr each a JPEG of its own
    path.write_bytes(content)
    refused(path, 'the colours are YCbCr of 3 values per pixel in compression 7')


def test_old_style_jpeg_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / 'a.tif'
    tifffile.imwrite(path, FOUR[..., :3], photometric='rgb', compression='jpeg')
    with tifffile.TiffFile(path) as file:
        at = file.pages[0].tags[259].valueoffset
    content = bytearray(path.read_bytes())
    struct.pack_into('<H', content, at, 6)
    path.write_bytes(content)
    refused(path, r'compressed with old-style JPEG \(6\)')


# ------------------------------------------------------------------- Aperio's JPEG 2000

RGB_TILE = np.full((32, 32, 3), (235, 180, 210), np.uint8)
RGB_TILE[8:20, 8:16] = (90, 40, 140)


def to_ycbcr(rgb: np.ndarray) -> np.ndarray:
    r, g, b = (rgb[..., k].astype(float) for k in range(3))
    y = 0.299 * r + 0.587 * g + 0.114 * b
    cb, cr = 128 + 0.564 * (b - y), 128 + 0.713 * (r - y)
    return np.stack([y, cb, cr], -1).round().astype(np.uint8)


def one_packet(plane: np.ndarray) -> tuple[bytes, bytes, bytes]:
    """Return main header, tile header and packets of one component in one resolution."""
    options = {'level': 0, 'codecformat': 'j2k', 'reversible': True, 'resolutions': 1}
    code = imagecodecs.jpeg2k_encode(np.ascontiguousarray(plane), **options)
    tile, data = code.index(b'\xff\x90'), code.index(b'\xff\x93')
    return code[:tile], code[tile:data], code[data + 2 : -2]


def subsampled_codestream(ycbcr: np.ndarray) -> bytes:
    """Join three components, chroma of half width, as the 4:2:2 of scanners has them."""
    planes = [ycbcr[..., 0], ycbcr[:, ::2, 1], ycbcr[:, ::2, 2]]
    (head, tile, _), packets = one_packet(planes[0]), b''.join(one_packet(p)[2] for p in planes)
    n_size = int.from_bytes(head[4:6], 'big')
    size = bytearray(head[2 : 4 + n_size][:38]) + struct.pack('>H', 3)
    size += bytes([7, 1, 1, 7, 2, 1, 7, 2, 1])
    struct.pack_into('>H', size, 2, len(size) - 2)
    tile = bytearray(tile)
    struct.pack_into('>I', tile, 6, len(tile) + 2 + len(packets))
    return (
        b'\xff\x4f' + bytes(size) + head[4 + n_size :] + tile + b'\xff\x93' + packets + b'\xff\xd9'
    )


def write_aperio(path: Path, code: bytes, compression: int, photometric: str) -> None:
    with tifffile.TiffWriter(path) as writer:
        writer.write(
            iter([code]),
            shape=RGB_TILE.shape,
            dtype='u1',
            tile=(32, 32),
            compression=compression,
            photometric=photometric,
            metadata=None,
            description='Aperio Image Library v11.2.1 \r\n32x32 J2K/YUV16 Q=70',
        )


@pytest.mark.parametrize('photometric', ['rgb', 'ycbcr'])
@pytest.mark.parametrize('kind', ['33003', '33003 subsampled', '33005'])
def test_aperio_jpeg_2000(kind: str, photometric: str, tmp_path: Path) -> None:
    plain = {'level': 0, 'codecformat': 'j2k', 'mct': False, 'reversible': True}
    code = {
        '33003': lambda: imagecodecs.jpeg2k_encode(to_ycbcr(RGB_TILE), **plain),
        '33003 subsampled': lambda: subsampled_codestream(to_ycbcr(RGB_TILE)),
        '33005': lambda: imagecodecs.jpeg2k_encode(RGB_TILE, **plain),
    }[kind]()
    path = tmp_path / 'a.svs'
    write_aperio(path, code, int(kind[:5]), photometric)
    for whole_px in (0, 10**6):
        with open_image(path, whole_px=whole_px) as reader:
            found = reader.read(0, 0, 32, 32).astype(int)
        assert abs(found - RGB_TILE).max() <= 2  # YCbCr is rounded

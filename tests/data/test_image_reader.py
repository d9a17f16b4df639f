"""Every region of every kind of TIFF equals the same region of the whole image."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from cellseg_mm.core.errors import ConfigError, ImageError
from cellseg_mm.data import labels, regions, tiff_regions
from cellseg_mm.data.image_reader import open_image

HW = (75, 91)  # no multiple of a tile, a strip, or 8
REGIONS = [(0, 0, 75, 91), (0, 0, 1, 1), (74, 90, 75, 91), (13, 30, 50, 70), (31, 0, 33, 91)]


def picture(seed: int = 0, dtype: type = np.uint8, high: int = 256, channels: int = 3):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, high, (*HW, channels)).astype(dtype)
    return cv2.blur(image, (3, 3)).reshape(image.shape)  # so that codecs have runs to find


def assert_regions(path: Path, expected: np.ndarray, **options: int) -> None:
    with open_image(path, whole_px=0, **options) as reader:
        assert isinstance(reader, tiff_regions.TiffRegions)
        assert reader.image_hw == expected.shape[:2]
        for y0, x0, y1, x1 in REGIONS:
            y1, x1 = min(y1, expected.shape[0]), min(x1, expected.shape[1])
            if y0 >= y1 or x0 >= x1:
                continue
            found = reader.read(y0, x0, y1, x1)
            assert found.dtype == np.uint8
            assert found.flags.c_contiguous
            assert np.array_equal(found, expected[y0:y1, x0:x1]), (y0, x0, y1, x1)


LAYOUTS = {
    'strips': {'rowsperstrip': 16},
    'one strip': {'rowsperstrip': 75},
    'tiles': {'tile': (32, 16)},
    'planes in tiles': {'tile': (32, 16), 'planarconfig': 'separate'},
    'planes in strips': {'rowsperstrip': 10, 'planarconfig': 'separate'},
}


@pytest.mark.parametrize('compression', [None, 'lzw', 'zlib', 'packbits', 'zstd', 'lzma'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts_and_compressions(layout: str, compression: str | None, tmp_path: Path) -> None:
    options = dict(LAYOUTS[layout])
    image = picture()
    stored = image.transpose(2, 0, 1) if options.get('planarconfig') else image
    path = tmp_path / 'a.tif'
    tifffile.imwrite(path, stored, photometric='rgb', compression=compression, **options)
    assert_regions(path, image)
    assert np.array_equal(labels.read_image(path), image)


@pytest.mark.parametrize('layout', ['strips', 'tiles'])
@pytest.mark.parametrize('compression', ['lzw', 'zlib', 'zstd'])
@pytest.mark.parametrize('order', ['<', '>'])
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_predictors_byte_orders_and_channels(
    layout: str, compression: str, order: str, channels: int, tmp_path: Path
) -> None:
    image = picture(channels=channels)
    path = tmp_path / 'a.tif'
    tifffile.imwrite(
        path,
        image if channels > 1 else image[..., 0],
        photometric='rgb' if channels > 1 else 'minisblack',
        compression=compression,
        predictor=True,
        byteorder=order,
        **LAYOUTS[layout],
    )
    assert_regions(path, labels.read_image(path))


@pytest.mark.parametrize(
    ('dtype', 'high'),
    [
        pytest.param(np.uint16, 256, id='16 bits used as 8'),
        pytest.param(np.uint16, 65536, id='16 bits'),
        pytest.param(np.uint32, 70_000, id='32 bits'),
        pytest.param(np.float32, 2, id='floats to 1'),
        pytest.param(np.float64, 200, id='floats to 255'),
    ],
)
@pytest.mark.parametrize('compression', [None, 'zlib', 'lzw'])
def test_wide_values_are_scaled_by_the_whole_image(
    dtype: type, high: int, compression: str | None, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, high, (*HW, 3)).astype(dtype)
    image[:60] //= 300 if high > 300 else 1  # most regions alone would be scaled otherwise
    path = tmp_path / 'a.tif'
    tifffile.imwrite(path, image, photometric='rgb', compression=compression, tile=(16, 16))
    assert_regions(path, labels.read_image(path))


def test_white_is_zero_and_jpeg(tmp_path: Path) -> None:
    grey = picture(channels=1)[..., 0]
    tifffile.imwrite(tmp_path / 'w.tif', grey, photometric='miniswhite', tile=(16, 16))
    assert_regions(tmp_path / 'w.tif', labels.read_image(tmp_path / 'w.tif'))
    image = picture()
    for name, extra in {'rgb': {}, 'ycbcr': {'subsampling': (2, 2)}}.items():
        path = tmp_path / f'{name}.tif'
        photometric = 'rgb' if name == 'rgb' else 'ycbcr'
        tifffile.imwrite(
            path, image, photometric=photometric, compression='jpeg', tile=(32, 32), **extra
        )
        with tifffile.TiffFile(path) as file:
            assert_regions(path, file.pages[0].asarray())


# ------------------------------------------------------------------------------- pyramids


def write_pyramid(path: Path, levels: list[np.ndarray], **options: object) -> None:
    with tifffile.TiffWriter(path, **options) as writer:
        common = {'photometric': 'rgb', 'tile': (16, 32), 'compression': 'zlib'}
        writer.write(levels[0], subifds=len(levels) - 1, **common)
        for level in levels[1:]:
            writer.write(level, subfiletype=1, **common)


@pytest.mark.parametrize('options', [{}, {'bigtiff': True}, {'ome': True}])
def test_pyramid_levels(options: dict, tmp_path: Path) -> None:
    levels = [picture(), picture(1)[:38, :46], picture(2)[:19, :23]]
    path = tmp_path / 'a.ome.tif'
    write_pyramid(path, levels, **options)
    for k, level in enumerate(levels):
        assert_regions(path, level, level=k)
    with open_image(path, level=1) as reader:
        assert reader.level_hws == [(75, 91), (38, 46), (19, 23)]
        assert reader.downsample == 75 / 38
    with pytest.raises(ConfigError, match=r'no level 3; it has 3 \(75 x 91 px, 38 x 46 px'):
        open_image(path, level=3).__enter__()


def test_ome_channels_on_pages(tmp_path: Path) -> None:
    image = picture()
    path = tmp_path / 'a.ome.tif'
    tifffile.imwrite(
        path,
        image.transpose(2, 0, 1),
        photometric='minisblack',
        metadata={'axes': 'CYX'},
        tile=(16, 16),
    )
    assert_regions(path, image)


# ---------------------------------------------------------------------- whole and others


def test_small_files_are_read_whole_and_strictly(tmp_path: Path) -> None:
    image = picture()
    tifffile.imwrite(tmp_path / 'a.tif', image, photometric='rgb')
    with open_image(tmp_path / 'a.tif') as reader:
        assert isinstance(reader, regions.WholeImage)
        assert np.array_equal(reader.read(3, 4, 20, 30), image[3:20, 4:30])
        with pytest.raises(ValueError, match='no region'):
            reader.read(0, 0, 76, 5)
    with pytest.raises(ConfigError, match='no level 1'):
        open_image(tmp_path / 'a.tif', level=1).__enter__()


@pytest.mark.parametrize('suffix', ['.png', '.bmp'])
def test_other_formats(suffix: str, tmp_path: Path) -> None:
    image = picture()
    path = tmp_path / f'a{suffix}'
    path.write_bytes(cv2.imencode(suffix, image[..., ::-1])[1].tobytes())
    with open_image(path) as reader:
        assert np.array_equal(reader.read(0, 0, *HW), image)


def test_png_with_16_bits_alpha_and_grey(tmp_path: Path) -> None:
    wide = picture(dtype=np.uint16, high=65536, channels=4)
    cv2.imwrite(str(tmp_path / 'a.png'), wide)
    tifffile.imwrite(tmp_path / 'a.tif', wide[..., [2, 1, 0]], photometric='rgb')
    grey = picture(channels=1)[..., 0]
    cv2.imwrite(str(tmp_path / 'g.png'), grey)
    with open_image(tmp_path / 'a.png') as reader:
        assert np.array_equal(reader.read(0, 0, *HW), labels.read_image(tmp_path / 'a.tif'))
    with open_image(tmp_path / 'g.png') as reader:
        assert np.array_equal(reader.read(0, 0, *HW), np.repeat(grey[..., None], 3, axis=2))


# --------------------------------------------------------------------------------- faults


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / 'empty.png').write_bytes(b'')
    (tmp_path / 'text.jpg').write_text('no image')
    tifffile.imwrite(tmp_path / 'z.tif', np.zeros((5, *HW), np.uint8), photometric='minisblack')
    faults = {
        'empty.png': 'the file is empty',
        'text.jpg': 'this is a text file',
        'missing.tif': 'cannot be opened',
        'z.tif': 'holds 5 images',
    }
    for name, message in faults.items():
        with pytest.raises(ImageError, match=f'{name}: .*{message}'):
            open_image(tmp_path / name).__enter__()


@pytest.mark.parametrize('compression', ['lzw', 'zlib', 'zstd'])
def test_damage_is_found_where_it_is(compression: str, tmp_path: Path) -> None:
    path = tmp_path / 'a.tif'
    image = np.random.default_rng(0).integers(0, 256, (*HW, 3)).astype(np.uint8)
    tifffile.imwrite(path, image, photometric='rgb', compression=compression, tile=(32, 32))
    with tifffile.TiffFile(path) as file:
        last, n_bytes = file.pages[0].dataoffsets[-1], file.pages[0].databytecounts[-1]
    content = bytearray(path.read_bytes())
    content[last : last + n_bytes] = b'\xff' * n_bytes
    path.write_bytes(content)
    with open_image(path, whole_px=0) as reader:
        assert np.array_equal(reader.read(0, 0, 32, 32), image[:32, :32])
        with pytest.raises(ImageError, match='strip or tile 8 is damaged'):
            reader.read(70, 80, 75, 91)


def test_truncated_files_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / 'a.tif'
    tifffile.imwrite(path, picture(), photometric='rgb', tile=(32, 32))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ImageError, match='truncated'):
        open_image(path, whole_px=0).__enter__()


def test_the_cache_is_bounded_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiff_regions, 'CACHE_BYTES', 5 * 16 * 16 * 3)
    path = tmp_path / 'a.tif'
    image = picture()
    tifffile.imwrite(path, image, photometric='rgb', tile=(16, 16), compression='zlib')
    with open_image(path, whole_px=0) as reader:
        assert np.array_equal(reader.read(0, 0, *HW), image)
        assert reader._cache_bytes <= 5 * 16 * 16 * 3
        decoded = []
        plain = reader._decode_segment
        monkeypatch.setattr(reader, '_decode_segment', lambda *a: decoded.append(a[2]) or plain(*a))
        reader.read(0, 0, 10, 40)
        reader.read(3, 5, 12, 45)
        assert decoded == [0, 1, 2]


def test_opening_wide_values_decodes_nothing(tmp_path: Path, monkeypatch) -> None:
    """The scale needs all values, but a look at the size must not read a slide of 16 bits."""
    path = tmp_path / 'a.tif'
    image = picture(dtype=np.uint16, high=4000)
    tifffile.imwrite(path, image, photometric='rgb', compression='lzw', tile=(32, 16))
    decoded = []
    decode = tiff_regions.TiffRegions._decode
    monkeypatch.setattr(
        tiff_regions.TiffRegions, '_decode', lambda *args: decoded.append(args) or decode(*args)
    )
    with open_image(path, whole_px=0) as reader:
        assert reader.image_hw == HW
        assert decoded == []
        whole = labels.read_image(path)
        assert np.array_equal(reader.read(3, 5, 40, 41), whole[3:40, 5:41])


def test_the_cache_counts_what_two_threads_decode_once(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / 'a.tif'
    tifffile.imwrite(path, picture(), photometric='rgb', compression='lzw', tile=(32, 16))
    segment = tiff_regions.TiffRegions._decode_segment
    with open_image(path, whole_px=0) as reader:

        def meanwhile(self, page, data, index):
            # A second thread asks for the same tile, decodes it and is done first.
            monkeypatch.setattr(tiff_regions.TiffRegions, '_decode_segment', segment)
            self._decode(0, index)
            return segment(self, page, data, index)

        monkeypatch.setattr(tiff_regions.TiffRegions, '_decode_segment', meanwhile)
        reader.read(0, 0, 5, 5)
        assert len(reader._cache) == 1
        assert reader._cache_bytes == sum(pixels.nbytes for pixels in reader._cache.values())

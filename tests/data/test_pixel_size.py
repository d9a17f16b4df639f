"""How large a pixel is, by whoever wrote the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from cellseg_mm.core.errors import CellSegError, ConfigError
from cellseg_mm.data import pixel_size
from cellseg_mm.data.image_reader import open_image

RGB = np.random.default_rng(0).integers(0, 256, (48, 80, 3)).astype(np.uint8)


def size_of(path: Path, level: int = 0) -> tuple[float, float] | None:
    with open_image(path, level=level) as reader:
        return reader.um_per_px


@pytest.mark.parametrize(
    ('metadata', 'expected'),
    [
        pytest.param({'PhysicalSizeX': 0.25, 'PhysicalSizeY': 0.25}, (0.25, 0.25), id='default um'),
        pytest.param(
            {
                'PhysicalSizeX': 500.0,
                'PhysicalSizeXUnit': 'nm',
                'PhysicalSizeY': 0.00025,
                'PhysicalSizeYUnit': 'mm',
            },
            (0.25, 0.5),
            id='units of each axis, and not square',
        ),
        pytest.param({'PhysicalSizeX': 1.0, 'PhysicalSizeXUnit': 'pixel'}, None, id='pixels'),
        pytest.param({}, None, id='nothing'),
    ],
)
def test_ome(metadata: dict, expected: tuple[float, float] | None, tmp_path: Path) -> None:
    path = tmp_path / 'a.ome.tif'
    metadata = {**metadata, 'axes': 'YXS'}
    if 'PhysicalSizeX' in metadata:
        metadata.setdefault('PhysicalSizeY', metadata['PhysicalSizeX'])
        metadata.setdefault('PhysicalSizeYUnit', metadata.get('PhysicalSizeXUnit', 'µm'))
    tifffile.imwrite(path, RGB, photometric='rgb', metadata=metadata, tile=(16, 16))
    assert size_of(path) == pytest.approx(expected) if expected else size_of(path) is None
    with open_image(path) as reader:
        assert ('0.25 x 0.5 um' in reader.says) == (expected == (0.25, 0.5))


def test_each_image_of_a_file_has_its_own(tmp_path: Path) -> None:
    from cellseg_mm.data.contents import Choice

    path = tmp_path / 'two.ome.tif'
    with tifffile.TiffWriter(path, ome=True) as file:
        for um in (0.25, 0.5):
            file.write(
                RGB,
                photometric='rgb',
                metadata={'axes': 'YXS', 'PhysicalSizeX': um, 'PhysicalSizeY': um},
            )
    for number, um in enumerate((0.25, 0.5)):
        with open_image(path, choice=Choice(image=number)) as reader:
            assert reader.um_per_px == (um, um)


def test_levels_have_larger_pixels(tmp_path: Path) -> None:
    path = tmp_path / 'p.ome.tif'
    with tifffile.TiffWriter(path, ome=True) as file:
        known = {'axes': 'YXS', 'PhysicalSizeX': 0.25, 'PhysicalSizeY': 0.25}
        options = {'photometric': 'rgb', 'tile': (16, 16)}
        file.write(RGB, subifds=1, metadata=known, **options)
        file.write(RGB[::2, ::2][:, :39], subfiletype=1, **options)  # 40 columns less one
    with open_image(path, level=1) as reader:
        assert reader.um_per_px == pytest.approx((0.5, 0.25 * 80 / 39))
        assert reader.level_um_per_px(0) == (0.25, 0.25)


def test_aperio(tmp_path: Path) -> None:
    path = tmp_path / 'a.svs'
    text = 'Aperio Image Library v12\n80x48 [0,0 80x48] (16x16) JPEG|AppMag = 40|MPP = 0.2520|x = y'
    tifffile.imwrite(
        path, RGB, photometric='rgb', tile=(16, 16), description=text, metadata=None, software=False
    )
    assert size_of(path) == (0.2520, 0.2520)


def test_philips(tmp_path: Path) -> None:
    spacings = [('0.001', '0.002'), ('0.00025', '0.0005'), ('0.0005', '0.001')]
    lines = [
        '<Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" Element="0x0030" '
        f'PMSVR="IDoubleArray">&quot;{down}&quot; &quot;{across}&quot;</Attribute>'
        for down, across in spacings
    ]
    text = (
        f'<?xml version="1.0" ?><DataObject ObjectType="DPUfsImport">{"".join(lines)}</DataObject>'
    )
    tifffile.imwrite(
        tmp_path / 'a.tiff',
        RGB,
        photometric='rgb',
        tile=(16, 16),
        description=text,
        metadata=None,
        software='Philips DP v1.0',
    )
    assert size_of(tmp_path / 'a.tiff') == (0.25, 0.5)


@pytest.mark.parametrize(
    ('unit', 'per_unit', 'expected'),
    [
        pytest.param('um', (4.0, 2.0), (0.5, 0.25), id='um: across, down'),
        pytest.param('\\u00B5m', (4.0, 4.0), (0.25, 0.25), id='the micro sign'),
        pytest.param('mm', (4000.0, 4000.0), (0.25, 0.25), id='mm'),
        pytest.param('pixel', (4.0, 4.0), None, id='no unit of length'),
        pytest.param('inch', (300.0, 300.0), None, id='for print'),
    ],
)
def test_imagej(unit: str, per_unit: tuple, expected: tuple | None, tmp_path: Path) -> None:
    path = tmp_path / 'a.tif'
    tifffile.imwrite(path, RGB[..., 0], imagej=True, resolution=per_unit, metadata={'unit': unit})
    assert size_of(path) == expected


@pytest.mark.parametrize(
    ('resolution', 'unit', 'expected'),
    [
        pytest.param((40000, 20000), 'CENTIMETER', (0.5, 0.25), id='a scanner'),
        pytest.param((101600, 101600), 'INCH', (0.25, 0.25), id='inches'),
        pytest.param((72, 72), 'INCH', None, id='72 dpi'),
        pytest.param((96, 96), 'INCH', None, id='96 dpi'),
        pytest.param((300, 300), 'INCH', None, id='300 dpi'),
        pytest.param((600, 600), 'INCH', None, id='600 dpi'),
        pytest.param((4800, 4800), 'INCH', None, id='a film scanner'),
        pytest.param((4, 4), 'NONE', None, id='no unit'),
        pytest.param((0, 0), 'CENTIMETER', None, id='zero'),
    ],
)
def test_resolution_tags(resolution: tuple, unit: str, expected: tuple | None, tmp_path) -> None:
    path = tmp_path / 'a.tif'
    tifffile.imwrite(path, RGB, photometric='rgb', resolution=resolution, resolutionunit=unit)
    with open_image(path) as reader:
        assert reader.um_per_px == (pytest.approx(expected) if expected else None)
        assert bool(reader.says) == (expected is not None and expected[0] != expected[1])


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'bmp'])
def test_bitmaps(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f'a.{suffix}'
    # a BMP and a PNG count per metre, a JPEG per inch in 16 bits
    dpi = (101600.0, 50800.0) if suffix != 'jpg' else (12700, 25400)
    Image.fromarray(RGB).save(path, dpi=dpi)
    assert size_of(path) == pytest.approx((25400 / dpi[1], 25400 / dpi[0]), rel=1e-4)
    Image.fromarray(RGB).save(path, dpi=(300, 300))
    assert size_of(path) is None
    Image.fromarray(RGB).save(path)
    assert size_of(path) is None


def test_a_turned_photo_swaps_height_and_width(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / 'a.jpg', dpi=(12700, 25400), exif=exif)
    assert size_of(tmp_path / 'a.jpg') == pytest.approx((2.0, 1.0))


def test_what_no_microscope_does_is_said(tmp_path: Path) -> None:
    path = tmp_path / 'a.ome.tif'
    known = {'axes': 'YXS', 'PhysicalSizeX': 250.0, 'PhysicalSizeY': 250.0}
    tifffile.imwrite(path, RGB, photometric='rgb', metadata=known)
    with open_image(path) as reader:
        assert reader.um_per_px is None
        assert 'its OME text says 250 um a pixel' in reader.says


def test_a_collection() -> None:
    share, counts = pixel_size.of_collection([(0.25, 0.25), None, (0.2502, 0.25), (0.5, 0.5)])
    assert share is None
    assert counts == [((0.25, 0.25), 2), ((0.5, 0.5), 1)]
    assert pixel_size.of_collection([None, (0.5, 0.5)])[0] == (0.5, 0.5)
    assert pixel_size.of_collection([None]) == (None, [])


def test_recorded_and_stated(tmp_path: Path) -> None:
    folds = tmp_path / 'folds.json'
    assert pixel_size.recorded_size(tmp_path, folds) is None
    pixel_size.save_size(tmp_path / 'pixel_size.json', (0.25, 0.5))
    assert pixel_size.recorded_size(tmp_path, folds) == (0.25, 0.5)
    for text in ('{}', '[', '{"um_per_px": [0.25]}', '{"um_per_px": ["a", 1]}'):
        (tmp_path / 'pixel_size.json').write_text(text)
        with pytest.raises(CellSegError, match=r'pixel_size\.json.*expected'):
            pixel_size.recorded_size(tmp_path, folds)
    assert pixel_size.stated(0.25, 'config') == (0.25, 0.25)
    for wrong in (25.0, 'a', True, [0.25], [0.25, None], float('nan')):
        with pytest.raises(ConfigError, match='config: um_per_px is'):
            pixel_size.stated(wrong, 'config')

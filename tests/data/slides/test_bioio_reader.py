"""What bioio reads, by its plainest plugin; nobody writes ND2 or LIF.

bioio is no part of the test extra, being large.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_mm.core.errors import ConfigError, ImageError
from cellseg_mm.data.contents import NO_CHOICE, Choice
from cellseg_mm.data.image_reader import open_image
from cellseg_mm.data.slides.bioio_reader import open_bioio

HW = (75, 91)
REGIONS = [(0, 0, 75, 91), (0, 0, 1, 1), (13, 30, 50, 70)]


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    path = tmp_path / 'a.nd2'
    path.write_bytes(b'\xda\xce\xbe\x0a' + bytes(200))
    for name in ('bioio', 'bioio_nd2', 'openslide', 'zarr', 'pylibCZIrw', 'pylibCZIrw.czi'):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(ImageError, match=r'\(\.nd2\).*cellseg-mm\[microscopes\]'), open_image(path):
        pass
    path.rename(tmp_path / 'a.bif')
    with pytest.raises(ImageError, match=r'cellseg-mm\[slides\]'), open_image(tmp_path / 'a.bif'):
        pass
    (tmp_path / 'a.zarr').mkdir()
    (tmp_path / 'a.zarr' / 'zarr.json').write_text('{}')
    with pytest.raises(ImageError, match=r'cellseg-mm\[slides\]'), open_image(tmp_path / 'a.zarr'):
        pass
    (tmp_path / 'a.czi').write_bytes(b'ZISRAWFILE' + bytes(600))
    with (
        pytest.raises(ImageError, match=r'CZI.*cellseg-mm\[microscopes\]'),
        open_image(tmp_path / 'a.czi'),
    ):
        pass


@pytest.fixture
def bioio() -> None:
    pytest.importorskip('bioio_tifffile', reason='pip install bioio bioio-tifffile')


@pytest.mark.usefixtures('bioio')
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_planes_and_channels_are_those_of_tifffile(dtype: type, tmp_path: Path) -> None:
    path = tmp_path / 'a.tif'
    high = 256 if dtype == np.uint8 else 4000
    values = np.random.default_rng(0).integers(0, high, (2, 3, *HW)).astype(dtype)
    tifffile.imwrite(path, values, imagej=True, metadata={'axes': 'ZCYX'})
    choice = Choice(z=1, channels=(2, 0, 1))
    with open_image(path, choice=choice) as theirs:
        ours = open_bioio(path, 0, choice, None)
        for y0, x0, y1, x1 in REGIONS:
            assert np.array_equal(ours.read(y0, x0, y1, x1), theirs.read(y0, x0, y1, x1))
        assert ours.value_range == theirs.value_range
        assert 'z 1 of 2' in ours.says
    with pytest.raises(ImageError, match='holds 2 planes in depth'):
        open_bioio(path, 0, NO_CHOICE, None)
    with pytest.raises(ConfigError, match='no level 1'):
        open_bioio(path, 1, choice, None)


@pytest.mark.usefixtures('bioio')
def test_rgb_is_read_as_it_is(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (*HW, 3)).astype(np.uint8)
    tifffile.imwrite(tmp_path / 'a.tif', rgb, photometric='rgb')
    reader = open_bioio(tmp_path / 'a.tif', 0, NO_CHOICE, None)
    for y0, x0, y1, x1 in REGIONS:
        assert np.array_equal(reader.read(y0, x0, y1, x1), rgb[y0:y1, x0:x1])
    # the plugin says 1 um of a file that says nothing
    assert reader.um_per_px is None
    assert '1 um by its text' in reader.says


def test_damaged_files_are_a_sentence(tmp_path: Path) -> None:
    for name, plugin in {'a.nd2': 'bioio_nd2', 'a.lif': 'bioio_lif'}.items():
        pytest.importorskip(plugin)
        (tmp_path / name).write_bytes(bytes(3000))
        with pytest.raises(ImageError, match=rf'{name}: is damaged'), open_image(tmp_path / name):
            pass
    with pytest.raises(ImageError, match='there is no such file'), open_image(tmp_path / 'no.lif'):
        pass

"""Zeiss CZI, written by Zeiss's own library; it is no part of the test extra, being large."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cellseg_mm.core.errors import ConfigError, ImageError
from cellseg_mm.data.contents import NO_CHOICE, Choice
from cellseg_mm.data.image_reader import open_image
from cellseg_mm.data.intensity import ValueRange
from cellseg_mm.data.slides.czi_reader import open_czi

czi = pytest.importorskip('pylibCZIrw.czi', reason="pip install 'cellseg-mm[microscopes]'")

HW = (75, 91)
REGIONS = [(0, 0, 75, 91), (0, 0, 1, 1), (13, 30, 50, 70), (74, 3, 75, 91)]
SIZES = {'scale_x': 0.25e-6, 'scale_y': 0.5e-6}


def values_of(seed: int, channels: int, dtype: type = np.uint8, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, (*HW, channels)).astype(dtype)


def test_rgb_regions_are_those_written(tmp_path: Path) -> None:
    rgb = values_of(0, 3)
    with czi.create_czi(str(tmp_path / 'a.czi')) as document:
        document.write(data=np.ascontiguousarray(rgb[..., ::-1]), location=(1000, -50))
        document.write_metadata(document_name='a', **SIZES)
    with open_czi(tmp_path / 'a.czi', 0, NO_CHOICE, None) as reader:
        assert reader.um_per_px == pytest.approx((0.5, 0.25))
        assert 'read:' not in reader.says
        for y0, x0, y1, x1 in REGIONS:
            found = reader.read(y0, x0, y1, x1)
            assert found.flags.c_contiguous
            assert np.array_equal(found, rgb[y0:y1, x0:x1])
    with open_image(tmp_path / 'a.czi') as reader:  # by OpenSlide, where it can
        assert np.array_equal(reader.read(0, 0, *HW), rgb)
        assert reader.um_per_px == pytest.approx((0.5, 0.25))


def test_channels_and_planes_are_chosen(tmp_path: Path) -> None:
    path = tmp_path / 'a.czi'
    planes = {(c, z): values_of(2 * c + z, 1, np.uint16, 4000) for c in range(4) for z in range(2)}
    with czi.create_czi(str(path)) as document:
        for (c, z), values in planes.items():
            document.write(data=values, plane={'C': c, 'Z': z, 'T': 0})
        names = {0: 'DAPI', 1: 'b', 2: 'c', 3: 'd'}
        document.write_metadata(document_name='a', channel_names=names, **SIZES)
    with pytest.raises(ImageError, match='holds 2 planes in depth'), open_image(path):
        pass
    with (
        pytest.raises(ImageError, match=r'4 channels \(0 DAPI, 1 b'),
        open_image(path, choice=Choice(z=1)),
    ):
        pass
    scale = ValueRange(0, 4080)
    choice = Choice(z=1, channels=(3, 0, 2))
    with open_image(path, choice=choice, value_range=scale) as reader:
        expected = np.rint(np.concatenate([planes[c, 1] for c in (3, 0, 2)], 2) / 16)
        assert np.array_equal(reader.read(0, 0, *HW), expected)
        assert 'z 1 of 2, channels 3 (d), 0 (DAPI), 2 (c) of 4' in reader.says
    with open_image(path, choice=Choice(z=0, channels=(1,))) as reader:
        grey = reader.read(0, 0, *HW)  # by its own range, which begins at 0
        assert np.array_equal(grey[..., 0], grey[..., 2])
        assert reader.value_range.high == 4095
    with (
        pytest.raises(ConfigError, match='no channel 4'),
        open_image(path, choice=Choice(z=0, channels=(4,))),
    ):
        pass


def test_scenes_are_images_and_what_was_not_scanned_is_white(tmp_path: Path) -> None:
    path = tmp_path / 'a.czi'
    rgb = values_of(0, 3)
    with czi.create_czi(str(path)) as document:
        bgr = np.ascontiguousarray(rgb[..., ::-1])
        document.write(data=bgr, location=(0, 0), scene=0)
        document.write(data=bgr, location=(200, 0), scene=1)
        document.write(data=bgr, location=(400, 100), scene=1)
    with pytest.raises(ImageError, match='holds 2 images'), open_czi(path, 0, NO_CHOICE, None):
        pass
    with open_czi(path, 0, Choice(image=1), None) as reader:
        assert reader.image_hw == (175, 291)
        assert reader.um_per_px is None
        assert np.array_equal(reader.read(100, 200, 175, 291), rgb)
        assert (reader.read(0, 91, 100, 291) == 255).all()


def test_a_cut_off_file_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / 'a.czi'
    with czi.create_czi(str(path)) as document:
        document.write(data=values_of(0, 3))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ImageError, match=r'a\.czi: is damaged'), open_image(path):
        pass

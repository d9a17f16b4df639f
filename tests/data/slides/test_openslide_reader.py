"""OpenSlide against tifffile, region by region, and what is no slide."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from cellseg_mm.core.errors import ConfigError, ImageError
from cellseg_mm.data.contents import NO_CHOICE, Choice
from cellseg_mm.data.image_reader import open_image
from cellseg_mm.data.slides.openslide_reader import SlideRegions, on_white, open_slide
from tests.support.dicom_slide import write_dicom_slide
from tests.support.mirax_slide import write_mirax_slide
from tests.support.ventana_slide import write_ventana_slide

HW = (300, 420)
REGIONS = [(0, 0, 61, 83), (13, 31, 50, 70), (60, 82, 61, 83), (0, 5, 1, 83)]
APERIO = 'Aperio Image Library v12\n420x300 [0,0 420x300] (64x64)|AppMag = 40|MPP = 0.2520'


def write_slide(path: Path, level_hws: list[tuple[int, int]], **options: object) -> None:
    """Write a pyramid of smooth noise, each level its own, as Aperio lays it out."""
    rng = np.random.default_rng(0)
    with tifffile.TiffWriter(path) as file:
        for k, (height, width) in enumerate([HW, *level_hws]):
            noise = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
            file.write(
                cv2.blur(noise, (3, 3)),
                photometric='rgb',
                tile=(64, 64),
                description=APERIO + f' -> {width}x{height}' * (k > 0),
                metadata=None,
                software=False,
                **options,
            )


@pytest.mark.parametrize('compression', [None, 'jpeg'])
def test_regions_are_those_of_tifffile(compression: str | None, tmp_path: Path) -> None:
    path = tmp_path / 'a.svs'
    write_slide(path, [(150, 210), (75, 105)], compression=compression)
    for level in range(3):
        with (
            open_image(path, level=level) as ours,
            open_slide(path, level, NO_CHOICE) as theirs,
        ):
            assert ours.level_hws == theirs.level_hws == [HW, (150, 210), (75, 105)]
            assert theirs.um_per_px == pytest.approx(ours.um_per_px)
            assert theirs.full_um_per_px == (0.252, 0.252)
            assert theirs.says == f'read: level {level} of 3'
            whole = theirs.read(0, 0, *theirs.image_hw)
            # decoders of JPEG differ by rounding
            atol = 0 if compression is None else 3
            assert np.allclose(whole.astype(int), ours.read(0, 0, *ours.image_hw), atol=atol)
            for y0, x0, y1, x1 in REGIONS:
                found = theirs.read(y0, x0, y1, x1)
                assert found.flags.c_contiguous
                assert found.dtype == np.uint8
                assert np.array_equal(found, whole[y0:y1, x0:x1])


def test_levels_between_whole_numbers_move_by_half_a_pixel_at_most(tmp_path: Path) -> None:
    path = tmp_path / 'a.svs'
    write_slide(path, [(75, 104)])  # downsample 4.02
    with open_image(path, level=1) as ours, open_slide(path, 1, NO_CHOICE) as theirs:
        expected = ours.read(0, 0, *ours.image_hw).astype(int)
        # a shift of 1 / 8 px mixes at most so much of a neighbour into a pixel, in each direction
        steps = [np.abs(np.diff(expected, axis=axis)).max() for axis in (0, 1)]
        for y0, x0, y1, x1 in REGIONS:
            found = theirs.read(y0, x0, y1, x1).astype(int)
            assert (
                np.abs(found - expected[y0:y1, x0:x1])[1:-1, 1:-1].max(initial=0) <= sum(steps) / 8
            )


def test_what_was_not_scanned_is_white(tmp_path: Path) -> None:
    path = tmp_path / 'a.svs'
    tile = np.full((64, 64, 3), (10, 20, 30), np.uint8)
    options = {'photometric': 'rgb', 'metadata': None, 'software': False, 'compression': 'zlib'}
    tifffile.imwrite(
        path,
        iter([tile, None]),
        shape=(64, 128, 3),
        dtype=np.uint8,
        tile=(64, 64),
        description=APERIO,
        **options,
    )
    with open_image(path) as ours, open_slide(path, 0, NO_CHOICE) as theirs:
        assert np.array_equal(theirs.read(0, 0, 64, 128), ours.read(0, 0, 64, 128))
        assert theirs.read(3, 62, 4, 66).tolist() == [[[10, 20, 30]] * 2 + [[255] * 3] * 2]


def test_edges_are_mixed_with_white() -> None:
    row = np.array([[[10, 20, 30, 255], [100, 0, 200, 51], [0, 0, 0, 0]]], np.uint8)
    # 51 of 255 is a fifth: 100 / 5 + 255 * 4 / 5 = 224; 0 + 204; 200 / 5 + 204 = 244
    assert on_white(row).tolist() == [[[10, 20, 30], [224, 204, 244], [255, 255, 255]]]


def test_a_dicom_slide_is_what_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    levels = [rng.integers(0, 256, (*hw, 3)).astype(np.uint8) for hw in (HW, (150, 210))]
    paths = write_dicom_slide(tmp_path, levels, (0.25, 0.5))
    for path in paths:  # any file of a slide stands for all
        for level, pixels in enumerate(levels):
            with open_image(path, level=level) as reader:
                assert reader.level_hws == [HW, (150, 210)]
                for y0, x0, y1, x1 in REGIONS:
                    assert np.array_equal(reader.read(y0, x0, y1, x1), pixels[y0:y1, x0:x1])
                step = 2**level
                assert reader.um_per_px == pytest.approx((0.25 * step, 0.5 * step))
                assert '0.25 x 0.5 um' in reader.says
    paths[0].write_bytes(paths[0].read_bytes()[:100_000])
    with pytest.raises(ImageError, match=r'0\.dcm'), open_image(paths[0]) as reader:
        reader.read(0, 0, *HW)


@pytest.mark.parametrize('name', ['a.bif', 'a.tif'])
def test_ventanas_tiles_overlap(name: str, tmp_path: Path) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (128, 192, 3)).astype(np.uint8)
    path = tmp_path / name
    write_ventana_slide(path, tiles, overlap_px=8)
    with open_image(path) as reader:
        assert isinstance(reader, SlideRegions)
        assert reader.level_hws == [(128, 176), (64, 88)]  # 3 x 64 less 2 x 8
        assert reader.um_per_px == (0.25, 0.25)
        # tiles begin at 0, 56 and 112; columns that belong to one alone are as stored
        for left, first in ((0, 0), (64, 72), (120, 136)):
            found = reader.read(3, left, 128, left + 48)
            assert np.array_equal(found, tiles[3:, first : first + 48])
    write_ventana_slide(path, tiles, overlap_px=0)
    with open_image(path, level=1) as reader:
        assert np.array_equal(reader.read(0, 0, 64, 96), tiles[::2, ::2])
        assert reader.um_per_px == (0.5, 0.5)


def test_a_mirax_slide_and_its_folder(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (128, 192, 3)).astype(np.uint8)
    path = tmp_path / 'a.mrxs'
    folder = write_mirax_slide(path, pixels, missing=[(1, 2)])
    with open_image(path) as reader:
        assert reader.level_hws == [(128, 192), (64, 96)]
        assert reader.um_per_px == (0.5, 0.25)
        expected = pixels.copy()
        expected[32:64, 64:96] = 255  # not scanned, whatever colour fills it
        for y0, x0, y1, x1 in [(0, 0, 128, 192), (31, 60, 65, 99), (127, 191, 128, 192)]:
            assert np.array_equal(reader.read(y0, x0, y1, x1), expected[y0:y1, x0:x1])
    with open_image(path, level=1) as reader:
        assert np.array_equal(reader.read(0, 0, 64, 96), pixels[::2, ::2])
    data = folder / 'Data0000.dat'
    data.write_bytes(data.read_bytes()[:3000])
    with pytest.raises(ImageError, match=r'a\.mrxs: is damaged'), open_image(path) as reader:
        reader.read(0, 0, 128, 192)
    data.unlink()
    with pytest.raises(ImageError, match=r'a\.mrxs: is damaged'), open_image(path) as reader:
        reader.read(0, 0, 128, 192)


def test_what_is_no_slide_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / 'a.bif').write_bytes(b'II*\0' + bytes(100))
    (tmp_path / 'a.mrxs').write_bytes(b'\xff\xd8\xff\xe0' + bytes(100))
    dicom = tmp_path / 'a.dcm'
    dicom.write_bytes(bytes(128) + b'DICM' + bytes(40))
    (tmp_path / 'a.vsi').write_bytes(b'II*\0' + bytes(100))
    (tmp_path / 'no_suffix').write_bytes(dicom.read_bytes())
    for name, message in {
        'a.bif': r'a\.bif: is damaged, not complete or of another kind',
        'a.dcm': r'a\.dcm: is damaged, not complete or of another kind',
        'no_suffix': 'no_suffix: is damaged, not complete or of another kind',
        'a.mrxs': r'a\.mrxs: its folder a, with Slidedat\.ini and all pixels, is not beside it',
        'a.vsi': 'Olympus VSI',
        'none.mrxs': 'there is no such file',
    }.items():
        with pytest.raises(ImageError, match=message), open_image(tmp_path / name):
            pass


def test_a_cut_off_slide_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / 'a.svs'
    write_slide(path, [(150, 210)])
    path.write_bytes(path.read_bytes()[:200_000])  # within level 0's tiles
    with pytest.raises(ImageError, match=r'a\.svs'), open_slide(path, 0, NO_CHOICE) as reader:
        reader.read(0, 0, *HW)


def test_levels_and_choices_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / 'a.svs'
    write_slide(path, [(150, 210)])
    with pytest.raises(ConfigError, match=r'no level 2.*300 x 420'), open_slide(path, 2, NO_CHOICE):
        pass
    for choice in (Choice(z=1), Choice(image=1), Choice(channels=(1,))):
        with pytest.raises(ConfigError, match='holds one picture'), open_slide(path, 0, choice):
            pass

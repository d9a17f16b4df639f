"""Which image, level, plane and channels are read: by rule, by choice, or the list of them."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile

from cellseg_mm.core.errors import ConfigError, ImageError
from cellseg_mm.data import labels
from cellseg_mm.data.contents import Choice, _outer
from cellseg_mm.data.image_reader import open_image

RNG = np.random.default_rng(0)
SCAN = RNG.integers(0, 256, (256, 320, 3)).astype(np.uint8)
LEVELS = (SCAN, SCAN[::2, ::2].copy(), SCAN[::4, ::4].copy())
LABEL = RNG.integers(0, 256, (90, 70, 3)).astype(np.uint8)
MACRO = RNG.integers(0, 256, (100, 300, 3)).astype(np.uint8)
PLAIN = {'photometric': 'rgb', 'metadata': None, 'software': False, 'contiguous': False}
TILED = {**PLAIN, 'tile': (64, 64)}


def read(path: Path, *, level: int = 0, **choice: object) -> tuple[np.ndarray, str]:
    with open_image(path, level=level, choice=Choice(**choice)) as reader:
        return reader.read(0, 0, *reader.image_hw), reader.says


def refused(path: Path, match: str, error: type = ImageError, **choice: object) -> None:
    with pytest.raises(error, match=match):
        read(path, **choice)


def grey(plane: np.ndarray) -> np.ndarray:
    return np.repeat(plane[..., None], 3, axis=2)


# ----------------------------------------------------------------------------- slides


@pytest.mark.parametrize('has_thumbnail', [True, False])
def test_aperio_label_and_macro_are_never_the_scan(has_thumbnail: bool, tmp_path: Path) -> None:
    path = tmp_path / 'a.svs'
    with tifffile.TiffWriter(path) as writer:
        writer.write(SCAN, description='Aperio Image Library v11|AppMag = 20', **TILED)
        if has_thumbnail:
            writer.write(SCAN[::8, ::8].copy(), description='Aperio', **PLAIN)
        for level in LEVELS[1:]:
            writer.write(level, description='Aperio', **TILED)
        writer.write(LABEL, description='Aperio label', subfiletype=1, **PLAIN)
        writer.write(MACRO, description='Aperio macro', subfiletype=9, **PLAIN)
    for k, wanted in enumerate(LEVELS):
        found, says = read(path, level=k)
        assert np.array_equal(found, wanted)
        n_images = 3 + has_thumbnail
        assert says.startswith(f"read: image 0 of {n_images} ('Baseline', 256 x 320 px, the only")
        assert says.endswith(f'level {k} of 3')
    assert np.array_equal(read(path, image=1 + has_thumbnail)[0], LABEL)
    refused(path, r"no image 7; it holds .*'Label', 90 x 70 px", ConfigError, image=7)


def test_planes_of_either_tifffile() -> None:
    """Up to 2026.3 a series' axes leave out what has length 1; from 2026.5 on no twin has them."""
    page = SimpleNamespace(samplesperpixel=1)
    newer = SimpleNamespace(axes='TCYX', shape=(1, 3, 4, 5), keyframe=page, pages=[page] * 3)
    older = SimpleNamespace(
        axes='CYX',
        shape=(3, 4, 5),
        get_axes=lambda squeeze: 'CYX' if squeeze else 'TCYX',
        get_shape=lambda squeeze: (3, 4, 5) if squeeze else (1, 3, 4, 5),
        keyframe=page,
        pages=[page] * 3,
    )
    for series in (newer, older):
        assert _outer(series) == [('T', 1), ('C', 3)]


def test_aperio_of_strips(tmp_path: Path) -> None:
    path = tmp_path / 'a.svs'
    with tifffile.TiffWriter(path) as writer:
        writer.write(LABEL, description='Aperio Image Library v11|AppMag = 20', **PLAIN)
        writer.write(MACRO, description='Aperio macro', **PLAIN)
    assert np.array_equal(read(path)[0], LABEL)


@pytest.mark.parametrize('n_scans', [1, 2])
def test_leica_reads_the_scan(n_scans: int, tmp_path: Path) -> None:
    def image(number: int, ifds: list[int], size: tuple[int, int]) -> str:
        levels = ''.join(
            f'<dimension sizeX="1" sizeY="1" r="{r}" ifd="{i}"/>' for r, i in enumerate(ifds)
        )
        view = f'<view sizeX="{size[1]}" sizeY="{size[0]}" offsetX="0" offsetY="0"/>'
        return f'<image name="image_{number}"><pixels>{levels}</pixels>{view}</image>'

    scans = ''.join(image(k + 1, [1 + 2 * k, 2 + 2 * k], (512, 640)) for k in range(n_scans))
    xml = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection sizeX="2600" sizeY="7600">{image(0, [0], (7600, 2600))}{scans}'
        '</collection></scn>'
    )
    path = tmp_path / 'a.scn'
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        writer.write(MACRO, description=xml, **TILED)
        for _ in range(n_scans):
            for level in LEVELS[:2]:
                writer.write(level, **TILED)
    if n_scans == 2:
        refused(path, r"holds 3 images \(0: 'image_0', 100 x 300 px; 1: 'image_1', 256 x 320 px")
    chosen = {} if n_scans == 1 else {'image': 2}
    assert np.array_equal(read(path, **chosen)[0], SCAN)
    assert np.array_equal(read(path, level=1, **chosen)[0], LEVELS[1])


def test_hamamatsu_reads_the_scan(tmp_path: Path) -> None:
    path = tmp_path / 'a.tif'  # a real .ndpi has offsets of 8 bytes, which tifffile does not write
    with tifffile.TiffWriter(path) as writer:
        for image, magnification in ((SCAN, 20.0), (LEVELS[1], 10.0), (MACRO, -1.0), (LABEL, -2.0)):
            tags = [
                (271, 's', 0, 'Hamamatsu', True),
                (65420, 'I', 1, 1, True),
                (65421, 'f', 1, magnification, True),
            ]
            writer.write(image, extratags=tags, **PLAIN)
    assert np.array_equal(read(path)[0], SCAN)
    assert np.array_equal(read(path, level=1)[0], LEVELS[1])
    tags = [(271, 's', 0, 'Hamamatsu', True), (65420, 'I', 1, 1, True), (65421, 'f', 1, -1.0, True)]
    tifffile.imwrite(path, MACRO, extratags=tags, **{**PLAIN, 'contiguous': True})
    refused(path, r"holds 1 image \(0: 'Macro', 100 x 300 px\), 0 of them no label")
    assert np.array_equal(read(path, image=0)[0], MACRO)


# ---------------------------------------------------------------------- several images


def test_pages_of_one_size_are_images_to_choose(tmp_path: Path) -> None:
    path = tmp_path / 'a.tif'
    with tifffile.TiffWriter(path) as writer:
        for k in range(3):
            writer.write(LABEL + np.uint8(k), **PLAIN)
    refused(path, r'holds 3 images \(0: I 0, 90 x 70 px; .*has --image 0 to 2')
    found, says = read(path, image=2)
    assert np.array_equal(found, LABEL + np.uint8(2))
    assert says == 'read: image 2 of 3 (I 2, 90 x 70 px, as chosen)'


@pytest.mark.parametrize('sizes', [(LABEL, SCAN), (SCAN, LEVELS[1])], ids=['other', 'half'])
def test_pages_of_different_sizes_are_no_pyramid(sizes: tuple, tmp_path: Path) -> None:
    path = tmp_path / 'a.tif'
    with tifffile.TiffWriter(path) as writer:
        for image in sizes:
            writer.write(image, **TILED)
    refused(path, 'holds 2 images')
    assert np.array_equal(read(path, image=1)[0], sizes[1])


def test_reduced_pages_are_levels_or_small_copies(tmp_path: Path) -> None:
    path = tmp_path / 'a.tif'
    with tifffile.TiffWriter(path) as writer:
        writer.write(SCAN, **TILED)
        writer.write(LEVELS[1], subfiletype=1, **TILED)
        writer.write(LABEL, subfiletype=1, **TILED)
    assert np.array_equal(read(path)[0], SCAN)
    assert np.array_equal(read(path, level=1)[0], LEVELS[1])


def test_positions_and_scans_of_ome(tmp_path: Path) -> None:
    path = tmp_path / 'a.ome.tif'

    def write(*named: tuple[str, np.ndarray]) -> None:
        with tifffile.TiffWriter(path, ome=True) as writer:
            for name, image in named:
                writer.write(image, photometric='rgb', metadata={'axes': 'YXS', 'Name': name})

    write(('Pos0', LABEL), ('Pos1', LABEL + np.uint8(1)))
    refused(path, r"holds 2 images \(0: 'Pos0', 90 x 70 px; 1: 'Pos1'")
    assert np.array_equal(read(path, image=1)[0], LABEL + np.uint8(1))
    write(('label image', LABEL), ('scan', SCAN), ('Macro', MACRO))
    found, says = read(path)
    assert np.array_equal(found, SCAN)
    assert says.startswith("read: image 1 of 3 ('scan'")


# -------------------------------------------------------------- stacks and channels

STACK = RNG.integers(0, 256, (2, 3, 4, 20, 31)).astype(np.uint8)  # T, Z, C


@pytest.mark.parametrize('kind', ['ome', 'imagej'])
def test_stacks_are_refused_or_chosen(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ('a.ome.tif' if kind == 'ome' else 'a.tif')
    options = {'photometric': 'minisblack', 'metadata': {'axes': 'TZCYX'}, kind: True}
    with tifffile.TiffWriter(path, **{kind: True}) as writer:
        options.pop(kind)
        writer.write(STACK, **options)
    refused(path, r'holds 3 planes in depth \(.*2 t x 3 z x 4 c\).*--z 0 to 2')
    refused(path, r'holds 2 moments in time .*--t 0 to 1', z=1)
    refused(path, '4 values per pixel, 0 of them alpha', z=1, t=1)
    refused(path, 'has no z 3; it has 3; choose --z from 0 to 2', ConfigError, z=3)
    refused(path, 'no channel 4; it has 4', ConfigError, z=1, t=1, channels=(4,))
    found, says = read(path, z=2, t=1, channels=(3, 0, 1))
    assert np.array_equal(found, STACK[1, 2, [3, 0, 1]].transpose(1, 2, 0))
    assert says == 'read: z 2 of 3, t 1 of 2, channels 3, 0, 1 of 4 as red, green and blue'


def test_imagej_stack_that_lists_one_page(tmp_path: Path) -> None:
    path = tmp_path / 'a.tif'
    planes = STACK[0, 0]
    text = 'ImageJ=1.53t\nimages=4\nslices=4\n'
    tifffile.imwrite(path, planes[0], metadata=None, description=text)
    with tifffile.TiffFile(path) as file:
        end = file.pages[0].dataoffsets[0] + file.pages[0].databytecounts[0]
    path.write_bytes(path.read_bytes()[:end] + planes[1:].tobytes())
    refused(path, 'holds 4 planes in depth')
    assert np.array_equal(read(path, z=3)[0], grey(planes[3]))
    with pytest.raises(ImageError, match='is a stack of 4 planes'):
        labels.read_image(path)
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, 'truncated|damaged|holds 1 planes|has no z', (ImageError, ConfigError), z=3)


def test_channels_of_ome_are_named(tmp_path: Path) -> None:
    path = tmp_path / 'a.ome.tif'
    names = ['GFP', 'RFP', 'Cy5', 'DAPI']
    metadata = {'axes': 'CYX', 'Channel': {'Name': names}}
    tifffile.imwrite(path, STACK[0, 0], photometric='minisblack', metadata=metadata)
    refused(path, '4 values per pixel.*: 0 GFP, 1 RFP, 2 Cy5, 3 DAPI')
    found, says = read(path, channels=(3,))
    assert np.array_equal(found, grey(STACK[0, 0, 3]))
    assert says == 'read: channel 3 (DAPI) of 4 as grey'
    tifffile.imwrite(path, STACK[0, 0, :2], photometric='minisblack', metadata={'axes': 'CYX'})
    refused(path, '2 values per pixel')


def test_choices_that_nobody_can_mean() -> None:
    for wrong in ({'channels': (0, 1)}, {'z': -1}, {'channels': (0, 1, -2)}):
        with pytest.raises(ConfigError, match='expected numbers from 0, and one channel'):
            Choice(**wrong)


# -------------------------------------------------------------------- sets of OME files


def write_set(folder: Path, side: int, *, by_master: bool = False, **options: object) -> np.ndarray:
    """Write three files of one channel each, as Micro-Manager and Bio-Formats do."""
    ids = [f'urn:uuid:{uuid.uuid4()}' for _ in range(3)]
    spaces = 'xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"'
    data = ''.join(
        f'<TiffData FirstC="{c}" IFD="0" PlaneCount="1">'
        f'<UUID FileName="set_C{c}.ome.tif">{ids[c]}</UUID></TiffData>'
        for c in range(3)
    )
    channels = ''.join(f'<Channel ID="Channel:0:{c}" SamplesPerPixel="1"/>' for c in range(3))
    size = f'SizeX="{side}" SizeY="{side}" SizeC="3" SizeZ="1" SizeT="1"'
    pixels = f'<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" {size}>'
    planes = [RNG.integers(0, 60 + 60 * c, (side, side), dtype=np.uint8) for c in range(3)]
    for c in range(3):
        content = f'<Image ID="Image:0">{pixels}{channels}{data}</Pixels></Image>'
        if by_master and c:
            content = f'<BinaryOnly MetadataFile="set_C0.ome.tif" UUID="{ids[0]}"/>'
        text = (
            f'<?xml version="1.0" encoding="UTF-8"?><OME {spaces} UUID="{ids[c]}">{content}</OME>'
        )
        tifffile.imwrite(
            folder / f'set_C{c}.ome.tif',
            planes[c],
            description=text,
            metadata=None,
            photometric='minisblack',
            **options,
        )
    return np.dstack(planes)


@pytest.mark.parametrize('options', [{}, {'compression': 'zlib', 'tile': (32, 32)}])
def test_every_file_of_a_set_is_the_set(options: dict, tmp_path: Path) -> None:
    wanted = write_set(tmp_path, 70, **options)
    for c in range(3):
        found, says = read(tmp_path / f'set_C{c}.ome.tif')
        assert np.array_equal(found, wanted)
        assert says == 'read: channels 0, 1, 2 of 3 as red, green and blue'
        found, _ = read(tmp_path / f'set_C{c}.ome.tif', channels=(2,))
        assert np.array_equal(found, grey(wanted[..., 2]))


def test_files_without_the_text_of_their_set_are_their_own_plane(tmp_path: Path) -> None:
    wanted = write_set(tmp_path, 70, by_master=True)
    assert np.array_equal(read(tmp_path / 'set_C0.ome.tif')[0], wanted)
    found, says = read(tmp_path / 'set_C1.ome.tif')
    assert np.array_equal(found, grey(wanted[..., 1]))
    assert says == 'read: this part alone of the set that set_C0.ome.tif describes'


def test_a_set_that_is_not_whole(tmp_path: Path) -> None:
    write_set(tmp_path, 70)
    own, other = tmp_path / 'set_C0.ome.tif', tmp_path / 'set_C1.ome.tif'
    content = other.read_bytes()
    other.unlink()
    refused(own, r'part of a set of files, of which set_C1.ome.tif is missing')
    os.mkfifo(other)  # opening it would wait for ever
    refused(own, r'of which set_C1.ome.tif is missing')
    other.unlink()
    other.write_bytes((tmp_path / 'set_C2.ome.tif').read_bytes())
    refused(own, 'the file of that name is another one')
    other.write_bytes(content)
    names = own.read_bytes()
    own.write_bytes(names.replace(b'set_C1.ome.tif', b'../C1.ome.tifx'))
    refused(own, "names the file '../C1.ome.tifx' of another folder")

"""OME-Zarr of both versions against tifffile, and folders that are none."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_mm.core.errors import ConfigError, ImageError
from cellseg_mm.data.contents import NO_CHOICE, Choice
from cellseg_mm.data.image_reader import open_image

zarr = pytest.importorskip('zarr', minversion='3', reason='zarr 3 wants Python 3.11')

HW = (75, 91)
REGIONS = [(0, 0, 37, 45), (0, 0, 1, 1), (13, 30, 33, 40), (31, 0, 33, 45)]
VERSIONS = [pytest.param(2, id='0.4 on Zarr 2'), pytest.param(3, id='0.5 on Zarr 3')]


def levels_of(dtype: type = np.uint8, high: int = 256, channels: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    hws = [HW, (37, 45)]
    return [rng.integers(0, high, (*hw, channels)).astype(dtype) for hw in hws]


def describe(group: zarr.Group, version: int, known: dict) -> None:
    group.attrs.update({'ome': {'version': '0.5', **known}} if version == 3 else known)


def write_image(
    group: zarr.Group,
    version: int,
    levels: list[np.ndarray],
    *,
    axes: str = 'tczyx',
    unit: str | None = 'micrometer',
    names: tuple[str, ...] = (),
) -> None:
    """Write (H, W, C) levels in the order of ``axes``; further axes have one place."""
    described = []
    for axis in axes:
        kind = {'t': 'time', 'c': 'channel'}.get(axis, 'space')
        one = {'name': axis, 'type': kind}
        described.append({**one, 'unit': unit} if unit and axis in 'yx' else one)
    datasets = []
    for k, values in enumerate(levels):
        inner = [axis for axis in axes if axis in 'yxc']
        stored = np.moveaxis(values, [0, 1, 2], [inner.index(axis) for axis in 'yxc'])
        for at, axis in enumerate(axes):
            if axis in 'tz':
                stored = np.expand_dims(stored, at)
        chunks = tuple(32 if axis in 'yx' else 1 for axis in axes)
        group.create_array(str(k), data=stored, chunks=chunks)
        step = [
            {'y': 0.25, 'x': 0.5}.get(axis, 1.0) * (2**k if axis in 'yx' else 1) for axis in axes
        ]
        datasets.append(
            {'path': str(k), 'coordinateTransformations': [{'type': 'scale', 'scale': step}]}
        )
    known = {'multiscales': [{'version': '0.4', 'axes': described, 'datasets': datasets}]}
    if names:
        known['omero'] = {'channels': [{'label': name} for name in names]}
    describe(group, version, known)


def new_store(path: Path, version: int) -> zarr.Group:
    return zarr.open_group(str(path), mode='w', zarr_format=version)


@pytest.mark.parametrize('version', VERSIONS)
@pytest.mark.parametrize('axes', ['tczyx', 'cyx', 'yxc', 'zcyx'])
@pytest.mark.parametrize(('dtype', 'high'), [(np.uint8, 256), (np.uint16, 3000)])
def test_regions_are_those_of_a_tiff(
    version: int, axes: str, dtype: type, high: int, tmp_path: Path
) -> None:
    levels = levels_of(dtype, high)
    write_image(new_store(tmp_path / 'a.zarr', version), version, levels, axes=axes)
    for level, values in enumerate(levels):
        tifffile.imwrite(tmp_path / 'a.tif', values, photometric='rgb')
        with (
            open_image(tmp_path / 'a.zarr', level=level) as ours,
            open_image(tmp_path / 'a.tif') as theirs,
        ):
            assert ours.level_hws == [HW, (37, 45)]
            assert ours.image_hw == theirs.image_hw
            for y0, x0, y1, x1 in REGIONS:
                found = ours.read(y0, x0, y1, x1)
                assert found.flags.c_contiguous
                assert np.array_equal(found, theirs.read(y0, x0, y1, x1))
            assert ours.value_range == theirs.value_range
            full_y, full_x = 0.25, 0.5
            assert ours.full_um_per_px == (full_y, full_x)
            assert ours.um_per_px == pytest.approx(
                (full_y * HW[0] / ours.image_hw[0], full_x * HW[1] / ours.image_hw[1])
            )


@pytest.mark.parametrize(
    ('unit', 'expected'),
    [('micrometer', (0.25, 0.5)), ('nanometer', None), ('millimeter', None), (None, None)],
)
def test_units(unit: str | None, expected: tuple | None, tmp_path: Path) -> None:
    write_image(new_store(tmp_path / 'a.zarr', 3), 3, levels_of(), unit=unit)
    with open_image(tmp_path / 'a.zarr') as reader:
        assert reader.um_per_px == expected
        # 0.25 and 0.5 of anything but micrometres are no picture of cells
        assert ('not used' in reader.says) == (unit != 'micrometer')
        assert ('0.25 x 0.5 of no named unit' in reader.says) == (unit is None)


@pytest.mark.parametrize('version', VERSIONS)
def test_channels_are_chosen_by_number(version: int, tmp_path: Path) -> None:
    levels = levels_of(np.uint16, 4000, channels=4)
    group = new_store(tmp_path / 'a.zarr', version)
    write_image(group, version, levels, names=('DAPI', 'b', 'c', 'd'))
    path = tmp_path / 'a.zarr'
    with pytest.raises(ImageError, match=r'4 channels \(0 DAPI, 1 b'), open_image(path):
        pass
    with (
        pytest.raises(ConfigError, match='no channel 4'),
        open_image(path, choice=Choice(channels=(4,))),
    ):
        pass
    from cellseg_mm.data.intensity import ValueRange

    scale = ValueRange(0, 4080)  # 16 values a step
    with open_image(path, choice=Choice(channels=(3, 0, 2)), value_range=scale) as reader:
        expected = np.rint(levels[0][..., [3, 0, 2]] / 16)
        assert np.array_equal(reader.read(0, 0, *HW), expected)
        assert 'channels 3 (d), 0 (DAPI), 2 (c) of 4' in reader.says
    with open_image(path, choice=Choice(channels=(1,)), value_range=scale) as reader:
        grey = np.rint(levels[0][..., 1] / 16)
        assert np.array_equal(reader.read(5, 6, 7, 8), np.stack([grey] * 3, -1)[5:7, 6:8])


def test_depth_and_several_images_are_chosen(tmp_path: Path) -> None:
    store = new_store(tmp_path / 'a.zarr', 2)
    store.attrs['bioformats2raw.layout'] = 3
    levels = levels_of()
    for name in '01':
        inner = store.create_group(name)
        write_image(inner, 2, [level // (1 + int(name)) for level in levels])
    path = tmp_path / 'a.zarr'
    with pytest.raises(ImageError, match=r'holds 2 images \(0: 0; 1: 1\)'), open_image(path):
        pass
    with open_image(path, choice=Choice(image=1)) as reader:
        assert np.array_equal(reader.read(0, 0, *HW), levels[0] // 2)
        assert 'image 1 of 2' in reader.says
    with open_image(path / '1') as reader:  # an image inside a store is one by itself
        assert np.array_equal(reader.read(0, 0, *HW), levels[0] // 2)
    with pytest.raises(ConfigError, match='no image 2'), open_image(path, choice=Choice(image=2)):
        pass
    with pytest.raises(ConfigError, match='no z 1'), open_image(path / '0', choice=Choice(z=1)):
        pass


def test_folders_that_are_no_image_are_a_sentence(tmp_path: Path) -> None:
    bare = new_store(tmp_path / 'bare.zarr', 3)
    bare.create_array('0', shape=(4, 4), dtype='u1')
    describe(new_store(tmp_path / 'plate.zarr', 3), 3, {'plate': {'wells': []}})
    group = new_store(tmp_path / 'cut.zarr', 2)
    write_image(group, 2, levels_of())
    shutil.rmtree(tmp_path / 'cut.zarr' / '1')
    damaged = tmp_path / 'damaged.zarr'
    damaged.mkdir()
    (damaged / 'zarr.json').write_text('{"zarr_format": 3, ')
    for name, message in {
        'bare': 'without multiscales',
        'plate': 'is a plate of wells',
        'cut': r'cut\.zarr: is damaged, not complete',
        'damaged': r'damaged\.zarr: is damaged, not complete',
    }.items():
        with pytest.raises(ImageError, match=message), open_image(tmp_path / f'{name}.zarr'):
            pass
    with pytest.raises(ImageError, match='this is a folder'), open_image(tmp_path):
        pass


def test_a_damaged_chunk_is_a_sentence(tmp_path: Path) -> None:
    write_image(new_store(tmp_path / 'a.zarr', 3), 3, levels_of())
    chunk = next(p for p in sorted((tmp_path / 'a.zarr' / '0' / 'c').rglob('*')) if p.is_file())
    chunk.write_bytes(chunk.read_bytes()[:20])
    with (
        pytest.raises(ImageError, match=r'a\.zarr: is damaged'),
        open_image(tmp_path / 'a.zarr', choice=NO_CHOICE) as reader,
    ):
        reader.read(0, 0, 10, 10)

"""Values of more than 8 bits: one range for a collection, and no single pixel decides about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_mm.core.errors import CellSegError, ConfigError, ImageError
from cellseg_mm.data import labels
from cellseg_mm.data.image_reader import open_image
from cellseg_mm.data.intensity import (
    Brightest,
    ValueRange,
    collection_range,
    is_nearly_black,
    load_range,
    n_lit,
    nominal_range,
    recorded_range,
    save_range,
)

HW = (64, 66)


def noise(high: int, dtype: str = 'uint16', seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, high + 1, HW).astype(dtype)
    values[0, :8] = high  # more than a thousandth of 4224 px
    return values


def read(tmp_path: Path, values: np.ndarray, **options) -> np.ndarray:
    tifffile.imwrite(tmp_path / 'i.tif', values)
    with open_image(tmp_path / 'i.tif', whole_px=0, **options) as reader:
        by_region = reader.read(0, 0, *values.shape[:2])
    whole = labels.read_image(tmp_path / 'i.tif', **options)
    assert np.array_equal(whole, by_region)
    return whole


# ----------------------------------------------------------------------------- one file


@pytest.mark.parametrize(
    ('high', 'dtype', 'burnt'),
    [
        (255, 'uint16', 256),
        (255, 'uint16', 65535),
        (4095, 'uint16', 65535),
        (60000, 'uint32', 2**32 - 1),
        (200, 'int16', 32767),
        (1, 'float32', 1.02),
        (1, 'float64', 1e30),
        (250, 'float32', 5000),
    ],
)
def test_one_pixel_changes_itself_alone(
    high: int, dtype: str, burnt: float, tmp_path: Path
) -> None:
    values = noise(high, dtype) if high > 1 else (noise(1000) / 1000).astype(dtype)
    without = read(tmp_path, values)
    values[20, 30] = burnt
    found = read(tmp_path, values)
    assert found[20, 30].tolist() == [255] * 3
    found[20, 30] = without[20, 30]
    assert np.array_equal(found, without)
    assert without.max() > 190


@pytest.mark.parametrize('is_float', [False, True])
def test_neighbours_in_brightness_come_out_alike(is_float: bool) -> None:
    """No step in the scale above a tenth, wherever the brightness of a file lies."""
    least = 0.9 if is_float else 200.0
    highs = least * 1.002 ** np.arange(3000)
    scales = np.array([nominal_range(high, is_float=is_float).high for high in highs])
    assert (scales >= highs).all()
    assert np.abs(np.log(scales[1:] / scales[:-1])).max() < np.log(1 / 0.89)


@pytest.mark.parametrize(
    ('brightest', 'is_float', 'high'),
    [
        (0, False, 255),
        (255, False, 255),
        (256, False, 256),
        (950, False, 1023),
        (3686, False, 4095),
        (3685, False, 3685),
        (65535, False, 65535),
        (0.3, True, 1),
        (1, True, 1),
        (1.02, True, 1.02),
        (240, True, 255),
    ],
)
def test_full_ranges_are_taken_where_they_are_nearly_filled(
    brightest: float, is_float: bool, high: float
) -> None:
    assert nominal_range(brightest, is_float=is_float) == ValueRange(0, high)


@pytest.mark.parametrize('seed', range(5))
def test_parts_give_what_the_whole_gives(seed: int) -> None:
    """Compared with sorting all pixels: the greatest thousandth is left out."""
    rng = np.random.default_rng(seed)
    values = rng.gamma(2, 500, (300, 401, 3)).astype(np.uint16)
    expected = np.sort(values.max(axis=-1), axis=None)[-(300 * 401 // 1000) - 1]
    found = Brightest(Path('x'), 300 * 401)
    for part in np.array_split(values, 7):
        found.add(part)
    assert found.value() == expected


@pytest.mark.parametrize('bits', [1, 2, 4, 8])
def test_values_of_up_to_8_bits_depend_on_no_range(bits: int, tmp_path: Path) -> None:
    values = np.random.default_rng(bits).integers(0, 2**bits, HW).astype(np.uint8)
    path = tmp_path / 'i.tif'
    stored = values.astype(bool) if bits == 1 else values
    tifffile.imwrite(path, stored, bitspersample=bits, photometric='minisblack')
    expected = np.rint(values * (255 / (2**bits - 1)))
    for value_range in (None, ValueRange(0, 4095)):
        found = labels.read_image(path, value_range=value_range)
        assert np.array_equal(found[..., 0], expected)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ([[0.5, np.nan]], '1 values are NaN or infinite'),
        ([[0.5, np.inf]], '1 values are NaN or infinite'),
        ([[0.5, -0.25]], r'values down to -0\.25; expected none below 0'),
    ],
)
@pytest.mark.parametrize('value_range', [None, ValueRange(0, 9)])
def test_values_that_are_no_brightness_are_one_sentence(
    values: list, message: str, value_range: ValueRange | None, tmp_path: Path
) -> None:
    tifffile.imwrite(tmp_path / 'i.tif', np.array(values, dtype=np.float32))
    with pytest.raises(ImageError, match=message):
        labels.read_image(tmp_path / 'i.tif', value_range=value_range)


def test_a_range_that_begins_below_0_lets_negative_values_in(tmp_path: Path) -> None:
    # (v + 2) * 255 / 4: 0, 63.75, 127.5 (to even), 255, and 3 is cut
    values = np.array([[-2, -1, 0, 2, 3]], dtype=np.float32)
    found = read(tmp_path, values, value_range=ValueRange(-2, 2))
    assert found[0, :, 0].tolist() == [0, 64, 128, 255, 255]


# ------------------------------------------------------------------------- a collection


@pytest.mark.parametrize(
    ('highs', 'high'),
    [
        ([4095], 4095),
        ([255, 256], 256),
        ([900, 1000, 2000], 2000),
        ([1, 1, 255], 1),  # one file was saved in 0..255
        ([1000, 9000], 9000),
        ([255, 255, 300, 4095, 4095], 4095),  # two of five belong to it
        ([500] * 18 + [9000] * 2, 500),
        ([500] * 17 + [9000] * 3, 9000),
    ],
)
def test_one_range_for_all_files(highs: list[float], high: float) -> None:
    assert collection_range(highs) == ValueRange(0, high)
    assert collection_range(highs[::-1]) == ValueRange(0, high)


def test_a_range_is_recorded_beside_the_folds_or_the_data(tmp_path: Path) -> None:
    (tmp_path / 'folds').mkdir()
    folds = tmp_path / 'folds' / 'folds.json'
    assert recorded_range(tmp_path, folds) is None
    save_range(tmp_path / 'range.json', ValueRange(0, 4095))
    assert recorded_range(tmp_path, folds) == ValueRange(0, 4095)
    save_range(tmp_path / 'folds' / 'range.json', ValueRange(0.25, 1))
    assert recorded_range(tmp_path, folds) == ValueRange(0.25, 1)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('{', 'cannot be read'),
        ('[1, 2]', 'holds no range'),
        ('{"range": [1]}', 'holds no range'),
        ('{"range": [5, 1]}', 'holds no range'),
        ('{"range": ["a", 1]}', 'holds no range'),
    ],
)
def test_a_damaged_range_file_is_one_sentence(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / 'range.json').write_text(content)
    with pytest.raises(CellSegError, match=rf'range\.json: {message}'):
        load_range(tmp_path / 'range.json')


@pytest.mark.parametrize('text', ['', '5', '1,2,3', 'a,b', '5,5', '5,1', '0,inf', 'nan,1'])
def test_wrong_words_for_a_range(text: str) -> None:
    with pytest.raises(ConfigError, match=r'^range .*expected two'):
        ValueRange.from_text(text)


def test_words_for_a_range() -> None:
    found = ValueRange.from_text('-0.5, 4095')
    assert found == ValueRange(-0.5, 4095)
    assert ValueRange.from_json(found.to_json()) == found
    assert str(found) == '-0.5..4095'


def test_nearly_black_hangs_on_no_single_pixel() -> None:
    picture = np.full((40, 50, 3), 25, dtype=np.uint8)
    picture[3, 4, 1] = 255
    assert n_lit(picture) == 1
    assert is_nearly_black(n_lit(picture), 2000)
    picture[5, :3, 2] = 26  # a tenth of 255 is 25.5
    assert not is_nearly_black(n_lit(picture), 2000)

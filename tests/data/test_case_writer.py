"""case_writer: what is written is read back, and only maps with cells become files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_mm.data.case_writer import write_case, write_image
from cellseg_mm.data.labels import find_cases, read_gt

HW = (17, 11)


def test_a_case_comes_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*HW, 3), dtype=np.uint8)
    cells = np.zeros(HW, dtype=np.int32)
    cells[2:5, 1:9] = 70000  # above 16 bits
    cells[8:, 4] = 2
    write_case(tmp_path / 'train/a', image, {3: cells, 1: np.zeros(HW, dtype=np.int32)})
    written = sorted(path.name for path in (tmp_path / 'train/a').iterdir())
    assert written == ['class3.tif', 'image.tif']
    (case,) = find_cases(tmp_path, 'train', 4)
    gt = read_gt(case)
    assert gt.class_ids.tolist() == [2, 2]
    assert gt.areas.tolist() == [9, 24]
    assert tifffile.imread(tmp_path / 'train/a/class3.tif').tolist() == cells.tolist()


@pytest.mark.parametrize('dtype', ['uint8', 'uint16'])
def test_images_get_full_alpha_of_their_own_depth(tmp_path: Path, dtype: str) -> None:
    image = np.arange(3 * HW[0] * HW[1], dtype=dtype).reshape(*HW, 3)
    write_image(tmp_path / 'image.tif', image)
    stored = tifffile.imread(tmp_path / 'image.tif')
    assert stored.dtype == dtype
    assert np.array_equal(stored[..., :3], image)
    assert (stored[..., 3] == np.iinfo(dtype).max).all()

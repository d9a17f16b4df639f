"""A small data folder without a fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tifffile

from tests.support.prepared_cases import (
    HW,
    picture,
    write_case,
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten good cases and two test images."""
    root = tmp_path / 'data'
    for i in range(10):
        write_case(root, f'p{i // 2}-{i}', seed=i)
    (root / 'test_release').mkdir()
    entries = []
    for i in range(2):
        image = picture(100 + i)
        tifffile.imwrite(root / f'test_release/t{i}.tif', image, photometric='rgb')
        entries.append({'file_name': f't{i}.tif', 'id': i + 1, 'height': HW[0], 'width': HW[1]})
    (root / 'test_image_name_to_ids.json').write_text(json.dumps(entries))
    return root

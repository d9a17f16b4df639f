"""Write cases in the project's own layout.

In: pixels and label maps. Out: image.tif and class{k}.tif. Invariant: files appear whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tifffile
from numpy.typing import NDArray

from cellseg_mm.core.files import atomic_path

Pixels: TypeAlias = NDArray[np.uint8] | NDArray[np.uint16]


def write_case(
    case_dir: Path | str, image: Pixels, label_maps: Mapping[int, NDArray[np.integer[Any]]]
) -> None:
    """Write one training case as the real collection stores it.

    Args:
        case_dir: Folder to make, named like the case.
        image: (H, W, 3) RGB of 8 or 16 bits, as it is to be stored; alpha is added.
        label_maps: Class number (1-based) to an (H, W) label map. A map without any instance is
            not written.
    """
    case_dir = Path(case_dir)
    case_dir.mkdir(parents=True, exist_ok=True)
    write_image(case_dir / 'image.tif', image)
    for class_number, label_map in sorted(label_maps.items()):
        if label_map.any():
            write_label_map(case_dir / f'class{class_number}.tif', label_map)


def write_label_map(path: Path | str, label_map: NDArray[np.integer[Any]]) -> None:
    """Write (H, W) ids as the real collection does: floats of 64 bits, LZW."""
    with atomic_path(path) as temporary:
        tifffile.imwrite(
            temporary,
            label_map.astype(np.float64),
            compression='lzw',
            photometric='minisblack',
            metadata=None,
            software=False,
        )


def write_image(path: Path | str, image: Pixels) -> None:
    """Write (H, W, 3) of 8 or 16 bits as an RGBA TIFF: LZW with predictor, strips of some 8 KiB."""
    alpha = np.full((*image.shape[:2], 1), np.iinfo(image.dtype).max, dtype=image.dtype)
    with atomic_path(path) as temporary:
        tifffile.imwrite(
            temporary,
            np.concatenate([image, alpha], axis=2),
            photometric='rgb',
            extrasamples=['unassalpha'],
            compression='lzw',
            predictor=True,
            rowsperstrip=max(1, 8192 // (4 * image.itemsize * image.shape[1])),
            metadata=None,
            software=False,
        )

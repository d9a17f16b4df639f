"""Write cases in the project's own layout.

In: pixels and label maps. Out: image.tif and class{k}.tif. Invariant: files appear whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tifffile
from numpy.typing import NDArray

from cellseg_mm.core.files import atomic_path

Pixels: TypeAlias = NDArray[np.uint8] | NDArray[np.uint16]


def write_case(
    case_dir: Path | str,
    image: Pixels | Path,
    label_maps: Mapping[int, NDArray[np.integer[Any]]],
    *,
    um_per_px: tuple[float, float] | None = None,
) -> None:
    """Write one training case as the real collection stores it.

    Args:
        case_dir: Folder to make, named like the case.
        image: (H, W, 3) RGB of 8 or 16 bits, as it is to be stored; alpha is added. Or a file that
            is stored already as it is to be, which is copied.
        label_maps: Class number (1-based) to an (H, W) label map. A map without any instance is
            not written.
        um_per_px: Height and width of a pixel in micrometres, if known.
    """
    case_dir = Path(case_dir)
    case_dir.mkdir(parents=True, exist_ok=True)
    if isinstance(image, Path):
        shutil.copyfile(image, case_dir / 'image.tif')
    else:
        write_image(case_dir / 'image.tif', image, um_per_px=um_per_px)
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


def write_image(
    path: Path | str, image: Pixels, *, um_per_px: tuple[float, float] | None = None
) -> None:
    """Write (H, W, 3) of 8 or 16 bits as an RGBA TIFF: LZW with predictor, strips of some 8 KiB.

    The size of a pixel goes into the resolution tags.
    """
    known: dict[str, Any] = {}
    if um_per_px is not None:
        across, down = 1e4 / um_per_px[1], 1e4 / um_per_px[0]
        known = {'resolution': (across, down), 'resolutionunit': 'CENTIMETER'}
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
            **known,
            metadata=None,
            software=False,
        )

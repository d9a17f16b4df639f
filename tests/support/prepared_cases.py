"""Cases to prepare: pictures and label maps with every oddity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile

from cellseg_mm.data.preparing.case_checks import CaseFacts
from cellseg_mm.data.preparing.likeness import detail_of
from cellseg_mm.data.preparing.records import PrepareParams, PrepareReport

HW = (40, 61)
CLASSES = ('round', 'long')
ROOT = Path(__file__).parents[2]
PARAMS = PrepareParams(class_names=CLASSES, n_workers=1)


def picture(seed: int) -> np.ndarray:
    """Smooth random colour, so that different seeds do not look alike."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (8, 12, 3))
    image = np.kron(coarse, np.ones((5, 6, 1)))[: HW[0], : HW[1]]
    padded = np.zeros((*HW, 3))
    padded[: image.shape[0], : image.shape[1]] = image
    return padded.astype(np.uint8)


def cell_map(*cells: tuple[int, int, int, int, int]) -> np.ndarray:
    """Rectangles (id, y0, y1, x0, x1)."""
    label_map = np.zeros(HW)
    for value, y0, y1, x0, x1 in cells:
        label_map[y0:y1, x0:x1] = value
    return label_map


def write_case(root: Path, name: str, *, seed: int | None = None, **maps: np.ndarray) -> Path:
    folder = root / 'train' / name
    folder.mkdir(parents=True)
    seed = sum(name.encode()) * 31 + len(name) if seed is None else seed
    tifffile.imwrite(folder / 'image.tif', picture(seed), photometric='rgb', compression='lzw')
    maps = maps or {'class1': cell_map((1, 2, 6, 2, 9)), 'class2': cell_map((2, 9, 12, 2, 9))}
    for key, label_map in maps.items():
        tifffile.imwrite(folder / f'{key}.tif', label_map)
    return folder


def kinds(report: PrepareReport) -> dict[str, int]:
    found: dict[str, int] = {}
    for warning in report.warnings:
        found[warning.kind] = found.get(warning.kind, 0) + warning.count
    return found


def facts_of(name: str, image: np.ndarray, pixel_hash: str) -> CaseFacts:
    grey = image.astype(np.uint8)
    detail = detail_of(np.repeat(grey[..., None], 3, axis=2))
    return CaseFacts(name, (100, 100), (1,), (1,), pixel_hash, grey.tobytes().hex(), detail)

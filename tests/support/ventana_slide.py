"""Writes a Ventana BIF of overlapping tiles, as OpenSlide wants it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile

TILE = 64
ROWS, COLUMNS = 2, 3
HEAD = (
    '<?xml version="1.0"?><Metadata><iScan Magnification="40" ScanRes="0.25" UnitNumber="1" '
    'Z-layers="1" Z-spacing="1"/></Metadata>'
)


def write_ventana_slide(path: Path, tiles: np.ndarray, overlap_px: int) -> None:
    """Write tiles, (128, 192, 3) side by side, of which neighbours share columns; two levels."""
    options = {'photometric': 'rgb', 'metadata': None, 'software': False}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        label = np.zeros((40, 60, 3), np.uint8)
        file.write(label, description='Label Image', extratags=[_xml(HEAD)], **options)
        file.write(
            tiles,
            tile=(TILE, TILE),
            description='level=0 mag=40 quality=90',
            extratags=[_xml(_joints(overlap_px))],
            **options,
        )
        file.write(
            tiles[::2, ::2],
            tile=(TILE, TILE),
            description='level=1 mag=20 quality=90',
            subfiletype=1,
            **options,
        )


def _xml(text: str) -> tuple[int, int, None, bytes, bool]:
    return (700, 1, None, text.encode(), True)


def _number(row: int, column: int) -> int:
    """Tiles are counted from 1, from the lower left, there and back again."""
    return row * COLUMNS + (column if row % 2 == 0 else COLUMNS - 1 - column) + 1


def _joints(overlap_px: int) -> str:
    pairs = [
        ('RIGHT', _number(row, column), _number(row, column + 1), overlap_px)
        for row in range(ROWS)
        for column in range(COLUMNS - 1)
    ]
    pairs += [('UP', _number(0, column), _number(1, column), 0) for column in range(COLUMNS)]
    joints = ''.join(
        f'<TileJointInfo FlagJoined="1" Confidence="98" Direction="{direction}" Tile1="{first}" '
        f'Tile2="{second}" OverlapX="{overlap}" OverlapY="0"/>'
        for direction, first, second, overlap in pairs
    )
    return (
        '<?xml version="1.0"?><EncodeInfo Ver="2"><SlideInfo/><SlideStitchInfo>'
        f'<ImageInfo AOIScanned="1" AOIIndex="0" Width="{TILE}" Height="{TILE}" NumRows="{ROWS}" '
        f'NumCols="{COLUMNS}" Pos-X="0" Pos-Y="0">{joints}</ImageInfo></SlideStitchInfo>'
        '<AoiOrigin><AOI0 OriginX="0" OriginY="0"/></AoiOrigin></EncodeInfo>'
    )

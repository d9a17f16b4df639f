"""Writes a MIRAX slide: a picture, and a folder with its description, index and pixels."""

from __future__ import annotations

import io
import struct
from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image

TILE = 32
SLIDE_ID = 'ABCDEF0123456789'
N_LEVELS = 2

Entry = tuple[int, int, int, int]  # number of the tile, offset, length, file


def write_mirax_slide(
    path: Path, pixels: np.ndarray, missing: Collection[tuple[int, int]] = ()
) -> Path:
    """Write (H, W, 3) of whole, even tiles; ``missing`` of level 0, as (row, column), are left out.

    Pixels are 0.5 um high and 0.25 um wide. Returns the folder.
    """
    folder = path.with_suffix('')
    folder.mkdir()
    rows, columns = (side // TILE for side in pixels.shape[:2])
    data = bytearray(b'01.02' + SLIDE_ID.encode())
    levels: list[list[Entry]] = []
    for level in range(N_LEVELS):
        step, entries = 2**level, []
        shrunk = pixels[::step, ::step]
        for row in range(0, rows, step):
            for column in range(0, columns, step):
                if level == 0 and (row, column) in missing:
                    continue
                top, left = row // step * TILE, column // step * TILE
                tile = _png(shrunk[top : top + TILE, left : left + TILE])
                entries.append((row * columns + column, len(data), len(tile), 0))
                data += tile
        levels.append(entries)
    (folder / 'Data0000.dat').write_bytes(data)
    (folder / 'Index.dat').write_bytes(_index(levels))
    (folder / 'Slidedat.ini').write_text(_description(rows, columns))
    path.write_bytes(_png(pixels[:8, :8]))
    return folder


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, 'PNG')
    return stream.getvalue()


def _index(levels: list[list[Entry]]) -> bytes:
    """A table of levels; each points to 0 and to its page: a count, no next page, the tiles."""
    content = bytearray(b'01.02' + SLIDE_ID.encode())
    table = len(content) + 8
    content += struct.pack('<ii', table, 0) + bytes(4 * len(levels))
    for level, entries in enumerate(levels):
        struct.pack_into('<i', content, table + 4 * level, len(content))
        content += struct.pack('<iiii', 0, len(content) + 8, len(entries), 0)
        content += b''.join(struct.pack('<iiii', *entry) for entry in entries)
    return bytes(content)


def _description(rows: int, columns: int) -> str:
    lines = ['[GENERAL]', 'SLIDE_VERSION=01.02', f'SLIDE_ID={SLIDE_ID}', 'SLIDE_TYPE=BRIGHTFIELD']
    lines += [f'IMAGENUMBER_X={columns}', f'IMAGENUMBER_Y={rows}', 'OBJECTIVE_MAGNIFICATION=40']
    lines += ['CameraImageDivisionsPerSide=1', '[HIERARCHICAL]', 'HIER_COUNT=1', 'NONHIER_COUNT=0']
    lines += ['INDEXFILE=Index.dat', 'HIER_0_NAME=Slide zoom level', f'HIER_0_COUNT={N_LEVELS}']
    for level in range(N_LEVELS):
        lines.append(f'HIER_0_VAL_{level}=ZoomLevel_{level}')
        lines.append(f'HIER_0_VAL_{level}_SECTION=LEVEL_{level}')
    lines += ['[DATAFILE]', 'FILE_COUNT=1', 'FILE_0=Data0000.dat']
    for level in range(N_LEVELS):
        lines += [f'[LEVEL_{level}]', 'OVERLAP_X=0', 'OVERLAP_Y=0', 'IMAGE_FORMAT=PNG']
        lines.append(f'MICROMETER_PER_PIXEL_X={0.25 * 2**level}')
        lines.append(f'MICROMETER_PER_PIXEL_Y={0.5 * 2**level}')
        lines += ['IMAGE_FILL_COLOR_BGR=0', f'DIGITIZER_WIDTH={TILE}', f'DIGITIZER_HEIGHT={TILE}']
        lines.append(f'IMAGE_CONCAT_FACTOR={min(level, 1)}')
    return '\n'.join(lines) + '\n'

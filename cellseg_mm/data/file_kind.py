"""What a file is that should be a picture, told from its first bytes.

In: a path. Out: the first bytes of a regular file that is some kind of picture, or one sentence
that calls it what it is. Invariant: nothing but a regular file is ever opened, and whoever reads
pictures says the same of the same file.
"""

from __future__ import annotations

import stat
from pathlib import Path

from cellseg_mm.core.errors import CellSegError

N_HEAD = 512
TIFF_MAGIC = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')

# Pictures: each reader knows which of them it reads.
PICTURES = {
    **dict.fromkeys(TIFF_MAGIC, 'a TIFF file'),
    b'\x89PNG': 'a PNG file',
    b'\xff\xd8\xff': 'a JPEG file',
    b'BM': 'a BMP file',
    b'GIF8': 'a GIF file',
    b'\0\0\0\x0cjP  ': 'a JPEG 2000 file',
    b'\xff\x4f\xff\x51': 'a JPEG 2000 file',
    b'8BPS': 'a Photoshop file',
    b'ZISRAWFILE': 'a Zeiss CZI file',
    b'\xda\xce\xbe\x0a': 'a Nikon ND2 file',
}
# Files that no reader will ever read, and what to do.
AGAIN = 'fetch or copy it again'
AWAY = 'move it away'
OTHERS = {
    b'PK\x03\x04': ('a ZIP file', 'unpack it'),
    b'PK\x05\x06': ('an empty ZIP file', AGAIN),
    b'\x1f\x8b': ('a gzip file', 'unpack it'),
    b'BZh': ('a bzip2 file', 'unpack it'),
    b'\xfd7zXZ\0': ('an xz file', 'unpack it'),
    b'7z\xbc\xaf\x27\x1c': ('a 7-Zip file', 'unpack it'),
    b'Rar!': ('a RAR file', 'unpack it'),
    b'%PDF': ('a PDF file', 'save its picture alone'),
    b'%!PS': ('a PostScript file', 'save its picture alone'),
    b'version https://git-lfs': (
        'a Git LFS pointer, a note in place of the file',
        'run git lfs pull',
    ),
    b'\x93NUMPY': ('a NumPy file', 'save the array as TIFF'),
    b'\x89HDF': ('an HDF5 file', 'save the picture as TIFF'),
    b'\0\x05\x16\x07': (
        "macOS's notes about another file (a resource fork, AppleDouble)",
        'delete it; the picture is the file without ._',
    ),
    b'\0\x05\x16\0': ('a macOS resource fork (AppleSingle)', 'copy the picture without it'),
    b'\x7fELF': ('a program', AWAY),
    b'MZ': ('a Windows program', AWAY),
    b'\x80\x02': ('a Python pickle', AWAY),
    b'SQLite format 3': ('a database', AWAY),
}
BYTE_ORDER_MARKS = (b'\xef\xbb\xbf', b'\xff\xfe', b'\xfe\xff')


def read_head(path: Path, error: type[CellSegError]) -> bytes:
    """Return the first bytes of what may be a picture.

    Raises:
        CellSegError: As ``error``: it is missing, a folder, a pipe, empty, or no picture at all.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise error(f'{path}: this is a folder; expected an image file; {AWAY}.')
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise error(f'{path}: this is not a regular file; expected an image file; {AWAY}.')
        with path.open('rb') as stream:
            head = stream.read(N_HEAD)
    except OSError as problem:
        raise error(
            f'{path}: cannot be opened ({problem.strerror}); expected a readable image file; '
            'check the path, the link and the permissions.'
        ) from problem
    if not head:
        raise error(
            f'{path}: the file is empty (0 bytes), not an image; expected an image file; {AGAIN}.'
        )
    what, to_do = _no_picture(head)
    if what:
        raise error(f'{path}: this is {what}, not an image; expected an image file; {to_do}.')
    return head


def is_tiff(head: bytes) -> bool:
    """Tell whether a file begins as a TIFF."""
    return head[:4] in TIFF_MAGIC


def found_text(head: bytes) -> str:
    """Return what a file is, for a message of a reader that does not read it."""
    kind = next((name for magic, name in PICTURES.items() if head.startswith(magic)), '')
    if not kind and head[:4] == b'RIFF' and head[8:12] == b'WEBP':
        kind = 'a WebP file'
    if not kind and head[128:132] == b'DICM':
        kind = 'a DICOM file'
    if not kind and head[4:8] == b'ftyp':
        kind = 'a HEIF, AVIF or video file'
    return f'this is {kind}' if kind else f'the file begins with {head[:4].hex(" ")}'


def _no_picture(head: bytes) -> tuple[str, str]:
    """Return what a file is that is no picture, and what to do; nothing if it may be one."""
    for magic, (what, to_do) in OTHERS.items():
        if head.startswith(magic):
            return what, to_do
    if head[257:262] == b'ustar':
        return 'a tar archive', 'unpack it'
    if not head.strip(b'\0'):
        return 'a file of zeros, as a copy that was cut leaves it', AGAIN
    return _text_kind(head)


def _text_kind(head: bytes) -> tuple[str, str]:
    begins = head
    for mark in BYTE_ORDER_MARKS:
        begins = begins.removeprefix(mark)
    begins = begins.replace(b'\0', b'').lstrip().lower()  # UTF-16 has zeros between letters
    if begins.startswith((b'<!doctype html', b'<html', b'<head', b'<body')):
        return 'a web page (HTML), perhaps what a failed download left', AGAIN
    if begins.startswith(b'<svg') or (begins.startswith(b'<?xml') and b'<svg' in begins):
        return 'an SVG drawing', 'save it as a picture of pixels'
    if begins.startswith(b'<?xml'):
        return 'an XML file', AWAY
    if _is_text(head):
        return ('a JSON file' if begins[:1] in (b'{', b'[') else 'a text file'), AWAY
    return '', ''


def _is_text(head: bytes) -> bool:
    if any(head.startswith(mark) for mark in BYTE_ORDER_MARKS[1:]):
        return True
    if any(byte < 32 and byte not in b'\t\r\n\f' for byte in head):
        return False
    try:
        # a letter may be cut at the end
        head[: N_HEAD - 4 if len(head) == N_HEAD else None].decode('utf-8')
    except UnicodeDecodeError:
        return False
    return True

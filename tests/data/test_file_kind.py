"""What is no picture is called what it is, by every reader in the same words."""

from __future__ import annotations

import gzip
import io
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_mm.core.errors import ImageError, LabelMapError
from cellseg_mm.data.image_reader import open_image
from cellseg_mm.data.importing.pictures import read_grid, read_picture
from cellseg_mm.data.importing.sources import Tally
from cellseg_mm.data.labels import read_image, read_label_map


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w') as file:
        file.writestr('a.tif', b'x')
    return stream.getvalue()


POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n'
KINDS = {
    'empty': (b'', r'the file is empty \(0 bytes\), not an image'),
    'page': (b'\n<!DOCTYPE html><html>404</html>', r'a web page \(HTML\)'),
    'page with a mark': (b'\xef\xbb\xbf<HTML lang="en">', r'a web page \(HTML\)'),
    'page of two bytes': ('<html>404'.encode('utf-16'), r'a web page \(HTML\)'),
    'pointer': (POINTER, 'a Git LFS pointer.*run git lfs pull'),
    'resource fork': (b'\0\x05\x16\x07\0\2\0\0Mac OS X' + bytes(60), 'resource fork.*delete it'),
    'zip': (zipped(), 'a ZIP file.*unpack it'),
    'gzip': (gzip.compress(b'x'), 'a gzip file.*unpack it'),
    'pdf': (b'%PDF-1.7\n', 'a PDF file'),
    'svg': (b'<?xml version="1.0"?><svg xmlns=""/>', 'an SVG drawing'),
    'xml': (b'<?xml version="1.0"?><Annotations/>', 'an XML file'),
    'json': (b'{"type": "FeatureCollection"}', 'a JSON file'),
    'text': ('Schöne Grüße'.encode(), 'a text file'),
    'long text': ('ä'.encode() * 400, 'a text file'),  # a letter is cut where reading ends
    'zeros': (bytes(4096), 'a file of zeros'),
    'hdf5': (b'\x89HDF\r\n\x1a\n' + bytes(9), 'an HDF5 file'),
}


def sentence(read, path: Path, error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        read(path)
    return str(caught.value)


@pytest.mark.parametrize('suffix', ['.tif', '.png', '.jpg'])
@pytest.mark.parametrize('kind', KINDS)
def test_every_reader_says_the_same(kind: str, suffix: str, tmp_path: Path) -> None:
    content, expected = KINDS[kind]
    path = tmp_path / f'with space é{suffix}'
    path.write_bytes(content)
    said = {
        sentence(read_image, path, ImageError),
        sentence(lambda p: open_image(p).__enter__(), path, ImageError),
        sentence(read_label_map, path, LabelMapError),
        sentence(lambda p: read_picture(p, Tally(), max_pixels=100), path, ImageError),
        sentence(lambda p: read_grid(p, (5, 7)), path, LabelMapError),
    }
    assert len(said) == 1, said
    assert re.search(expected, said.pop())


@pytest.mark.parametrize('read', [read_image, lambda p: open_image(p).__enter__()])
def test_folders_and_pipes_are_not_opened(read, tmp_path: Path) -> None:
    (tmp_path / 'x.tif').mkdir()
    os.mkfifo(tmp_path / 'y.tif')
    assert 'this is a folder' in sentence(read, tmp_path / 'x.tif', ImageError)
    assert 'this is not a regular file' in sentence(read, tmp_path / 'y.tif', ImageError)
    assert 'cannot be opened' in sentence(read, tmp_path / 'z.tif', ImageError)


def test_other_pictures_are_named_where_they_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / 'x.tif'
    for head, name in (
        (b'\x89PNG\r\n\x1a\n\0', 'a PNG file'),
        (b'RIFF\1\0\0\0WEBP', 'a WebP file'),
    ):
        path.write_bytes(head)
        assert f'this is {name}, not a TIFF' in sentence(read_image, path, ImageError)


def test_a_tiff_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / 'x.png', np.full((5, 7), 9, np.uint8))
    with open_image(tmp_path / 'x.png') as reader:
        assert reader.read(0, 0, 5, 7).tolist() == [[[9, 9, 9]] * 7] * 5

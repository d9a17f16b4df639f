"""Read every image of the environment's packages, and of folders, and compare with other readers.

python -m tests.wild.read_all [FOLDER...]        (make wild)

What we read must be what libvips or Pillow read, and OpenSlide for slides; what we refuse is
counted. It exits with 1 if one file is read in a way that no other reader knows.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import openslide
import pyvips
from PIL import Image, ImageOps

from cellseg_mm.core.errors import CellSegError
from cellseg_mm.data.image_reader import SUFFIXES, ImageReader, open_image

MOST_PX = 4096  # of each side: of larger images the middle is compared
LOSSY_OFF = 4  # JPEG decoders may differ by rounding, and so does chroma that they interpolate
SLIDES = ('.svs', '.ndpi', '.scn')

Region = tuple[int, int, int, int]
Reader = Callable[[Path, Region], np.ndarray]


def by_vips(path: Path, region: Region) -> np.ndarray:
    y0, x0, y1, x1 = region
    image = pyvips.Image.new_from_file(str(path), access='random').autorot()
    if image.interpretation in ('cmyk', 'lab'):
        raise ValueError('not RGB')
    image = image[: image.bands - 1] if image.hasalpha() else image
    return size_checked(image.crop(x0, y0, x1 - x0, y1 - y0).numpy(), image.width, image.height)


def by_pillow(path: Path, region: Region) -> np.ndarray:
    y0, x0, y1, x1 = region
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode in ('P', 'PA', 'LA', 'RGBA', '1'):
            image = image.convert('RGB' if image.mode in ('P', 'PA', 'RGBA') else 'L')
        if image.mode not in ('L', 'RGB', 'I;16', 'I;16B', 'I', 'F'):
            raise ValueError(image.mode)
        return size_checked(np.asarray(image.crop((x0, y0, x1, y1))), *image.size)


def by_openslide(path: Path, region: Region) -> np.ndarray:
    y0, x0, y1, x1 = region
    with openslide.OpenSlide(path) as slide:
        tile = slide.read_region((x0, y0), 0, (x1 - x0, y1 - y0))
        white = Image.new('RGB', tile.size, 'white')
        white.paste(tile, mask=tile.getchannel('A'))
        return size_checked(np.asarray(white), *slide.dimensions)


def size_checked(values: np.ndarray, width: int, height: int) -> np.ndarray:
    """Attach nothing, change nothing; larger pictures of which a crop fits are told apart."""
    values = values.reshape(*values.shape[:2], -1)
    return values.view(Sized).of(height, width)


class Sized(np.ndarray):
    """Values of a region that know how large the whole picture is."""

    image_hw: tuple[int, int]

    def of(self, height: int, width: int) -> Sized:
        self.image_hw = (height, width)
        return self


def as_ours(values: np.ndarray, reader: ImageReader) -> np.ndarray:
    """Bring another reader's values to 8 bits by the range that ours took."""
    values = np.asarray(values)
    if reader.value_range is not None and values.dtype == np.uint8:
        raise ValueError('it made 8 bits of wider values by a rule of its own')
    if values.dtype != np.uint8:
        found = reader.value_range
        low, high = (found.low, found.high) if found else (0, np.iinfo(values.dtype).max)
        scaled = (values.astype(np.float64) - low) * (255 / (high - low))
        values = np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
    return np.repeat(values[..., :1], 3, axis=2) if values.shape[2] < 3 else values[..., :3]


def judge(path: Path) -> tuple[str, str]:
    """Return the verdict on one file, and what to say of it."""
    try:
        with open_image(path) as reader:
            region = middle(reader.image_hw)
            ours = reader.read(*region)
            return compare(path, reader, region, ours)
    except CellSegError as problem:
        return 'refused', str(problem)
    except Exception as problem:  # any other exception is a fault of ours
        return 'WRONG', f'{path}: {type(problem).__name__}: {problem}'


def compare(path: Path, reader: ImageReader, region: Region, ours: np.ndarray) -> tuple[str, str]:
    # OpenSlide gives 8 bits, by a rule of its own for wider values
    is_slide = openslide.OpenSlide.detect_format(str(path)) is not None and not reader.value_range
    readers: dict[str, Reader] = {'libvips': by_vips, 'Pillow': by_pillow}
    if is_slide:
        readers = {'OpenSlide': by_openslide}
    differences = []
    for name, read in readers.items():
        try:
            values = read(path, region)
            hw, theirs = values.image_hw, as_ours(values, reader)
        except Exception:  # it does not read this file, whatever its reason is
            continue
        if hw != reader.image_hw or theirs.shape != ours.shape:
            differences.append(f'{name} has {hw} px')
            continue
        off = int(np.abs(theirs.astype(int) - ours).max(initial=0))
        if off <= allowed(path, ours, theirs, is_slide=is_slide):
            return 'right', f'{path}: as {name}; {reader.says}'
        differences.append(f'{name} differs by up to {off}')
    if differences:
        return 'WRONG', f'{path}: {reader.image_hw} px, {", ".join(differences)}; {reader.says}'
    return 'read by no other', f'{path}: {reader.says}'


def allowed(path: Path, ours: np.ndarray, theirs: np.ndarray, *, is_slide: bool) -> int:
    """Return the greatest difference: none for what is stored without loss."""
    is_lossy = is_slide or path.suffix.lower() in ('.jpg', '.jpeg')
    off = np.abs(theirs.astype(int) - ours)
    # chroma of 4:2:0 is interpolated differently: few pixels at edges, and small in the mean
    return 255 if is_lossy and off.mean() < 1 else LOSSY_OFF if is_lossy else 1


def middle(image_hw: tuple[int, int]) -> Region:
    tops = [max(0, (n - MOST_PX) // 2) for n in image_hw]
    return (*tops, *(min(n, top + MOST_PX) for n, top in zip(image_hw, tops, strict=True)))


def images_of(folders: list[Path]) -> Iterator[Path]:
    for folder in folders:
        for path in sorted(folder.rglob('*')):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                yield path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('folders', nargs='*', type=Path, help='besides the packages')
    parser.add_argument('--all', action='store_true', help='print a line for every file')
    args = parser.parse_args()
    warnings.simplefilter('ignore', Image.DecompressionBombWarning)
    counts: Counter[str] = Counter()
    for path in images_of([Path(sysconfig.get_path('purelib')), *args.folders]):
        verdict, text = judge(path)
        counts[verdict] += 1
        if args.all or verdict == 'WRONG':
            print(f'{verdict}: {text}', flush=True)
    for verdict in ('right', 'refused', 'read by no other', 'WRONG'):
        print(f'{counts[verdict]:6} {verdict}')
    return int(counts['WRONG'] > 0)


if __name__ == '__main__':
    sys.exit(main())

"""Small sources in every format that can be imported, and what of them arrived."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from pycocotools import mask as coco_mask

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data.importing.import_data import Finder, ImportReport, import_data
from cellseg_mm.data.importing.sources import ImportParams, Tally

HW = (17, 23)  # odd and not square, so that a transposition cannot pass
IMAGE = np.random.default_rng(0).integers(0, 256, (*HW, 3)).astype(np.uint8)


def f_mask(top: int, left: int) -> np.ndarray:
    """An F of 5 x 4 px: no symmetry."""
    mask = np.zeros(HW, bool)
    mask[top : top + 5, left] = True
    mask[top, left : left + 4] = True
    mask[top + 2, left : left + 3] = True
    return mask


def stored(out_dir: Path, name: str) -> dict[int, list[np.ndarray]]:
    """Masks of each class of a written case, in the order of their ids."""
    found = {}
    for path in sorted((out_dir / 'train' / name).glob('class*.tif')):
        label_map = tifffile.imread(path)
        found[int(path.stem[-1])] = [label_map == i for i in np.unique(label_map[label_map > 0])]
    return found


def manifest(out_dir: Path) -> list[dict[str, str]]:
    """The rows of the table of cases."""
    text = (out_dir / 'manifest.csv').read_text(encoding='utf-8')
    return list(csv.DictReader(io.StringIO(text)))


def assert_masks(found: dict[int, list[np.ndarray]], expected: dict[int, list[np.ndarray]]) -> None:
    assert {k: [m.tolist() for m in v] for k, v in found.items()} == {
        k: [m.tolist() for m in v] for k, v in expected.items()
    }


def run(source_format: str, source: Path, out_dir: Path, **options: object) -> ImportReport:
    """Import with options."""
    return import_data(source_format, source, out_dir, ImportParams(**options))


def aperio(annotations: list[tuple[str, list[list[tuple[float, float]]]]], extra: str = '') -> str:
    """The distribution's layout: one Annotation per class, the class is its Attribute."""
    text = '<?xml version="1.0" encoding="UTF-8"?>' + extra + '<Annotations MicronsPerPixel="0.25">'
    for number, (name, polygons) in enumerate(annotations, start=1):
        text += f'<Annotation Id="{number}" Name="" Type="4"><Attributes>'
        text += f'<Attribute Name="{name}" Id="0" Value=""/></Attributes><Regions>'
        text += '<RegionAttributeHeaders><AttributeHeader Id="9999" Name="Region"/>'
        text += '</RegionAttributeHeaders>'
        for i, polygon in enumerate(polygons, start=1):
            vertices = ''.join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in polygon)
            text += f'<Region Id="{i}" NegativeROA="0"><Attributes/>'
            text += f'<Vertices>{vertices}</Vertices></Region>'
        text += '</Regions><Plots/></Annotation>'
    return text + '</Annotations>'


TRIANGLE = [(1.0, 1.0), (9.0, 1.0), (1.0, 8.0)]
SQUARE = [(3, 3), (12, 3), (12, 12), (3, 12)]
BOX = [(14.5, 2.5), (20.5, 2.5), (20.5, 6.5), (14.5, 6.5)]


def monusac(folder: Path) -> Path:
    source = folder / 'source'
    (source / 'TCGA-AA').mkdir(parents=True)
    (source / 'TCGA-BB').mkdir()
    tifffile.imwrite(source / 'TCGA-AA' / 'TCGA-AA_1.tif', IMAGE, photometric='rgb')
    (source / 'TCGA-AA' / 'TCGA-AA_1.xml').write_text(
        aperio(
            [
                ('Epithelial', [TRIANGLE, SQUARE]),
                ('Lymphocyte', [TRIANGLE, [(1, 1), (2, 2)], [(90, 90), (95, 90), (95, 95)]]),
                ('Macrophage', [BOX]),
                ('Ambiguous', [BOX, SQUARE]),
            ]
        )
    )
    write_svs(source / 'TCGA-BB' / 'TCGA-BB_1.svs')
    (source / 'TCGA-BB' / 'TCGA-BB_1.xml').write_text(aperio([('Neutrophil', [BOX])]))
    return source


def write_svs(path: Path) -> None:
    """Two levels and Aperio's description; level 0 is the image."""
    description = f'Aperio Image Library v1\n{HW[1]}x{HW[0]} |AppMag = 40|MPP = 0.25'
    with tifffile.TiffWriter(path) as writer:
        options = {'photometric': 'rgb', 'metadata': None, 'software': False}
        writer.write(IMAGE, tile=(16, 16), description=description, **options)
        writer.write(IMAGE[::4, ::4], description='Aperio thumbnail', **options)


def coco(folder: Path, annotations: list[dict], **entry: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(IMAGE).save(folder / 'a.png')
    image = {'id': 7, 'file_name': 'a.png', 'height': HW[0], 'width': HW[1], **entry}
    content = {
        'images': [image],
        'categories': [{'id': 30, 'name': 'dark'}, {'id': 4, 'name': 'pale'}],
        'annotations': [
            {'id': i, 'image_id': 7, 'category_id': 4, **a} for i, a in enumerate(annotations)
        ],
    }
    path = folder / 'coco.json'
    path.write_text(json.dumps(content))
    return path


def packed(mask: np.ndarray) -> dict:
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {'size': list(HW), 'counts': encoded['counts'].decode()}


def unpacked(mask: np.ndarray) -> dict:
    counts, value = [0], 0
    for pixel in mask.T.reshape(-1).tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {'size': list(HW), 'counts': counts}


def numbered(masks: list[np.ndarray], ids: list[int]) -> np.ndarray:
    return sum(m * np.uint16(i) for m, i in zip(masks, ids, strict=True)).astype(np.uint16)


def write_image(path: Path, hw: tuple[int, int] = HW) -> Path:
    """A picture of noise, in folders that are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (*hw, 3)).astype(np.uint8)).save(path)
    return path


def read_cells(
    finder: Finder, source: Path, **options: object
) -> tuple[list[tuple[int, bytes]], Tally]:
    """Class number and full mask (packed) of each cell of a source of one case, before painting."""
    (job,), _, _ = finder(source, ImportParams(**options))
    found = job.read()
    cells = []
    for cell in found.cells:
        mask = np.zeros(found.image.shape[:2], bool)
        height, width = cell.mask.shape
        mask[cell.top : cell.top + height, cell.left : cell.left + width] = cell.mask
        cells.append((cell.class_number, np.packbits(mask).tobytes()))
    return cells, found.tally


def cells_of_set(instances: InstanceSet) -> list[tuple[int, bytes]]:
    """The same of a set, by falling score; cells without a pixel are left out."""
    ranked = instances.by_score()
    pairs = zip(ranked.class_ids.tolist(), ranked.masks(), strict=True)
    return [(k + 1, np.packbits(mask).tobytes()) for k, mask in pairs if mask.any()]

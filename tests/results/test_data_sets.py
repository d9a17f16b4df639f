"""A data folder written as COCO or YOLO comes back pixel by pixel."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from cellseg_mm.core.errors import CellSegError, ConfigError
from cellseg_mm.data.case_writer import write_case
from cellseg_mm.data.folds import Folds, save_folds
from cellseg_mm.data.labels import find_cases, read_gt, read_image
from cellseg_mm.results import data_sets
from cellseg_mm.results.data_sets import DataSetParams, write_data_set
from cellseg_mm.results.polygons import trace_polygons
from tests.support.import_sources import run
from tools.export_data import main

NAMES = ('tumor', 'stroma: "b"')  # quotes and a colon need care in YAML
HW = (40, 37)


def cells(seed: int, n: int = 6) -> np.ndarray:
    """Noise of ids: holes, parts and corners that touch."""
    rng = np.random.default_rng(seed)
    label_map = np.zeros(HW, dtype=np.int32)
    for k in range(1, n + 1):
        y, x = rng.integers(0, 26, 2)
        label_map[y : y + 10, x : x + 9][rng.random((10, 9)) < (0.8 if k % 2 else 1)] = k
    return label_map


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / 'data'
    for seed, name in enumerate(('a', 'b', 'Zellen ä')):
        image = np.random.default_rng(seed).integers(0, 256, (*HW, 3)).astype(np.uint8)
        maps = {k: cells(10 * seed + k) for k in (1, 2)} if name != 'b' else {}  # b has none
        write_case(root / 'train' / name, image, maps)
    save_folds(root / 'folds.json', Folds((('a',), ('Zellen ä', 'b')), {}, 'original', 0))
    return root


def params(data: Path, **options: object) -> DataSetParams:
    return DataSetParams(NAMES, data / 'folds.json', **options)


def masks_of(root: Path) -> dict[str, list[tuple[int, list]]]:
    """Classes and masks of all cells, in an order of their own."""
    found = {}
    for case in find_cases(root, 'train', len(NAMES)):
        gt = read_gt(case)
        pairs = zip(gt.class_ids.tolist(), gt.masks(), strict=True)
        found[case.name] = sorted((k, mask.tobytes()) for k, mask in pairs)
    return found


@pytest.mark.parametrize('kind', ['coco', 'yolo'])
def test_what_is_written_is_imported_pixel_by_pixel(data: Path, tmp_path: Path, kind: str) -> None:
    report = write_data_set(kind, data, tmp_path / 'set', params(data))
    assert report.n_images == {'train': 3}
    assert report.n_cells == sum(map(len, masks_of(data).values()))
    source = tmp_path / 'set' / 'train.json' if kind == 'coco' else tmp_path / 'set'
    back = run(kind, source, tmp_path / 'back', binary='ids' if kind == 'coco' else '')
    assert back.problems == ()
    assert back.class_names == NAMES
    wanted = {name.replace(' ', '_'): found for name, found in masks_of(data).items()}
    assert masks_of(tmp_path / 'back') == wanted
    before = read_image(data / 'train' / 'a' / 'image.tif')
    assert (read_image(tmp_path / 'back' / 'train' / 'a' / 'image.tif') == before).all()


def test_the_library_of_coco_reads_what_is_written(data: Path, tmp_path: Path) -> None:
    write_data_set('coco', data, tmp_path / 'set', params(data, val_fold=0))
    assert sorted(p.name for p in (tmp_path / 'set').iterdir()) == [
        *('images', 'train.json', 'val.json')
    ]
    coco = COCO(tmp_path / 'set' / 'val.json')
    (image,) = coco.loadImgs(coco.getImgIds())
    assert image['file_name'] == 'images/a.png'
    (case,) = (case for case in find_cases(data, 'train', 2) if case.name == 'a')
    gt = read_gt(case)
    annotations = coco.loadAnns(coco.getAnnIds())
    for row, mask, class_id in zip(annotations, gt.masks(), gt.class_ids, strict=True):
        assert (coco.annToMask(row) == mask).all()
        ys, xs = np.nonzero(mask)
        size = [int(xs.max() - xs.min()) + 1, int(ys.max() - ys.min()) + 1]
        assert row['bbox'] == [xs.min(), ys.min(), *size]
        assert (row['area'], row['category_id']) == (mask.sum(), class_id + 1)


def test_ids_of_annotations_go_on_over_both_sets(data: Path, tmp_path: Path) -> None:
    report = write_data_set('coco', data, tmp_path / 'set', params(data, val_fold=1))
    ids = [
        row['id']
        for name in ('train', 'val')
        for row in json.loads((tmp_path / 'set' / f'{name}.json').read_text())['annotations']
    ]
    assert ids == list(range(1, report.n_cells + 1))


def test_ultralytics_fills_the_same_pixels(data: Path, tmp_path: Path) -> None:
    """ultralytics.data.utils.polygon2mask cuts fractions off and fills with the outline."""
    write_data_set('yolo', data, tmp_path / 'set', params(data))
    n_plain = 0
    for case in find_cases(data, 'train', 2):
        text = (tmp_path / 'set' / 'labels' / 'train' / f'{case.name}.txt').read_text()
        for row, mask in zip(text.splitlines(), read_gt(case).masks(), strict=True):
            points = np.array(row.split()[1:], dtype=float).reshape(-1, 2) * HW[::-1]
            filled = np.zeros(HW, np.uint8)
            cv2.fillPoly(filled, points.astype(np.int32)[None], 1)
            (polygons,) = trace_polygons([mask], np.zeros((1, 2), dtype=np.int64))
            is_joined = len(polygons) > 1 or polygons[0].holes
            n_plain += not is_joined
            assert is_joined or (filled == mask).all()
            assert (filled | ~mask).all()  # lines between rings are painted, nothing is missing
    assert n_plain > 2


def test_yolo_has_both_sets_and_says_what_is_joined(data: Path, tmp_path: Path) -> None:
    report = write_data_set('yolo', data, tmp_path / 'set', params(data, val_fold=0))
    assert report.n_images == {'train': 2, 'val': 1}
    labels = {p.name for p in (tmp_path / 'set').glob('labels/*/*.txt')}
    assert labels == {p.with_suffix('.txt').name for p in (tmp_path / 'set').glob('images/*/*')}
    assert (tmp_path / 'set' / 'labels' / 'train' / 'b.txt').read_text() == ''
    assert f'{report.n_joined} cells have holes or several parts' in report.text()
    assert report.n_joined > 0


def test_red_and_blue_are_exchanged_where_wanted(data: Path, tmp_path: Path) -> None:
    write_data_set('coco', data, tmp_path / 'set', params(data, swap_red_blue=True))
    picture = np.asarray(Image.open(tmp_path / 'set' / 'images' / 'a.png'))
    assert (picture[..., ::-1] == read_image(data / 'train' / 'a' / 'image.tif')).all()


def test_nothing_is_half_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data / 'train' / 'b' / 'class1.tif').write_bytes(b'no picture')
    with pytest.raises(CellSegError, match=r'class1\.tif'):
        write_data_set('coco', data, tmp_path / 'out' / 'set', params(data))
    assert list((tmp_path / 'out').iterdir()) == []
    (data / 'train' / 'b' / 'class1.tif').unlink()
    write_data_set('coco', data, tmp_path / 'out' / 'set', params(data))
    monkeypatch.setattr(data_sets, 'read_gt', None)
    with pytest.raises(ConfigError, match='is there already'):
        write_data_set('yolo', data, tmp_path / 'out' / 'set', params(data))
    with pytest.raises(CellSegError, match='has no fold 7'):
        write_data_set('yolo', data, tmp_path / 'other', params(data, val_fold=7))


def test_the_tool_takes_the_classes_of_the_import(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / 'import.json').write_text(json.dumps({'classes': list(NAMES)}))
    main(['yolo', str(data), str(tmp_path / 'set')])
    assert 'stroma: \\"b\\"' in (tmp_path / 'set' / 'data.yaml').read_text()
    assert '3 images in train' in capsys.readouterr().out

"""The sample: the real format to the tag, valid labels, same seed same bytes, atomic."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
import tifffile
from scipy import ndimage

from cellseg_mm.core.errors import CellSegError
from cellseg_mm.data.case_writer import write_case, write_image
from cellseg_mm.data.drawing import sample
from cellseg_mm.data.drawing.pictures import LEAST_PIXELS
from cellseg_mm.data.drawing.sample import make_sample
from cellseg_mm.data.labels import find_cases, read_gt

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sample(tmp_path_factory.mktemp('data') / 'sample', n_train=14, n_test=3, seed=0)


def files_of(folder: Path) -> dict[str, bytes]:
    paths = sorted(p for p in folder.rglob('*') if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def label_maps(case_dir: Path) -> dict[int, np.ndarray]:
    return {int(p.stem[-1]): tifffile.imread(p) for p in sorted(case_dir.glob('class*.tif'))}


def test_layout_and_manifest_agree_with_the_files(folder: Path) -> None:
    rows = list(csv.DictReader((folder / 'manifest.csv').read_text().splitlines()))
    assert [row['uuid'] for row in rows] == sorted(p.name for p in (folder / 'train').iterdir())
    assert len(rows) == 14
    sizes = []
    for row in rows:
        case_dir = folder / 'train' / row['uuid']
        assert str(uuid.UUID(row['uuid'], version=4)) == row['uuid']
        maps = label_maps(case_dir)
        for k in range(1, 5):
            n = len(np.unique(maps[k])) - 1 if k in maps else 0
            assert int(row[f'c{k}']) == n
            assert (k in maps) == (n > 0)
        sizes.append((int(row['height']), int(row['width'])))
        assert tifffile.imread(case_dir / 'image.tif').shape == (*sizes[-1], 4)
    assert {(40, 60), (700, 500)} <= set(sizes)
    patients = [row['patient'] for row in rows]
    assert 1 < len(set(patients)) < len(patients)
    for k in range(1, 5):
        assert sum(int(row[f'c{k}']) for row in rows) > 10
    assert any(row[f'c{k}'] == '0' for row in rows for k in range(1, 5))


def test_tiff_tags_are_those_of_the_real_files(folder: Path) -> None:
    """Compared with hw3_raw25 by hand; there the label maps are stored without compression."""
    case_dir = next(p for p in sorted((folder / 'train').iterdir()))
    with tifffile.TiffFile(case_dir / 'image.tif') as tiff:
        page = tiff.pages[0]
        assert (page.dtype, page.compression.name, page.predictor.name) == (
            np.uint8,
            'LZW',
            'HORIZONTAL',
        )
        assert page.photometric.name == 'RGB'
        assert [sample_.name for sample_ in page.extrasamples] == ['UNASSALPHA']
        assert (page.asarray()[..., 3] == 255).all()
        assert not {'Software', 'ImageDescription', 'DateTime'} & {t.name for t in page.tags}
    with tifffile.TiffFile(next(case_dir.glob('class*.tif'))) as tiff:
        assert (tiff.pages[0].dtype, tiff.pages[0].compression.name) == (np.float64, 'LZW')


def test_instances_are_connected_disjoint_and_numbered_once(folder: Path) -> None:
    n_with_gaps = 0
    for case_dir in sorted((folder / 'train').iterdir()):
        maps = label_maps(case_dir)
        assert (sum((m > 0).astype(int) for m in maps.values()) <= 1).all()
        ids = [i for m in maps.values() for i in np.unique(m)[1:].tolist()]
        assert len(ids) == len(set(ids)) > 0
        assert ids == sorted(ids)  # the real files number class by class
        n_with_gaps += max(ids) > len(ids)
        for label_map in maps.values():
            for i in np.unique(label_map)[1:]:
                mask = label_map == i
                assert ndimage.label(mask)[1] == 1  # by edges, the stricter rule
                assert mask.sum() >= LEAST_PIXELS
    assert 0 < n_with_gaps < 14


def test_our_own_reader_takes_it(folder: Path) -> None:
    cases = find_cases(folder, 'train', 4)
    rows = {
        r['uuid']: r for r in csv.DictReader((folder / 'manifest.csv').read_text().splitlines())
    }
    assert len(cases) == 14
    for case in cases:
        counts = np.bincount(read_gt(case).class_ids, minlength=4)
        assert counts.tolist() == [int(rows[case.name][f'c{k}']) for k in range(1, 5)]


def test_id_map_fits_the_test_images(folder: Path) -> None:
    entries = json.loads((folder / 'test_image_name_to_ids.json').read_text())
    assert sorted(entry['id'] for entry in entries) == [1, 2, 3]
    assert {e['file_name'] for e in entries} == {
        p.name for p in (folder / 'test_release').iterdir()
    }
    for entry in entries:
        shape = tifffile.imread(folder / 'test_release' / entry['file_name']).shape
        assert shape[:2] == (entry['height'], entry['width'])


def test_red_and_blue_are_swapped_as_in_the_real_files(folder: Path) -> None:
    """Eosin between cells is more red than blue: the stored third channel is the brighter one."""
    n_pink = 0
    for case_dir in sorted((folder / 'train').iterdir()):
        image = tifffile.imread(case_dir / 'image.tif').astype(int)
        bare = ~np.any([m > 0 for m in label_maps(case_dir).values()], axis=0)
        pink = image[bare & (image[..., 1] < 190) & (image[..., 1] > 110)]
        n_pink += np.median(pink[:, 2] - pink[:, 0]) > 0
    assert n_pink >= 12


def test_classes_differ_in_size_and_darkness(folder: Path) -> None:
    area, light = {k: [] for k in range(1, 5)}, {k: [] for k in range(1, 5)}
    for case_dir in sorted((folder / 'train').iterdir()):
        grey = tifffile.imread(case_dir / 'image.tif')[..., :3].mean(axis=2)
        for k, label_map in label_maps(case_dir).items():
            ids = np.unique(label_map)[1:]
            area[k] += ndimage.sum_labels(label_map > 0, label_map, ids).tolist()
            light[k] += ndimage.mean(grey, label_map, ids).tolist()
    size = {k: np.median(v) for k, v in area.items()}
    tone = {k: np.median(v) for k, v in light.items()}
    assert size[3] < size[2] < size[1] < size[4]
    assert max(tone[2], tone[3]) + 25 < min(tone[1], tone[4])


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    options = {'n_train': 3, 'n_test': 1}
    first = files_of(make_sample(tmp_path / 'a', seed=5, **options))
    assert first == files_of(make_sample(tmp_path / 'b', seed=5, **options))
    other = files_of(make_sample(tmp_path / 'c', seed=6, **options))
    assert not {name for name in first if '/' in name} & set(other)


def test_bytes_do_not_depend_on_threads(tmp_path: Path) -> None:
    code = 'from cellseg_mm.data.drawing.sample import make_sample; import sys; '
    code += 'make_sample(sys.argv[1], n_train=1, n_test=1, seed=1)'
    made = []
    for threads in ('1', '2'):
        folder = tmp_path / threads
        env = {'OMP_NUM_THREADS': threads, 'OPENBLAS_NUM_THREADS': threads, 'PATH': ''}
        subprocess.run([sys.executable, '-c', code, str(folder)], check=True, env=env, cwd=ROOT)
        made.append(files_of(folder))
    assert made[0] == made[1]


def test_dense_images_hold_many_touching_cells(tmp_path: Path) -> None:
    folder = make_sample(tmp_path / 'dense', n_train=2, n_test=0, seed=0, dense=True)
    rows = list(csv.DictReader((folder / 'manifest.csv').read_text().splitlines()))
    assert max(int(row['c2']) for row in rows) > 500
    assert json.loads((folder / 'test_image_name_to_ids.json').read_text()) == []


def test_nothing_is_left_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError('disk full')

    monkeypatch.setattr(sample, 'write_json', fail)
    with pytest.raises(OSError, match='disk full'):
        make_sample(tmp_path / 'out', n_train=1, n_test=1)
    assert list(tmp_path.iterdir()) == []


def test_used_folder_and_bad_numbers_are_refused(tmp_path: Path) -> None:
    (tmp_path / 'mine.txt').write_text('precious')
    with pytest.raises(CellSegError, match='exists and is not an empty folder'):
        make_sample(tmp_path, n_train=1, n_test=0)
    with pytest.raises(CellSegError, match='at least 1 and 0 are needed'):
        make_sample(tmp_path / 'x', n_train=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['mine.txt']
    (tmp_path / 'empty').mkdir()
    assert make_sample(tmp_path / 'empty', n_train=1, n_test=0).stat().st_mode & 0o777 == (
        0o777 & ~sample._umask()
    )


def test_write_case_round_trip(tmp_path: Path) -> None:
    image = np.arange(17 * 11 * 3, dtype=np.uint8).reshape(17, 11, 3)
    label_map = np.zeros((17, 11), np.uint16)
    label_map[2:5, 1:9] = 700
    write_case(tmp_path / 'a', image, {1: label_map, 2: np.zeros_like(label_map)})
    assert sorted(p.name for p in (tmp_path / 'a').iterdir()) == ['class1.tif', 'image.tif']
    stored = tifffile.imread(tmp_path / 'a' / 'image.tif')
    assert (stored[..., :3] == image).all()
    assert (tifffile.imread(tmp_path / 'a' / 'class1.tif') == label_map).all()
    write_image(tmp_path / 'b.tif', image)
    assert (tmp_path / 'b.tif').read_bytes() == (tmp_path / 'a' / 'image.tif').read_bytes()


def test_tool_says_where_it_is_and_fails_with_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, 'tools/make_sample.py', str(tmp_path / 's')]
    options = ['--n-train', '1', '--n-test', '1', '--seed', '3']
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f'1 training and 1 test images in {tmp_path}/s\n')
    again = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.startswith('error: ')
    assert 'Traceback' not in again.stderr

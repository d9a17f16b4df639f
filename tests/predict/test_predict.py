"""Predicting folders of images: tiles, formats, resuming, failures; with a detector that counts."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import geojson
import numpy as np
import pytest
import tifffile

from cellseg_mm.core import files
from cellseg_mm.core.errors import CellSegError, ConfigError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data.intensity import ValueRange
from cellseg_mm.predict import predict, slide
from cellseg_mm.predict.items import Item, look_for
from cellseg_mm.predict.params import VERSION, PredictParams
from cellseg_mm.predict.summary import Summary
from cellseg_mm.results.formats import FORMATS
from cellseg_mm.results.predictions import load_predictions
from tests.predict.test_tiling import content, paint_cells

NAMES = ('epithelial', 'lymphocyte', 'neutrophil', 'macrophage')
COLOURS = ((0, 114, 178), (213, 94, 0), (240, 228, 66), (0, 158, 115))


class PaintedCells:
    """Finds each value of the first channel: class and score follow from the value."""

    batch_size = 2
    cap = 0
    notes = ()

    def __init__(self, tag: str = 'a') -> None:
        self.identity, self.provenance, self.calls = {'tag': tag}, {'members': []}, []

    def detect(self, pictures: Sequence[np.ndarray], name: str) -> list[InstanceSet]:
        assert len(pictures) <= self.batch_size
        self.calls.append(name)
        return [self.find(picture[..., 0], name) for picture in pictures]

    @staticmethod
    def find(ids: np.ndarray, name: str) -> InstanceSet:
        present = [k for k in np.unique(ids).tolist() if k]
        crops = [ids == k for k in present]
        return InstanceSet.from_crops(
            name,
            0,
            ids.shape,
            crops=crops,
            offsets_yx=np.zeros((len(crops), 2), dtype=np.int64),
            class_ids=np.array([k % 4 for k in present]),
            scores=np.array([(k % 10) / 10 for k in present]),
        )


def paint(path: Path, image_hw: tuple[int, int] = (70, 90), seed: int = 0, **options) -> np.ndarray:
    label_map = paint_cells(image_hw, 60, (3, 12), seed)
    image = np.repeat(label_map[..., None], 3, axis=2).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, image, photometric='rgb', **options)
    return label_map


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i, name in enumerate(['b.tif', 'a.tif', 'c.tif']):
        paint(tmp_path / 'in' / name, seed=i)
    return tmp_path / 'in'


def params_for(tmp_path: Path, **more) -> PredictParams:
    settings = {'out_dir': tmp_path / 'out', 'class_names': NAMES, 'class_colours': COLOURS}
    return PredictParams(**{**settings, 'formats': ('csv',), 'n_workers': 0, **more})


def run(images: Path, params: PredictParams, tag: str = 'a') -> tuple[Summary, list[str]]:
    detector = PaintedCells(tag)
    summary = predict.predict(look_for([str(images)]).items, detector, params)
    return summary, detector.calls


# -------------------------------------------------------------------------------- inputs


def test_files_folders_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ['x/b.TIF', 'x/y/a.ome.tif', 'x/case7/image.tif', 'x/case7/class1.tif', 'x/.h/d.tif']
    for name in [*names, 'x/note.txt', 'x/out/old.png', 'z/q.png', 'z/s.d.jpg']:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'.')
    found = look_for(['x', 'z/*.png', 'z/s.d.jpg', 'z/q.png'], out_dir=Path('x/out')).items
    assert [item.name for item in found] == ['a', 'b', 'case7', 'q', 's.d']
    assert found[2].path == Path('x/case7/image.tif')
    assert found == look_for(['z/s.d.jpg', 'z/q.png', 'x'], out_dir=Path('x/out')).items
    assert len({item.image_id for item in found}) == 5
    assert all(0 <= item.image_id < 2**31 for item in found)


def test_inputs_that_make_no_sense(tmp_path: Path) -> None:
    (tmp_path / 'none').mkdir()
    with pytest.raises(ConfigError, match='there is no image'):
        look_for([str(tmp_path / 'none')])
    with pytest.raises(ConfigError, match='there is no image'):
        look_for([str(tmp_path / '*.tif')])
    paint(tmp_path / 'p' / 'a.tif')
    with pytest.raises(ConfigError, match='is the folder of the results too'):
        look_for([str(tmp_path / 'p')], out_dir=tmp_path / 'p')


@pytest.mark.parametrize(
    ('setting', 'message'),
    [
        ({'formats': ('csv', 'pdf')}, 'formats: found pdf; expected some of label-map'),
        ({'score_thr': 2.0}, 'expected a threshold in 0..1'),
        ({'tile_px': 100, 'overlap_px': 60}, 'expected 0 to 50'),
    ],
)
def test_wrong_settings(setting: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        params_for(tmp_path, **setting)


# --------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize('n_workers', [0, 1, 3])
@pytest.mark.parametrize('swapped', [False, True])
def test_tiled_equals_whole(n_workers: int, swapped: bool, tmp_path: Path) -> None:
    paint(tmp_path / 'in' / 'a.tif', (200, 260), tile=(16, 32))
    common = {'n_workers': n_workers, 'red_blue_swapped': swapped}
    whole = params_for(tmp_path, out_dir=tmp_path / 'whole', **common)
    cut = {'tile_px': 64, 'overlap_px': 20, 'whole_px': 64}
    tiled = params_for(tmp_path, out_dir=tmp_path / 'tiled', **cut, **common)
    run(tmp_path / 'in', whole)
    _, calls = run(tmp_path / 'in', tiled)
    # tiles of 64 with 20 overlap: 5 along 200 px and 6 along 260 px, in batches of 2
    assert len(calls) == 15
    (a,) = load_predictions(tmp_path / 'whole' / 'a.npz').sets
    (b,) = load_predictions(tmp_path / 'tiled' / 'a.npz').sets
    assert content(a) == content(b)
    assert (a.name, a.image_id) == (b.name, b.image_id) == ('a', Item(Path('a.tif'), 'a').image_id)
    table = [(tmp_path / k / 'a.cells.csv').read_text() for k in ('whole', 'tiled')]
    assert table[0] == table[1]


def test_an_image_too_large_for_pycocotools_is_told(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        predict, 'apply_settings', lambda *_: InstanceSet.empty('a', 0, (1 << 16, 1 << 16))
    )
    monkeypatch.setattr(predict, 'write_formats', lambda *_, **__: {})
    summary, _ = run(images / 'a.tif', params_for(tmp_path, formats=('coco', 'csv')))
    assert '32-bit counts of pycocotools' in summary.notes['a']
    summary, _ = run(images / 'a.tif', params_for(tmp_path, formats=('csv',), again=True))
    assert summary.notes == {}


def test_provenance(images: Path, tmp_path: Path) -> None:
    run(images, params_for(tmp_path))
    found = load_predictions(tmp_path / 'out' / 'a.npz').provenance
    assert found['tag'] == 'a'
    assert found['class_names'] == list(NAMES)
    assert found['input']['path'] == str(images / 'a.tif')
    assert found['tiles']['n_tiles'] == 1
    assert found['downsample'] == 1.0


def test_a_cap_that_was_hit_is_told(tmp_path: Path) -> None:
    label_map = paint(tmp_path / 'in' / 'a.tif')
    n = len(np.unique(label_map)) - 1
    for cap, told in ((n, True), (n + 1, False), (0, False)):
        detector = PaintedCells()
        detector.cap = cap
        items = look_for([str(tmp_path / 'in')]).items
        summary = predict.predict(items, detector, params_for(tmp_path, again=True))
        text = (
            f'1 of 1 tiles hit the cap of {n} instances, whatever was lost scored no more than 0.'
        )
        assert (text in summary.describe()) == told


def test_what_a_detector_notes_of_an_image_is_told(tmp_path: Path) -> None:
    class Noting(PaintedCells):
        def detect(self, pictures: Sequence[np.ndarray], name: str) -> list[InstanceSet]:
            self.notes = ['half of it was out of focus'] if name == 'b' else []
            return super().detect(pictures, name)

    for name in ('a', 'b', 'c'):
        paint(tmp_path / 'in' / f'{name}.tif')
    items = look_for([str(tmp_path / 'in')]).items
    summary = predict.predict(items, Noting(), params_for(tmp_path))
    assert summary.notes == {'b': 'half of it was out of focus'}
    assert '  b: half of it was out of focus' in summary.describe()


def test_an_image_that_is_nearly_black_is_told_whatever_its_brightest_pixel(tmp_path: Path) -> None:
    (tmp_path / 'in').mkdir()
    values = np.random.default_rng(0).integers(1, 25, (40, 50)).astype(np.uint8)
    values[3, 4] = 255  # dust
    tifffile.imwrite(tmp_path / 'in/dim.tif', values)
    values[5:8, 5:8] = 26  # 9 of 2000 px are lit
    tifffile.imwrite(tmp_path / 'in/fine.tif', values)
    notes = run(tmp_path / 'in', params_for(tmp_path))[0].notes
    assert list(notes) == ['dim']
    assert 'nearly black' in notes['dim']


# --------------------------------------------------------------------------------- range


class Looking(PaintedCells):
    """Finds nothing, and remembers the pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: dict[str, np.ndarray] = {}

    def detect(self, pictures: Sequence[np.ndarray], name: str) -> list[InstanceSet]:
        self.pictures[name] = pictures[0]
        return [self.find(np.zeros_like(picture[..., 0]), name) for picture in pictures]


def two_wide_images(tmp_path: Path) -> Path:
    """Images of 16 bits: as bright as 1000, and half of it; each has one burnt pixel."""
    (tmp_path / 'in').mkdir()
    values = np.random.default_rng(0).integers(1, 1001, (60, 50)).astype(np.uint16)
    values[0, :10] = 1000  # 10 of 3000 px: more than a thousandth
    for name, picture in (('a', values), ('b', values // 2)):
        picture[9, 9] = 65535
        tifffile.imwrite(tmp_path / f'in/{name}.tif', picture)
    return tmp_path / 'in'


@pytest.mark.parametrize(
    ('given', 'highs', 'says'),
    [
        # 1000 is nine tenths of 1023, so 10 bits are meant; 500 is itself
        (None, (1023, 500), 'each became 0..255 by its own range (0..500 to 0..1023,'),
        (ValueRange(0, 2000), (2000, 2000), 'their values 0..2000 became 0..255 (as told)'),
    ],
)
def test_how_wide_values_become_8_bit_is_said_in_one_line(
    given: ValueRange | None, highs: tuple[int, int], says: str, tmp_path: Path
) -> None:
    source, detector = two_wide_images(tmp_path), Looking()
    params = params_for(tmp_path, value_range=given, range_from='as told')
    summary = predict.predict(look_for([str(source)]).items, detector, params)
    for name, high in zip('ab', highs, strict=True):
        stored = np.minimum(tifffile.imread(source / f'{name}.tif'), high)
        expected = np.rint(stored * (255 / high))
        assert np.array_equal(detector.pictures[name], np.repeat(expected[..., None], 3, axis=2))
    (line,) = summary.asides
    assert line.startswith('2 images have more than 8 bits: ')
    assert says in line
    assert line in summary.describe()


def test_another_range_predicts_anew_and_8_bit_results_stay(images: Path, tmp_path: Path) -> None:
    run(images, params_for(tmp_path))
    state = json.loads((tmp_path / 'out/a.state.json').read_text())['settings']
    # no range has a part in the hash of 8-bit collections, so their results stay valid
    assert state == files.text_hash(
        json.dumps(
            {
                'version': VERSION,
                'tile_px': 1024,
                'overlap_px': 128,
                'whole_px': 2048,
                'level': 0,
                'red_blue_swapped': False,
                'detector': {'tag': 'a'},
            },
            sort_keys=True,
        )
    )
    summary, calls = run(images, params_for(tmp_path))
    assert (calls, summary.asides) == ([], [])
    summary, calls = run(images, params_for(tmp_path, value_range=ValueRange(0, 100)))
    assert calls == ['a', 'b', 'c']
    assert 'was not needed: no image' in summary.asides[0]


# ---------------------------------------------------------------------------- run's notes


def test_cells_without_a_pixel_are_said_once(images: Path, tmp_path: Path) -> None:
    class Empty(PaintedCells):
        @staticmethod
        def find(ids: np.ndarray, name: str) -> InstanceSet:
            empty = [np.zeros((2, 2), bool)] * 2
            full = np.ones((3, 3), bool)
            return InstanceSet.from_crops(
                name,
                0,
                ids.shape,
                crops=[*empty, full],
                offsets_yx=np.zeros((3, 2), dtype=np.int64),
                class_ids=np.zeros(3, dtype=np.int64),
                scores=np.full(3, 0.9),
            )

    summary = predict.predict(look_for([str(images)]).items, Empty(), params_for(tmp_path))
    assert summary.describe().count('without a pixel') == 1
    assert '6 cells without a pixel were dropped, in 3 images' in summary.describe()
    assert summary.notes == {}


# ------------------------------------------------------------------------------- formats


def test_all_formats_hold_the_cells_above_the_threshold(tmp_path: Path) -> None:
    label_map = paint(tmp_path / 'in' / 'a.tif')
    params = params_for(tmp_path, formats=tuple(FORMATS), score_thr=0.6)
    said = predict.predict(
        look_for([str(tmp_path / 'in')]).items, PaintedCells(), params
    ).describe()
    out = tmp_path / 'out'
    expected = {k for k in np.unique(label_map).tolist() if k and k % 10 >= 6}
    assert len(expected) > 5
    n_below = len(np.unique(label_map)) - 1 - len(expected)
    assert f'{len(expected)} cells (and {n_below} below the score 0.6, in the npz only)' in said
    found = tifffile.imread(out / 'a.labels.tif')
    assert np.array_equal(found > 0, np.isin(label_map, list(expected)))
    assert len(geojson.loads((out / 'a.geojson').read_text()).features) == len(expected)
    assert len((out / 'a.cells.csv').read_text().splitlines()) == len(expected) + 1
    assert len(json.loads((out / 'a.coco.json').read_text())) == len(expected)
    assert cv2.imread(str(out / 'a.overlay.png')).shape == (70 + 4 * 28, 90, 3)
    (everything,) = load_predictions(out / 'a.npz').sets
    assert len(everything) == len(np.unique(label_map)) - 1
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ['a.npz', 'a.state.json', *(f'a{suffix}' for suffix, _ in FORMATS.values())]
    )


def test_formats_are_disjoint_and_the_npz_has_everything(tmp_path: Path) -> None:
    """Two views of one cell, a neighbour that reaches into it, and a doubtful cell."""

    class Twice(PaintedCells):
        def detect(self, pictures: Sequence[np.ndarray], name: str) -> list[InstanceSet]:
            cells = InstanceSet.from_crops(
                name,
                0,
                pictures[0].shape[:2],
                crops=[np.ones((10, 10), dtype=bool)] * 4,
                offsets_yx=np.array([[0, 0], [1, 1], [0, 8], [20, 20]]),
                class_ids=np.array([0, 1, 2, 3]),
                scores=np.array([0.9, 0.8, 0.7, 0.2]),
            )
            return [cells]

    paint(tmp_path / 'in' / 'a.tif')
    params = params_for(tmp_path, formats=tuple(FORMATS))
    summary = predict.predict(look_for([str(tmp_path / 'in')]).items, Twice(), params)
    said = '2 cells (and 1 below the score 0.5, 1 that better ones cover, in the npz only)'
    assert said in summary.describe()
    out = tmp_path / 'out'
    assert np.bincount(tifffile.imread(out / 'a.labels.tif').ravel())[1:].tolist() == [100, 80]
    rows = [row.split(',') for row in (out / 'a.cells.csv').read_text().splitlines()[1:]]
    assert [(row[1], row[3]) for row in rows] == [('epithelial', '100'), ('neutrophil', '80')]
    assert len(geojson.loads((out / 'a.geojson').read_text()).features) == 2
    (everything,) = load_predictions(out / 'a.npz').sets
    assert everything.areas.tolist() == [100] * 4


def test_true_colours_reach_table_and_picture(tmp_path: Path) -> None:
    image = np.zeros((20, 30, 3), np.uint8)
    image[5:15, 5:15] = (7, 100, 200)  # id 7; red is stored last
    (tmp_path / 'in').mkdir()
    tifffile.imwrite(tmp_path / 'in' / 'a.tif', image, photometric='rgb')
    formats = ('csv', 'overlay')
    run(tmp_path / 'in', params_for(tmp_path, formats=formats, red_blue_swapped=True))
    row = (tmp_path / 'out' / 'a.cells.csv').read_text().splitlines()[1]
    assert row.endswith('200.0000,100.0000,7.0000')
    drawn = cv2.imread(str(tmp_path / 'out' / 'a.overlay.png'))  # blue first
    assert drawn[10, 10].tolist() == [7, 100, 200]


# ------------------------------------------------------------------------------ resuming


def test_what_is_done_is_skipped(images: Path, tmp_path: Path) -> None:
    params = params_for(tmp_path)
    summary, calls = run(images, params)
    assert summary.predicted == calls == ['a', 'b', 'c']
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / 'out').iterdir()}
    summary, calls = run(images, params)
    assert (summary.skipped, calls, summary.exit_code) == (['a', 'b', 'c'], [], 0)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / 'out').iterdir()}
    _, calls = run(images, replace(params, again=True))
    assert calls == ['a', 'b', 'c']


@pytest.mark.parametrize(
    ('change', 'predicted', 'rewritten'),
    [
        pytest.param({'formats': ('csv', 'geojson')}, [], ['a', 'b', 'c'], id='one more format'),
        pytest.param({'score_thr': 0.3}, [], ['a', 'b', 'c'], id='threshold'),
        pytest.param({'tile_px': 512}, ['a', 'b', 'c'], [], id='tiles'),
        pytest.param({'level': 0, 'n_workers': 2}, [], [], id='workers'),
    ],
)
def test_changed_settings(
    change: dict, predicted: list, rewritten: list, images: Path, tmp_path: Path
) -> None:
    params = params_for(tmp_path)
    run(images, params)
    summary, calls = run(images, replace(params, **change))
    assert (summary.predicted, summary.rewritten, calls) == (predicted, rewritten, predicted)


def test_another_detector_or_another_file_predicts_again(images: Path, tmp_path: Path) -> None:
    params = params_for(tmp_path)
    run(images, params)
    _, calls = run(images, params, tag='other weights')
    assert calls == ['a', 'b', 'c']
    paint(images / 'b.tif', seed=9)
    os.utime(images / 'b.tif', ns=(1, 1))
    _, calls = run(images, params, tag='other weights')
    assert calls == ['b']
    (tmp_path / 'out' / 'c.npz').unlink()
    _, calls = run(images, params, tag='other weights')
    assert calls == ['c']


def test_a_lost_format_is_written_anew_and_a_damaged_result_predicted_anew(
    images: Path, tmp_path: Path
) -> None:
    params = params_for(tmp_path)
    run(images, params)
    text = (tmp_path / 'out' / 'a.cells.csv').read_text()
    (tmp_path / 'out' / 'a.cells.csv').unlink()
    (tmp_path / 'out' / 'b.cells.csv').unlink()
    (tmp_path / 'out' / 'b.npz').write_bytes(b'broken')
    summary, calls = run(images, params)
    assert (summary.rewritten, calls) == (['a'], ['b'])
    assert (tmp_path / 'out' / 'a.cells.csv').read_text() == text


def test_an_interrupted_run_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C before the second image's state file is written: it is predicted again."""
    params = params_for(tmp_path)
    write = files.write_json

    def interrupt(path: Path, value: object) -> None:
        if Path(path).name == 'b.state.json':
            raise KeyboardInterrupt
        write(path, value)

    monkeypatch.setattr(files, 'write_json', interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(images, params)
    monkeypatch.setattr(files, 'write_json', write)
    summary, calls = run(images, params)
    assert (summary.skipped, calls) == (['a'], ['b', 'c'])
    # Interrupted with other weights, b's instances are theirs, and no state may say otherwise.
    monkeypatch.setattr(files, 'write_json', interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(images, params, tag='other weights')
    monkeypatch.setattr(files, 'write_json', write)
    _, calls = run(images, params)
    assert calls == ['a', 'b']


# ------------------------------------------------------------------------------ failures


def test_one_bad_file_does_not_stop_the_rest(images: Path, tmp_path: Path) -> None:
    (images / 'aa.tif').write_bytes(b'no image')
    items = look_for([str(images), str(tmp_path / 'missing.tif')]).items
    detector = PaintedCells()
    summary = predict.predict(items, detector, params_for(tmp_path))
    assert detector.calls == ['a', 'b', 'c']
    assert list(summary.failed) == ['aa', 'missing']
    assert summary.exit_code == 1
    text = summary.describe()
    assert '2 failed:' in text
    assert 'aa.tif' in text
    assert 'missing.tif: cannot be opened' in text
    assert not (tmp_path / 'out' / 'aa.state.json').exists()


def test_a_file_that_breaks_its_reader_does_not_stop_the_rest(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged TIFFs make readers stumble in ways that nobody foresaw, also over the header."""
    opened = slide.open_image

    def stumble(path: Path, **options):
        if path.name == 'b.tif':
            raise ZeroDivisionError('tile width')
        return opened(path, **options)

    monkeypatch.setattr(slide, 'open_image', stumble)
    summary, _ = run(images, params_for(tmp_path))
    assert sorted(summary.predicted) == ['a', 'c']
    assert 'ZeroDivisionError: tile width' in summary.failed['b']


def test_a_failing_detector_is_reported_and_old_results_do_not_pass_for_new(
    images: Path, tmp_path: Path
) -> None:
    params = params_for(tmp_path)
    run(images, params)

    class Broken(PaintedCells):
        def detect(self, pictures: Sequence[np.ndarray], name: str) -> list[InstanceSet]:
            if name == 'b':
                raise RuntimeError('boom')
            return super().detect(pictures, name)

    summary = predict.predict(look_for([str(images)]).items, Broken('new'), params)
    assert summary.failed['b'].endswith('RuntimeError: boom')
    assert summary.predicted == ['a', 'c']
    _, calls = run(images, params, tag='new')
    assert calls == ['b']


# -------------------------------------------------------------------------- command line


def test_words_of_the_command_line() -> None:
    from tools.predict import parse_args

    args = parse_args(['configs/fold0.py', 'best', 'a.tif', 'dir', '--out', 'o'])
    assert (args.configs, args.checkpoints) == (['configs/fold0.py'], ['best'])
    assert args.inputs == ['a.tif', 'dir']
    args = parse_args(['0.py', '1.py', 'x.pth', 'y.pth', 'a.png', '--out', 'o', '--format', 'csv'])
    assert (args.configs, args.checkpoints) == (['0.py', '1.py'], ['x.pth', 'y.pth'])
    assert args.inputs == ['a.png']
    args = parse_args(['0.py', 'a.png', '--out', 'o', '--part', '3/100'])
    assert (args.part, args.tissue, args.level) == ((3, 100), 'slides', None)
    with pytest.raises(SystemExit):
        parse_args(['0.py', 'a.png', '--out', 'o', '--part', '3'])
    for words in (['0.py', '--out', 'o'], ['a.png', '--out', 'o']):
        with pytest.raises(SystemExit):
            parse_args(words)


# --------------------------------------------------------------------------------- model


@pytest.mark.mm
def test_less_memory_per_batch() -> None:
    torch = pytest.importorskip('torch')
    from mmdet.structures import DetDataSample

    from cellseg_mm.detectors.detector import ModelDetector
    from cellseg_mm.model.detections import to_pred_instances

    class Hungry(torch.nn.Module):
        most = 2

        def test_step(self, data: dict) -> list[DetDataSample]:
            if len(data['inputs']) > self.most:
                raise torch.cuda.OutOfMemoryError('out of memory')
            for sample in data['data_samples']:
                hw = sample.metainfo['ori_shape']
                found = PaintedCells.find(np.full(hw, 7, np.uint8), 'a')
                sample.pred_instances = to_pred_instances(found)
            return data['data_samples']

    keys = ('img_id', 'name', 'ori_shape', 'img_shape')
    pipeline = [{'type': 'PackDetInputs', 'meta_keys': keys}]
    model = Hungry()
    detector = ModelDetector(model, pipeline, red_blue_swapped=False, identity={}, batch_size=8)
    pictures = [np.zeros((4 + k, 5, 3), np.uint8) for k in range(7)]
    found = detector.detect(pictures, 'a')
    assert [s.image_hw for s in found] == [(4 + k, 5) for k in range(7)]
    assert detector.batch_size == 1  # 7 did not fit, nor did 7 // 2 = 3; 3 // 2 = 1 does
    model.most = 0
    with pytest.raises(CellSegError, match='one picture of 4 x 5 px does not fit'):
        detector.detect(pictures, 'a')


@pytest.mark.mm
def test_a_model_notes_where_region_proposals_were_cut() -> None:
    """The highest cut of all of an image's pictures counts, and none of another image's."""
    torch = pytest.importorskip('torch')
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    from cellseg_mm.detectors.detector import ModelDetector
    from cellseg_mm.model.detections import to_pred_instances

    class Head(torch.nn.Module):
        test_cfg = {'max_per_img': 3}
        lowest = 0.0

        def predict(self) -> list[InstanceData]:
            return [InstanceData(scores=torch.tensor([1.0, 0.99, self.lowest]))]

    class Proposing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rpn_head = Head()

        def test_step(self, data: dict) -> list[DetDataSample]:
            self.rpn_head.predict()
            for sample in data['data_samples']:
                empty = InstanceSet.empty('a', 0, sample.metainfo['ori_shape'])
                sample.pred_instances = to_pred_instances(empty)
            return data['data_samples']

    pipeline = [
        {'type': 'PackDetInputs', 'meta_keys': ('img_id', 'name', 'ori_shape', 'img_shape')}
    ]
    model = Proposing()
    detector = ModelDetector(model, pipeline, red_blue_swapped=False, identity={})
    told = []
    for name, lowest in [('a', 0.91), ('a', 0.95), ('a', 0.2), ('b', 0.89), ('c', 0.901)]:
        model.rpn_head.lowest = lowest
        detector.detect([np.zeros((8, 8, 3), np.uint8)], name)
        told.append([note.split(',')[0] for note in detector.notes])
    cut = 'region proposals were cut at a score of '
    assert told == [[f'{cut}0.910'], [f'{cut}0.950'], [f'{cut}0.950'], [], [f'{cut}0.901']]


@pytest.mark.mm
def test_a_model_sees_pictures_as_its_pipeline_reads_files(tmp_path: Path) -> None:
    """Detector on pixels = the config's own data pipeline on the file, bit for bit."""
    torch = pytest.importorskip('torch')
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.dataset import Compose, pseudo_collate
    from mmengine.registry import DefaultScope

    from cellseg_mm.detectors.detector import build_detector
    from cellseg_mm.detectors.member_models import MemberSource, load_member
    from cellseg_mm.model.detections import to_instance_set

    cfg = Config.fromfile('configs/sample/fold0.py')
    torch.manual_seed(0)
    weights = MODELS.build(cfg.model).state_dict()
    torch.save({'state_dict': weights, 'meta': {}}, tmp_path / 'a.pth')
    picture = np.random.default_rng(0).integers(0, 256, (96, 80, 3)).astype(np.uint8)
    tifffile.imwrite(tmp_path / 'a.tif', picture, photometric='rgb')
    source = MemberSource(cfg, 'fold0.py', tmp_path / 'a.pth')
    (found,) = build_detector([source]).detect([picture], 'a')
    with DefaultScope.overwrite_default_scope('mmdet'):
        pipeline = Compose(cfg.test_dataloader.dataset.pipeline)
    data = pipeline({'img_path': tmp_path / 'a.tif', 'img_id': 0, 'name': 'a', 'label_paths': {}})
    with torch.no_grad():
        (sample,) = load_member(source).model.test_step(pseudo_collate([data]))
    expected = to_instance_set(sample)
    assert len(expected) > 0
    assert build_detector([source]).cap == 500
    assert (found.rles, found.scores.tolist()) == (expected.rles, expected.scores.tolist())
    turned = build_detector([source], tta_spec='hflip').detect([picture], 'a')
    assert turned[0].image_hw == (96, 80)
    assert set(turned[0].extra) >= {'n_votes'}

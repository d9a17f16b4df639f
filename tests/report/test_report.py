"""The report: its numbers are scoring's, its texts are escaped, and it works in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tifffile

import cellseg_mm  # noqa: F401  (makes mmdet importable where mmcv has no compiled ops)

pytest.importorskip('mmengine')

from cellseg_mm.core.errors import ConfigError, FoldError
from cellseg_mm.core.files import file_hash, write_json
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.trainings import MARK_VERSION
from cellseg_mm.data.folds import Folds, load_folds, save_folds
from cellseg_mm.data.labels import find_cases, read_gt
from cellseg_mm.ensemble.oof import pool_predictions
from cellseg_mm.fusion.post import PostProcess, postprocess
from cellseg_mm.fusion.rescoring import FEATURES, Rescoring
from cellseg_mm.fusion.settings import default_settings
from cellseg_mm.report import report
from cellseg_mm.results.predictions import Predictions, save_predictions
from cellseg_mm.scores.matching import compare
from cellseg_mm.scores.mistakes import ERROR_NAMES, errors_of
from cellseg_mm.scores.records import ScoreParams
from cellseg_mm.scores.score import score
from tests.report.test_logs import train_row, write_log
from tests.support.chromium import Chromium, find_chromium

pytestmark = pytest.mark.mm

HOSTILE_CASE = '<img src=x onerror=alert(1)>'
HOSTILE_CLASS = '</script><script>window.hacked = 1</script>'
CLASSES = ('round', HOSTILE_CLASS)
HW = (67, 91)
FAST = ScoreParams(n_bootstrap=20)

CONFIG = """
metainfo = dict(classes={classes!r}, palette=[(0, 114, 178), (240, 228, 66)])
dataset = dict(type='CellDataset', data_root={root!r}, folds_file={folds!r}, metainfo=metainfo,
               fold={fold}, pipeline=[dict(type='LoadCellImage', red_blue_swapped=True)])
train_dataloader = dict(dataset=dict(split='train', **dataset))
val_dataloader = dict(dataset=dict(split='val', **dataset))
train_cfg = dict(val_interval=10)
"""


class Reader(HTMLParser):
    """Collects elements, ids, links and table cells, and checks that elements nest."""

    VOID = ('meta', 'link', 'br', 'input', 'img')

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, dict]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self._row: list[str] | None = None
        self._caption = ''
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == 'tr':
            self._row = []
        if tag in ('td', 'th') and self._row is not None:
            self._row.append('')

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == 'tr' and self._row is not None:
            self.rows.setdefault(self._caption, []).append(self._row)
            self._row = None

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == 'caption':
            self._caption = data
        elif self._row:
            self._row[-1] += data if self._open[-1] != 'small' else ''


def write_data(root: Path) -> Folds:
    """Write six cases of 5 x 7 px cells in a grid, two classes, one without the second class."""
    names = [HOSTILE_CASE, *(f'case{i}' for i in range(5))]
    rng = np.random.default_rng(0)
    for i, name in enumerate(names):
        folder = root / 'train' / name
        folder.mkdir(parents=True)
        pixels = rng.integers(0, 255, (*HW, 3), dtype=np.uint8)
        pixels[..., 0] = 200
        tifffile.imwrite(folder / 'image.tif', pixels)
        for k in range(1 if i == 5 else 2):
            label_map = np.zeros(HW, dtype=np.uint16)
            for n in range(6):
                label_map[4 + 30 * k : 9 + 30 * k, 12 * n + 3 : 12 * n + 10] = n + 1
            tifffile.imwrite(folder / f'class{k + 1}.tif', label_map)
    folds = Folds((tuple(names[:3]), tuple(names[3:])))
    save_folds(root / 'folds.json', folds)
    return folds


def predict(gt: InstanceSet, seed: int) -> InstanceSet:
    """Move cells, drop two, confuse one class, invent a cell where nothing is, double one."""
    rng = np.random.default_rng(seed)
    crops, offsets = gt.crops()
    offsets = offsets + rng.integers(0, 2, offsets.shape)
    class_ids = gt.class_ids.copy()
    class_ids[0] = 1 - class_ids[0]
    keep = np.arange(len(gt) - 2)
    scores = rng.uniform(0.3, 0.95, len(gt)).astype(np.float32)
    scores[0] = 0.9
    invented = np.array([[55, 80]])
    doubled = offsets[1:2] + 1  # of the other class, so that AP counts both
    return InstanceSet.from_crops(
        gt.name,
        gt.image_id,
        gt.image_hw,
        crops=[*(crops[i] for i in keep), np.ones((6, 6), dtype=bool), crops[1]],
        offsets_yx=np.concatenate([offsets[keep], invented, doubled]),
        class_ids=np.append(class_ids[keep], [0, 1 - class_ids[1]]),
        scores=np.append(scores[keep], np.array([0.97, 0.6], dtype=np.float32)),
    )


def write_work_dir(work_dir: Path, gt: list[InstanceSet], folds: Folds, fold: int) -> None:
    work_dir.mkdir(parents=True)
    write_log(work_dir, '20260101_000000', [train_row(5), train_row(10), {'cell/segm_mAP_50': 0.4}])
    best = work_dir / 'best_cell_segm_mAP_50_iter_10.pth'
    best.write_bytes(f'weights {fold}'.encode())
    best_hash = file_hash(best)[:16]
    mark = {'version': MARK_VERSION, 'best': best.name, 'best_hash': best_hash}
    write_json(work_dir / 'finished.json', mark)
    names = set(folds.val_names(fold))
    sets = [predict(s, seed) for seed, s in enumerate(gt) if s.name in names]
    provenance = {'fold': fold, 'fold_hash': folds.hash, 'class_names': list(CLASSES), 'seed': 7}
    provenance |= {'checkpoint_hash': best_hash}
    provenance |= {'versions': {'numpy': '9.9.9'}, 'commit': 'abc123', 'data_hash': 'd4t4'}
    save_predictions(work_dir / 'val.predictions.npz', Predictions(sets, provenance))


@pytest.fixture(scope='module')
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of hostile names, two tested folds and an ensemble."""
    root = tmp_path_factory.mktemp('report')
    folds = write_data(root / 'data')
    gt = [read_gt(case) for case in find_cases(root / 'data', 'train', 2)]
    for fold in (0, 1):
        config = root / 'configs' / f'fold{fold}.py'
        config.parent.mkdir(exist_ok=True)
        values = {'classes': CLASSES, 'root': str(root / 'data'), 'fold': fold}
        config.write_text(CONFIG.format(folds=str(root / 'data' / 'folds.json'), **values))
        write_work_dir(root / 'work' / f'fold{fold}', gt, folds, fold)
    (root / 'data' / 'test_release').mkdir()
    tifffile.imwrite(root / 'data' / 'test_release' / 't1.tif', np.zeros((*HW, 3), dtype=np.uint8))
    entry = {'file_name': 't1.tif', 'id': 1, 'height': HW[0], 'width': HW[1]}
    write_json(root / 'data' / 'test_image_name_to_ids.json', [entry])
    pred = predict(gt[0], 3)
    agreement = np.linspace(0.2, 1, len(pred), dtype=np.float32)
    fused = InstanceSet(
        't1',
        1,
        HW,
        pred.class_ids,
        pred.scores,
        pred.boxes_xyxy,
        pred.rles,
        {'agreement': agreement, 'mask_uncertainty': agreement[::-1].copy()},
    )
    record = {'class_names': list(CLASSES), 'fusion': 'pixel vote'}
    (root / 'out').mkdir()
    save_predictions(root / 'out' / 'test.predictions.npz', Predictions([fused], record))
    return root


def configs_of(project: Path) -> list[Path]:
    return [project / 'configs' / f'fold{fold}.py' for fold in (0, 1)]


@pytest.fixture(scope='module')
def written(project: Path) -> report.Written:
    inputs = report.from_configs(
        configs_of(project), work_root=project / 'work', out_dir=project / 'out'
    )
    return report.write_report(inputs, project / 'out' / 'report.html', params=FAST)


@pytest.fixture(scope='module')
def html(written: report.Written) -> str:
    return written.path.read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def pool(project: Path):
    folds = load_folds(project / 'data' / 'folds.json')
    paths = [project / 'work' / f'fold{fold}' / 'val.predictions.npz' for fold in (0, 1)]
    return pool_predictions(paths, folds, project / 'data')


def embedded(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(found[1])


# ---- structure ----


def test_page_is_whole_and_every_link_leads_somewhere(html: str) -> None:
    page = Reader(html)
    ids = [a['id'] for _, a in page.attributes if 'id' in a]
    assert len(ids) == len(set(ids))
    links = [a['href'] for tag, a in page.attributes if tag == 'a']
    assert len(links) == 13
    assert all(link[1:] in ids for link in links)
    assert page.tags.count('h1') == 1


def test_page_names_what_keyboards_and_screen_readers_need(html: str) -> None:
    page = Reader(html)
    for tag, a in page.attributes:
        if tag == 'svg':
            assert a.get('aria-label') or a.get('aria-hidden') == 'true'
        if tag == 'section':
            assert a['aria-labelledby']
    assert '<a class="skip" href="#main">' in html
    assert ':focus-visible' in html
    assert 'prefers-color-scheme:dark' in html


def test_page_loads_nothing_from_elsewhere(html: str) -> None:
    without_namespace = html.replace('http://www.w3.org/2000/svg', '')
    assert 'http' not in re.sub(r'<meta http-equiv', '', without_namespace)
    for tag, a in Reader(html).attributes:
        for key in ('src', 'href', 'srcset', 'action'):
            assert a.get(key, '#').startswith(('#', 'data:')), (tag, key)


# ---- hostile texts ----


def test_hostile_names_stay_text(html: str) -> None:
    assert '<img' not in html
    assert 'onerror=alert' in html  # the name is shown, as text
    assert HOSTILE_CLASS not in html
    assert Reader(html).tags.count('script') == 2
    data = embedded(html)
    assert data['classNames'] == list(CLASSES)
    assert HOSTILE_CASE in [image['name'] for image in data['images']]


def test_placeholders_in_texts_are_not_filled(project: Path) -> None:
    inputs = report.from_work_dir(project / 'out')
    from dataclasses import replace

    page = report.page(replace(inputs, title='{{css}} {{nothing}}'), '{{js}}', [], [])
    assert '<title>{{css}} {{nothing}}</title>' in page
    assert '<main id="main" tabindex="-1">\n{{js}}' in page


# ---- numbers ----


def test_numbers_are_those_of_scoring(html: str, pool) -> None:
    scores = score(pool.gt_sets, pool.pred_sets, CLASSES, FAST)
    page = Reader(html)
    rows = {row[0]: row[1:] for row in page.rows['Scores out of fold']}
    expected = {
        'mask AP50': [scores.segm.mean('ap50')[0], *scores.segm.ap50[:, 0]],
        'box AP75': [scores.bbox.mean('ap75')[0], *scores.bbox.ap75[:, 0]],
        'PQ (mean: mPQ+)': [scores.mpq, *scores.counted[0].pq],
        'F1 at IoU 0.7': [np.mean(scores.counted[1].f1), *scores.counted[1].f1],
    }
    for name, values in expected.items():
        assert rows[name] == [f'{v:.3f}' for v in values], name
    low, high = scores.intervals['segm_AP50']
    assert f'{low:.3f} to {high:.3f}' in html
    assert rows['AJI'][0] == f'{scores.aji:.3f}'


def test_confusion_errors_and_counts_are_those_of_scoring(html: str, pool) -> None:
    scores = score(pool.gt_sets, pool.pred_sets, CLASSES, FAST)
    page = Reader(html)
    confusion = [row[1:-1] for row in page.rows['Confusion matrix'][1:]]
    numbers = [[int(cell) if cell else 0 for cell in row] for row in confusion]
    assert numbers == scores.confusion.tolist()
    errors = page.rows['Errors by class and size'][1:]
    sizes = [[int(v) for v in row[1:]] for row in errors[:6]]
    assert sizes == scores.errors.transpose(1, 2, 0).reshape(6, -1).tolist()
    images = {row[0]: row[2:4] for row in page.rows['Counts and scores of each image'][1:]}
    p = scores.per_image
    for i, name in enumerate(p.names):
        pairs = zip(p.pred_counts[i], p.gt_counts[i], strict=True)
        assert images[name] == [f'{pred} / {gt}' for pred, gt in pairs]


def test_folds_are_scored_by_themselves(html: str, pool) -> None:
    rows = {row[0]: row for row in Reader(html).rows['Folds side by side']}
    for fold in (0, 1):
        at = [i for i, f in enumerate(pool.fold_of) if f == fold]
        gt, pred = ([sets[i] for i in at] for sets in (pool.gt_sets, pool.pred_sets))
        alone = score(gt, pred, CLASSES, FAST).headline()
        row = rows[f'fold {fold}']
        assert row[3:8] == [f'{alone[n]:.3f}' for n in FOLD_COLUMNS]


FOLD_COLUMNS = ('segm_AP', 'segm_AP50', 'mPQ', 'F1_50', 'AJI')


@pytest.mark.parametrize('threshold', [0.05, 0.5, 0.8, 0.93])
def test_viewer_counts_as_the_error_breakdown(html: str, pool, threshold: float) -> None:
    gt_of = {s.name: s for s in pool.gt_sets}
    pred_of = {s.name: s for s in pool.pred_sets}
    images = [image for image in embedded(html)['images'] if image['gt'] is not None]
    assert len(images) == 6
    for image in images:
        compared = compare(gt_of[image['name']], pred_of[image['name']])
        errors = errors_of(compared, 2, score_thr=threshold, area_edges=(10.0,)).sum(axis=(1, 2))
        shown = [row for row in image['pred'] if row[2] >= threshold]
        found = [row for row in image['gt'] if row[2] >= threshold]
        assert len(shown) == errors[ERROR_NAMES.index('predicted')]
        assert sum(row[3] for row in shown) == errors[ERROR_NAMES.index('correct')] == len(found)


@pytest.mark.parametrize('threshold', [0.5, 0.8, 0.93])
def test_viewer_opens_at_cells_and_counts_them(html: str, pool, threshold: float) -> None:
    gt_of = {s.name: s for s in pool.gt_sets}
    pred_of = {s.name: s for s in pool.pred_sets}
    images = [image for image in embedded(html)['images'] if image['gt'] is not None]
    n_doubled = 0
    for image in images:
        # what people would get at that score: each pixel in one cell
        post = PostProcess(score_thr=(threshold,), disjoint=True)
        cells = postprocess(pred_of[image['name']], post)[0]
        compared = compare(gt_of[image['name']], cells)
        errors = errors_of(compared, 2, score_thr=0, area_edges=(10.0,)).sum(axis=(1, 2))
        shown = [row for row in image['cells'] if row[2] >= threshold]
        found = [row for row in image['gt'] if row[3] >= threshold]
        assert len(shown) == len(cells)
        assert sum(row[3] for row in shown) == errors[ERROR_NAMES.index('correct')] == len(found)
        n_doubled += sum(row[2] >= threshold for row in image['pred']) - len(shown)
    assert (n_doubled > 0) == (threshold == 0.5)
    assert 'score of at least 0.5, each pixel in one cell only; these are the defaults' in html


def test_viewer_takes_the_settings_that_were_chosen(project: Path, tmp_path: Path, pool) -> None:
    inputs = report.from_configs(
        configs_of(project), work_root=project / 'work', out_dir=project / 'out'
    )
    path = project / 'out' / 'inference.json'
    chosen = replace(
        default_settings('instances', CLASSES), score_thr=(0.7, 0.85), min_area_px=5, mask_thr=0.4
    )
    record = {'version': 1, 'class_names': list(CLASSES)}
    write_json(path, record | {'profiles': {'instances': chosen.to_json()}})
    try:
        html = report.write_report(inputs, tmp_path / 'a.html', params=FAST).path.read_text()
        write_json(path, record | {'profiles': {}})
        other = report.write_report(inputs, tmp_path / 'b.html', params=FAST).path.read_text()
    finally:
        path.unlink()
    for image in embedded(html)['images']:
        assert all(row[2] >= (0.7, 0.85)[row[0]] for row in image['cells'])
        n = sum(row[2] >= (0.7, 0.85)[row[0]] for row in image['pred'])
        assert len(image['cells']) == n
    assert 'data-least="0.7">cells' in html
    assert '0.7 (round)' in html
    assert 'the files hold no probabilities' in html
    assert 'these are the defaults, because' in other


def test_new_scores_are_shown_as_cells_and_as_a_curve(project: Path, tmp_path: Path, pool) -> None:
    inputs = report.from_configs(
        configs_of(project), work_root=project / 'work', out_dir=project / 'out'
    )
    path = project / 'out' / 'inference.json'
    names, far = (*FEATURES, 'intercept'), ((1e6,) * len(FEATURES),) * 2
    half = tuple({'logit': 0.5}.get(name, 0.0) for name in names)
    weights = Rescoring(CLASSES, (half, half), ((-1e6,) * len(FEATURES),) * 2, far)
    chosen = replace(
        default_settings('instances', CLASSES), score_thr=(0.0, 0.0), rescoring=weights
    )
    curve = {'brier': 0.1, 'mean_score': [0.1, None], 'share_right': [0.35, None], 'n': [4, 0]}
    write_json(path, {
        'version': 1, 'class_names': list(CLASSES),
        'profiles': {'instances': chosen.to_json()},
        'rescoring_evidence': {'instances': {'after': curve}},
    })  # fmt: skip
    try:
        html = report.write_report(inputs, tmp_path / 'a.html', params=FAST).path.read_text()
    finally:
        path.unlink()
    pred_of = {s.name: s for s in pool.pred_sets}
    for image in embedded(html)['images']:
        if image['gt'] is not None:
            wanted = postprocess(weights.apply(pred_of[image['name']]), chosen.post)[0]
            shown = sorted(row[2] for row in image['cells'])
            np.testing.assert_allclose(shown, sorted(wanted.scores), atol=0.005)
    assert 'Mean distance: 0.250' in html
    assert 'new score of at least 0' in html
    assert 'new scores' in html


def test_worst_image_comes_first(html: str, pool) -> None:
    scores = score(pool.gt_sets, pool.pred_sets, CLASSES, ScoreParams(n_bootstrap=0))
    first = embedded(html)['images'][0]['name']
    assert first == scores.per_image.names[int(np.nanargmin(scores.per_image.pq))]


def test_settings_hashes_and_versions_are_there(html: str, project: Path) -> None:
    folds = load_folds(project / 'data' / 'folds.json')
    for text in (folds.hash, 'd4t4', 'abc123', '9.9.9', 'pixel vote', 'val_interval=10'):
        assert text in html


def test_size_is_bounded_and_what_is_left_out_is_said(project: Path, tmp_path: Path) -> None:
    inputs = report.from_configs(
        configs_of(project), work_root=project / 'work', out_dir=project / 'out'
    )
    whole = report.write_report(inputs, tmp_path / 'a.html', params=FAST)
    limits = report.Limits(n_worst=2, n_best=1, n_doubtful=0, n_crops=1)
    small = report.write_report(inputs, tmp_path / 'b.html', limits=limits, params=FAST)
    assert (whole.n_images, small.n_images) == (7, 3)
    assert small.n_bytes < whole.n_bytes < 1_000_000
    assert small.n_bytes == (tmp_path / 'b.html').stat().st_size
    text = small.path.read_text(encoding='utf-8')
    assert '3 of 6 labelled images' in text
    assert '4 were left out' in text
    limits = report.Limits(max_picture_bytes=10)
    assert report.write_report(inputs, tmp_path / 'c.html', limits=limits).n_images == 0


# ---- what is missing ----


def test_without_any_result_every_section_says_why(project: Path, tmp_path: Path) -> None:
    inputs = report.from_configs(configs_of(project), work_root=tmp_path / 'nothing')
    written = report.write_report(inputs, tmp_path / 'report.html')
    html = written.path.read_text(encoding='utf-8')
    page = Reader(html)
    sections = html.split('<section ')[1:]
    assert len(sections) == 12
    without_numbers = [s for s in sections if not s.startswith(('id="folds"', 'id="settings"'))]
    assert all('class="nothing"' in s for s in without_numbers)
    assert written.n_images == 0
    assert 'fold 0: training has not finished: python tools/train.py' in written.notes[0]
    assert page.tags.count('section') == 12


def test_one_fold_and_ensemble_folder(project: Path, tmp_path: Path) -> None:
    config = project / 'configs' / 'fold1.py'
    work_dir = project / 'work' / 'fold1'
    (work_dir / 'fold1.py').write_text(config.read_text())
    try:
        one = report.write_report(report.from_work_dir(work_dir), tmp_path / 'a.html', params=FAST)
        assert len(one.scores.per_image.names) == 3
        assert 'only fold 1 of 2' in one.path.read_text(encoding='utf-8')
    finally:
        (work_dir / 'fold1.py').unlink()
    # the configs beside an ensemble folder tell where the images are
    beside = report.write_report(report.from_work_dir(project / 'out'), tmp_path / 'b.html')
    assert (beside.scores, beside.n_images) == (None, 1)
    # so does the config that the ensemble's runner leaves in the folder; it is no fold for that
    (project / 'out' / 'fold1.py').write_text(config.read_text())
    try:
        inputs = report.from_work_dir(project / 'out')
    finally:
        (project / 'out' / 'fold1.py').unlink()
    assert (inputs.runs, inputs.notes) == ((), ())
    away = tmp_path / 'away' / 'ensemble'
    away.mkdir(parents=True)
    content = (project / 'out' / 'test.predictions.npz').read_bytes()
    (away / 'test.predictions.npz').write_bytes(content)
    alone = report.write_report(report.from_work_dir(away), tmp_path / 'c.html')
    assert alone.n_images == 0
    text = alone.path.read_text(encoding='utf-8')
    assert 'Images that would teach most if labelled' in text
    assert 'the data folder is unknown' in text


def test_predictions_of_another_checkpoint_are_left_out_and_named(
    project: Path, tmp_path: Path
) -> None:
    work = shutil.copytree(project / 'work', tmp_path / 'work')
    inputs = report.from_configs(configs_of(project), work_root=work)
    assert inputs.notes == ()
    assert inputs.pool is not None
    assert inputs.pool.folds == (0, 1)
    best = next((work / 'fold1').glob('best_*.pth'))
    best.write_bytes(b'trained anew')
    mark = {'version': MARK_VERSION, 'best': best.name, 'best_hash': file_hash(best)[:16]}
    write_json(work / 'fold1/finished.json', mark)
    inputs = report.from_configs(configs_of(project), work_root=work)
    (note,) = inputs.notes
    assert note.startswith('fold 1: its predictions are left out: ')
    assert f'than {best.name} ({mark["best_hash"]})' in note
    assert inputs.pool is not None
    assert inputs.pool.folds == (0,)


def test_wrong_calls_are_one_sentence(project: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='no configs given'):
        report.from_configs([])
    with pytest.raises(ConfigError, match='no such config file'):
        report.from_configs([tmp_path / 'fold0.py'])
    with pytest.raises(ConfigError, match='neither a config'):
        report.from_work_dir(tmp_path)


def test_predictions_of_other_folds_are_refused(project: Path, tmp_path: Path) -> None:
    source = project / 'work' / 'fold0' / 'val.predictions.npz'
    for fold in (0, 1):
        (tmp_path / f'fold{fold}').mkdir()
        (tmp_path / f'fold{fold}' / source.name).write_bytes(source.read_bytes())
    with pytest.raises(FoldError, match='given twice'):
        report.from_configs(configs_of(project), work_root=tmp_path)


# ---- a real browser ----

# `make test-browser` sets the variable: there a missing browser is an error. Elsewhere the tests
# below are not collected without one, and the one that stands in for them says so.
HAS_BROWSER = find_chromium() is not None or bool(os.environ.get('CELLSEG_REQUIRE_BROWSER'))

if HAS_BROWSER:

    @pytest.fixture(scope='module')
    def browser():
        with Chromium() as page:
            yield page

    @pytest.mark.parametrize('width', [1280, 390])
    def test_opens_without_errors_at(browser, written: report.Written, width: int) -> None:
        browser.open(written.path, width=width)
        assert browser.problems == []
        assert browser.requests == []
        assert browser.run('window.hacked') is None
        assert browser.run('document.documentElement.scrollWidth') <= width
        assert browser.run('document.querySelectorAll("#pane-pred path").length') > 0

    VISIBLE = (
        '[...document.querySelectorAll("#pane-{} path")]'
        '.filter((p) => p.style.display !== "none").length'
    )

    def test_slider_and_switches_change_what_is_shown(
        browser, written: report.Written, html: str
    ) -> None:
        browser.open(written.path, width=1280)
        images = embedded(html)['images']
        at = next(i for i, image in enumerate(images) if {row[0] for row in image['gt']} == {0, 1})
        browser.run(
            f'document.getElementById("image").value = "{at}";'
            'document.getElementById("image").dispatchEvent(new Event("change"))'
        )
        first = images[at]
        cells = [row for row in first['cells'] if row[2] >= 0.5]
        assert browser.run(VISIBLE.format('pred')) == len(cells)
        assert browser.run('document.getElementById("threshold-value").textContent') == '0.50'
        found = sum(row[3] >= 0.5 for row in first['gt'])
        text = browser.run('document.getElementById("count-gt").textContent')
        assert text.startswith(f'{len(first["gt"])} cells, {found} found')
        browser.run(
            'document.getElementById("predictions").value = "pred";'
            'document.getElementById("predictions").dispatchEvent(new Event("change"))'
        )
        assert browser.run(VISIBLE.format('pred')) == len(first['pred']) > len(cells)
        for threshold in (0.05, 0.5, 0.9):
            browser.run(
                f'document.getElementById("threshold").value = {threshold};'
                'document.getElementById("threshold").dispatchEvent(new Event("input"))'
            )
            shown = [row for row in first['pred'] if row[2] >= threshold]
            assert browser.run(VISIBLE.format('pred')) == len(shown)
            right = sum(row[3] for row in shown)
            text = browser.run('document.getElementById("count-pred").textContent')
            assert text == f'{len(shown)} shown, {right} right, {len(shown) - right} wrong'
            found = sum(row[2] >= threshold for row in first['gt'])
            missed = len(first['gt']) - found
            text = browser.run('document.getElementById("count-gt").textContent')
            assert text == f'{len(first["gt"])} cells, {found} found, {missed} missed'
            dashed = 'document.querySelectorAll("#pane-gt path.wrong").length'
            assert browser.run(dashed) == missed
        browser.run('document.querySelector(".class-switch[value=\\"1\\"]").click()')
        n_first_class = sum(row[0] == 0 for row in first['gt'])
        assert browser.run(VISIBLE.format('gt')) == n_first_class < len(first['gt'])
        assert browser.problems == []

    def test_keyboard_zooms_and_moves(browser, written: report.Written) -> None:
        browser.open(written.path, width=1280)
        browser.run('document.querySelector("#pane-gt svg").focus()')
        for key, text in (('+', '+'), ('ArrowRight', '')):
            for kind in ('keyDown', 'keyUp'):
                browser.call('Input.dispatchKeyEvent', type=kind, key=key, text=text)
        boxes = [
            browser.run(f'document.querySelector("#pane-{kind} svg").getAttribute("viewBox")')
            for kind in ('gt', 'pred')
        ]
        x, _, width, _ = map(float, boxes[0].split())
        assert boxes[0] == boxes[1]  # both panes show the same place
        assert width == pytest.approx(HW[1] / 1.5, abs=0.01)
        # centred by the zoom, then an eighth of the width to the right
        assert x == pytest.approx((HW[1] - width) / 2 + width / 8, abs=0.02)

    def test_theme_images_and_sorting(browser, written: report.Written) -> None:
        browser.open(written.path, width=390, dark=True)
        background = 'getComputedStyle(document.body).backgroundColor'
        assert browser.run(background) == 'rgb(22, 27, 34)'
        browser.run('document.getElementById("theme").click()')
        assert browser.run(background) == 'rgb(255, 255, 255)'
        before = browser.run('document.getElementById("facts").textContent')
        browser.run('document.getElementById("next").click()')
        assert browser.run('document.getElementById("facts").textContent') != before
        values = (
            '[...document.querySelectorAll("#counts table.sortable tbody tr")]'
            '.map((row) => parseFloat(row.cells[4].textContent))'
        )
        browser.run('document.querySelectorAll("#counts table.sortable th button")[4].click()')
        found = browser.run(values)
        assert found == sorted(found)
        assert browser.problems == []

else:

    def test_browser_tests_did_not_run(capsys: pytest.CaptureFixture) -> None:
        with capsys.disabled():
            print(
                '\ntests/test_report.py: NO CHROMIUM FOUND, the browser tests did not run; '
                'install chromium and type: make test-browser'
            )
        assert find_chromium() is None

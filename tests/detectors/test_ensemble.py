"""tools/ensemble.py: folds, files of any origin, two processes; and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import cellseg_mm  # noqa: F401  (makes mmdet importable where mmcv has no compiled ops)

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

from mmengine.config import Config  # noqa: E402

from cellseg_mm.core.errors import CheckpointError, ConfigError, FoldError, PredictionError  # noqa: E402
from cellseg_mm.core.instances import InstanceSet  # noqa: E402
from cellseg_mm.data.images import Images, find_images  # noqa: E402
from cellseg_mm.data.labels import read_id_map  # noqa: E402
from cellseg_mm.detectors.from_options import pair_sources  # noqa: E402
from cellseg_mm.ensemble.fuse_files import ensemble_files  # noqa: E402
from cellseg_mm.ensemble.outcome import finish, outcome_text, submission_text, submit  # noqa: E402
from cellseg_mm.fusion.fuse import fuse  # noqa: E402
from cellseg_mm.fusion.settings import InferenceSettings  # noqa: E402
from cellseg_mm.results.predictions import Predictions, load_predictions, save_predictions  # noqa: E402
from cellseg_mm.results.submission import write_submission  # noqa: E402
from cellseg_mm.weights.find import find_checkpoints  # noqa: E402
from tests.support.micro import free_port  # noqa: E402
from tests.support.tiny_folds import ROOT, TinyFolds, environment, make_tiny_folds  # noqa: E402

pytestmark = pytest.mark.mm

CLASSES = ('epithelial', 'lymphocyte', 'neutrophil', 'macrophage')
ID_MAP = 'test_image_name_to_ids.json'


@pytest.fixture(scope='module')
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyFolds]:
    root = tmp_path_factory.mktemp('tiny')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('CELLSEG_DATA', str(root / 'data'))
        yield make_tiny_folds(root)


def run_tool(tiny: TinyFolds, *words: str | Path, n_processes: int = 1) -> str:
    """Run the ensemble tool in processes of its own and return what it prints."""
    command = [sys.executable, str(ROOT / 'tools/ensemble.py')]
    if n_processes > 1:
        command = ['bash', str(ROOT / 'tools/dist_ensemble.sh'), str(n_processes)]
    env = environment(tiny.data_root)
    env |= {'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}', 'PORT': str(free_port())}
    run = subprocess.run(
        [*command, *map(str, words)],
        cwd=tiny.root,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_two_processes_give_the_submission_of_one(tiny: TinyFolds) -> None:
    one, two = tiny.root / 'one', tiny.root / 'two'
    said = run_tool(tiny, *tiny.configs, '--fusion', 'soft_mask', '--out', one)
    run_tool(tiny, *tiny.configs[::-1], '--fusion', 'soft_mask', '--out', two, n_processes=2)
    name = 'test-results.json.zip'
    assert (one / name).read_bytes() == (two / name).read_bytes()
    members = [
        load_predictions(p / 'test.predictions.npz').provenance['members'] for p in (one, two)
    ]
    assert [m['source_hash'] for m in members[0]] == [m['source_hash'] for m in members[1]]
    for fold in range(3):
        assert f'fold {fold}, folds {tiny.folds.hash}, score 0.2500' in said
    assert 'rule: soft_mask' in said
    assert '2 images: ' in said
    assert str(one / name) in said


@pytest.fixture
def images(tiny: TinyFolds) -> Images:
    return find_images(tiny.data_root, 'test', CLASSES, folds_path=tiny.data_root / 'folds.json')


def squares(images: Images, shift: int, score: float) -> list[InstanceSet]:
    """One square per image."""
    import numpy as np

    made = []
    for case in images.cases:
        made.append(
            InstanceSet.from_crops(
                case.name,
                case.image_id,
                case.image_hw,
                crops=[np.ones((10, 8), dtype=bool)],
                offsets_yx=np.array([[5, 5 + shift]]),
                class_ids=np.array([shift % 4]),
                scores=np.array([score]),
            )
        )
    return made


def npz(path: Path, sets: list[InstanceSet], **provenance: object) -> Path:
    save_predictions(path, Predictions(tuple(sets), provenance))
    return path


def test_files_of_any_origin_are_fused_in_any_order(
    tiny: TinyFolds, images: Images, tmp_path: Path
) -> None:
    a, b = squares(images, 0, 0.9), squares(images, 1, 0.8)
    b = [replace(s, class_ids=a[0].class_ids) for s in b]
    ours = npz(tmp_path / 'a.npz', a, class_names=list(CLASSES))
    theirs = write_submission(tmp_path / 'theirs.zip', b, read_id_map(tiny.data_root / ID_MAP)).path
    settings = InferenceSettings(fusion='soft_mask:iou_thr=0.3', min_votes=2)
    for i, paths in enumerate([(ours, theirs), (theirs, ours)]):
        merged = ensemble_files(paths, images, settings, tmp_path / str(i))
        for found, x, y in zip(load_predictions(merged.predictions_path).sets, a, b, strict=True):
            wanted = fuse([x, y], settings.rule, settings.post)
            assert found.rles == wanted.rles
            assert len(found) == 1
            assert found.extra['n_votes'].tolist() == [2]
        assert (merged.report.n_in, merged.report.n_out) == (4, 2)
    first, second = (tmp_path / str(i) / 'test.predictions.npz' for i in range(2))
    assert first.read_bytes() == second.read_bytes()
    text = outcome_text(finish(merged, images, tmp_path))
    assert '2 images: 4 instances in, 2 out (2 merged with a better one)' in text
    assert (tmp_path / 'test-results.json.zip').is_file()


def test_instances_left_out_of_a_submission_are_counted(
    tiny: TinyFolds, images: Images, tmp_path: Path
) -> None:
    import numpy as np

    sets = squares(images, 0, 0.9)
    first = sets[0]
    sets[0] = InstanceSet.from_crops(
        first.name,
        first.image_id,
        first.image_hw,
        crops=[np.ones((10, 8), dtype=bool), np.zeros((10, 8), dtype=bool)],
        offsets_yx=np.array([[5, 5], [30, 30]]),
        class_ids=np.array([0, 1]),
        scores=np.array([0.9, 0.1]),
    )
    path = npz(tmp_path / 'a.npz', sets, class_names=list(CLASSES))
    text = submission_text(submit(path, images, tmp_path))
    assert '(2 instances; 1 left out, their masks have no pixel)' in text


def test_files_that_do_not_fit_are_refused(tiny: TinyFolds, images: Images, tmp_path: Path) -> None:
    sets = squares(images, 0, 0.9)
    good = npz(tmp_path / 'good.npz', sets)
    short = npz(tmp_path / 'short.npz', sets[:1])
    with pytest.raises(PredictionError, match=r'short.npz: lacks 1 of 2 images'):
        ensemble_files([good, short], images, InferenceSettings(), tmp_path)
    other_id = npz(tmp_path / 'id.npz', [replace(s, image_id=s.image_id + 90) for s in sets])
    with pytest.raises(PredictionError, match='they must match; predict again'):
        ensemble_files([other_id], images, InferenceSettings(), tmp_path)
    classes = npz(tmp_path / 'c.npz', sets, class_names=['x', 'y', 'z', 'w'])
    with pytest.raises(PredictionError, match='its classes are x, y, z, w'):
        ensemble_files([classes], images, InferenceSettings(), tmp_path)
    soup = npz(tmp_path / 'soup.npz', sets, trained={'soup': [{'source': 'a'}, {'source': 'b'}]})
    with pytest.raises(PredictionError, match=r'soup.npz: is a soup of 2 .*fuse the checkpoints'):
        ensemble_files([good, soup], images, InferenceSettings(), tmp_path)
    with pytest.raises(ConfigError, match='without probabilities'):
        ensemble_files([good], images, InferenceSettings(mask_thr=0.4), tmp_path)


def test_fused_masks_are_cut_where_the_settings_cut_masks(images: Images, tmp_path: Path) -> None:
    """A threshold that was found out of fold holds for averaged masks as for single ones."""
    import numpy as np

    # Left half unsure, right half sure: at 0.5 half of the square is left, at 0.4 all of it.
    probs = np.full((1, 10, 10), 0.9, dtype=np.float16)
    probs[..., :5] = 0.45
    paths = []
    for k, score in enumerate((0.9, 0.8)):
        sets = squares(images, 0, score)
        extra = {'mask_probs': probs, 'mask_boxes': sets[0].boxes_xyxy}
        paths.append(npz(tmp_path / f'{k}.npz', [replace(s, extra=extra) for s in sets]))
    areas = {}
    for thr in (0.5, 0.4, 0.6):
        for rule in ('soft_mask', 'wbf', 'nms', 'soft_mask:mask_thr=0.3'):
            merged = ensemble_files(
                paths, images, InferenceSettings(fusion=rule, mask_thr=thr), tmp_path
            )
            found = load_predictions(merged.predictions_path)
            assert [len(s) for s in found.sets] == [1] * len(images.cases)
            areas[rule, thr] = int(found.sets[0].areas[0])
    assert areas['soft_mask', 0.5] == areas['wbf', 0.5] == 40
    assert areas['soft_mask', 0.4] == areas['wbf', 0.4] == areas['nms', 0.4] == 80
    assert areas['soft_mask', 0.6] == areas['wbf', 0.6] < 45
    for thr in (0.5, 0.4, 0.6):  # what the rule says itself wins
        assert areas['soft_mask:mask_thr=0.3', thr] == 80


def test_files_must_have_the_augmentation_that_the_settings_name(
    images: Images, tmp_path: Path
) -> None:
    """No model is run on files: a result that says it was augmented must have been."""
    plain = npz(tmp_path / 'plain.npz', squares(images, 0, 0.9))
    views = npz(tmp_path / 'views.npz', squares(images, 1, 0.9), tta='flips')
    settings = InferenceSettings(tta='flips')
    with pytest.raises(ConfigError, match=r'plain.npz: .*augmentation flips, .*made with none'):
        ensemble_files([plain, views], images, settings, tmp_path)
    with pytest.raises(ConfigError, match=r'augmentation d4, .*made with augmentation flips'):
        ensemble_files([views], images, replace(settings, tta='d4'), tmp_path)
    merged = ensemble_files([views], images, settings, tmp_path)
    assert load_predictions(merged.predictions_path).provenance['tta'] == 'flips'


def test_files_of_unknown_origin_are_not_scored(tiny: TinyFolds, tmp_path: Path) -> None:
    folds_path = tiny.data_root / 'folds.json'
    val = find_images(tiny.data_root, 'val', CLASSES, folds_path=folds_path, fold=1)
    assert {case.name for case in val.cases} == set(tiny.folds.val_names(1))
    unknown = npz(tmp_path / 'u.npz', squares(val, 0, 0.9))
    with pytest.raises(FoldError, match='trained with folds unknown'):
        ensemble_files([unknown], val, InferenceSettings(), tmp_path, leave_out_seen=True)
    trained = {'fold': 1, 'fold_hash': tiny.folds.hash}
    known = npz(tmp_path / 'k.npz', squares(val, 0, 0.9), trained=trained)
    merged = ensemble_files([known], val, InferenceSettings(), tmp_path)
    assert merged.scores['segm_AP50'] >= 0
    assert (tmp_path / 'val.scores.json').is_file()


def test_a_tested_fold_with_views_is_what_the_ensemble_of_one_predicts(tiny: TinyFolds) -> None:
    from cellseg_mm.core.layout import augmentations_of

    one = tiny.root / 'one_with_views'
    words = ['--cfg-options', 'test_dataloader.dataset.split=test']
    work_dir = tiny.checkpoints[0].parent
    command = [sys.executable, str(ROOT / 'tools/test.py'), tiny.configs[0], '--tta', 'hflip']
    run = subprocess.run(
        [*command, '--work-dir', str(work_dir), '--out', str(one), *words],
        cwd=tiny.root,
        env=environment(tiny.data_root),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = load_predictions(one / 'test.hflip.predictions.npz')
    assert found.provenance['tta'] == 'hflip'
    (one / 'test.hflip.predictions.npz').rename(one / 'val.hflip.predictions.npz')
    assert augmentations_of(one, 'val') == ['hflip']  # where find_best looks
    run_tool(tiny, tiny.configs[0], '--tta', 'hflip', '--out', one)
    wanted = {s.name: s for s in load_predictions(one / 'test.predictions.npz').sets}
    assert {s.name for s in found.sets} == set(wanted)
    for ours in found.sets:
        theirs = wanted[ours.name]
        assert len(ours) > 0
        assert ours.rles == theirs.rles
        assert ours.scores.tolist() == pytest.approx(theirs.scores.tolist())


def test_all_folds_with_views_are_merged(tiny: TinyFolds) -> None:
    out = tiny.root / 'all_with_views'
    said = run_tool(tiny, *tiny.configs, '--tta', 'hflip', '--out', out)
    assert 'test-time augmentation hflip' in said
    found = load_predictions(out / 'test.predictions.npz')
    assert found.provenance['tta'] == 'hflip'
    assert all(len(s) > 0 and 'agreement' in s.extra for s in found.sets)


def test_missing_members_are_all_reported(tiny: TinyFolds) -> None:
    work_dirs = [path.parent for path in tiny.checkpoints]
    assert find_checkpoints(work_dirs) == list(tiny.checkpoints)
    gone = [work_dirs[0], tiny.root / 'work_dirs/fold7', tiny.root / 'work_dirs/fold8']
    with pytest.raises(CheckpointError, match=r'2 of 3 members are missing: .*fold7.*fold8'):
        find_checkpoints(gone)


def test_checkpoints_of_another_number_of_folds(tiny: TinyFolds) -> None:
    configs = {path: Config.fromfile(path) for path in tiny.configs[:2]}
    one = {tiny.configs[0]: configs[tiny.configs[0]]}
    assert [s.config_path for s in pair_sources(one, tiny.checkpoints)] == [tiny.configs[0]] * 3
    with pytest.raises(ConfigError, match='3 checkpoints and 2 configs'):
        pair_sources(configs, tiny.checkpoints)

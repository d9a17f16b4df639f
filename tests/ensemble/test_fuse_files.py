"""ensemble.fuse_files: files of any origin in any order; files that do not fit are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cellseg_mm.core.errors import ConfigError, FoldError, PredictionError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data.images import Images, find_images
from cellseg_mm.data.labels import read_id_map
from cellseg_mm.ensemble.fuse_files import ensemble_files
from cellseg_mm.ensemble.outcome import finish, outcome_text, submission_text, submit
from cellseg_mm.fusion.fuse import fuse
from cellseg_mm.fusion.rescoring import FEATURES, Rescoring
from cellseg_mm.fusion.settings import InferenceSettings
from cellseg_mm.results.predictions import Predictions, load_predictions, save_predictions
from cellseg_mm.results.submission import write_submission
from tests.support.drawn_world import CLASSES, World

ID_MAP = 'test_image_name_to_ids.json'


@pytest.fixture
def images(world: World) -> Images:
    return find_images(world.data_root, 'test', CLASSES, folds_path=world.data_root / 'folds.json')


def squares(images: Images, shift: int, score: float) -> list[InstanceSet]:
    """One square per image."""
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
    world: World, images: Images, tmp_path: Path
) -> None:
    a, b = squares(images, 0, 0.9), squares(images, 1, 0.8)
    b = [replace(s, class_ids=a[0].class_ids) for s in b]
    ours = npz(tmp_path / 'a.npz', a, class_names=list(CLASSES))
    theirs = write_submission(
        tmp_path / 'theirs.zip', b, read_id_map(world.data_root / ID_MAP)
    ).path
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
    world: World, images: Images, tmp_path: Path
) -> None:
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


def test_files_that_do_not_fit_are_refused(world: World, images: Images, tmp_path: Path) -> None:
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


def test_files_of_unknown_origin_are_not_scored(world: World, tmp_path: Path) -> None:
    folds_path = world.data_root / 'folds.json'
    val = find_images(world.data_root, 'val', CLASSES, folds_path=folds_path, fold=1)
    assert {case.name for case in val.cases} == set(world.folds.val_names(1))
    unknown = npz(tmp_path / 'u.npz', squares(val, 0, 0.9))
    with pytest.raises(FoldError, match='trained with folds unknown'):
        ensemble_files([unknown], val, InferenceSettings(), tmp_path, leave_out_seen=True)
    trained = {'fold': 1, 'fold_hash': world.folds.hash}
    known = npz(tmp_path / 'k.npz', squares(val, 0, 0.9), trained=trained)
    merged = ensemble_files([known], val, InferenceSettings(), tmp_path)
    assert merged.scores['segm_AP50'] >= 0
    assert (tmp_path / 'val.scores.json').is_file()


def test_scores_are_made_anew_once(images: Images, tmp_path: Path) -> None:
    """A fused file with new scores, fused again with the settings that made them."""
    n = len(FEATURES)
    rows = ((1.0,) + (0.0,) * n,) * len(CLASSES)
    low, high = ((-1e6,) * n,) * len(CLASSES), ((1e6,) * n,) * len(CLASSES)
    settings = InferenceSettings(rescoring=Rescoring(CLASSES, rows, low, high))
    plain = npz(tmp_path / 'plain.npz', squares(images, 0, 0.9))
    once = ensemble_files([plain], images, settings, tmp_path / 'once').predictions_path
    with pytest.raises(ConfigError, match=r'its scores were made anew when it was fused'):
        ensemble_files([plain, once], images, settings, tmp_path / 'twice')
    assert not (tmp_path / 'twice').exists()
    ensemble_files([plain, once], images, InferenceSettings(), tmp_path / 'as they are')


def test_a_result_takes_no_members_place(images: Images, tmp_path: Path) -> None:
    inside = tmp_path / 'out' / 'test.predictions.npz'
    inside.parent.mkdir()
    before = npz(inside, squares(images, 0, 0.9)).read_bytes()
    with pytest.raises(ConfigError, match=r'is one of the files to merge'):
        ensemble_files([inside], images, InferenceSettings(), tmp_path / 'out')
    assert inside.read_bytes() == before

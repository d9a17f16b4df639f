"""Settings of inference: their file, what they do, and how they are chosen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.files import write_json
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.fusion import settings as fusion_settings
from cellseg_mm.fusion.fuse import to_spec

CLASSES = ('round', 'long')


def square(
    side: int, at: tuple[int, int], *, class_id: int = 0, score: float = 0.9
) -> tuple[np.ndarray, tuple[int, int], int, float]:
    return np.ones((side, side), dtype=bool), at, class_id, score


def image(*cells: tuple, name: str = 'a', image_id: int = 1, hw: tuple[int, int] = (41, 53)):
    return InstanceSet.from_crops(
        name,
        image_id,
        hw,
        crops=[cell[0] for cell in cells],
        offsets_yx=np.array([cell[1] for cell in cells]).reshape(-1, 2),
        class_ids=np.array([cell[2] for cell in cells], dtype=np.int64),
        scores=np.array([cell[3] for cell in cells], dtype=np.float32),
    )


def content(**changes: object) -> dict:
    profiles = {
        name: fusion_settings.default_settings(name, CLASSES).to_json()
        for name in ('submission', 'instances')
    }
    return {'version': 1, 'class_names': list(CLASSES), 'profiles': profiles, **changes}


def test_settings_come_back_from_their_file(tmp_path: Path) -> None:
    settings = fusion_settings.InferenceSettings(
        class_names=CLASSES,
        score_thr=(0.3, 0.7),
        min_area_px=20,
        mask_thr=0.4,
        disjoint=True,
        tta='flips',
        fusion='soft_mask:iou_thr=0.4',
    )
    record = content()
    record['profiles']['instances'] = settings.to_json()
    write_json(tmp_path / 'inference.json', record)
    assert (
        fusion_settings.load_settings(tmp_path / 'inference.json', 'instances', CLASSES) == settings
    )
    other = fusion_settings.load_settings(tmp_path / 'inference.json', 'submission', CLASSES)
    assert (other.score_thr, other.disjoint, other.fusion) == ((0.0, 0.0), False, 'soft_mask')


def _with(profile: dict, **changes: object) -> dict:
    record = content()
    record['profiles']['submission'] = {**record['profiles']['submission'], **profile, **changes}
    return record


@pytest.mark.parametrize(
    ('record', 'says'),
    [
        pytest.param([1], 'no settings file of version 1', id='a list'),
        pytest.param(content(version=2), 'no settings file of version 1', id='another version'),
        pytest.param(
            content(class_names=['long', 'round']), 'the model has round, long', id='order'
        ),
        pytest.param(content(profiles={}), "no profile 'submission'", id='no profile'),
        pytest.param(_with({}, iou=1), 'in addition, iou', id='unknown key'),
        pytest.param(
            _with({'score_thr': {'round': 0.1}}), 'thresholds for round', id='class lacks'
        ),
        pytest.param(_with({'score_thr': {'round': 'x', 'long': 0}}), "has 'x'", id='no number'),
        pytest.param(_with({'min_area_px': -1}), 'min_area_px is -1', id='negative area'),
        pytest.param(_with({'mask_thr': 0}), 'mask_thr is 0', id='mask threshold 0'),
        pytest.param(_with({'mask_thr': True}), 'mask_thr is True', id='mask threshold true'),
        pytest.param(_with({'disjoint': 1}), 'disjoint is 1', id='disjoint 1'),
        pytest.param(_with({'tta': ''}), "tta is ''", id='tta empty'),
        pytest.param(_with({'fusion': 'magic'}), "no rule 'magic'", id='unknown rule'),
        pytest.param(_with({'fusion': None}), 'fusion is None', id='no rule'),
    ],
)
def test_wrong_files_are_refused_in_a_sentence(tmp_path: Path, record: object, says: str) -> None:
    path = tmp_path / 'inference.json'
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=says) as caught:
        fusion_settings.load_settings(path, 'submission', CLASSES)
    assert str(path) in str(caught.value)


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='find_best'):
        fusion_settings.load_settings(tmp_path / 'no.json', 'submission', CLASSES)
    (tmp_path / 'cut.json').write_text(json.dumps(content())[:50])
    with pytest.raises(ConfigError, match='cannot be read'):
        fusion_settings.load_settings(tmp_path / 'cut.json', 'submission', CLASSES)
    (tmp_path / 'deep.json').write_text('[' * 100_000)
    with pytest.raises(ConfigError, match=r'cannot be read|no settings'):
        fusion_settings.load_settings(tmp_path / 'deep.json', 'submission', CLASSES)


def test_apply_drops_by_class_score_and_area_and_resolves_overlaps() -> None:
    cells = image(
        square(6, (0, 0), score=0.8),
        square(6, (0, 4), class_id=1, score=0.7),  # shares 2 of 6 columns with the first
        square(6, (20, 20), class_id=1, score=0.6),  # below its class's threshold
        square(2, (30, 30), score=0.9),  # 4 px
        square(6, (30, 0), score=0.55),
    )
    settings = fusion_settings.InferenceSettings(
        class_names=CLASSES, score_thr=(0.5, 0.65), min_area_px=5, disjoint=True
    )
    got = fusion_settings.apply_settings(cells, settings)
    assert got.areas.tolist() == [36, 24, 36]
    assert got.scores.tolist() == pytest.approx([0.8, 0.7, 0.55])


def test_masks_are_cut_from_probabilities_and_empty_ones_go() -> None:
    cells = image(square(8, (4, 8)), square(8, (20, 8), score=0.5))
    # Left half of the frame 0.9, right half 0.3; the second cell is faint everywhere.
    probs = np.zeros((2, 4, 4), dtype=np.float16)
    probs[0, :, :2], probs[0, :, 2:], probs[1] = 0.9, 0.3, 0.2
    cells = replace(cells, extra={'mask_probs': probs})
    settings = replace(fusion_settings.default_settings('submission', CLASSES), mask_thr=0.25)
    (cut,) = fusion_settings.apply_settings(cells, settings).masks()
    assert cut[5:11, 9:15].all()
    assert not cut[:, 24:].any()
    same = fusion_settings.apply_settings(
        cells, fusion_settings.default_settings('submission', CLASSES)
    )
    assert same.rles == cells.rles
    with pytest.raises(ConfigError, match='without probabilities'):
        fusion_settings.apply_settings(replace(cells, extra={}), settings)


def test_a_profile_and_single_settings_become_one_record(tmp_path: Path) -> None:
    path = tmp_path / 'inference.json'
    submission = {
        'score_thr': {'long': 0.2, 'round': 0.1},
        'min_area_px': 12,
        'mask_thr': 0.45,
        'disjoint': False,
        'tta': 'flips',
        'fusion': 'wbf:iou_thr=0.6',
    }
    instances = {**submission, 'mask_thr': 0.5, 'disjoint': True, 'tta': None, 'fusion': 'nms'}
    profiles = {'submission': submission, 'instances': instances}
    content = {'version': 1, 'class_names': list(CLASSES), 'profiles': profiles}
    path.write_text(json.dumps(content))
    chosen = fusion_settings.choose_settings(CLASSES, path=path)
    assert chosen == fusion_settings.InferenceSettings(
        fusion='wbf:iou_thr=0.6',
        score_thr=(0.1, 0.2),
        min_area_px=12,
        mask_thr=0.45,
        tta='flips',
        class_names=CLASSES,
    )
    assert (to_spec(chosen.rule), chosen.mask_cut) == ('wbf:iou_thr=0.6,mask_thr=0.45', 0.45)
    people = fusion_settings.choose_settings(CLASSES, path=path, profile='instances')
    assert (people.fusion, people.mask_cut) == ('nms', None)
    assert to_spec(people.post) == 'score_thr=0.1/0.2,disjoint=true,min_area_px=12'
    over = fusion_settings.choose_settings(CLASSES, path=path, fusion='nms', post='disjoint')
    assert (over.fusion, over.mask_thr) == ('nms', 0.45)
    assert to_spec(over.post) == 'disjoint=true'


def test_all_steps_after_fusion_can_be_set_and_unknown_ones_are_refused() -> None:
    text = (
        'score_thr=0.3,min_votes=2,disjoint=true,max_lost_share=0.2,min_area_px=9,max_instances=5'
    )
    settings = fusion_settings.choose_settings(CLASSES, post=text)
    assert to_spec(settings.post) == text
    assert settings.to_json()['score_thr'] == {'round': 0.3, 'long': 0.3}
    assert to_spec(fusion_settings.choose_settings(CLASSES).post) == ''
    with pytest.raises(ConfigError, match="no setting 'votes'"):
        fusion_settings.choose_settings(CLASSES, post='votes=2')
    with pytest.raises(ConfigError, match='3 score thresholds for 2 classes'):
        fusion_settings.choose_settings(CLASSES, post='score_thr=0.1/0.2/0.3')

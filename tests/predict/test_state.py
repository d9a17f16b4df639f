"""State files: what stays, what is written anew, what is predicted anew."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.predict.items import Item
from cellseg_mm.predict.state import Journal
from cellseg_mm.results.formats import path_of
from cellseg_mm.results.predictions import Predictions, save_predictions

FORMATS = ('csv', 'coco')


def journal_of(out_dir: Path, formats: tuple[str, ...] = FORMATS, **settings: float) -> Journal:
    cut, written = {'tile_px': 8.0}, {'score_thr': 0.5}
    for values in (cut, written):
        values.update({key: value for key, value in settings.items() if key in values})
    return Journal.of(out_dir, formats, settings=cut, how_written=written)


@pytest.fixture
def item(tmp_path: Path) -> Item:
    """An image of which everything is done."""
    path = tmp_path / 'a.tif'
    path.write_bytes(b'pixels')
    item, journal = Item(path, 'a'), journal_of(tmp_path / 'out')
    journal.begin(item)
    found = InstanceSet.from_crops(
        'a',
        item.image_id,
        (9, 9),
        crops=[np.ones((2, 3), dtype=bool)],
        offsets_yx=np.array([[4, 5]]),
        class_ids=np.array([1]),
        scores=np.array([0.75]),
    )
    save_predictions(journal.instances_path(item), Predictions((found,)))
    for word in FORMATS:
        path_of(tmp_path / 'out', 'a', word).write_text(word)
    journal.close(item, journal.nothing())
    return item


def test_what_is_done_stays(tmp_path: Path, item: Item) -> None:
    state = journal_of(tmp_path / 'out').look_up(item)
    assert state.is_done
    assert set(state.written) == set(FORMATS)
    (score,) = journal_of(tmp_path / 'out').load(item).scores.tolist()
    assert score == 0.75


@pytest.mark.parametrize(
    ('formats', 'settings', 'missing'),
    [
        pytest.param(('geojson', 'csv'), {}, ('geojson',), id='one more format'),
        pytest.param(FORMATS, {'score_thr': 0.4}, FORMATS, id='another threshold'),
        pytest.param((), {'score_thr': 0.4}, (), id='no format at all'),
    ],
)
def test_formats_alone_are_missing(
    tmp_path: Path, item: Item, formats: tuple, settings: dict, missing: tuple
) -> None:
    journal = journal_of(tmp_path / 'out', formats, **settings)
    state = journal.look_up(item)
    assert (state.is_predicted, state.missing) == (True, missing)
    for word in missing:
        path_of(tmp_path / 'out', 'a', word).write_text(word)
    journal.close(item, state)
    assert journal.look_up(item).is_done


def test_a_format_that_was_lost_is_missing(tmp_path: Path, item: Item) -> None:
    path_of(tmp_path / 'out', 'a', 'coco').unlink()
    state = journal_of(tmp_path / 'out').look_up(item)
    assert (state.is_predicted, state.missing) == (True, ('coco',))


def test_a_format_that_is_not_asked_for_is_not_forgotten(tmp_path: Path, item: Item) -> None:
    journal = journal_of(tmp_path / 'out', ('geojson',))
    path_of(tmp_path / 'out', 'a', 'geojson').write_text('{}')
    journal.close(item, journal.look_up(item))
    assert journal_of(tmp_path / 'out', (*FORMATS, 'geojson')).look_up(item).is_done


@pytest.mark.parametrize('content', ['', '[]', '{"settings": 1}', '\udce4', 'null'])
def test_a_damaged_state_means_nothing(tmp_path: Path, item: Item, content: str) -> None:
    (tmp_path / 'out/a.state.json').write_bytes(content.encode(errors='surrogateescape'))
    state = journal_of(tmp_path / 'out').look_up(item)
    assert (state.is_predicted, state.missing) == (False, FORMATS)


def test_a_state_whose_formats_are_damaged_keeps_the_instances(tmp_path: Path, item: Item) -> None:
    path = tmp_path / 'out/a.state.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'formats': ['csv']}))
    state = journal_of(tmp_path / 'out').look_up(item)
    assert (state.is_predicted, state.missing) == (True, FORMATS)


@pytest.mark.parametrize('change', ['settings', 'content', 'time', 'gone', 'instances', 'begun'])
def test_what_belongs_to_something_else_means_nothing(
    tmp_path: Path, item: Item, change: str
) -> None:
    journal = journal_of(tmp_path / 'out', tile_px=9.0 if change == 'settings' else 8.0)
    if change == 'content':
        item.path.write_bytes(b'other pixels')
    elif change == 'time':
        os.utime(item.path, ns=(1, 1))
    elif change == 'gone':
        item.path.unlink()
    elif change == 'instances':
        journal.instances_path(item).unlink()
    elif change == 'begun':
        journal.begin(item)
    state = journal.look_up(item)
    assert (state.is_predicted, state.missing, dict(state.written)) == (False, FORMATS, {})


def test_damaged_instances_are_none(tmp_path: Path, item: Item) -> None:
    journal = journal_of(tmp_path / 'out')
    journal.instances_path(item).write_bytes(b'broken')
    assert journal.load(item) is None


def test_states_of_two_images_do_not_mix(tmp_path: Path, item: Item) -> None:
    other = replace(item, name='b')
    assert not journal_of(tmp_path / 'out').look_up(other).is_predicted


def test_an_image_that_is_a_folder_is_done_too(tmp_path: Path, item: Item) -> None:
    """OME-Zarr."""
    folder, journal = tmp_path / 'a.zarr', journal_of(tmp_path / 'out')
    folder.mkdir()
    journal.close(Item(folder, 'a'), journal.nothing())
    assert journal.look_up(Item(folder, 'a')).is_done
    before = journal.tiles(Item(folder, 'a')).key
    os.utime(folder, (1, 1))
    assert not journal.look_up(Item(folder, 'a')).is_done
    assert journal.tiles(Item(folder, 'a')).key != before

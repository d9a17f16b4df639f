"""Cellpose's _seg.npy is read without running anything of it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from cellseg_mm.data.importing.cellpose import read_seg_masks
from tests.support.import_sources import (
    HW,
    assert_masks,
    f_mask,
    numbered,
    run,
    stored,
    write_image,
)

IDS = numbered([f_mask(1, 1), f_mask(9, 8)], [1, 7])


def seg(folder: Path, name: str = 'a', **values: object) -> Path:
    """What Cellpose 2 to 4 write, by np.save of a dict."""
    write_image(folder / f'{name}.png')
    content = {
        'outlines': np.zeros(HW, np.uint16),
        'colors': np.zeros((2, 3), np.uint8),
        'masks': IDS,
        'chan_choose': [0, 0],
        'ismanual': np.zeros(2, bool),
        'filename': '/home/someone/a.png',
        'flows': [np.zeros((1, *HW, 3), np.uint8), [None, 'x'], np.float32(1.5)],
        'diameter': 30.0,
        'manual_changes': [{'time': 'now', 'removed': [1]}],
        'zdraw': np.array([None, None], dtype=object),
        'model_path': 0,
        **values,
    }
    np.save(folder / f'{name}_seg.npy', content, allow_pickle=True)
    return folder


@pytest.mark.parametrize('dtype', [np.uint16, np.int32, np.uint32])
def test_masks_arrive_pixel_by_pixel(tmp_path: Path, dtype: type) -> None:
    folder = seg(tmp_path / 'in', masks=np.asfortranarray(IDS.astype(dtype)))
    report = run('cellpose', folder, tmp_path / 'out', single_class='nucleus')
    assert report.class_names == ('nucleus',)
    assert_masks(stored(tmp_path / 'out', 'a'), {1: [f_mask(1, 1), f_mask(9, 8)]})


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('place', ['diameter', 'masks'])
def test_nothing_of_the_file_is_run(tmp_path: Path, place: str) -> None:
    folder = seg(tmp_path / 'in', **{place: Evil(tmp_path / 'ran')})
    report = run('cellpose', folder, tmp_path / 'out')
    assert 'a_seg.npy: the pickle asks for' in report.problems[0]
    assert 'nothing was run' in report.problems[0]
    assert not (tmp_path / 'ran').exists()
    assert not (tmp_path / 'out' / 'train').exists()


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        pytest.param({'masks': IDS.T}, 'they must match', id='transposed'),
        pytest.param({'masks': np.stack([IDS] * 3)}, 'they must match', id='stack'),
        pytest.param({'masks': IDS * 0.5}, 'no masks of whole ids', id='floats'),
        pytest.param({'masks': None}, 'no masks of whole ids', id='none'),
        pytest.param({'masks': -IDS.astype(int)}, 'values down to -7', id='negative'),
    ],
)
def test_masks_that_cannot_be_used_are_named(tmp_path: Path, values: dict, message: str) -> None:
    folder = seg(seg(tmp_path / 'in', name='b'), **values)
    report = run('cellpose', folder, tmp_path / 'out')
    assert message in report.problems[0]
    assert [row['uuid'] for row in report.rows] == ['b']


def test_damaged_files_cost_themselves_only(tmp_path: Path) -> None:
    folder = seg(tmp_path / 'in')
    whole = (folder / 'a_seg.npy').read_bytes()
    contents = {'cut': whole[:-200], 'head': whole[:40], 'text': b'no array', 'empty': b''}
    contents['shape'] = whole.replace(b'()', b'\xc2)', 1)  # found by changing bytes
    for name, content in contents.items():
        write_image(folder / f'{name}.png')
        (folder / f'{name}_seg.npy').write_bytes(content)
    write_image(folder / 'plain.png')
    np.save(folder / 'plain_seg.npy', IDS)
    report = run('cellpose', folder, tmp_path / 'out')
    assert [row['uuid'] for row in report.rows] == ['a']
    texts = ['in the middle', *['cannot be read'] * 3, 'is an array of uint16']
    for name, text in zip(['cut', 'head', 'text', 'shape', 'plain'], texts, strict=True):
        assert any(f'{name}_seg.npy' in p and text in p for p in report.problems), name
    assert len(report.problems) == 6


def test_the_label_map_is_that_of_pickle(tmp_path: Path) -> None:
    folder = seg(tmp_path)
    loaded = np.load(folder / 'a_seg.npy', allow_pickle=True).item()
    assert read_seg_masks(folder / 'a_seg.npy').tolist() == loaded['masks'].tolist()

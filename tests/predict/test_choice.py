"""What is read of files with several pictures: chosen, said, part of what results belong to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import tifffile

from cellseg_mm.data.contents import Choice
from cellseg_mm.predict import predict
from cellseg_mm.predict.items import look_for
from tests.predict.test_predict import PaintedCells, params_for, run
from tests.predict.test_tiling import paint_cells
from tools.predict import parse_args


def write_stack(folder: Path) -> None:
    folder.mkdir()
    planes = np.stack([paint_cells((70, 90), n, (3, 12), seed) for seed, n in enumerate((20, 40))])
    tifffile.imwrite(
        folder / 'a.tif', planes.astype(np.uint8), imagej=True, metadata={'axes': 'ZYX'}
    )


def test_a_stack_is_refused_then_chosen_then_chosen_anew(tmp_path: Path) -> None:
    write_stack(tmp_path / 'in')
    params = params_for(tmp_path)
    summary, _ = run(tmp_path / 'in', params)
    assert 'holds 2 planes in depth (70 x 90 px, 2 z)' in summary.failed['a']
    n_cells = []
    for z in (0, 1):
        chosen = replace(params, choice=Choice(z=z))
        summary, _ = run(tmp_path / 'in', chosen)
        assert (summary.predicted, summary.failed) == (['a'], {})
        assert summary.notes['a'].startswith(f'read: z {z} of 2')
        assert f'a: read: z {z} of 2' in summary.describe()
        n_cells.append(summary.n_cells)
        again, _ = run(tmp_path / 'in', chosen)
        assert again.skipped == ['a']
    assert n_cells[0] < n_cells[1]


def test_results_without_a_choice_stay_what_they_were(tmp_path: Path) -> None:
    assert 'choice' not in params_for(tmp_path).how_cut
    chosen = params_for(tmp_path, choice=Choice(channels=(2,)))
    assert chosen.how_cut['choice'] == {'image': None, 'channels': [2], 'z': None, 't': None}


def test_long_names_are_predicted_or_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = tmp_path / 'in'
    folder.mkdir()
    image = np.zeros((20, 20, 3), np.uint8)
    image[5:9, 5:9] = 7
    for n in (240, 250):
        tifffile.imwrite(folder / f'{"a" * n}.tif', image, photometric='rgb')
    summary = predict.predict(look_for([str(folder)]).items, PaintedCells(), params_for(tmp_path))
    assert summary.predicted == ['a' * 240]
    assert 'the names of its results would have 261 bytes' in summary.failed['a' * 250]


def test_options_of_the_tool() -> None:
    words = ['c.py', 'x.tif', '--out', 'o', '--image', '1', '--channels', '2,0,1', '--z', '3']
    args = parse_args([*words, '--t', '4'])
    assert (args.image, args.channels, args.z, args.t) == (1, (2, 0, 1), 3, 4)

"""Exports of an ensemble: what the prediction file holds, in every format, and a true count."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data.config import CLASS_NAMES
from cellseg_mm.data.drawing.sample import make_sample
from cellseg_mm.data.images import find_images
from cellseg_mm.results.formats import FORMATS, Outputs, path_of, write_outputs
from cellseg_mm.results.predictions import Predictions, save_predictions

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9))


@pytest.mark.parametrize(
    ('formats', 'n_overlays'),
    [
        pytest.param(('csv', 'coco', 'label-map', 'geojson', 'imagej', 'overlay'), 0, id='all'),
        pytest.param(('csv', 'coco', 'label-map', 'overlay'), 1, id='overlays twice asked for'),
        pytest.param(('coco', 'csv', 'label-map'), 5, id='more overlays than images'),
    ],
)
def test_every_image_gets_every_format(
    tmp_path: Path, formats: tuple[str, ...], n_overlays: int
) -> None:
    data_root = make_sample(tmp_path / 'data', n_train=4, n_test=2)
    images = find_images(data_root, 'test', CLASS_NAMES, folds_path=tmp_path / 'none.json')
    sets = [
        InstanceSet.from_crops(
            case.name,
            case.image_id,
            case.image_hw,
            crops=[np.ones((6, 5), dtype=bool)] * 3,
            offsets_yx=np.array([[0, 0], [10, 20], [30, 2]]),
            class_ids=np.array([3, 0, 1]),
            scores=np.array([0.6, 0.9, 0.4]),
        )
        for case in images.cases
    ]
    save_predictions(tmp_path / 'p.npz', Predictions(tuple(sets)))
    outputs = Outputs(formats=formats, n_overlays=n_overlays, class_colours=COLOURS)
    text = write_outputs(tmp_path / 'p.npz', images, tmp_path, outputs).describe()
    written = sorted(path.name for path in (tmp_path / 'exports').iterdir())
    wanted = {f'{case.name}{FORMATS[word][0]}' for case in images.cases for word in formats}
    wanted |= {f'{case.name}{FORMATS["overlay"][0]}' for case in images.cases[:n_overlays]}
    assert written == sorted(wanted)
    assert f'exports: {len(written)} files' in text
    folder = tmp_path / 'exports'
    for case in images.cases:
        rows = list(csv.DictReader(path_of(folder, case.name, 'csv').read_text().splitlines()))
        assert [(r['class'], r['score']) for r in rows] == [
            (CLASS_NAMES[0], '0.9'),  # the cell of score 0.4 is below the threshold
            (CLASS_NAMES[3], '0.6'),
        ]
        records = json.loads(path_of(folder, case.name, 'coco').read_text())
        assert [r['category_id'] for r in records] == [1, 4]
        labels = tifffile.imread(path_of(folder, case.name, 'label-map'))
        assert labels.shape == case.image_hw
        assert (labels[10, 20], labels[0, 0], labels[30, 2]) == (1, 2, 0)


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(ConfigError, match='found qupath; expected some of'):
        Outputs(formats=('csv', 'qupath'), class_colours=COLOURS)

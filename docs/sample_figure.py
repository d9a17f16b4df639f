"""Draws docs/sample.png: a sample image as drawn by hand, and what the demo's folds find in it.

    python docs/sample_figure.py [WORK_ROOT] [OUT.png]

WORK_ROOT is the demo's result folder (work_dirs/sample). The cells are out-of-fold predictions, so
the model that found them never saw the image; they are shown with the settings for people.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np

from cellseg_mm.core import files
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.layout import INFERENCE, predictions_path
from cellseg_mm.data.config import CLASS_NAMES, default_colours
from cellseg_mm.data.labels import find_cases, read_gt
from cellseg_mm.fusion.settings import apply_settings, settings_for_people
from cellseg_mm.results.overlay import draw_pair, read_rgb
from cellseg_mm.results.predictions import load_predictions

CASE = 'eccf73b1'  # begins the name of an image with all four classes
FACTOR = 2  # enlarged, so that outlines are fine lines


def enlarge(instances: InstanceSet, factor: int = FACTOR) -> InstanceSet:
    """Return the cells in an image of ``factor`` times the size, with smooth edges."""
    crops, offsets = instances.crops()
    smooth = []
    for crop in crops:
        padded = np.pad(crop, 1).astype(np.float32)
        large = cv2.resize(padded, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
        smooth.append(large[factor:-factor, factor:-factor] >= 0.5)
    height, width = instances.image_hw
    return InstanceSet.from_crops(
        instances.name,
        instances.image_id,
        (height * factor, width * factor),
        crops=smooth,
        offsets_yx=offsets * factor,
        class_ids=instances.class_ids,
        scores=instances.scores,
    )


def main() -> None:
    """Read what the demo left, and draw."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else 'work_dirs/sample')
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name('sample.png')
    folder = root / 'sample/ensemble'
    cases = find_cases(root / 'data', 'train', len(CLASS_NAMES))
    case = next(case for case in cases if case.name.startswith(CASE))
    found = {s.name: s for s in load_predictions(predictions_path(folder, 'oof')).sets}
    settings = settings_for_people(CLASS_NAMES, path=folder / INFERENCE)
    image = read_rgb(case.image_path, red_blue_swapped=True)  # as the sample config says
    large = cv2.resize(image, None, fx=FACTOR, fy=FACTOR, interpolation=cv2.INTER_CUBIC)
    picture = draw_pair(
        large,
        enlarge(read_gt(case)),
        enlarge(apply_settings(found[case.name], settings)),
        default_colours(len(CLASS_NAMES)),
        class_names=CLASS_NAMES,
    )
    options = [cv2.IMWRITE_PNG_COMPRESSION, 9]  # half the size of the default's
    _, content = cv2.imencode('.png', cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)
    files.write_bytes(out, content.tobytes())
    print(f'{out}: image {case.name}')


if __name__ == '__main__':
    main()

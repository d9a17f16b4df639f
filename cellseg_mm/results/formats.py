"""The formats that people ask for, by one word each.

In: an InstanceSet and words. Out: files. Invariant: predict and ensembles write the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.progress import track
from cellseg_mm.data.image_reader import open_image
from cellseg_mm.data.images import Images
from cellseg_mm.results import export, overlay
from cellseg_mm.results.measure import measure
from cellseg_mm.results.predictions import load_predictions

# What a format's file is called after the image's name.
FORMATS = {
    'label-map': '.labels.tif',
    'geojson': '.geojson',
    'imagej': '.rois.zip',
    'csv': '.cells.csv',
    'coco': '.coco.json',
    'overlay': '.overlay.png',
}

OVERLAY = 'overlay'


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What to write.

    Attributes:
        formats: Words of ``FORMATS`` for every image.
        n_overlays: Pictures of the first so many images, besides.
        score_thr: Cells below it are left out.
        class_colours: RGB of each class.
        red_blue_swapped: Whether the files have red and blue exchanged.

    Raises:
        ConfigError: A format is not known.
    """

    formats: tuple[str, ...] = ()
    n_overlays: int = 0
    score_thr: float = 0.5
    class_colours: tuple[tuple[int, int, int], ...]
    red_blue_swapped: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.formats) - set(FORMATS))
        if unknown:
            raise ConfigError(
                f'--export: found {", ".join(unknown)}; expected some of {", ".join(FORMATS)}; '
                'correct the spelling'
            )


def write_outputs(
    predictions_path: Path | str, images: Images, out_dir: Path | str, outputs: Outputs
) -> str:
    """Write everything that was asked for.

    Returns:
        Where it is, and what could not be expressed, for a terminal.

    Raises:
        ImageError: An image cannot be read.
    """
    by_name = {s.name: s for s in load_predictions(predictions_path).sets}
    notes, n_files = [], 0
    for i, case in enumerate(track(images.cases, description='export')):
        words = set(outputs.formats) | ({OVERLAY} if i < outputs.n_overlays else set())
        shown = by_name[case.name]
        shown = shown[shown.scores >= outputs.score_thr]
        folder = Path(out_dir) / 'exports' / case.name
        note = _write_image(case.image_path, folder, shown, sorted(words), images, outputs)
        notes += [f'{case.name}: {note}'] if note else []
        n_files += len(words)
    where = f'exports: {n_files} files in {Path(out_dir) / "exports"} (scores >= '
    return '\n'.join([*notes, f'{where}{outputs.score_thr:g})'])


def _write_image(
    image_path: Path,
    folder: Path,
    shown: InstanceSet,
    words: Sequence[str],
    images: Images,
    outputs: Outputs,
) -> str:
    if not words:
        return ''
    names, colours = images.class_names, outputs.class_colours
    with open_image(image_path) as reader:

        def read(*region: int) -> np.ndarray:
            picture = reader.read(*region)
            return np.ascontiguousarray(picture[..., ::-1]) if outputs.red_blue_swapped else picture

        features = measure(shown, read) if {'csv', 'geojson'} & set(words) else None
        done: dict[str, export.Exported] = {}
        for word in words:
            path = folder.with_name(f'{folder.name}{FORMATS[word]}')
            if word == 'label-map':
                done[word] = export.write_label_map(path, shown)
            elif word == 'geojson':
                done[word] = export.write_geojson(path, shown, names, colours, features=features)
            elif word == 'imagej':
                done[word] = export.write_imagej_rois(path, shown, names, class_colours=colours)
            elif word == 'csv':
                done[word] = export.write_cells_csv(path, shown, names, features=features)
            elif word == 'coco':
                done[word] = export.write_coco(path, [shown])
            else:
                picture = overlay.draw_large(read, shown, colours, class_names=names)
                overlay.write_png(path, picture)
    return export.describe(done)

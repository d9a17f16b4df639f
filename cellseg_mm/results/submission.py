"""The submission: written, checked, compared.

In: InstanceSets and the id map of the test images. Out: a zip with ``test-results.json``, findings
about any submission, and a table of how two differ. Invariant: what is written here passes its own
check, and the same instances give the same bytes.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cellseg_mm.core.errors import PredictionError
from cellseg_mm.core.files import atomic_path
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.results.coco_results import (
    ImageLike,
    ImageRef,
    image_refs,
    to_coco_results,
)

RESULTS_NAME = 'test-results.json'
DEFAULT_ZIP_NAME = f'{RESULTS_NAME}.zip'
N_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class SubmissionSummary:
    """What was written.

    Attributes:
        path: The zip.
        n_images: Images of the id map.
        n_images_without: Those in which nothing was found.
        n_instances: Records written.
        n_empty_masks: Instances left out because their mask has no pixel.
    """

    path: Path
    n_images: int
    n_images_without: int
    n_instances: int
    n_empty_masks: int


def write_submission(
    path: Path | str, sets: Iterable[InstanceSet], id_map: Iterable[ImageLike]
) -> SubmissionSummary:
    """Write the zip that is handed in: images by the map's order, instances by falling score.

    Args:
        path: A ``.zip``, or a folder that gets ``test-results.json.zip``.
        sets: One set for each image of the map, matched by name.
        id_map: Entries of ``labels.read_id_map``.

    Raises:
        PredictionError: Sets are missing, unknown or of another size, or a score is not in 0..1.
    """
    path = Path(path)
    path = path / DEFAULT_ZIP_NAME if path.is_dir() else path
    if path.suffix.lower() != '.zip':
        raise PredictionError(
            f'{path}: a submission is a zip; expected a name that ends in .zip, or a folder; '
            f'{DEFAULT_ZIP_NAME} is usual.'
        )
    refs = image_refs(id_map)
    chosen = _match_to_map(list(sets), refs)
    filled = [s[s.areas > 0].by_score() for s in chosen]
    text = json.dumps(to_coco_results(filled), separators=(',', ':'), allow_nan=False)
    info = zipfile.ZipInfo(RESULTS_NAME)  # dated 1980: the bytes do not tell the time
    info.compress_type = zipfile.ZIP_DEFLATED
    info.create_system, info.external_attr = 3, 0o644 << 16
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, 'w') as archive:
        archive.writestr(info, text.encode())
    n_written = sum(len(s) for s in filled)
    return SubmissionSummary(
        path,
        n_images=len(refs),
        n_images_without=sum(not len(s) for s in filled),
        n_instances=n_written,
        n_empty_masks=sum(len(s) for s in chosen) - n_written,
    )


def _match_to_map(sets: Sequence[InstanceSet], refs: Sequence[ImageRef]) -> list[InstanceSet]:
    """Return the sets in the map's order, with the map's ids."""
    by_name = {s.name: s for s in sets}
    if len(by_name) != len(sets):
        image_refs(sets)  # raises, with the name
    known = {ref.name for ref in refs}
    unknown = [name for name in by_name if name not in known]
    missing = [ref.name for ref in refs if ref.name not in by_name]
    for names, what in ((unknown, 'not in the id map'), (missing, 'not predicted')):
        if names:
            raise PredictionError(
                f'submission: {len(names)} image(s) are {what} ({", ".join(names[:N_EXAMPLES])}); '
                'expected exactly the images of the map; predict the test folder as a whole.'
            )
    chosen = []
    for ref in refs:
        s = by_name[ref.name]
        if s.image_hw != ref.image_hw:
            raise PredictionError(
                f'{ref.name}: masks are of {s.image_hw[0]} x {s.image_hw[1]} px, the id map says '
                f'{ref.image_hw[0]} x {ref.image_hw[1]}; they must match; predict this image again.'
            )
        if not ((s.scores >= 0) & (s.scores <= 1)).all() or not np.isfinite(s.boxes_xyxy).all():
            raise PredictionError(
                f'{ref.name}: a score is not in 0..1 or a box is not finite; '
                'expected finite detections; look at the checkpoint.'
            )
        chosen.append(_with_id(s, ref.image_id))
    return chosen


def _with_id(s: InstanceSet, image_id: int) -> InstanceSet:
    return InstanceSet(s.name, image_id, s.image_hw, s.class_ids, s.scores, s.boxes_xyxy, s.rles)

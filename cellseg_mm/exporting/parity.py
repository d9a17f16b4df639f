"""Whether an exported file finds what the model in torch finds.

In: what both found in the same pictures. Out: how they differ. Invariant: cells are compared by
class and box, never by rank, because near ties change places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core import rle
from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import InstanceSet

BOX_TOLERANCE = 1e-3  # px
SCORE_TOLERANCE = 1e-4
# A pixel whose probability is the threshold to the last bit may fall on either side.
PIXELS_PER_ODD_ONE = 20_000
ODD_PIXELS = 5
# Cells at the threshold or the cap may be found by one alone, but they are few.
CELLS_PER_ONE_AT_THE_EDGE = 50
AT_THE_EDGE = 1
SAME_IOU = 0.9


@dataclass(frozen=True, slots=True)
class Parity:
    """How the cells of two detectors differ on the same pictures.

    Attributes:
        n_pictures: Pictures.
        n_cells: Cells that torch found.
        n_same: Those that the file found too.
        n_only: Cells that one found and the other did not, without those at the edge of the score
            threshold or of the cap.
        box_px: Largest difference of a box.
        score: Largest difference of a score.
        n_pixels: Mask pixels of the cells.
        n_odd_pixels: Those that differ.
    """

    n_pictures: int
    n_cells: int
    n_same: int
    n_only: int
    box_px: float
    score: float
    n_pixels: int
    n_odd_pixels: int

    def to_json(self) -> dict[str, float]:
        """Return what the file records."""
        return asdict(self)

    def check(self, where: str) -> None:
        """Refuse a file that finds something else.

        Raises:
            ConfigError: Says what differs; or the pictures have no cells, which shows nothing.
        """
        if not self.n_cells:
            raise ConfigError(
                f'{where}: the model finds no cell in the picture that the file is checked with; '
                'expected some; name another with --image'
            )
        odd = self.n_odd_pixels > ODD_PIXELS + self.n_pixels // PIXELS_PER_ODD_ONE
        lost = self.n_cells - self.n_same > AT_THE_EDGE + self.n_cells // CELLS_PER_ONE_AT_THE_EDGE
        if self.n_only or lost or odd:
            raise ConfigError(
                f'{where}: the exported file does not find what the model in torch finds: '
                f'{self.describe()}; expected the same cells; nothing was written; a model without '
                'training is no fair check, else please report it'
            )

    def describe(self) -> str:
        """Return one line."""
        return (
            f'{self.n_same} of {self.n_cells} cells the same, {self.n_only} in one only, boxes '
            f'within {self.box_px:.1e} px, scores within {self.score:.1e}, {self.n_odd_pixels} of '
            f'{self.n_pixels} mask pixels differ'
        )


def compare(
    torchs: Sequence[InstanceSet], files: Sequence[InstanceSet], *, score_thr: float, cap: int
) -> Parity:
    """Compare what two detectors found in the same pictures.

    Args:
        torchs: What the model in torch found.
        files: What the exported file found.
        score_thr: Scores at it may fall on either side.
        cap: Most cells of a picture, 0 for no limit; the last place may go to either of two.
    """
    n_only = n_same = n_pixels = n_odd = 0
    box_px = score = 0.0
    for ours, theirs in zip(torchs, files, strict=True):
        pairs = match(ours, theirs)
        edge = score_thr
        if 0 < cap <= len(ours):
            edge = max(edge, float(ours.scores.min()))
        alone = [ours.scores[pairs < 0], np.delete(theirs.scores, pairs[pairs >= 0])]
        n_only += int((np.concatenate(alone) > edge + SCORE_TOLERANCE).sum())
        first, second = ours[pairs >= 0], theirs[pairs[pairs >= 0]]
        n_same += len(first)
        if not len(first):
            continue
        box_px = max(box_px, float(np.abs(first.boxes_xyxy - second.boxes_xyxy).max()))
        score = max(score, float(np.abs(first.scores - second.scores).max()))
        area, odd = _odd_pixels(first, second)
        n_pixels, n_odd = n_pixels + area, n_odd + odd
    n_cells = sum(map(len, torchs))
    return Parity(len(torchs), n_cells, n_same, n_only, box_px, score, n_pixels, n_odd)


def match(ours: InstanceSet, theirs: InstanceSet) -> NDArray[np.int64]:
    """Return for each of our cells the index of theirs that is the same, (N,) int64; else -1."""
    found = np.full(len(ours), -1, dtype=np.int64)
    taken = np.zeros(len(theirs), dtype=bool)
    for i in range(len(ours)):
        box = np.abs(theirs.boxes_xyxy - ours.boxes_xyxy[i]).max(axis=1, initial=0.0)
        near = (box <= BOX_TOLERANCE) & (theirs.class_ids == ours.class_ids[i]) & ~taken
        near &= np.abs(theirs.scores - ours.scores[i]) <= SCORE_TOLERANCE
        if near.any():
            found[i] = np.flatnonzero(near)[box[near].argmin()]
            taken[found[i]] = True
    return found


def _odd_pixels(first: InstanceSet, second: InstanceSet) -> tuple[int, int]:
    """Return the mask pixels of the first, and how many differ from the second's."""
    n_odd = 0
    for ours, theirs in zip(first.rles, second.rles, strict=True):
        if ours == theirs:
            continue
        both = rle.areas_of(rle.decode_runs([ours, theirs], first.image_hw))
        iou = float(rle.iou_matrix([ours], [theirs], first.image_hw)[0, 0])
        shared = round(iou / (1 + iou) * float(both.sum()))
        n_odd += int(both.sum()) - 2 * shared
    return int(first.areas.sum()), n_odd


def share_alike(ours: Sequence[InstanceSet], theirs: Sequence[InstanceSet]) -> tuple[int, int]:
    """Return how many of our cells have one of the same class and an IoU of 0.9, and how many are.

    For files whose numbers were rounded, which no cell survives to the last digit.
    """
    n_same = 0
    for first, second in zip(ours, theirs, strict=True):
        iou = rle.iou_matrix(first.rles, second.rles, first.image_hw)
        iou[first.class_ids[:, None] != second.class_ids[None]] = 0
        n_same += int((iou.max(axis=1, initial=0.0) >= SAME_IOU).sum())
    return n_same, sum(map(len, ours))

"""Where predictions and labels disagree so clearly that a person should look.

In: compared images of the out-of-fold pool, or an ensemble's predictions. Out: ranked suspects.
Invariant: a suspect is a question, not a verdict; nothing here changes a score, and lists that are
cut say how many there were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cellseg_mm.core.arrays import Float
from cellseg_mm.core.instances import InstanceSet, concatenate
from cellseg_mm.core.layout import REVIEW_SUFFIX
from cellseg_mm.results.export import write_geojson
from cellseg_mm.scores.matching import Compared
from cellseg_mm.scores.mistakes import BACKGROUND_IOU, FOREGROUND_IOU

CONFIDENT = 0.7  # a detector's score from which on a disagreement is worth a look
UNSUPPORTED = 0.1  # score x IoU of the best detection, below which a label stands alone
QUEUE_SCORE_THR = 0.3  # fused instances below it are noise that no member is sure of
PER_IMAGE = 3  # suspects of one kind and image, so that one image does not fill a list

UNLABELLED, OTHER_CLASS, UNSEEN = 'unlabelled', 'other class', 'unseen'


@dataclass(frozen=True, slots=True)
class Suspect:
    """One cell to look at.

    Attributes:
        kind: ``unlabelled`` (confident detection, no label), ``other class`` (confident detection
            of another class than the label's) or ``unseen`` (label that no detection supports).
        image: Index into the compared images.
        index: Index of the detection (by falling score), or of the label for ``unseen``.
        class_id: Its class.
        label_class_id: Class of the label for ``other class``, else -1.
        value: Score of the detection; support of the label for ``unseen``.
    """

    kind: str
    image: int
    index: int
    class_id: int
    label_class_id: int
    value: float


def label_suspects(images: Sequence[Compared]) -> dict[str, list[Suspect]]:
    """Return all suspects by kind, the clearest first."""
    found: dict[str, list[Suspect]] = {UNLABELLED: [], OTHER_CLASS: [], UNSEEN: []}
    for i, c in enumerate(images):
        for suspect in (*_of_detections(c, i), *_of_labels(c, i)):
            found[suspect.kind].append(suspect)
    for kind in (UNLABELLED, OTHER_CLASS):
        found[kind].sort(key=lambda f: (-f.value, f.image, f.index))
    # A large label that nothing supports is a clearer question than a small one.
    found[UNSEEN].sort(key=lambda f: (f.value, -int(images[f.image].gt_areas[f.index]), f.image))
    return found


def _of_detections(c: Compared, image: int) -> list[Suspect]:
    rows = np.flatnonzero(c.pred.scores >= CONFIDENT)
    if not len(rows):
        return []
    iou = c.mask_iou[rows]
    same = c.pred.class_ids[rows][:, None] == c.gt.class_ids[None, :]
    best_same = np.where(same, iou, 0.0).max(axis=1, initial=0.0)
    other = np.where(same, 0.0, iou)
    best_other = other.max(axis=1, initial=0.0)
    suspects = []
    for at, row in enumerate(rows.tolist()):
        class_id, score = int(c.pred.class_ids[row]), float(c.pred.scores[row])
        if max(best_same[at], best_other[at]) < BACKGROUND_IOU:
            suspects.append(Suspect(UNLABELLED, image, row, class_id, -1, score))
        elif best_other[at] >= FOREGROUND_IOU > best_same[at]:
            label = int(c.gt.class_ids[int(other[at].argmax())])
            suspects.append(Suspect(OTHER_CLASS, image, row, class_id, label, score))
    return suspects


def _of_labels(c: Compared, image: int) -> list[Suspect]:
    support = (c.mask_iou * c.pred.scores[:, None]).max(axis=0, initial=0.0)
    return [
        Suspect(UNSEEN, image, j, int(c.gt.class_ids[j]), -1, float(support[j]))
        for j in np.flatnonzero(support < UNSUPPORTED).tolist()
    ]


def write_suspects(
    folder: Path | str,
    images: Sequence[Compared],
    class_names: Sequence[str],
    class_colours: Sequence[Sequence[int]],
) -> dict[str, int]:
    """Write ``<image>.review.geojson`` for QuPath of each image with suspects.

    It holds the labels; what is suspected is an annotation with its rank, the clearest first. A
    cell that nobody labelled is proposed in the class ``<name>*``, which QuPath ignores and nobody
    imports until a person gives it a class without the star.

    Returns:
        How many suspects of each kind were written.
    """
    of_image: dict[int, list[Suspect]] = {}
    found = label_suspects(images)
    for suspect in (one for kind in found.values() for one in kind):
        of_image.setdefault(suspect.image, []).append(suspect)
    names = [*class_names, *(f'{name}*' for name in class_names)]
    for i, suspects in of_image.items():
        c = images[i]
        proposed = [one.index for one in suspects if one.kind == UNLABELLED]
        pred = replace(c.pred[np.array(proposed, dtype=np.int64)], extra={})
        cells = [
            replace(c.gt, extra={}),
            replace(pred, class_ids=pred.class_ids + len(class_names)),
        ]
        places = [_place(one, c, proposed) for one in suspects]
        write_geojson(
            Path(folder) / f'{c.gt.name}{REVIEW_SUFFIX}',
            concatenate(cells),
            names,
            [*class_colours, *class_colours],
            to_review=np.array(list(dict.fromkeys(places)), dtype=np.intp),
        )
    return {kind: len(suspects) for kind, suspects in found.items()}


def _place(one: Suspect, c: Compared, proposed: Sequence[int]) -> int:
    """Return where a suspect stands among the labels, followed by the proposals."""
    if one.kind == UNLABELLED:
        return len(c.gt) + proposed.index(one.index)
    if one.kind == UNSEEN:
        return one.index
    overlap = np.where(c.gt.class_ids == one.label_class_id, c.mask_iou[one.index], -1.0)
    return int(overlap.argmax())


def shortlist(suspects: Sequence[Suspect], n: int) -> list[Suspect]:
    """Return the first ``n``, at most ``PER_IMAGE`` of each image."""
    taken: dict[int, int] = {}
    chosen: list[Suspect] = []
    for suspect in suspects:
        if len(chosen) == n:
            break
        if taken.get(suspect.image, 0) < PER_IMAGE:
            taken[suspect.image] = taken.get(suspect.image, 0) + 1
            chosen.append(suspect)
    return chosen


@dataclass(frozen=True, slots=True)
class Doubt:
    """How much the members of an ensemble disagree about one image.

    Attributes:
        image: Index into the prediction sets.
        n: Instances that count (score at least ``QUEUE_SCORE_THR``).
        agreement: Their mean share of members that saw them.
        mask_uncertainty: Their mean uncertainty of the outline in 0..1; NaN when not recorded.
        doubt: What images are ranked by: mean of 1 - agreement and mask uncertainty.
        by_instance: (N,) float64 of each instance of the set; -1 for those that do not count.
    """

    image: int
    n: int
    agreement: float
    mask_uncertainty: float
    doubt: float
    by_instance: Float


def member_doubts(sets: Sequence[InstanceSet]) -> list[Doubt]:
    """Rank images by the members' disagreement, most first; images without instances left out."""
    doubts = []
    for i, one in enumerate(sets):
        if 'agreement' not in one.extra:
            continue
        counts = one.scores >= QUEUE_SCORE_THR
        if not counts.any():
            continue
        agreement = np.asarray(one.extra['agreement'], dtype=np.float64)
        parts = [1 - agreement]
        uncertainty = one.extra.get('mask_uncertainty')
        if uncertainty is not None:
            parts.append(np.asarray(uncertainty, dtype=np.float64))
        doubt = np.mean(parts, axis=0)
        doubts.append(
            Doubt(
                image=i,
                n=int(counts.sum()),
                agreement=float(agreement[counts].mean()),
                mask_uncertainty=float(parts[-1][counts].mean()) if len(parts) == 2 else np.nan,
                doubt=float(doubt[counts].mean()),
                by_instance=np.where(counts, doubt, -1.0),
            )
        )
    return sorted(doubts, key=lambda d: (-d.doubt, d.image))

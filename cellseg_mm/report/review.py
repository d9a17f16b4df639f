"""The report's sections of what a person should look at again: likely label errors, disagreement.

In: :class:`ReportInputs` and compared images. Out: sections. Invariant: how many cells were left
out is said wherever some were.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.fusion.post import PostProcess, postprocess
from cellseg_mm.report.charts import number
from cellseg_mm.report.inputs import ReportInputs
from cellseg_mm.report.parts import Section, lead, nothing, table
from cellseg_mm.report.pictures import crop_figure, outline_paths
from cellseg_mm.report.suspects import (
    CONFIDENT,
    OTHER_CLASS,
    PER_IMAGE,
    QUEUE_SCORE_THR,
    UNLABELLED,
    UNSEEN,
    UNSUPPORTED,
    Doubt,
    Suspect,
    label_suspects,
    member_doubts,
    shortlist,
)
from cellseg_mm.report.viewer import Limits, Pictures, fold_of_image
from cellseg_mm.scores.matching import Compared

KIND_TITLES = {
    UNLABELLED: f'Cells that may lack a label: score of at least {CONFIDENT:g}, nothing labelled',
    OTHER_CLASS: f'Labels that may name another class: score of at least {CONFIDENT:g}',
    UNSEEN: f'Labels that no model supports: score times IoU below {UNSUPPORTED:g} everywhere',
}


# ---- likely label errors ----


def label_error_section(
    inputs: ReportInputs, compared: Sequence[Compared], limits: Limits, pictures: Pictures
) -> Section:
    """Return crops of the clearest disagreements with the labels, and the images that have most."""
    title = 'Likely label errors'
    if not compared:
        return Section('labels', title, nothing(inputs.why_no_scores))
    found = label_suspects(compared)
    body = lead(
        'Confident predictions that contradict the labels, and labels that no prediction supports. '
        'Each is a question for a person who knows cells, and with a weak model mostly a mistake '
        f'of the model. At most {PER_IMAGE} cells of one image are shown per list. Thick: the '
        'cell in question. Thin: labels.'
    )
    for kind, heading in KIND_TITLES.items():
        body += f'<h3>{escape(heading)}</h3>'
        if not found[kind]:
            body += nothing('There is none.')
            continue
        chosen = shortlist(found[kind], limits.n_crops)
        body += lead(f'{len(chosen)} of {len(found[kind])}, the clearest first.')
        cards = ''.join(_suspect_card(f, compared, inputs.class_names, pictures) for f in chosen)
        body += f'<div class="cards">{cards}</div>'
    return Section('labels', title, body + _label_queue(inputs, compared, found))


def _suspect_card(
    suspect: Suspect, compared: Sequence[Compared], names: Sequence[str], pictures: Pictures
) -> str:
    c = compared[suspect.image]
    source = c.gt if suspect.kind == UNSEEN else c.pred
    one = source[np.array([suspect.index])]
    predicted = names[suspect.class_id]
    text = {
        UNLABELLED: f'predicted {predicted}, score {suspect.value:.2f}',
        OTHER_CLASS: f'labelled {names[suspect.label_class_id]}, predicted {predicted}, '
        f'score {suspect.value:.2f}',
        UNSEEN: f'labelled {predicted}, support {suspect.value:.2f}',
    }[suspect.kind]
    return _card(c.gt.name, one, c.gt, text, pictures)


def _card(
    name: str, one: InstanceSet, around: InstanceSet | None, text: str, pictures: Pictures
) -> str:
    image = pictures.read(name)
    if image is None:
        return ''
    x1, y1, x2, y2 = one.boxes_xyxy[0].tolist()
    thin = []
    if around is not None and len(around):
        reach = 1.5 * max(x2 - x1, y2 - y1, 32)
        boxes = around.boxes_xyxy
        near = (
            (boxes[:, 2] > x1 - reach)
            & (boxes[:, 0] < x2 + reach)
            & (boxes[:, 3] > y1 - reach)
            & (boxes[:, 1] < y2 + reach)
        )
        shown = around[near]
        thin = [
            (path, f'class="outline thin k{k}"')
            for k, path in zip(shown.class_ids.tolist(), outline_paths(shown), strict=True)
        ]
    thick = [(outline_paths(one)[0], f'class="outline thick k{one.class_ids[0]}"')]
    figure = crop_figure(image, (x1, y1, x2, y2), [*thin, *thick], label=f'{name}: {text}')
    return (
        f'<figure class="card">{figure}<figcaption>{escape(text)}<br>'
        f'<span class="where">{escape(name)} at x {(x1 + x2) / 2:.0f}, y {(y1 + y2) / 2:.0f}</span>'
        '</figcaption></figure>'
    )


def _label_queue(
    inputs: ReportInputs, compared: Sequence[Compared], found: dict[str, list[Suspect]]
) -> str:
    counts = np.zeros((len(compared), len(KIND_TITLES)), dtype=np.int64)
    for column, kind in enumerate(KIND_TITLES):
        for suspect in found[kind]:
            counts[suspect.image, column] += 1
    n_labels = np.array([max(1, len(c.gt)) for c in compared])
    confident = counts[:, 0] + counts[:, 1]
    order = np.lexsort((-counts.sum(axis=1) / n_labels, -confident / n_labels))
    order = [i for i in order.tolist() if counts[i].sum()]
    fold_of = fold_of_image(inputs)
    rows = [
        [
            escape(compared[i].gt.name),
            str(fold_of[compared[i].gt.name]),
            str(len(compared[i].gt)),
            *map(str, counts[i].tolist()),
            number((confident[i]) / n_labels[i], 2),
        ]
        for i in order[:40]
    ]
    head = ['image', 'fold', 'labels', 'may lack a label', 'may be another class', 'unsupported']
    head.append('confident questions per label')
    caption = f'Images to look at again, {len(rows)} of {len(order)} with questions'
    return f'<h3>Which images first</h3>{table(head, rows, caption=caption, sortable=True)}'


# ---- disagreement between folds ----


def doubt_section(
    inputs: ReportInputs, doubts: Sequence[Doubt], limits: Limits, pictures: Pictures
) -> Section:
    """Return the test images and cells on which the folds' models disagree most."""
    title = 'Where the folds disagree'
    if inputs.ensemble is None:
        why = (
            f'{inputs.ensemble_path} is not there, so the folds have not predicted the same images '
            'yet. Make it with: python tools/ensemble.py'
        )
        return Section('doubt', title, nothing(why))
    if not doubts:
        why = (
            'The ensemble recorded no agreement of its members, or found nothing with a score of '
            f'at least {QUEUE_SCORE_THR:g}.'
        )
        return Section('doubt', title, nothing(why))
    sets = inputs.ensemble.sets
    rows = [
        [
            escape(sets[d.image].name),
            str(d.n),
            number(d.agreement, 2),
            number(d.mask_uncertainty, 2),
            number(d.doubt, 3),
        ]
        for d in doubts[:40]
    ]
    head = ['test image', 'cells', 'share of members that agree', 'mask uncertainty', 'doubt']
    caption = f'Images that would teach most if labelled, {len(rows)} of {len(sets)}'
    body = lead(
        f'All folds predicted the test images; cells with a fused score of at least '
        f'{QUEUE_SCORE_THR:g} count. Doubt is the mean of disagreement about the cell and '
        'uncertainty of its outline. Label from the top.'
    ) + table(head, rows, caption=caption, sortable=True)
    cells = sorted(
        ((float(d.by_instance[i]), d.image, i) for d in doubts for i in _doubtful(d)),
        key=lambda item: (-item[0], item[1], item[2]),
    )
    suspects = [Suspect('doubt', image, i, -1, -1, value) for value, image, i in cells]
    cards = ''.join(
        _doubt_card(f, sets[f.image], inputs.class_names, pictures)
        for f in shortlist(suspects, limits.n_crops)
    )
    return Section('doubt', title, body + f'<div class="cards">{cards}</div>' + pictures.notes())


def _doubtful(doubt: Doubt) -> list[int]:
    rows: list[int] = np.flatnonzero(doubt.by_instance > 0).tolist()
    return rows


def _doubt_card(f: Suspect, one: InstanceSet, names: Sequence[str], pictures: Pictures) -> str:
    cell = one[np.array([f.index])]
    text = (
        f'{names[int(cell.class_ids[0])]}, score {cell.scores[0]:.2f}, '
        f'agreement {float(cell.extra["agreement"][0]):.2f}'
    )
    if 'mask_uncertainty' in cell.extra:
        text += f', outline {float(cell.extra["mask_uncertainty"][0]):.2f}'
    others = postprocess(one, PostProcess(score_thr=(QUEUE_SCORE_THR,), disjoint=True))[0]
    return _card(one.name, cell, others, text, pictures)


def doubts_of(inputs: ReportInputs) -> list[Doubt]:
    """Return the ranked test images; empty without an ensemble."""
    return member_doubts(inputs.ensemble.sets) if inputs.ensemble is not None else []

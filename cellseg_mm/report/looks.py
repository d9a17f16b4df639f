"""The report's sections of pictures: the viewer, likely label errors, the relabelling queue.

In: :class:`ReportInputs`, scores and compared images. Out: sections, and the viewer's data.
Invariant: how many images and cells were left out is said wherever something was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from cellseg_mm.core.errors import CellSegError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.progress import track
from cellseg_mm.report.charts import number
from cellseg_mm.report.findings import (
    CONFIDENT,
    OTHER_CLASS,
    PER_IMAGE,
    QUEUE_SCORE_THR,
    UNLABELLED,
    UNSEEN,
    UNSUPPORTED,
    Doubt,
    Finding,
    label_findings,
    member_doubts,
    shortlist,
)
from cellseg_mm.report.inputs import ReportInputs
from cellseg_mm.report.parts import Section, lead, nothing, swatch, table
from cellseg_mm.report.pictures import (
    EMBED_SCORE_THR,
    crop_figure,
    outline_paths,
    prediction_entry,
    viewer_entry,
)
from cellseg_mm.results.overlay import read_rgb
from cellseg_mm.scores.matching import Compared
from cellseg_mm.scores.records import Scores

KIND_TITLES = {
    UNLABELLED: f'Cells that may lack a label: score of at least {CONFIDENT:g}, nothing labelled',
    OTHER_CLASS: f'Labels that may name another class: score of at least {CONFIDENT:g}',
    UNSEEN: f'Labels that no model supports: score times IoU below {UNSUPPORTED:g} everywhere',
}


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may lie inside one page.

    Attributes:
        n_worst: Images with the lowest PQ.
        n_best: Images with the highest PQ.
        n_doubtful: Test images that members disagree most about.
        n_crops: Cells per list of findings.
        max_picture_bytes: All pictures together, as base64 text; later ones are left out.
    """

    n_worst: int = 16
    n_best: int = 6
    n_doubtful: int = 10
    n_crops: int = 18
    max_picture_bytes: int = 14_000_000


class Pictures:
    """Reads images once, and knows why one cannot be shown."""

    def __init__(self, inputs: ReportInputs) -> None:
        self._paths = {**inputs.test_paths, **inputs.train_paths}
        self._swapped = inputs.red_blue_swapped
        self._cache: dict[str, np.ndarray] = {}
        self.problems: dict[str, str] = {}

    def read(self, name: str) -> np.ndarray | None:
        """Return the image of a case, or None, with the reason in ``problems``."""
        if name in self._cache:
            return self._cache[name]
        if name not in self._paths:
            self.problems[name] = 'its file is not in the data folder'
            return None
        try:
            image = read_rgb(self._paths[name], red_blue_swapped=self._swapped)
        except (CellSegError, OSError) as problem:
            self.problems[name] = str(problem)
            return None
        if len(self._cache) >= 8:  # images are asked for in groups; a page has few
            self._cache.pop(next(iter(self._cache)))
        self._cache[name] = image
        return image

    def notes(self) -> str:
        """Return what could not be shown, as HTML."""
        lines = [f'{name}: not shown: {why}' for name, why in sorted(self.problems.items())]
        return ''.join(nothing(line) for line in lines[:10]) + (
            nothing(f'... and {len(lines) - 10} more images') if len(lines) > 10 else ''
        )


# ---- viewer ----


def viewer_entries(
    inputs: ReportInputs,
    scores: Scores | None,
    compared: Sequence[Compared],
    doubts: Sequence[Doubt],
    limits: Limits,
    pictures: Pictures,
) -> list[dict[str, JsonValue]]:
    """Return the viewer's images: worst first, then best, then the most doubtful test images."""
    jobs: list[Callable[[], dict | None]] = []
    if scores is not None:
        fold_of = _fold_of(inputs)
        for group, rows in _worst_and_best(scores, limits).items():
            for row in rows:
                jobs.append(_scored_job(scores, compared[row], row, group, fold_of, pictures))
    if inputs.ensemble is not None:
        chosen = [d.image for d in doubts[: limits.n_doubtful]]
        chosen = chosen or list(range(min(limits.n_doubtful, len(inputs.ensemble.sets))))
        by_image = {d.image: d for d in doubts}
        for image in chosen:
            job = _test_job(inputs.ensemble.sets[image], by_image.get(image), pictures)
            jobs.append(job)
    entries, total = [], 0
    for job in track(jobs, description='pictures'):
        entry = job()
        if entry is None:
            continue
        total += len(entry['src'])
        if total > limits.max_picture_bytes:
            break
        entries.append(entry)
    return entries


def _fold_of(inputs: ReportInputs) -> dict[str, int]:
    pool = inputs.pool
    return {s.name: f for s, f in zip(pool.pred_sets, pool.fold_of, strict=True)} if pool else {}


def _worst_and_best(scores: Scores, limits: Limits) -> dict[str, list[int]]:
    pq = scores.per_image.pq
    order = [i for i in np.argsort(pq, kind='stable').tolist() if not np.isnan(pq[i])]
    worst = order[: limits.n_worst]
    best = list(reversed(order[limits.n_worst :]))[: limits.n_best]
    return {'worst': worst, 'best': best}


def _scored_job(
    scores: Scores,
    compared: Compared,
    row: int,
    group: str,
    fold_of: dict[str, int],
    pictures: Pictures,
) -> Callable[[], dict | None]:
    p = scores.per_image

    def job() -> dict | None:
        image = pictures.read(compared.gt.name)
        if image is None:
            return None
        facts = (
            f'fold {fold_of[compared.gt.name]} · PQ {number(p.pq[row])} · '
            f'F1 {number(p.f1_50[row])} · AJI {number(p.aji[row])}'
        )
        return viewer_entry(compared, image, facts=facts, group=group)

    return job


def _test_job(
    pred: InstanceSet, doubt: Doubt | None, pictures: Pictures
) -> Callable[[], dict | None]:
    def job() -> dict | None:
        image = pictures.read(pred.name)
        if image is None:
            return None
        facts = 'test image, no labels'
        if doubt is not None:
            facts += (
                f' · members agree {100 * doubt.agreement:.0f} % · '
                f'mask uncertainty {number(doubt.mask_uncertainty, 2)}'
            )
        return prediction_entry(pred, image, facts=facts, group='test')

    return job


def viewer_section(
    inputs: ReportInputs, entries: Sequence[dict], scores: Scores | None, pictures: Pictures
) -> Section:
    """Return the viewer; the page's script fills it."""
    title = 'Images, worst and best'
    n_scored = len(scores.per_image.names) if scores is not None else 0
    n_test = len(inputs.ensemble.sets) if inputs.ensemble is not None else 0
    if not entries:
        why = 'The image files are not there.' if n_scored or n_test else inputs.why_no_scores
        return Section('images', title, nothing(why) + pictures.notes())
    n_shown = sum(entry['gt'] is not None for entry in entries)
    parts = []
    if n_scored:
        parts.append(f'{n_shown} of {n_scored} labelled images (lowest and highest PQ)')
    if n_test:
        parts.append(f'{len(entries) - n_shown} of {n_test} test images')
    text = (
        f'{" and ".join(parts)} lie in this page; '
        f'{n_scored + n_test - len(entries)} were left out to keep it small. Predictions with '
        f'score below {EMBED_SCORE_THR:g} are not drawn. Dashed: a label that nothing found, or a '
        'prediction without a label of its class (mask IoU 0.5), at the chosen score threshold.'
    )
    body = lead(text) + _viewer_html(inputs, entries)
    return Section('images', title, body + pictures.notes())


def _viewer_html(inputs: ReportInputs, entries: Sequence[dict]) -> str:
    classes = ''.join(
        f'<label class="check"><input type="checkbox" class="class-switch" value="{k}" checked>'
        f'{swatch(k, name)}</label>'
        for k, name in enumerate(inputs.class_names)
    )
    group_names = {'worst': 'worst', 'best': 'best', 'test': 'test images'}
    options = ''
    for group, label in group_names.items():
        lines = ''.join(
            f'<option value="{i}">{escape(str(e["name"]))} ({escape(str(e["facts"]))})</option>'
            for i, e in enumerate(entries)
            if e['group'] == group
        )
        options += f'<optgroup label="{label}">{lines}</optgroup>' if lines else ''
    panes = ''.join(
        f'<figure class="pane" id="pane-{kind}"><figcaption>{label} <output id="count-{kind}" '
        f'for="threshold"></output></figcaption><svg class="canvas" tabindex="0" role="img" '
        f'aria-label="{label}; plus and minus zoom, arrow keys move"></svg></figure>'
        for kind, label in (('gt', 'Labels'), ('pred', 'Predictions'))
    )
    return (
        '<noscript><p class="nothing">The viewer needs JavaScript; all numbers above and below do '
        'not.</p></noscript><div id="viewer"><div class="controls">'
        '<button type="button" id="previous" aria-label="previous image">‹</button>'
        f'<label class="grow">Image <select id="image">{options}</select></label>'
        '<button type="button" id="next" aria-label="next image">›</button></div>'
        '<div class="controls"><label class="grow">Score from <output id="threshold-value">'
        '</output>'
        '<input type="range" id="threshold" min="0.05" max="1" step="0.01" value="0.5"></label>'
        '<button type="button" id="zoom-in" aria-label="zoom in">+</button>'
        '<button type="button" id="zoom-out" aria-label="zoom out">−</button>'
        '<button type="button" id="zoom-reset">whole image</button></div>'
        f'<fieldset class="controls"><legend>Show</legend>{classes}'
        '<label class="check"><input type="checkbox" id="fill">filled</label>'
        '<label class="check"><input type="checkbox" id="wrong-only">mistakes only</label>'
        f'</fieldset><p id="facts" aria-live="polite"></p><div class="panes">{panes}</div></div>'
    )


# ---- likely label errors ----


def label_error_section(
    inputs: ReportInputs, compared: Sequence[Compared], limits: Limits, pictures: Pictures
) -> Section:
    """Return crops of the clearest disagreements with the labels, and the images that have most."""
    title = 'Likely label errors'
    if not compared:
        return Section('labels', title, nothing(inputs.why_no_scores))
    found = label_findings(compared)
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
        cards = ''.join(_finding_card(f, compared, inputs.class_names, pictures) for f in chosen)
        body += f'<div class="cards">{cards}</div>'
    return Section('labels', title, body + _label_queue(inputs, compared, found))


def _finding_card(
    finding: Finding, compared: Sequence[Compared], names: Sequence[str], pictures: Pictures
) -> str:
    c = compared[finding.image]
    source = c.gt if finding.kind == UNSEEN else c.pred
    one = source[np.array([finding.index])]
    predicted = names[finding.class_id]
    text = {
        UNLABELLED: f'predicted {predicted}, score {finding.value:.2f}',
        OTHER_CLASS: f'labelled {names[finding.label_class_id]}, predicted {predicted}, '
        f'score {finding.value:.2f}',
        UNSEEN: f'labelled {predicted}, support {finding.value:.2f}',
    }[finding.kind]
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
    inputs: ReportInputs, compared: Sequence[Compared], found: dict[str, list[Finding]]
) -> str:
    counts = np.zeros((len(compared), len(KIND_TITLES)), dtype=np.int64)
    for column, kind in enumerate(KIND_TITLES):
        for finding in found[kind]:
            counts[finding.image, column] += 1
    n_labels = np.array([max(1, len(c.gt)) for c in compared])
    confident = counts[:, 0] + counts[:, 1]
    order = np.lexsort((-counts.sum(axis=1) / n_labels, -confident / n_labels))
    order = [i for i in order.tolist() if counts[i].sum()]
    fold_of = _fold_of(inputs)
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
    findings = [Finding('doubt', image, i, -1, -1, value) for value, image, i in cells]
    cards = ''.join(
        _doubt_card(f, sets[f.image], inputs.class_names, pictures)
        for f in shortlist(findings, limits.n_crops)
    )
    return Section('doubt', title, body + f'<div class="cards">{cards}</div>' + pictures.notes())


def _doubtful(doubt: Doubt) -> list[int]:
    return np.flatnonzero(doubt.by_instance > 0).tolist()


def _doubt_card(f: Finding, one: InstanceSet, names: Sequence[str], pictures: Pictures) -> str:
    cell = one[np.array([f.index])]
    text = (
        f'{names[int(cell.class_ids[0])]}, score {cell.scores[0]:.2f}, '
        f'agreement {float(cell.extra["agreement"][0]):.2f}'
    )
    if 'mask_uncertainty' in cell.extra:
        text += f', outline {float(cell.extra["mask_uncertainty"][0]):.2f}'
    others = one[one.scores >= QUEUE_SCORE_THR]
    return _card(one.name, cell, others, text, pictures)


def doubts_of(inputs: ReportInputs) -> list[Doubt]:
    """Return the ranked test images; empty without an ensemble."""
    return member_doubts(inputs.ensemble.sets) if inputs.ensemble is not None else []

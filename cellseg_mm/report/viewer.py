"""The report's viewer: images with labels and predictions beside each other.

In: :class:`ReportInputs`, scores and compared images. Out: its section, and the data of the page's
script. Invariant: how many images and cells were left out is said wherever something was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from html import escape

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import CellSegError, ConfigError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.layout import INFERENCE
from cellseg_mm.core.progress import track
from cellseg_mm.fusion.rescoring import RESCORED
from cellseg_mm.fusion.settings import (
    DEFAULT_MASK_THR,
    InferenceSettings,
    apply_settings,
    curve_of_new_scores,
    default_settings,
    load_settings,
)
from cellseg_mm.report.charts import number
from cellseg_mm.report.inputs import ReportInputs
from cellseg_mm.report.parts import Section, lead, nothing, swatch
from cellseg_mm.report.pictures import (
    EMBED_SCORE_THR,
    floored,
    prediction_entry,
    viewer_entry,
)
from cellseg_mm.report.suspects import Doubt
from cellseg_mm.results.overlay import read_rgb
from cellseg_mm.scores.matching import Compared, compare
from cellseg_mm.scores.records import Calibration, Scores


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may lie inside one page.

    Attributes:
        n_worst: Images with the lowest PQ.
        n_best: Images with the highest PQ.
        n_doubtful: Test images that members disagree most about.
        n_crops: Cells per list of suspects.
        max_picture_bytes: All pictures together, as base64 text; later ones are left out.
    """

    n_worst: int = 16
    n_best: int = 6
    n_doubtful: int = 10
    n_crops: int = 18
    max_picture_bytes: int = 14_000_000


Entry = dict[str, JsonValue]  # of the page's script, see pictures.viewer_entry


class Pictures:
    """Reads images once, and knows why one cannot be shown."""

    def __init__(self, inputs: ReportInputs) -> None:
        self._paths = {**inputs.test_paths, **inputs.train_paths}
        self._swapped, self._range = inputs.red_blue_swapped, inputs.value_range
        self._cache: dict[str, NDArray[np.uint8]] = {}
        self.problems: dict[str, str] = {}

    def read(self, name: str) -> NDArray[np.uint8] | None:
        """Return the image of a case, or None, with the reason in ``problems``."""
        if name in self._cache:
            return self._cache[name]
        if name not in self._paths:
            self.problems[name] = 'its file is not in the data folder'
            return None
        try:
            image = read_rgb(
                self._paths[name], red_blue_swapped=self._swapped, value_range=self._range
            )
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


@dataclass(frozen=True, slots=True)
class CellSettings:
    """Which detections the page shows as cells when it opens.

    Attributes:
        settings: The ``instances`` profile.
        source: Where it comes from, as the end of a sentence.
        new_scores: How often its new scores were right out of fold; None without new scores.
    """

    settings: InferenceSettings
    source: str
    new_scores: Calibration | None = None

    @property
    def least_score(self) -> float:
        """Where the page's slider starts."""
        return max(EMBED_SCORE_THR, floored(min(self.settings.score_thr)))

    def cells_of(self, pred: InstanceSet, *, fused_by: str = '') -> InstanceSet:
        """Return what is left of one image's detections, with new scores if they have none yet.

        Args:
            pred: Of a member, or fused.
            fused_by: What the file of fused ones says about how.
        """
        weights = self.settings.rescoring
        if weights is not None and RESCORED not in fused_by:
            pred = weights.apply(pred)
        return apply_settings(pred, self.settings)

    def sentence(self) -> str:
        """Return the settings for a reader."""
        thrs = self.settings.score_thr
        score = f'{thrs[0]:g}'
        if len(set(thrs)) > 1:
            pairs = zip(self.settings.class_names, thrs, strict=True)
            score = ', '.join(f'{thr:g} ({name})' for name, thr in pairs)
        parts = [f'score of at least {score}']
        if self.settings.min_area_px:
            parts.append(f'at least {self.settings.min_area_px} px')
        if self.settings.disjoint:
            parts.append('each pixel in one cell only')
        if self.settings.rescoring is not None:
            parts[0] = f'new {parts[0]}'
        return f'{", ".join(parts)}; {self.source}'


def cell_settings(inputs: ReportInputs) -> CellSettings:
    """Return the settings that were chosen out of fold, or the defaults and why."""
    path = inputs.ensemble_path.parent / INFERENCE
    default = default_settings('instances', inputs.class_names)
    if not path.is_file():
        return CellSettings(default, 'these are the defaults, none were chosen out of fold yet')
    try:
        settings = load_settings(path, 'instances', inputs.class_names)
        curve = curve_of_new_scores(path) if settings.rescoring is not None else None
        new_scores = Calibration.from_json(curve) if curve is not None else None
    except ConfigError as problem:
        return CellSettings(default, f'these are the defaults, because {problem}')
    if settings.mask_thr != DEFAULT_MASK_THR and not _has_probs(inputs):
        whole = replace(settings, mask_thr=DEFAULT_MASK_THR)
        lost = f'masks are cut at {DEFAULT_MASK_THR:g}, because the files hold no probabilities'
        return CellSettings(whole, f'chosen out of fold, {path.name}, but {lost}', new_scores)
    return CellSettings(settings, f'chosen out of fold, {path.name}', new_scores)


def _has_probs(inputs: ReportInputs) -> bool:
    pooled = inputs.pool.pred_sets if inputs.pool is not None else ()
    fused = inputs.ensemble.sets if inputs.ensemble is not None else ()
    return all('mask_probs' in one.extra for one in (*pooled, *fused) if len(one))


@dataclass(frozen=True, slots=True)
class Album:
    """What the viewer's images are made of.

    Attributes:
        inputs: Predictions and where the images are.
        scores: Pooled scores; None when no fold is scored.
        compared: The scored images in the order of ``scores.per_image``.
        doubts: Test images that members disagree about, most first.
        pictures: Reads the images.
        as_cells: Which detections are cells.
    """

    inputs: ReportInputs
    scores: Scores | None
    compared: Sequence[Compared]
    doubts: Sequence[Doubt]
    pictures: Pictures
    as_cells: CellSettings

    def entries(self, limits: Limits) -> list[Entry]:
        """Return the images: worst first, then best, then the most doubtful test images."""
        jobs: list[Callable[[], Entry | None]] = []
        if self.scores is not None:
            fold_of = fold_of_image(self.inputs)
            for group, rows in _worst_and_best(self.scores, limits).items():
                jobs += [partial(self._scored, self.scores, row, group, fold_of) for row in rows]
        jobs += [partial(self._tested, image) for image in self._doubtful(limits.n_doubtful)]
        entries: list[Entry] = []
        total = 0
        for job in track(jobs, description='pictures'):
            entry = job()
            if entry is None:
                continue
            total += len(str(entry['src']))
            if total > limits.max_picture_bytes:
                break
            entries.append(entry)
        return entries

    def _doubtful(self, n: int) -> list[int]:
        if self.inputs.ensemble is None:
            return []
        chosen = [doubt.image for doubt in self.doubts[:n]]
        return chosen or list(range(min(n, len(self.inputs.ensemble.sets))))

    def _scored(
        self, scores: Scores, row: int, group: str, fold_of: Mapping[str, int]
    ) -> Entry | None:
        p, compared = scores.per_image, self.compared[row]
        image = self.pictures.read(compared.gt.name)
        if image is None:
            return None
        facts = (
            f'fold {fold_of[compared.gt.name]} · PQ {number(p.pq[row])} · '
            f'F1 {number(p.f1_50[row])} · AJI {number(p.aji[row])}'
        )
        cells = compare(compared.gt, self.as_cells.cells_of(compared.pred))
        return viewer_entry(compared, cells, image, facts=facts, group=group)

    def _tested(self, index: int) -> Entry | None:
        assert self.inputs.ensemble is not None
        pred = self.inputs.ensemble.sets[index]
        image = self.pictures.read(pred.name)
        if image is None:
            return None
        facts = 'test image, no labels'
        doubt = next((one for one in self.doubts if one.image == index), None)
        if doubt is not None:
            facts += (
                f' · members agree {100 * doubt.agreement:.0f} % · '
                f'mask uncertainty {number(doubt.mask_uncertainty, 2)}'
            )
        how = str(self.inputs.ensemble.provenance.get('fusion') or '')
        cells = self.as_cells.cells_of(pred, fused_by=how)
        return prediction_entry(pred, cells, image, facts=facts, group='test')


def fold_of_image(inputs: ReportInputs) -> dict[str, int]:
    """Return the fold that held each image out, by name."""
    pool = inputs.pool
    return {s.name: f for s, f in zip(pool.pred_sets, pool.fold_of, strict=True)} if pool else {}


def _worst_and_best(scores: Scores, limits: Limits) -> dict[str, list[int]]:
    pq = scores.per_image.pq
    order = [i for i in np.argsort(pq, kind='stable').tolist() if not np.isnan(pq[i])]
    worst = order[: limits.n_worst]
    best = list(reversed(order[limits.n_worst :]))[: limits.n_best]
    return {'worst': worst, 'best': best}


def viewer_section(album: Album, entries: Sequence[Entry]) -> Section:
    """Return the viewer; the page's script fills it."""
    inputs, scores, pictures = album.inputs, album.scores, album.pictures
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
        f'{n_scored + n_test - len(entries)} were left out to keep it small. Predictions are shown '
        f'as cells ({album.as_cells.sentence()}). "All detections" shows what AP counts instead, '
        f'overlaps too, with score of at least {EMBED_SCORE_THR:g}. Dashed: a label that nothing '
        'found, or a prediction without a label of its class (mask IoU 0.5), at the chosen score '
        'threshold.'
    )
    body = lead(text) + _viewer_html(inputs, entries, album.as_cells.least_score)
    return Section('images', title, body + pictures.notes())


def _viewer_html(inputs: ReportInputs, entries: Sequence[Entry], least_score: float) -> str:
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
        '<div class="controls"><label>Predictions <select id="predictions">'
        f'<option value="cells" data-least="{least_score:g}">cells</option>'
        f'<option value="pred" data-least="{EMBED_SCORE_THR:g}">all detections</option>'
        '</select></label>'
        '<label class="grow">Score from <output id="threshold-value"></output>'
        '<input type="range" id="threshold" max="1" step="0.01"></label>'
        '<button type="button" id="zoom-in" aria-label="zoom in">+</button>'
        '<button type="button" id="zoom-out" aria-label="zoom out">−</button>'
        '<button type="button" id="zoom-reset">whole image</button></div>'
        f'<fieldset class="controls"><legend>Show</legend>{classes}'
        '<label class="check"><input type="checkbox" id="fill">filled</label>'
        '<label class="check"><input type="checkbox" id="wrong-only">mistakes only</label>'
        f'</fieldset><p id="facts" aria-live="polite"></p><div class="panes">{panes}</div></div>'
    )

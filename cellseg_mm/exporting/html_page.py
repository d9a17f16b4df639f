"""A model as one HTML file that finds cells in a browser, without network, server or Python.

In: a model's file of one member, and the files of onnxruntime-web. Out: one HTML file. Invariant:
everything is inside the file, and its Content-Security-Policy lets it reach nothing else.

The scripts lie in ``assets``: ``tiff``, ``picture``, ``find`` and ``worker`` run in a worker,
``cells``, ``save`` and ``page`` in the page; styles, zooming and keys are the report's.
"""

from __future__ import annotations

import base64
import gzip
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from cellseg_mm.core import files
from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.exporting.ort_web import LOADER, PACKAGE, WASM, runtime_files
from cellseg_mm.fusion.settings import InferenceSettings, default_settings
from cellseg_mm.light import card
from cellseg_mm.light.detector import OnnxModel
from cellseg_mm.light.model_file import ModelFile, ModelRecord
from cellseg_mm.report.parts import colour_css, details, script_json, swatch, table

SUFFIX = '.html'
WORKER = ('tiff', 'picture', 'find', 'worker')
PAGE = ('cells', 'save', 'page')
SEEN_PX = 1024  # side of what the model sees at once; a browser gives a page 4 GB at most
WHOLE = 1.5  # pictures this much larger than a tile are not cut
LEAST_SCORE = 0.05  # cells below do not reach the page
RESIZES = {None, 'bilinear'}  # what picture.js knows of cv2 and Pillow


@dataclass(frozen=True, slots=True)
class Written:
    """What was written.

    Attributes:
        path: The page.
        n_bytes: Its size.
    """

    path: Path
    n_bytes: int

    def describe(self) -> str:
        """Return one line."""
        return f'written: {self.path} ({self.n_bytes / 1e6:.1f} MB); open it in a browser'


def write_page(path: Path, file: ModelFile, *, ort_web: Path | None = None) -> Written:
    """Write the page of a model.

    Args:
        path: The HTML file.
        file: One member, with or without settings and card.
        ort_web: See ``ort_web.runtime_files``.

    Raises:
        ConfigError: Several members, a resizing step that the page does not know, or no
            onnxruntime-web.
        CheckpointError: The member cannot be loaded.
    """
    if path.suffix.lower() != SUFFIX:
        raise ConfigError(
            f'{path}: a page cannot be written there; expected a name that ends in {SUFFIX}; '
            'correct --out'
        )
    check_one(len(file.members), str(file.path))
    record = OnnxModel(file.members[0], 'cpu').record
    step = record.resize
    if step is not None and step.get('interpolation') not in RESIZES:
        raise ConfigError(
            f'{file.path}: resizes by interpolation {step["interpolation"]}; a page knows '
            'bilinear; use the file with tools/predict.py'
        )
    content = runtime_files(ort_web)
    settings = default_settings('instances', record.class_names)
    parts = {
        **_texts(file, record, settings),
        'css': _report('report.css') + _asset('page.css') + colour_css(record.class_colours),
        'data': script_json(page_info(record, settings)),
        'wasm': _packed(content[WASM]),
        'model': _packed(file.members[0].content),
        'worker': _script(as_constant(content[LOADER].decode()), *map(_asset_js, WORKER)),
        'js': _script(_report('viewer.js'), *map(_asset_js, PAGE)),
    }
    # One pass, so that text which came from files is never searched for placeholders.
    html = re.sub(r'\{\{(\w+)\}\}', lambda found: parts[found[1]], _asset('page.html'))
    files.write_text(path, html)
    return Written(path, len(html.encode()))


def check_one(n_members: int, where: str) -> None:
    """Refuse several members.

    Raises:
        ConfigError: There are several.
    """
    if n_members != 1:
        raise ConfigError(
            f'{where}: {n_members} members; a page carries one; export one member by itself'
        )


def page_info(record: ModelRecord, settings: InferenceSettings) -> dict[str, JsonValue]:
    """Return what the page's scripts know of the model."""
    factor = 1.0
    if record.resize is not None and record.resize['type'] == 'ScaleBy':
        factor = float(record.resize['factor'])
    tile = max(round(SEEN_PX / factor), 64)
    return {
        'classNames': list(record.class_names),
        'classColours': [list(colour) for colour in record.class_colours],
        'resize': dict(record.resize) if record.resize is not None else None,
        'maskFrame': record.mask_frame,
        'maskThr': record.mask_thr,
        'cap': record.max_per_img,
        'leastScore': max(record.score_thr, LEAST_SCORE),
        'scoreThr': max(settings.score_thr[0], record.score_thr, LEAST_SCORE),
        'minAreaPx': settings.min_area_px,
        'disjoint': settings.disjoint,
        'maxLostShare': settings.max_lost_share,
        'tilePx': tile,
        'overlapPx': tile // 8,
        'wholePx': round(tile * WHOLE),
    }


def _texts(file: ModelFile, record: ModelRecord, settings: InferenceSettings) -> dict[str, str]:
    """Return the page's texts as HTML."""
    name, least = file.path.stem, max(record.score_thr, LEAST_SCORE)
    classes = ''.join(
        f'<label class="check"><input type="checkbox" class="class-switch" value="{k}" checked>'
        f'{swatch(k, one)}<output class="n" id="n{k}"></output></label>'
        for k, one in enumerate(record.class_names)
    )
    lead = (
        f'Finds cells in microscopy pictures and names their type: {", ".join(record.class_names)}.'
        ' Everything happens in this page: no picture leaves this computer, and no network is '
        'needed.'
    )
    about = table(
        ('', 'what holds'),
        [(what, escape(text)) for what, text in _facts(file, record, settings)],
        caption='Model, licence and settings',
        kind='facts',
    )
    if file.card:
        about += details('Everything that the card of the model says', _pre(card.describe(file)))
    return {
        'title': escape(f'Cells by {name}'),
        'lead': escape(lead),
        'least': f'{least:g}',
        'swapped': 'red and blue are swapped in my files',
        'is_swapped': ' checked' if record.red_blue_swapped else '',
        'classes': classes,
        'about': about,
    }


def _pre(text: str) -> str:
    return f'<pre>{escape(text)}</pre>'


def _facts(
    file: ModelFile, record: ModelRecord, settings: InferenceSettings
) -> Iterator[tuple[str, str]]:
    """Yield what a person should know, by name."""
    bits = 16 if record.half else 32
    checkpoint = record.member.get('source_hash') or '?'
    yield 'model', f'{file.path.name}, weights of {bits} bits, checkpoint {checkpoint}'
    licence = file.card.get('licence') or 'not said in the file'
    yield 'licence of the weights', str(licence)
    if file.card.get('attribution'):
        yield 'trained on', str(file.card['attribution'])
    order = 'red and blue swapped' if record.red_blue_swapped else 'RGB in the natural order'
    size = f'{record.um_per_px:g} µm a pixel' if record.um_per_px else 'size of a pixel not said'
    yield 'pictures', f'8 bits, {order} (the switch above changes that), {size}; nothing is scaled'
    yield 'settings', _settings_text(settings, file)
    yield 'how good', _evidence(file, record.evidence)
    yield (
        'large pictures',
        'are cut into tiles that overlap; a cell belongs to the tile in whose inner part its '
        'centre lies; one that is larger than the overlap may be cut at a seam',
    )
    yield (
        'browsers',
        'Chrome and Edge from 97, Firefox from 113, Safari from 16.4; one thread of this computer',
    )
    yield 'runs with', f'{PACKAGE} (Microsoft, MIT licence), which lies in this file'
    yield 'made with', f'commit {record.made_with.get("code_commit") or "?"}'


def _settings_text(settings: InferenceSettings, file: ModelFile) -> str:
    text = f'score from {settings.score_thr[0]:g}, each pixel in one cell only: the defaults'
    if file.settings is None:
        return text
    return (
        f"{text}; the settings in the model's file hold for its answers in several views, joined, "
        'which a page does not compute'
    )


def _evidence(file: ModelFile, evidence: Mapping[str, Any]) -> str:
    score = (evidence.get('headline') or {}).get('segm_AP50')
    if score is None:
        return 'see the card below' if file.card.get('scores') else 'not measured'
    return f'mask AP50 {score:.3f} on fold {evidence.get("fold")}, which it was not trained on'


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()


def as_constant(module: str) -> str:
    """Return a module's text as a constant ``ort`` with what it exports, for a classic script.

    Chromium starts no module as a worker where a page comes from a file.

    Raises:
        ConfigError: It does not end with its exports.
    """
    found = re.search(r'export\s*\{([^{}]*)\};?\s*(//# sourceMappingURL=\S*)?\s*$', module)
    if found is None:
        raise ConfigError(f'{LOADER}: has no exports at its end; expected that of {PACKAGE}')
    pairs = [one.split(' as ') for one in found[1].split(',')]
    exports = ','.join(f'{pair[-1].strip()}:{pair[0].strip()}' for pair in pairs)
    body = module[: found.start()].replace('import.meta.url', 'self.location.href')
    return f'const ort=(()=>{{{body}\nreturn{{{exports}}};}})();'


def _script(*texts: str) -> str:
    text = '\n'.join(texts)
    if '</script' in text.lower():
        raise ConfigError('page: a script holds the end of a script element; expected none')
    return text


def _asset_js(name: str) -> str:
    return _asset(f'{name}.js')


def _asset(name: str) -> str:
    return _text_of('cellseg_mm.exporting', name)


def _report(name: str) -> str:
    return _text_of('cellseg_mm.report', name)


def _text_of(package: str, name: str) -> str:
    return (resources.files(package) / 'assets' / name).read_text(encoding='utf-8')

"""Trained models become files that need no torch.

In: configs and their checkpoints. Out: an ``.onnx`` file of one member, or a ``.cellseg`` file of
one or more with settings. Invariant: before a file is written, it has found the same cells as its
model in torch in a real picture.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import ConfigDict
from numpy.typing import NDArray

from cellseg_mm.core import files
from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.core.layout import scores_path, work_dir_of
from cellseg_mm.core.provenance import code_commit, versions
from cellseg_mm.data.config import DataSettings, dataset_settings
from cellseg_mm.data.image_reader import open_image
from cellseg_mm.data.images import find_images
from cellseg_mm.data.pixel_size import is_same
from cellseg_mm.detectors.detector import ModelDetector, build_detector
from cellseg_mm.detectors.from_options import Configs, sources_of
from cellseg_mm.detectors.member_models import MemberSource
from cellseg_mm.exporting import html_page, onnx_file
from cellseg_mm.exporting.bioimage import PACKAGE, load_library, write_package
from cellseg_mm.exporting.card import find_scores, make_card, read_said, read_scores
from cellseg_mm.exporting.carried import check_model, resize_step
from cellseg_mm.exporting.ort_web import runtime_files
from cellseg_mm.exporting.parity import Parity, compare, share_alike
from cellseg_mm.fusion.settings import InferenceSettings, load_settings
from cellseg_mm.light.detector import LightDetector, OnnxModel
from cellseg_mm.light.model_file import (
    SUFFIXES,
    Member,
    ModelRecord,
    read_model_file,
    write_model_file,
)
from cellseg_mm.light.picture import resize
from cellseg_mm.predict.options import MemberOptions
from cellseg_mm.predict.scaling import um_of_members

Picture = NDArray[np.uint8]

MAX_CHECK_PX = 1024  # side of the picture that a file is checked with
TRACE_PX = 256  # side of the picture that is traced; the graph takes any


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What is written.

    Attributes:
        out: ``.onnx`` for one member, ``.cellseg`` for one or more with settings, ``.zip`` for one
            member as a package for BioImage.IO.
        half: Keep weights in 16 bits.
        image: Picture to check with; None takes one of the first config's own validation images.
            A package shows it to everybody; None puts a drawn one there.
        card: A person's part of the card, see ``card.read_said``; None for none.
        scores: Out-of-fold scores for the card; None takes those that lie beside the work folders.
        red_blue_swapped: Whether the pictures that the file will be given hold blue where red
            belongs; None takes it from the training images.
        ort_web: Where a page's onnxruntime-web comes from, see ``ort_web.runtime_files``.
    """

    out: Path
    half: bool = False
    image: Path | None = None
    card: Path | None = None
    scores: Path | None = None
    red_blue_swapped: bool | None = None
    ort_web: Path | None = None


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        path: The file.
        n_bytes: Its size.
        members: For each member its checkpoint and how the file compares with it.
        halved: For each member how many cells 16 bits leave the same (IoU 0.9), and of how many;
            empty with 32 bits.
        has_settings: Whether settings ride in it.
        card: What the card says of scores; '' of an ``.onnx`` file.
    """

    path: Path
    n_bytes: int
    members: tuple[tuple[str, Parity], ...]
    halved: tuple[tuple[int, int], ...]
    has_settings: bool
    card: str = ''

    def describe(self) -> str:
        """Return sentences for a terminal."""
        lines = [f'{source}: {parity.describe()}' for source, parity in self.members]
        lines += [
            f'with weights of 16 bits {n_same} of {n_cells} cells are the same (IoU 0.9)'
            for n_same, n_cells in self.halved
        ]
        lines += [self.card] if self.card else []
        settings = ', with settings' if self.has_settings else ''
        size = f'{self.n_bytes / 1e6:.1f} MB, {len(self.members)} members{settings}'
        return '\n'.join([*lines, f'written: {self.path} ({size})'])


def export(configs: Configs, members: MemberOptions, options: ExportOptions) -> Exported:
    """Write a model file.

    Args:
        configs: One for each member, or one for all.
        members: Checkpoints; and ``settings_path``, which rides in a ``.cellseg`` file.
        options: See :class:`ExportOptions`.

    Raises:
        ConfigError: A part of a model cannot be carried, options do not fit, or the file does not
            find what the model finds.
        CheckpointError: See ``member_models``.
    """
    _check_folder(options.out.parent)
    if options.out.suffix.lower() == html_page.SUFFIX:
        return _export_page(configs, members, options)
    sources = sources_of(configs, members)
    _check_options(sources, members, options)
    first = DataSettings.from_config(sources[0].cfg, 'test_dataloader')
    settings, chosen = _settings(members, first)
    said = {} if options.card is None else read_said(options.card)
    is_plain = options.out.suffix.lower() == '.onnx'
    scores, about = (None, '') if is_plain else _scores(sources, members, options, chosen)
    pictures = _pictures(options.image or _own_image(first), first)
    written, records, parities, halved = [], [], [], []
    for source in sources:
        content, record, parity, alike = _member(source, pictures, members, options, said)
        written.append(content)
        records.append(record)
        parities.append((str(source.checkpoint), parity))
        halved += alike
    if is_plain:
        files.write_bytes(options.out, written[0])
    else:
        card = make_card(sources, records, said=said, scores=scores)
        if options.out.suffix.lower() == PACKAGE:
            shown = None if options.image is None else _red_first(pictures[0], first)
            told = write_package(options.out, written[0], card=card, picture=shown)
            about = '\n'.join([about, *told])
        else:
            write_model_file(options.out, written, settings=settings, card=card)
    size = options.out.stat().st_size
    has_settings = settings is not None
    return Exported(options.out, size, tuple(parities), tuple(halved), has_settings, about)


def _export_page(configs: Configs, members: MemberOptions, options: ExportOptions) -> Exported:
    """Export a model file, and make the page of that."""
    html_page.check_one(len(sources_of(configs, members)), str(options.out))
    runtime_files(options.ort_web)  # before minutes of work
    with tempfile.TemporaryDirectory() as folder:
        inner = replace(options, out=Path(folder) / f'{options.out.stem}.cellseg')
        exported = export(configs, members, inner)
        file = read_model_file(inner.out)
        written = html_page.write_page(options.out, file, ort_web=options.ort_web)
    return replace(exported, path=written.path, n_bytes=written.n_bytes, card='')


def _settings(
    members: MemberOptions, data: DataSettings
) -> tuple[dict[str, Any] | None, InferenceSettings]:
    """Return the content of the settings file, and what it asks for."""
    if members.settings_path is None:
        return None, InferenceSettings()
    chosen = load_settings(members.settings_path, 'instances', data.class_names)
    content = json.loads(Path(members.settings_path).read_text(encoding='utf-8'))
    content.pop('commands', None)  # with the paths of this computer
    return content, chosen


def _scores(
    sources: Sequence[MemberSource],
    members: MemberOptions,
    options: ExportOptions,
    chosen: InferenceSettings,
) -> tuple[dict[str, Any] | None, str]:
    """Return the scores that the card gets, and what to say of them."""
    path = options.scores or find_scores(
        sources[0].config_path,
        members.work_root,
        chosen.tta,
        new_scores=chosen.rescoring is not None,
    )
    if options.scores is None and not path.is_file():
        return None, f'card: no scores outside the training: there is no {path}'
    return read_scores(path), f'card: scores of {path}'


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written, before minutes of work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        raise ConfigError(
            f'{folder}: cannot be written ({problem.strerror}); expected a folder with the right '
            'to write; correct --out'
        ) from problem


def _check_options(
    sources: Sequence[MemberSource], members: MemberOptions, options: ExportOptions
) -> None:
    suffix = options.out.suffix.lower()
    if suffix not in (*SUFFIXES, PACKAGE):
        raise ConfigError(
            f'{options.out}: a file of this kind cannot be written; expected a name that ends in '
            f'{" or ".join([*SUFFIXES, PACKAGE, html_page.SUFFIX])}; correct --out'
        )
    if suffix == PACKAGE and (len(sources) > 1 or members.settings_path is not None):
        raise ConfigError(
            f'{options.out}: a package for BioImage.IO is one member without settings; '
            f'{len(sources)} members and settings go into a .cellseg file; correct --out'
        )
    if suffix == PACKAGE:
        load_library()  # before minutes of work
    more = members.settings_path or options.card or options.scores
    if suffix == '.onnx' and (len(sources) > 1 or more is not None):
        raise ConfigError(
            f'{options.out}: an .onnx file is one member without settings and card; '
            f'{len(sources)} members, settings and a card go into a .cellseg file; correct --out'
        )


def _own_image(data: DataSettings) -> Path:
    """Return an image of middle size that the first member was validated on."""
    images = find_images(
        data.data_root, 'val', data.class_names, folds_path=data.folds_path, fold=data.fold
    )
    by_size = sorted(images.cases, key=lambda case: case.image_path.stat().st_size)
    return by_size[len(by_size) // 2].image_path


def _pictures(path: Path, data: DataSettings) -> list[Picture]:
    """Return what a file is checked with: a picture, and a part of it of another shape."""
    with open_image(path, value_range=data.value_range()) as reader:
        height, width = (min(side, MAX_CHECK_PX) for side in reader.image_hw)
        picture = reader.read(0, 0, height, width)
    part = picture[: max(height * 2 // 3, 1), : max(width // 2, 1)]
    return [picture, np.ascontiguousarray(part)]


def _red_first(picture: Picture, data: DataSettings) -> Picture:
    return np.ascontiguousarray(picture[..., ::-1]) if data.red_blue_swapped else picture


def _member(
    source: MemberSource,
    pictures: Sequence[Picture],
    members: MemberOptions,
    options: ExportOptions,
    said: Mapping[str, Any],
) -> tuple[bytes, ModelRecord, Parity, list[tuple[int, int]]]:
    """Return a member's file, how it compares, and with 16 bits how many cells stay the same."""
    detector = build_detector([source], device='cpu')
    where = f'{source.config_path} with {source.checkpoint}'
    check_model(detector.model, where)
    size = said.get('um_per_px') or trained_size(detector)
    tile = said.get('tile_px')
    record = replace(_record(source, detector, members, where), um_per_px=size, tile_px=tile)
    shown = pictures[0][..., ::-1] if record.red_blue_swapped else pictures[0]
    traced = resize(np.ascontiguousarray(shown[:TRACE_PX, :TRACE_PX]), record.resize)
    content = onnx_file.to_onnx(detector.model, traced, where)
    expected = _find(detector, pictures)
    found = _find(_light(content, record), pictures)
    parity = compare(expected, found, score_thr=record.score_thr, cap=record.max_per_img)
    parity.check(where)
    alike: list[tuple[int, int]] = []
    if options.half:
        content = onnx_file.with_half_weights(content)
        alike = [share_alike(expected, _find(_light(content, record), pictures))]
        record = replace(record, half=True, parity={**record.parity, 'half_same': list(alike[0])})
    record = replace(record, parity={**record.parity, **parity.to_json()})
    if options.red_blue_swapped is not None:
        record = replace(record, red_blue_swapped=options.red_blue_swapped)
    return onnx_file.with_record(content, record), record, parity, alike


def trained_size(detector: ModelDetector) -> float | None:
    """Return the side of a pixel that the checkpoint was trained with; None if not square."""
    size = um_of_members(detector.provenance['members'])
    return size[0] if size is not None and is_same(size, (size[0], size[0])) else None


def _light(content: bytes, record: ModelRecord) -> LightDetector:
    content = onnx_file.with_record(content, record)
    return LightDetector([OnnxModel(Member('the exported file', content, ''), 'cpu')])


def _find(detector: ModelDetector | LightDetector, pictures: Sequence[Picture]) -> list:
    return [detector.detect([picture], 'check')[0] for picture in pictures]


def _record(
    source: MemberSource, detector: ModelDetector, members: MemberOptions, where: str
) -> ModelRecord:
    data = DataSettings.from_config(source.cfg, 'test_dataloader')
    pipeline = ConfigDict({'p': dataset_settings(source.cfg, 'test_dataloader').pipeline}).to_dict()
    rcnn = detector.model.roi_head.test_cfg
    member: dict[str, Any] = dict(detector.provenance['members'][0])
    member['source'] = Path(member['source']).name  # the folder is of this computer
    value_range = data.value_range()
    if member.get('value_range') is None and value_range is not None:
        member['value_range'] = value_range.to_json()
    return ModelRecord(
        class_names=data.class_names,
        class_colours=data.palette,
        red_blue_swapped=data.red_blue_swapped,
        resize=resize_step(pipeline['p'], where),
        mask_frame=float(getattr(detector.model.roi_head, 'mask_frame', 1.0)),
        mask_thr=float(rcnn.mask_thr_binary),
        score_thr=float(rcnn.score_thr),
        max_per_img=max(int(rcnn.get('max_per_img', 0)), 0),
        member=member,
        evidence=_evidence(source, member, members),
        made_with={'code_commit': code_commit(), 'versions': versions()},
    )


def _evidence(
    source: MemberSource, member: dict[str, Any], members: MemberOptions
) -> dict[str, JsonValue]:
    """Return the scores on the held-out fold, if they were measured with this checkpoint."""
    path = scores_path(work_dir_of(source.config_path, members.work_root), 'val')
    if not path.is_file():
        return {}
    scores = json.loads(path.read_text(encoding='utf-8'))
    if not str(scores.get('provenance', {}).get('checkpoint_hash', '')).startswith(
        str(member['source_hash'])
    ):
        return {}
    kept = ('headline', 'intervals', 'interval_unit', 'n_interval_units')
    return {'fold': member.get('fold'), **{key: scores.get(key) for key in kept}}

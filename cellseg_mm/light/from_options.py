"""What the options of tools/predict.py mean for models in files.

In: paths of model files, and the options that a model in torch has. Out: images predicted.
Invariant: the same option means the same; settings inside a file hold until others are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.fusion.settings import InferenceSettings, choose_settings
from cellseg_mm.light.card import HAEMATOXYLIN, notice
from cellseg_mm.light.detector import LightDetector, OnnxModel
from cellseg_mm.light.model_file import ModelFile, read_model_file
from cellseg_mm.predict.items import look_for
from cellseg_mm.predict.options import MemberOptions, PredictOptions, params_for, predict_found
from cellseg_mm.predict.params import PredictParams
from cellseg_mm.predict.scaling import um_of_members
from cellseg_mm.predict.summary import Summary
from cellseg_mm.results.formats import Look


@dataclass(frozen=True, slots=True)
class _Settings:
    """Where settings come from: a file that was named, or the model's own."""

    path: str | None
    content: Mapping[str, Any] | None

    @property
    def are_there(self) -> bool:
        return self.path is not None


def predict_images(
    paths: Sequence[str], members: MemberOptions, options: PredictOptions
) -> Summary:
    """Predict images with the models of files; several members make an ensemble.

    Args:
        paths: Files, or names of models that come with the package.
        members: What is done with their answers.
        options: See :class:`PredictOptions`.

    Raises:
        CellSegError: Files or options that do not fit; see the message.
    """
    said = [notice(read_model_file(path)) for path in paths]
    found = look_for(options.inputs, out_dir=options.out_dir)
    summary = predict_found(found, partial(prepare, tuple(paths), members, options), options)
    summary.asides[:0] = [line for line in said if line]
    return summary


def prepare(
    paths: Sequence[str], members: MemberOptions, options: PredictOptions
) -> tuple[LightDetector, PredictParams]:
    """Load the models of files, and say what the options mean for them; any process may do it.

    Raises:
        CellSegError: Files or options that do not fit; see the message.
    """
    files = [read_model_file(path) for path in paths]
    settings = _settings(files, members)
    detector = make_detector(files, members, options)
    look = Look(
        class_names=detector.record.class_names,
        class_colours=detector.record.class_colours,
        red_blue_swapped=detector.red_blue_swapped,
    )
    sizes: list[JsonValue] = [{'um_per_px': one.record.um_per_px} for one in detector.models]
    if options.tile_px is None:
        options = replace(options, tile_px=detector.record.tile_px)
    params = params_for(
        detector,
        look,
        options,
        has_settings=settings.are_there,
        model_um=um_of_members(sizes),
    )
    return detector, params


def make_detector(
    files: Sequence[ModelFile], members: MemberOptions, options: PredictOptions
) -> LightDetector:
    """Load the models of files.

    Raises:
        CellSegError: Files or options that do not fit; see the message.
    """
    models = [OnnxModel(one, options.device) for file in files for one in file.members]
    return LightDetector(
        models,
        how=_how(
            models[0].record.class_names, _settings(files, members), members, options.score_thr
        ),
        tta_spec=members.tta,
        red_blue_swapped=options.red_blue_swapped,
        is_haematoxylin=all(file.card.get('stain') == HAEMATOXYLIN for file in files),
    )


def _settings(files: Sequence[ModelFile], members: MemberOptions) -> _Settings:
    if members.settings_path is not None:
        return _Settings(members.settings_path, None)
    inside = [file for file in files if file.settings is not None]
    if len(files) > 1 and inside:
        raise ConfigError(
            f'{inside[0].path}: holds settings that were found for its own members; with other '
            'files beside it nobody knows whether they fit; name settings with --settings'
        )
    return _Settings(str(inside[0].path), inside[0].settings) if inside else _Settings(None, None)


def _how(
    class_names: Sequence[str],
    settings: _Settings,
    members: MemberOptions,
    most_thr: float | None,
) -> InferenceSettings | None:
    """Return how members are fused and what follows; None leaves one model's own answer."""
    if members.is_plain and not settings.are_there:
        return None
    return choose_settings(
        class_names,
        path=settings.path,
        content=settings.content,
        profile='instances' if settings.are_there else 'submission',
        fusion=members.fusion,
        post=members.post,
        tta=members.tta,
        most_thr=most_thr,
    )

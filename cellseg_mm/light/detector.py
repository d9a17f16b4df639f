"""Models in ONNX files as something that finds cells in pictures, without torch and mm*.

In: a model's file. Out: :class:`LightDetector`, which ``predict`` calls as it calls a model in
torch. Invariant: the same cells as that model finds; ``tools/export.py`` has checked it for every
file before it was written.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core import rle
from cellseg_mm.core.errors import CheckpointError, ConfigError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.proposals import notes_of_proposals
from cellseg_mm.data.stain import red_is_first
from cellseg_mm.fusion import fuse as fusion
from cellseg_mm.fusion import views
from cellseg_mm.fusion.settings import InferenceSettings
from cellseg_mm.light.model_file import METADATA_KEY, Member, ModelRecord
from cellseg_mm.light.picture import Picture, resize

INPUT = 'image'
N_CHANNELS = 3
OUTPUTS = ('boxes', 'classes', 'scores', 'masks', 'proposal_cut')
# What onnxruntime says of files that are newer than it: what the file has, what it reads.
TOO_NEW = {
    r'Unsupported model IR version: (\d+), max supported IR version: (\d+)': "ONNX's IR version",
    r'(?s)Opset (\d+) is under development.* is till opset (\d+)': "ONNX's opset",
}
SURE, LEAST_CELLS, MAX_GAPS = 0.5, 5, 50  # which cells, and how many tiles, are looked at
ODD_ORDER = -0.04  # see stain.red_is_first: 2 % of H&E pictures that are read rightly are below
DEVICES = {'cpu': 'CPUExecutionProvider', 'cuda': 'CUDAExecutionProvider'}


class OnnxModel:
    """One member, loaded.

    Args:
        member: From ``read_model_file``.
        device: ``auto``, ``cpu`` or ``cuda``.

    Attributes:
        record: What the file says of itself.
        sha256: Of its content.

    Raises:
        CheckpointError: The file is damaged, none of ours, or wants a newer onnxruntime.
        ConfigError: onnxruntime is not installed, or has no such device.
    """

    def __init__(self, member: Member, device: str = 'auto') -> None:
        onnxruntime = _onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # onnxruntime does not look at it by itself
        options.intra_op_num_threads = int(os.environ.get('OMP_NUM_THREADS') or 0)
        provider = _provider(onnxruntime, device)
        try:
            self.session = onnxruntime.InferenceSession(
                member.content, options, providers=[provider]
            )
        except Exception as problem:  # onnxruntime's own kinds have no common base
            raise CheckpointError(
                f'{member.where}: onnxruntime {onnxruntime.__version__} {_why_not(str(problem))}'
            ) from problem
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.record = ModelRecord.from_json(metadata.get(METADATA_KEY, '{}'), member.where)
        self._check_ports(member.where)
        self.sha256 = member.sha256

    def _check_ports(self, where: str) -> None:
        names = tuple(one.name for one in self.session.get_outputs())
        inputs = self.session.get_inputs()
        if names != OUTPUTS or [one.name for one in inputs] != [INPUT]:
            raise CheckpointError(
                f'{where}: its outputs are {", ".join(names)}; expected {", ".join(OUTPUTS)}; '
                'export the model again'
            )
        shape, kind = inputs[0].shape, inputs[0].type
        if len(shape) != 3 or shape[2] != N_CHANNELS or kind != 'tensor(uint8)':
            raise CheckpointError(
                f'{where}: is a model for {kind} of shape {shape}; expected one for pictures (H, '
                f'W, {N_CHANNELS}) of 8 bits, red, green and blue; pictures of other channels need '
                'a model in torch'
            )

    def find(
        self, picture: Picture, name: str, *, step: Mapping[str, Any] | None, mask_thr: float
    ) -> tuple[InstanceSet, float]:
        """Return a picture's instances with mask probabilities, and where proposals were cut.

        Args:
            picture: (h, w, 3) uint8, red first.
            name: Of the image that it is a part of.
            step: How it is resized before.
            mask_thr: Least probability of a mask's pixel.
        """
        seen = np.ascontiguousarray(resize(picture, step))
        boxes, classes, scores, masks, cut = self.session.run(list(OUTPUTS), {INPUT: seen})
        image_hw = (picture.shape[0], picture.shape[1])
        scale = np.array([seen.shape[1] / image_hw[1], seen.shape[0] / image_hw[0]] * 2)
        boxes = boxes / scale.astype(np.float32)
        frames = enlarged(boxes, self.record.mask_frame)
        crops, low = fusion.paste_probs(masks, frames, image_hw, mask_thr)
        probs = {'mask_probs': masks.astype(np.float16), 'mask_boxes': frames}
        found = InstanceSet(
            name,
            0,
            image_hw,
            class_ids=classes,
            scores=scores,
            boxes_xyxy=boxes,
            rles=tuple(rle.encode_crops(crops, low, image_hw)),
            extra=probs if len(boxes) else {},
        )
        return found, float(cut)


def enlarged(boxes_xyxy: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    """Return (N, 4) boxes ``factor`` times as wide and high about the same centres."""
    low, high = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    margin = (high - low) * np.float32((factor - 1) / 2)
    return np.concatenate([low - margin, high + margin], axis=1)


def _onnxruntime() -> ModuleType:
    try:
        return importlib.import_module('onnxruntime')
    except ImportError as problem:
        raise ConfigError(
            f'onnxruntime: cannot be imported ({problem}); expected it for models in files; '
            'install it: pip install -r requirements/predict.txt'
        ) from problem


def _why_not(said: str) -> str:
    """Return why a file could not be loaded, from what onnxruntime said."""
    for pattern, what in TOO_NEW.items():
        found = re.search(pattern, said)
        if found is not None:
            return (
                f'reads {what} up to {found[2]}, the file has {found[1]}; expected a newer '
                'onnxruntime; install it: pip install -U onnxruntime'
            )
    return (
        f'cannot load it ({said[:200].strip()}); expected a model of tools/export.py; copy it '
        'again, or install a newer onnxruntime'
    )


def _provider(onnxruntime: ModuleType, device: str) -> str:
    available = onnxruntime.get_available_providers()
    if device == 'auto':
        device = 'cuda' if DEVICES['cuda'] in available else 'cpu'
    provider = DEVICES.get(device.split(':')[0])
    if provider not in available:
        raise ConfigError(
            f'device {device}: onnxruntime {onnxruntime.__version__} has {", ".join(available)}; '
            'expected auto, cpu, or cuda with onnxruntime-gpu; choose another, or install that'
        )
    return str(provider)


class LightDetector:
    """Finds cells with one ONNX model or an ensemble of them; see ``predict.Detector``.

    Args:
        models: Members; all must have the same classes and see pictures in the same way.
        how: How members are fused and what is done afterwards; None leaves one model's own answer,
            and fuses several by the defaults.
        tta_spec: See ``views.from_spec``; None takes ``how.tta``, ``none`` nothing.
        red_blue_swapped: Whether the pictures are; None takes it from the first model.
        is_haematoxylin: Nuclei are stained with it: pictures whose colours do not look so are said.

    Raises:
        CheckpointError: Members do not fit together.
        ConfigError: Views or scales that do not fit.
    """

    batch_size = 1

    def __init__(
        self,
        models: Sequence[OnnxModel],
        *,
        how: InferenceSettings | None = None,
        tta_spec: str | None = None,
        red_blue_swapped: bool | None = None,
        is_haematoxylin: bool = False,
    ) -> None:
        self.models = sorted(models, key=lambda model: model.sha256)
        self.record = self.models[0].record
        _check_alike([model.record for model in self.models])
        self.settings = how or InferenceSettings()
        self.is_plain = len(self.models) == 1 and how is None
        spec = self.settings.tta if tta_spec is None else tta_spec
        self.views = views.from_spec('none' if spec is None else spec)
        self.steps = _steps(self.record.resize, self.views.scales)
        swapped = self.record.red_blue_swapped
        self.red_blue_swapped = swapped if red_blue_swapped is None else red_blue_swapped
        self.cap = self.record.max_per_img if self.is_plain else 0
        self.identity: Mapping[str, JsonValue] = {
            'model_hashes': [model.sha256[:16] for model in self.models],
            'fusion': '' if self.is_plain else fusion.to_spec(self.settings.rule),
            'post': fusion.to_spec(self.settings.post),
            'mask_thr': self.settings.mask_cut,
            'tta': spec,
        }
        members: list[JsonValue] = [dict(model.record.member) for model in self.models]
        self.provenance: Mapping[str, JsonValue] = {'members': members}
        self.notes: Sequence[str] = []
        self.is_haematoxylin = is_haematoxylin
        self._name, self._cut = '', 0.0
        self._orders: list[float] = []

    def detect(self, pictures: Sequence[Picture], name: str) -> list[InstanceSet]:
        """Return the instances of each picture, without mask probabilities.

        Args:
            pictures: (h, w, 3) uint8 in the channel order of the files.
            name: Name of the image that they are of.
        """
        if name != self._name:
            self._name, self._cut, self._orders = name, 0.0, []
        found = [self._one(picture, name).without_probs() for picture in pictures]
        self.notes = [*notes_of_proposals(self._cut), *self._notes_of_colours()]
        return found

    def _notes_of_colours(self) -> list[str]:
        if not self._orders or float(np.median(self._orders)) > ODD_ORDER:
            return []
        word = 'normal' if self.red_blue_swapped else 'swapped'
        return [
            'its colours are not those of haematoxylin and eosin, but would be with red and blue '
            f'exchanged: if blood is blue in this file, predict it again with --red-blue {word}'
        ]

    def _look_at_colours(self, picture: Picture, found: InstanceSet) -> None:
        """Keep what the cells of a tile say of red and blue, while little is known."""
        sure = found[found.scores >= SURE]
        if not self.is_haematoxylin or len(sure) < LEAST_CELLS or len(self._orders) >= MAX_GAPS:
            return
        is_cell = np.zeros(found.image_hw, dtype=np.bool_)
        for crop, (row, column) in zip(*sure.crops(), strict=True):
            is_cell[row : row + crop.shape[0], column : column + crop.shape[1]] |= crop
        self._orders.append(red_is_first(picture, is_cell))

    def _one(self, picture: Picture, name: str) -> InstanceSet:
        if self.red_blue_swapped:
            picture = picture[..., ::-1]
        found = [self._views_of(model, picture, name) for model in self.models]
        cells = found[0]
        if not self.is_plain:
            cells = fusion.fuse(found, self.settings.rule, self.settings.post)
        self._look_at_colours(picture, cells)
        return cells

    def _views_of(self, model: OnnxModel, picture: Picture, name: str) -> InstanceSet:
        """Return what one model finds, in all views together."""
        cut_at = self.settings.mask_cut
        mask_thr = model.record.mask_thr if cut_at is None else cut_at
        sets = []
        for view in self.views.views:
            turned = view.turn(picture)
            for step in self.steps:
                found, cut = model.find(turned, name, step=step, mask_thr=mask_thr)
                self._cut = max(self._cut, cut)
                sets.append(views.map_back(found, view))
        if len(sets) == 1:
            return sets[0]
        post = fusion.post_from_spec(self.views.post)
        if not post.max_instances:
            post = replace(post, max_instances=model.record.max_per_img)
        rule = fusion.cut_at(fusion.from_spec(self.views.rule), mask_thr)
        return fusion.fuse(sets, rule, post)


def _steps(
    step: Mapping[str, Any] | None, scales: Sequence[float]
) -> list[Mapping[str, Any] | None]:
    """Return the resizing step at each scale."""
    if len(scales) == 1:
        return [step]
    if step is None or step['type'] not in views.RESIZES:
        raise ConfigError(
            'tta: scales need a Resize in the test pipeline; this model file has none; leave the '
            'scales out'
        )
    return [views.scaled(step, scale) for scale in scales]


def _check_alike(records: Sequence[ModelRecord]) -> None:
    first = records[0]
    for record in records[1:]:
        if record.class_names != first.class_names:
            raise CheckpointError(
                f'model files: one has the classes {", ".join(record.class_names)}, another '
                f'{", ".join(first.class_names)}; members must agree in names and order; leave one '
                'out'
            )
        if record.resize != first.resize or record.red_blue_swapped != first.red_blue_swapped:
            raise CheckpointError(
                'model files: two want their pictures prepared in different ways; models in one '
                'ensemble see one picture; predict with each by itself'
            )

"""The models of an ensemble: loaded strictly from their checkpoints, kept where there is room.

In: pairs of config and checkpoint. Out: models ready to predict, in an order that depends on their
content only. Invariant: a checkpoint fills its model completely, and nothing of it is left over.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from torch import nn

from cellseg_mm.core import files, trainings
from cellseg_mm.core.errors import CheckpointError, ConfigError, PredictionError
from cellseg_mm.data.config import DataSettings
from cellseg_mm.ensemble.members import Member, check_classes, in_order, trained_member
from cellseg_mm.weights.checkpoints import load_checkpoint_file

Placement = Literal['auto', 'device', 'turns']
PLACEMENTS = ('auto', 'device', 'turns')
# Share of the free device memory that weights may take; the rest is for activations, which are
# several times larger for an image of 800 x 1333 px.
WEIGHTS_SHARE = 0.5
SHOWN = 3


@dataclass(frozen=True, slots=True)
class MemberSource:
    """Where a member comes from.

    Attributes:
        cfg: Config that the checkpoint was trained with; its ``model`` is built.
        config_path: Where the config came from, for messages.
        checkpoint: The checkpoint.
        is_best: It was not named: it is the best of the config's work folder, and must be its.
    """

    cfg: Config
    config_path: str
    checkpoint: Path
    is_best: bool = False


@dataclass(frozen=True, slots=True)
class Loaded:
    """A member and its model, in evaluation mode on the CPU."""

    member: Member
    model: nn.Module


def load_members(
    sources: Sequence[MemberSource], class_names: Sequence[str], *, mask_thr: float | None = None
) -> list[Loaded]:
    """Load all members, sorted by the content of their checkpoints.

    Args:
        sources: One per member, any order.
        class_names: The classes that all must have.
        mask_thr: Least probability of a mask's pixel; None leaves each config's own.

    Raises:
        CheckpointError: A checkpoint cannot be read or does not fit its model, or is the best of a
            work folder and not its config's.
        PredictionError: A checkpoint has other classes, or is given twice.
    """
    loaded = [load_member(source, mask_thr=mask_thr) for source in sources]
    members = [item.member for item in loaded]
    order = in_order(members)
    check_classes(members, class_names)
    return [loaded[i] for i in order]


def load_member(source: MemberSource, *, mask_thr: float | None = None) -> Loaded:
    """Load one member; see :func:`load_members`."""
    content = load_checkpoint_file(source.checkpoint)
    model = MODELS.build(_model_settings(source.cfg, mask_thr))
    state = content.get('state_dict')
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f'{source.checkpoint}: has no state_dict; expected a checkpoint of a training; '
            'give the path of a best_*.pth'
        )
    fill_strictly(model, state, f'{source.checkpoint}: does not fit {source.config_path}')
    member = checkpoint_member(source.checkpoint, content)
    _check_whose(source, member, trainings.trained_record(content))
    return Loaded(member, model.eval())


def _check_whose(source: MemberSource, member: Member, trained: Mapping) -> None:
    """Refuse a checkpoint that says it was trained with another config than its own."""
    settings = source.cfg.to_dict()
    trainings.refuse_other_network(source.checkpoint, trained, settings)
    try:
        data = DataSettings.from_config(source.cfg, 'test_dataloader')
    except ConfigError:  # no data set of ours: it names nothing to compare with
        return
    if member.class_names and member.class_names != data.class_names:
        raise PredictionError(
            f'{member.source}: its classes are {", ".join(member.class_names)}, '
            f'{source.config_path} has {", ".join(data.class_names)}; names and order must be the '
            'same; give the config that it was trained with'
        )
    if not source.is_best:
        return
    fold = DataSettings.from_config(source.cfg).fold
    if None not in (member.fold, fold) and member.fold != fold:
        raise CheckpointError(
            f'{member.source}: was trained for fold {member.fold}, {source.config_path} is fold '
            f'{fold}; expected the best of its own training; take away what was copied here, or '
            'give the paths of checkpoints'
        )
    trainings.refuse_other_recipe(source.checkpoint, trained, settings)


def checkpoint_member(path: Path | str, content: Mapping) -> Member:
    """Read who a checkpoint is."""
    trained = content.get('meta', {}).get('cellseg') or {}
    best = content.get('message_hub', {}).get('runtime_info', {}).get('best_score')
    score = float(best) if isinstance(best, (int, float)) and best == best else None
    return trained_member(str(path), files.file_hash(path)[:16], trained, score=score)


def _model_settings(cfg: Config, mask_thr: float | None) -> ConfigDict:
    settings = copy.deepcopy(cfg.model)
    rcnn = settings.get('test_cfg', {}).get('rcnn')
    if rcnn is not None:
        # Averaging masks needs probabilities; heads that are not ours do not look at it.
        rcnn.keep_mask_probs = True
        if mask_thr is not None:
            rcnn.mask_thr_binary = mask_thr
    return settings


def fill_strictly(model: nn.Module, state: Mapping[str, torch.Tensor], where: str) -> None:
    """Load weights that must fit exactly.

    Raises:
        CheckpointError: Names or shapes differ; counts them and names the first.
    """
    wanted = model.state_dict()
    problems = {
        'missing in the file': sorted(wanted.keys() - state.keys()),
        'not in the model': sorted(state.keys() - wanted.keys()),
        'of another shape': sorted(
            name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape
        ),
    }
    found = [
        f'{len(names)} tensors {what} ({", ".join(names[:SHOWN])}{" ..." if names[SHOWN:] else ""})'
        for what, names in problems.items()
        if names
    ]
    if found:
        raise CheckpointError(
            f'{where}: {"; ".join(found)}; every tensor must fit; give the config that it was '
            'trained with'
        )
    model.load_state_dict(state, strict=True)


def check_same_pipeline(sources: Sequence[MemberSource]) -> None:
    """Refuse members that want their images prepared in different ways.

    Raises:
        ConfigError: Two configs have different test pipelines.
    """
    first = sources[0]
    for source in sources[1:]:
        if _pipeline(source.cfg) != _pipeline(first.cfg):
            raise ConfigError(
                f'{source.config_path}: its test pipeline differs from that of '
                f'{first.config_path}; models in one ensemble see one picture; predict with each '
                'model by itself and merge the prediction files'
            )


def _pipeline(cfg: Config) -> list:
    node = cfg.get('test_dataloader', {}).get('dataset', {})
    while isinstance(node, dict) and 'pipeline' not in node:
        node = node.get('dataset')
    return [dict(step) for step in (node or {}).get('pipeline', ())]


class MemberModels(nn.Module):
    """The members' models; one at a time computes.

    Args:
        loaded: Members and models.
        device: Where to compute.
        placement: ``device`` keeps all models there; ``turns`` brings each there only while it
            computes; ``auto`` decides by the free memory. Without a device of its own memory
            (a CPU) there is nothing to decide.

    Raises:
        ConfigError: Unknown ``placement``.
    """

    def __init__(
        self, loaded: Sequence[Loaded], device: torch.device | str, placement: Placement = 'auto'
    ) -> None:
        super().__init__()
        if placement not in PLACEMENTS:
            raise ConfigError(
                f'placement: found {placement!r}; expected one of {", ".join(PLACEMENTS)}'
            )
        self.members = tuple(item.member for item in loaded)
        self.device = torch.device(device)
        self.models = nn.ModuleList(item.model for item in loaded)
        self.takes_turns = placement == 'turns' or (placement == 'auto' and not self._fit())
        if not self.takes_turns:
            for model in self.models:
                model.to(self.device)
        elif placement == 'auto':
            print_log(
                f'{len(loaded)} members do not fit on {self.device} together: they take turns',
                'current',
            )

    def __len__(self) -> int:
        return len(self.members)

    def _fit(self) -> bool:
        if self.device.type != 'cuda':
            return True
        free, _ = torch.cuda.mem_get_info(self.device)
        return sum(map(weight_bytes, self.models)) <= WEIGHTS_SHARE * free

    @contextmanager
    def use(self, index: int) -> Iterator[nn.Module]:
        """Give a member's model on the device."""
        model = self.models[index]
        if not self.takes_turns:
            yield model
            return
        model.to(self.device)
        try:
            yield model
        finally:
            model.to('cpu')


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())

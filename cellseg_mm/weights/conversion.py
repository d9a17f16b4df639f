"""Mapping the tensors of a published Mask R-CNN to those of our model, strictly.

In: published names and arrays. Out: our names and tensors, compared with the real model (built on
torch's meta device), and an account of what was dropped, ignored and filled.
Invariant: no tensor of a file is passed over in silence; each is mapped, listed or an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mmdet.registry import MODELS
from torch import Tensor

from cellseg_mm.core.errors import CheckpointError
from cellseg_mm.weights.names import (
    BACKBONES,
    BASE_CONFIG,
    CAFFE,
    CLASS_LAYERS,
    COCO_IDS,
    COUNTER,
    FOREIGN,
    NEW_HEADS,
    REGNET,
    SOURCES,
    Preprocessing,
    WeightFamily,
)


@dataclass(frozen=True, slots=True)
class Conversion:
    """A converted model and the account of how it came about.

    Attributes:
        state_dict: Our names; float32 tensors and int64 counters.
        backbone: 'resnet50', 'resnet101' or 'regnetx_4.0gf'.
        n_classes: Classes whose rows were kept; 0 if the class-wise layers were dropped.
        dropped: Our names of the class-wise tensors that were left out.
        ignored: Names in the file that hold no weights.
        n_counters_filled: Batch counters the file lacked, set to 0 (unused at fixed momentum).
    """

    state_dict: dict[str, Tensor]
    source: str
    backbone: str
    preprocessing: Preprocessing
    n_classes: int
    dropped: tuple[str, ...]
    ignored: tuple[str, ...]
    n_counters_filled: int

    def summary(self) -> str:
        """Return the account in one line."""
        classes = f'{self.n_classes} classes kept' if self.n_classes else 'class-wise rows dropped'
        return (
            f'{len(self.state_dict)} tensors of a {self.backbone} from {self.source}: {classes}, '
            f'{len(self.dropped)} tensors dropped, {len(self.ignored)} without weights ignored, '
            f'{self.n_counters_filled} batch counters set to 0'
        )


def convert(
    tensors: Mapping[str, object],
    *,
    where: str,
    source: str = 'auto',
    keep_classes: Sequence[int] | None = None,
    keep_all_classes: bool = False,
    caffe: bool = False,
) -> Conversion:
    """Map a published model to ours, strictly: nothing missing, nothing left over.

    Args:
        tensors: Published names to arrays or tensors.
        where: What to call the file in errors.
        source: A key of ``SOURCES``, or 'auto' to tell by the names.
        keep_classes: For each class of the new model, the COCO class (0..79) it starts from.
        keep_all_classes: Keep every class of the file, in COCO's order.
        caffe: The file is an MMDetection model of caffe style (its names cannot tell).

    Raises:
        CheckpointError: Another architecture, unknown or missing names, wrong shapes, or a class
            that the file does not have.
    """
    tensors = {name: _to_tensor(value, where, name) for name, value in tensors.items()}
    source = _detect_source(tensors, where) if source == 'auto' else source
    family = SOURCES[source]
    ignored = tuple(n for n in tensors if any(re.fullmatch(p, n) for p in family.ignored))
    weights = {name: value for name, value in tensors.items() if name not in ignored}
    _refuse_foreign(weights, where)
    state = _rename(weights, family, where)
    backbone = _detect_backbone(state, where)
    dropped: tuple[str, ...] = ()
    n_classes = 0
    if keep_all_classes or keep_classes is not None:
        n_classes = _keep_rows(state, family, keep_classes, where)
    else:
        dropped = tuple(name for name in state if _is_classwise(name))
        if len(dropped) != 2 * len(CLASS_LAYERS):
            raise _mismatch(where, missing=sorted(_classwise_names() - set(dropped)))
        for name in dropped:
            del state[name]
    filled = _match_target(state, _target_shapes(backbone, n_classes), where)
    return Conversion(
        state_dict=state,
        source=source,
        backbone=BACKBONES[backbone][0],
        preprocessing=_preprocessing(family, backbone, caffe=caffe),
        n_classes=n_classes,
        dropped=dropped,
        ignored=ignored,
        n_counters_filled=filled,
    )


def _to_tensor(value: object, where: str, name: str) -> Tensor:
    if isinstance(value, np.ndarray):
        # astype copies, also to this machine's byte order: torch cannot share foreign memory
        value = torch.from_numpy(value.astype(value.dtype.newbyteorder('='), copy=True))
    if not isinstance(value, Tensor):
        raise CheckpointError(
            f'{where}: {name} is a {type(value).__name__}; every entry of the model was expected '
            'to be an array; check that it is the right file'
        )
    return value.float() if value.is_floating_point() else value.long()


def _detect_source(tensors: Mapping[str, Tensor], where: str) -> str:
    for key, family in SOURCES.items():
        if any(re.fullmatch(family.sign, name) for name in tensors):
            return key
    _refuse_foreign(tensors, where)
    raise CheckpointError(
        f'{where}: none of its {len(tensors)} names (first: {next(iter(tensors), "none")}) belongs '
        f'to a known model; {", ".join(f.title for f in SOURCES.values())} were expected; check '
        'the file'
    )


def _refuse_foreign(tensors: Mapping[str, Tensor], where: str) -> None:
    for pattern, what in FOREIGN:
        found = next((name for name in tensors if re.fullmatch(pattern, name)), None)
        if found:
            raise CheckpointError(
                f'{where}: wrong architecture: {found} says that this is {what}; a Mask R-CNN with '
                '2 RPN convolutions, 4conv1fc head and norm everywhere was expected; see '
                'docs/weights.md for the files that fit'
            )


def _compile(pattern: str) -> re.Pattern:
    groups = {'norm': 'weight|bias|running_mean|running_var|num_batches_tracked'}
    groups |= {'part': 'weight|bias', 'any': '.+'}
    pieces = re.split(r'\{(\w+)\}', pattern)
    text = ''.join(
        f'(?P<{piece}>{groups.get(piece, "[0-9]+")})' if i % 2 else re.escape(piece)
        for i, piece in enumerate(pieces)
    )
    return re.compile(text)


def _expand(template: str, match: re.Match) -> str:
    def value(found: re.Match) -> str:
        word, shift = found.groups()
        return str(int(match[word]) - int(shift)) if shift else match[word]

    return re.sub(r'\{(\w+)(?:-(\d))?\}', value, template)


def _rename(tensors: Mapping[str, Tensor], family: WeightFamily, where: str) -> dict[str, Tensor]:
    rules = [(_compile(pattern), template) for pattern, template in family.names]
    renamed: dict[str, Tensor] = {}
    left_over = []
    for name, tensor in tensors.items():
        found = ((template, rule.fullmatch(name)) for rule, template in rules)
        template, match = next((hit for hit in found if hit[1]), (None, None))
        if match is None:
            left_over.append(name)
            continue
        ours = _expand(template, match)
        if ours in renamed:
            raise CheckpointError(
                f'{where}: {name} and another tensor both map to {ours}; one name each was '
                'expected; the file mixes two models'
            )
        renamed[ours] = tensor
    if left_over:
        raise _mismatch(where, left_over=left_over)
    return renamed


def _mismatch(
    where: str,
    *,
    missing: Sequence[str] = (),
    left_over: Sequence[str] = (),
    shapes: Sequence[str] = (),
) -> CheckpointError:
    parts = []
    for what, names in (('missing', missing), ('left over', left_over), ('misshapen', shapes)):
        if names:
            more = f' and {len(names) - 5} more' if len(names) > 5 else ''
            parts.append(f'{len(names)} tensors {what}: {", ".join(names[:5])}{more}')
    return CheckpointError(
        f'{where}: {"; ".join(parts)}; exactly the tensors of our model were expected; check that '
        'it is a new_baselines file (docs/weights.md lists them)'
    )


def _detect_backbone(state: Mapping[str, Tensor], where: str) -> tuple[int, ...]:
    blocks: dict[int, set[int]] = {1: set(), 2: set(), 3: set(), 4: set()}
    for name in state:
        match = re.fullmatch(r'backbone\.layer([1-4])\.(\d+)\..*', name)
        if match:
            blocks[int(match[1])].add(int(match[2]))
    counts = tuple(len(found) for found in blocks.values())
    if counts not in BACKBONES:
        known = ', '.join(f'{b[0]} {key}' for key, b in BACKBONES.items())
        raise CheckpointError(
            f'{where}: backbone has {counts} blocks per stage; one of {known} was expected; the '
            'file is incomplete or another architecture'
        )
    return counts


def _is_classwise(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in NEW_HEADS)


def _classwise_names() -> set[str]:
    return {f'{layer}.{part}' for layer in CLASS_LAYERS for part in ('weight', 'bias')}


def _keep_rows(
    state: dict[str, Tensor], family: WeightFamily, keep: Sequence[int] | None, where: str
) -> int:
    """Cut and reorder the class-wise rows in place; background last. Return the class count."""
    missing = sorted(_classwise_names() - set(state))
    if missing:
        raise _mismatch(where, missing=missing)
    n_rows = len(state['roi_head.bbox_head.fc_cls.bias'])
    rows, background = tuple(range(n_rows - 1)), n_rows - 1
    if family.background_first:
        rows, background = tuple(range(1, n_rows)), 0
        if n_rows == 1 + 90:
            rows = COCO_IDS
    wrong = [k for k in keep or () if not 0 <= k < len(rows)]
    if wrong or (keep is not None and not len(keep)):
        raise CheckpointError(
            f'{where}: class {wrong[0] if wrong else "list is empty and"} cannot be kept; numbers '
            f'0..{len(rows) - 1} were expected, one for each class of the new model; correct '
            '--keep-classes'
        )
    chosen = rows if keep is None else tuple(rows[k] for k in keep)
    for layer, (per_class, has_background) in CLASS_LAYERS.items():
        first = [row * per_class for row in (*chosen, *((background,) if has_background else ()))]
        index = torch.tensor([row + i for row in first for i in range(per_class)])
        for part in ('weight', 'bias'):
            name = f'{layer}.{part}'
            if int(index.max()) >= len(state[name]):
                raise _mismatch(where, shapes=[f'{name} {tuple(state[name].shape)}'])
            state[name] = state[name][index].clone()
    return len(chosen)


def build_model_config(blocks: tuple[int, ...], n_classes: int) -> dict:
    """Return the config of our model with that backbone, with plain BN so that it builds anywhere.

    Args:
        blocks: Blocks per backbone stage, a key of the table of backbones.
        n_classes: Foreground classes.
    """
    from mmengine.config import ConfigDict
    from mmengine.hub import get_config

    _, settings, channels = BACKBONES[blocks]
    model = get_config(BASE_CONFIG).model.to_dict()
    norm = {'type': 'BN', 'requires_grad': True}
    if 'type' in settings:
        model['backbone'] = {
            **settings,
            'out_indices': (0, 1, 2, 3),
            'norm_eval': False,
            'style': 'pytorch',
        }
    model['backbone'] |= settings | {'norm_cfg': norm}
    model['neck'] |= {'norm_cfg': norm, 'in_channels': list(channels)}
    for head in ('bbox_head', 'mask_head'):
        model['roi_head'][head] |= {'norm_cfg': norm, 'num_classes': n_classes}
    model['data_preprocessor'].pop('batch_augments', None)
    return ConfigDict(model)


def _target_shapes(blocks: tuple[int, ...], n_classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of our model; without the class-wise layers where no class is kept."""
    import mmdet.models  # noqa: F401 (registers the parts)
    from mmengine.registry import DefaultScope

    with torch.device('meta'), DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(build_model_config(blocks, max(n_classes, 1)))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if not n_classes:
        shapes = {name: shape for name, shape in shapes.items() if not _is_classwise(name)}
    return shapes


def _match_target(state: dict[str, Tensor], target: Mapping[str, tuple], where: str) -> int:
    """Compare names and shapes; fill absent batch counters. Return how many were filled."""
    missing = [name for name in target if name not in state]
    counters = [name for name in missing if name.endswith(COUNTER)]
    missing = [name for name in missing if not name.endswith(COUNTER)]
    left_over = [name for name in state if name not in target]
    shapes = [
        f'{name} {tuple(state[name].shape)} instead of {target[name]}'
        for name in state
        if name in target and tuple(state[name].shape) != target[name]
    ]
    if missing or left_over or shapes:
        raise _mismatch(where, missing=missing, left_over=left_over, shapes=shapes)
    for name in counters:
        state[name] = torch.zeros((), dtype=torch.long)
    return len(counters)


def _preprocessing(family: WeightFamily, blocks: tuple[int, ...], *, caffe: bool) -> Preprocessing:
    if caffe:
        return CAFFE
    if family.preprocessing is CAFFE and BACKBONES[blocks][0].startswith('regnet'):
        return REGNET
    return family.preprocessing

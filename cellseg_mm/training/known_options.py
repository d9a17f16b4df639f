"""Options that nothing knows: misspelt ones, which mmengine takes without a word.

In: a config. Out: faults. Invariant: what is known is read from the code that takes the options
(signatures, and the keys that MMDetection's heads look up), not from a list.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator
from functools import cache

import mmcv.ops
import mmdet.registry
import mmengine.registry
from mmengine.config import Config
from mmengine.dist import init_dist
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import Registry
from mmengine.runner import (
    EpochBasedTrainLoop,
    IterBasedTrainLoop,
    LogProcessor,
    Runner,
    TestLoop,
    ValLoop,
)
from mmengine.utils.dl_utils import set_multi_processing
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader

from cellseg_mm.training.faults import READ_KEYS, Fault, nodes_of

# What builders take out of a dict before the constructor sees the rest, by the key it stands under.
TAKEN_BY_BUILDERS = {
    'norm_cfg': {'requires_grad'},
    'dcn': {'fallback_on_stride'},
    'conv_cfg': {'fallback_on_stride'},
    'init_cfg': {'override', 'layer'},
    'optim_wrapper': {'optimizer', 'paramwise_cfg', 'constructor'},
    'param_scheduler': {'convert_to_iter_based', 'epoch_length'},
    'default_hooks': {'priority'},
    'custom_hooks': {'priority'},
    'visualizer': {'name'},
    'train_cfg': {'by_epoch'},
}
EVERYWHERE = {'type', '_scope_', '_delete_'}
MODEL_PARTS = ('model.train_cfg', 'model.test_cfg')
NEVER_READ = {'debug'}  # stands in MMDetection's own configs
NMS = {'type', 'iou_threshold', 'class_agnostic', 'split_thr', 'max_num', 'score_threshold'}
NMS |= {'offset', 'sigma', 'min_score', 'method', 'max_per_img', 'nms_pre', 'score_thr'}
SHOWN = 12  # names in a sentence
WITHOUT_TYPE = {  # what mmengine builds where no type is given
    'optim_wrapper': (OptimWrapper,),
    'train_cfg': (IterBasedTrainLoop, EpochBasedTrainLoop),
    'val_cfg': (ValLoop,),
    'test_cfg': (TestLoop,),
    'log_processor': (LogProcessor,),
}
METAINFO = ('classes', 'palette')
CUTOFF = 0.75  # of difflib's likeness, for names that are meant
CUTOFF_OPEN = 0.85  # where other names may be right as well
READERS = ('mmdet', 'mmengine', 'mmcv', 'cellseg_mm')  # packages whose code looks options up


def option_faults(cfg: Config) -> Iterator[tuple[str, Fault]]:
    """Yield options that no code takes, at any depth, with their dotted paths."""
    content = {key: value for key, value in cfg.to_dict().items() if key in READ_KEYS}
    vocabulary = _looked_up_by(content)
    for path, node in nodes_of(content):
        known, is_open = _known(path, node, vocabulary)
        yield from _unknown(path, node, known, is_open=is_open)
        yield from _unknown_type(path, node)
    yield from _hook_names(content.get('default_hooks') or {})


def _known(path: str, node: dict, vocabulary: set[str]) -> tuple[Collection[str], bool]:
    """Return the keys that a dict may have, and whether others may be right as well."""
    keys = path.split('.')
    if path in _untyped():
        return _untyped()[path], False
    if keys[-1] == 'nms':
        return NMS, False
    if len(keys) > 1 and keys[-2] == 'custom_keys':
        return {'lr_mult', 'decay_mult'}, False
    if 'type' in node:
        return _of_type(keys, node['type'])
    if path.startswith(MODEL_PARTS):
        return vocabulary, len(keys) > 3  # parts of parts may be handed on whole
    if keys[-1] == 'metainfo':
        return METAINFO, True
    if path == 'env_cfg.dist_cfg':
        return names_of(init_dist)
    if path in WITHOUT_TYPE:
        names = (names_of(one)[0] for one in WITHOUT_TYPE[path])
        return TAKEN_BY_BUILDERS.get(path, set()).union(*names), False
    return (), True


def _of_type(keys: list[str], kind: object) -> tuple[Collection[str], bool]:
    found = [kind] if callable(kind) else _registered(str(kind))
    if not found:
        return (), True
    known = [names_of(one) for one in found]
    taken = TAKEN_BY_BUILDERS.get(keys[-1], set())
    if len(keys) <= 2:
        taken = taken | TAKEN_BY_BUILDERS.get(keys[0], set())
    return taken.union(*(names for names, _ in known)), any(is_open for _, is_open in known)


def _registered(kind: str) -> list[Callable[..., object]]:
    name = kind.split('.')[-1]  # without a scope
    found = [one.module_dict.get(name) for one in _registries()]
    found.append(getattr(mmcv.ops, name, None))  # RoIAlign of a roi_layer
    return [one for one in found if callable(one)]


@cache
def _registries() -> list[Registry]:
    """Return all registries, filled; asking one for what it lacks would search the disk."""
    values = [*vars(mmdet.registry).values(), *vars(mmengine.registry).values()]
    found = [one for one in values if isinstance(one, Registry)]
    for one in found:
        one.import_from_location()
    return found


@cache
def _untyped() -> dict[str, set[str]]:
    """Return the known keys of dicts that are not handed to one constructor, by their path."""
    loader = names_of(DataLoader)[0] | {'num_batch_per_epoch', 'batch_sampler'}
    clip = set(inspect.signature(clip_grad_norm_).parameters) | {'type'}
    return {
        'randomness': set(inspect.signature(Runner.set_randomness).parameters),
        'env_cfg': _strings_looked_up(Runner.setup_env),
        'env_cfg.mp_cfg': set(inspect.signature(set_multi_processing).parameters),
        'auto_scale_lr': {'base_batch_size', 'enable'},
        **{f'{name}_dataloader': loader for name in ('train', 'val', 'test')},
        'tta_model.tta_cfg': {'nms', 'max_per_img'},
        'optim_wrapper.clip_grad': clip | set(inspect.signature(clip_grad_value_).parameters),
        'optim_wrapper.paramwise_cfg': _strings_looked_up(DefaultOptimWrapperConstructor),
    }


@cache
def names_of(taker: Callable[..., object]) -> tuple[frozenset[str], bool]:
    """Return the options that a class or function takes, and whether it may know others.

    ``**kwargs`` are followed to the constructors of the bases as long as each hands them on. Where
    a constructor does nothing with them, what it does not name is read by nothing.
    """
    if not inspect.isclass(taker):
        parameters = inspect.signature(taker).parameters.values()
        return _named(parameters), any(p.kind is p.VAR_KEYWORD for p in parameters)
    found: frozenset[str] = frozenset()
    for owner in taker.__mro__:
        constructor = owner.__dict__.get('__init__')
        if constructor is None or owner is object:
            continue
        try:
            parameters = inspect.signature(constructor).parameters.values()
        except (TypeError, ValueError):  # one in C
            return found, True
        found |= _named(parameters)
        rest = [p.name for p in parameters if p.kind is p.VAR_KEYWORD]
        use, looked_up = _use_of(constructor, rest[0]) if rest else ('dropped', set())
        found |= looked_up
        if use != 'handed on':
            return found, use == 'used'
    return found, False


def _named(parameters: Collection[inspect.Parameter]) -> frozenset[str]:
    many = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return frozenset(p.name for p in parameters if p.kind not in many) - {'self'}


def _use_of(constructor: Callable[..., object], name: str) -> tuple[str, set[str]]:
    """Tell what becomes of ``**name``: ``dropped``, ``handed on`` to a base, or ``used``.

    Returns:
        Also the keys that the constructor looks up in it.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(constructor)))
    except (OSError, TypeError, SyntaxError):
        return 'used', set()
    n_uses = sum(isinstance(node, ast.Name) and node.id == name for node in ast.walk(tree))
    handed = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == '__init__'
        and any(k.arg is None and _is_name(k.value, name) for k in node.keywords)
    ]
    lookups = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ('get', 'pop')
        and _is_name(node.func.value, name)
    ]
    keys = set().union(*(_text(node.args[0]) for node in lookups))
    if n_uses > len(handed) + len(lookups):
        return 'used', keys
    return 'handed on' if handed else 'dropped', keys


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


# ---- keys that code looks up in a dict


def _looked_up_by(content: dict) -> set[str]:
    """Return every key that the classes of a model look up in something called ``...cfg``."""
    modules: set[str] = set()
    for _, node in nodes_of({'model': content.get('model')}):
        for one in _registered(str(node.get('type', ''))) if 'type' in node else ():
            modules |= {owner.__module__ for owner in getattr(one, '__mro__', ())}
    modules = {name for name in modules if name.split('.')[0] in READERS}
    for name in sorted(modules):  # mask targets and the like are functions of other modules
        values = vars(sys.modules[name]).values()
        functions = [value for value in values if inspect.isfunction(value)]
        modules |= {f.__module__ for f in functions if f.__module__.split('.')[0] in READERS}
    keys = set(NEVER_READ)
    for name in modules:
        keys |= _strings_looked_up(sys.modules[name])
    return keys


@cache
def _strings_looked_up(code: object) -> set[str]:
    """Return the keys that code reads from variables and attributes called ``...cfg``."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    keys = set()
    methods = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_cfg(node.value) and id(node) not in methods:
            keys.add(node.attr)
        if isinstance(node, ast.Subscript) and _is_cfg(node.value):
            keys |= _text(node.slice)
        if isinstance(node, ast.Compare) and _is_cfg(node.comparators[0]):
            keys |= _text(node.left)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            is_lookup = node.func.attr in ('get', 'pop') and _is_cfg(node.func.value)
            keys |= _text(node.args[0]) if is_lookup else set()
    return keys


def _is_cfg(node: ast.expr) -> bool:
    name = getattr(node, 'attr', getattr(node, 'id', ''))
    return str(name).endswith(('cfg', 'proposal'))


def _text(node: ast.expr) -> set[str]:
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return {node.value} if is_text else set()


# ---- sentences


def _unknown(
    path: str, node: dict, known: Collection[str], *, is_open: bool
) -> Iterator[tuple[str, Fault]]:
    kind = node.get('type', '')
    taker = getattr(kind, '__name__', kind) or path
    for key in node if known else ():
        if key in known or key in EVERYWHERE:
            continue
        cutoff = CUTOFF_OPEN if is_open else CUTOFF
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=cutoff)
        if near:
            text = f'did you mean {near[0]}? Correct the spelling'
        elif is_open:
            continue
        else:
            text = f'known are {", ".join(sorted(known)[:SHOWN])}; correct the spelling'
        where = f'{path}.{key}'
        # what code looks up was searched for, what a constructor takes is known for certain
        is_error = bool(near) or 'type' in node or not path.startswith(MODEL_PARTS)
        what = f'{where}: {taker} has no option {key}, so it would do nothing or fail'
        yield where, Fault(is_error, f'{what}; {text}')


def _unknown_type(path: str, node: dict) -> Iterator[tuple[str, Fault]]:
    """Yield a type that is not registered and is almost called like one that is."""
    kind = node.get('type')
    if not isinstance(kind, str) or path.split('.')[-1] == 'nms' or _registered(kind):
        return
    names = {name for one in _registries() for name in one.module_dict}
    near = difflib.get_close_matches(kind, names, n=1, cutoff=0.8)
    if near:
        text = f'there is no {kind}; did you mean {near[0]}? Correct the spelling'
        yield f'{path}.type', Fault(True, f'{path}.type: {text}')


def _hook_names(hooks: dict) -> Iterator[tuple[str, Fault]]:
    for name, hook in hooks.items():
        if isinstance(hook, dict) and 'type' not in hook:
            near = difflib.get_close_matches(name, set(hooks) - {name}, n=1, cutoff=CUTOFF)
            hint = f'did you mean {near[0]}?' if near else 'give its type'
            where = f'default_hooks.{name}'
            yield where, Fault(True, f'{where}: a new hook without a type; {hint}')

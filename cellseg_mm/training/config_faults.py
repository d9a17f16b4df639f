"""Settings that do nothing or contradict each other, found before anything is computed.

In: a config. Out: one sentence for each; an error where it is surely wrong. Invariant: every tool
that computes from a config asks here first, and so does the doctor.
"""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import print_log

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.data.config import dataset_settings
from cellseg_mm.training.config_variables import inherited_options, variable_faults
from cellseg_mm.training.faults import Fault, nodes_of
from cellseg_mm.training.known_options import option_faults

LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
HEADS = ('bbox_head', 'mask_head', 'semantic_head')
SHOWN = 10


def config_faults(cfg: Config, path: Path | str) -> Iterator[Fault]:
    """Yield everything in a config that does nothing or cannot be meant.

    Args:
        cfg: The config with all changes of the command line.
        path: Its file.
    """
    yield from variable_faults(cfg, Path(path))
    inherited: set[str] | None = None
    for where, fault in option_faults(cfg):
        inherited = inherited_options(Path(path)) if inherited is None else inherited
        if where not in inherited:
            yield fault
    yield from class_faults(cfg)
    yield from schedule_faults(cfg)


def refuse_faults(cfg: Config, path: Path | str) -> None:
    """Log what is odd in a config, once, and refuse what is wrong.

    Raises:
        ConfigError: With a sentence for each error.
    """
    found = list(config_faults(cfg, path))
    for fault in found:
        if not fault.is_error:
            _warn_once(fault.text)
    errors = [fault.text for fault in found if fault.is_error]
    if errors:
        more = f'\n... and {len(errors) - SHOWN} more' if len(errors) > SHOWN else ''
        raise ConfigError('\n'.join(errors[:SHOWN]) + more)


@cache
def _warn_once(text: str) -> None:
    """Log a warning; several folds of one recipe have the same."""
    print_log(text, 'current', level=logging.WARNING)


# ---- classes


def class_faults(cfg: Config) -> Iterator[Fault]:
    """Yield faults of class names, colours, and of heads that know another number of classes."""
    named: dict[tuple[str, ...], str] = {}
    for loader in (name for name in LOADERS if cfg.get(name)):
        try:
            metainfo = dataset_settings(cfg, loader).get('metainfo') or {}
        except ConfigError:
            continue  # not ours, or none: said where it is needed
        where = f'{loader}.dataset.metainfo'
        names = metainfo.get('classes')
        faults = list(_name_faults(names, where)) if names else []
        yield from faults
        if not names or faults:
            continue
        yield from _palette_faults(metainfo.get('palette'), len(names), where)
        named.setdefault(tuple(names), where)
    if len(named) > 1:
        (first, at), (second, other) = list(named.items())[:2]
        yield Fault(
            True,
            f'{other}: classes are {", ".join(second)}, those of {at} {", ".join(first)}; expected '
            'the same in each loader, since scores are by class; set all alike',
        )
    for names in list(named)[:1]:
        yield from _head_faults(cfg, names)


def _name_faults(names: object, where: str) -> Iterator[Fault]:
    if isinstance(names, str):
        yield Fault(
            True,
            f'{where}: classes is the text {names!r}, each letter of which would be a class; '
            f"expected a list of names; write ['{names}'], or ('{names}',) with the comma",
        )
        return
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        yield Fault(True, f'{where}: classes is {names!r}; expected a list of texts; correct it')
        return
    plain = [unicodedata.normalize('NFC', name).strip() for name in names]
    for name, clean in zip(names, plain, strict=True):
        if not clean or clean != unicodedata.normalize('NFC', name):
            yield Fault(
                True,
                f'{where}: class {name!r} is empty or has blanks around it, so that it would never '
                'equal the same name elsewhere; expected a plain name; remove the blanks',
            )
    twice = sorted(name for name, n in Counter(one.casefold() for one in plain).items() if n > 1)
    if twice:
        yield Fault(
            True,
            f'{where}: class {", ".join(twice)} occurs more than once (capitals aside); expected '
            'different names; rename or remove one',
        )


def _palette_faults(palette: object, n_classes: int, where: str) -> Iterator[Fault]:
    if not palette:
        return  # default colours for all: a choice
    is_list = isinstance(palette, list | tuple)
    if not is_list or not all(_is_rgb(colour) for colour in palette):
        yield Fault(
            True,
            f'{where}: palette is {str(palette)[:80]}; expected a list with three numbers of 0 to '
            '255 for each class, such as [(0, 114, 178)]; correct it',
        )
    elif len(palette) != n_classes:
        what = 'default colours for the rest' if len(palette) < n_classes else 'the rest is unused'
        yield Fault(
            False,
            f'{where}: palette has {len(palette)} colours for {n_classes} classes; expected as '
            f'many; {what}; add or remove colours',
        )
    elif len({tuple(colour) for colour in palette}) < n_classes:
        yield Fault(False, f'{where}: two classes have one colour; expected different ones')


def _is_rgb(colour: object) -> bool:
    return (
        isinstance(colour, list | tuple)
        and len(colour) == 3
        and all(isinstance(v, int) and 0 <= v <= 255 for v in colour)
    )


def _head_faults(cfg: Config, names: tuple[str, ...]) -> Iterator[Fault]:
    for path, node in nodes_of({'model': cfg.get('model')}):
        n_classes = node.get('num_classes')
        is_head = any(part in HEADS for part in path.split('.')) or path == 'model.bbox_head'
        if is_head and isinstance(n_classes, int) and n_classes != len(names):
            yield Fault(
                True,
                f'{path}.num_classes={n_classes}: the data set names {len(names)} classes '
                f'({", ".join(names)}); expected as many; set it in every head',
            )


# ---- schedules


def schedule_faults(cfg: Config) -> Iterator[Fault]:
    """Yield schedules that do not fit the training's length."""
    loop = cfg.get('train_cfg') or {}
    length = loop.get('max_iters') or loop.get('max_epochs')
    if not isinstance(length, int):
        return
    by_epoch = 'max_iters' not in loop
    schedulers = cfg.get('param_scheduler') or []
    schedulers = [schedulers] if isinstance(schedulers, Mapping) else schedulers
    own = [one for one in schedulers if bool(one.get('by_epoch', True)) == by_epoch]
    unit = 'epoch' if by_epoch else 'iteration'
    setting = f'train_cfg.{"max_epochs" if by_epoch else "max_iters"}'
    for number, one in enumerate(schedulers):
        where = f'param_scheduler.{number} ({one.get("type")})'
        if one not in own and not by_epoch and not one.get('convert_to_iter_based'):
            yield Fault(
                False,
                f'{where}: counts epochs, training counts iterations; expected by_epoch=False; set '
                'it, or the rate changes at other times than meant',
            )
        elif one in own:
            yield from _one_schedule(one, where, length, unit, setting)
    last = max((int(one.get('end') or 0) for one in own), default=0)
    if last and last != length and not any(one.get('end', 0) is None for one in own):
        yield Fault(
            False,
            f'param_scheduler: the schedulers end at {last}, training at {setting} {length}; '
            f'expected the same; change param_scheduler (end, T_max) together with {setting}',
        )


def _one_schedule(
    one: Mapping[str, object], where: str, length: int, unit: str, setting: str
) -> Iterator[Fault]:
    begin, end = int(one.get('begin') or 0), one.get('end')
    if begin >= length:
        text = f'begins at {unit} {begin}, after training ends at {length}; it does nothing'
        yield Fault(False, f'{where}: {text}; expected it earlier; change begin or {setting}')
        return
    kind, factor = str(one.get('type')), one.get('start_factor', 1 / 3)
    is_warm_up = kind in ('LinearLR', 'ConstantLR') and factor != 1 and begin == 0
    if is_warm_up and isinstance(end, int) and end >= length and one.get('end_factor', 1) == 1:
        yield Fault(
            False,
            f'{where}: the warm-up lasts to {unit} {end}, training ends at {length}, so the full '
            f'rate is never reached; expected a short part of it; lower end or raise {setting}',
        )
    t_max = one.get('T_max')
    if isinstance(t_max, int) and isinstance(end, int) and t_max not in (end, end - begin):
        yield Fault(
            False,
            f'{where}: T_max is {t_max}, but it runs {end - begin} {unit}s; the rate would not be '
            'at its floor at the end; expected the same; set both alike',
        )
    late = [at for at in one.get('milestones') or () if isinstance(at, int) and at >= length]
    if late:
        text = f'milestones {late} are after training ends at {length}'
        yield Fault(False, f'{where}: {text}; expected them earlier; change them or {setting}')

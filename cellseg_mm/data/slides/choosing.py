"""What is read of an image whose axes are known by name, and what to say where a reader is absent.

In: the sizes of the axes and a :class:`Choice`. Out: :class:`Picked`. Invariant: as for TIFFs, what
the file does not decide is chosen or refused, never guessed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from cellseg_mm.core.errors import ConfigError, ImageError
from cellseg_mm.data.contents import MAX_LISTED, Choice

AXES = {'z': 'planes in depth', 't': 'moments in time'}


@dataclass(frozen=True, slots=True)
class Picked:
    """What is read.

    Attributes:
        at: Index on the axes ``z`` and ``t``.
        channels: One channel for grey, or three for red, green and blue.
        says: What was chosen of several, for people; empty where there was nothing to choose.
    """

    at: Mapping[str, int]
    channels: tuple[int, ...]
    says: tuple[str, ...]


def pick(path: Path, sizes: Mapping[str, int], names: Sequence[str], choice: Choice) -> Picked:
    """Decide which plane and channels are read.

    Args:
        path: For messages.
        sizes: Of the axes ``z``, ``t`` and ``c``; an axis that is not there counts as 1.
        names: Of the channels; may be empty.
        choice: What was chosen.

    Raises:
        ImageError: The image has several planes and none was chosen.
        ConfigError: There is no such plane or channel.
    """
    at = {axis: _plane(path, axis, sizes.get(axis, 1), getattr(choice, axis)) for axis in AXES}
    n = sizes.get('c', 1)
    channels = choice.channels or ((0, 1, 2) if n == 3 else (0,))
    if max(channels) >= n:
        raise ConfigError(
            f'{path}: has no channel {max(channels)}; it has {n}; choose --channels from 0 to '
            f'{n - 1}'
        )
    if not choice.channels and n not in (1, 3):
        listed = ', '.join(f'{k} {name}' for k, name in enumerate(names[:MAX_LISTED]))
        raise ImageError(
            f'{path}: {n} channels{f" ({listed})" if listed else ""}; expected RGB or grey; choose '
            f'them (predict.py has --channels, of 0 to {n - 1}: one for grey, or three).'
        )
    says = [f'{axis} {at[axis]} of {sizes[axis]}' for axis in AXES if sizes.get(axis, 1) > 1]
    if n > 1:
        many = 's' * (len(channels) > 1)
        known = [f'{k} ({names[k]})' if k < len(names) else str(k) for k in channels]
        what = 'grey' if len(channels) == 1 else 'red, green and blue'
        says.append(f'channel{many} {", ".join(known)} of {n} as {what}')
    return Picked(at, channels, tuple(says))


def _plane(path: Path, axis: str, n: int, wanted: int | None) -> int:
    if wanted is None and n > 1:
        raise ImageError(
            f'{path}: holds {n} {AXES[axis]}; expected one, or a choice (predict.py has --{axis} '
            f'0 to {n - 1}).'
        )
    if wanted is not None and wanted >= n:
        raise ConfigError(
            f'{path}: has no {axis} {wanted}; it has {n}; choose --{axis} from 0 to {n - 1}'
        )
    return wanted or 0


def pick_image(path: Path, names: Sequence[str], choice: Choice) -> int:
    """Return the number of the image that is read, of those that a file lists.

    Raises:
        ImageError: There are several, or none, and none was chosen.
        ConfigError: There is no such image.
    """
    n = len(names)
    listed = '; '.join(f'{k}: {name}' for k, name in enumerate(names[:MAX_LISTED]))
    listed += f'; and {n - MAX_LISTED} more' if n > MAX_LISTED else ''
    if choice.image is None and n != 1:
        raise ImageError(
            f'{path}: holds {n} images ({listed}); expected one, or a choice (predict.py has '
            f'--image 0 to {n - 1}).'
        )
    if choice.image is not None and choice.image >= n:
        raise ConfigError(
            f'{path}: has no image {choice.image}; it holds {n} ({listed}); choose --image from '
            f'0 to {n - 1}'
        )
    return choice.image or 0


def package(path: Path, what: str, module: str, extra: str) -> ModuleType:
    """Import a package that only some files need.

    Raises:
        ImageError: It is not installed; the message names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as problem:  # OSError: its shared library is missing
        raise ImageError(
            f'{path}: is {what}, which the package {module} reads, and that cannot be imported '
            f"({str(problem)[:80]}); expected it; pip install 'cellseg-mm[{extra}]', or save the "
            'image as a tiled TIFF.'
        ) from problem


@contextmanager
def in_a_sentence(path: Path, what: str) -> Iterator[None]:
    """Say what is wrong where a library meets damaged bytes with whatever it trips over."""
    try:
        yield
    except (ImageError, ConfigError):
        raise
    except Exception as problem:
        reason = ' '.join(str(problem).split())[:160] or type(problem).__name__
        raise ImageError(
            f'{path}: is damaged, not complete or of another kind ({reason}); expected {what}, '
            'whole; copy it again with all files that belong to it.'
        ) from problem

"""How names of classes in a source become class numbers.

In: options, and the names that the source has. Out: :class:`Classes`.
Invariant: names are compared without outer blanks and in one Unicode form (NFC), exactly first;
where only capitals differ the nearest is taken and said; a name that means nothing is an error.
"""

from __future__ import annotations

import difflib
import math
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cellseg_mm.core.errors import CellSegError, LabelMapError
from cellseg_mm.data.importing.sources import ImportParams, composed

UNNAMED = ''  # the name of a cell that the source gives none


def clean(name: str) -> str:
    """Return a name as names are compared: one Unicode form, no outer blanks."""
    return composed(name).strip()


@dataclass(frozen=True, slots=True)
class Classes:
    """Class numbers of the names in a source.

    Attributes:
        names: Name of class 1, 2, ...
        number_of: Name in the source -> class number, or 0 for names to leave out.
        quiet: Names whose capitals the format itself writes in another way.
        remarks: Sentences about names that differ only in capitals, in order.
    """

    names: tuple[str, ...]
    number_of: Mapping[str, int]
    quiet: frozenset[str] = frozenset()
    remarks: dict[str, None] = field(default_factory=dict)

    def number(self, name: str, source: Path) -> int:
        """Return the class number of a name in the source, 0 if it is to be left out.

        Raises:
            LabelMapError: The name is neither known nor skipped.
        """
        name = clean(name)
        if name in self.number_of:
            return self.number_of[name]
        alike = [known for known in self.number_of if known.casefold() == name.casefold()]
        numbers = {self.number_of[known] for known in alike}
        if len(numbers) > 1:
            raise LabelMapError(
                f'{source}: has cells of class {name!r}, which differs only in capitals from '
                f'{" and ".join(alike)}; expected one of them; add {_map_words(name, alike[0])}'
            )
        if not alike:
            raise LabelMapError(f'{source}: {self._unknown(name)}')
        if name.casefold() not in self.quiet:
            self.remarks[f'class {name!r} is taken as {alike[0]!r}: only capitals differ'] = None
        return numbers.pop()

    def _unknown(self, name: str) -> str:
        expected = ', '.join(self.names)
        if name == UNNAMED:
            return (
                f'has cells without a class name; expected a class for them (now: {expected}); '
                f'name it with --class NAME, or leave them out with --skip ""'
            )
        near = nearest(name, self.names)
        hint = f' (nearest: {near})' if near else ''
        target = near or self.names[0]
        return (
            f'has cells of class {name!r}; expected {expected}{hint}; import them with '
            f'{_map_words(name, target)} (or another class), or leave them out with '
            f'--skip {shlex.quote(name)}'
        )


def _map_words(name: str, target: str) -> str:
    return f'--map {shlex.quote(f"{name}={target}")}'


def nearest(name: str, known: Collection[str]) -> str:
    """Return the known name that is most alike, capitals aside; '' if none is."""
    by_fold = {one.casefold(): one for one in known}
    found = difflib.get_close_matches(name.casefold(), by_fold, n=1)
    return by_fold[found[0]] if found else ''


def build_classes(
    params: ImportParams,
    own: Sequence[str],
    *,
    found: Collection[str] = (),
    left_out: Sequence[str] = (),
    is_fixed: bool = True,
) -> Classes:
    """Combine the options with a format's own class names.

    Args:
        params: The options; ``class_names`` replace ``own``.
        own: The format's own classes.
        found: The names that the source has, '' for cells without one; empty if nobody looked.
        left_out: Names that the format itself leaves out.
        is_fixed: Own classes keep their numbers when they are skipped or mapped away. Otherwise
            they vanish, and classes that names are mapped to take their place.

    Raises:
        CellSegError: Classes are equal, or an option names what is not there.
    """
    found = list(dict.fromkeys(map(clean, found)))
    known = list(dict.fromkeys([*found, *map(clean, own), *map(clean, left_out)]))
    remarks: dict[str, None] = {}
    skipped = {
        spelling
        for name in sorted(params.skipped)
        for spelling in _spellings('--skip', name, found, known, remarks)
    }
    targets = {}
    for name, target in params.class_map.items():
        for spelling in _spellings('--map', name, found, known, remarks):
            if spelling in skipped:
                raise CellSegError(
                    f'--map and --skip both name {spelling!r}; expected one of them; remove one'
                )
            targets[spelling] = clean(target)
    names = [clean(name) for name in params.class_names or own]
    if not (is_fixed or params.class_names):
        kept = [targets.get(name, name) for name in names if name not in skipped]
        names = list(dict.fromkeys(kept))
    _require_different(names)
    number_of = {name: k for k, name in enumerate(names, start=1)}
    for spelling, target in targets.items():
        option = f'--map {shlex.quote(f"{spelling}={target}")}'
        number_of[spelling] = names.index(_one_of(option, target, names, remarks)) + 1
    number_of |= dict.fromkeys(skipped, 0)
    folded = {name.casefold() for name in number_of}
    number_of |= {clean(n): 0 for n in left_out if clean(n).casefold() not in folded}
    if UNNAMED not in number_of:
        number_of |= _unnamed(params, names, found, remarks)
    quiet = frozenset(clean(name).casefold() for name in (*own, *left_out)) if is_fixed else ()
    return Classes(tuple(names), number_of, frozenset(quiet), remarks)


def classes_found(
    params: ImportParams, names: Iterable[str], left_out: Sequence[str] = ()
) -> Classes:
    """Return the classes of a source without a list of them: the names that its cells have.

    Args:
        params: The options; cells without a name are of ``single_class``.
        names: Of all cells, '' for none; repeated as they are. Without any name the class is
            ``cell``.
        left_out: Names that the format itself leaves out.

    Returns:
        Classes by rising number where names are numbers, else by name.

    Raises:
        CellSegError: An option names what is not there.
    """
    found = sorted(set(map(clean, names)), key=lambda name: (_number(name), name))
    own = [name for name in found if name != UNNAMED and name not in left_out]
    single = clean(params.single_class) or ('' if own else 'cell')
    if single and UNNAMED in (found or [UNNAMED]) and single not in own:
        own.append(single)
    return build_classes(params, own, found=found, left_out=left_out, is_fixed=False)


def _number(name: str) -> float:
    return int(name) if name.isascii() and name.isdecimal() else math.inf


def _unnamed(
    params: ImportParams, names: list[str], found: list[str], remarks: dict[str, None]
) -> dict[str, int]:
    """Return the class of cells without a name, if the options tell."""
    if params.single_class:
        if found and UNNAMED not in found:
            raise CellSegError(
                f'--class {params.single_class}: all cells of the source have a class name '
                f'({", ".join(found)}); expected cells without one; join classes with --map '
                f'SOURCE=CLASS'
            )
        name = _one_of('--class', clean(params.single_class), names, remarks)
        return {UNNAMED: names.index(name) + 1}
    is_only = len(names) == 1 and (params.class_names or found == [UNNAMED])
    return {UNNAMED: 1} if is_only else {}


def _spellings(
    option: str, name: str, found: list[str], known: list[str], remarks: dict[str, None]
) -> list[str]:
    """Return how the source writes a name that an option gives.

    Raises:
        CellSegError: The source has no such name.
    """
    name = clean(name)
    if name in found or not found:
        return [name]
    alike = [one for one in known if one.casefold() == name.casefold()]
    for one in alike:
        if one != name and name not in known:
            remarks[f'{option} {name} is taken as {one!r}: only capitals differ'] = None
    if alike:
        return alike
    if found == [UNNAMED]:
        raise CellSegError(
            f'{option} {name!r}: the source has no class names; expected no such option; name the '
            f'class of all cells with --class'
        )
    near = nearest(name, found)
    hint = f' (nearest: {near})' if near else ''
    raise CellSegError(
        f'{option}: the source has no class {name!r}; expected one of '
        f'{", ".join(one or repr(one) for one in found)}{hint}; correct the name'
    )


def _one_of(option: str, name: str, names: Sequence[str], remarks: dict[str, None]) -> str:
    if name in names:
        return name
    for one in names:
        if one.casefold() == name.casefold():
            remarks[f'{option}: {name!r} is taken as {one!r}: only capitals differ'] = None
            return one
    near = nearest(name, names)
    hint = f' (nearest: {near})' if near else ''
    raise CellSegError(
        f'{option}: class {name!r} is none of {", ".join(names)}{hint}; expected one of them; '
        f'correct it, or list it in --classes'
    )


def _require_different(names: Sequence[str]) -> None:
    if not names or not all(names):
        raise CellSegError(
            f'the classes are {list(names)}; expected one name or more, none empty; name them with '
            f'--classes, and cells without a name with --class'
        )
    repeated = [name for name, n in Counter(map(str.casefold, names)).items() if n > 1]
    if repeated:
        same = [name for name in names if name.casefold() == repeated[0]]
        raise CellSegError(
            f'the classes {" and ".join(same)} must differ, also without capitals; correct '
            f'--classes, or join them: --classes {shlex.quote(same[0])}'
        )

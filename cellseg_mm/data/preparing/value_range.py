"""One range of values for all images of a data folder, decided once and then kept.

In: what each image needs by itself, what is recorded, what was asked for. Out: the range, a line
that says it, and warnings. Invariant: images of up to 8 bits have no part in it and no need of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cellseg_mm.data.cases import Case
from cellseg_mm.data.intensity import (
    CHANGED,
    CLIPPED,
    DIM_SHARE,
    OF_ANOTHER_SCALE,
    ValueRange,
    collection_range,
)
from cellseg_mm.data.preparing.case_checks import CaseFacts, Finding

KEEP, AUTO = 'keep', 'auto'


@dataclass(frozen=True, slots=True)
class Chosen:
    """The range of a collection.

    Attributes:
        value_range: What becomes 0 and 255.
        text: One line about it.
        warnings: See ``case_checks.Finding``.
    """

    value_range: ValueRange
    text: str
    warnings: tuple[Finding, ...]


def choose(
    cases: Sequence[Case],
    facts: Sequence[CaseFacts],
    *,
    asked: str = KEEP,
    recorded: ValueRange | None = None,
) -> Chosen | None:
    """Choose one range for all images of a collection.

    Args:
        cases: Training cases and test images.
        facts: Theirs, in the same order.
        asked: ``keep`` what is recorded and decide only where nothing is, ``auto`` decides anew,
            ``LOW,HIGH`` is taken.
        recorded: The range of an earlier run.

    Returns:
        None where no image has more than 8 bits.

    Raises:
        ConfigError: ``asked`` is none of these.
    """
    given = ValueRange.from_text(asked) if asked not in (KEEP, AUTO) else None
    wide = [
        (case.image_path, one.value_high)
        for case, one in zip(cases, facts, strict=True)
        if one.value_high
    ]
    if not wide:
        return None
    of_data = collection_range([high for _, high in wide])
    chosen, how = of_data, f'all but one in {CLIPPED} of their pixels stay within'
    if given is not None:
        chosen, how = given, 'as --range says'
    elif recorded is not None and asked == KEEP:
        chosen, how = recorded, 'as recorded before'
    text = (
        f'range of values: {len(wide)} of {len(facts)} images have more than 8 bits; their values '
        f'{chosen} become 0..255 ({how}).'
    )
    warnings = [*_odd_ones(wide, chosen), *_changed(cases, chosen, of_data)]
    return Chosen(chosen, text, tuple(warnings))


def unused(folds_path: Path, asked: str) -> tuple[Finding, ...]:
    """Say that a range that was asked for has no effect on images of up to 8 bits."""
    if asked == KEEP:
        return ()
    text = f'{folds_path.parent}: --range {asked} had no effect: no image has more than 8 bits.'
    return (Finding('range of values', 1, text),)


def _odd_ones(wide: Sequence[tuple[Path, float]], chosen: ValueRange) -> list[Finding]:
    found = []
    for path, high in wide:
        if high < chosen.low + DIM_SHARE * (chosen.high - chosen.low):
            text = (
                f'{path}: its values, up to {high:g}, use less than a tenth of the range {chosen}, '
                'so the 8-bit image is nearly black; rescale it, or choose another --range.'
            )
            found.append(Finding('dim image', 1, text))
        elif high > OF_ANOTHER_SCALE * chosen.high:
            text = (
                f'{path}: its values, up to {high:g}, are far above the range {chosen} of the '
                'others, so the 8-bit image is mostly white; rescale it, or choose another --range.'
            )
            found.append(Finding('image of another scale', 1, text))
    return found


def _changed(cases: Sequence[Case], chosen: ValueRange, of_data: ValueRange) -> list[Finding]:
    ratio = of_data.high / chosen.high if chosen.high > 0 else float('inf')
    if 1 / CHANGED <= ratio <= CHANGED:
        return []
    text = (
        f'{cases[0].image_path.parents[1]}: the images alone would give the range {of_data}, '
        f'{chosen} holds, because models may have been trained with it; --range auto takes the '
        'other.'
    )
    return [Finding('range of values', 1, text)]

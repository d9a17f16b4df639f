"""What happened while images were predicted, in sentences.

In: counts and messages, image by image. Out: text for a terminal, and an exit status.
Invariant: an image is in one of predicted, rewritten, skipped and failed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cellseg_mm.data.intensity import ValueRange
from cellseg_mm.predict.scaling import scale_text


@dataclass(slots=True)
class Summary:
    """What happened; grows while the images are predicted.

    Attributes:
        predicted: Names of images that the detector looked at.
        rewritten: Names of images whose instances were there, and only formats were written.
        skipped: Names of images that were done.
        failed: Message by name.
        notes: Things that a person should know, by name.
        asides: Things that a person should know of the whole run.
        ranges: What became 0 and 255 of images with more than 8 bits, by name.
        n_empty: Cells without a pixel, which were dropped, by name.
        n_cells: Instances of the predicted and rewritten images, of any score.
        n_below: Those of them below the formats' least score.
        n_shown: Those of them in the formats; the rest is covered by better ones.
        score_thr: The formats' least score.
        value_range: What was asked to become 0 and 255; None decides by each file.
        range_from: Where it comes from.
        scales: How each predicted image was scaled, see ``scaling.Grid.says``.
        n_scaled: How many were looked at in other pixels than their own.
        n_tiles: Tiles of larger images that were looked at.
        n_kept: Tiles that were there from before, or from other processes.
        seconds: Time of all, and within the detector.
        seconds_looking: Time within the detector.
    """

    predicted: list[str] = field(default_factory=list)
    rewritten: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    asides: list[str] = field(default_factory=list)
    ranges: dict[str, ValueRange] = field(default_factory=dict)
    n_empty: dict[str, int] = field(default_factory=dict)
    n_cells: int = 0
    n_below: int = 0
    n_shown: int = 0
    score_thr: float = 0.0
    value_range: ValueRange | None = None
    range_from: str = ''
    scales: list[str] = field(default_factory=list)
    n_scaled: int = 0
    n_tiles: int = 0
    n_kept: int = 0
    seconds: float = 0.0
    seconds_looking: float = 0.0

    def add(self, other: Summary) -> None:
        """Take in what happened in another process of the same run."""
        self.score_thr = other.score_thr
        self.value_range, self.range_from = other.value_range, other.range_from
        for name in ('predicted', 'rewritten', 'skipped', 'scales'):
            getattr(self, name).extend(getattr(other, name))
        for name in ('failed', 'notes', 'ranges', 'n_empty'):
            getattr(self, name).update(getattr(other, name))
        numbers = ('n_cells', 'n_below', 'n_shown', 'n_scaled', 'n_tiles', 'n_kept')
        for name in (*numbers, 'seconds', 'seconds_looking'):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def exit_code(self) -> int:
        """1 when an image failed, else 0."""
        return int(bool(self.failed))

    def _cells(self) -> str:
        n_covered = self.n_cells - self.n_below - self.n_shown
        rest = [
            f'{n} {why}'
            for n, why in (
                (self.n_below, f'below the score {self.score_thr:g}'),
                (n_covered, 'that better ones cover'),
            )
            if n
        ]
        note = f' (and {", ".join(rest)}, in the npz only)' if rest else ''
        return f'{self.n_shown} cells{note}'

    def describe(self) -> str:
        """Return sentences for a terminal."""
        parts = [f'{len(self.predicted)} images predicted, {self._cells()}']
        if self.rewritten:
            parts.append(f'{len(self.rewritten)} had their formats written anew')
        if self.skipped:
            parts.append(f'{len(self.skipped)} were done already')
        lines = ['; '.join(parts) + '.', *self.asides]
        lines += filter(None, [scale_text(self.scales, self.n_scaled), self._tiles_text()])
        if self.n_empty:
            n = sum(self.n_empty.values())
            lines.append(f'{n} cells without a pixel were dropped, in {len(self.n_empty)} images')
        lines += [f'  {name}: {note}' for name, note in self.notes.items()]
        if self.failed:
            lines.append(f'{len(self.failed)} failed:')
            lines += [f'  {message}' for message in self.failed.values()]
        return '\n'.join(lines)

    def range_texts(self) -> list[str]:
        """Say how values of more than 8 bits became 8."""
        ranges = list(self.ranges.values())
        wide = f'{len(ranges)} images have more than 8 bits: '
        if self.value_range is not None:
            if ranges:
                return [f'{wide}their values {self.value_range} became 0..255 ({self.range_from})']
            if self.predicted:
                return [
                    f'the range {self.value_range} ({self.range_from}) was not needed: no image '
                    'that was predicted has more than 8 bits'
                ]
        if ranges:
            highs = sorted(found.high for found in ranges)
            each = f'0..{highs[0]:.6g}' + (
                f' to 0..{highs[-1]:.6g}' if highs[0] < highs[-1] else ''
            )
            return [
                f'{wide}the values of each became 0..255 by its own range ({each}, what all but a '
                'thousandth of the pixels stay within); --range LOW,HIGH takes one for all'
            ]
        return []

    def _tiles_text(self) -> str:
        if not self.n_tiles + self.n_kept:
            return ''
        kept = f', {self.n_kept} were there' if self.n_kept else ''
        share = self.seconds_looking / max(self.seconds, 1e-9)
        return (
            f'{self.n_tiles} tiles of larger images were looked at{kept}; the model took '
            f'{share:.0%} of {self.seconds:.0f} s'
        )

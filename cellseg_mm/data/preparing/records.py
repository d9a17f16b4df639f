"""What preparing is told and what it answers.

In and out: two records. Invariant: validated when made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cellseg_mm.core.errors import ConfigError, DataError
from cellseg_mm.data.config import CLASS_NAMES
from cellseg_mm.data.folds import ORIGINAL_SEED, Folds, Method
from cellseg_mm.data.intensity import ValueRange
from cellseg_mm.data.pixel_size import Um, stated
from cellseg_mm.data.preparing.case_checks import CaseFacts, Finding
from cellseg_mm.data.preparing.groups import GroupRule
from cellseg_mm.data.preparing.value_range import AUTO, KEEP, Chosen
from cellseg_mm.data.tiff import DEFAULT_MAX_PIXELS


@dataclass(frozen=True, slots=True)
class PrepareParams:
    """Settings of :func:`prepare`.

    Attributes:
        class_names: In the order of ``class1.tif``, ``class2.tif``, ...
        out_dir: Where the results go; None means the data folder.
        exclude_file: See ``cases.find_cases``; the folds file records what it lists.
        groups: See :class:`GroupRule`.
        n_folds: Number of folds.
        seed: Seed of the folds.
        method: See ``folds.make_folds``.
        new_folds: Whether an existing folds file that differs may be replaced.
        extend_folds: Whether cases that an existing folds file does not know are added to it.
        n_workers: Processes; 0 means one per core, at most 8.
        max_pixels: Most pixels of an image that are accepted.
        value_range: ``keep`` what is recorded, ``auto`` for a new look at all images, or
            ``LOW,HIGH``; see ``value_range.choose``.
        um_per_px: Side of a pixel in micrometres, of data whose files do not say it; None records
            what they say.
        use_index: Whether facts of unchanged files are taken from ``index.json``.
        with_folds: Whether folds are made; else groups are found and nothing more.
    """

    class_names: tuple[str, ...] = CLASS_NAMES
    out_dir: Path | None = None
    exclude_file: Path | None = None
    groups: GroupRule = field(default_factory=GroupRule)
    n_folds: int = 5
    seed: int = ORIGINAL_SEED
    method: Method = 'grouped'
    new_folds: bool = False
    extend_folds: bool = False
    n_workers: int = 0
    max_pixels: int = DEFAULT_MAX_PIXELS
    value_range: str = KEEP
    um_per_px: float | None = None
    use_index: bool = True
    with_folds: bool = True

    def __post_init__(self) -> None:
        if self.value_range not in (KEEP, AUTO):
            ValueRange.from_text(self.value_range)
        stated(self.um_per_px, 'prepare')
        if self.new_folds and self.extend_folds:
            raise ConfigError('--new-folds and --extend-folds: expected one of the two.')
        if not self.class_names or len(set(self.class_names)) < len(self.class_names):
            raise ConfigError(f'classes: {self.class_names}; expected at least one, all different.')
        for key, low in (('n_workers', 0), ('max_pixels', 1)):
            if getattr(self, key) < low:
                raise ConfigError(f'{key} is {getattr(self, key)}; expected at least {low}.')


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What :func:`prepare` found and made.

    Attributes:
        data_root: The data folder.
        class_names: Names of the K classes.
        train: Facts of the training cases, sorted by name.
        test: Facts of the test images, sorted by name.
        errors: Sentences about what must be repaired; with any, there are no folds.
        warnings: Oddities, in the order of cases.
        excluded: Names of the cases that exclude.txt leaves out.
        groups: Group of each case that shares one, by name.
        folds: The folds, or None where there are errors.
        folds_path: The folds file.
        is_folds_kept: Whether ``folds`` were there before and their file was left alone.
        n_reused: Cases whose facts came from ``index.json``.
        chosen: The range of values; None where all images have up to 8 bits.
        um_per_px: Height and width of a pixel that all images share; None where they do not say it,
            or differ.
        rule: Where ``groups`` come from, the data folder's manifest included.
    """

    data_root: Path
    class_names: tuple[str, ...]
    train: tuple[CaseFacts, ...]
    test: tuple[CaseFacts, ...]
    errors: tuple[str, ...]
    warnings: tuple[Finding, ...]
    excluded: tuple[str, ...]
    groups: Mapping[str, str]
    folds: Folds | None
    folds_path: Path
    is_folds_kept: bool
    n_reused: int
    rule: GroupRule
    chosen: Chosen | None = None
    um_per_px: Um | None = None

    def raise_for_errors(self) -> None:
        """Raise all errors together.

        Raises:
            DataError: There are errors.
        """
        if self.errors:
            raise DataError(list(self.errors))

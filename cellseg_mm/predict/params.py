"""What predicting needs to know: how images are cut, what is written, and what finds the cells.

In: choices. Out: records that say what decides about instances, and what about formats.
Invariant: a value that could change an image's instances is in ``how_cut`` or in the detector's
``identity``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data.contents import NO_CHOICE, Choice
from cellseg_mm.data.intensity import ValueRange
from cellseg_mm.data.pixel_size import Um
from cellseg_mm.fusion.settings import InferenceSettings, settings_for_people
from cellseg_mm.predict.tiling import Tile, plan_tiles
from cellseg_mm.predict.tissue import check_word, mark_of
from cellseg_mm.results.formats import Look, check_words

Picture = NDArray[np.uint8]
Thing = TypeVar('Thing')

# Raise them when the same settings give other instances, or other formats.
VERSION = 1
FORMATS_VERSION = 3  # 2: formats show disjoint cells; 3: micrometres


class Detector(Protocol):
    """What finds cells in pictures: the port that models, and whatever else finds cells, fill.

    Attributes:
        identity: JSON values that change whenever the same picture could give other instances.
        provenance: Further JSON values for the result files.
        batch_size: Pictures that it takes at once; may change while it works.
        cap: Most instances that it returns for a picture; 0 if it has no limit.
        notes: Sentences that a person should know of the image that ``detect`` was last given,
            about all of its pictures so far; another ``name`` begins anew.
    """

    identity: Mapping[str, JsonValue]
    provenance: Mapping[str, JsonValue]
    batch_size: int
    cap: int
    notes: Sequence[str]

    def detect(self, pictures: Sequence[Picture], name: str) -> list[InstanceSet]:
        """Return the instances of each picture.

        Args:
            pictures: At most ``batch_size``, (h, w, 3) uint8 in the channel order of the files.
            name: Of the image that they are parts of.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictParams:
    """How images are cut, and what is written.

    Attributes:
        out_dir: Gets all results.
        class_names: Name of each class.
        class_colours: RGB of each class.
        formats: Words of ``FORMATS``.
        score_thr: Cells below it are left out of every format, and so is what better cells cover:
            formats show each pixel as one cell's. ``<name>.npz`` has all.
        tile_px: Side of the tiles that larger images are cut into.
        overlap_px: Least overlap of neighbouring tiles.
        whole_px: Images with no side above this are not cut.
        level: Level of image pyramids that is read as it is, 0 the largest; None chooses by the
            sizes of pixels, see ``scaling.choose_grid``.
        um_per_px: Height and width of the images' pixels; None takes what each file says.
        model_um_per_px: The same of the images that the detector was trained on.
        tissue: Where cells are looked for: ``slides`` takes tissue only in pyramids that are cut,
            ``auto`` in all images that are cut, ``off`` in none; anything else is a GeoJSON file
            of regions, or a folder of such files.
        part: ``(i, n)``: only the i-th of n shares of the work, from 1; see :func:`share_of`.
        choice: Which image, plane and channels of files that hold several.
        red_blue_swapped: The files hold blue where red belongs.
        value_range: Of values of more than 8 bits; None decides by each file alone.
        range_from: Where ``value_range`` comes from, for people.
        n_workers: Threads that read ahead; 0 reads between predictions.
        again: Predict images that are done, too.
    """

    out_dir: Path
    class_names: tuple[str, ...]
    class_colours: tuple[tuple[int, int, int], ...]
    formats: tuple[str, ...] = ('overlay',)
    score_thr: float = 0.5
    tile_px: int = 1024
    overlap_px: int = 128
    whole_px: int = 2048
    level: int | None = None
    um_per_px: Um | None = None
    model_um_per_px: Um | None = None
    tissue: str = 'slides'
    part: tuple[int, int] | None = None
    choice: Choice = NO_CHOICE
    red_blue_swapped: bool = False
    value_range: ValueRange | None = None
    range_from: str = ''
    n_workers: int = 1
    again: bool = False

    def __post_init__(self) -> None:
        check_words(self.formats)
        if not 0 <= self.score_thr <= 1 or self.n_workers < 0:
            raise ConfigError(
                f'predict: score_thr {self.score_thr}, workers {self.n_workers}; expected a '
                'threshold in 0..1 and 0 or more workers'
            )
        plan_tiles((1, 1), self.tile_px, self.overlap_px)
        check_word(self.tissue)
        if self.part is not None and not (1 <= self.part[0] <= self.part[1] and not self.again):
            raise ConfigError(
                f'--part {self.part[0]}/{self.part[1]}: expected 1/n to n/n, and not --again, '
                "because the parts would take away each other's tiles; remove the folder of the "
                'results instead'
            )

    @property
    def look(self) -> Look:
        """How cells look in the formats."""
        return Look(
            class_names=self.class_names,
            class_colours=self.class_colours,
            red_blue_swapped=self.red_blue_swapped,
        )

    @property
    def how_cut(self) -> dict[str, JsonValue]:
        """What decides about the instances."""
        keys = ('tile_px', 'overlap_px', 'whole_px', 'red_blue_swapped')
        cut: dict[str, JsonValue] = {'version': VERSION, 'level': self.level or 0}
        cut.update({key: getattr(self, key) for key in keys})
        # What was not asked for has no part in it: results of before stay valid
        if self.level is None and self.model_um_per_px is not None:
            cut['model_um_per_px'] = [*self.model_um_per_px]
            cut['um_per_px'] = None if self.um_per_px is None else [*self.um_per_px]
        if self.tissue != 'slides':
            cut['tissue'] = mark_of(self.tissue)
        if not self.choice.is_default:
            cut['choice'] = self.choice.to_json()
        if self.value_range is not None:  # 8-bit collections have none, and keep their results
            cut['value_range'] = self.value_range.to_json()
        return cut

    @property
    def for_people(self) -> InferenceSettings:
        """Which cells the formats show: disjoint ones from ``score_thr`` on."""
        return settings_for_people(self.class_names, score_thr=self.score_thr)

    @property
    def how_written(self) -> dict[str, JsonValue]:
        """What decides about the formats."""
        keys = ('score_thr', 'class_names', 'class_colours', 'red_blue_swapped')
        return {'version': FORMATS_VERSION, **{key: getattr(self, key) for key in keys}}


def is_cut(image_hw: tuple[int, int], params: PredictParams) -> bool:
    """Tell whether an image is predicted in tiles."""
    return max(image_hw) > params.whole_px


def tiles_of(image_hw: tuple[int, int], params: PredictParams) -> list[Tile]:
    """Return the tiles of an image; one if it is predicted whole."""
    if is_cut(image_hw, params):
        return plan_tiles(image_hw, params.tile_px, params.overlap_px)
    return plan_tiles(image_hw, max(*image_hw, 1), 0)


def takes_whole_images(n_images: int, part: tuple[int, int]) -> bool:
    """Tell whether the shares of a run are images, not tiles: so many that they are even."""
    return n_images >= 4 * part[1]


def share_of(things: Sequence[Thing], part: tuple[int, int], *, first: int = 0) -> list[Thing]:
    """Return the share of a part, every n-th: neighbours, which are as dense, go to different ones.

    Args:
        things: Images or tiles.
        part: ``(i, n)``.
        first: Where counting begins, so that single tiles of many images are shared out too.
    """
    i, n = part
    return [thing for k, thing in enumerate(things, start=first) if k % n == i - 1]

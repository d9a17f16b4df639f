"""Options of predicting, and how they become a run of :func:`~cellseg_mm.predict.predict.predict`.

In: options as records, and any detector. Out: images predicted. Invariant: an option means the same
whatever finds the cells, a model in torch or one in a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.data.contents import NO_CHOICE, Choice
from cellseg_mm.data.intensity import ValueRange
from cellseg_mm.data.pixel_size import stated
from cellseg_mm.fusion.settings import InferenceSettings, Profile, choose_settings
from cellseg_mm.predict.items import Found
from cellseg_mm.predict.many import Recipe, predict_with_dask
from cellseg_mm.predict.params import Detector, PredictParams
from cellseg_mm.predict.predict import predict
from cellseg_mm.predict.scaling import stated_um, um_of_members
from cellseg_mm.predict.summary import Summary
from cellseg_mm.results.formats import Look


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberOptions:
    """Which models, and what is done with their answers.

    Attributes:
        checkpoints: One for each config, or any number for one config; empty takes the best of
            each config's work folder.
        work_root: Folder of the work folders; None takes the usual one.
        settings_path: ``inference.json``; None takes defaults.
        fusion: Rule; None leaves that of the settings.
        post: Steps after fusion; None leaves those of the settings.
        tta: Test-time augmentation; None leaves that of the settings.
        placement: Where models are kept, see ``MemberModels``.
    """

    checkpoints: tuple[str, ...] = ()
    work_root: str | None = None
    settings_path: str | None = None
    fusion: str | None = None
    post: str | None = None
    tta: str | None = None
    placement: Literal['auto', 'device', 'turns'] = 'auto'

    @property
    def is_plain(self) -> bool:
        """Whether nothing was asked of fusion: one model gives its own answer."""
        return self.settings_path is None and self.fusion is None and self.post is None

    def settings(
        self, class_names: Sequence[str], profile: Profile, *, most_thr: float | None = None
    ) -> InferenceSettings:
        """Return how members are fused and what is done afterwards; see ``choose_settings``.

        Raises:
            ConfigError: The file or a setting is wrong.
        """
        return choose_settings(
            class_names,
            path=self.settings_path,
            profile=profile,
            fusion=self.fusion,
            post=self.post,
            tta=self.tta,
            most_thr=most_thr,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictOptions:
    """Which images are predicted, where, and what is written.

    Attributes:
        inputs: Images, folders or patterns.
        out_dir: Gets the results.
        formats: Words of ``formats.FORMATS``, some joined by commas.
        score_thr: Least score in the formats. Thresholds that settings bring are lowered to it;
            None leaves them.
        tile_px: Side of the tiles; None takes the usual one.
        overlap_px: Least overlap of tiles.
        level: Level of image pyramids that is read as it is; None chooses by the sizes of pixels.
        um_per_px: Side of the images' pixels in micrometres; None takes what each file says.
        tissue: See ``PredictParams``.
        part: See ``PredictParams``.
        dask: Address of a Dask scheduler, or how many workers to start here; '' works alone.
        choice: Which image, plane and channels of files that hold several.
        n_workers: Threads that read ahead.
        again: Predict what is done, too.
        device: ``auto``, or a device's name.
        batch_size: Pictures per batch; None decides by the device.
        red_blue_swapped: Whether the images are; None takes it from the first config.
        value_range: Of values of more than 8 bits: ``LOW,HIGH``, ``auto`` for each file's own, or
            ``config`` for what is recorded with the model or its data.
    """

    inputs: tuple[str, ...]
    out_dir: Path
    formats: tuple[str, ...] = ('overlay',)
    score_thr: float | None = None
    tile_px: int | None = None
    overlap_px: int = 128
    level: int | None = None
    um_per_px: float | None = None
    tissue: str = 'slides'
    part: tuple[int, int] | None = None
    dask: str = ''
    choice: Choice = NO_CHOICE
    n_workers: int = 1
    again: bool = False
    device: str = 'auto'
    batch_size: int | None = None
    red_blue_swapped: bool | None = None
    value_range: str = 'config'


def params_for(
    detector: Detector,
    look: Look,
    options: PredictOptions,
    *,
    has_settings: bool,
    data_range: ValueRange | None = None,
    model_um: object = None,
) -> PredictParams:
    """Return what the options mean for a detector.

    Args:
        detector: What finds the cells.
        look: Classes, colours and channel order.
        options: See :class:`PredictOptions`.
        has_settings: Settings that were found on held-out images bring their own thresholds, so
            that the formats need none.
        data_range: Range of values that is recorded with the training images.
        model_um: Size of the training images' pixels, where the models themselves do not say it.
    """
    members = detector.provenance.get('members')
    value_range, range_from = choose_range(options.value_range, members, data_range)
    default_thr = 0.0 if has_settings else 0.5
    cut: dict[str, Any] = {}
    if options.tile_px is not None:
        cut = dict.fromkeys(('tile_px', 'whole_px'), options.tile_px)
    return PredictParams(
        out_dir=options.out_dir,
        class_names=look.class_names,
        class_colours=look.class_colours,
        formats=tuple(word for given in options.formats for word in given.split(',') if word),
        score_thr=default_thr if options.score_thr is None else options.score_thr,
        overlap_px=options.overlap_px,
        level=options.level,
        um_per_px=stated_um(options.um_per_px),
        model_um_per_px=um_of_members(members) or stated(model_um, 'the config'),
        tissue=options.tissue,
        part=options.part,
        choice=options.choice,
        red_blue_swapped=look.red_blue_swapped,
        value_range=value_range,
        range_from=range_from,
        n_workers=options.n_workers,
        again=options.again,
        **cut,
    )


def predict_found(found: Found, recipe: Recipe, options: PredictOptions) -> Summary:
    """Predict images in this process, or with the workers that the options name.

    Args:
        found: From ``look_for``.
        recipe: Makes the detector and its parameters; is pickled where others work.
        options: See :class:`PredictOptions`.
    """
    if not options.dask:
        summary = predict(found.items, *recipe())
    elif options.part is None and not options.again:
        summary = predict_with_dask(found.items, recipe, options.dask)
    else:
        raise ConfigError(
            '--dask: shares the work out by itself and goes on where it was; expected neither '
            '--part nor --again; leave them out'
        )
    summary.asides[:0] = found.notes
    summary.failed.update(found.refused)
    return summary


def choose_range(
    word: str, members: object, data_range: ValueRange | None
) -> tuple[ValueRange | None, str]:
    """Return the range of values, and where it comes from; None for each file's own.

    Args:
        word: See :class:`PredictOptions`.
        members: What the detector's provenance says of its models.
        data_range: Range that is recorded with the training images.

    Raises:
        ConfigError: The word is none, or the models were trained with different ranges.
    """
    if word == 'auto':
        return None, ''
    if word != 'config':
        return ValueRange.from_text(word), 'as --range says'
    records = members if isinstance(members, list) else []
    of_models = {
        ValueRange.from_json(record.get('value_range'))
        for record in records
        if isinstance(record, dict)
    }
    known = sorted(str(found) for found in of_models if found is not None)
    if len(known) > 1:
        raise ConfigError(
            f'members: were trained with the ranges of values {" and ".join(known)}; expected one; '
            'say with --range which holds for these images'
        )
    for found in of_models:
        if found is not None:
            return found, 'as in the training of the model'
    return data_range, 'as recorded with the training images' if data_range else ''

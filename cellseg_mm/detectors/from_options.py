"""What the options of tools/predict.py and tools/ensemble.py mean.

In: configs by path, and options as records. Out: what the library returns: images predicted, or an
ensemble of a split. Invariant: the same option means the same to both tools.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import is_main_process

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.layout import work_dir_of
from cellseg_mm.data.config import DataSettings
from cellseg_mm.data.images import Images, Split, find_images
from cellseg_mm.detectors.detector import ModelDetector, build_detector, choose_device
from cellseg_mm.detectors.member_models import MemberSource, Placement
from cellseg_mm.detectors.run_ensemble import ensemble_models
from cellseg_mm.ensemble.fuse_files import Merged, ensemble_files
from cellseg_mm.ensemble.outcome import Exports, Outcome, finish
from cellseg_mm.fusion.settings import (
    InferenceSettings,
    Profile,
    choose_settings,
    settings_for_people,
)
from cellseg_mm.predict.items import find_items
from cellseg_mm.predict.predict import PredictParams, Summary, predict
from cellseg_mm.results.formats import Look
from cellseg_mm.weights.find import find_checkpoints

Configs = Mapping[str, Config]  # by path, as ``load_config`` reads them


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
        placement: See ``MemberModels``.
    """

    checkpoints: tuple[str, ...] = ()
    work_root: str | None = None
    settings_path: str | None = None
    fusion: str | None = None
    post: str | None = None
    tta: str | None = None
    placement: Placement = 'auto'

    @property
    def is_plain(self) -> bool:
        """Whether nothing was asked of fusion: one model gives its own answer."""
        return self.settings_path is None and self.fusion is None and self.post is None

    def settings(self, class_names: Sequence[str], profile: Profile) -> InferenceSettings:
        """Return how members are fused and what is done afterwards.

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
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictOptions:
    """Which images are predicted, where, and what is written.

    Attributes:
        inputs: Images, folders or patterns.
        out_dir: Gets the results.
        formats: Words of ``formats.FORMATS``, some joined by commas.
        score_thr: Least score in the formats; None leaves that of the settings.
        tile_px: Side of the tiles; None takes the usual one.
        overlap_px: Least overlap of tiles.
        level: Level of image pyramids.
        n_workers: Threads that read ahead.
        again: Predict what is done, too.
        device: ``auto``, or a device's name.
        batch_size: Pictures per batch; None decides by the device.
        red_blue_swapped: Whether the images are; None takes it from the first config.
    """

    inputs: tuple[str, ...]
    out_dir: Path
    formats: tuple[str, ...] = ('overlay',)
    score_thr: float | None = None
    tile_px: int | None = None
    overlap_px: int = 128
    level: int = 0
    n_workers: int = 1
    again: bool = False
    device: str = 'auto'
    batch_size: int | None = None
    red_blue_swapped: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleOptions:
    """Which images an ensemble predicts, and what is written.

    Attributes:
        out_dir: Gets the results.
        prediction_files: These are merged and no model is run; empty runs the models.
        profile: Which settings of ``inference.json``.
        split: Which images.
        fold: Fold of the split ``val``; None takes the first config's.
        leave_out_seen: On training images use only the members that never saw them.
        formats: Words of ``formats.FORMATS`` for every image.
        n_overlays: Pictures of the first so many images.
        score_thr: Least score in both; None leaves that of the settings.
        amp: Use automatic mixed precision.
    """

    out_dir: Path
    prediction_files: tuple[str, ...] = ()
    profile: Profile = 'submission'
    split: Split = 'test'
    fold: int | None = None
    leave_out_seen: bool = False
    formats: tuple[str, ...] = ()
    n_overlays: int = 0
    score_thr: float | None = None
    amp: bool = False


def predict_images(configs: Configs, members: MemberOptions, options: PredictOptions) -> Summary:
    """Predict images with one model, or an ensemble of them.

    Raises:
        CellSegError: Options that do not fit; see the message.
    """
    items = find_items(options.inputs, out_dir=options.out_dir)
    detector = make_detector(configs, members, options)
    cfg = next(iter(configs.values()))
    look = _look(DataSettings.from_config(cfg, 'test_dataloader'), detector.red_blue_swapped)
    # Settings that were found on held-out images bring their own thresholds.
    default_thr = 0.5 if members.settings_path is None else 0.0
    cut = {} if options.tile_px is None else dict.fromkeys(('tile_px', 'whole_px'), options.tile_px)
    params = PredictParams(
        out_dir=options.out_dir,
        class_names=look.class_names,
        class_colours=look.class_colours,
        formats=tuple(word for given in options.formats for word in given.split(',') if word),
        score_thr=default_thr if options.score_thr is None else options.score_thr,
        overlap_px=options.overlap_px,
        level=options.level,
        red_blue_swapped=detector.red_blue_swapped,
        n_workers=options.n_workers,
        again=options.again,
        **cut,
    )
    return predict(items, detector, params)


def make_detector(
    configs: Configs, members: MemberOptions, options: PredictOptions
) -> ModelDetector:
    """Load the models.

    Raises:
        CellSegError: Options that do not fit; see the message.
    """
    cfg = next(iter(configs.values()))
    names = DataSettings.from_config(cfg, 'test_dataloader').class_names
    # Without a file the prediction files keep every cell; the formats show those for people.
    profile: Profile = 'submission' if members.settings_path is None else 'instances'
    how = members.settings(names, profile)
    return build_detector(
        pair_sources(configs, _checkpoints(configs, members)),
        how=None if members.is_plain else how,
        tta_spec=members.tta,
        device=choose_device(options.device),
        batch_size=options.batch_size,
        placement=members.placement,
        red_blue_swapped=options.red_blue_swapped,
    )


def ensemble(configs: Configs, members: MemberOptions, options: EnsembleOptions) -> Outcome | None:
    """Merge the members' answers for a split; every process calls this.

    Returns:
        What came out; None on all processes but the first.

    Raises:
        CellSegError: Options that do not fit; see the message.
    """
    cfg = next(iter(configs.values()))
    data = DataSettings.from_config(cfg, 'test_dataloader')
    exports = _exports(cfg, members, options)  # wrong words are found before anything is computed
    fold = data.fold if options.fold is None else options.fold
    images = find_images(
        data.data_root,
        options.split,
        data.class_names,
        folds_path=data.folds_path,
        fold=fold if options.split == 'val' else None,
    )
    merged = _merge(configs, members, options, images)
    return finish(merged, images, options.out_dir, exports) if is_main_process() else None


def _merge(
    configs: Configs, members: MemberOptions, options: EnsembleOptions, images: Images
) -> Merged:
    settings = members.settings(images.class_names, options.profile)
    if options.prediction_files:
        return ensemble_files(
            options.prediction_files,
            images,
            settings,
            options.out_dir,
            leave_out_seen=options.leave_out_seen,
        )
    return ensemble_models(
        next(iter(configs.values())),
        pair_sources(configs, _checkpoints(configs, members)),
        images,
        settings,
        options.out_dir,
        placement=members.placement,
        amp=options.amp,
        leave_out_seen=options.leave_out_seen,
    )


def _exports(cfg: Config, members: MemberOptions, options: EnsembleOptions) -> Exports | None:
    if not options.formats and not options.n_overlays:
        return None
    data = DataSettings.from_config(cfg, 'test_dataloader')
    look = _look(data, data.red_blue_swapped)
    return Exports(
        formats=options.formats,
        n_overlays=options.n_overlays,
        settings=settings_for_people(
            look.class_names, path=members.settings_path, score_thr=options.score_thr
        ),
        look=look,
    )


def _checkpoints(configs: Configs, members: MemberOptions) -> Sequence[Path | str]:
    if members.checkpoints:
        return members.checkpoints
    return find_checkpoints([work_dir_of(path, members.work_root) for path in configs])


def pair_sources(configs: Configs, checkpoints: Sequence[Path | str]) -> list[MemberSource]:
    """Give each checkpoint its config: one for all, or one each.

    Raises:
        ConfigError: Their numbers do not fit.
    """
    paths = list(configs)
    if len(paths) not in (1, len(checkpoints)):
        raise ConfigError(
            f'members: found {len(checkpoints)} checkpoints and {len(paths)} configs; expected one '
            'config for all of them, or one for each in the same order; correct the numbers'
        )
    paths = paths * len(checkpoints) if len(paths) == 1 else paths
    pairs = zip(paths, checkpoints, strict=True)
    return [MemberSource(configs[path], path, Path(checkpoint)) for path, checkpoint in pairs]


def _look(data: DataSettings, red_blue_swapped: bool) -> Look:
    return Look(
        class_names=data.class_names,
        class_colours=data.palette,
        red_blue_swapped=red_blue_swapped,
    )

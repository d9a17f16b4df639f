"""What the options of tools/predict.py and tools/ensemble.py mean.

In: configs by path, and options as records. Out: what the library returns: images predicted, or an
ensemble of a split. Invariant: the same option means the same to both tools.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.utils import import_modules_from_strings

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.layout import work_dir_of
from cellseg_mm.data.config import DataSettings
from cellseg_mm.data.images import Images, Split, find_images
from cellseg_mm.detectors.detector import ModelDetector, build_detector, choose_device
from cellseg_mm.detectors.member_models import MemberSource
from cellseg_mm.detectors.run_ensemble import ensemble_models
from cellseg_mm.ensemble.fuse_files import Merged, ensemble_files
from cellseg_mm.ensemble.outcome import Exports, Outcome, finish
from cellseg_mm.fusion.settings import Profile, settings_for_people
from cellseg_mm.predict.items import look_for
from cellseg_mm.predict.options import MemberOptions, PredictOptions, params_for, predict_found
from cellseg_mm.predict.params import PredictParams
from cellseg_mm.predict.summary import Summary
from cellseg_mm.results.formats import Look
from cellseg_mm.weights.find import find_checkpoints

Configs = Mapping[str, Config]  # by path, as ``load_config`` reads them


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
    found = look_for(options.inputs, out_dir=options.out_dir)
    return predict_found(found, partial(prepare, configs, members, options), options)


def prepare(
    configs: Configs, members: MemberOptions, options: PredictOptions
) -> tuple[ModelDetector, PredictParams]:
    """Load the models, and say what the options mean for them; any process may do it.

    Raises:
        CellSegError: Options that do not fit; see the message.
    """
    for cfg in configs.values():
        # In another process nobody has registered yet what the config names
        import_modules_from_strings(**cfg.get('custom_imports', {'imports': []}))
    detector = make_detector(configs, members, options)
    cfg = next(iter(configs.values()))
    data = DataSettings.from_config(cfg, 'test_dataloader')
    params = params_for(
        detector,
        _look(data, detector.red_blue_swapped),
        options,
        has_settings=members.settings_path is not None,
        data_range=data.value_range(),
        model_um=data.um_per_px(),
    )
    return detector, params


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
    how = members.settings(names, profile, most_thr=options.score_thr)
    return build_detector(
        sources_of(configs, members),
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
        sources_of(configs, members),
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


def sources_of(configs: Configs, members: MemberOptions) -> list[MemberSource]:
    """Return the members: of the checkpoints that were named, or the best of each work folder."""
    if members.checkpoints:
        return pair_sources(configs, members.checkpoints)
    best = find_checkpoints([work_dir_of(path, members.work_root) for path in configs])
    return pair_sources(configs, best, are_best=True)


def pair_sources(
    configs: Configs, checkpoints: Sequence[Path | str], *, are_best: bool = False
) -> list[MemberSource]:
    """Give each checkpoint its config: one for all, or one each.

    Args:
        configs: By path.
        checkpoints: The checkpoints.
        are_best: They are the best of the configs' work folders, not named by anyone.

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
    return [
        MemberSource(configs[path], path, Path(checkpoint), is_best=are_best)
        for path, checkpoint in pairs
    ]


def _look(data: DataSettings, red_blue_swapped: bool) -> Look:
    return Look(
        class_names=data.class_names,
        class_colours=data.palette,
        red_blue_swapped=red_blue_swapped,
    )

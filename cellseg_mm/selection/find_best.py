"""From the folds' tested predictions to ``inference.json``: reads, chooses, writes, explains.

In: the folds' work folders. Out: both profiles' settings with their evidence, and the commands that
use them. Invariant: what could not be measured honestly keeps its default, and the file says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cellseg_mm.core import files
from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.layout import INFERENCE, augmentations_of, on_fold_dir, predictions_path
from cellseg_mm.core.progress import track
from cellseg_mm.data.folds import Folds, load_folds
from cellseg_mm.data.images import find_images
from cellseg_mm.data.labels import read_gt
from cellseg_mm.ensemble import oof
from cellseg_mm.ensemble.fuse_files import clean_sets
from cellseg_mm.fusion.fuse import FUSION_RULES, from_spec, fuse
from cellseg_mm.fusion.settings import (
    DEFAULT_FUSION,
    DEFAULT_MASK_THR,
    VERSION,
    InferenceSettings,
    Profile,
    default_settings,
)
from cellseg_mm.scores.records import as_json
from cellseg_mm.selection.objectives import Ap50, Mpq, Samples
from cellseg_mm.selection.rescoring import (
    RescoringChoice,
    choose_rescoring,
    describe_rescoring,
    rescoring_record,
)
from cellseg_mm.selection.search import (
    AP_STEPS,
    FUSION_STEPS,
    PQ_STEPS,
    Options,
    Search,
    SettingsChoice,
    StepEvidence,
    difference,
)

Views = dict[tuple[str | None, str], tuple[InstanceSet, ...]]
N_PARTS = 5  # of a held-out fold on which fusion rules are compared
STEPS: dict[Profile, dict[str, Options]] = {'submission': AP_STEPS, 'instances': PQ_STEPS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Where everything is.

    Attributes:
        configs: One config per fold.
        work_dirs: Their work folders, same order.
        data_root: Data folder.
        folds_path: Folds file.
        class_names: Names of the classes.
        settings: The configs by fold, as dicts; folds without one may be of any recipe.
    """

    configs: tuple[str, ...]
    work_dirs: tuple[Path, ...]
    data_root: Path
    folds_path: Path
    class_names: tuple[str, ...]
    settings: Mapping[int | None, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BestSettings:
    """What was chosen.

    Attributes:
        path: The file that was written.
        settings: What each profile uses from now on.
        choices: The evidence on all but fusion, by profile.
        rescorings: What new scores are worth; empty with one fold, and where a fusion rule was
            chosen, whose scores are not those of single members.
        fusions: The evidence on fusion rules; empty where they could not be compared.
        notes: What could not be chosen, and why.
    """

    path: Path
    settings: Mapping[Profile, InferenceSettings]
    choices: Mapping[Profile, SettingsChoice]
    rescorings: Mapping[Profile, RescoringChoice]
    fusions: Mapping[Profile, SettingsChoice]
    notes: Mapping[str, str]


def objective(profile: Profile, samples: Samples, cap: int | None) -> Ap50 | Mpq:
    """Return what a profile makes as large as possible."""
    return Ap50(samples, cap) if profile == 'submission' else Mpq(samples)


def find_best(
    inputs: Inputs,
    out_dir: Path | str,
    *,
    commands: Sequence[str] = (),
    cap: int | None = None,
) -> BestSettings:
    """Choose both profiles' settings and write ``inference.json`` into ``out_dir``.

    Args:
        inputs: Where everything is.
        out_dir: Folder for the file.
        commands: What uses the file, for its reader.
        cap: Detections per class and image that the board counts; None for all.

    Raises:
        ConfigError: The cap is not positive.
        PredictionError: A fold was not tested, or a file cannot be read.
        FoldError: A file belongs to other folds.
    """
    if cap is not None and cap < 1:
        raise ConfigError(f'--cap: {cap}; expected 1 or more detections per class and image')
    folds = load_folds(inputs.folds_path)
    samples, notes = read_samples(inputs, folds)
    choices = {
        profile: Search(objective(profile, samples, cap), steps).choose(
            default_settings(profile, inputs.class_names)
        )
        for profile, steps in STEPS.items()
    }
    settings = {profile: choice.settings for profile, choice in choices.items()}
    held_out, notes['fusion'] = read_fusion_samples(inputs, folds)
    fusions = choose_fusion(held_out, settings, cap) if held_out is not None else {}
    for profile, choice in fusions.items():
        fusion, score_thr = choice.settings.fusion, choice.settings.score_thr
        settings[profile] = replace(settings[profile], fusion=fusion, score_thr=score_thr)
    rescorings: dict[Profile, RescoringChoice] = {}
    if len(samples.folds) > 1 and not fusions:
        for profile, one in settings.items():
            rescorings[profile] = choose_rescoring(objective(profile, samples, cap), one)
    # Both or none: exports threshold, by one profile, what an ensemble has scored by the other.
    if rescorings and all(one.is_worth_it for one in rescorings.values()):
        settings.update({profile: one.settings for profile, one in rescorings.items()})
    record: dict[str, JsonValue] = {
        'version': VERSION,
        'fold_hash': folds.hash,
        'class_names': list(inputs.class_names),
        'profiles': {profile: one.to_json() for profile, one in settings.items()},
        'evidence': {profile: _evidence(one, profile) for profile, one in choices.items()},
        'rescoring_evidence': {
            profile: rescoring_record(one) for profile, one in rescorings.items()
        },
        'fusion_evidence': {profile: _evidence(one, profile) for profile, one in fusions.items()},
        'notes': dict(notes),
        'commands': list(commands),
    }
    path = Path(out_dir) / INFERENCE
    files.write_json(path, record)
    return BestSettings(path, settings, choices, rescorings, fusions, notes)


def choose_fusion(
    held_out: Samples, settings: Mapping[Profile, InferenceSettings], cap: int | None = None
) -> dict[Profile, SettingsChoice]:
    """Choose the fusion rule on top of other settings.

    Rules are compared as members predict without augmentation, with masks cut as predicted.
    """
    return {
        profile: Search(objective(profile, held_out, cap), FUSION_STEPS).choose(
            replace(settings[profile], tta=None, mask_thr=DEFAULT_MASK_THR)
        )
        for profile in STEPS
    }


def read_samples(inputs: Inputs, folds: Folds) -> tuple[Samples, dict[str, str]]:
    """Pool the folds' predictions, plain and with each test-time augmentation that all have.

    Returns:
        The samples, and why some settings cannot be chosen.

    Raises:
        PredictionError: The predictions are of other classes than the config's.
    """
    plain = oof.validation_files(inputs.configs, inputs.work_dirs)
    pool = oof.pool_predictions(plain, folds, inputs.data_root, folds_path=inputs.folds_path)
    oof.refuse_other_classes(pool, inputs.class_names)
    oof.refuse_other_recipes(pool, inputs.settings)
    views: Views = {(None, DEFAULT_FUSION): pool.pred_sets}
    notes: dict[str, str] = {}
    names = sorted({name for d in inputs.work_dirs for name in augmentations_of(d, 'val')})
    for name in names:
        paths = [predictions_path(d, 'val', name) for d in inputs.work_dirs]
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            notes[f'tta {name}'] = f'{len(missing)} folds lack it, for example {missing[0]}'
            continue
        again = oof.pool_predictions(paths, folds, inputs.data_root, folds_path=inputs.folds_path)
        if why := _not_comparable(pool, again):
            notes[f'tta {name}'] = why
            continue
        # A file's name is short; what made it says exactly how.
        spec = str(again.provenance[again.folds[0]].get('tta') or name)
        views[spec, DEFAULT_FUSION] = again.pred_sets
    if not names:
        notes['tta'] = (
            'no fold was tested with test-time augmentation; tools/test.py CONFIG --tta flips for '
            'every fold lets it be chosen'
        )
    if not all('mask_probs' in s.extra for s in pool.pred_sets if len(s)):
        notes['mask_thr'] = (
            'the predictions carry no mask probabilities; test with tools/test.py --cfg-options '
            'model.test_cfg.rcnn.keep_mask_probs=True to choose it'
        )
    if len(pool.folds) < 2:
        notes['everything'] = (
            f'only fold {pool.folds[0]} was given, so a choice could not be tested on images that '
            'it was not made on; the defaults stay'
        )
    fold_of = np.array(pool.fold_of)
    return Samples(pool.gt_sets, views, fold_of, pool.class_names, pool.groups), notes


def _not_comparable(plain: oof.OofPool, augmented: oof.OofPool) -> str:
    """Return why a difference would not be due to the augmentation; '' if it would."""
    for fold, origin in augmented.provenance.items():
        ours, theirs = (o.get('checkpoint_hash') for o in (origin, plain.provenance[fold]))
        if ours and theirs and ours != theirs:
            return (
                f'fold {fold} was tested with checkpoint {ours}, without augmentation with '
                f'{theirs}; test it again'
            )
    specs = sorted({str(origin.get('tta')) for origin in augmented.provenance.values()})
    if len(specs) > 1:
        return f'the folds were augmented in different ways ({"; ".join(specs)}); test them again'
    return ''


def read_fusion_samples(inputs: Inputs, folds: Folds) -> tuple[Samples | None, str]:
    """Fuse the members' predictions of a fold that none of them saw, by every rule.

    Plain cross-validation has one clean member per image, and fusing one is no fusion.

    Returns:
        Samples whose ``fold_of`` are parts of that fold (groups stay together), and how it was
        done; or None, and why not.
    """
    held_out = [
        fold
        for fold in range(folds.n_folds)
        if all(predictions_path(on_fold_dir(d, fold), 'val').is_file() for d in inputs.work_dirs)
    ]
    if not held_out or len(inputs.work_dirs) < 2:
        return None, (
            f'in cross-validation each image has one clean member, so the default {DEFAULT_FUSION} '
            'is kept; train members with exclude_folds and test them on the common held-out fold '
            '(docs/fusion.md) to compare rules'
        )
    fold = held_out[0]
    images = find_images(
        inputs.data_root, 'val', inputs.class_names, folds_path=inputs.folds_path, fold=fold
    )
    paths = oof.held_out_files(inputs.configs, inputs.work_dirs, fold)
    _, sets_of = clean_sets(paths, images)
    rules = [DEFAULT_FUSION, *sorted(set(FUSION_RULES) - {DEFAULT_FUSION})]
    views: Views = {}
    for name in track(rules, description='fuse'):
        rule = from_spec(name)
        views[None, name] = tuple(
            fuse([sets[i] for sets in sets_of], rule) for i in range(len(images.cases))
        )
    groups = [folds.groups.get(case.name, case.name) for case in images.cases]
    part_of = {group: i % N_PARTS for i, group in enumerate(sorted(set(groups)))}
    samples = Samples(
        tuple(read_gt(case) for case in images.cases),
        views,
        np.array([part_of[group] for group in groups]),
        inputs.class_names,
        folds.groups,
    )
    return samples, f'compared on {len(images.cases)} images of fold {fold} that no member saw'


# ---- evidence ----


def _evidence(choice: SettingsChoice, profile: Profile) -> dict[str, JsonValue]:
    """Return what the file says about a choice."""
    start = default_settings(profile, choice.settings.class_names)
    return {
        'objective': choice.objective,
        'n_images': choice.n_images,
        'default': as_json(choice.default),
        'found': difference(choice.found, start),
        'naive': as_json(choice.naive),
        'naive_gain': as_json(choice.naive - choice.default),
        'nested_gain': as_json(choice.nested_gain),
        'nested_standard_error': as_json(choice.error),
        'nested_interval_95': as_json(choice.interval),
        'interval_unit': choice.interval_unit,
        'used': choice.settings == choice.found,
        'by_fold': {
            str(fold): {'settings': difference(chosen, start), 'gain': as_json(gain)}
            for fold, (chosen, gain) in choice.by_fold.items()
        },
        'steps': [_step(step) for step in choice.steps],
    }


def _step(step: StepEvidence) -> dict[str, JsonValue]:
    return {
        'setting': step.name,
        'tried': as_json(step.tried),
        'nested_gain': as_json(step.gain),
        'standard_error': as_json(step.error),
        'kept': step.kept,
    }


def describe(found: BestSettings) -> str:
    """Return what was chosen and why, in a few lines a profile."""
    texts = [
        _described(profile, choice, found.settings[profile])
        for by_profile in (found.choices, found.fusions)
        for profile, choice in by_profile.items()
    ]
    texts += [f'{profile}: {describe_rescoring(one)}' for profile, one in found.rescorings.items()]
    return '\n'.join([*texts, *(f'note on {name}: {note}' for name, note in found.notes.items())])


def _described(profile: Profile, choice: SettingsChoice, settings: InferenceSettings) -> str:
    start = default_settings(profile, settings.class_names)
    lines = [
        f'{profile}: {difference(settings, start).replace("as before", "the defaults")}',
        f'  {choice.objective} of {choice.n_images} images: {choice.default:.4f} before, '
        f'{choice.naive:.4f} on the images it was chosen on ({choice.naive - choice.default:+.4f})',
    ]
    if choice.by_fold:
        low, high = choice.interval
        verdict = 'used' if choice.settings == choice.found else 'not worth it, defaults stay'
        if choice.found == start:
            verdict = 'nothing was worth a change'
        lines.append(
            f'  honest gain, on images that took no part: {choice.nested_gain:+.4f} '
            f'(95 % {low:+.4f} to {high:+.4f}, standard error {choice.error:.4f}, over '
            f'{choice.interval_unit}): {verdict}'
        )
    lines += [f'  {_step_text(step, start)}' for step in choice.steps if len(step.tried) > 1]
    return '\n'.join(lines)


def _step_text(step: StepEvidence, start: InferenceSettings) -> str:
    values: Mapping[str, float] = step.tried
    best = max(values, key=values.__getitem__)
    verdict = 'kept' if step.kept else 'not kept'
    return (
        f'{step.name}: {len(values)} values, best {best}; nested gain {step.gain:+.4f}, standard '
        f'error {step.error:.4f}: {verdict}'
    )

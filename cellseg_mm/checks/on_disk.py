"""What lies on the disk: data, folds, work folders, checkpoints, prediction files.

In: configs and folders. Out: lines of the doctor. Invariant: nothing is written.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmengine.config import Config

from cellseg_mm.checks.lines import Line, error, guarded, ok, warn
from cellseg_mm.core import files, provenance, trainings
from cellseg_mm.core.errors import CellSegError
from cellseg_mm.core.layout import DATA_REPORT, FINISHED, INDEX, SCORES_SUFFIX
from cellseg_mm.data.config import DataSettings
from cellseg_mm.data.folds import excluded_by, load_folds
from cellseg_mm.data.images import cases_of
from cellseg_mm.data.preparing import prepare
from cellseg_mm.data.preparing.groups import rule_of_folds
from cellseg_mm.data.preparing.records import PrepareParams, PrepareReport
from cellseg_mm.pipeline.dataset import data_fingerprint
from cellseg_mm.results.predictions import load_predictions
from cellseg_mm.results.whose import why_foreign
from cellseg_mm.weights import checkpoints

# What a checkpoint and a prediction file must say about where they come from.
TRAINED_KEYS = ('fold', 'split', 'fold_hash', 'data_hash', 'class_names', 'commit', 'versions')

PREDICTED_KEYS = ('fold_hash', 'class_names', 'versions')

MODEL_KEYS = ('data_hash', 'checkpoint_hash')  # of one model; an ensemble names its members

SHOWN = 10


@dataclass(frozen=True, slots=True)
class InForce:
    """What results are compared with.

    Attributes:
        data_hashes: Fingerprint of the training cases, and of the test images where there are any.
        fold_hash: Of the folds file; '' without one.
        class_names: Of the config.
        settings: The config, whose recipe checkpoints must be of.
    """

    data_hashes: frozenset[str]
    fold_hash: str
    class_names: tuple[str, ...] = ()
    settings: Mapping = field(default_factory=dict)


def check_data(cfg: Config) -> Iterator[Line]:
    """Verify data as tools/prepare_data.py does, and the folds against them."""
    data = DataSettings.from_config(cfg)
    root, path = data.data_root, data.folds_path
    found = load_folds(path) if path.is_file() else None
    rule, said = rule_of_folds(found, root)
    if said:
        yield warn('folds', said)
    with tempfile.TemporaryDirectory() as folder:
        for index in (path.parent / INDEX, root / INDEX):
            if index.is_file():
                shutil.copy(index, Path(folder) / INDEX)
                break
        listed, exclude_file = excluded_by(path), None
        if listed is not None:
            exclude_file = Path(folder) / 'exclude.txt'
            exclude_file.write_text('\n'.join(listed), encoding='utf-8')
        params = PrepareParams(
            class_names=data.class_names,
            out_dir=Path(folder),
            exclude_file=exclude_file,
            groups=rule,
            with_folds=found is None,
        )
        report = prepare.prepare(root, params)
    yield from _check_report(report)
    yield from _check_folds(path, [facts.name for facts in report.train], report)


def _check_report(report: PrepareReport) -> Iterator[Line]:
    for text in report.errors[:SHOWN]:
        yield error('data', text)
    if len(report.errors) > SHOWN:
        yield error('data', f'... and {len(report.errors) - SHOWN} more; run tools/prepare_data.py')
    kinds: dict[str, int] = {}
    for finding in report.warnings:
        if finding.kind == prepare.NO_GROUPS:
            continue  # the groups of the folds that are there count, see _check_folds
        kinds[finding.kind] = kinds.get(finding.kind, 0) + 1
    if kinds:
        listed = ', '.join(f'{n} x {kind}' for kind, n in sorted(kinds.items()))
        yield warn(
            'data', f'{report.data_root}: {listed}; look at {DATA_REPORT} of tools/prepare_data.py'
        )
    n_cells = sum(sum(facts.counts) for facts in report.train)
    if not report.errors:
        yield ok(
            'data',
            f'{report.data_root}: {len(report.train)} cases with {n_cells} cells, '
            f'{len(report.test)} test images',
        )


def _check_folds(path: Path, names: list[str], report: PrepareReport) -> Iterator[Line]:
    if not path.is_file():
        yield warn(
            'folds',
            f'{path}: not there yet; make it with tools/prepare_data.py {report.data_root}',
        )
        return
    found = load_folds(path, names)
    split = sum(
        len({found.fold_of()[n] for n in names if report.groups.get(n) == group}) > 1
        for group in set(report.groups.values())
    )
    if split:
        yield warn(
            'folds',
            f'{path}: {split} groups (patients, or images that look alike) are in several folds; '
            'scores will be optimistic; make them again with tools/prepare_data.py --new-folds',
        )
    if all(group.startswith('alike:') for group in found.groups.values()):
        yield warn(
            'folds',
            f'{path}: made without groups; images of one patient may be in several folds; if '
            'patients gave several images, make them again with tools/prepare_data.py --groups-csv',
        )
    sizes = ', '.join(str(len(part)) for part in found.names_by_fold)
    yield ok('folds', f'{path}: hash {found.hash}, {sizes} images, method {found.method}')


def in_force_of(cfg: Config) -> InForce:
    """Return what results of a config are compared with."""
    data = DataSettings.from_config(cfg)
    hashes = set()
    for split in ('train', 'test'):
        try:
            hashes.add(data_fingerprint(cases_of(data, split), data.value_range()))
        except CellSegError:
            continue  # said by check_data
    try:
        fold_hash = load_folds(data.folds_path).hash
    except CellSegError:
        fold_hash = ''
    return InForce(frozenset(hashes), fold_hash, data.class_names, cfg.to_dict())


def check_work_dir(work_dir: Path, in_force: InForce) -> Iterator[Line]:
    """Open every checkpoint and result file and compare what it says with how things are."""
    if not work_dir.is_dir():
        yield ok('files', f'{work_dir}: not there yet')
        return
    yield from _check_leftovers(work_dir)
    for path in sorted(work_dir.rglob('*.pth')):
        if not path.name.startswith('.tmp-'):
            yield from guarded('checkpoint', functools.partial(_check_checkpoint, path, in_force))
    for path in sorted(work_dir.rglob('*.npz')):
        if not path.name.startswith('.tmp-'):
            yield from guarded('predictions', functools.partial(_check_predictions, path, in_force))
    for path in sorted(work_dir.rglob('*.json')):
        # mmengine's own scalars are JSON lines
        if 'vis_data' not in path.parts and not path.name.startswith('.tmp-'):
            yield from guarded('result', functools.partial(_check_json, path, in_force))
    yield from guarded('files', functools.partial(_check_last, work_dir))


def _check_leftovers(work_dir: Path) -> Iterator[Line]:
    left = sorted(work_dir.rglob('.tmp-*'))
    if left:
        yield warn(
            'files',
            f'{work_dir}: {len(left)} unfinished files of killed runs, such as {left[0].name}; '
            'delete them when no run is active',
        )


def _check_last(work_dir: Path) -> Iterator[Line]:
    """Look whether mmengine's note of the newest checkpoint leads out of the folder."""
    note = work_dir / 'last_checkpoint'
    named = note.read_text(encoding='utf-8', errors='replace').strip() if note.is_file() else ''
    if named and Path(named).resolve().parent != work_dir.resolve():
        yield warn(
            'files',
            f'{note}: names {named[:200]}, which is in another folder; expected a file beside it; '
            "MMDetection's own --resume would go on from there; delete it if this folder was moved",
        )


def _check_checkpoint(path: Path, in_force: InForce) -> Iterator[Line]:
    content = checkpoints.load_checkpoint_file(path)
    if 'state_dict' not in content:
        yield warn('checkpoint', f'{path}: opens, holds no state_dict; is it of this project?')
        return
    meta = content.get('meta', {})
    origin = meta.get('cellseg')
    if not origin:
        yield warn(
            'checkpoint',
            f'{path}: opens, does not say where it comes from; expected meta["cellseg"]; it was '
            'not made by this project, or without ProvenanceHook',
        )
        return
    lacking = [key for key in TRAINED_KEYS if key not in origin]
    if 'cfg' not in meta:
        lacking.append('the config')
    yield from _check_whose(path, content, in_force)
    yield from _compare('checkpoint', path, origin, lacking, in_force)


def _check_whose(path: Path, content: Mapping, in_force: InForce) -> Iterator[Line]:
    """Compare a checkpoint's classes and recipe with the config and with its folder's marks."""
    trained, names = trainings.trained_record(content), trainings.class_names_of(content)
    if names and in_force.class_names and names != in_force.class_names:
        yield error(
            'checkpoint',
            f'{path}: its classes are {", ".join(names)}, the config has '
            f'{", ".join(in_force.class_names)}; scores would be called by wrong names; give the '
            'config that it was trained with',
        )
    try:
        trainings.refuse_mixed_folder(path, trained)
    except CellSegError as problem:
        yield error('checkpoint', str(problem))
    if in_force.settings and (changed := trainings.other_parts(path, trained, in_force.settings)):
        yield warn(
            'checkpoint',
            f'{path}: was trained with other values of {", ".join(changed)} than the config has; '
            'give the config and the options of its training',
        )


def _check_predictions(path: Path, in_force: InForce) -> Iterator[Line]:
    predictions = load_predictions(path)
    origin = predictions.provenance
    yield from _compare('predictions', path, origin, _lacking(origin), in_force)
    yield from _check_made_by('predictions', path, origin, in_force)
    checkpoint = Path(str(origin.get('checkpoint') or ''))
    known = origin.get('checkpoint_hash')
    if known and checkpoint.is_file() and files.file_hash(checkpoint)[:16] != known:
        yield warn('predictions', f'{path}: {checkpoint} has changed since; predict again')


def _check_made_by(what: str, path: Path, origin: Mapping, in_force: InForce) -> Iterator[Line]:
    """Compare a result with the checkpoint that counts in its folder, and with the config."""
    if why := why_foreign(path, origin):
        yield error(what, f'{path}: {why}; test it again with tools/test.py')
    names = tuple(map(str, origin.get('class_names') or ()))
    if names and in_force.class_names and names != in_force.class_names:
        yield error(
            what,
            f'{path}: its classes are {", ".join(names)}, the config has '
            f'{", ".join(in_force.class_names)}; test it again with tools/test.py',
        )


def _lacking(origin: Mapping) -> list[str]:
    keys = PREDICTED_KEYS if 'members' in origin else (*PREDICTED_KEYS, *MODEL_KEYS)
    return [key for key in keys if key not in origin]


def _compare(
    what: str, path: Path, origin: Mapping, lacking: Sequence[str], in_force: InForce
) -> Iterator[Line]:
    """Say whether a file's origin is complete and is still what is there."""
    commit = str(origin.get('commit') or origin.get('code_commit') or '')
    found = []
    if lacking:
        found.append(warn(what, f'{path}: does not say {", ".join(lacking)}; make it again'))
    found += _moved(what, path, origin, in_force)
    if commit.endswith('+'):
        text = f'{path}: made with uncommitted changes on {commit[:-1]}; commit, and make it again'
        found.append(warn(what, text))
    versions, here = origin.get('versions') or {}, provenance.versions()
    shared = sorted(set(versions) & set(here) - {'cellseg-mm'})
    if other := [f'{k} {versions[k]} (now {here[k]})' for k in shared if versions[k] != here[k]]:
        text = f'{path}: made with {", ".join(other)}; the last digits may differ'
        found.append(warn(what, text))
    origin_text = ', '.join(
        f'{name} {value or "-"}'
        for name, value in (
            ('commit', commit),
            ('folds', origin.get('fold_hash')),
            ('data', origin.get('data_hash')),
        )
    )
    yield from found or [ok(what, f'{path}: opens; {origin_text}')]


def _moved(what: str, path: Path, origin: Mapping, in_force: InForce) -> Iterator[Line]:
    """Compare the folds and the data that a file was made from with those that are there."""
    fold_hash, data_hash = origin.get('fold_hash'), origin.get('data_hash')
    if fold_hash and in_force.fold_hash and fold_hash != in_force.fold_hash:
        yield error(
            what,
            f'{path}: made with folds {fold_hash}, the folds file has {in_force.fold_hash}; scores '
            'would not be out of fold; restore the folds file or train again',
        )
    if data_hash and in_force.data_hashes and data_hash not in in_force.data_hashes:
        there = ' and '.join(sorted(in_force.data_hashes))
        yield warn(
            what,
            f'{path}: made from data {data_hash}, there is {there} now; files were added, removed '
            'or changed; restore them, or make it again',
        )


def _check_json(path: Path, in_force: InForce) -> Iterator[Line]:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as problem:
        text = re.sub(r'\s+', ' ', str(problem))[:80]
        yield error('result', f'{path}: cannot be read ({text}); expected JSON; make it again')
        return
    if path.name == FINISHED:
        best = path.parent / str(content.get('best'))
        if not best.is_file():
            yield error('result', f'{path}: names {best.name}, which is gone; train again')
            return
        if files.file_hash(best)[:16] != content.get('best_hash'):
            yield error(
                'result',
                f'{path}: {best.name} is not the file that training ended with; restore it or '
                'train again',
            )
            return
    if path.name.endswith(SCORES_SUFFIX) and not content.get('provenance'):
        yield warn('result', f'{path}: does not say where it comes from; score again')
        return
    if path.name.endswith(SCORES_SUFFIX):
        wrong = list(_check_made_by('result', path, content['provenance'], in_force))
        yield from wrong or [ok('result', f'{path}: opens')]
        return
    yield ok('result', f'{path}: opens')

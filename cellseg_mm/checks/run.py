"""The doctor: looks at everything a result depends on, and says what to do.

In: configs. Out: :class:`~cellseg_mm.checks.lines.Line` records about the environment, the
data, the folds, every checkpoint and result file, and each config. Invariant: nothing is written
or trained, and a check that fails itself is one line and stops no other check.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DefaultScope

from cellseg_mm import runtime
from cellseg_mm.checks.lines import Line, error, ok, warn
from cellseg_mm.core import files, provenance
from cellseg_mm.core.errors import CellSegError
from cellseg_mm.core.progress import track
from cellseg_mm.data.folds import excluded_by, load_folds
from cellseg_mm.data.labels import Case, find_cases, read_gt
from cellseg_mm.data.preparing import prepare
from cellseg_mm.pipeline.dataset import data_fingerprint
from cellseg_mm.results.predictions import load_predictions
from cellseg_mm.training.load_config import default_work_dir
from cellseg_mm.training.train import FINISHED, dataset_settings, folds_path
from cellseg_mm.weights import checkpoints

CONSTRAINTS = Path(__file__).resolve().parents[2] / 'constraints.txt'
# What a checkpoint and a prediction file must say about where they come from.
TRAINED_KEYS = ('fold', 'split', 'fold_hash', 'data_hash', 'class_names', 'commit', 'versions')
PREDICTED_KEYS = ('fold_hash', 'class_names', 'versions')
MODEL_KEYS = ('data_hash', 'checkpoint_hash')  # of one model; an ensemble names its members
MIN_FREE_GB = 5.0
SHOWN = 10


@dataclass(frozen=True, slots=True)
class Now:
    """What results are compared with.

    Attributes:
        data_hashes: Fingerprint of the training cases, and of the test images where there are any.
        fold_hash: Of the folds file; '' without one.
    """

    data_hashes: frozenset[str]
    fold_hash: str


def run_checks(config_paths: Sequence[str], *, work_root: str | None = None) -> Iterator[Line]:
    """Yield every finding, environment first, then each config.

    Args:
        config_paths: Configs whose data, work folders and settings are checked.
        work_root: Folder of the work folders; None for ``work_dirs``.
    """
    yield from _guarded('environment', check_environment)
    yield from _guarded('disk', functools.partial(check_disk, Path(work_root or 'work_dirs')))
    truths: dict[tuple, object] = {}
    for path in config_paths:
        yield ok('config', path)
        try:
            cfg = Config.fromfile(path)
        except Exception as problem:  # a config is a program: anything may come out of it
            yield error('config', f'{path}: cannot be read ({problem}); correct it')
            continue
        work_dir = default_work_dir(path)
        if work_root is not None:
            work_dir = Path(work_root) / work_dir.relative_to('work_dirs')
        with DefaultScope.overwrite_default_scope('mmdet'):  # where types are looked up
            yield from check_config(cfg, work_dir, truths)


def check_config(cfg: Config, work_dir: Path, truths: dict[tuple, object]) -> Iterator[Line]:
    """Check one config with its data and its work folder; ``truths`` remembers read data."""
    from cellseg_mm.checks import settings

    data = dataset_settings(cfg)
    key = (str(data.data_root), str(folds_path(data)), tuple(data.metainfo.classes))
    if key not in truths:
        yield from _guarded('data', functools.partial(check_data, cfg))
        truths[key] = None
        try:
            cases = tuple(_cases_of(data, 'train'))
            rows = track(cases, description='reading cells', total=len(cases))
            truths[key] = settings.Truth(cases, tuple(read_gt(case) for case in rows))
        except CellSegError as problem:
            yield error('data', f'{problem}')
    truth = truths[key]
    yield from _guarded('files', functools.partial(check_work_dir, work_dir, _now(cfg)))
    yield from _guarded('learning rates', functools.partial(settings.check_learning_rates, cfg))
    yield from _guarded('norm', functools.partial(_check_norms, cfg))
    yield from _guarded('meta keys', functools.partial(settings.check_meta_keys, cfg))
    if truth is None:
        yield warn('sizes', 'anchors, caps and colours were not checked, the data have errors')
        return
    for what, check in (
        ('anchors', settings.check_anchors),
        ('smallest size', settings.check_min_sizes),
        ('caps', settings.check_caps),
        ('colours', settings.check_colours),
    ):
        yield from _guarded(what, functools.partial(check, cfg, truth))


def _guarded(what: str, check: Callable[[], Iterator[Line]]) -> Iterator[Line]:
    """Yield a check's lines; its own failure becomes one line."""
    try:
        yield from check()
    except CellSegError as problem:
        yield error(what, str(problem))
    except Exception as problem:  # foreign configs lack any key; the other checks go on
        yield error(
            what,
            f'the check could not be done ({type(problem).__name__}: {problem}); '
            'if the config is one of MMDetection with other parts, check this by hand',
        )


# ---- environment


def check_environment() -> Iterator[Line]:
    """Compare versions with constraints.txt; load the ops; look for CUDA."""
    import torch

    wanted = pinned_versions(CONSTRAINTS)
    differing = []
    for name, version in wanted.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # an optional one; what is needed fails at import
        if found.split('+')[0] != version:
            differing.append(f'{name} {found} (tested with {version})')
    if differing:
        yield warn(
            'versions', f'{", ".join(differing)}; install with: pip install -c constraints.txt'
        )
    elif wanted:
        yield ok('versions', f'as in constraints.txt, {len(wanted)} packages')
    else:
        yield warn('versions', f'{CONSTRAINTS}: not there, versions were not compared')
    yield ok('ops', f'NMS and RoIAlign come from {runtime.ops_backend()}')
    try:
        vision = metadata.version('torchvision')
    except metadata.PackageNotFoundError:
        vision = ''
    problem = runtime.torchvision_problem() if vision else None
    if problem:
        yield warn(
            'torchvision',
            f'{vision} does not work with torch {torch.__version__} ({problem}); expected the pair '
            'of one release, or none; nothing here needs it, but detectron2 and timm do',
        )
    else:
        yield ok('torchvision', vision or 'not installed, not needed')
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        yield ok(
            'CUDA',
            f'{card.name}, {card.total_memory / 2**30:.0f} GB, x {torch.cuda.device_count()}',
        )
    else:
        yield warn('CUDA', 'no device: training a full-size model takes days on a CPU')


def pinned_versions(path: Path) -> dict[str, str]:
    """Return the pinned versions of a constraints file that hold for this Python."""
    from packaging.requirements import InvalidRequirement, Requirement

    found = {}
    for line in path.read_text(encoding='utf-8').splitlines() if path.is_file() else []:
        text = line.split('#', 1)[0].strip()
        try:
            one = Requirement(text) if text else None
        except InvalidRequirement:
            continue
        if one is not None and (one.marker is None or one.marker.evaluate()):
            found[one.name] = next((s.version for s in one.specifier), '')
    return found


def check_disk(folder: Path) -> Iterator[Line]:
    """Check that the work folder can be written and has room."""
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(nearest).free / 2**30
    if not os.access(nearest, os.W_OK | os.X_OK):
        yield error(
            'disk',
            f'{nearest}: cannot be written; expected a folder for results; name another with '
            '--work-dir',
        )
    if free < MIN_FREE_GB:
        yield warn(
            'disk',
            f'{nearest}: {free:.1f} GB free; a full-size fold with checkpoints takes 2 to 3 GB; '
            'make room',
        )
    else:
        yield ok('disk', f'{nearest}: {free:.0f} GB free')


# ---- data and folds


def _cases_of(data: Mapping, split: str) -> list[Case]:
    """Find the cases of a split as the data set does."""
    excluded = excluded_by(folds_path(data))
    n_classes = len(data['metainfo']['classes'])
    return find_cases(data['data_root'], split, n_classes, exclude_names=excluded)


def check_data(cfg: Config) -> Iterator[Line]:
    """Verify data as tools/prepare_data.py does, and the folds against them."""
    data = dataset_settings(cfg)
    root, path = Path(data.data_root), folds_path(data)
    with tempfile.TemporaryDirectory() as folder:
        for index in (path.parent / 'index.json', root / 'index.json'):
            if index.is_file():
                shutil.copy(index, Path(folder) / 'index.json')
                break
        manifest = root / 'manifest.csv'
        listed, exclude_file = excluded_by(path), None
        if listed is not None:
            exclude_file = Path(folder) / 'exclude.txt'
            exclude_file.write_text('\n'.join(listed), encoding='utf-8')
        params = prepare.PrepareParams(
            class_names=tuple(data.metainfo.classes),
            out_dir=Path(folder),
            exclude_file=exclude_file,
            groups=prepare.GroupRule(csv_path=manifest if manifest.is_file() else None),
            n_folds=load_folds(path).n_folds if path.is_file() else prepare.PrepareParams().n_folds,
        )
        report = prepare.prepare(root, params)
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
        yield warn('data', f'{root}: {listed}; look at data_report.txt of tools/prepare_data.py')
    n_cells = sum(sum(facts.counts) for facts in report.train)
    if not report.errors:
        yield ok(
            'data',
            f'{root}: {len(report.train)} cases with {n_cells} cells, {len(report.test)} test '
            'images',
        )
    yield from _check_folds(path, data, [facts.name for facts in report.train], report)


def _check_folds(path: Path, data: Mapping, names: list[str], report: object) -> Iterator[Line]:
    if not path.is_file():
        yield warn(
            'folds',
            f'{path}: not there yet; make it with tools/prepare_data.py {data["data_root"]}',
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
            'scores will be optimistic; make the folds again with --groups-csv',
        )
    if all(group.startswith('alike:') for group in found.groups.values()):
        yield warn(
            'folds',
            f'{path}: made without groups; images of one patient may be in several folds; if '
            'patients gave several images, make them again with --groups-csv or --groups-regex',
        )
    sizes = ', '.join(str(len(part)) for part in found.names_by_fold)
    yield ok('folds', f'{path}: hash {found.hash}, {sizes} images, method {found.method}')


def _now(cfg: Config) -> Now:
    data = dataset_settings(cfg)
    hashes = set()
    for split in ('train', 'test'):
        try:
            cases = _cases_of(data, split)
        except CellSegError:
            continue  # said by check_data
        hashes.add(data_fingerprint(cases))
    try:
        fold_hash = load_folds(folds_path(data)).hash
    except CellSegError:
        fold_hash = ''
    return Now(frozenset(hashes), fold_hash)


# ---- results


def check_work_dir(work_dir: Path, now: Now) -> Iterator[Line]:
    """Open every checkpoint and result file and compare what it says with how things are."""
    if not work_dir.is_dir():
        yield ok('files', f'{work_dir}: not there yet')
        return
    yield from _check_leftovers(work_dir)
    for path in sorted(work_dir.rglob('*.pth')):
        if not path.name.startswith('.tmp-'):
            yield from _guarded('checkpoint', functools.partial(_check_checkpoint, path, now))
    for path in sorted(work_dir.rglob('*.npz')):
        if not path.name.startswith('.tmp-'):
            yield from _guarded('predictions', functools.partial(_check_predictions, path, now))
    for path in sorted(work_dir.rglob('*.json')):
        # mmengine's own scalars are JSON lines
        if 'vis_data' not in path.parts and not path.name.startswith('.tmp-'):
            yield from _guarded('result', functools.partial(_check_json, path))


def _check_leftovers(work_dir: Path) -> Iterator[Line]:
    left = sorted(work_dir.rglob('.tmp-*'))
    if left:
        yield warn(
            'files',
            f'{work_dir}: {len(left)} unfinished files of killed runs, such as {left[0].name}; '
            'delete them when no run is active',
        )


def _check_checkpoint(path: Path, now: Now) -> Iterator[Line]:
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
    yield from _compare('checkpoint', path, origin, lacking, now)


def _check_predictions(path: Path, now: Now) -> Iterator[Line]:
    predictions = load_predictions(path)
    origin = predictions.provenance
    yield from _compare('predictions', path, origin, _lacking(origin), now)
    checkpoint = Path(str(origin.get('checkpoint') or ''))
    known = origin.get('checkpoint_hash')
    if known and checkpoint.is_file() and files.file_hash(checkpoint)[:16] != known:
        yield warn('predictions', f'{path}: {checkpoint} has changed since; predict again')


def _lacking(origin: Mapping) -> list[str]:
    keys = PREDICTED_KEYS if 'members' in origin else (*PREDICTED_KEYS, *MODEL_KEYS)
    return [key for key in keys if key not in origin]


def _compare(
    what: str, path: Path, origin: Mapping, lacking: Sequence[str], now: Now
) -> Iterator[Line]:
    """Say whether a file's origin is complete and is still what is there."""
    commit = str(origin.get('commit') or origin.get('code_commit') or '')
    found = []
    if lacking:
        found.append(warn(what, f'{path}: does not say {", ".join(lacking)}; make it again'))
    found += _moved(what, path, origin, now)
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


def _moved(what: str, path: Path, origin: Mapping, now: Now) -> Iterator[Line]:
    """Compare the folds and the data that a file was made from with those that are there."""
    fold_hash, data_hash = origin.get('fold_hash'), origin.get('data_hash')
    if fold_hash and now.fold_hash and fold_hash != now.fold_hash:
        yield error(
            what,
            f'{path}: made with folds {fold_hash}, the folds file has {now.fold_hash}; scores '
            'would not be out of fold; restore the folds file or train again',
        )
    if data_hash and now.data_hashes and data_hash not in now.data_hashes:
        there = ' and '.join(sorted(now.data_hashes))
        yield warn(
            what,
            f'{path}: made from data {data_hash}, there is {there} now; files were added, removed '
            'or changed; restore them, or make it again',
        )


def _check_json(path: Path) -> Iterator[Line]:
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
    if path.name.endswith('.scores.json') and not content.get('provenance'):
        yield warn('result', f'{path}: does not say where it comes from; score again')
        return
    yield ok('result', f'{path}: opens')


def _check_norms(cfg: Config) -> Iterator[Line]:
    import torch

    from cellseg_mm.checks.settings import check_norms

    yield from check_norms(
        cfg, n_devices=max(1, torch.cuda.device_count()), has_cuda=torch.cuda.is_available()
    )

"""The doctor: looks at everything a result depends on, and says what to do.

In: configs. Out: :class:`~cellseg_mm.checks.lines.Line` records about the environment, the
data, the folds, every checkpoint and result file, and each config. Invariant: nothing is written
or trained, and a check that fails itself is one line and stops no other check.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DefaultScope

from cellseg_mm import runtime
from cellseg_mm.checks.lines import Line, error, guarded, ok, warn
from cellseg_mm.checks.on_disk import check_data, check_work_dir, in_force_of
from cellseg_mm.core.errors import CellSegError
from cellseg_mm.core.layout import HOME, WORK_ROOT, work_dir_of
from cellseg_mm.core.progress import track
from cellseg_mm.data.config import DataSettings
from cellseg_mm.data.images import cases_of
from cellseg_mm.data.labels import read_gt

CONSTRAINTS = HOME / 'constraints.txt'
MIN_FREE_GB = 5.0


def run_checks(config_paths: Sequence[str], *, work_root: str | None = None) -> Iterator[Line]:
    """Yield every finding, environment first, then each config.

    Args:
        config_paths: Configs whose data, work folders and settings are checked.
        work_root: Folder of the work folders; None for ``work_dirs``.
    """
    yield from guarded('environment', check_environment)
    yield from guarded('disk', functools.partial(check_disk, Path(work_root or WORK_ROOT)))
    truths: dict[tuple, object] = {}
    for path in config_paths:
        yield ok('config', path)
        try:
            cfg = Config.fromfile(path)
        except Exception as problem:  # a config is a program: anything may come out of it
            yield error('config', f'{path}: cannot be read ({problem}); correct it')
            continue
        with DefaultScope.overwrite_default_scope('mmdet'):  # where types are looked up
            yield from guarded('settings', functools.partial(check_settings_of, cfg, path))
            yield from check_config(cfg, work_dir_of(path, work_root), truths)


def check_settings_of(cfg: Config, path: str) -> Iterator[Line]:
    """Tell which settings do nothing or contradict each other, as every tool does."""
    from cellseg_mm.training.config_faults import config_faults

    found = list(config_faults(cfg, path))
    for fault in found:
        yield (error if fault.is_error else warn)('settings', fault.text)
    if not found:
        yield ok('settings', 'every option is known, classes and schedules fit')


def check_config(cfg: Config, work_dir: Path, truths: dict[tuple, object]) -> Iterator[Line]:
    """Check one config with its data and its work folder; ``truths`` remembers read data."""
    from cellseg_mm.checks import settings

    data = DataSettings.from_config(cfg)
    key = (data.data_root, data.folds_path, data.class_names)
    if key not in truths:
        yield from guarded('data', functools.partial(check_data, cfg))
        truths[key] = None
        try:
            cases = tuple(cases_of(data, 'train'))
            rows = track(cases, description='reading cells', total=len(cases))
            truths[key] = settings.Truth(cases, tuple(read_gt(case) for case in rows))
        except CellSegError as problem:
            yield error('data', f'{problem}')
    truth = truths[key]
    yield from guarded('files', functools.partial(check_work_dir, work_dir, in_force_of(cfg)))
    yield from guarded('learning rates', functools.partial(settings.check_learning_rates, cfg))
    yield from guarded('norm', functools.partial(_check_norms, cfg))
    yield from guarded('meta keys', functools.partial(settings.check_meta_keys, cfg))
    if truth is None:
        yield warn('sizes', 'anchors, caps and colours were not checked, the data have errors')
        return
    for what, check in (
        ('anchors', settings.check_anchors),
        ('smallest size', settings.check_min_sizes),
        ('caps', settings.check_caps),
        ('colours', settings.check_colours),
    ):
        yield from guarded(what, functools.partial(check, cfg, truth))


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
            f'{nearest}: cannot be written; expected a folder for results; name another, '
            'as tools/train.py does with --work-dir',
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


# ---- results


def _check_norms(cfg: Config) -> Iterator[Line]:
    import torch

    from cellseg_mm.checks.settings import check_norms

    yield from check_norms(
        cfg, n_devices=max(1, torch.cuda.device_count()), has_cuda=torch.cuda.is_available()
    )

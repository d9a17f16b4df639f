"""Checks a data folder once, completely, before anything expensive, and makes its folds.

In: a data folder (docs/formats.md). Out: :class:`PrepareReport`, and beside the data or in another
folder ``folds.json``, ``index.json`` (what was found per case, so that the next run reads changed
files only) and ``data_report.txt``.
Invariant: a data folder with a case that cannot be used gets no folds; no case is left out unless
exclude.txt names it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cellseg_mm.core.errors import CellSegError, DataError, FoldError
from cellseg_mm.core.files import write_json, write_text
from cellseg_mm.core.layout import DATA_REPORT, FOLDS, INDEX, PIXEL_SIZE, TEST, VALUE_RANGE
from cellseg_mm.core.progress import track
from cellseg_mm.data import folds as fold_files
from cellseg_mm.data import pixel_size
from cellseg_mm.data.cases import Case, Scan, read_exclude, scan_cases
from cellseg_mm.data.folds import Folds
from cellseg_mm.data.intensity import recorded_range, save_range
from cellseg_mm.data.preparing import value_range
from cellseg_mm.data.preparing.case_checks import CaseFacts, Finding, check_case
from cellseg_mm.data.preparing.extension import extend_folds
from cellseg_mm.data.preparing.groups import SPLIT_ALIKE, alike_pairs, find_groups
from cellseg_mm.data.preparing.index import Index
from cellseg_mm.data.preparing.records import PrepareParams, PrepareReport
from cellseg_mm.data.preparing.text import full_text

FEW_CASES = 24  # starting processes takes as long as checking these
NO_GROUPS = 'folds without groups'
NO_GROUPS_TEXT = (
    'neither --groups-csv nor --groups-regex: images of one patient may be in different folds; if '
    'patients gave several images, out-of-fold scores will be better than the models are.'
)


def prepare(data_root: Path | str, params: PrepareParams | None = None) -> PrepareReport:
    """Check every case of a data folder and write its folds, index and report.

    Nothing in ``data_root`` is changed but the three result files, and these only where
    ``params.out_dir`` is None. An existing folds file that fits is kept, with changes by hand.

    Args:
        data_root: The data folder.
        params: Settings.

    Returns:
        The report; look at ``errors`` or call ``raise_for_errors``.

    Raises:
        CellSegError: There is no such folder, the results cannot be written, or a worker process
            died. What is wrong with the data or the folds is in the report.
    """
    params = params or PrepareParams()
    root = Path(data_root)
    out_dir = params.out_dir or root
    _check_writable(root, out_dir)
    train_scan, test_scan = _scan_both(root, params)
    index = Index.load(out_dir / INDEX, params) if params.use_index else Index({})
    train = _check_all(train_scan.cases, index, params, is_labelled=True)
    test = _check_all(test_scan.cases, index, params, is_labelled=False)
    errors = [*train_scan.problems, *test_scan.problems]
    errors += [text for facts in (*train, *test) for text in facts.errors]
    alike = alike_pairs(train)
    warnings = _all_warnings(root, (train, test), (train_scan, test_scan), params)
    warnings += _duplicates(root, train, test, alike, is_joined=params.groups.alike)
    report = PrepareReport(
        data_root=root,
        class_names=params.class_names,
        train=tuple(train),
        test=tuple(test),
        errors=tuple(errors),
        warnings=tuple(warnings),
        excluded=tuple(sorted({*train_scan.excluded, *test_scan.excluded})),
        groups={},
        folds=None,
        folds_path=out_dir / FOLDS,
        is_folds_kept=False,
        n_reused=index.n_reused,
        rule=params.groups,
    )
    if not errors:
        try:
            report = _with_size(report, params)
            report = _with_range(report, params, [*train_scan.cases, *test_scan.cases])
            report = _with_folds(report, params, alike)
        except DataError as problem:
            report = replace(report, errors=tuple(problem.problems))
        except CellSegError as problem:
            report = replace(report, errors=(str(problem),))
    cases = [(case, True) for case in train_scan.cases]
    cases += [(case, False) for case in test_scan.cases]
    _write_results(report, out_dir, index.content(cases, [*train, *test], params))
    return report


def _check_writable(root: Path, out_dir: Path) -> None:
    """Say so before the work rather than after it."""
    if not root.is_dir():
        raise DataError([f'{root}: no such folder; expected the data folder; check the path.'])
    nearest = next(p for p in (out_dir, *out_dir.absolute().parents) if p.exists())
    if not os.access(nearest, os.W_OK | os.X_OK) or not nearest.is_dir():
        raise CellSegError(
            f'{out_dir}: cannot be written; expected a folder for {FOLDS} and {INDEX}; '
            'name another with --out.'
        )


def _scan_both(root: Path, params: PrepareParams) -> tuple[Scan, Scan]:
    scan = partial(
        scan_cases,
        root,
        n_classes=len(params.class_names),
        exclude_file=params.exclude_file,
        max_pixels=params.max_pixels,
    )
    if os.path.lexists(root / TEST):
        return scan('train'), scan('test')
    note = f'{root / TEST}: not there; there are no test images to predict.'
    return scan('train'), Scan([], notes=[note])


# ---- checking, in parallel and only what changed


def _check_all(
    cases: Sequence[Case], index: Index, params: PrepareParams, *, is_labelled: bool
) -> list[CaseFacts]:
    known = [index.find(case, is_labelled=is_labelled) for case in cases]
    todo = [case for case, facts in zip(cases, known, strict=True) if facts is None]
    check = partial(
        check_case,
        n_classes=len(params.class_names),
        is_labelled=is_labelled,
        max_pixels=params.max_pixels,
    )
    n_workers = params.n_workers or min(os.cpu_count() or 1, 8)
    what = 'Checking cases' if is_labelled else 'Checking test images'
    fresh = iter(list(track(_mapped(check, todo, n_workers), description=what, total=len(todo))))
    return [facts if facts is not None else next(fresh) for facts in known]


def _mapped(check: partial[CaseFacts], cases: list[Case], n_workers: int) -> Iterator[CaseFacts]:
    if n_workers == 1 or len(cases) < FEW_CASES:
        yield from map(check, cases)
        return
    # spawn: forking a process that may hold threads (OpenBLAS, torch) can hang.
    context = multiprocessing.get_context('spawn')
    n_done = 0
    try:
        with ProcessPoolExecutor(min(n_workers, len(cases)), mp_context=context) as pool:
            for facts in pool.map(check, cases, chunksize=4):
                n_done += 1
                yield facts
    except BrokenProcessPool as problem:
        near = ', '.join(case.name for case in cases[n_done : n_done + 4 * n_workers + 4])
        raise CellSegError(
            f'a checking process died (out of memory, killed, or a codec crashed) at or soon '
            f'after one of {near}; expected it to finish; '
            'try --workers 1, and list the case that fails in exclude.txt.'
        ) from problem


# ---- across cases


def _all_warnings(
    root: Path,
    all_facts: tuple[Sequence[CaseFacts], Sequence[CaseFacts]],
    scans: tuple[Scan, Scan],
    params: PrepareParams,
) -> list[Finding]:
    found = [warning for part in all_facts for facts in part for warning in facts.warnings]
    found += [Finding('note', 1, text) for scan in scans for text in scan.notes]
    if not any(scan.problems for scan in scans):
        try:
            listed = read_exclude(root, params.exclude_file)
        except CellSegError:
            listed = frozenset()
        for name in sorted(listed.difference(*(scan.excluded for scan in scans))):
            text = f'{params.exclude_file or root / "exclude.txt"}: no case is called {name}.'
            found.append(Finding('unknown name in exclude.txt', 1, text))
    return found


def _duplicates(
    root: Path,
    train: Sequence[CaseFacts],
    test: Sequence[CaseFacts],
    alike: Sequence[tuple[int, int]],
    *,
    is_joined: bool,
) -> list[Finding]:
    found = []
    what = f'share a group; {SPLIT_ALIKE}' if is_joined else 'need not share a fold'

    by_hash: dict[str, list[str]] = {}
    for split, all_facts in (('train', train), ('test', test)):
        for facts in all_facts:
            if facts.pixel_hash:
                by_hash.setdefault(facts.pixel_hash, []).append(f'{split}/{facts.name}')
    for names in by_hash.values():
        if len(names) > 1:
            text = f'{root}: {" and ".join(names)} are the same image; keep one.'
            is_leak = {name.split('/')[0] for name in names} == {'train', 'test'}
            kind = 'test image among the training images' if is_leak else 'duplicate image'
            found.append(Finding(kind, len(names), text))
    for i, j in alike:
        if train[i].pixel_hash != train[j].pixel_hash:
            text = f'{root}: train/{train[i].name} and train/{train[j].name} look alike and {what}.'
            found.append(Finding('near-duplicate image', 2, text))
    return found


def _with_range(report: PrepareReport, params: PrepareParams, cases: list[Case]) -> PrepareReport:
    keep = params.value_range == value_range.KEEP
    chosen = value_range.choose(
        cases,
        [*report.train, *report.test],
        asked=params.value_range,
        recorded=recorded_range(report.data_root, report.folds_path) if keep else None,
    )
    warnings = (
        chosen.warnings if chosen else value_range.unused(report.folds_path, params.value_range)
    )
    return replace(report, chosen=chosen, warnings=(*report.warnings, *warnings))


def _with_size(report: PrepareReport, params: PrepareParams) -> PrepareReport:
    """Note the size of pixels that all images share, or warn that they differ."""
    sizes = [facts.um_per_px for facts in (*report.train, *report.test)]
    share, counts = pixel_size.of_collection(sizes)
    given = pixel_size.stated(params.um_per_px, '--um-per-px')
    listed = [f'{n} images of {pixel_size.um_text(size)}' for size, n in counts]
    if n_untold := sizes.count(None):
        listed.append(f'{n_untold} that do not say it')
    text = ''
    if len(counts) > 1:
        text = (
            f'{report.data_root}: pixels are of different sizes ({", ".join(listed)}); cells of '
            'one kind come in several sizes, which nothing undoes in training; resize the images '
            'and their label maps to one size.'
        )
    elif given and share and not pixel_size.is_same(given, share):
        text = (
            f'{report.data_root}: --um-per-px says {pixel_size.um_text(given)}, the files '
            f'{", ".join(listed)}; what was asked for is recorded; look which is right.'
        )
    found = (Finding('size of pixels', len(sizes), text),) if text else ()
    return replace(report, um_per_px=given or share, warnings=(*report.warnings, *found))


def _with_folds(
    report: PrepareReport, params: PrepareParams, alike: Sequence[tuple[int, int]]
) -> PrepareReport:
    rule, warnings = params.groups.for_data(report.data_root)
    others = {*report.excluded, *(facts.name for facts in report.test)}
    groups, found = find_groups(report.train, rule, alike, others=others)
    warnings += found
    report = replace(report, groups=groups, rule=rule, warnings=(*report.warnings, *warnings))
    if not params.with_folds:
        return report
    warnings = []
    if params.method == 'grouped' and not rule.is_given:
        warnings.append(Finding(NO_GROUPS, len(report.train), NO_GROUPS_TEXT))
    try:
        made = fold_files.make_folds(
            [facts.name for facts in report.train],
            np.array([facts.counts for facts in report.train], dtype=np.int64),
            n_folds=params.n_folds,
            seed=params.seed,
            groups=groups,
            method=params.method,
        )
    except FoldError as problem:
        raise FoldError(f'{problem}{_way_out(report, alike)}') from problem
    made = replace(made, rule=rule.record(report.data_root))
    if params.exclude_file is not None:  # nothing but the folds file would know of it later
        listed = read_exclude(report.data_root, params.exclude_file)
        made = replace(made, excluded=tuple(sorted(listed)))
    kept = _existing_folds(report, made, params)
    if kept is not None and kept.hash != made.hash and not kept.added:
        text = f'{report.folds_path}: was changed by hand and fits the data; it is kept.'
        warnings.append(Finding('folds changed by hand', 1, text))
    return replace(
        report,
        folds=made if kept is None else kept,
        is_folds_kept=kept is not None,
        warnings=(*report.warnings, *warnings),
    )


def _way_out(report: PrepareReport, alike: Sequence[tuple[int, int]]) -> str:
    """Say why there may be fewer groups than folds."""
    told = [w.text.rstrip('.') for w in report.warnings if w.kind == 'one group']
    if report.rule.alike and alike:
        told.append(f'{len(alike)} pair(s) of images look alike and share a group; {SPLIT_ALIKE}')
    return ''.join(f'; {text}' for text in told)


def _existing_folds(report: PrepareReport, made: Folds, params: PrepareParams) -> Folds | None:
    """Return an existing file's folds, extended if asked for; None where it may be replaced."""
    path, rule = report.folds_path, report.rule
    if params.new_folds or not os.path.lexists(path):
        return None
    way_out = 'pass --new-folds to replace it, or keep it and give its settings'
    try:
        old = fold_files.load_folds(path, None if params.extend_folds else made.names)
    except FoldError as problem:
        way_out += '; new cases are added by --extend-folds'
        raise FoldError(f'{problem} ({way_out})') from problem
    if params.extend_folds and old.names != made.names:
        try:
            old = extend_folds(old, report.train, report.groups)
        except FoldError as problem:
            raise FoldError(f'{path}: cannot be extended: {problem}') from problem
    for what in ('n_folds', 'method', 'seed', 'groups'):
        before, now = getattr(old, what), getattr(made, what)
        if before != now:
            detail = f' ({before}, now {now})'
            if what == 'groups':
                is_taken = rule.csv_path is not None and params.groups.csv_path is None
                detail = f' (now from {rule.csv_path}, unless --no-manifest)' if is_taken else ''
            raise FoldError(
                f'{path}: was made with another setting of {what}{detail}; expected the same, '
                f'since models may have been trained on it; {way_out}.'
            )
    return replace(old, excluded=made.excluded, rule=made.rule)


def _write_results(report: PrepareReport, out_dir: Path, index: dict[str, Any]) -> None:
    try:
        write_json(out_dir / INDEX, index, indent=None)
        write_text(out_dir / DATA_REPORT, full_text(report))
        folds = report.folds
        if folds is not None and (
            not report.is_folds_kept
            # test images may be left out without a change of the folds, and older files say no rule
            or fold_files.load_folds(report.folds_path) != folds
        ):
            fold_files.save_folds(report.folds_path, folds)
        if folds is not None and report.chosen is not None:
            save_range(out_dir / VALUE_RANGE, report.chosen.value_range)
        if folds is not None and report.um_per_px is not None:
            pixel_size.save_size(out_dir / PIXEL_SIZE, report.um_per_px)
    except OSError as problem:
        raise CellSegError(
            f'{out_dir}: cannot be written ({problem.strerror}); expected a folder with space for '
            f'{FOLDS} and {INDEX}; make room, or name another with --out.'
        ) from problem


# ---- texts

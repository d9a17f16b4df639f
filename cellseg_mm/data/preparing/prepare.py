"""Checks a data folder once, completely, before anything expensive, and makes its folds.

In: a data folder (docs/formats.md). Out: :class:`PrepareReport`, and beside the data or in another
folder ``folds.json``, ``index.json`` (what was found per case, so that the next run reads changed
files only) and ``data_report.txt``.
Invariant: a data folder with a case that cannot be used gets no folds; no case is left out unless
exclude.txt names it.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from cellseg_mm.data import folds as fold_files
from cellseg_mm.data.preparing.case_checks import CaseFacts, Finding, check_case, near_duplicates
from cellseg_mm.data.cases import Case, Scan, read_exclude, scan_cases
from cellseg_mm.core.errors import CellSegError, ConfigError, DataError, FoldError
from cellseg_mm.core.files import write_json, write_text
from cellseg_mm.data.folds import ORIGINAL_SEED, Folds, Method
from cellseg_mm.core.progress import track
from cellseg_mm.data.tiff import DEFAULT_MAX_PIXELS

INDEX_VERSION = 1
DEFAULT_CLASSES = ('epithelial', 'lymphocyte', 'neutrophil', 'macrophage')
FEW_CASES = 24  # starting processes takes as long as checking these
SHOWN = 5  # names of a group of findings on the screen; the report file has all
SIZE_STEPS_PX = (64, 256, 512, 1024, 2048)  # longer side
NO_GROUPS = 'folds without groups'
NO_GROUPS_TEXT = (
    'neither --groups-csv nor --groups-regex: images of one patient may be in different folds; if '
    'patients gave several images, out-of-fold scores will be better than the models are.'
)


@dataclass(frozen=True, slots=True)
class GroupRule:
    """How to know which cases belong together (one patient, one slide).

    Attributes:
        csv_path: Table with a header row, or None.
        name_column: Its column of case names.
        group_column: Its column of groups; an empty cell means unknown.
        regex: Pattern searched in the CSV's group where there is a CSV, else in the case name;
            the first bracket (or the whole match) is the group. Empty: not used.
        alike: Whether images that look alike are one group too.

    Raises:
        ConfigError: ``regex`` is no regular expression.
    """

    csv_path: Path | None = None
    name_column: str = 'uuid'
    group_column: str = 'patient'
    regex: str = ''
    alike: bool = True

    @property
    def is_given(self) -> bool:
        """Whether a table or an expression says which cases belong together."""
        return self.csv_path is not None or bool(self.regex)

    def __post_init__(self) -> None:
        try:
            re.compile(self.regex)
        except re.error as problem:
            raise ConfigError(
                f'--groups-regex {self.regex!r}: not a regular expression ({problem}); '
                "expected one such as '(TCGA-..-....)'."
            ) from problem


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
        n_workers: Processes; 0 means one per core, at most 8.
        max_pixels: Most pixels of an image that are accepted.
        use_index: Whether facts of unchanged files are taken from ``index.json``.
    """

    class_names: tuple[str, ...] = DEFAULT_CLASSES
    out_dir: Path | None = None
    exclude_file: Path | None = None
    groups: GroupRule = field(default_factory=GroupRule)
    n_folds: int = 5
    seed: int = ORIGINAL_SEED
    method: Method = 'grouped'
    new_folds: bool = False
    n_workers: int = 0
    max_pixels: int = DEFAULT_MAX_PIXELS
    use_index: bool = True

    def __post_init__(self) -> None:
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

    def raise_for_errors(self) -> None:
        """Raise all errors together.

        Raises:
            DataError: There are errors.
        """
        if self.errors:
            raise DataError(list(self.errors))


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
    index = _Index.load(out_dir / 'index.json', params) if params.use_index else _Index({})
    train = _check_all(train_scan.cases, index, params, is_labelled=True)
    test = _check_all(test_scan.cases, index, params, is_labelled=False)
    errors = [*train_scan.problems, *test_scan.problems]
    errors += [text for facts in (*train, *test) for text in facts.errors]
    alike = _alike(train)
    warnings = _all_warnings(root, (train, test), (train_scan, test_scan), params)
    warnings += _duplicates(root, train, test, alike)
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
        folds_path=out_dir / 'folds.json',
        is_folds_kept=False,
        n_reused=index.n_reused,
    )
    if not errors:
        try:
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
            f'{out_dir}: cannot be written; expected a folder for folds.json and index.json; '
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
    if os.path.lexists(root / 'test_release'):
        return scan('train'), scan('test')
    note = f'{root / "test_release"}: not there; there are no test images to predict.'
    return scan('train'), Scan([], notes=[note])


# ---- checking, in parallel and only what changed


@dataclass(slots=True)
class _Index:
    """Facts of an earlier run, by case; see :func:`_fingerprint` for when they count."""

    entries: dict[str, dict]
    n_reused: int = 0

    @classmethod
    def load(cls, path: Path, params: PrepareParams) -> _Index:
        """Read an index; one that is missing, damaged or of other settings counts as empty."""
        try:
            content = json.loads(path.read_bytes())
            if content['settings'] != _index_settings(params):
                return cls({})
            return cls({str(key): dict(entry) for key, entry in content['cases'].items()})
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return cls({})

    def find(self, case: Case, *, is_labelled: bool) -> CaseFacts | None:
        """Return a case's facts if not one of its files changed."""
        entry = self.entries.get(_index_key(case, is_labelled))
        if entry is None or entry.get('files') != _fingerprint(case):
            return None
        try:
            facts = _facts_from_json(entry['facts'], case)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
        self.n_reused += 1
        return facts

    def content(
        self,
        cases: Sequence[tuple[Case, bool]],
        all_facts: Sequence[CaseFacts],
        params: PrepareParams,
    ) -> dict:
        """Return the JSON value of a new index; cases with errors are read again next time."""
        entries = {
            _index_key(case, is_labelled): {'files': _fingerprint(case), 'facts': asdict(facts)}
            for (case, is_labelled), facts in zip(cases, all_facts, strict=True)
            if not facts.errors
        }
        return {'settings': _index_settings(params), 'cases': dict(sorted(entries.items()))}


def _index_settings(params: PrepareParams) -> dict:
    return {
        'version': INDEX_VERSION,
        'n_classes': len(params.class_names),
        'max_pixels': params.max_pixels,
    }


def _index_key(case: Case, is_labelled: bool) -> str:
    return f'{"train" if is_labelled else "test"}/{case.name}'


def _fingerprint(case: Case) -> dict[str, list[int | str]]:
    """Return path, size in bytes and time of change in ns of each file of a case."""
    paths = {'image': case.image_path, **{str(k): p for k, p in case.label_paths.items()}}
    result: dict[str, list[int | str]] = {}
    for key, path in paths.items():
        try:
            status = path.stat()
        except OSError:  # removed meanwhile; reading it reports that
            result[key] = [str(path), -1, -1]
            continue
        result[key] = [str(path), status.st_size, status.st_mtime_ns]
    return result


def _facts_from_json(value: dict, case: Case) -> CaseFacts:
    facts = CaseFacts(
        name=case.name,
        image_hw=case.image_hw,
        counts=tuple(int(n) for n in value['counts']),
        area_sums=tuple(int(n) for n in value['area_sums']),
        pixel_hash=str(value['pixel_hash']),
        thumb=str(value['thumb']),
        warnings=tuple(
            Finding(str(w['kind']), int(w['count']), str(w['text'])) for w in value['warnings']
        ),
    )
    if len(bytes.fromhex(facts.thumb)) != 256 or len(facts.counts) != len(facts.area_sums):
        raise ValueError('not what was written')
    return facts


def _check_all(
    cases: Sequence[Case], index: _Index, params: PrepareParams, *, is_labelled: bool
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


def _alike(train: Sequence[CaseFacts]) -> list[tuple[int, int]]:
    """Return pairs of indices of readable images that look alike."""
    usable = [i for i, facts in enumerate(train) if facts.thumb]
    return [(usable[i], usable[j]) for i, j in near_duplicates([train[i] for i in usable])]


def _duplicates(
    root: Path,
    train: Sequence[CaseFacts],
    test: Sequence[CaseFacts],
    alike: Sequence[tuple[int, int]],
) -> list[Finding]:
    found = []
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
            text = f'{root}: train/{train[i].name} and train/{train[j].name} look alike.'
            found.append(Finding('near-duplicate image', 2, text))
    return found


def find_groups(
    facts: Sequence[CaseFacts], rule: GroupRule, alike: Sequence[tuple[int, int]]
) -> tuple[dict[str, str], list[Finding]]:
    """Find out which cases belong together.

    Equal images are always one group. A case without a known group is alone, unless it looks like
    another one. Where likeness joins two known groups, both become one, named ``a+b``.

    Args:
        facts: Facts of the training cases.
        rule: Where groups come from.
        alike: Pairs of indices of images that look alike; see ``case_checks.near_duplicates``.

    Returns:
        Group by case name, only for cases whose group is known or shared; and warnings.

    Raises:
        DataError: The CSV is missing, has not the columns, or names a case twice with two groups.
    """
    known, warnings = _known_groups([f.name for f in facts], rule)
    parent = list(range(len(facts)))

    def top(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_with: dict[tuple[str, str], int] = {}
    for i, one in enumerate(facts):
        keys = [('pixels', one.pixel_hash)]
        keys += [('group', known[one.name])] if one.name in known else []
        for key in keys:
            parent[top(i)] = top(first_with.setdefault(key, i))
    for i, j in alike if rule.alike else []:
        parent[top(j)] = top(i)
    members: dict[int, list[str]] = {}
    for i, one in enumerate(facts):
        members.setdefault(top(i), []).append(one.name)
    groups: dict[str, str] = {}
    for names in members.values():
        labels = sorted({known[name] for name in names if name in known})
        if labels or len(names) > 1:
            group = '+'.join(labels) or f'alike:{min(names)}'
            groups.update(dict.fromkeys(names, group))
        if len(labels) > 1:
            text = f'{" and ".join(labels)}: images of these groups look alike; they are one group.'
            warnings.append(Finding('groups joined', len(labels), text))
    return groups, warnings


def _known_groups(names: Sequence[str], rule: GroupRule) -> tuple[dict[str, str], list[Finding]]:
    if not rule.is_given:
        return {}, []
    source = {name: name for name in names}
    if rule.csv_path is not None:
        table = _read_groups_csv(rule.csv_path, rule)
        source = {name: table.get(name, '') for name in names}
    if rule.regex:
        matches = {name: re.search(rule.regex, text) for name, text in source.items()}
        source = {
            name: (match[1] or '' if match.re.groups else match[0]) if match else ''
            for name, match in matches.items()
        }
    known = {name: group for name, group in source.items() if group}
    without = [name for name in names if name not in known]
    if not without:
        return known, []
    text = f'{len(without)} case(s) without a known group, such as {without[0]}; each is alone.'
    return known, [Finding('no group', len(without), text)]


def _read_groups_csv(path: Path, rule: GroupRule) -> dict[str, str]:
    try:
        with path.open(encoding='utf-8-sig', newline='') as stream:
            reader = csv.DictReader(stream)
            columns = reader.fieldnames or []
            missing = [c for c in (rule.name_column, rule.group_column) if c not in columns]
            if missing:
                raise DataError(
                    [
                        f'{path}: no column {" and ".join(missing)}; the columns are '
                        f'{", ".join(columns) or "none"}; '
                        'name the right ones with --name-column and --group-column.'
                    ]
                )
            rows = [(row[rule.name_column], row[rule.group_column]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise DataError(
            [f'{path}: cannot be read ({problem}); expected a CSV table in UTF-8.']
        ) from problem
    table: dict[str, str] = {}
    for name, group in rows:
        name, group = (name or '').strip(), (group or '').strip()
        if table.setdefault(name, group) != group:
            raise DataError(
                [f'{path}: {name} has the groups {table[name]} and {group}; expected one.']
            )
    return table


def _with_folds(
    report: PrepareReport, params: PrepareParams, alike: Sequence[tuple[int, int]]
) -> PrepareReport:
    groups, warnings = find_groups(report.train, params.groups, alike)
    if params.method == 'grouped' and not params.groups.is_given:
        warnings.append(Finding(NO_GROUPS, len(report.train), NO_GROUPS_TEXT))
    made = fold_files.make_folds(
        [facts.name for facts in report.train],
        np.array([facts.counts for facts in report.train], dtype=np.int64),
        n_folds=params.n_folds,
        seed=params.seed,
        groups=groups,
        method=params.method,
    )
    if params.exclude_file is not None:  # nothing but the folds file would know of it later
        listed = read_exclude(report.data_root, params.exclude_file)
        made = replace(made, excluded=tuple(sorted(listed)))
    kept = _existing_folds(report.folds_path, made, params)
    if kept is not None and kept.hash != made.hash:
        text = f'{report.folds_path}: was changed by hand and fits the data; it is kept.'
        warnings.append(Finding('folds changed by hand', 1, text))
    return replace(
        report,
        folds=made if kept is None else kept,
        is_folds_kept=kept is not None,
        groups=groups,
        warnings=(*report.warnings, *warnings),
    )


def _existing_folds(path: Path, made: Folds, params: PrepareParams) -> Folds | None:
    """Return an existing file's folds to keep; None where there is none or it may be replaced."""
    if params.new_folds or not os.path.lexists(path):
        return None
    way_out = 'pass --new-folds to replace it, or keep it and give its settings'
    try:
        old = fold_files.load_folds(path, made.names)
    except FoldError as problem:
        raise FoldError(f'{problem} ({way_out})') from problem
    for what in ('n_folds', 'method', 'seed', 'groups'):
        before, now = getattr(old, what), getattr(made, what)
        if before != now:
            detail = '' if what == 'groups' else f' ({before}, now {now})'
            raise FoldError(
                f'{path}: was made with another setting of {what}{detail}; expected the same, '
                f'since models may have been trained on it; {way_out}.'
            )
    return replace(old, excluded=made.excluded)


def _write_results(report: PrepareReport, out_dir: Path, index: dict) -> None:
    try:
        write_json(out_dir / 'index.json', index, indent=None)
        write_text(out_dir / 'data_report.txt', full_text(report))
        folds = report.folds
        if folds is not None and (
            not report.is_folds_kept
            # test images may be left out without a change of the folds
            or fold_files.excluded_by(report.folds_path) != folds.excluded
        ):
            fold_files.save_folds(report.folds_path, folds)
    except OSError as problem:
        raise CellSegError(
            f'{out_dir}: cannot be written ({problem.strerror}); expected a folder with space for '
            'folds.json and index.json; make room, or name another with --out.'
        ) from problem


# ---- texts


def next_command(report: PrepareReport, environment: Mapping[str, str]) -> str:
    """Return what to type next, so that the configs find these data and these folds.

    Args:
        report: Of a data folder without errors.
        environment: Variables that are set now; the configs read two of them.
    """
    root, folds = report.data_root, report.folds_path
    exports = []
    if Path(environment.get('CELLSEG_DATA', 'data')).resolve() != root.resolve():
        exports.append(f'CELLSEG_DATA={shlex.quote(str(root.resolve()))}')
    named = environment.get('CELLSEG_FOLDS', 'auto')
    if (root / 'folds.json' if named == 'auto' else Path(named)).resolve() != folds.resolve():
        exports.append(f'CELLSEG_FOLDS={shlex.quote(str(folds.resolve()))}')
    train = 'python tools/train.py configs/fold0.py'
    return f'export {" ".join(exports)} && {train}' if exports else train


def full_text(report: PrepareReport) -> str:
    """Return everything: tables, all errors and all warnings, one a line."""
    return _text(report, shown=None)


def screen_text(report: PrepareReport) -> str:
    """Return tables, all errors, and of each kind of warning the count and the first few."""
    return _text(report, shown=SHOWN)


def _text(report: PrepareReport, *, shown: int | None) -> str:
    parts = [_head(report), class_table(report), size_table(report)]
    if report.folds is not None:
        parts.append(fold_table(report))
    parts.append(_warning_text(report.warnings, shown))
    if report.errors:
        lines = '\n'.join(f'  {text}' for text in report.errors)
        parts.append(
            f'{len(report.errors)} error(s); no folds were written. Repair what is named, or list '
            f'its case in exclude.txt:\n{lines}'
        )
    return '\n\n'.join(part for part in parts if part) + '\n'


def _head(report: PrepareReport) -> str:
    n_cells = sum(sum(facts.counts) for facts in report.train)
    line = (
        f'{report.data_root}: {len(report.train)} training cases with {n_cells} cells, '
        f'{len(report.test)} test images, {len(report.excluded)} excluded'
    )
    if report.excluded:
        line += f' ({", ".join(report.excluded)})'
    return line + '.'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = []
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append('  '.join(cells).rstrip())
    return '\n'.join(lines)


def class_table(report: PrepareReport) -> str:
    """Return cells, images and mean size of each class as text."""
    rows = []
    for k, name in enumerate(report.class_names):
        counts = [facts.counts[k] for facts in report.train]
        area = sum(facts.area_sums[k] for facts in report.train)
        n = sum(counts)
        mean = f'{area / n:.0f}' if n else '-'
        rows.append(
            [name, str(n), str(sum(c > 0 for c in counts)), str(max(counts, default=0)), mean]
        )
    return _table(['class', 'cells', 'images', 'most in one', 'mean px'], rows)


def size_table(report: PrepareReport) -> str:
    """Return how many images there are by their longer side, as text."""
    steps = (0, *SIZE_STEPS_PX)
    names = [f'to {high} px' for high in SIZE_STEPS_PX] + [f'above {SIZE_STEPS_PX[-1]} px']
    columns = []
    for all_facts in (report.train, report.test):
        sides = [max(facts.image_hw) for facts in all_facts]
        columns.append(np.bincount(np.searchsorted(steps[1:], sides), minlength=len(names)))
    rows = [[name, str(a), str(b)] for name, a, b in zip(names, *columns, strict=True)]
    return _table(['longer side', 'train', 'test'], rows)


def fold_table(report: PrepareReport) -> str:
    """Return images, groups and cells of each class in each fold, as text."""
    if report.folds is None:
        return ''
    by_name = {facts.name: facts for facts in report.train}
    rows = []
    for fold, names in enumerate(report.folds.names_by_fold):
        counts = np.array([by_name[name].counts for name in names]).sum(axis=0)
        n_groups = len({report.groups.get(name, f'case:{name}') for name in names})
        rows.append([str(fold), str(len(names)), str(n_groups), *map(str, counts.tolist())])
    return _table(['fold', 'images', 'groups', *report.class_names], rows)


def _warning_text(warnings: Sequence[Finding], shown: int | None) -> str:
    by_kind: dict[str, list[Finding]] = {}
    for warning in warnings:
        by_kind.setdefault(warning.kind, []).append(warning)
    blocks = []
    for kind, found in by_kind.items():
        lines = [f'Warning, {kind}: {sum(w.count for w in found)} in {len(found)} place(s).']
        lines += [f'  {warning.text}' for warning in found[:shown]]
        if shown is not None and len(found) > shown:
            lines.append(f'  ... and {len(found) - shown} more in data_report.txt')
        blocks.append('\n'.join(lines))
    return '\n'.join(blocks)

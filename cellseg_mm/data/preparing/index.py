"""What earlier runs found out about files that have not changed since.

In: index.json. Out: facts by file. Invariant: a file that changed is read again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cellseg_mm.core.files import regular
from cellseg_mm.data.cases import Case
from cellseg_mm.data.pixel_size import stated
from cellseg_mm.data.preparing.case_checks import CaseFacts, Finding
from cellseg_mm.data.preparing.likeness import unpacked_detail
from cellseg_mm.data.preparing.records import PrepareParams

INDEX_VERSION = 3  # 3: size of pixels


@dataclass(slots=True)
class Index:
    """Facts of an earlier run, by case; see :func:`_fingerprint` for when they count."""

    entries: dict[str, dict[str, Any]]
    n_reused: int = 0

    @classmethod
    def load(cls, path: Path, params: PrepareParams) -> Index:
        """Read an index; one that is missing, damaged or of other settings counts as empty."""
        try:
            content = json.loads(regular(path).read_bytes())
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
    ) -> dict[str, Any]:
        """Return the JSON value of a new index; cases with errors are read again next time."""
        entries = {
            _index_key(case, is_labelled): {'files': _fingerprint(case), 'facts': asdict(facts)}
            for (case, is_labelled), facts in zip(cases, all_facts, strict=True)
            if not facts.errors
        }
        return {'settings': _index_settings(params), 'cases': dict(sorted(entries.items()))}


def _index_settings(params: PrepareParams) -> dict[str, int]:
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


def _facts_from_json(value: dict[str, Any], case: Case) -> CaseFacts:
    facts = CaseFacts(
        name=case.name,
        image_hw=case.image_hw,
        counts=tuple(int(n) for n in value['counts']),
        area_sums=tuple(int(n) for n in value['area_sums']),
        pixel_hash=str(value['pixel_hash']),
        thumb=str(value['thumb']),
        detail=str(value['detail']),
        value_high=float(value['value_high']),
        um_per_px=stated(value['um_per_px'], case.name),
        warnings=tuple(
            Finding(str(w['kind']), int(w['count']), str(w['text'])) for w in value['warnings']
        ),
    )
    unpacked_detail(facts.detail)
    if len(bytes.fromhex(facts.thumb)) != 256 or len(facts.counts) != len(facts.area_sums):
        raise ValueError('not what was written')
    return facts

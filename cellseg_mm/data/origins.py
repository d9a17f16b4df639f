"""Where cases came from that joined a data folder later: ``origins.json``, one list a case.

In: a case and what is known of its file. Out: the record, and the names that it holds. Invariant: a
case is noted before its files change, so that none that a person corrected is taken for untouched.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from cellseg_mm.core.errors import CellSegError
from cellseg_mm.core.files import JsonValue, file_hash, regular, write_json
from cellseg_mm.core.layout import ORIGINS, STATE_SUFFIX

VERSION = 1
Origins = dict[str, list[JsonValue]]


def read_origins(data_root: Path | str) -> Origins:
    """Return the entries of each case that was corrected or added, oldest first; {} without a file.

    Raises:
        CellSegError: The file is damaged, or of another version.
    """
    path = Path(data_root) / ORIGINS
    if not path.exists():
        return {}
    try:
        content = json.loads(regular(path).read_bytes())
        if content['version'] != VERSION:
            raise ValueError(f'version {content["version"]}')
        return {str(name): list(entries) for name, entries in content['cases'].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise CellSegError(
            f'{path}: cannot be read ({str(problem)[:80]}); expected version {VERSION} of the '
            'origins of cases that were corrected; restore it: without it nobody knows which they '
            'are'
        ) from problem


def note_origin(data_root: Path | str, name: str, entry: Mapping[str, JsonValue]) -> None:
    """Add an entry to a case's."""
    origins = read_origins(data_root)
    origins.setdefault(name, []).append(dict(entry))
    cases: JsonValue = {name: origins[name] for name in sorted(origins)}
    write_json(Path(data_root) / ORIGINS, {'version': VERSION, 'cases': cases})


def origin_of(
    source: Path, source_format: str, case: str, kept: str | None
) -> dict[str, JsonValue]:
    """Return the entry of a file of annotations.

    Args:
        source: The file, or a folder.
        source_format: Its format's word.
        case: Name of the case. Where the state file of a prediction of that name lies beside
            ``source`` or one folder above, the hash that stands in it for model and settings says
            what was corrected.
        kept: Where the case that it replaces is kept, below the data folder; None for a new one.
    """
    return {
        'date': time.strftime('%Y-%m-%d %H:%M:%S'),
        'format': source_format,
        'file': source.name,
        'file_hash': file_hash(source)[:16] if source.is_file() else '',
        'kept': kept,
        'predicted_with': _predicted_with(source, case),
    }


def _predicted_with(source: Path, case: str) -> str | None:
    for folder in (source.parent, source.parent.parent):
        try:
            state = json.loads(regular(folder / f'{case}{STATE_SUFFIX}').read_bytes())
            return str(state['settings'])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None

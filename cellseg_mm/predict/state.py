"""What is done already: one state file per image, which is written last.

In: an image, the settings, and the folder of results. Out: what of the image's results can stay.
Invariant: a state file names an input and settings only while the instances beside it are theirs:
it goes before an image is predicted, and comes back when its last format is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cellseg_mm.core import files
from cellseg_mm.core.errors import PredictionError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.layout import STATE_SUFFIX
from cellseg_mm.predict.items import Item
from cellseg_mm.predict.tile_store import TileStore
from cellseg_mm.results.formats import path_of
from cellseg_mm.results.predictions import load_predictions


@dataclass(frozen=True, slots=True)
class State:
    """What is there of an image.

    Attributes:
        is_predicted: The instances on disk are those of this input and these settings.
        missing: Formats that are to be written, of those asked for.
        written: Hash of the settings that each format on disk was written with.
    """

    is_predicted: bool
    missing: tuple[str, ...]
    written: Mapping[str, str]

    @property
    def is_done(self) -> bool:
        """Nothing is to be done."""
        return self.is_predicted and not self.missing


@dataclass(frozen=True, slots=True)
class Journal:
    """The state files of a folder of results.

    Attributes:
        out_dir: The folder.
        settings_hash: Stands for everything that decides about the instances.
        formats_hash: Stands for everything else that decides about the formats.
        formats: The formats asked for.
    """

    out_dir: Path
    settings_hash: str
    formats_hash: str
    formats: tuple[str, ...]

    @classmethod
    def of(
        cls,
        out_dir: Path,
        formats: Sequence[str],
        *,
        settings: Mapping[str, JsonValue],
        how_written: Mapping[str, JsonValue],
    ) -> Journal:
        """Make a journal from what decides about instances, and what about formats."""
        hashes = [
            files.text_hash(json.dumps(dict(values), sort_keys=True))
            for values in (settings, how_written)
        ]
        return cls(out_dir, hashes[0], hashes[1], tuple(formats))

    def instances_path(self, item: Item) -> Path:
        """Return where an image's instances lie."""
        return self.out_dir / f'{item.name}.npz'

    def tiles(self, item: Item) -> TileStore:
        """Return where an image's tiles are kept until it is whole."""
        image = item.fingerprint() if item.path.exists() else None
        about = json.dumps([self.settings_hash, image], sort_keys=True)
        return TileStore.of(self.out_dir, item.name, files.text_hash(about))

    def _state_path(self, item: Item) -> Path:
        return self.out_dir / f'{item.name}{STATE_SUFFIX}'

    def look_up(self, item: Item) -> State:
        """Tell what is there of an image; a damaged or foreign state file means nothing."""
        state = self._read(item)
        if not self._fits(item, state):
            return self.nothing()
        known = state.get('formats')
        written = {k: str(v) for k, v in known.items()} if isinstance(known, dict) else {}
        missing = [
            word
            for word in self.formats
            if written.get(word) != self.formats_hash
            or not path_of(self.out_dir, item.name, word).is_file()
        ]
        return State(True, tuple(missing), written)

    def nothing(self) -> State:
        """Return the state of an image that is to be predicted."""
        return State(False, self.formats, {})

    def _read(self, item: Item) -> dict[str, JsonValue]:
        try:
            state = json.loads(self._state_path(item).read_text(encoding='utf-8'))
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def _fits(self, item: Item, state: Mapping[str, JsonValue]) -> bool:
        if state.get('settings') != self.settings_hash or not item.path.exists():
            return False
        return state.get('input') == item.fingerprint() and self.instances_path(item).is_file()

    def load(self, item: Item) -> InstanceSet | None:
        """Return an image's instances; None if the file was damaged since."""
        try:
            (instances,) = load_predictions(self.instances_path(item)).sets
        except (PredictionError, ValueError):
            return None
        return instances

    def begin(self, item: Item) -> None:
        """Take the state file away: from here on the old instances may be overwritten."""
        self._state_path(item).unlink(missing_ok=True)

    def close(self, item: Item, before: State) -> None:
        """Note that all formats that ``before`` missed are written."""
        formats: dict[str, JsonValue] = {**before.written}
        formats.update(dict.fromkeys(before.missing, self.formats_hash))
        state: JsonValue = {
            'settings': self.settings_hash,
            'input': item.fingerprint(),
            'formats': formats,
        }
        files.write_json(self._state_path(item), state)

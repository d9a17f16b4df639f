"""Model files: one member as ONNX, or one or more members with their settings as a .cellseg zip.

In: a path, or the name of a model that comes with the package. Out: the members' ONNX content, what
each says of itself, settings, and the card. Invariant: loading runs no code; a file that is
damaged, foreign or newer than this code is one sentence.

``.onnx``: the graph, and a JSON object in its metadata under ``cellseg``, see :class:`ModelRecord`.
``.cellseg``: a zip of plain parts: ``manifest.json`` (format, version, card, hash and size of each
part), ``member0.onnx`` ..., and perhaps ``inference.json``, as tools/find_best.py writes it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cellseg_mm.core.errors import CellSegError, CheckpointError
from cellseg_mm.core.files import JsonValue, atomic_path, regular
from cellseg_mm.light.picture import check_step

SUFFIXES = ('.onnx', '.cellseg')
MODELS = Path(__file__).parent / 'models'  # those that come with the package
METADATA_KEY = 'cellseg'
VERSION = 1
MANIFEST = 'manifest.json'
SETTINGS = 'inference.json'
MAX_PART_BYTES = 2 << 30  # protobuf, and so ONNX, knows no more


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """What an ONNX file says of itself; JSON under ``cellseg`` in its metadata.

    Its input is ``image`` (H, W, 3) uint8, red first, after ``resize``. Its outputs are boxes
    (N, 4) float32 xyxy px of that input, classes (N,) int64, scores (N,) float32, masks (N, S, S)
    float32 and proposal_cut () float32.

    Attributes:
        class_names: K names in order of ``class_id``.
        class_colours: RGB of each class.
        red_blue_swapped: Pictures are taken to hold blue where red belongs, unless an option says
            otherwise. The files that it was trained on may differ: see the card.
        resize: The resizing step of the test pipeline, or None.
        mask_frame: The masks' grid covers the box made larger by this about its centre.
        mask_thr: Least probability of a mask's pixel.
        score_thr: Nothing below is in the outputs.
        max_per_img: Most cells of a picture; 0 without a limit.
        half: Weights are kept in 16 bits.
        um_per_px: Side of a pixel of the training images in micrometres; None if nobody said.
        tile_px: Pictures with a longer side are cut into tiles of this side, unless an option says
            otherwise; None takes what predict does.
        member: Who was trained on what, as result files record members.
        evidence: Scores on held-out images; {} where there are none.
        parity: What differed from the model in torch when the file was written.
        made_with: Code commit and versions.
    """

    class_names: tuple[str, ...]
    class_colours: tuple[tuple[int, int, int], ...]
    red_blue_swapped: bool
    resize: Mapping[str, Any] | None
    mask_frame: float
    mask_thr: float
    score_thr: float
    max_per_img: int
    half: bool = False
    um_per_px: float | None = None
    tile_px: int | None = None
    member: Mapping[str, Any] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)
    made_with: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return what the metadata holds."""
        return json.dumps({'format': METADATA_KEY, 'version': VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str, where: Path | str) -> ModelRecord:
        """Read the metadata of a file.

        Raises:
            CheckpointError: It is none of ours, newer, or damaged.
        """
        content = _json_object(text, where)
        _check_version(content, where)
        try:
            values = {one.name: content[one.name] for one in fields(cls) if _is_told(one, content)}
            values['class_names'] = tuple(map(str, values['class_names']))
            values['class_colours'] = tuple(
                (int(r), int(g), int(b)) for r, g, b in values['class_colours']
            )
            record = cls(**values)
            if record.resize is not None:
                check_step(record.resize, str(where))
            ok = record.class_names and record.mask_frame >= 1 and 0 < record.mask_thr <= 1
            ok = ok and (record.um_per_px is None or record.um_per_px > 0)
            ok = ok and (record.tile_px is None or record.tile_px > 0)
            if not ok or len(record.class_names) != len(record.class_colours):
                raise ValueError('classes, colours or masks make no sense')
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            if isinstance(problem, CellSegError):
                raise
            raise _damaged(where, f'its description: {problem!r}') from problem
        return record


def _is_told(one: Field[Any], content: Mapping[str, Any]) -> bool:
    """Tell whether a value is in a record; files of older code lack what has a default."""
    has_default = one.default is not MISSING or one.default_factory is not MISSING
    return one.name in content or not has_default


@dataclass(frozen=True, slots=True)
class Member:
    """One ONNX model, not yet read.

    Attributes:
        where: File, and part of it, for messages.
        content: The ONNX file's bytes.
        sha256: Of them.
    """

    where: str
    content: bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What a model's file holds.

    Attributes:
        path: The file.
        members: At least one.
        settings: Content of ``inference.json``, or None.
        card: What people should know, as ``exporting.card`` writes it; {} of an ``.onnx`` file.
    """

    path: Path
    members: tuple[Member, ...]
    settings: Mapping[str, Any] | None = None
    card: Mapping[str, Any] = field(default_factory=dict)


def names_of_models() -> list[str]:
    """Return the names of the models that come with the package."""
    return sorted(path.stem for path in MODELS.glob('*.cellseg'))


def is_name(word: str) -> bool:
    """Tell whether a word is meant as a model's name: it is one, or it is no path of anything."""
    is_bare = Path(word).name == word and not Path(word).suffix
    return is_bare and (word in names_of_models() or not Path(word).exists())


def is_model(word: str) -> bool:
    """Tell whether a word names a model: a file of one, or a model of the package."""
    return is_name(word) or word.lower().endswith(SUFFIXES)


def _of_name(name: str) -> Path:
    names = names_of_models()
    if name in names:
        return MODELS / f'{name}.cellseg'
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.4)
    hint = f'the nearest is {near[0]}; ' if near else ''
    raise CheckpointError(
        f'{name}: no model has this name; {hint}expected one of {", ".join(names) or "none"}, a '
        'model file (.cellseg, .onnx) or a config (.py); correct the name'
    )


def read_model_file(path: Path | str) -> ModelFile:
    """Read a ``.onnx`` or ``.cellseg`` file.

    Args:
        path: The file, or the name of a model that comes with the package.

    Raises:
        CheckpointError: The file is missing, damaged, foreign, or of a newer version.
    """
    path = _existing(_of_name(str(path)) if is_name(str(path)) else Path(path))
    if path.suffix.lower() == '.onnx':
        try:
            content = path.read_bytes()
        except OSError as problem:
            raise _damaged(path, str(problem.strerror or problem)) from problem
        return ModelFile(path, (Member(str(path), content, _sha256(content)),))
    card, parts = _read_parts(path)
    settings = None
    if SETTINGS in parts:
        settings = _json_object(parts.pop(SETTINGS).decode('utf-8', 'replace'), path)
    members = tuple(
        Member(f'{path}: {name}', content, _sha256(content))
        for name, content in sorted(parts.items())
        if name.endswith('.onnx')
    )
    if not members:
        raise _damaged(path, 'it holds no member')
    return ModelFile(path, members, settings, card)


def write_model_file(
    path: Path | str,
    members: Sequence[bytes],
    *,
    settings: Mapping[str, Any] | None,
    card: Mapping[str, JsonValue],
) -> None:
    """Write a ``.cellseg`` file.

    Args:
        path: The file.
        members: ONNX files.
        settings: Content of ``inference.json``, or None.
        card: What people should know: classes, evidence, where it comes from.
    """
    parts = {f'member{i}.onnx': content for i, content in enumerate(members)}
    if settings is not None:
        parts[SETTINGS] = json.dumps(settings, indent=1).encode()
    hashes = {
        name: {'sha256': _sha256(content), 'bytes': len(content)} for name, content in parts.items()
    }
    manifest = {'format': METADATA_KEY, 'version': VERSION, 'card': dict(card), 'parts': hashes}
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, 'w') as archive:
        for name, content in {MANIFEST: json.dumps(manifest, indent=1).encode(), **parts}.items():
            # one date, so that the same parts make the same file
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, content)


def _existing(path: Path) -> Path:
    """Return the path of a file that can be opened.

    Raises:
        CheckpointError: It is missing, a folder, or a pipe, which one would wait for for ever.
    """
    try:
        return regular(path)
    except OSError as problem:
        is_missing = isinstance(problem, FileNotFoundError)
        found = 'there is no such model file' if is_missing else f'is no file ({problem.strerror})'
        raise CheckpointError(
            f'{path}: {found}; expected a .cellseg or .onnx file of tools/export.py; correct the '
            'path'
        ) from problem


def _read_parts(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the card, and the parts that the manifest names, each with the hash it names."""
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = _json_object(_part(archive, MANIFEST).decode('utf-8', 'replace'), path)
            _check_version(manifest, path)
            listed = manifest.get('parts')
            if not isinstance(listed, dict):
                raise _damaged(path, f'{MANIFEST} lists no parts')
            parts = {str(name): _part(archive, str(name)) for name in listed}
    except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError, RuntimeError) as problem:
        raise _damaged(path, str(problem)) from problem
    except OSError as problem:
        raise _damaged(path, str(problem.strerror or problem)) from problem
    for name, content in parts.items():
        about = listed[name]
        if not isinstance(about, dict) or about.get('sha256') != _sha256(content):
            raise _damaged(path, f'{name} is not what {MANIFEST} says')
    card = manifest.get('card', {})
    if not isinstance(card, dict):
        raise _damaged(path, f'{MANIFEST} has no card')
    return card, parts


def _part(archive: zipfile.ZipFile, name: str) -> bytes:
    entry = archive.getinfo(name)
    if entry.file_size > MAX_PART_BYTES or entry.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f'{name} is compressed or larger than 2 GB')
    return archive.read(entry)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json_object(text: str, where: Path | str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise _damaged(where, f'its description is no JSON ({str(problem)[:80]})') from problem
    return content if isinstance(content, dict) else {}


def _check_version(content: Mapping[str, Any], where: Path | str) -> None:
    if content.get('format') != METADATA_KEY:
        raise CheckpointError(
            f'{where}: is no model of this project; expected a file of tools/export.py; give such '
            'a file'
        )
    version = content.get('version')
    if version != VERSION:
        raise CheckpointError(
            f'{where}: is of format version {version}; this code reads version {VERSION}; take a '
            'newer cellseg_mm, or export the model again'
        )


def _damaged(where: Path | str, what: str) -> CheckpointError:
    return CheckpointError(
        f'{where}: is damaged or no model file ({what[:200]}); expected a file of '
        'tools/export.py; copy it again, or export the model again'
    )

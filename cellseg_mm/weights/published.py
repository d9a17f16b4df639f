"""Starting from published weights: reading and converting files, and URLs as ``load_from``.

In: detectron2's new_baselines pickles, torchvision's maskrcnn_resnet50_fpn_v2, MMDetection's own
checkpoints; as a file, or as the published URL. Out: checkpoints of our model (MMDetection's strong
baseline: 2 RPN convolutions, 4conv1fc box head, norm everywhere) with the preprocessing that the
weights were trained with.
Invariant: what is kept in the cache is whole and was checked; nothing in a file is ever run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from mmengine.runner.checkpoint import CheckpointLoader

from cellseg_mm.core.errors import CheckpointError
from cellseg_mm.core.files import atomic_path, file_hash, text_hash, write_json
from cellseg_mm.core.progress import track
from cellseg_mm.core.safe_pickle import read_pickle
from cellseg_mm.weights.checkpoints import load_checkpoint_file
from cellseg_mm.weights.conversion import Conversion, convert
from cellseg_mm.weights.names import BACKBONES, CLASS_LAYERS, SOURCES


def read_published(path: Path | str) -> tuple[dict[str, object], str]:
    """Return the tensors of a published file and the text of the config inside, if any.

    A ``.pkl`` goes through the restricted unpickler, anything else through weights-only loading.

    Raises:
        CheckpointError: Missing, cut short, malicious, of wrong hash, or without a model inside.
    """
    path = locate(str(path))
    check_name_hash(path)
    content = read_pickle(path) if path.suffix == '.pkl' else load_checkpoint_file(path)
    meta = content.get('meta') if isinstance(content, dict) else None
    config = meta.get('config') or meta.get('cfg') if isinstance(meta, dict) else None
    for key in ('model', 'state_dict'):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(
            f'{path}: holds a {type(content).__name__}; a dict of named arrays under "model" or '
            '"state_dict" was expected; check that it is a model file'
        )
    return content, config if isinstance(config, str) else ''


_HASH_IN_NAME = re.compile(r'model_final_([0-9a-f]{6,64})\.pkl|.*-([0-9a-f]{8,64})\.pth')


def check_name_hash(path: Path | str, *, name: str | None = None) -> None:
    """Check a file against the hash that its published name ends with, where it has one.

    ``name`` is the published name, if the file has another one for now.

    detectron2 puts the first 6 digits of the MD5 into ``model_final_14d201.pkl`` (its MODEL_ZOO.md
    says so; the SHA-256 of its model_final_280758.pkl is 3c25ca...), torch and MMDetection the
    first 8 of the SHA-256 into ``name-73cbd019.pth``. This finds damaged files, not attackers.

    Raises:
        CheckpointError: The file's hash begins otherwise.
    """
    path = Path(path)
    match = _HASH_IN_NAME.fullmatch(name or path.name)
    if not match:
        return
    expected = match[1] or match[2]
    algorithms = {'MD5': _md5, 'SHA-256': file_hash} if match[1] else {'SHA-256': file_hash}
    found: dict[str, str] = {}
    for algorithm, digest_of in algorithms.items():
        found[algorithm] = digest_of(path)
        if found[algorithm].startswith(expected):
            return
    digests = ', '.join(f'{algorithm} {digest[:12]}' for algorithm, digest in found.items())
    raise CheckpointError(
        f'{name or path}: hash is {digests}; the name says {expected}; the file is damaged, cut '
        'short or another one: delete it and download it again (or rename your own file)'
    )


def _md5(path: Path) -> str:
    with path.open('rb') as stream:
        digest = hashlib.md5(usedforsecurity=False)
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def convert_file(
    path: Path | str,
    out_path: Path | str,
    *,
    source: str = 'auto',
    keep_classes: Sequence[int] | None = None,
    keep_all_classes: bool = False,
) -> Conversion:
    """Convert a published file and write our checkpoint and, beside it, its preprocessing as JSON.

    Raises:
        CheckpointError: See ``read_published`` and ``convert``.
        OSError: The output cannot be written.
    """
    tensors, config = read_published(path)
    conversion = convert(
        tensors,
        where=str(path),
        source=source,
        keep_classes=keep_classes,
        keep_all_classes=keep_all_classes,
        caffe=bool(re.search(r"""style=['"]caffe['"]""", config)),
    )
    origin = {
        'file': Path(path).name,
        'sha256': file_hash(path),
        'source': conversion.source,
        'backbone': conversion.backbone,
        'n_classes': conversion.n_classes,
        'preprocessing': json.loads(json.dumps(asdict(conversion.preprocessing))),
        'table': _table_hash(),
    }
    out_path = Path(out_path)
    with atomic_path(out_path) as temporary:
        torch.save(
            {'state_dict': conversion.state_dict, 'meta': {'cellseg_weights': origin}}, temporary
        )
    write_json(out_path.with_suffix('.json'), origin)
    return conversion


def _table_hash() -> str:
    return text_hash(repr([SOURCES, BACKBONES, CLASS_LAYERS]))


# ---------------------------------------------------------------------------------------------
# Published URLs and pickles as ``load_from``

DETECTRON2_URL = 'https://dl.fbaipublicfiles.com/detectron2/'
_CHUNK = 1 << 20
_MAX_DOWNLOAD = 2 << 30


def cache_dir() -> Path:
    """Return where downloads and conversions are kept: ``$CELLSEG_CACHE`` or the user's cache."""
    home = os.environ.get('CELLSEG_CACHE')
    if home:
        return Path(home).expanduser()
    base = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
    return Path(base).expanduser() / 'cellseg_mm' / 'weights'


def fetch(url: str, *, timeout_s: float = 30.0) -> Path:
    """Return the local copy of a published file, downloading it once, whole or not at all.

    Raises:
        CheckpointError: The address cannot be reached, or the file's hash is not the one in its
            name.
    """
    name = url.rsplit('/', 1)[-1]
    # only a name with a hash is a name for one content; others are kept apart by their address
    path = cache_dir() / ('' if _HASH_IN_NAME.fullmatch(name) else text_hash(url)) / name
    if path.is_file():
        return path
    try:
        with atomic_path(path) as temporary:
            _download(url, temporary, path.name, timeout_s)
            check_name_hash(temporary, name=path.name)
    except (urllib.error.URLError, TimeoutError, ConnectionError, OSError) as error:
        reason = getattr(error, 'reason', error)
        raise CheckpointError(
            f'{url}: cannot be fetched ({reason}); a connection or a copy of the file was expected;'
            f' download it elsewhere and put it at {path}, or set load_from to where it is, or'
            ' load_from=None to start from random weights (with a norm that works for your batch'
            ' size, see docs/weights.md)'
        ) from error
    return path


def _download(url: str, path: Path, name: str, timeout_s: float) -> None:
    with urllib.request.urlopen(url, timeout=timeout_s) as response, path.open('wb') as stream:
        size = int(response.headers.get('Content-Length') or 0)
        if size > _MAX_DOWNLOAD:
            raise OSError(f'the server announces {size} bytes')
        n_chunks = -(-size // _CHUNK) or None
        done = 0
        for chunk in track(_chunks(response), description=f'fetching {name}', total=n_chunks):
            done += len(chunk)
            if done > _MAX_DOWNLOAD:
                raise OSError(f'more than {_MAX_DOWNLOAD} bytes')
            stream.write(chunk)
        if size and done != size:
            raise OSError(f'the connection ended after {done} of {size} bytes')


def _chunks(response: object) -> Iterator[bytes]:
    while chunk := response.read(_CHUNK):
        yield chunk


def load_from_published(
    filename: str, map_location: str | None = 'cpu', logger: object = None
) -> dict[str, object]:
    """Load a published model for ``load_from``: fetch, convert once, keep, load weights-only.

    The class-wise layers are dropped; for a warm start from COCO classes convert the file with
    ``tools/convert_detectron2.py --keep-classes`` and load the result.

    Args:
        filename: A published URL, ``detectron2://`` and the rest of it, or a local ``.pkl``.
        map_location: As in torch.load.
        logger: Unused; mmengine's loaders are called with two or three arguments.

    Raises:
        CheckpointError: See ``fetch`` and ``convert``; on every rank if it fails on rank 0.
    """
    from mmengine.dist import broadcast_object_list, get_rank

    problem: list[str | None] = [None]
    path = None
    if get_rank() == 0:
        try:
            path = _converted(filename)
        except CheckpointError as error:
            problem = [str(error)]
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise CheckpointError(problem[0])
    path = path or _converted(filename)  # other ranks: in the cache now, or on another machine
    return load_checkpoint_file(path, map_location=map_location)


def locate(name: str) -> Path:
    """Return the file behind a path, a published URL or ``detectron2://`` and the rest of one.

    Raises:
        CheckpointError: There is no such file, or it cannot be fetched.
    """
    if name.startswith('detectron2://'):
        name = DETECTRON2_URL + name.removeprefix('detectron2://')
    path = fetch(name) if '://' in name else Path(name).expanduser()
    if not path.is_file():
        raise CheckpointError(
            f'{path}: no such file; published weights were expected; check the path, or give the '
            'published URL'
        )
    return path


def _converted(name: str) -> Path:
    """Return the converted file of a published one, making it if the cache has none."""
    path = locate(name)
    key = text_hash(file_hash(path) + _table_hash())
    out_path = cache_dir() / 'converted' / f'{path.stem}-{key}.pth'
    if not out_path.is_file():
        convert_file(path, out_path)
    return out_path


# mmengine matches these from the start of load_from, as regular expressions, longest first.
PUBLISHED = (
    re.escape(DETECTRON2_URL),
    'detectron2://',
    r'https?://.*\.pkl$',
    r'(?!.*://).*\.pkl$',
    r'https?://download\.pytorch\.org/models/maskrcnn_resnet50_fpn_v2',
    r'https?://download\.openmmlab\.com/mmdetection/v2\.0/simple_copy_paste/',
)
CheckpointLoader.register_scheme(PUBLISHED, load_from_published, force=True)

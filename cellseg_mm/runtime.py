"""What makes the stock OpenMMLab stack run where mmcv has no compiled ops.

In: an interpreter in which ``mmcv._ext`` may be missing. Out: one in which ``import mmdet.models``
works, because a last finder on ``sys.meta_path`` supplies the module. Invariant: a compiled mmcv is
found before ours and is never touched; nothing heavy is imported until somebody asks for the ops.

The ops come from compiled mmcv, else from torchvision, else from plain torch. The environment
variable ``CELLSEG_OPS`` (mmcv, torchvision or torch) forces one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from cellseg_mm.core import layout
from cellseg_mm.core.errors import ConfigError

EXTENSION = 'mmcv._ext'
VARIABLE = 'CELLSEG_OPS'
BACKENDS = ('mmcv', 'torchvision', 'torch')
# --no-cache-dir: else pip takes the wheel without ops that it built before
FULL_MMCV = (
    'install a compiler and build mmcv with its ops: MMCV_WITH_OPS=1 pip install --force-reinstall '
    '--no-deps --no-cache-dir --no-build-isolation --no-binary onedl-mmcv onedl-mmcv '
    '(about 20 minutes on 2 cores)'
)

logger = logging.getLogger(__name__)


def provide_mmcv_ops() -> None:
    """Arrange that a later ``import mmcv._ext`` finds NMS and RoIAlign.

    Installs finders and imports nothing. Calling it again changes nothing.

    Raises:
        ConfigError: ``CELLSEG_OPS`` names no backend, or comes too late to have an effect.
    """
    forced = _forced_backend()
    if any(isinstance(finder, _OpsFinder) for finder in sys.meta_path):
        return
    loaded = sys.modules.get(EXTENSION)
    if loaded is not None and forced in ('torchvision', 'torch'):
        raise ConfigError(
            f'{VARIABLE}={forced}: compiled mmcv ops are loaded already; '
            'import cellseg_mm before mmcv and mmdet'
        )
    sys.meta_path.insert(0, _TorchvisionGuard())
    sys.meta_path.insert(0, _OneDLSilencer())
    sys.meta_path.insert(0, _PackagedConfigs())
    if _PackagedConfigs.module_name in sys.modules:
        _read_packaged_configs(sys.modules[_PackagedConfigs.module_name])
    if forced in ('torchvision', 'torch'):
        sys.meta_path.insert(0, _OpsFinder())
    else:
        sys.meta_path.append(_OpsFinder())


def ops_backend() -> str:
    """Return which ops are in use: 'mmcv', 'torchvision' or 'torch'. Loads them.

    Raises:
        ConfigError: The backend that ``CELLSEG_OPS`` forces is not there.
        ImportError: mmcv is not installed, or its compiled ops do not fit this torch.
    """
    return getattr(importlib.import_module(EXTENSION), 'CELLSEG_BACKEND', 'mmcv')


def _forced_backend() -> str | None:
    forced = os.environ.get(VARIABLE, '').strip().lower()
    if forced and forced not in BACKENDS:
        raise ConfigError(
            f'environment variable {VARIABLE}: {forced!r} is no backend; expected one of '
            f'{", ".join(BACKENDS)}; correct or unset it'
        )
    return forced or None


class _OpsFinder(MetaPathFinder):
    """Answers for ``mmcv._ext`` only."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != EXTENSION:
            return None
        return ModuleSpec(name, _OpsLoader(), origin='cellseg_mm.runtime')


class _OpsLoader(Loader):
    """Fills ``mmcv._ext`` with the ops of the best backend."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        backend = _choose_backend(_forced_backend())
        for name, op in ops_of(backend).items():
            setattr(module, name, op)
        module.CELLSEG_BACKEND = backend
        module.__getattr__ = _missing_op
        _forget_ops_placeholder()
        logger.info('mmcv has no compiled ops; NMS and RoIAlign come from %s', backend)


def _choose_backend(forced: str | None) -> str:
    """Return 'torchvision' or 'torch'; compiled mmcv is known to be absent or unwanted.

    Raises:
        ConfigError: The forced backend is not there.
    """
    if forced == 'mmcv':
        raise ConfigError(f'{VARIABLE}=mmcv: mmcv was installed without compiled ops; {FULL_MMCV}')
    if forced == 'torch':
        return forced
    problem = torchvision_problem()
    if problem is None:
        return 'torchvision'
    if forced == 'torchvision':
        raise ConfigError(
            f"{VARIABLE}=torchvision: torchvision's ops do not work here ({problem}); "
            f'install the torchvision that belongs to this torch, or unset {VARIABLE}'
        )
    return 'torch'


def torchvision_problem() -> str | None:
    """Return why torchvision's compiled ops cannot be used, or None if they can."""
    import torch

    try:
        importlib.import_module('torchvision')
        devices = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']
        for device in devices:
            box = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device)
            torch.ops.torchvision.nms(box, box[:, 0], 0.5)
    # A torchvision for another torch fails in many ways: RuntimeError, OSError, AttributeError,
    # NotImplementedError for a device without kernels. All mean the same to us.
    except Exception as error:
        return f'{type(error).__name__}: {error}'.splitlines()[0]
    return None


def ops_of(backend: str) -> dict[str, Callable]:
    """Return the ops of a backend by the names that mmcv knows them by."""
    from cellseg_mm.model import roi_align
    from cellseg_mm.model.nms import nms, softnms, torchvision_nms

    ops: dict[str, Callable] = {
        'nms': nms,
        'softnms': softnms,
        'roi_align_forward': roi_align.roi_align_forward,
        'roi_align_backward': roi_align.roi_align_backward,
        # Reports of the environment ask for these two and do not catch errors.
        'get_compiler_version': lambda: 'n/a (mmcv has no compiled ops)',
        'get_compiling_cuda_version': lambda: 'not available',
    }
    if backend == 'torchvision':
        ops['nms'] = torchvision_nms
        ops['roi_align_forward'] = roi_align.torchvision_roi_align_forward
        ops['roi_align_backward'] = roi_align.torchvision_roi_align_backward
    return ops


def _missing_op(name: str) -> Callable:
    """Stand in for an op that only compiled mmcv has; ``mmcv.ops`` looks all of them up."""
    if name.startswith('_'):
        raise AttributeError(f'module {EXTENSION!r} has no attribute {name!r}')

    def needs_compiled_mmcv(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(
            f'mmcv op {name!r}: cellseg_mm supplies only NMS, Soft-NMS and RoIAlign, and mmcv was '
            f'installed without compiled ops; use a model without {name!r}, or {FULL_MMCV}'
        )

    needs_compiled_mmcv.__name__ = name
    return needs_compiled_mmcv


def _forget_ops_placeholder() -> None:
    """Drop a module of mmdet that settled for a placeholder before the ops were there.

    MMDetection's own tools import ``mmdet.utils`` before they read a config's ``custom_imports``;
    ``mmdet.utils.large_image`` then keeps a ``batched_nms`` that only raises. The next import of
    the module finds the real one.
    """
    early = sys.modules.get('mmdet.utils.large_image')
    if early is not None and getattr(early.batched_nms, '__module__', '') == early.__name__:
        del sys.modules['mmdet.utils.large_image']


class _WatchedImport(MetaPathFinder):
    """Runs one module's code in a way of its own."""

    module_name: str

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.module_name:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(self.execute, spec.loader.exec_module)
        return spec

    def execute(self, original: Callable[[ModuleType], None], module: ModuleType) -> None:
        """Run the module's code, which is what ``original`` does."""
        raise NotImplementedError


class _OneDLSilencer(_WatchedImport):
    """Keeps one line of MMDetection's off standard output.

    Without the optional package ``onedl`` an ``import mmdet.datasets`` prints "Could not import
    OneDL" twice (``print_log`` without a logger ignores its level DEBUG): above all that a tool
    prints, and above the ``#!`` line of a job script. Last seen with onedl-mmdetection 3.5.1.
    """

    module_name = 'mmdet.datasets'
    LINE = 'Could not import OneDL. Skipping OneDL datasets.\n'

    def execute(self, original: Callable[[ModuleType], None], module: ModuleType) -> None:
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                original(module)
        finally:
            sys.stdout.write(said.getvalue().replace(self.LINE, ''))


class _TorchvisionGuard(_WatchedImport):
    """Turns the crash of a torchvision made for another torch into an ImportError.

    ``import torchvision`` then raises RuntimeError ("operator torchvision::nms does not exist").
    Optional users such as ``mmdet.models.detectors.d2_wrapper`` (which imports detectron2, which
    imports torchvision) expect ImportError, so ``import mmdet.models`` would die. Last seen with
    torch 2.13+cpu and torchvision 0.28 from the package index.
    """

    module_name = 'torchvision'

    def execute(self, original: Callable[[ModuleType], None], module: ModuleType) -> None:
        try:
            original(module)
        except ImportError:
            raise
        except Exception as error:
            raise ImportError(f'torchvision does not fit this torch: {error}') from error


class _PackagedConfigs(_WatchedImport):
    """Lets mmengine read ``cellseg_mm::laptop/fold0.py``, also as a base, wherever it is installed.

    mmengine 0.10 knows the names of OpenMMLab's packages only, wants a ``/`` in the name, and would
    give what it inherits a scope of its own, in which MMDetection's classes are not found.
    """

    module_name = 'mmengine.config.config'

    def execute(self, original: Callable[[ModuleType], None], module: ModuleType) -> None:
        original(module)
        _read_packaged_configs(module)


def _read_packaged_configs(module: ModuleType) -> None:
    read, find = module.Config.fromfile, module.Config._get_cfg_path

    @functools.wraps(read)
    def fromfile(filename: object, *args: object, **kwargs: object) -> object:
        return read(_path_of(str(filename)) or filename, *args, **kwargs)

    @functools.wraps(find)
    def get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
        path = _path_of(cfg_path)
        return (path, None) if path else find(cfg_path, filename)

    module.Config.fromfile = staticmethod(fromfile)
    module.Config._get_cfg_path = staticmethod(get_cfg_path)


def _path_of(name: str) -> str:
    """Return where the config lies that ``cellseg_mm::...`` names; '' for any other name."""
    if not name.startswith(layout.CONFIG_SCHEME):
        return ''
    return str(layout.packaged_configs(name)[0])

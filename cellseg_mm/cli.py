"""How every tool starts and ends: shared arguments, error sentences, exit codes.

In: a tool's main function. Out: an exit status. Invariant: what a person can mend is one sentence;
a traceback means a fault of ours.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence

from cellseg_mm.core import layout, worker_watch
from cellseg_mm.core.errors import CellSegError
from cellseg_mm.core.files import DISK_ERRORS


def add_config_arguments(parser: argparse.ArgumentParser, *, launcher: bool = True) -> None:
    """Add the options that MMDetection's train and test tools share.

    Args:
        parser: Gets the options.
        launcher: Also those of a run on several processes.
    """
    parser.add_argument('--work-dir', help='folder for logs, checkpoints and results')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_ConfigOptions,
        help='override settings, key=value; lists as key="[a,b]" or key=a,b without spaces',
    )
    if not launcher:
        return
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher',
    )
    # torch.distributed.launch passes it; torchrun sets LOCAL_RANK itself
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def add_member_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options about members and their fusion, as ``from_options`` reads them."""
    parser.add_argument(
        '--fusion', help='rule for several models, for example soft_mask:iou_thr=0.4 (soft_mask)'
    )
    parser.add_argument('--post', help='afterwards, for example disjoint,min_area_px=20')
    parser.add_argument('--settings', help='inference.json of tools/find_best.py')
    parser.add_argument(
        '--placement',
        choices=['auto', 'device', 'turns'],
        default='auto',
        help='where models are kept: on the device, or there in turns; auto by its free memory',
    )
    parser.add_argument('--work-root', help='folder of the work folders (default: work_dirs)')


class _ConfigOptions(argparse.Action):
    """mmengine's DictAction, imported when the option is used: --help need not wait for it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        from mmengine.config import DictAction

        if wrong := [word for word in values or () if '=' not in str(word)]:
            parser.error(f'{option_string}: {", ".join(map(str, wrong))}: expected key=value')
        action = DictAction(self.option_strings, self.dest, nargs=self.nargs)
        action(parser, namespace, values, option_string)


def same_run(words: Sequence[str]) -> str:
    """Return what of a command line another tool needs in order to look at the same run.

    Args:
        words: A command line with the options of :func:`add_config_arguments`.

    Returns:
        ``--work-dir`` and ``--cfg-options`` with their values, after a space; '' without any.
    """
    kept: list[str] = []
    is_wanted = False
    for word in words:
        if word.startswith('--'):
            is_wanted = word.split('=')[0] in ('--work-dir', '--cfg-options')
        kept += [word] * is_wanted
    return f' {shlex.join(kept)}' if kept else ''


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what led to it, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def root_error(error: BaseException) -> CellSegError | None:
    """Return the innermost CellSegError; mmengine's registries wrap what a constructor raises."""
    return next((e for e in reversed(list(causes(error))) if isinstance(e, CellSegError)), None)


OUT_OF_MEMORY = (
    'the device ran out of memory ({reason}); expected the model and a batch to fit; when training '
    'lower train_dataloader.batch_size (and the learning rate with it) or the image size, or add '
    '--amp to tools/train.py; when testing lower model.test_cfg.rpn.max_per_img, or cut large '
    'images into tiles with tools/predict.py --tile'
)


WITH_TORCH = ('torch', 'mmengine', 'mmcv', 'mmdet')
NOT_INSTALLED = (
    '{name}: is not installed; configs, checkpoints and training need the whole installation '
    '(pip install . in a clone); tools/predict.py needs none of it for models in files (.cellseg, '
    '.onnx)'
)


def explain(error: BaseException) -> str | None:
    """Return one sentence for an error that a user can do something about, else None."""
    known = root_error(error)
    if known is not None:
        return _without_worker_traceback(str(known))
    for one in causes(error):
        if isinstance(one, ModuleNotFoundError) and one.name in WITH_TORCH:
            return NOT_INSTALLED.format(name=one.name)
        if type(one).__name__ == 'OutOfMemoryError':  # torch's; torch may not be imported
            return OUT_OF_MEMORY.format(reason=str(one).split('. ')[0][:200])
        if isinstance(one, RuntimeError) and 'DefaultCPUAllocator' in str(one):
            return OUT_OF_MEMORY.format(reason=str(one).split('DefaultCPUAllocator: ')[-1][:200])
        misspelt = _misspelt_option(one, sys.argv)
        if misspelt is not None:
            return misspelt
        death = worker_watch.explain_death(str(one)) if isinstance(one, RuntimeError) else None
        if death is not None:
            return death
        if isinstance(one, OSError) and one.errno in DISK_ERRORS:
            where = one.filename or 'a result file'
            return (
                f'{where}: cannot be written or read ({one.strerror}); expected a folder with room '
                'and permission; make room, or name another folder for the results; the same '
                'command goes on from the last whole file (tools/train.py with --resume)'
            )
    return None


def _misspelt_option(error: BaseException, words: Sequence[str]) -> str | None:
    """Return one sentence for a ``--cfg-options`` key that a constructor did not know."""
    pattern = r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'"
    found = re.search(pattern, str(error)) if isinstance(error, TypeError) else None
    for word in words if found else ():
        key = word.split('=')[0]
        if '=' in word and key.split('.')[-1] == found[2]:
            return (
                f'--cfg-options: {key}: {found[1]} has no setting {found[2]!r}; expected one of '
                "those in its documentation and in the config; correct the key's spelling"
            )
    return None


def _without_worker_traceback(text: str) -> str:
    """Return the sentence of an error that torch brought from a worker with its traceback."""
    if not re.search(r'Caught \w+ in DataLoader worker', text):
        return text
    return re.split(r'\ncellseg_mm\.core\.errors\.\w+: ', text)[-1].strip()


def run_tool(
    main: Callable[[], int | None], *, go_on: str = 'start the same command again to go on'
) -> None:
    """Run a tool's ``main`` and exit; every tool ends here.

    Words such as ``cellseg_mm::laptop/fold*.py`` become the paths of those configs first.

    Exit codes: 0 done; 1 ``main`` returned it, there are problems in what it was asked to look at;
    2 a user's error, in one sentence; 130 Ctrl-C; 141 who read the output has gone, as ``head``
    does; 143 ended by SIGTERM.

    Args:
        main: What the tool does.
        go_on: What to type after Ctrl-C.
    """
    try:
        sys.argv[1:] = [path for word in sys.argv[1:] for path in _paths_of(word)]
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        sys.exit(141)
    except KeyboardInterrupt:
        print(f'interrupted; {go_on}', file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        print(f'error: {layout.as_typed(sentence)}', file=sys.stderr)
        sys.exit(2)
    sys.exit(code or 0)


def _reader_has_gone() -> bool:
    """Tell whether it is the output's pipe that broke; what is left for it is then thrown away."""
    try:
        print(flush=True)  # what broke the pipe may have left nothing to write
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _paths_of(word: str) -> list[str]:
    if not word.startswith(layout.CONFIG_SCHEME):
        return [word]
    return [str(path) for path in layout.packaged_configs(word)]

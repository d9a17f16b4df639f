"""The command ``cellseg``: every tool by its name, from any folder.

    cellseg TOOL ...        for example: cellseg predict model.cellseg image.png --out out
    cellseg TOOL --help     what a tool can do

The tools are those of the folder ``tools``: ``cellseg train`` is ``python tools/train.py``.
``cellseg_mm::laptop/fold0.py`` names a config of this package, and
``cellseg_mm::laptop/fold*.py`` several.

``python -m cellseg_mm`` is the same command. It also runs one of MMDetection's own tools with our
runtime in place:

    python -m cellseg_mm PATH/TO/mmdet/.mim/tools/test.py CONFIG CHECKPOINT ...

A config's ``custom_imports`` is enough for tools that read the config before they import
``mmdet.models``. Others, such as MMDetection's tools/test.py, import the models first; where mmcv
has no compiled ops they would stop before they read any config.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import difflib
import platform
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path

import cellseg_mm
from cellseg_mm import runtime
from cellseg_mm.cli import run_tool
from cellseg_mm.core.errors import CellSegError, ConfigError
from cellseg_mm.core.layout import (
    CONFIG_SCHEME,
    HOME,
    PACKAGE,
    REPOSITORY,
    TOOLS,
    as_typed,
)

OF_A_CHECKOUT = ('bootstrap',)  # sets one up
SHELLS = ('bash', 'zsh', 'fish')
STACK = {  # import name -> names of the distributions that bring it
    'torch': ('torch',),
    'mmengine': ('onedl-mmengine', 'mmengine'),
    'mmcv': ('onedl-mmcv', 'mmcv', 'mmcv-lite'),
    'mmdet': ('onedl-mmdetection', 'mmdet'),
    'onnxruntime': ('onnxruntime', 'onnxruntime-gpu'),
}


def main() -> None:
    """Run the tool or the script that is named first with the words after it."""
    first = sys.argv[1] if len(sys.argv) > 1 else '--help'
    name = first.replace('-', '_')
    if name in tools():
        run_named(name, sys.argv[2:])
    elif first.endswith('.py') and Path(first).is_file():
        sys.argv = sys.argv[1:]
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
        runpy.run_path(sys.argv[0], run_name='__main__')
    else:
        run_tool(lambda: answer(sys.argv[1:] or ['--help']))


def tools() -> dict[str, Path]:
    """Return the tools by name."""
    found = {path.stem: path for path in sorted(TOOLS.glob('*.py'))}
    return {name: path for name, path in found.items() if name not in OF_A_CHECKOUT}


def run_named(name: str, words: Sequence[str]) -> None:
    """Run a tool's file as Python does; what it prints names tools as they are started here."""
    sys.argv = [f'cellseg {name}', *words]
    path = str(tools()[name])
    lay_out = argparse.HelpFormatter.format_help

    def typed_help(formatter: argparse.HelpFormatter) -> str:
        text = as_typed(lay_out(formatter))
        return text if HOME == REPOSITORY else re.sub(r'(?<![\w/.])configs/', CONFIG_SCHEME, text)

    argparse.HelpFormatter.format_help = typed_help
    code = SourceFileLoader('__main__', path).get_code('__main__')
    exec(code, {'__name__': '__main__', '__file__': path, 'print': typed_print})


def typed_print(*parts: object, **how: object) -> None:
    """Print with tools named as they are started here."""
    builtins.print(*(as_typed(str(part)) for part in parts), **how)


def answer(words: list[str]) -> int:
    """Do what is asked of ``cellseg`` itself."""
    parser = argparse.ArgumentParser(
        prog='cellseg',
        usage='cellseg TOOL ...',
        description=__doc__.partition('\n``python -m')[0],
        epilog=table_of_tools(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--version', action='store_true', help='versions, and which ops are in use')
    parser.add_argument(
        '--print-completion',
        choices=SHELLS,
        metavar='SHELL',
        help=f'a script that completes commands in {", ".join(SHELLS)}',
    )
    if not words[0].startswith('-'):
        raise CellSegError(no_such_tool(words[0]))
    args = parser.parse_args(words)
    print(completion(args.print_completion) if args.print_completion else versions())
    return 0


def table_of_tools() -> str:
    """Return one line a tool, from the first line of its description."""
    lines = ['tools:']
    for name, path in tools().items():
        described = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''
        lines.append(f'  {name:20} {described.partition(chr(10))[0]}')
    return '\n'.join(lines)


def no_such_tool(word: str) -> str:
    """Return one sentence for a word that is no tool, with the nearest one."""
    near = difflib.get_close_matches(word.replace('-', '_'), tools(), n=1)
    named = f'; did you mean {near[0]}' if near else ''
    return f'{word}: no such tool; expected one of {", ".join(tools())}{named}'


def versions() -> str:
    """Return the versions in use; torch is imported to tell the ops, where it is there."""
    found = {name: version_of(names) for name, names in STACK.items()}
    lines = [
        f'cellseg_mm {cellseg_mm.__version__}, Python {platform.python_version()}, {PACKAGE}',
        ', '.join(f'{name} {version}' for name, version in found.items() if version),
    ]
    absent = [name for name in STACK if not found[name]]
    if absent:
        lines.append(f'not installed: {", ".join(absent)}')
    lines.append(f'ops: {ops()}')
    return '\n'.join(line for line in lines if line)


def version_of(distributions: Sequence[str]) -> str:
    """Return the installed version of the first distribution there is; '' without any."""
    from importlib import metadata

    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ''


def ops() -> str:
    """Return where NMS and RoIAlign come from."""
    if not version_of(STACK['torch']):
        return 'in the model files (.cellseg, .onnx); configs and checkpoints need torch'
    try:
        return f'NMS and RoIAlign of {runtime.ops_backend()}'
    except ImportError as error:
        return f'none ({error})'


def completion(shell: str) -> str:
    """Return a script that completes tools and their options in a shell.

    Raises:
        ConfigError: The package that writes it is absent.
    """
    try:
        import shtab
    except ImportError:
        raise ConfigError(
            '--print-completion: the package shtab is not installed; it writes the script; '
            'pip install shtab'
        ) from None
    parser = argparse.ArgumentParser(prog='cellseg')
    parser.add_argument('--version', action='store_true', help='versions in use')
    branches = parser.add_subparsers()
    for name, path in tools().items():
        found = parser_of(path)
        described = (found.description or '').partition('\n')[0]
        branches.add_parser(name, parents=[found], add_help=False, help=described)
    return shtab.complete(parser, shell)


def parser_of(path: Path) -> argparse.ArgumentParser:
    """Return the parser of a tool: each makes one and parses before it does anything else."""
    found: list[argparse.ArgumentParser] = []

    class Made(BaseException):
        """Ends the tool where it would parse."""

    def remember(parser: argparse.ArgumentParser, *_: object) -> None:
        found.append(parser)
        raise Made

    parse: Callable = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = remember
    try:
        runpy.run_path(str(path))['main']()
    except Made:
        pass
    finally:
        argparse.ArgumentParser.parse_args = parse
    return found[0]


if __name__ == '__main__':
    main()

"""Advice in messages names options of the tool that prints it, or says whose they are.

Read from the sentences of the package: a message with ``--option`` either names a tool that has it,
or lies in a module whose messages one tool prints, or all of several that share the option.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / 'cellseg_mm'
OPTION = re.compile(r'(?<![\w-])--[a-z][a-z-]*')
TOOLS = sorted(path.name for path in (ROOT / 'tools').glob('*.py'))

# Whose messages a module's are; the longest prefix counts. Others must name the tool.
PRINTED_BY = {
    'checks/browse.py': ['browse.py'],
    'checks': ['check.py'],
    'cli.py': [],
    'core/trainings.py': ['train.py', 'test.py'],
    'data/contents.py': ['predict.py'],  # only predict gives a choice that can be wrong
    'data/importing': ['import_data.py'],
    'data/preparing': ['prepare_data.py'],
    'data/slides': ['predict.py'],  # the same choice
    'exporting': ['export.py'],
    'light': ['predict.py'],
    'predict': ['predict.py'],
    'selection': ['find_best.py'],
    'training/cross_validation.py': ['cross_validate.py'],
    'training': ['train.py'],
    'weights/conversion.py': ['convert_detectron2.py'],
}
OTHERS = (  # options of pip, of Slurm, and of style sheets
    *('--force-reinstall', '--no-deps', '--no-cache-dir', '--no-build-isolation', '--no-binary'),
    *('--array', '--gres', '--cpus-per-task', '--time', '--output', '--p', '--e', '--share'),
    *('--dependency', '--wrap'),
)


@cache
def options_of(tool: str) -> frozenset[str]:
    """Return the options of a tool, those that shared functions add included."""
    source = (ROOT / 'tools' / tool).read_text(encoding='utf-8')
    found = set(OPTION.findall(source))
    cli = (PACKAGE / 'cli.py').read_text(encoding='utf-8')
    for node in ast.parse(cli).body:
        if isinstance(node, ast.FunctionDef) and f'{node.name}(' in source:
            found |= set(OPTION.findall(ast.unparse(node)))
    return frozenset(found)


def sentences(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of each string of several words; docstrings are none."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            skipped.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(inner) for inner in ast.walk(node) if inner is not node}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else '{}' for v in node.values)
            yield node.lineno, ''.join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def faults(module: str, text: str) -> list[str]:
    """Return what is wrong with the options that a sentence of a module names."""
    named = [tool for tool in TOOLS if re.search(rf'(?<!\w){re.escape(tool)}', text)]
    prefixes = [p for p in PRINTED_BY if module == p or module.startswith(f'{p}/')]
    printers = PRINTED_BY[max(prefixes, key=len)] if prefixes else []
    wrong = []
    if text.startswith(' --'):  # part of a command, which begins elsewhere
        return []
    typed = OPTION.match(text)  # a message about an option begins with it, as it was typed
    known = {
        *OTHERS,
        *([typed[0]] if typed else []),
        *re.findall("MMDetection's own (--\\w+)", text),
    }
    for option in sorted(set(OPTION.findall(text)) - known):
        is_named = any(option in options_of(tool) for tool in named)
        is_own = bool(printers) and all(option in options_of(tool) for tool in printers)
        if not is_named and not is_own:
            wrong.append(f'{option} (printed by {printers or "any tool"}, names {named})')
    return wrong


MODULES = [path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob('*.py'))]


@pytest.mark.parametrize('module', MODULES)
def test_options_in_messages_belong_to_the_tool_that_prints_them(module: str) -> None:
    wrong = [
        f'{module}:{line}: {fault}: {text!r}'
        for line, text in sentences(PACKAGE / module)
        if ' ' in text.strip()
        for fault in faults(module, text)
    ]
    assert not wrong, '\n'.join(wrong)


def test_the_rule_finds_what_it_is_for() -> None:
    assert faults('data/tiff.py', 'raise it with --max-pixels')
    assert not faults('data/tiff.py', 'raise it with prepare_data.py --max-pixels')
    assert faults('data/tiff.py', 'cut it with prepare_data.py --overlap')  # predict's
    assert faults('data/importing/coco.py', 'choose --level 0')
    assert not faults('data/importing/coco.py', 'name it with --class')


def test_no_reader_of_files_speaks_of_the_data_folder() -> None:
    """exclude.txt belongs to data folders; predict and importing read files, too."""
    for name in ('tiff.py', 'labels.py', 'image_reader.py', 'intensity.py', 'file_kind.py'):
        assert not any('exclude.txt' in text for _, text in sentences(PACKAGE / 'data' / name))
